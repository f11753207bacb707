"""NLFT in the loop: accumulation, resume, frozen weights once, whole runs with their pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from crashes import killed_at

from reftune.config.loader import dump, load
from reftune.config.recipe import AdapterSpec, EvaluationSpec, TaskSpec
from reftune.errors import DataError
from reftune.model.build import apply_adapter
from reftune.objectives.nlft import Nlft, NlftConfig
from reftune.tasks.base import Example
from reftune.training.callbacks import read_metrics
from reftune.training.data import objective_of, training_rows
from reftune.training.encode import encode_all
from reftune.training.stages import plans, train

SETTINGS = {"ratio": 1.01, "least": 0.0, "most_wrong": 1.0, "sure": 0.02}
"""Constants under which a random model has both sets."""
ADAPTERS = {
    "loreft": AdapterSpec(options={"rank": 2, "dropout": 0.2}, positions="f2+l2"),
    "lora": AdapterSpec(method="lora", options={"rank": 2, "dropout": 0.2}),
}
TIMES = ("seconds", "tokens_per_second")
QUIET = {"progress": False}


def examples(count):
    found = []
    for i in range(count):
        guides = {"standard": f"{i}+{i}= it is {2 * i}:"}
        if i % 3 == 0:
            guides["judge"] = f"{i}+{i}= {i} is wrong:"
        found.append(Example(str(i), f"{i}+{i}=", f" {i + i % 3}", "", meta={"guides": guides}))
    return found


@pytest.fixture
def judged(tokenizer):
    return encode_all(examples(22), tokenizer, 64)


@pytest.fixture
def model():
    from tiny import tiny_llama

    def make(kind="loreft", **options):
        spec = ADAPTERS[kind]
        spec = replace(spec, options={**spec.options, **options})
        return apply_adapter(tiny_llama(initializer_range=0.2), spec, 0)

    return make


@pytest.fixture
def nlft_trainer(trainer_for):
    """Return a function that makes a trainer with NLFT's objective."""

    def make(model, rows, nlft=None, **settings):
        trainer = trainer_for(model, rows, **{"lr": 0.01, **settings})
        trainer.objective = Nlft(NlftConfig(**{**SETTINGS, **(nlft or {})}))
        return trainer

    return make


def logged(trainer):
    found = [line for line in trainer.state.log_history if "loss" in line]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


