"""Published results and the resumable grid."""

from __future__ import annotations

import json

import pytest
from docs_parts import ROOT

from reftune.config.loader import dump
from reftune.errors import DataError, RecipeError, TrainingError
from reftune.report import grid as grids
from reftune.report.cells import read_grid
from reftune.report.model import Figure, Report, ResultRow
from reftune.report.results import (
    collect,
    join_seeds,
    publish,
    read_results,
    render,
    rows_of,
)

pytestmark = pytest.mark.quick

PLAN = """\
name: families
recipe: {recipe}
seeds: [1, 2]
note: smoke figure
rows:
  - {{method: base}}
  - {{method: loreft, set: {{adapter.rank: 4}}}}
  - {{name: red, method: red}}
"""


def share(mean, n=100):
    return Figure(mean=mean, n=n, low=mean - 0.1, high=mean + 0.1)


def test_one_seed_keeps_its_own_interval():
    assert join_seeds([share(0.5)]) == share(0.5)
    assert join_seeds([Figure(mean=None)]).mean is None


def test_shares_join_rows_and_seeds():
    same = join_seeds([share(0.5)] * 3)
    apart = join_seeds([share(0.4), share(0.5), share(0.6)])
    assert same.mean == pytest.approx(apart.mean) == 0.5
    assert (same.sd, apart.sd) == (0.0, pytest.approx(0.1))
    # equal seeds say nothing about the rows: the interval is that of 100 rows, not of 300
    assert same.high - same.low == pytest.approx(0.1923, abs=2e-3)
    assert apart.high - apart.low > same.high - same.low
    full = join_seeds([share(1.0), share(1.0)])
    assert full.high == 1.0 and 0.95 < full.low < 1.0


def test_other_units_get_the_t_interval():
    joined = join_seeds([Figure(mean=value, unit="seconds") for value in (1.0, 2.0, 3.0)])
    assert joined.unit == "seconds"
    assert joined.high - joined.mean == pytest.approx(4.3027 / 3**0.5, abs=1e-3)


def write_run(folder, name, mean, base=None, seed=1):
    figures = {"adapter_accuracy": share(mean), "adapter_format_accuracy": share(mean / 2)}
    if base is not None:
        figures["base_accuracy"] = share(base)
    report = Report(
        name=name,
        figures=figures,
        methods=["loreft"],
        task="families",
        model="nano",
        seed=seed,
        metric="adapter_accuracy",
        train_seconds=10.0,
        eval_seconds=5.0,
        trainable_parameters=7,
    )
    report.write(folder / "report.json")
    return report


def test_collect_joins_seeds_and_sets_the_base_apart(tmp_path):
    write_run(tmp_path / "a", "families/loreft-seed1", 0.6, base=0.3)
    write_run(tmp_path / "b", "families/loreft-seed2", 0.8)
    rows = {row.name: row for row in collect([tmp_path / "a", tmp_path / "b"])}
    assert set(rows) == {
        "families/loreft",
        "families/loreft:format_accuracy",
        "families/base",
    }
    row = rows["families/loreft"]
    assert (row.mean, row.seeds, row.n, row.metric) == (pytest.approx(0.7), 2, 100, "accuracy")
    assert (row.seconds, row.trainable, row.method) == (30.0, 7, "loreft")
    base = rows["families/base"]
    assert (base.method, base.mean, base.trainable, base.seeds) == ("base", 0.3, 0, 1)


def test_base_row_of_a_second_backbone_keeps_its_suffix():
    report = Report(name="x", figures={"base_accuracy": share(0.3)}, metric="adapter_accuracy")
    assert rows_of("families/loreft@nano-gpt2", [report])[0].name == "families/base@nano-gpt2"


def test_publish_merges_by_name_and_never_reopens(tmp_path):
    path = tmp_path / "docs" / "results.json"
    publish([ResultRow(name="a/x", mean=0.5), ResultRow(name="a/y")], path)
    publish([ResultRow(name="a/x"), ResultRow(name="a/y", mean=0.1), ResultRow(name="b/z")], path)
    rows = read_results(path)
    assert [(row.name, row.mean) for row in rows] == [("a/x", 0.5), ("a/y", 0.1), ("b/z", None)]
    assert isinstance(json.loads(path.read_text()), list)


