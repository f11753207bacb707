"""The picture of gains against losses: who is in it, what is joined, and when there is none."""

from __future__ import annotations

import pytest

from reftune.report import trades
from reftune.report.model import ResultRow
from reftune.report.results import publish, render

pytestmark = pytest.mark.quick


def rows(name, gained, kept, method="red", **x):
    figures = {"accuracy": kept, "format_accuracy": gained}
    return [
        ResultRow(
            name=f"brep/{name}" + ("" if metric == "accuracy" else f":{metric}"),
            method=method,
            metric=metric,
            mean=value,
            low=value - 0.02,
            high=value + 0.02,
            seeds=3,
            n=500,
            line="brep" if x else "",
            x=x,
        )
        for metric, value in figures.items()
    ]


ALL = [
    *rows("base", 0.0, 0.99, method="base"),
    *rows("loreft", 0.9, 0.6, method="loreft"),
    *rows("brep", 0.7, 0.95, n=8, k=16),
    *rows("brep-n64", 0.8, 0.9, n=64),
    *rows("brep-n1", 0.2, 0.98, n=1),
]


def test_contenders_with_both_metrics_are_paired():
    lonely = ResultRow(name="brep/lora", metric="accuracy", mean=0.5)
    waiting = ResultRow(name="brep/red")
    found = trades._pairs([*ALL, lonely, waiting], "accuracy", "format_accuracy")
    assert [across.name for across, _ in found] == [
        "brep/base",
        "brep/loreft",
        "brep/brep",
        "brep/brep-n64",
        "brep/brep-n1",
    ]
    assert all(
        across.metric == "accuracy" and up.metric == "format_accuracy" for across, up in found
    )


def test_a_line_is_joined_along_a_place_that_two_of_it_have():
    joined = trades._joined(trades._pairs(ALL, "accuracy", "format_accuracy"))
    assert {key: [pair[0].name for pair in points] for key, points in joined.items()} == {
        ("brep", "n"): ["brep/brep-n1", "brep/brep", "brep/brep-n64"]
    }


def test_the_page_shows_it_in_sections_that_ask_for_it(tmp_path):
    path = tmp_path / "results.json"
    others = [row.model_copy(update={"name": row.name.replace("brep/", "other/")}) for row in ALL]
    publish([*ALL, *others], path)
    text = render(path).read_text()
    assert text.count("-trade.png") == 1 and "(plots/brep-trade.png)" in text
    assert (tmp_path / "plots" / "brep-trade.png").stat().st_size > 10_000


def test_without_two_contenders_there_is_no_picture(tmp_path):
    path = tmp_path / "one.png"
    few = [row for row in ALL if row.name.startswith("brep/loreft")]
    assert trades.trades(path, few, "format_accuracy", ["accuracy", "accuracy_on_new"]) is None
    assert not path.exists()
