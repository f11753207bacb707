"""Whole runs on a tiny model: report, resume after a kill, stages, refusals."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from reftune.config.loader import dump, load
from reftune.config.recipe import AdapterSpec, EvaluationSpec, StageSpec
from reftune.errors import DataError, RecipeError, ReftuneError, TrainingError
from reftune.model.hub import push
from reftune.model.levels import PLACE
from reftune.report.model import Report
from reftune.report.tables import show_figure
from reftune.training.callbacks import read_metrics
from reftune.training.stage import artefact_kind, continues
from reftune.training.stages import train

QUIET = {"progress": False}


def folder_of(recipe):
    return Path(recipe.output) / recipe.name


def tensors(recipe, part="adapter"):
    found = sorted((folder_of(recipe) / part).rglob("*.safetensors"))
    assert found
    return [path.read_bytes() for path in found]


@pytest.mark.quick
def test_a_run_leaves_what_was_promised(recipe):
    report = train(recipe, **QUIET)
    folder = folder_of(recipe)
    for name in (
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "adapter/adapter_model.safetensors",
        "report.json",
        "report.md",
        "predictions.jsonl",
        "predictions_base.jsonl",
        "plots/loss.png",
        "plots/figures.png",
    ):
        assert (folder / name).is_file(), name
    assert Report.read(folder) == report
    assert {"adapter_accuracy", "base_accuracy"} <= report.figures.keys()
    assert report.figures["adapter_accuracy"].n == 6
    assert (
        report.steps == 6 and report.methods == ["loreft"] and report.metric == "adapter_accuracy"
    )
    size = (folder / "adapter/adapter_model.safetensors").stat().st_size
    assert report.adapter_bytes == size
    assert report.trainable_parameters == 2 * (2 * 2 * 32 + 2)
    assert 0 < report.train_seconds < 60
    assert report.model_extra["overlap"]["questions"] == 0
    assert "Adapter minus base" in (folder / "report.md").read_text()
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 6


def test_the_card_has_the_figures_of_the_run(recipe, monkeypatch):
    report = train(recipe, **QUIET)
    card = (folder_of(recipe) / "adapter" / "README.md").read_text()
    for name, figure in report.figures.items():
        assert f"| {name.replace('_', ' ')} | {show_figure(figure)}, 6 rows |" in card
    assert "| task | own, test rows |" in card and "| trained parameters | 260 |" in card
    assert 'reftune.load("PATH' in card and "pypi" not in card
    assert not list((folder_of(recipe) / "adapter").glob(".*"))

    seen = []
    upload = lambda folder, *_: seen.append((folder / "README.md").read_text()) or "address"  # noqa: E731
    monkeypatch.setattr("reftune.model.hub._upload", upload)
    push(folder_of(recipe), "owner/sums")
    assert seen == [card.replace(PLACE, "owner/sums")]


def test_a_finished_run_is_refused_or_its_report_returned(recipe):
    recipe = replace(recipe, evaluation=EvaluationSpec(split="none"))
    first = train(recipe, **QUIET)
    before = tensors(recipe)
    with pytest.raises(RecipeError, match="holds a finished run"):
        train(recipe, **QUIET)
    assert train(recipe, resume=True, **QUIET) == first
    assert tensors(recipe) == before and first.figures == {} and first.metric == ""


def test_the_loaded_adapter_is_what_was_trained(recipe):
    from reftune.model.checkpoint import load_adapter

    train(replace(recipe, evaluation=EvaluationSpec(split="none")), **QUIET)
    model, tokenizer = load_adapter(folder_of(recipe))
    saved = load_file(folder_of(recipe) / "adapter" / "adapter_model.safetensors")
    own = {n: p for n, p in model.named_parameters() if ".reft_" in n}
    assert len(own) == len(saved) and tokenizer.eos_token_id == 2


def start(*words):
    """Start `reftune train` in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    source = Path(__file__).parents[2] / "src"
    env["PYTHONPATH"] = os.pathsep.join([str(source), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-m", "reftune", "train", *map(str, words)]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)


def hashes(recipe):
    return [hashlib.sha256(data).hexdigest() for data in tensors(recipe)]


@pytest.mark.slow
def test_killed_and_resumed_is_bit_equal(recipe, with_stage, tmp_path):
    long = with_stage(recipe, epochs=60, checkpoint_every=7, evaluate_every=10)
    long = replace(long, evaluation=EvaluationSpec(split="none"), name="whole")
    train(long, **QUIET)
    killed = replace(long, name="killed")
    path = tmp_path / "killed.yaml"
    path.write_text(dump(killed))
    process = start(path)
    metrics = folder_of(killed) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while len(read_metrics(metrics)) < 40 and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder_of(killed) / "adapter").exists()
    assert start(path, "--resume").wait() == 0
    assert hashes(killed) == hashes(long)
    drop = ("seconds", "tokens_per_second")
    lines = [
        [
            {k: v for k, v in line.items() if k not in drop}
            for line in read_metrics(folder / "metrics.jsonl")
        ]
        for folder in (folder_of(long), folder_of(killed))
    ]
    assert lines[0] == lines[1]


def two_stages(recipe, first="lora", **second):
    one = replace(recipe.stages[0], adapter=AdapterSpec(method=first, options={"rank": 2}))
    options = {"rank": 2, "init": "identity"}
    two = replace(recipe.stages[0], adapter=AdapterSpec(name="fine", options=options), **second)
    return replace(recipe, stages=[one, two], evaluation=EvaluationSpec(split="none"))


def test_two_adapters_make_a_stack_and_finished_stages_are_not_repeated(recipe, monkeypatch):
    straight = replace(two_stages(recipe, checkpoint_every=1), name="straight")
    report = train(straight, **QUIET)
    assert report.methods == ["lora", "loreft"] and report.steps == 12
    assert (folder_of(straight) / "stack" / "stack.json").is_file()
    assert (folder_of(straight) / "stages" / "1" / "adapter").is_dir()
    held = [
        t
        for f in (folder_of(straight) / "stack").rglob("*.safetensors")
        for t in load_file(f).values()
    ]
    assert report.trainable_parameters == sum(tensor.numel() for tensor in held)
    assert "| task | own, not scored |" in (folder_of(straight) / "stack" / "README.md").read_text()

    from reftune.training.trainer import ReftTrainer

    broken = replace(straight, name="broken")
    real, steps = ReftTrainer.compute_loss, []

    def compute_loss(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 10:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ReftTrainer, "compute_loss", compute_loss)
    with pytest.raises(KeyboardInterrupt):
        train(broken, **QUIET)
    assert len(json.loads((folder_of(broken) / "state.json").read_text())["stages"]) == 1
    assert not (folder_of(broken) / "stack").exists()
    train(broken, resume=True, **QUIET)
    assert len(steps) == 10 + 3  # steps 4, 5, 6 of the second stage
    assert tensors(broken, "stack") == tensors(straight, "stack")


def test_the_same_adapter_is_trained_on(recipe):
    same = replace(recipe, stages=recipe.stages * 2, evaluation=EvaluationSpec(split="none"))
    assert continues(same, 1) and artefact_kind(same, 1) == "adapter"
    report = train(same, **QUIET)
    first = folder_of(same) / "stages" / "1" / "adapter" / "adapter_model.safetensors"
    assert report.steps == 12 and report.trainable_parameters == 2 * (2 * 2 * 32 + 2)
    assert first.read_bytes() != tensors(same)[0]


def everything(recipe):
    return {p: p.read_bytes() for p in Path(recipe.output).rglob("*") if p.is_file()}


def faulty(recipe, kind):
    stage = recipe.stages[0]
    if kind == "data":
        return replace(recipe, task=replace(recipe.task, train="nope.jsonl"))
    if kind == "layers":
        return replace(recipe, stages=[replace(stage, adapter=replace(stage.adapter, layers=[9]))])
    if kind == "max_len":
        return replace(recipe, stages=[replace(stage, max_len=4)])
    return replace(recipe, stages=[replace(stage, causal="recompute")])  # edits the first token


FAULTS = ("data", "layers", "max_len", "causal")


@pytest.mark.parametrize("kind", FAULTS)
def test_a_run_that_cannot_start_replaces_nothing(recipe, kind):
    recipe = replace(recipe, evaluation=EvaluationSpec(split="none"))
    with pytest.raises(ReftuneError):
        train(faulty(recipe, kind), **QUIET)
    assert not folder_of(recipe).exists()
    first = train(recipe, **QUIET)
    before = everything(recipe)
    with pytest.raises(ReftuneError):
        train(faulty(recipe, kind), overwrite=True, **QUIET)
    assert everything(recipe) == before
    assert train(replace(recipe, seed=7), overwrite=True, **QUIET) != first
    assert [p.name for p in Path(recipe.output).iterdir()] == [recipe.name]


def test_full_fine_tuning_leaves_a_model(recipe, with_stage):
    full = with_stage(recipe, adapter=AdapterSpec(method="full"))
    report = train(full, **QUIET)
    assert report.trainable_fraction == 1.0 and "base_accuracy" in report.figures
    from reftune.model.checkpoint import load_adapter

    model, tokenizer = load_adapter(folder_of(full))
    assert tokenizer is not None and type(model).__name__ == "LlamaForCausalLM"


def test_full_does_not_combine_with_adapters(recipe):
    mixed = two_stages(recipe)
    mixed = replace(mixed, stages=[mixed.stages[0], StageSpec(adapter=AdapterSpec(method="full"))])
    with pytest.raises(RecipeError, match="full changes the model itself"):
        train(mixed, **QUIET)
    assert not folder_of(mixed).exists()


def test_a_classifier_is_trained_and_scored(recipe, tmp_path):
    for split in ("train", "validation", "test"):
        rows = [{"text": f"{i} is", "label": "even" if i % 2 == 0 else "odd"} for i in range(20)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = replace(recipe.task, options={"text": "text", "label": "label"})
    model = replace(recipe.model, head="classification")
    stage = replace(recipe.stages[0], objective="classification")
    classifier = replace(recipe, task=task, model=model, stages=[stage])
    report = train(classifier, **QUIET)
    assert report.figures["adapter_accuracy"].n == 20
    assert "base_accuracy" not in report.figures
    lines = read_metrics(folder_of(classifier) / "metrics.jsonl")
    assert all("accuracy" in line for line in lines)
    with pytest.raises(
        RecipeError, match=r'"own" is of kind classification, model\.head is causal'
    ):
        train(replace(recipe, name="other", task=task), **QUIET)
    with pytest.raises(
        RecipeError, match=r'objective "sft" learns text, but `model\.head` is classification'
    ):
        train(replace(recipe, name="other", task=task, model=model), **QUIET)


def test_faults_are_found_before_anything_is_written(recipe, with_stage):
    for faulty in (
        replace(recipe, stages=[]),
        with_stage(recipe, objective="sfd"),
        with_stage(recipe, objective_options={"label_smoothing": 0.1}),
        with_stage(recipe, micro_batch_size=3),
        replace(recipe, track=["mlflow"]),
    ):
        with pytest.raises(RecipeError):
            train(faulty, **QUIET)
    assert not folder_of(recipe).exists()


def test_overlap_is_reported(recipe, tmp_path):
    rows = (tmp_path / "train.jsonl").read_text().splitlines(True)
    with (tmp_path / "test.jsonl").open("a") as file:
        file.writelines(rows[:2])
    report = train(recipe, **QUIET)
    assert report.model_extra["overlap"]["questions"] == 2
    assert "2 of 8 test questions" in (folder_of(recipe) / "report.md").read_text()


def test_rows_that_cannot_be_learned_stop_the_run_early(recipe, with_stage):
    with pytest.raises(DataError, match="does not fit"):
        train(with_stage(recipe, max_len=4), **QUIET)
    assert not (folder_of(recipe) / "adapter").exists()


def test_a_failed_run_leaves_no_adapter_and_may_be_started_again(recipe, with_stage, monkeypatch):
    import torch

    from reftune.objectives.base import Loss
    from reftune.objectives.sft import Sft

    real = Sft.__call__
    with monkeypatch.context() as patch:
        patch.setattr(
            Sft,
            "__call__",
            lambda self, run, batch, n: Loss(real(self, run, batch, n).loss * torch.inf),
        )
        with pytest.raises(TrainingError, match="at step 1"):
            train(recipe, **QUIET)
    assert not (folder_of(recipe) / "adapter").exists()
    assert train(with_stage(recipe, epochs=1), **QUIET).steps == 3


def test_the_recipe_in_the_folder_repeats_the_run(recipe):
    recipe = replace(recipe, evaluation=EvaluationSpec(split="none"))
    train(recipe, **QUIET)
    again = replace(load(folder_of(recipe) / "recipe.yaml"), name="again")
    train(again, **QUIET)
    assert tensors(again) == tensors(recipe)


def test_threads_are_given_back(recipe):
    import torch

    before = torch.get_num_threads()
    train(replace(recipe, threads=1, evaluation=EvaluationSpec(split="none")), **QUIET)
    assert torch.get_num_threads() == before


def test_gradient_checkpointing_gives_the_same_adapter(recipe, with_stage):
    plain = replace(recipe, evaluation=EvaluationSpec(split="none"))
    plain = with_stage(plain, adapter=AdapterSpec(options={"rank": 2}))
    saving = with_stage(replace(plain, name="saving"), gradient_checkpointing=True)
    train(plain, **QUIET)
    train(saving, **QUIET)
    assert tensors(plain) == tensors(saving)


def test_resuming_on_other_rows_is_refused(recipe, with_stage, monkeypatch):
    from reftune.training import trainer

    long = with_stage(recipe, epochs=2, checkpoint_every=2)
    real = trainer.ReftTrainer.training_step

    def dies(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise RuntimeError("crash")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(trainer.ReftTrainer, "training_step", dies)
    with pytest.raises(RuntimeError, match="crash"):
        train(long, **QUIET)
    monkeypatch.undo()
    data = Path(long.task.train)
    before = data.read_text()
    data.write_text("\n".join(reversed(before.splitlines())) + "\n")
    with pytest.raises(RecipeError, match="training rows are not those"):
        train(long, resume=True, **QUIET)
    data.write_text(before)
    assert train(long, resume=True, **QUIET).steps == 6
