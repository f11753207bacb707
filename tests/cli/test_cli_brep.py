"""What an objective does to rows and to a run, as the command line shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BREP = (
    "--set",
    "adapter={method: red, site: mlp.up_proj, positions: 'all_prompt+generated:2', "
    "train_positions: all}",
    "--set",
    "objective={name: brep, prefix_tokens: 1, prefix_share: 0.5}",
)


def learned(stage):
    return [sum(token["labelled"] for token in row["tokens"]) for row in stage["rows"]]


def test_inspect_shows_the_labels_that_are_left(cli, recipe_file):
    words = ("inspect", recipe_file, *BREP, "-n", 16, "--json")
    (stage,) = json.loads(cli(*words)[1])["stages"]
    counts = learned(stage)
    cut = [row for row, count in zip(stage["rows"], counts, strict=True) if count == 1]
    assert len(cut) == 8 and stage["summary"]["rows"] == 16
    assert [row["target_tokens"] for row in stage["rows"]] == counts
    for row in cut:
        assert [t["labelled"] for t in row["tokens"]] == [False] * row["prompt_tokens"] + [True]
        assert row["tokens"][-1]["text"] != "<eos>"
    mean = stage["summary"]["learned_tokens_a_row"]
    assert mean == pytest.approx(sum(counts) / 16, abs=0.01)
    out = cli("inspect", recipe_file, *BREP, "-n", 16)[1]
    assert "prompt + 1 learned tokens" in out and "[< >]\n" in out
    (validation,) = json.loads(cli(*words, "--split", "validation")[1])["stages"]
    assert set(learned(validation)) == {4}, "validation rows keep all their labels"


def test_inspect_shows_the_published_labels(cli, recipe_file):
    words = ("--set", "objective.reference_quirks=true", "--set", "max_len=20", "-n", 16, "--json")
    (stage,) = json.loads(cli("inspect", recipe_file, *BREP, *words)[1])["stages"]
    assert {len(row["tokens"]) for row in stage["rows"]} == {20}
    assert all(row["tokens"][-1]["labelled"] for row in stage["rows"])
    assert {row["tokens"][-1]["text"] for row in stage["rows"]} == {"<pad>"}


def test_a_restraint_without_red_is_refused_by_a_dry_run(cli, recipe_file):
    words = ("train", recipe_file, "--set", "objective=brep")
    for more in (("--dry-run",), ()):
        code, _, err = cli(*words, *more)
        assert code == 2 and "restraint: pid holds the bias vectors of red" in err
        assert "the adapter's method is loreft" in err
    assert not Path("runs").exists()
    code, _, err = cli(*words, "--dry-run", "--set", "objective.restraint=none")
    assert code == 0, err


def test_a_run_prints_its_further_rows_and_draws_the_restraint(cli, recipe_file):
    more = ("--set", "evaluation.also.val.test=other.jsonl", "--name", "brep")
    Path("other.jsonl").write_text(Path("held.jsonl").read_text())
    code, out, err = cli("train", recipe_file, *BREP, *more)
    assert code == 0, err
    assert "accuracy_on_val" in out
    report = json.loads(Path("runs/brep/report.json").read_text())
    own, other = (report["figures"][f"adapter_accuracy{on}"] for on in ("", "_on_val"))
    assert own == other, "the same rows in another file"
    assert Path("runs/brep/plots/restraint.png").is_file()


def test_a_sweep_scores_no_further_rows(cli, recipe_file):
    Path("other.jsonl").write_text(Path("held.jsonl").read_text())
    words = ("--set", "evaluation.also.val.test=other.jsonl", "--grid", "seed=1")
    code, _, err = cli("sweep", recipe_file, *words)
    assert code == 0, err
    report = json.loads(Path("runs/sums-sweep/seed-1/report.json").read_text())
    assert report["figures"].keys() == {"adapter_accuracy"}
    assert "other.jsonl" in Path("runs/sums-sweep/best.yaml").read_text()


def test_the_catalogue_knows_it_as_an_objective(cli):
    rows = {row["name"]: row for row in json.loads(cli("methods", "--json")[1])}
    brep = rows["brep"]
    assert (brep["kind"], brep["status"], brep["system"]) == ("objective", "available", True)
    assert (brep["file"], brep["recipe"]) == ("objectives/brep.py", "brep/brep")
