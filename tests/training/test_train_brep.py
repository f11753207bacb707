"""BREP in the loop: labels that reach training, the controller over steps, resume, whole runs."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from crashes import StopAt, killed_at
from safetensors.torch import load_file

from reftune.config.loader import dump, load
from reftune.config.recipe import AdapterSpec, EvaluationSpec
from reftune.errors import AdapterError, RecipeError, TrainingError
from reftune.model.build import apply_adapter
from reftune.objectives.brep import Brep, BrepConfig
from reftune.report.model import Report
from reftune.training.callbacks import read_metrics
from reftune.training.data import objective_of, training_rows
from reftune.training.stages import check, plans, train

RED = AdapterSpec(
    method="red",
    site="mlp.up_proj",
    positions="all_prompt+generated:2",
    train_positions="all",
)
FAST = {"target": 0.1, "limit": 1.0}
"""A target that is reached within the few steps of these tests."""
TIMES = ("seconds", "tokens_per_second")


@pytest.fixture
def model():
    from tiny import tiny_llama

    return lambda: apply_adapter(tiny_llama(), RED, 0)


@pytest.fixture
def brep_trainer(trainer_for):
    """Return a function that makes a trainer with BREP's objective."""

    def make(model, rows, brep=None, **settings):
        trainer = trainer_for(model, rows, lr=0.02, **settings)
        trainer.objective = Brep(BrepConfig(**{**FAST, **(brep or {})}))
        return trainer

    return make


def lines(trainer, *names):
    found = [line for line in trainer.state.log_history if "loss" in line]
    return [{name: line[name] for name in names or line} for line in found]


WATCHED = ("loss", "token_accuracy", "bias_norm", "bias_error", "omega", "restraint_acted")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.quick
def test_each_step_is_logged_with_what_the_controller_did(model, rows, brep_trainer, trained):
    adapted = model()
    trainer = brep_trainer(adapted, rows, epochs=4)
    trainer.train()
    found = lines(trainer, *WATCHED)
    assert len(found) == 12
    norms = [p.norm() for n, p in trained(adapted).items() if n.endswith("bias")]
    assert found[-1]["bias_norm"] == pytest.approx(float(torch.stack(norms).mean()), rel=1e-6)
    assert [line["bias_error"] for line in found] == [0.1 - line["bias_norm"] for line in found]
    acted = [step for step, line in enumerate(found, 1) if line["restraint_acted"]]
    assert acted and set(acted) <= {4, 8, 12}
    for before, line in itertools.pairwise(found):
        assert line["restraint_acted"] == (line["omega"] < before["omega"])


def test_the_loss_of_a_step_has_the_omega_of_the_step_before(model, rows, brep_trainer):
    trainer = brep_trainer(model(), rows, epochs=4)
    trainer.train()
    found = lines(trainer, "loss", "omega", "cross_entropy")
    omegas = [0.1, *(line["omega"] for line in found)]
    for omega, line in zip(omegas, found, strict=False):
        assert line["loss"] == pytest.approx(omega * line["cross_entropy"], rel=1e-5)


@pytest.mark.parametrize("kind", ["pid", "project", "hinge"])
@pytest.mark.parametrize("crash", [3, 5, 9])
def test_resume_is_bit_equal(model, rows, brep_trainer, trained, tmp_path, kind, crash):
    settings = {"checkpoint_every": 2, "epochs": 4, "micro_batch_size": 4}
    straight = model()
    whole = brep_trainer(straight, rows, {"restraint": kind}, folder=tmp_path / "a", **settings)
    whole.train()
    assert any(line["restraint_acted"] for line in lines(whole, "restraint_acted"))
    broken = brep_trainer(
        model(),
        rows,
        {"restraint": kind},
        folder=tmp_path / "b",
        callbacks=[StopAt(crash)],
        **settings,
    )
    with pytest.raises(RuntimeError, match="crash"):
        broken.train()
    resumed = model()
    trainer = brep_trainer(resumed, rows, {"restraint": kind}, folder=tmp_path / "b", **settings)
    trainer.train(True)
    assert equal(trained(straight), trained(resumed))
    assert lines(trainer, *WATCHED) == lines(whole, *WATCHED)
    assert trainer.objective.state_dict() == whole.objective.state_dict()


@pytest.mark.parametrize("kind", ["pid", "hinge"])
def test_accumulation_gives_the_same_trajectory(model, rows, brep_trainer, trained, tmp_path, kind):
    found, ends = [], []
    for micro in (8, 1):
        adapted = model()
        settings = {"micro_batch_size": micro, "folder": tmp_path / str(micro)}
        trainer = brep_trainer(adapted, rows, {"restraint": kind}, **settings)
        trainer.train()
        found.append(lines(trainer, *WATCHED))
        ends.append(trained(adapted))
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    for name, end in ends[0].items():
        assert torch.allclose(end, ends[1][name], atol=2e-5), name