def test_broken_results_are_not_overwritten(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('[{"mean": 1}]')
    with pytest.raises(DataError, match="is no list of results"):
        publish([ResultRow(name="a")], path)
    assert path.read_text() == '[{"mean": 1}]'


def test_the_page_says_what_time_and_bars_are(tmp_path):
    rows = [ResultRow(name="gates/sums", metric="accuracy", mean=0.98, bar="at least 0.95")]
    rows += [ResultRow(name="demo/lora", metric="accuracy", mean=0.9, seconds=70.0)]
    publish(rows, tmp_path / "results.json")
    text = render(tmp_path / "results.json").read_text()
    head, *sections = text.split("\n## ")
    assert "| bar |" in text and "| time |" in text
    assert "training and evaluation together, summed over seeds" in head
    assert "`bar` is what this project asks of a value" in head
    demo = next(section for section in sections if section.startswith("Demo"))
    assert "LoRA takes LoReFT's learning rate" in demo


def test_the_main_table_tests_loreft_against_lora():
    grid = read_grid(ROOT / "recipes" / "grids" / "families.yaml")
    assert [cell.point.against for cell in grid.rows()["families/loreft"]] == [
        ("families/lora",)
    ] * 3


def test_render_has_sections_plots_and_open_cells(tmp_path):
    path = tmp_path / "results.json"
    rows = [
        ResultRow(name="families/base", method="base", metric="accuracy", mean=0.3, n=10, seeds=1),
        ResultRow(
            name="families/loreft",
            method="loreft",
            metric="accuracy",
            mean=0.7,
            sd=0.1,
            seeds=3,
            low=0.5,
            high=0.9,
            n=10,
            command="make results-families",
        ),
        ResultRow(name="speed/step", metric="ratio_to_lora", mean=0.69, unit="ratio"),
        ResultRow(name="passages/loreft", method="loreft"),
    ]
    publish(rows, path)
    text = render(path, {"families": "New families"}).read_text()
    assert "## New families" in text and "## Speed" in text
    assert "**70.0 ± 10.0 % [50.0, 90.0]**" in text
    assert "![families: accuracy](plots/families.png)" in text
    assert (tmp_path / "plots" / "families.png").is_file()
    assert "1 of 4: passages/loreft." in text
    assert "make results-families" in text
    assert render(path, {"families": "New families"}).read_text() == text  # nothing random


@pytest.fixture
def plan(tmp_path):
    recipe = tmp_path / "base.yaml"
    recipe.write_text("task: families\nadapter: {method: loreft, rank: 8}\n", encoding="utf-8")
    path = tmp_path / "grid.yaml"
    path.write_text(PLAN.format(recipe=recipe), encoding="utf-8")
    return path


def fake_train(recipe, resume=False, progress=True, **_):
    from pathlib import Path

    folder = Path(recipe.output) / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(dump(recipe))
    rank = recipe.stages[0].adapter.options.get("rank", 0)
    base = 0.2 if recipe.evaluation.compare_base else None
    fake_train.calls.append((recipe.name, resume, recipe.seed, rank))
    return write_run(folder, recipe.name, 0.5 + recipe.seed / 100, base, recipe.seed)


@pytest.fixture
def trainer(monkeypatch):
    fake_train.calls = []
    return fake_train


def test_cells_are_rows_times_seeds(plan, tmp_path):
    grid = read_grid(plan, str(tmp_path / "runs"))
    assert [(cell.row, cell.seed) for cell in grid.cells] == [
        ("families/loreft", 1),
        ("families/loreft", 2),
        ("families/red", 1),
        ("families/red", 2),
    ]
    assert grid.base_rows == ["families/base"]
    assert grid.cells[0].recipe.stages[0].adapter.options == {"rank": 4}
    assert grid.cells[2].recipe.stages[0].adapter.options == {}  # red has no rank
    assert [cell.recipe.evaluation.compare_base for cell in grid.cells] == [True] + [False] * 3
    assert grid.cells[0].folder == tmp_path / "runs" / "families" / "loreft" / "seed-1"


def test_finished_cells_are_skipped_and_results_published(plan, tmp_path, trainer):
    grid = read_grid(plan, str(tmp_path / "runs"))
    assert "0 of 4 cells done" in grids.status(grid)
    results = tmp_path / "docs" / "results.json"
    assert grids.run_grid(grid, train=trainer) == []
    assert len(trainer.calls) == 4
    rows = {row.name: row for row in grids.publish_grid(grid, results, "python -m grid")}
    assert rows["families/loreft"].mean == pytest.approx(0.515)
    assert rows["families/loreft"].command == "python -m grid --only families/loreft"
    assert rows["families/base"].mean == 0.2 and rows["families/base"].note == "smoke figure"
    assert list(rows)[:3] == ["families/base", "families/loreft", "families/red"]
    assert (results.parent / "results.md").is_file()

    grids.run_grid(read_grid(plan, str(tmp_path / "runs")), train=trainer)
    assert len(trainer.calls) == 4


def test_a_changed_recipe_is_run_again_and_the_old_run_kept(plan, tmp_path, trainer):
    grids.run_grid(read_grid(plan, str(tmp_path / "runs")), train=trainer)
    plan.write_text(plan.read_text().replace("adapter.rank: 4", "adapter.rank: 2"))
    grid = read_grid(plan, str(tmp_path / "runs"))
    grids.run_grid(grid, train=trainer)
    assert [call[0] for call in trainer.calls[4:]] == [
        "families/loreft/seed-1",
        "families/loreft/seed-2",
    ]
    assert (tmp_path / "runs" / "families" / "loreft" / "seed-1.old-1" / "report.json").is_file()


def test_an_interrupted_cell_is_resumed(plan, tmp_path, trainer):
    grid = read_grid(plan, str(tmp_path / "runs"))
    cell = grid.cells[0]
    cell.folder.mkdir(parents=True)
    (cell.folder / "recipe.yaml").write_text(dump(cell.recipe))
    grids.run_grid(grid, train=trainer)
    assert [call[1] for call in trainer.calls] == [True, False, False, False]


def test_open_cells_are_published_as_open(plan, tmp_path, trainer):
    grid = read_grid(plan, str(tmp_path / "runs"))
    grids.run_cell(grid.cells[0], trainer)
    rows = {row.name: row for row in grids.grid_rows(grid, "cmd")}
    assert rows["families/loreft"].is_open and rows["families/loreft"].note == "1 of 2 seeds"
    assert rows["families/red"].is_open and rows["families/red"].method == "red"
    assert rows["families/base"].mean == 0.2


def test_a_failing_cell_does_not_stop_the_others(plan, tmp_path, trainer):
    def failing(recipe, **more):
        if recipe.seed == 1:
            raise TrainingError("The loss is nan.", "Lower lr.")
        return trainer(recipe, **more)

    failed = grids.run_grid(read_grid(plan, str(tmp_path / "runs")), train=failing)
    assert [cell.seed for cell, _ in failed] == [1, 1]
    assert "The loss is nan" in failed[0][1]
    assert len(trainer.calls) == 2


def test_no_cell_starts_that_would_not_fit(plan, tmp_path, trainer, monkeypatch):
    clock = iter(range(0, 10_000, 50))  # every look at the clock is 50 s later
    monkeypatch.setattr(grids.time, "monotonic", lambda: float(next(clock)))
    grids.run_grid(read_grid(plan, str(tmp_path / "runs")), max_minutes=3, train=trainer)
    assert len(trainer.calls) == 1


def test_main_lists_and_runs(plan, tmp_path, trainer, monkeypatch, capsys):
    import reftune.training.stages as stages

    monkeypatch.setattr(stages, "train", trainer)
    options = ["--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results.json")]
    assert grids.main([str(plan), "--list", *options]) == 0
    assert "families/loreft" in capsys.readouterr().out and not trainer.calls
    assert grids.main([str(plan), "--only", "families/red", "--seed", "2", *options]) == 0
    assert [call[0] for call in trainer.calls] == ["families/red/seed-2"]
    assert read_results(tmp_path / "results.json")[0].is_open
    assert grids.main([str(tmp_path / "none.yaml")]) == 2


