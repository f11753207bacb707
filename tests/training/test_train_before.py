"""What is found or decided before the first step: names, context, processes, held-out rows."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import tiny_folder

from reftune.config.recipe import AdapterSpec, EvaluationSpec, ModelSpec, StageSpec
from reftune.errors import AdapterError, RecipeError
from reftune.inference import evaluate
from reftune.training.callbacks import read_metrics
from reftune.training.checkpoints import best_so_far
from reftune.training.data import holds_out, load_data
from reftune.training.stages import check, train

QUIET = {"progress": False}
NONE = EvaluationSpec(split="none")


def folder_of(recipe):
    return Path(recipe.output) / recipe.name


def test_two_interventions_stand_on_one_model_under_two_names(recipe):
    from reftune.model.adapters import adapter_names
    from reftune.model.checkpoint import load_adapter

    second = replace(recipe.stages[0], adapter=AdapterSpec("direft", options={"rank": 2}))
    both = replace(recipe, stages=[*recipe.stages, second], evaluation=NONE)
    assert train(both, **QUIET).methods == ["loreft", "direft"]
    model, _ = load_adapter(folder_of(both))
    assert sorted(adapter_names(model)) == ["default", "stage2"]
    on_top = replace(
        recipe,
        name="top",
        model=replace(recipe.model, adapter=str(folder_of(both))),
        evaluation=NONE,
    )
    train(on_top, **QUIET)
    model, _ = load_adapter(folder_of(on_top))
    assert sorted(adapter_names(model)) == ["default", "stage1", "stage2"]
    named = replace(recipe.stages[0], adapter=AdapterSpec(name="stage2"))
    with pytest.raises(RecipeError, match=r'model\.adapter holds an adapter named "stage2"'):
        check(replace(on_top, stages=[named]))


def test_a_row_must_fit_into_the_context(recipe, with_stage):
    with pytest.raises(RecipeError, match=r"max_len is 513; the context of .* is 512 tokens\."):
        train(with_stage(recipe, max_len=513), **QUIET)
    assert not (folder_of(recipe) / "checkpoints").exists()


def test_processes_and_trackers_are_checked_before_anything(recipe, with_stage, monkeypatch):
    import importlib.util

    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RecipeError, match="batch_size 8 is not a multiple of micro_batch_size 4"):
        check(with_stage(recipe, micro_batch_size=4))
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match='tracker "wandb" is not installed'):
        check(replace(recipe, track=["wandb"]))


def test_rows_are_held_out_only_where_a_run_reads_them(recipe, with_stage, caplog):
    bare = replace(recipe, task=replace(recipe.task, validation=None))
    assert len(load_data(bare).splits["train"]) == 24
    with caplog.at_level(logging.INFO):
        for read in (
            with_stage(bare, evaluate_every=2),
            with_stage(bare, keep="best"),
            replace(bare, evaluation=EvaluationSpec(split="validation")),
            replace(bare, task=replace(bare.task, test=None)),
        ):
            assert len(load_data(read).splits["train"]) == 22
    assert caplog.text.count("2 of 24 training rows are held out for validation") == 4
    untested = replace(bare, task=replace(bare.task, test=None), evaluation=NONE)
    assert len(load_data(untested).splits["train"]) == 24
    assert not holds_out(recipe, load_data(recipe).task)


def test_one_long_test_prompt_does_not_lose_a_run(recipe, with_stage, tmp_path):
    folder = tiny_folder(tmp_path / "short", max_position_embeddings=32)
    with (tmp_path / "test.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "1" * 80, "completion": " 2"}) + "\n")
    short = with_stage(replace(recipe, model=ModelSpec(name=str(folder))), max_len=32)
    report = train(short, **QUIET)
    assert report.model_extra["prompts_cut"] == 1 and report.figures["adapter_accuracy"].n == 7
    assert "1 scored prompts left no room" in (folder_of(short) / "report.md").read_text()


def classifier(recipe, tmp_path, **stage):
    for split in ("train", "validation", "test"):
        rows = [{"text": f"{i} is", "label": "even" if i % 2 == 0 else "odd"} for i in range(20)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return replace(
        recipe,
        task=replace(recipe.task, options={"text": "text", "label": "label"}),
        model=replace(recipe.model, head="classification"),
        stages=[replace(recipe.stages[0], objective="classification", **stage)],
        evaluation=NONE,
    )


def test_the_best_weights_may_be_chosen_by_the_metric(recipe, tmp_path, monkeypatch):
    values = iter([0.4, 0.9, 0.6])
    scoring = sys.modules["reftune.inference.evaluate"]
    seen = []

    def fake(*args, **kwargs):
        found = evaluate(*args, **kwargs)
        seen.append(kwargs["max_len"])
        figure = found.figures["accuracy"].model_copy(update={"mean": next(values)})
        return replace(found, figures={"accuracy": figure})

    monkeypatch.setattr(scoring, "evaluate", fake)
    made = classifier(
        recipe, tmp_path, max_steps=3, evaluate_every=1, keep="best", keep_by="metric", max_len=64
    )
    train(made, **QUIET)
    assert best_so_far(folder_of(made) / "checkpoints") == (2, 0.9)
    assert seen == [64] * 3
    lines = read_metrics(folder_of(made) / "metrics.jsonl")
    assert [line["validation_accuracy"] for line in lines if "validation_loss" in line] == [
        0.4,
        0.9,
        0.6,
    ]


def test_a_run_of_an_earlier_version_is_continued(recipe):
    recipe = replace(recipe, evaluation=NONE)
    first = train(recipe, **QUIET)
    file = folder_of(recipe) / "state.json"
    state = json.loads(file.read_text())
    del state["recipe"]["stages"][0]["keep_by"]
    del state["recipe"]["evaluation"]["top_k"]
    file.write_text(json.dumps(state))
    assert train(recipe, resume=True, **QUIET) == first
    other = replace(recipe, stages=[replace(recipe.stages[0], keep_by="metric", keep="best")])
    with pytest.raises(RecipeError, match=r"changed: stages\.0\.keep, stages\.0\.keep_by"):
        train(other, resume=True, **QUIET)


@pytest.mark.parametrize("text", ["{", "[]", '{"order": "lora"}'])
def test_a_broken_stack_below_is_an_error_of_ours(recipe, tmp_path, text):
    (tmp_path / "stack").mkdir()
    (tmp_path / "stack" / "stack.json").write_text(text)
    below = replace(recipe, model=replace(recipe.model, adapter=str(tmp_path / "stack")))
    with pytest.raises(
        AdapterError, match=r"stack\.json in .*(cannot be read|no settings|names no)"
    ):
        check(below)


def test_the_default_stage_stays_valid():
    assert StageSpec().max_len <= 512 and StageSpec().keep_by == "loss"