def test_validating_leaves_training_on_all_tokens(model, rows, brep_trainer, trained, tmp_path):
    """Evaluation uses the rule of inference in between; the training rule must come back."""
    one, two = model(), model()
    brep_trainer(one, rows, folder=tmp_path / "a").train()
    watched = brep_trainer(two, rows, validation=rows, folder=tmp_path / "b", evaluate_every=1)
    watched.score = None
    watched.train()
    assert equal(trained(one), trained(two))
    losses = [v for line in watched.state.log_history for k, v in line.items() if k == "eval_loss"]
    assert len(losses) == 6 and min(losses) > 1.0, "ω does not weigh validation"


def test_a_projection_holds_every_vector_at_every_step(model, rows, brep_trainer):
    trainer = brep_trainer(model(), rows, {"restraint": "project"}, epochs=4)
    trainer.train()
    found = lines(trainer, "bias_norm", "restraint_acted", "omega")
    assert max(line["bias_norm"] for line in found) <= 0.1 + 1e-6
    assert found[-1]["restraint_acted"] > 0 and {line["omega"] for line in found} == {0.1}


def test_the_controller_brakes_less_than_the_projection(model, rows, brep_trainer, tmp_path):
    """Under Adam the weight of a loss is no step size."""
    ends = {}
    for kind in ("none", "pid", "hinge", "project"):
        trainer = brep_trainer(
            model(),
            rows,
            {"restraint": kind},
            epochs=6,
            folder=tmp_path / kind,
        )
        trainer.train()
        ends[kind] = lines(trainer, "bias_norm")[-1]["bias_norm"]
    assert ends["none"] > ends["pid"] > ends["project"]
    assert ends["none"] > ends["hinge"]
    assert ends["pid"] > 0.15 > ends["project"]


def test_the_bias_alone_can_be_trained(rows, brep_trainer, trained):
    from tiny import tiny_llama

    adapted = apply_adapter(tiny_llama(), replace(RED, options={"train_scale": False}), 0)
    trainer = brep_trainer(adapted, rows)
    trainer.train()
    assert all(name.endswith("reft_bias") for name in trained(adapted))
    assert len(trainer.objective.vectors) == 2


