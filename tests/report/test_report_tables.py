"""Tables and plots."""

from __future__ import annotations

import json

import pytest

from reftune.report.model import Figure, Report, ResultRow
from reftune.report.plots import (
    bars,
    curves,
    forest,
    plot_reports,
    plot_training,
    read_metrics,
    smooth,
)
from reftune.report.tables import (
    Cell,
    Table,
    checked_table,
    report_table,
    result_table,
    show_bytes,
    show_figure,
    show_seconds,
    show_share,
    wide_table,
)

pytestmark = pytest.mark.quick


def run(name, mean, base=None, **more):
    figures = {"adapter_accuracy": Figure(mean=mean, n=100, low=mean - 0.05, high=mean + 0.05)}
    if base is not None:
        figures["base_accuracy"] = Figure(mean=base, n=100)
    return Report(name=name, figures=figures, methods=["loreft"], task="families", **more)


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (Figure(mean=0.5), "50.0 %"),
        (Figure(mean=0.5, sd=0.01, seeds=3), "50.0 ± 1.0 %"),
        (Figure(mean=0.5, sd=0.01, seeds=1, low=0.4, high=0.6), "50.0 % [40.0, 60.0]"),
        (Figure(mean=0.695, unit="ratio"), "0.69"),
        (Figure(mean=1500, unit="tokens/s"), "1,500 tokens/s"),
        (Figure(mean=0), "0.0 %"),
        (Figure(mean=None), "open"),
    ],
)
def test_show_figure(figure, text):
    assert show_figure(figure) == text


def test_units():
    assert (show_bytes(999), show_bytes(1.5e6), show_bytes(3e12)) == (
        "999 B",
        "1.5 MB",
        "3000.0 GB",
    )
    assert (show_seconds(0.0042), show_seconds(59.94)) == ("4.2 ms", "59.9 s")
    assert (show_seconds(7260), show_seconds(119.6)) == ("2 h 1 min", "2 min 0 s")
    assert (show_share(1.0), show_share(0.0)) == ("100 %", "0 %")


def test_best_is_bold_per_rule_and_a_single_number_is_no_winner():
    table = Table(["a", "acc", "loss"], best=[None, "high", "low"])
    table.add("x", Cell("1", 1.0), Cell("3", 3.0))
    table.add("y|z", Cell("2", 2.0), Cell(""))
    text = table.to_markdown()
    assert "| x | 1 | 3 |" in text
    assert "| y\\|z | **2** |  |" in text


def test_report_table_shows_the_base_once():
    runs = [run("a", 0.7, base=0.4, trainable_parameters=24640), run("b", 0.8, base=0.4)]
    table = report_table(runs)
    assert [row[0].text for row in table.rows] == ["base of a", "a", "b"]
    assert table.columns[3] == "accuracy"
    text = table.to_markdown()
    assert "**80.0 % [75.0, 85.0]**" in text and "24,640" in text


def test_rich_table_renders():
    from rich.console import Console

    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report_table([run("a", 0.7)]).to_rich())
    assert "70.0 % [65.0, 75.0]" in console.export_text()


def test_result_table_prints_open_cells_as_open():
    rows = [
        ResultRow(name="f/a", metric="accuracy", mean=0.5, n=100, seeds=3, seconds=70.0),
        ResultRow(name="f/b", note="1 of 3 seeds"),
    ]
    text = result_table(rows).to_markdown()
    assert "3 x 100" in text
    assert "| b (1 of 3 seeds) |" in text and "| open |" in text


@pytest.mark.parametrize("form", [result_table, wide_table, checked_table])
def test_rows_outside_sections_keep_their_names(form):
    rows = [
        ResultRow(name="mine", metric="accuracy", mean=0.5, note="smoke"),
        ResultRow(name="runs/other", metric="accuracy", mean=0.4),
    ]
    assert [row[0].text for row in form(rows).rows] == ["mine (smoke)", "other"]


def test_lower_is_better_where_it_is():
    rows = [
        ResultRow(name="s/a", metric="seconds", mean=2.0, unit="seconds"),
        ResultRow(name="s/b", metric="seconds", mean=1.0, unit="seconds"),
    ]
    assert "**1 s**" in result_table(rows).to_markdown()


def test_plots_are_written_whole(tmp_path):
    figures = {"base": Figure(mean=0.4, low=0.3, high=0.5), "loreft": Figure(mean=0.8)}
    figures["open one with a long name"] = Figure(mean=None)
    paths = [
        bars(tmp_path / "a.png", figures, "title"),
        curves(tmp_path / "b.png", {"x": [(i, 1 / (i + 1)) for i in range(90)], "y": [(0, 1.0)]}),
        forest(
            tmp_path / "c.svg", [ResultRow(name="f/a", mean=0.1, method="x"), ResultRow(name="f/b")]
        ),
        plot_reports(tmp_path / "d.pdf", [run("a", 0.7, base=0.4), run("b", 0.6, base=0.4)]),
        bars(tmp_path / "e.png", {}),
    ]
    assert all(path.stat().st_size > 800 for path in paths)
    assert paths[0].read_bytes()[:4] == b"\x89PNG"
    assert len(list(tmp_path.iterdir())) == len(paths)


def test_plotting_leaves_pyplot_alone(tmp_path):
    import sys

    bars(tmp_path / "a.png", {"a": Figure(mean=1.0)})
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_metrics_are_read_over_stages_and_torn_lines(tmp_path):
    rows = [
        {"stage": 1, "step": 1, "loss": 3.0},
        {"stage": 1, "step": 2, "loss": 2.0},
        {"stage": 1, "step": 2, "validation_loss": 9.0},
        {"stage": 2, "step": 1, "loss": 1.0},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": 2, "st')
    assert read_metrics(path, "loss") == [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]
    assert read_metrics(tmp_path / "none", "loss") == []
    assert plot_training(tmp_path / "x.png", [tmp_path]).is_file()
    assert plot_training(tmp_path / "y.png", [tmp_path / "none"]) is None


def test_smooth_is_an_average():
    assert smooth([1.0, 3.0], weight=0.5) == [1.0, pytest.approx((0.5 * 1 + 3) / 1.5)]
