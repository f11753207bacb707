"""Benchmarks, checks, gates and the demo on their way into the page of results."""

from __future__ import annotations

import copy
import json

import pytest

from reftune.errors import DataError
from reftune.report.measured import add, measured_rows, publish_measured
from reftune.report.model import Figure, Report
from reftune.report.results import main, read_results

pytestmark = pytest.mark.quick

SPEED = {
    "rows": [
        {"name": "lora r8", "d": "512", "seconds": 1.0, "peak_bytes": 5_000_000,
         "ratio_to_lora": 1.0, "ratio_to_pyreft": None, "slowest": 1.2, "trainable": 800},
        {"name": "loreft r4, all layers", "d": "512", "seconds": 0.62, "peak_bytes": 4_000_000,
         "ratio_to_lora": 0.62, "ratio_to_pyreft": None, "slowest": 0.7, "trainable": 400},
        {"name": "decode, base", "d": "512", "seconds": 0.01, "peak_bytes": 900,
         "ratio_to_base": 1.0, "tokens_per_second": 100.0},
    ],
    "goals": [
        {"name": "loreft r4, all layers", "d": "512", "column": "ratio_to_lora", "bar": "<= 0.75",
         "value": 0.62, "holds": True},
        {"name": "lora r8", "d": "512", "column": "seconds", "bar": "<= 0.5", "value": 1.0,
         "holds": False},
    ],
    "settings": {"shape": "512", "rows": 8, "device": "cpu", "dtype": "float32", "ragged": False},
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "skipped": {"pyreft loreft": "no --pyreft-python given. It needs\n  python -m venv pyreft-env"},
}  # fmt: skip
PARITY = {
    "rows": [
        {"name": "logits", "d": "128", "value": 3e-7, "bar": 1e-5, "holds": True},
        {"name": "losses", "d": "128", "value": 0.2, "bar": 0.05, "holds": False, "note": "why"},
    ],
    "settings": {"rows": 4, "seed": 0},
    "versions": {"pyreft": "0.1.0"},
}
GATES = {
    "model": "nano",
    "quick": False,
    "gates": [
        {"name": "recall", "value": 0.97, "low": 0.95, "high": 0.98, "n": 1000,
         "bar": "at least 0.95", "starred": True, "holds": True},
        {"name": "tokens per log line", "value": 31.0, "low": 30.0, "high": 32.0, "n": 900,
         "bar": "at most 25", "starred": False, "holds": False},
        {"name": "before warm-up", "value": 0.3, "low": 0.2, "high": 0.4, "n": 1000, "bar": None,
         "starred": False, "holds": None},
    ],
}  # fmt: skip


def demo_report() -> dict:
    figures = {
        f"{who}_{metric}": Figure(mean=mean, n=500, low=mean - 0.05, high=mean + 0.05)
        for who, mean in (("base", 0.3), ("adapter", 0.7), ("lora", 0.65))
        for metric in ("accuracy", "format_accuracy")
    }
    rivals = {"lora": {"trainable_parameters": 25_600, "train_seconds": 90.0}}
    report = Report(name="demo", figures=figures, methods=["loreft"], metric="adapter_accuracy",
                    trainable_parameters=24_640, train_seconds=100.0, rivals=rivals)  # fmt: skip
    return report.model_dump()


def by_name(data, section="s"):
    return {row.name: row for row in measured_rows(data, section, "the command")}


def test_a_benchmark_gives_a_row_for_each_measure():
    rows = by_name(SPEED, "speed")
    ours = "speed/512/loreft r4, all layers"
    assert rows[ours].metric == "seconds" and rows[ours].unit == "seconds"
    assert rows[f"{ours}:peak_bytes"].unit == "bytes"
    assert rows[f"{ours}:ratio_to_lora"].mean == 0.62 and rows[f"{ours}:ratio_to_lora"].holds
    assert f"{ours}:ratio_to_pyreft" not in rows and f"{ours}:slowest" not in rows
    assert rows["speed/512/lora r8"].holds is False
    assert rows["speed/512/decode, base:tokens_per_second"].unit == "tokens/s"
    skipped = rows["speed/512/pyreft loreft"]
    assert skipped.is_open and skipped.note == "no --pyreft-python given"
    assert rows[ours].versions["torch"] == "2.13.0" and rows[ours].trainable == 400
    assert rows[ours].setting == "rows 8, device cpu, dtype float32"


def test_other_devices_and_quick_runs_have_their_own_rows():
    data = copy.deepcopy(SPEED)
    data["settings"] |= {"device": "cuda", "dtype": "bfloat16", "quick": True}
    assert "speed/512 cuda bfloat16 quick/lora r8" in by_name(data, "speed")
    quick = by_name(GATES | {"quick": True}, "gates")
    assert "gates/nano quick/recall" in quick


def test_checks_and_gates_keep_their_bars():
    parity = by_name(PARITY, "parity")
    assert parity["parity/128/logits"].bar == "at most 1e-05"
    assert parity["parity/128/losses"].holds is False
    gates = by_name(GATES, "gates")
    assert gates["gates/nano/recall"].low == 0.95 and gates["gates/nano/recall"].n == 1000
    assert gates["gates/nano/before warm-up"].bar == ""
    assert gates["gates/nano/before warm-up"].holds is None