@pytest.mark.parametrize("guidance", ["current", "frozen"])
def test_accumulation_changes_nothing(model, judged, nlft_trainer, trained, tmp_path, guidance):
    ends, losses = [], []
    for micro in (8, 2):
        adapted = model(dropout=0.0)
        trainer = nlft_trainer(
            *(adapted, judged, {"guidance": guidance}),
            micro_batch_size=micro,
            folder=tmp_path / str(micro),
        )
        trainer.train()
        ends.append(trained(adapted))
        losses.append([line["loss"] for line in logged(trainer)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, end in ends[0].items():
        assert torch.allclose(end, ends[1][name], atol=5e-5), name


@pytest.mark.parametrize("kind", ["loreft", "lora"])
def test_training_moves_right_answers_up(model, judged, nlft_trainer, kind):
    adapted = model(kind)
    trainer = nlft_trainer(adapted, judged, lr=0.02, epochs=6)
    trainer.train()
    found = logged(trainer)
    assert found[-1]["nll"] < 0.8 * found[0]["nll"]
    names = ("token_weight", "salient_tokens", "near_tokens", "unlike_tokens", "wrong_answers")
    assert all(name in line for line in found for name in names)
    assert any(line["unlike_tokens"] > 0 for line in found)
    assert not adapted.training


def test_current_guidance_follows_the_model_and_frozen_does_not(model, judged, nlft_trainer):
    """The salient share changes with the model; what frozen rows carry does not."""
    trainer = nlft_trainer(model(), judged, lr=0.02, epochs=6)
    trainer.train()
    shares = [line["salient_tokens"] for line in logged(trainer)]
    assert shares[-1] > 1.2 * shares[0]
    frozen = nlft_trainer(model(), judged, {"guidance": "frozen"}, epochs=2)
    frozen.train()
    weights = [row.weights for row in frozen.train_dataset.rows]
    assert all(weights) and "salient_tokens" not in logged(frozen)[0]
    again = nlft_trainer(model(), judged, {"guidance": "frozen"}, epochs=1)
    again.train()
    assert [row.weights for row in again.train_dataset.rows] == weights


def test_validation_has_weights_too(model, judged, nlft_trainer):
    for guidance in ("current", "frozen"):
        trainer = nlft_trainer(
            model(), judged, {"guidance": guidance}, validation=judged, evaluate_every=2
        )
        trainer.train()
        losses = [x["eval_loss"] for x in trainer.state.log_history if "eval_loss" in x]
        assert losses and all(loss > 0.1 for loss in losses)


def test_full_fine_tuning_can_be_guided(judged, nlft_trainer):
    from tiny import tiny_llama

    whole = apply_adapter(tiny_llama(initializer_range=0.2), AdapterSpec(method="full"), 0)
    for guidance in ("current", "frozen"):
        nlft_trainer(whole, judged, {"guidance": guidance}, lr=1e-3, max_steps=2).train()


# Whole runs


@pytest.fixture
def run(recipe, tmp_path):
    """A recipe of NLFT on judged sums."""
    rows = [
        {
            "id": f"j{i}",
            "input": f"{i}+{i}",
            "output": f"{2 * i + i % 3}",
            "judgment": "the sum is wrong" if i % 3 else None,
            "answer": f"it is {2 * i}",
        }
        for i in range(24)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "judged.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "held.jsonl").write_text(text.replace('"j', '"h'), encoding="utf-8")
    task = TaskSpec(
        name="judged",
        train=str(tmp_path / "judged.jsonl"),
        test=str(tmp_path / "held.jsonl"),
        test_size=6,
        options={"max_new_tokens": 3},
    )
    stage = replace(recipe.stages[0], objective="nlft", objective_options=SETTINGS, epochs=3)
    return replace(recipe, task=task, stages=[stage])


def folder_of(recipe):
    return Path(recipe.output) / recipe.name


@pytest.mark.parametrize("guidance", ["current", "frozen"])
def test_a_killed_run_goes_on_to_the_same_bits(run, guidance):
    stage = replace(run.stages[0], objective_options={**SETTINGS, "guidance": guidance})
    whole = replace(run, stages=[stage], evaluation=EvaluationSpec(split="none"))
    train(whole, **QUIET)

    broken = replace(whole, name="broken")
    killed_at(5, broken, **QUIET)
    train(broken, resume=True, **QUIET)
    found = []
    for folder in map(folder_of, (whole, broken)):
        lines = read_metrics(folder / "metrics.jsonl")
        lines = [{k: v for k, v in x.items() if k not in TIMES} for x in lines]
        found.append((lines, (folder / "adapter" / "adapter_model.safetensors").read_bytes()))
    assert found[0] == found[1]


@pytest.mark.parametrize("guidance", ["current", "frozen"])
def test_a_run_draws_its_weights(run, guidance):
    stage = replace(run.stages[0], objective_options={**SETTINGS, "guidance": guidance})
    report = train(replace(run, stages=[stage]), **QUIET)
    plots = folder_of(run) / "plots"
    assert (plots / "token_weights.png").stat().st_size > 5_000
    assert (plots / "saliency.png").stat().st_size > 5_000
    page = (plots / "saliency.html").read_text("utf-8")
    assert page.count("<h2>") == 4 and page.count("judged wrong") == page.count(": right") == 2
    assert report.objectives == ["nlft"] and report.figures["adapter_accuracy"].n == 6
    plain = replace(
        run, name="plain", stages=[replace(stage, objective="sft", objective_options={})]
    )
    train(plain, **QUIET)
    assert not (folder_of(plain) / "plots" / "saliency.html").exists()


def test_supervised_training_on_the_same_answers_is_like_for_like(run, tokenizer):
    """The published baseline trains on other texts in another form; here it is one word."""
    from reftune import tasks

    data = tasks.get(run.task).load("train")
    stage = run.stages[0]
    plain = replace(stage, objective="sft", objective_options={})
    ours, theirs = (
        training_rows(objective_of(one), one, data, tokenizer, "causal").rows
        for one in (stage, plain)
    )
    assert [(a.input_ids, a.labels) for a in ours] == [(b.input_ids, b.labels) for b in theirs]


def test_plans_and_recipes_know_it(run, tmp_path):
    (plan,) = plans(run)
    assert plan.mode in ("off", "recompute", "store")
    text = dump(run)
    path = tmp_path / "nlft.yaml"
    path.write_text(text)
    assert load(path).stages[0].objective == "nlft"


def test_other_tasks_are_refused_by_name(recipe):
    stage = replace(recipe.stages[0], objective="nlft")
    with pytest.raises(DataError, match="does not show its right solution to NLFT"):
        train(replace(recipe, stages=[stage]), **QUIET)
