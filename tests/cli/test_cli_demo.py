"""The demo: what it replaces, and what it leaves behind for the page of results."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from reftune.cli.demo import COMMAND, _lora, conclude, lora_rank, require_replaceable
from reftune.config.loader import dump, load
from reftune.config.shipped import find
from reftune.errors import RecipeError
from reftune.report.measured import measured_rows
from reftune.report.model import Figure, Report

pytestmark = pytest.mark.quick


@pytest.fixture
def recipe(tmp_path):
    return replace(load(find("demo")), name="x", output=str(tmp_path))


def run(name, mean, base=False, **more):
    figures = {"adapter_accuracy": Figure(mean=mean, n=9, low=0.0, high=1.0)}
    figures["adapter_format_accuracy"] = figures["adapter_accuracy"]
    if base:
        figures |= {f"base_{key[8:]}": figure for key, figure in list(figures.items())}
    return Report(name=name, figures=figures, metric="adapter_accuracy", methods=["loreft"], **more)


def test_it_takes_what_is_free_or_its_own(recipe, tmp_path):
    require_replaceable(recipe)
    (tmp_path / "x").mkdir()
    require_replaceable(recipe)
    run("x", 0.5, command=COMMAND).write(tmp_path / "x" / "report.json")
    require_replaceable(recipe)


def test_an_interrupted_demo_is_its_own(recipe, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    require_replaceable(recipe)
    with pytest.raises(RecipeError, match="was not made by the demo"):
        require_replaceable(replace(recipe, seed=recipe.seed + 1))


def test_it_deletes_no_run_of_yours(recipe, tmp_path, cli):
    run("x", 0.5, command="reftune train x.yaml").write(tmp_path / "x" / "report.json")
    with pytest.raises(RecipeError, match=r"Choose another --name, or remove the folder"):
        require_replaceable(recipe)
    code, _, err = cli("demo", "--name", "x", "--output", tmp_path)
    assert code == 2 and "was not made by the demo" in err
    assert (tmp_path / "x" / "report.json").is_file()


def test_nor_its_neighbour(tmp_path, cli):
    run("y-lora", 0.5).write(tmp_path / "y-lora" / "report.json")
    code, _, err = cli("demo", "--name", "y", "--output", tmp_path)
    assert code == 2 and "y-lora is there" in err
    assert not (tmp_path / "y").exists()


def test_its_reports_are_marked_and_can_be_published(recipe, tmp_path):
    facts = {"trainable_parameters": 7, "adapter_bytes": 9, "train_seconds": 2.0}
    rival = run("x-lora", 0.6, **facts)
    report = conclude(tmp_path / "x", run("x", 0.7, base=True, **facts), rival)
    assert Report.read(tmp_path / "x").command == COMMAND
    require_replaceable(recipe)
    require_replaceable(_lora(recipe))
    rows = {row.name: row for row in measured_rows(report.model_dump(), "demo", "make demo")}
    assert rows["demo/lora"].mean == 0.6 and rows["demo/lora"].trainable == 7
    assert rows["demo/loreft"].mean == 0.7 and rows["demo/base"].mean == 0.7
    assert (tmp_path / "x" / "plots" / "demo.png").is_file()


SMALL = ("max_steps=1", "batch_size=2", "task.train_size=2", "task.test_size=2", "max_len=192",
         "evaluation.max_new_tokens=2")  # fmt: skip
PROMISED = {
    "base_accuracy", "base_format_accuracy", "adapter_accuracy", "trainable_parameters",
    "trainable_fraction", "adapter_bytes", "train_seconds",
}  # fmt: skip


def test_a_small_demo_from_end_to_end(cli, tmp_path):
    changes = [word for change in SMALL for word in ("--set", change)]
    code, out, err = cli("demo", *changes)
    assert code == 0, err
    folder = tmp_path / "runs" / "demo"
    report = json.loads((folder / "report.json").read_text("utf-8"))
    assert report.keys() >= PROMISED
    assert all(isinstance(report[key], int | float) for key in PROMISED)
    assert report["trainable_parameters"] == 24_640
    assert report["trainable_fraction"] == pytest.approx(0.00658, abs=1e-4)
    assert report["adapter_bytes"] == (folder / "adapter/adapter_model.safetensors").stat().st_size
    assert report["rivals"]["lora"]["trainable_parameters"] == 25_600
    assert all(word in out for word in ("base, frozen", "lora", "loreft", "demo.png"))
    for name in ("plots/demo.png", "report.md", "predictions.jsonl"):
        assert (folder / name).is_file()
    assert cli("demo", *changes, "--set", "adapter.rank=2")[0] == 0  # replaces its own
    rival = Report.read(folder.with_name("demo-lora"))
    assert (Report.read(folder).trainable_parameters, rival.trainable_parameters) == (6_160, 5_120)


@pytest.mark.parametrize(
    ("method", "options", "rank"),
    [("loreft", {"rank": 8}, 5), ("loreft", {"rank": 16}, 10), ("red", {}, 1)],
)
def test_lora_has_as_many_parameters(recipe, method, options, rank):
    adapter = replace(recipe.stages[0].adapter, method=method, options=options)
    assert lora_rank(recipe, adapter) == rank
    changed = replace(recipe, stages=[replace(recipe.stages[0], adapter=adapter)])
    assert _lora(changed).stages[0].adapter.options == {"rank": rank}