def test_the_demo_gives_base_rival_and_adapter():
    rows = by_name(demo_report(), "demo")
    assert {"demo/base", "demo/lora", "demo/loreft", "demo/lora:format_accuracy"} <= set(rows)
    assert len(rows) == 6
    assert (rows["demo/lora"].mean, rows["demo/lora"].trainable) == (0.65, 25_600)
    assert (rows["demo/lora"].method, rows["demo/lora"].metric) == ("lora", "accuracy")
    assert (rows["demo/loreft"].mean, rows["demo/loreft"].trainable) == (0.7, 24_640)
    assert rows["demo/base"].method == "base" and rows["demo/base"].mean == 0.3


def test_the_page_has_a_section_for_each(tmp_path):
    path = tmp_path / "results.json"
    publish_measured(GATES, "gates", "make results-gates", path)
    publish_measured(PARITY, "parity", "make results-parity", path)
    publish_measured(SPEED, "speed", "make results-speed", path)
    publish_measured(demo_report(), "demo", "make results-demo", path)
    text = path.with_suffix(".md").read_text("utf-8")
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    assert heads == ["## Demo", "## Speed", "## Parity", "## Gates", "## Open cells"]
    assert "| 512/loreft r4, all layers | 0.62 s | 4.0 MB | 0.62 |" in text
    assert "| 512/loreft r4, all layers | ratio to lora | 0.62 |  | <= 0.75 | yes |" in text
    assert "| 512/lora r8 | seconds | 1 s |  | <= 0.5 | **no** |" in text
    assert "| 512/pyreft loreft (no --pyreft-python given) | open |" in text
    assert "| 128/logits | 3e-07 |  | at most 1e-05 | yes |" in text
    assert "| 128/losses (why) | 0.2 |  | at most 0.05 | **no** |" in text
    assert "| nano/tokens per log line | 31 [30, 32] | 900 | at most 25 | **no** |" in text
    assert "| loreft | loreft |" in text and "**70.0 % [65.0, 75.0]**" in text
    assert "Settings: rows 8, device cpu, dtype float32." in text
    assert "Versions: torch 2.13.0, transformers 5.23.0." in text and "pyreft 0.1.0" in text
    for command in ("gates", "parity", "speed", "demo"):
        assert f"make results-{command}\n" in text
    assert (tmp_path / "plots" / "speed.png").is_file()
    assert (tmp_path / "plots" / "demo.png").is_file()


def test_open_cells_stand_in_the_table_of_the_main_metric(tmp_path):
    from reftune.report.model import ResultRow
    from reftune.report.results import publish, render

    path = tmp_path / "results.json"
    rows = [
        ResultRow(name="f/base", metric="accuracy", mean=0.3, n=9),
        ResultRow(name="f/base:format_accuracy", metric="format_accuracy", mean=0.1, n=9),
        ResultRow(name="f/loreft", method="loreft"),
    ]
    publish(rows, path)
    text = render(path).read_text("utf-8")
    first, second = text.split("### F: format accuracy")
    assert "### F: accuracy" in first
    assert "| loreft | loreft |  |  |  | open |" in first and "| loreft | loreft |" not in second


def test_measuring_again_replaces_and_skipping_does_not(tmp_path):
    path = tmp_path / "results.json"
    publish_measured(SPEED, "speed", "first", path)
    again = copy.deepcopy(SPEED)
    again["rows"] = [{**again["rows"][1], "seconds": 0.5}]
    again["skipped"] = {"lora r8": "left out"}
    publish_measured(again, "speed", "second", path)
    rows = {row.name: row for row in read_results(path)}
    assert rows["speed/512/loreft r4, all layers"].mean == 0.5
    assert rows["speed/512/loreft r4, all layers"].command == "second"
    assert rows["speed/512/lora r8"].mean == 1.0


def test_the_command_line_adds_and_renders(tmp_path, capsys):
    file, results = tmp_path / "gates.json", tmp_path / "docs" / "results.json"
    file.write_text(json.dumps(GATES), encoding="utf-8")
    words = ["--results", str(results)]
    new = ["add", str(file), "--section", "gates", "--command", "make results-gates"]
    assert main([*words, *new]) == 0
    before = results.with_suffix(".md").read_text("utf-8")
    assert len(read_results(results)) == 3
    assert main(words) == 0
    assert results.with_suffix(".md").read_text("utf-8") == before
    file.write_text("{", encoding="utf-8")
    assert main([*words, *new]) == DataError.exit_code


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"rows": []}, "holds no rows"),
        ({"figure": {}}, "cannot be published .KeyError"),
        ([1], "cannot be published"),
        ({"gates": [{"name": "x"}]}, "'value'"),
    ],
)
def test_what_is_no_measurement_is_refused(data, message):
    with pytest.raises(DataError, match=message):
        measured_rows(data, "s", "c")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.json cannot be read"):
        add(tmp_path / "none.json", "s", "c", tmp_path / "r.json")
