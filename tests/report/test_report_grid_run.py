"""A grid that really trains, cells in parallel processes, then finds everything done."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_folder

from reftune.report.grid import main
from reftune.report.results import read_results


@pytest.mark.slow
def test_a_grid_trains_publishes_and_skips(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_folder(tmp_path / "model")
    for name, first in (("rows", 0), ("held", 20)):
        rows = [
            {"prompt": f"{i}+{i}=", "completion": f" {2 * i}"} for i in range(first, first + 20)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "base.yaml").write_text(
        f"model: {model}\n"
        "task: {train: rows.jsonl, test: held.jsonl, max_new_tokens: 2, holdout: 2}\n"
        "adapter: {method: loreft, rank: 2, positions: f1+l1}\n"
        "max_steps: 1\nbatch_size: 4\nthreads: 1\n",
        encoding="utf-8",
    )
    (tmp_path / "grid.yaml").write_text(
        "name: sums\nrecipe: base.yaml\nseeds: [1, 2]\nrows: [{method: base}, {method: loreft}]\n",
        encoding="utf-8",
    )
    assert main(["grid.yaml", "--workers", "2", "--results", "docs/results.json"]) == 0
    assert "2 of 2 cells done" in capsys.readouterr().out
    rows = {row.name: row for row in read_results("docs/results.json")}
    assert rows["sums/loreft"].seeds == 2 and rows["sums/loreft"].n == 20
    assert rows["sums/base"].method == "base" and rows["sums/base"].seeds == 1

    before = (tmp_path / "runs/results/sums/loreft/seed-1/report.json").stat().st_mtime_ns
    assert main(["grid.yaml", "--results", "docs/results.json"]) == 0
    after = (tmp_path / "runs/results/sums/loreft/seed-1/report.json").stat().st_mtime_ns
    assert before == after