def test_another_adapter_is_refused_before_a_step(adapted, rows, brep_trainer):
    trainer = brep_trainer(adapted(), rows)
    with pytest.raises(AdapterError, match="restraint: pid holds the bias vectors of red"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_trainer_says_when_parameters_are_sharded(model, rows, brep_trainer, monkeypatch):
    trainer = brep_trainer(model(), rows)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with pytest.raises(TrainingError, match="restraint: pid needs whole bias vectors; FSDP"):
        trainer.bind_objective()


# Whole runs


@pytest.fixture
def run(recipe):
    """A recipe of BREP on sums, with a second set of rows to score."""
    stage = replace(
        recipe.stages[0],
        adapter=RED,
        objective="brep",
        objective_options={**FAST, "prefix_tokens": 2, "prefix_share": 0.5},
        epochs=4,
    )
    return replace(recipe, stages=[stage])


QUIET = {"progress": False}


def folder_of(recipe):
    return Path(recipe.output) / recipe.name


def test_a_run_trains_cut_rows_draws_the_trace_and_goes_on(run, tokenizer):
    report = train(run, **QUIET)
    folder = folder_of(run)
    assert (folder / "plots" / "restraint.png").stat().st_size > 10_000
    assert report.objectives == ["brep"] and report.methods == ["red"]
    logged = read_metrics(folder / "metrics.jsonl")
    assert all(line.keys() >= {"bias_norm", "bias_target", "omega"} for line in logged)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["site"] == "mlp.up_proj" and config["train_positions"] == "all"

    broken = replace(run, name="broken")
    killed_at(7, broken, **QUIET)
    train(broken, resume=True, **QUIET)
    again = read_metrics(folder_of(broken) / "metrics.jsonl")
    strip = lambda found: [{k: v for k, v in x.items() if k not in TIMES} for x in found]  # noqa: E731
    assert strip(again) == strip(logged)
    files = [f / "adapter" / "adapter_model.safetensors" for f in (folder, folder_of(broken))]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert load_file(files[0]).keys() == load_file(files[1]).keys()


def test_the_rows_of_a_run_are_those_of_the_objective(run, tokenizer, sums_of):
    stage, data = run.stages[0], sums_of(0, 24)
    found = [training_rows(objective_of(stage), stage, data, tokenizer, "causal") for _ in range(2)]
    assert found[0].digest() == found[1].digest()
    plain = replace(stage, objective="sft", objective_options={})
    whole = training_rows(objective_of(plain), plain, data, tokenizer, "causal")
    assert whole.digest() != found[0].digest() and len(whole) == len(found[0]) == 24
    assert sum(a.learned < b.learned for a, b in zip(found[0].rows, whole.rows, strict=True)) == 12
    train(replace(run, evaluation=EvaluationSpec(split="none")), **QUIET)
    state = json.loads((folder_of(run) / "state.json").read_text())
    assert state["rows"]["0"] == found[0].digest()


def test_validation_rows_keep_their_labels(run):
    stage = replace(run.stages[0], evaluate_every=3)
    one = replace(run, stages=[stage], evaluation=EvaluationSpec(split="none"))
    train(one, **QUIET)
    seen = [x for x in read_metrics(folder_of(one) / "metrics.jsonl") if "validation_loss" in x]
    assert seen and all(x["validation_loss"] > 1.0 for x in seen), "neither ω nor prefixes"


def test_quirks_run_too(run):
    stage = replace(run.stages[0], max_len=32, epochs=1)
    quirky = {**stage.objective_options, "reference_quirks": True}
    one = replace(run, stages=[replace(stage, objective_options=quirky)])
    report = train(replace(one, evaluation=EvaluationSpec(split="none")), **QUIET)
    (stage_facts,) = report.model_extra["stages"]
    assert stage_facts["data"]["train"]["longest"] == 32


def test_faults_are_found_in_the_recipe(run):
    wrong = replace(run, stages=[replace(run.stages[0], adapter=AdapterSpec(method="loreft"))])
    with pytest.raises(RecipeError, match=r"restraint: pid .* the adapter's method is loreft"):
        check(wrong)
    options = {**run.stages[0].objective_options, "prefix_tokens": 0}
    bad = replace(run, stages=[replace(run.stages[0], objective_options=options)])
    with pytest.raises(RecipeError, match=r"objective\.prefix_tokens: prefix_tokens is 0"):
        check(bad)
    assert not folder_of(run).exists()


def test_the_plan_of_caching_looks_at_the_cut_rows(run):
    """A label that was cut must not count as what the last block's edits can still learn from."""
    (plan,) = plans(run)
    whole = replace(run, stages=[replace(run.stages[0], objective="sft", objective_options={})])
    (other,) = plans(whole)
    assert plan.mode == other.mode == "off" and plan.length < other.length


# Further rows


def test_further_rows_are_scored_beside_the_runs_own(run, tmp_path):
    rows = [{"prompt": f"{i}+{i}=", "completion": f" {2 * i}"} for i in range(40, 45)]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "one.yaml"
    path.write_text(dump(run))
    one = load(path, [f"evaluation.also.more.test={tmp_path / 'more.jsonl'}"])
    assert load_back(one, tmp_path) == one
    report = train(one, **QUIET)
    names = {
        "adapter_accuracy",
        "base_accuracy",
        "adapter_accuracy_on_more",
        "base_accuracy_on_more",
    }
    assert report.figures.keys() == names
    figure = report.figures["adapter_accuracy_on_more"]
    assert figure.n == 5 and figure.has_interval
    assert report.metric == "adapter_accuracy" and report.primary()[1].n == 6
    tests = report.model_extra["adapter_minus_base_on"]
    assert tests.keys() == {"more"} and tests["more"].keys() >= {"difference", "low", "high"}
    folder = folder_of(one)
    for name in ("predictions_on_more.jsonl", "predictions_base_on_more.jsonl"):
        assert len((folder / name).read_text().splitlines()) == 5
    assert "Adapter minus base on more:" in (folder / "report.md").read_text()
    assert Report.read(folder) == report


def load_back(recipe, folder):
    path = folder / "back.yaml"
    path.write_text(dump(recipe))
    return load(path)


def test_further_rows_among_the_training_rows_are_named(run, tmp_path, caplog):
    lines_ = (tmp_path / "train.jsonl").read_text().splitlines(True)[:3]
    (tmp_path / "leak.jsonl").write_text("".join(lines_))
    path = tmp_path / "one.yaml"
    path.write_text(dump(run))
    one = load(path, [f"evaluation.also.leak.test={tmp_path / 'leak.jsonl'}"])
    from reftune.training.data import load_data

    load_data(one)
    assert "leak: 3 of 3 test questions" in caplog.text
    with pytest.raises(
        RecipeError, match=r"evaluation\.also\.same\.test: .* is the train data too"
    ):
        load(path, [f"evaluation.also.same.test={tmp_path / 'train.jsonl'}"])
