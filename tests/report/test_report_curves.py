"""Rows of a grid as points of curves, tested in pairs, beside baselines that nobody trains."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from reftune.config.loader import dump
from reftune.errors import RecipeError
from reftune.inference.predictions import Prediction, save_predictions
from reftune.inference.stats import mcnemar, paired_over_seeds
from reftune.report import grid as grids
from reftune.report.cells import read_grid
from reftune.report.model import Figure, Report, ResultRow, base_name, owner_of
from reftune.report.plots import over
from reftune.report.results import join_seeds, publish, read_results, render, rows_of
from reftune.report.tables import report_table, result_table

pytestmark = pytest.mark.quick

PLAN = """\
name: heft
recipe: {recipe}
seeds: [1, 2]
tested: choice_accuracy
rows:
  - {{method: base}}
  - {{method: majority}}
  - {{name: lora-1, line: lora, x: {{epochs: 1}}, set: {{epochs: 1}}}}
  - {{name: lora-3, line: lora, x: {{epochs: 3}}, set: {{epochs: 3}}}}
  - {{name: lora-9, line: lora, x: {{epochs: 9}}, set: {{epochs: 9}}}}
  - name: heft-3
    line: heft
    x: {{epochs: 3}}
    set: {{epochs: 4}}
    against: [lora-3]
    as_long_as: [lora]
  - {{name: heft-9, line: heft, x: {{epochs: 9}}, set: {{epochs: 10}}, as_long_as: [lora]}}
