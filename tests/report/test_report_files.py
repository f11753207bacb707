"""Atomic files, reports and published rows."""

from __future__ import annotations

import json
import math
import os
import stat

import pytest

from reftune.errors import DataError
from reftune.report.files import plain, replacing, to_json, write_json_atomic, write_text_atomic
from reftune.report.model import Figure, Report, ResultRow

pytestmark = pytest.mark.quick


def test_a_failing_writer_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = write_text_atomic(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError, match="halfway"), replacing(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError("halfway")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_leaves_nothing_under_the_final_name(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json_atomic(tmp_path / "a.json", {"x": 1})
    assert os.listdir(tmp_path) == []


def test_permissions_are_those_of_usual_files(tmp_path):
    mask = os.umask(0o022)
    try:
        path = write_text_atomic(tmp_path / "a", "x")
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        path.chmod(0o600)
        write_text_atomic(path, "y")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(mask)


def test_json_is_strict_and_takes_what_runs_produce(tmp_path):
    import numpy as np
    import torch

    value = {
        "nan": math.nan,
        "inf": [math.inf],
        "np": np.float64(0.5),
        "tensor": torch.tensor(3),
        "path": tmp_path,
        "set": {"b", "a"},
        "figure": Figure(mean=0.5),
        1: (1, True, None),
    }
    read = json.loads(to_json(value))
    assert read["nan"] is None and read["inf"] == [None]
    assert (read["np"], read["tensor"], read["set"]) == (0.5, 3, ["a", "b"])
    assert read["figure"]["mean"] == 0.5 and read["1"] == [1, True, None]
    with pytest.raises(TypeError, match="cannot write object as JSON"):
        plain({"a": object()})


def test_report_round_trip_keeps_extra_fields(tmp_path):
    report = Report(
        name="demo",
        figures={"accuracy": Figure(mean=0.75, n=200, low=0.7, high=0.8)},
        base_accuracy=0.4,
    )
    report.write(tmp_path / "report.json")
    again = Report.read(tmp_path)
    assert again == report
    assert json.loads((tmp_path / "report.json").read_text())["base_accuracy"] == 0.4


def test_primary_figure():
    figures = {"base_accuracy": Figure(mean=0.1), "adapter_accuracy": Figure(mean=0.2)}
    assert Report(name="a", figures=figures).primary()[0] == "adapter_accuracy"
    assert Report(name="a", figures=figures, metric="base_accuracy").primary()[1].mean == 0.1
    assert Report(name="a").primary() is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("{", "cannot be read as JSON"),
        ('{"figures": {"a": {"mean": "x"}}}', "is no Report: name: Field required"),
    ],
)
def test_unreadable_reports(tmp_path, text, message):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(DataError, match=message):
        Report.read(tmp_path)


def test_result_rows():
    row = ResultRow(name="families/loreft", mean=0.7, low=0.6, high=0.8, seeds=3)
    assert row.section == "families" and not row.is_open and row.figure().has_interval
    assert ResultRow(name="x").is_open
