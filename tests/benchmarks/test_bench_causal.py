"""The benchmark of causal caching: its rows, its goals, and going on after it was stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from reftune.report.measured import measured_rows, publish_measured

FOLDER = Path(__file__).parents[2] / "benchmarks"
COLUMNS = {"name", "d", "seconds", "peak_bytes", "ratio_to_lora", "ratio_to_plain"}


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def run(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(FOLDER / "causal.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_it_measures_every_contender_and_goes_on_after_a_stop(tmp_path):
    file = tmp_path / "done.jsonl"
    words = ("--shape", "128", "--prompts", "32", "--rounds", "1", "--sets", "g", "--json")
    words += ("--resume", str(file))
    done = run(*words, "--answers", "32")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    rows = {row["name"]: row for row in result["rows"]}
    assert len(rows) == 5 + 4 + 3  # LoRA twice, full, a twice; g four times; ten epochs thrice
    assert all(row.keys() >= COLUMNS and row["seconds"] > 0 for row in rows.values())
    assert all(row["peak_bytes"] > 0 for name, row in rows.items() if "epochs" not in name)
    assert rows["lora r8, usual path"]["ratio_to_lora"] == 1
    assert rows["g store"]["peak_bytes"] < rows["g recompute"]["peak_bytes"]
    assert rows["g recompute"]["peak_bytes"] < rows["g plain"]["peak_bytes"]
    assert len(file.read_text().splitlines()) == 1

    kept = json.loads(file.read_text())
    kept["rows"][0]["seconds"] = 123.0
    half = json.dumps(kept)[:50]
    file.write_text(json.dumps(kept) + "\n" + half + "\n")
    again = json.loads(run(*words, "--answers", "32").stdout)
    assert again["rows"][0]["seconds"] == 123.0  # read, not measured
    other = json.loads(run(*words, "--answers", "32", "--without-epochs").stdout)
    assert other["rows"][0]["seconds"] != 123.0  # of other settings


def cells(place: str, **ratios: float) -> list[dict]:
    prompt, answer = map(int, place.split("/"))
    found = []
    for name, ratio in ratios.items():
        name = name.replace("_", " ")
        row = {"name": name, "d": place, "seconds": ratio, "peak_bytes": 10, "ratio_to_lora": ratio}
        if answer == 32:
            row |= {"line": name, "x": {"prompt_tokens": prompt}}
        found.append({**row, "ratio_to_plain": ratio, "ratio_of_peak_to_lora": ratio})
    return found


def test_goals_are_judged_and_the_page_has_a_table_and_a_picture(tmp_path):
    from causal import GOALS, judge

    rows = cells("256/32", g_store=0.05, g_recompute=0.6, b_store=0.15)
    rows += cells("1024/32", g_store=0.02, b_store=0.09) + cells("256/8", g_store=0.01)
    goals = {(goal["name"], goal["d"], goal["column"]): goal["holds"] for goal in judge(rows)}
    assert len(goals) == len(GOALS) == 7
    assert goals["g store", "256/32", "ratio_to_lora"] is True
    assert goals["g recompute", "256/32", "ratio_to_lora"] is False
    assert goals["b store", "1024/32", "ratio_to_lora"] is False
    assert goals["ten epochs, g store", "256/32", "ratio_to_plain"] is None

    result = {"rows": rows, "goals": judge(rows), "settings": {"quick": False}}
    names = [row.name for row in measured_rows(result, "causal", "command")]
    assert "causal/256/32/g store:ratio_to_lora" in names
    publish_measured(result, "causal", "command", tmp_path / "results.json")
    page = (tmp_path / "results.md").read_text()
    assert "256/32/g store" in page and "MISSED" not in page
    assert "plots/causal-over-prompt_tokens.png" in page
    assert (tmp_path / "plots" / "causal-over-prompt_tokens.png").stat().st_size > 5000
    quick = measured_rows({**result, "settings": {"quick": True}}, "causal", "command")
    assert not {row.name for row in quick} & set(names)


def test_lines_of_the_picture_are_contenders():
    from causal import DRAWN, FULL, LEAN, PLAIN, SETS

    made = {f"{name} {mode}" for name in SETS for mode in ("plain", "lean", "recompute", "store")}
    assert set(DRAWN) <= {*made, FULL, LEAN, PLAIN}
