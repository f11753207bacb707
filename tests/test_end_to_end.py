"""The verbs of the README one after the other, on a tiny model, as a user runs them."""

from __future__ import annotations

import json
import logging

import pytest
import yaml
from tiny import tiny_folder

from reftune.cli.main import main

pytestmark = pytest.mark.slow


@pytest.fixture
def reftune(tmp_path, monkeypatch, capsys):
    """A folder with rows and a recipe; a function that runs a command and gives its output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name, first, last in (("rows", 0, 24), ("val", 24, 30), ("held", 30, 40)):
        rows = [{"prompt": f"{i}+{i}=", "completion": f" {2 * i}"} for i in range(first, last)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "my.yaml").write_text(
        f"model: {tiny_folder(tmp_path / 'model')}\n"
        "task: {train: rows.jsonl, validation: val.jsonl, test: held.jsonl, max_new_tokens: 3}\n"
        "adapter: {method: loreft, rank: 2, positions: f2+l2}\n"
        "optimiser: {lr: 1.0e-2}\n"
        "epochs: 2\nbatch_size: 8\nthreads: 1\nname: mine\n",
        encoding="utf-8",
    )
    root, own = logging.getLogger(), logging.getLogger("reftune")
    before = (list(root.handlers), root.level, own.level)

    def run(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        found = main([str(word) for word in words])
        seen = capsys.readouterr()
        assert found == code, seen.err
        return seen.out

    yield run
    root.handlers[:], root.level, own.level = before


def test_from_a_recipe_to_answers(reftune, tmp_path):
    shown = reftune("inspect", "my.yaml", "--rows", "1")
    assert "learned" in shown and "f2+l2" in shown
    reftune("train", "my.yaml", "--dry-run")
    assert not (tmp_path / "runs").exists()

    reftune("train", "my.yaml")
    folder = tmp_path / "runs" / "mine"
    report = json.loads((folder / "report.json").read_text("utf-8"))
    assert report["figures"]["adapter_accuracy"]["n"] == 10
    assert report["steps"] == 6 and report["trainable_parameters"] == 2 * (2 * 2 * 32 + 2)
    assert len((folder / "predictions.jsonl").read_text("utf-8").splitlines()) == 10
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    reftune("train", "my.yaml", code=2)  # a finished run is not overwritten

    scored = json.loads(reftune("eval", "runs/mine", "--against", "base", "--json"))
    assert "accuracy" in json.dumps(scored)

    answers = reftune("generate", "runs/mine", "7+7=", "--max-new-tokens", "3", "--json")
    again = reftune("generate", "runs/mine", "7+7=", "--max-new-tokens", "3", "--json")
    base = reftune("generate", "runs/mine", "7+7=", "--max-new-tokens", "3", "--json", "--base")
    assert answers == again and json.loads(answers) and json.loads(base)

    reftune("train", "my.yaml", "--set", "adapter.method=direft", "--name", "other")
    table = reftune("report", "runs/mine", "runs/other", "--plot", "figures.png", "--markdown")
    assert "| mine |" in table and "| other |" in table and "direft" in table
    assert (tmp_path / "figures.png").stat().st_size > 800

    reftune("sweep", "my.yaml", "--grid", "adapter.rank=1,2", "--set", "epochs=1")
    best = next(path for path in (tmp_path / "runs").rglob("best.yaml"))
    assert yaml.safe_load(best.read_text("utf-8"))["model"]
    assert (best.parent / "sweep.md").is_file()
