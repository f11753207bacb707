"""What is gained against what is lost: two metrics of the same runs, one over the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from reftune.report.drawing import (
    BASE_COLOUR,
    COLOURS,
    FAINT,
    INK,
    headline,
    percent,
    save,
    tiles,
)
from reftune.report.model import BASELINES, ResultRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRADES: dict[str, tuple[str, tuple[str, ...]]] = {
    "brep": (
        "format_accuracy",
        ("accuracy", "accuracy_on_half", "accuracy_on_new", "accuracy_on_far"),
    ),
}
"""Section to the metric that training is for, and those that it must not harm."""

Pair = tuple[ResultRow, ResultRow]
"""The rows of one contender: what may be harmed, and what is gained."""


def trades(
    path: str | PathLike[str],
    rows: Sequence[ResultRow],
    gained: str,
    kept: Sequence[str],
    title: str = "",
) -> Path | None:
    """Draw a panel for each metric that must not be harmed; None if no two contenders have both.

    Each contender is a point with both intervals. Contenders of one line are joined along each
    of their places `x`, in its order: how the trade moves with it.

    Args:
        path: A `.png`, `.svg` or `.pdf` file.
        rows: Results; those of one contender agree in their names up to `:`.
        gained: The metric that training is for, upwards in each panel.
        kept: The metrics that must not be harmed, one a panel.
        title: Title.
    """
    pairs = {metric: _pairs(rows, metric, gained) for metric in kept}
    pairs = {metric: found for metric, found in pairs.items() if len(found) > 1}
    if not pairs:
        return None
    canvas, places = tiles(len(pairs), 5.2, 3.9)
    for axes, (metric, found) in zip(places, pairs.items()):
        _panel(axes, found)
        axes.set_xlabel(metric.replace("_", " "), color=INK)
        axes.set_ylabel(gained.replace("_", " "), color=INK)
    headline(canvas, title)
    return save(canvas, path)


def _pairs(rows: Iterable[ResultRow], across: str, up: str) -> list[Pair]:
    """Return the two rows of each contender that has both metrics."""
    found: dict[str, dict[str, ResultRow]] = {}
    for row in rows:
        if not row.is_open:
            found.setdefault(row.name.split(":")[0], {})[row.metric] = row
    return [(own[across], own[up]) for own in found.values() if across in own and up in own]


def _panel(axes: Axes, pairs: Sequence[Pair]) -> None:
    axes.grid(color=FAINT, linewidth=0.7)
    for index, ((line, place), points) in enumerate(_joined(pairs).items()):
        at = [(across.mean, up.mean) for across, up in points]
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(*zip(*at), color=colour, linewidth=1.2, alpha=0.7, label=f"{line} over {place}")
    for across, up in pairs:
        _point(axes, across, up)
    if all(row.unit == "share" for pair in pairs for row in pair):
        percent(axes.xaxis)
        percent(axes.yaxis)
    axes.margins(0.12)
    axes.tick_params(labelsize=8.5)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8)


def _joined(pairs: Sequence[Pair]) -> dict[tuple[str, str], list[Pair]]:
    """Return the contenders of each line along each place that two of them have, in its order."""
    found: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        for place in pair[0].x:
            if place != "train_seconds":
                found.setdefault((pair[0].line, place), []).append(pair)
    return {
        key: sorted(points, key=lambda pair: pair[0].x[key[1]])
        for key, points in found.items()
        if len(points) > 1
    }


def _point(axes: Axes, across: ResultRow, up: ResultRow) -> None:
    colour = BASE_COLOUR if across.method in BASELINES else INK
    if across.low is not None and across.high is not None:
        axes.hlines(up.mean, across.low, across.high, color=colour, alpha=0.35, linewidth=1.0)
    if up.low is not None and up.high is not None:
        axes.vlines(across.mean, up.low, up.high, color=colour, alpha=0.35, linewidth=1.0)
    axes.plot(across.mean, up.mean, "o", color=colour, markersize=4)
    name = across.name.split(":")[0].rpartition("/")[2]
    where = (across.mean, up.mean)
    axes.annotate(name, where, xytext=(4, 4), textcoords="offset points", fontsize=7, color=INK)