def test_a_grid_without_rows_shows_how_to_write_one(plan):
    plan.write_text(plan.read_text().partition("rows:")[0] + "rows: []\n")
    with pytest.raises(RecipeError, match=r"has no rows.*one `- {method: ...}` each"):
        read_grid(plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rows:", "rowz:"), 'unknown key "rowz". Did you mean "rows"'),
        (("method: red}}", "methd: red}}"), None),
        (("name: red, method: red", "method: loreft"), "two rows families/loreft at seed 1"),
        (("adapter.rank: 4", "adapter.rnk: 4"), r"--set adapter\.rnk=4.*unknown key"),
        (("method: red", "method: rde"), 'there is no method "rde". Did you mean "red"'),
    ],
)
def test_faults_of_a_grid(plan, change, message):
    text = plan.read_text().replace(*change)
    if message is None:
        text, message = text.replace("method: red", "methd: red"), 'rows.2: unknown key "methd"'
    plan.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_grid(plan)


def test_several_tasks_and_models(plan, tmp_path):
    text = plan.read_text() + "tasks: [families, {name: passages, train_size: 5}]\n"
    plan.write_text(text + "models: [nano, nano-gpt2]\n")
    grid = read_grid(plan)
    names = list(grid.rows())
    assert names[0] == "families/loreft@nano" and "passages/red@nano-gpt2" in names
    assert len(grid.cells) == 16
    last = grid.cells[-1].recipe
    assert (last.task.name, last.task.train_size, last.model.name) == ("passages", 5, "nano-gpt2")
    assert sum(cell.recipe.evaluation.compare_base for cell in grid.cells) == 4


def test_a_choice_that_matches_nothing_is_an_error(caplog):
    with caplog.at_level("ERROR"):
        code = grids.main(["recipes/grids/families.yaml", "--only", "nothing", "--list"])
    assert code == 2 and "families/loreft" in caplog.text
    assert grids.main(["recipes/grids/families.yaml", "--only", "direft", "--list"]) == 0


@pytest.mark.parametrize(
    ("only", "rows"),
    [
        ("families/loreft", {"families/loreft"}),
        ("loreft", {"families/loreft"}),
        ("loreft*", {"families/loreft", "families/loreft-prompt"}),
        ("families/*prompt", {"families/loreft-prompt"}),
        ("families/lore", set()),
    ],
)
def test_a_row_is_chosen_by_its_whole_name(plan, capsys, only, rows):
    more = "  - {name: loreft-prompt, method: loreft, set: {adapter.positions: f5+l5}}\n"
    plan.write_text(plan.read_text() + more)
    code = grids.main([str(plan), "--only", only, "--list"])
    assert code == (0 if rows else 2)
    listed = capsys.readouterr().out.splitlines()[:-1]
    assert {line.split()[0] for line in listed} == rows
