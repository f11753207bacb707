"""Sweeps: validation only, resumable, best recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from reftune.config.loader import load
from reftune.errors import DataError, RecipeError, TrainingError
from reftune.report.model import Figure
from reftune.training import stages
from reftune.training.sweep import Cell, cells_of, ranked, sweep

GRID = {"optimiser.lr": [1e-9, 1e-2], "adapter.rank": [1, 2]}


def test_grid_selects_on_validation_and_writes_the_best(recipe, with_stage, monkeypatch):
    seen, real = [], stages.train

    def spy(recipe, **more):
        seen.append(recipe)
        return real(recipe, **more)

    monkeypatch.setattr(stages, "train", spy)
    recipe = with_stage(recipe, evaluate_every=3)
    result = sweep(recipe, GRID, metric="validation_loss", progress=False)
    assert all(cell.evaluation.split != "test" for cell in seen) and len(seen) == 4
    assert result.best.values["optimiser.lr"] == 1e-2
    losses = [cell.figure.mean for cell in result.cells]
    assert losses == sorted(losses)
    best = load(result.folder / "best.yaml")
    assert best == result.recipe and best.name == "one-best"
    assert best.evaluation == recipe.evaluation
    assert best.stages[0].optimiser.lr == 1e-2
    table = result.table().to_markdown()
    assert table.splitlines()[0].startswith("| optimiser.lr | adapter.rank | validation_loss")
    assert json.loads((result.folder / "sweep.json").read_text())["metric"] == "validation_loss"

    before = {p: p.stat().st_mtime_ns for p in result.folder.rglob("metrics.jsonl")}
    again = sweep(recipe, GRID, metric="validation_loss", progress=False)
    assert again.best == result.best
    assert {p: p.stat().st_mtime_ns for p in result.folder.rglob("metrics.jsonl")} == before


def test_the_tasks_metric_is_the_default(recipe):
    result = sweep(recipe, {"adapter.rank": [1]}, progress=False)
    assert result.metric == "accuracy" and result.best.figure.n == 6
    report = json.loads((Path(recipe.output) / "one" / "rank-1" / "report.json").read_text())
    assert report["split"] == "validation" and "base_accuracy" not in report["figures"]


def test_refusals(recipe, monkeypatch):
    from reftune.tasks.own import Own

    with pytest.raises(RecipeError, match=r"unknown key"):
        sweep(recipe, {"adapter.rankk": [1]}, progress=False)
    with pytest.raises(RecipeError, match="validation_loss is not computed"):
        sweep(recipe, {"adapter.rank": [1]}, metric="validation_loss", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(Own, "splits", ("train", "test"))
        with pytest.raises(DataError, match="no validation rows"):
            sweep(recipe, {"adapter.rank": [1]}, progress=False)
    place = Path(recipe.output) / recipe.name
    assert not place.exists()
    place.mkdir(parents=True)
    (place / "state.json").write_text("{}")
    with pytest.raises(RecipeError, match="holds a run"):
        sweep(recipe, {"adapter.rank": [1]}, progress=False)


def test_a_failing_cell_is_passed_over(recipe, monkeypatch):
    real = stages.train

    def flaky(recipe, **more):
        if recipe.stages[0].adapter.options["rank"] == 1:
            raise TrainingError("The loss is nan at step 1.")
        return real(recipe, **more)

    monkeypatch.setattr(stages, "train", flaky)
    result = sweep(recipe, {"adapter.rank": [1, 2]}, progress=False)
    assert result.best.values == {"adapter.rank": 2}
    assert "failed: The loss is nan" in result.table().to_markdown()
    with pytest.raises(TrainingError, match="All 1 cells failed"):
        sweep(replace(recipe, name="two"), {"adapter.rank": [1]}, progress=False)


def test_cells():
    with pytest.raises(RecipeError, match="grid is empty"):
        cells_of({})
    with pytest.raises(RecipeError, match="no values for b"):
        cells_of({"a": [1], "b": []})
    with pytest.raises(RecipeError, match="201 cells"):
        cells_of({"a": list(range(201))})
    with pytest.raises(RecipeError, match="the same"):
        cells_of({"a": [1, 1]})
    names = [cell.name for cell in cells_of({"a.x": ["f5+l5"], "b.x": [[0, 1]]})]
    assert names == ["a.x-f5+l5_b.x-0-1"]


def test_ranking():
    cells = [
        Cell("a", {}, Figure(mean=0.5)),
        Cell("b", {}, None, "x"),
        Cell("c", {}, Figure(mean=0.7)),
        Cell("d", {}, Figure(mean=0.7)),
    ]
    assert [c.name for c in ranked(cells, "accuracy")] == ["c", "d", "a", "b"]
    assert [c.name for c in ranked(cells, "validation_loss")] == ["a", "c", "d", "b"]