"""
ROWS = 40


@pytest.fixture
def plan(tmp_path):
    recipe = tmp_path / "base.yaml"
    recipe.write_text("task: families\nadapter: lora\n", encoding="utf-8")
    path = tmp_path / "grid.yaml"
    path.write_text(PLAN.format(recipe=recipe), encoding="utf-8")
    return path


def right(epochs, seed):
    """Return which of the questions a run answers: the more epochs the more."""
    return [float((7 * i + seed) % ROWS < 10 + 2 * epochs + seed) for i in range(ROWS)]


def fake_train(recipe, resume=False, progress=True, **_):
    """Write a run whose training takes ten seconds an epoch."""
    folder = Path(recipe.output) / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(dump(recipe))
    epochs = recipe.stages[0].epochs
    values = right(epochs, recipe.seed)
    save_predictions(
        folder / "predictions.jsonl",
        [
            Prediction(str(i), "", "", None, "", {"accuracy": 0.0, "choice_accuracy": value})
            for i, value in enumerate(values)
        ],
    )
    share = Figure(mean=sum(values) / ROWS, n=ROWS, low=0.1, high=0.9)
    figures = {"adapter_accuracy": share, "adapter_choice_accuracy": share}
    figures["majority_accuracy"] = Figure(mean=0.55, n=ROWS, low=0.4, high=0.7)
    if recipe.evaluation.compare_base:
        figures["base_accuracy"] = Figure(mean=0.2, n=ROWS, low=0.1, high=0.3)
    report = Report(
        name=recipe.name,
        figures=figures,
        methods=["lora"],
        task="passages",
        model="nano",
        seed=recipe.seed,
        metric="adapter_accuracy",
        train_seconds=10.0 * epochs + recipe.seed,
        eval_seconds=100.0,
    )
    report.write(folder / "report.json")
    return report


@pytest.fixture
def rows(plan, tmp_path):
    grid = read_grid(plan, str(tmp_path / "runs"))
    assert grids.run_grid(grid, train=fake_train) == []
    return {row.name: row for row in grids.grid_rows(grid, "cmd")}


def test_rows_know_their_places(rows):
    assert list(rows)[:4] == ["heft/base", "heft/majority", "heft/lora-1", "heft/lora-3"]
    row = rows["heft/lora-3"]
    assert (row.line, row.x) == ("lora", {"epochs": 3.0, "train_seconds": 31.5})
    assert rows["heft/lora-3:choice_accuracy"].x == row.x
    for name, mean in (("base", 0.2), ("majority", 0.55)):
        baseline = rows[f"heft/{name}"]
        assert (baseline.method, baseline.mean, baseline.trainable) == (name, mean, 0)
        assert not baseline.x and not baseline.line
    assert rows["heft/majority"].seeds == 2 and rows["heft/base"].seeds == 1


def test_rows_are_tested_on_the_same_questions(rows):
    test = rows["heft/heft-3:minus lora-3"]
    ours, theirs = ([right(epochs, seed) for seed in (1, 2)] for epochs in (4, 3))
    wanted = paired_over_seeds(ours, theirs)
    assert (test.mean, test.low, test.high) == (wanted.difference, wanted.low, wanted.high)
    assert test.metric == "choice_accuracy_difference" and (test.n, test.seeds) == (ROWS, 2)
    assert test.note == f"p = {wanted.p_value:.2g}" and test.command == "cmd --only heft/heft-3"
    assert (test.line, test.x) == ("heft minus lora", {"epochs": 3.0})


def test_the_row_that_trained_as_long_is_found(rows):
    names = [name for name in rows if ":minus" in name]
    assert names == ["heft/heft-3:minus lora-3", "heft/heft-3:minus lora-9"]
    found = rows["heft/heft-3:minus lora-9"]  # 40 s: lora-3 took 30, lora-9 took 90
    assert found.note.endswith("trained as long") and found.x == {}
    # heft-9 trained 100 s, longer than any LoRA: nothing is claimed


def test_one_seed_is_tested_exactly(plan, tmp_path):
    plan.write_text(plan.read_text().replace("seeds: [1, 2]", "seeds: [1]"))
    grid = read_grid(plan, str(tmp_path / "runs"))
    grids.run_grid(grid, train=fake_train)
    test = {row.name: row for row in grids.grid_rows(grid, "cmd")}["heft/heft-3:minus lora-3"]
    assert test.low == mcnemar(right(4, 1), right(3, 1)).low and test.test == "mcnemar"


def test_open_rows_and_lost_answers_are_not_tested(plan, tmp_path, caplog):
    grid = read_grid(plan, str(tmp_path / "runs"))
    grids.run_grid(grid, train=fake_train)
    (grid.rows()["heft/lora-3"][0].folder / "predictions.jsonl").unlink()
    with caplog.at_level("WARNING"):
        names = [row.name for row in grids.grid_rows(grid, "cmd")]
    assert "heft/heft-3:minus lora-3" not in names and "is not tested against" in caplog.text
    (grid.rows()["heft/heft-3"][1].folder / "report.json").unlink()
    assert not any(":minus" in row.name for row in grids.grid_rows(grid, "cmd"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("against: [lora-3]", "against: [lora-4]"),
            '"heft/lora-4", which is no row.*Did you mean',
        ),
        (("as_long_as: [lora]\n", "as_long_as: [lroa]\n"), 'there is no line "lroa"'),
        (("against: [lora-3]", "against: lora-3"), "against of a row is 'lora-3'. Write a list"),
        (("x: {epochs: 1}", "x: {epochs: one}"), "x of a row is .*Write numbers by name"),
        (
            ("line: lora, x: {epochs: 3}, set", "seeds: [1], line: lora, x: {epochs: 3}, set"),
            "heft/heft-3 and heft/lora-3 have other seeds",
        ),
    ],
)
def test_faults_of_points_and_tests(plan, change, message):
    text = plan.read_text()
    assert change[0] in text
    plan.write_text(text.replace(*change))
    with pytest.raises(RecipeError, match=message):
        read_grid(plan)


def test_the_page_draws_curves_and_names_no_best_difference(rows, tmp_path):
    path = tmp_path / "results.json"
    publish(rows.values(), path)
    assert [row.x for row in read_results(path)] == [row.x for row in rows.values()]
    text = render(path).read_text("utf-8")
    pictures = set(re.findall(r"plots/([\w-]+)\.png", text))
    assert pictures >= {"heft-over-epochs", "heft-over-train_seconds", "heft"}
    assert all((tmp_path / "plots" / f"{name}.png").is_file() for name in pictures)
    part = text.split("### Heft: choice accuracy difference")[1]
    assert "heft-3:minus lora-3 (p = " in part and "**" not in part.split("![")[0]
    assert "| majority | majority |" in text
    assert render(path).read_text("utf-8") == text  # nothing random


def points(*places, metric="accuracy"):
    return [
        ResultRow(name=f"s/{line}-{x}", line=line, x={"epochs": x}, metric=metric, mean=0.5,
                  low=0.4, high=0.6)
        for line in ("a", "b") for x in places
    ]  # fmt: skip


@pytest.mark.parametrize(("places", "scale"), [((1, 3, 20), "log"), ((1, 3, 5), "linear")])
def test_wide_axes_are_logarithmic(places, scale, tmp_path, monkeypatch):
    from reftune.report import plots

    drawn = []
    real = plots.sheet
    monkeypatch.setattr(plots, "sheet", lambda *a: drawn.append(real(*a)) or drawn[-1])
    levels = [ResultRow(name="s/base", method="base", metric="accuracy", mean=0.3)]
    over(tmp_path / "a.png", [*points(*places), *levels], "epochs", "title")
    _, (axes,) = drawn[0]
    assert axes.get_xscale() == scale
    assert axes.get_legend_handles_labels()[1] == ["base", "a", "b"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epochs", "accuracy")
    first = [line.lines[0].get_xdata()[0] for line in axes.containers]
    assert first[0] < places[0] < first[1], "a little beside one another"
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_figures_have_owners():
    assert owner_of("majority_accuracy") == ("majority", "accuracy")
    assert owner_of("baseline_accuracy") == ("adapter", "baseline_accuracy")
    assert base_name("a/b/lora@gpt2", "majority") == "a/b/majority@gpt2"


def test_a_report_has_a_row_for_each_baseline():
    share = {"n": 10, "low": 0.1, "high": 0.9}
    report = Report(
        name="run",
        methods=["lora", "loreft"],
        figures={
            "adapter_accuracy": Figure(mean=0.7, **share),
            "base_accuracy": Figure(mean=0.3, **share),
            "majority_accuracy": Figure(mean=0.6, **share),
        },
    )
    table = report_table([report])
    assert [row[0].text for row in table.rows] == ["base of run", "majority of run", "run"]
    assert [row[1].text for row in table.rows] == ["base", "majority", "lora + loreft"]
    assert table.columns.count("accuracy") == 1
    names = [(row.name, row.mean) for row in rows_of("heft/run", [report])]
    assert names == [("heft/run", 0.7), ("heft/base", 0.3), ("heft/majority", 0.6)]


def test_errors_over_rows_are_used_where_they_are_known():
    """The error of an AUROC is larger than that of a share of right answers."""
    plain = [Figure(mean=0.6, n=400, low=0.5, high=0.7) for _ in range(3)]
    known = [figure.model_copy(update={"error": 0.04}) for figure in plain]
    widths = [found.high - found.low for found in (join_seeds(plain), join_seeds(known))]
    assert widths[0] == pytest.approx(2 * 1.96 * (0.24 / 400) ** 0.5, rel=0.02)
    assert widths[1] == pytest.approx(2 * 1.96 * 0.04, rel=0.02)


def test_the_best_of_a_column_is_no_difference():
    rows = [ResultRow(name=f"a/{i}", metric="accuracy_difference", mean=i / 10) for i in range(3)]
    assert "**" not in result_table(rows).to_markdown()
    assert json.loads(rows[0].model_dump_json())["x"] == {}
