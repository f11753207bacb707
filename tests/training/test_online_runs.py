"""Whole runs from a recipe: warm-up, rollouts, resume, report; and what a recipe may not ask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from reftune.config.loader import dump, load
from reftune.config.recipe import AdapterSpec, EvaluationSpec, ModelSpec, OptimiserSpec, StageSpec
from reftune.errors import AdapterError, RecipeError
from reftune.training.callbacks import read_metrics
from reftune.training.online_stage import start_of
from reftune.training.stages import check, plans, train

QUIET = {"progress": False}
TIMES = ("seconds", "tokens_per_second")
ADAPTER = AdapterSpec(options={"rank": 2}, positions="all")


@pytest.fixture
def run(recipe):
    """A warm-up of three steps, then four rollouts on the same adapter."""
    rates = OptimiserSpec(lr=5e-3, schedule="constant")
    warm = StageSpec(adapter=ADAPTER, epochs=1, batch_size=8, optimiser=rates)
    options = {"max_new_tokens": 3, "beta": 0.05}
    stage = {"objective_options": options, "max_steps": 4, "checkpoint_every": 1}
    watched = {"evaluate_every": 2, "keep": "best"}
    trained = replace(warm, objective="reinforced", **stage, **watched)
    task = replace(recipe.task, reward="numeric")
    return replace(recipe, task=task, stages=[warm, trained])


def folder_of(recipe):
    return Path(recipe.output) / recipe.name


def lines(recipe):
    found = read_metrics(folder_of(recipe) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


def test_a_run_warms_up_learns_and_reports_and_a_killed_one_ends_alike(run, monkeypatch):
    report = train(run, **QUIET)
    folder = folder_of(run)
    assert report.objectives == ["sft", "reinforced"] and report.steps == 3 + 4
    assert (folder / "plots" / "rollouts.png").stat().st_size > 20_000
    assert {p.name for p in folder.iterdir()} >= {"adapter", "predictions.jsonl", "report.md"}
    assert report.figures["adapter_accuracy"].n == report.figures["base_accuracy"].n == 6
    logged = [line for line in lines(run) if line["stage"] == 2]
    assert [line["step"] for line in logged] == [0, 1, 2, 2, 3, 4, 4]
    assert all(len({"loss", "validation_accuracy"} & line.keys()) == 1 for line in logged)
    assert logged[1]["kl"] == 0.0

    from reftune.training.online import OnlineTrainer

    broken, real = replace(run, name="broken"), OnlineTrainer._step

    def dies(self):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(OnlineTrainer, "_step", dies)
        with pytest.raises(KeyboardInterrupt):
            train(broken, **QUIET)
    again = train(broken, resume=True, **QUIET)
    assert lines(broken) == lines(run)
    files = [f / "adapter" / "adapter_model.safetensors" for f in (folder, folder_of(broken))]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert again.figures == report.figures


def test_without_a_warm_up_the_adapter_starts_at_the_identity(run, monkeypatch):
    seen = {}

    from reftune.training.online import OnlineTrainer

    def look(self, resume_from_checkpoint=False):
        weights = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        seen.update({n.rpartition(".")[2]: float(p.detach().norm()) for n, p in weights.items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(OnlineTrainer, "train", look)
    alone = replace(run, stages=[run.stages[1]], name="alone")
    with pytest.raises(KeyboardInterrupt):
        train(alone, **QUIET)
    assert seen
    from tiny import tiny_llama

    from reftune.inference.prompts import pad
    from reftune.model import off
    from reftune.model.build import apply_adapter

    model, ids = apply_adapter(tiny_llama(), start_of(alone.stages[0]), 0), pad([[1, 9, 12]], 0)
    edited = model(**vars(ids)).logits
    with off(model):
        assert (model(**vars(ids)).logits - edited).abs().max() < 1e-6
    paper = replace(run.stages[1], adapter=replace(ADAPTER, options={"init": "paper"}))
    assert start_of(paper).options == {"init": "paper"}
    with pytest.raises(AdapterError, match="consreft"):
        constant = replace(ADAPTER, method="consreft")
        check(replace(run, stages=[replace(run.stages[1], adapter=constant)]))


def test_lora_and_self_training_run_too(run):
    lora = AdapterSpec(method="lora", options={"rank": 2})
    own = {"objective": "online_st", "objective_options": {"max_new_tokens": 3}}
    stages = [replace(run.stages[0], adapter=lora), replace(run.stages[1], adapter=lora, **own)]
    one = replace(run, stages=stages, evaluation=EvaluationSpec(split="none"))
    report = train(one, **QUIET)
    assert report.objectives == ["sft", "online_st"]
    (folder,) = (folder_of(one) / "adapter").glob("*.safetensors")
    assert load_file(folder)
    steps = [x for x in lines(one) if x["stage"] == 2 and "loss" in x]
    assert all(x["gold_loss"] > 0 and 0 <= x["reward"] <= 1 for x in steps)
    assert (folder_of(one) / "plots" / "rollouts.png").is_file()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_checkpointing": True}, 'gradient_checkpointing does not go with objective "re'),
        ({"precision": "fp16"}, "precision: fp16 does not go"),
        ({"causal": "store"}, "causal: store does not go"),
        ({"objective_options": {"lam": 2.0}}, r"objective\.lam: lam is 2\.0"),
    ],
)
def test_what_the_loop_cannot_do_is_refused_before_anything_loads(run, changes, message):
    wrong = replace(run, stages=[run.stages[0], replace(run.stages[1], **changes)])
    with pytest.raises(RecipeError, match=message):
        check(wrong)
    assert not folder_of(run).exists()


@pytest.mark.quick
def test_encoder_decoders_and_wrong_options_are_refused(run, tmp_path):
    with pytest.raises(RecipeError, match=r"trains decoders only; model\.head is seq2seq"):
        check(replace(run, model=ModelSpec(name="t5-small", head="seq2seq")))
    path = tmp_path / "one.yaml"
    path.write_text(dump(run).replace("beta:", "betta:"))
    with pytest.raises(RecipeError, match=r'unknown key "betta".*beta'):
        load(path)


@pytest.mark.quick
def test_answers_need_room(run):
    tight = replace(run.stages[1], max_len=32, objective_options={"max_new_tokens": 40})
    one = replace(run, stages=[replace(tight, adapter=ADAPTER)], name="tight")
    with pytest.raises(RecipeError, match="max_new_tokens 40 leaves no room"):
        train(one, **QUIET)


@pytest.mark.quick
def test_nothing_is_cached_in_a_stage_of_rollouts(run):
    assert plans(run)[1].mode == "off"
