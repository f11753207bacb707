"""Plots of figures: bars with intervals, training curves, and a forest plot of many results.

`reftune.report.drawing` says how they look.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from reftune.report.drawing import (
    BASE_COLOUR,
    COLOURS,
    FAINT,
    INK,
    caption,
    percent,
    save,
    sheet,
    stroke,
)
from reftune.report.model import BASELINES, Figure, Report, ResultRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)
DODGE = 0.008
"""Distance of lines in a picture over an axis, as a share of its length."""
MANY = 5
"""More lines than this have their legend beside the picture."""

Points = Sequence[tuple[float, float]]


def bars(
    path: str | PathLike[str],
    figures: Mapping[str, Figure],
    title: str = "",
    label: str = "accuracy",
) -> Path:
    """Draw one bar per figure with its interval.

    Bars named `base...` are grey; `lora` and `lora, strict` share a colour.

    Args:
        path: A `.png`, `.svg` or `.pdf` file.
        figures: Names to figures; those without a mean are drawn as an empty place.
        title: Title.
        label: Name of the value axis.
    """
    canvas, (axes,) = sheet(max(4.0, 1.1 * len(figures) + 1.5), 3.6)
    shares = all(figure.unit == "share" for figure in figures.values())
    highest = max([_top(figure) for figure in figures.values()], default=1.0)
    limit = 1.08 if shares and highest > 0.85 else highest * 1.2 or 1.0
    kinds = list(dict.fromkeys(_kind(name) for name in figures if not _is_base(name)))
    for place, (name, figure) in enumerate(figures.items()):
        colour = BASE_COLOUR
        if not _is_base(name):
            colour = COLOURS[kinds.index(_kind(name)) % len(COLOURS)]
        if figure.mean is None:
            axes.text(place, limit * 0.02, "open", ha="center", va="bottom", color=BASE_COLOUR)
            continue
        axes.bar(place, figure.mean, width=0.62, color=colour, zorder=2)
        if figure.has_interval:
            _whisker(axes, figure, place)
        text = f"{figure.mean * 100:.1f}" if shares else f"{figure.mean:.3g}"
        axes.annotate(
            text,
            (place, _top(figure)),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=INK,
            fontsize=9,
        )
    axes.set_xticks(range(len(figures)), list(figures))
    _turn_long_labels(axes, list(figures))
    axes.set_ylim(0, limit)
    axes.grid(axis="y", color=FAINT, linewidth=0.7, zorder=0)
    if shares:
        percent(axes.yaxis)
    caption(axes, title, "", label)
    return save(canvas, path)


def curves(
    path: str | PathLike[str],
    series: Mapping[str, Points],
    title: str = "",
    label: str = "loss",
    along: str = "step",
) -> Path:
    """Draw curves, each with its raw points faint behind a smoothed line.

    Args:
        path: A `.png`, `.svg` or `.pdf` file.
        series: Names to (step, value) points.
        title: Title.
        label: Name of the value axis.
        along: Name of the other axis.
    """
    canvas, (axes,) = sheet(6.0, 3.6)
    for index, (name, points) in enumerate(series.items()):
        look = stroke(index)
        steps, values = [p[0] for p in points], [p[1] for p in points]
        many = len(values) > 40
        if many:
            axes.plot(steps, values, color=look["color"], alpha=0.22, linewidth=0.8)
        marker = "o" if len(values) < 15 else None
        line = smooth(values) if many else values
        axes.plot(steps, line, **look, linewidth=1.8, label=name, marker=marker, markersize=3)
    axes.grid(color=FAINT, linewidth=0.7)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=9)
    caption(axes, title, along, label)
    return save(canvas, path)


def forest(path: str | PathLike[str], rows: Sequence[ResultRow], title: str = "") -> Path:
    """Draw results as points with intervals, best on top; open cells are named at the bottom.

    Args:
        path: A `.png`, `.svg` or `.pdf` file.
        rows: Results of one metric and unit.
        title: Title.
    """
    done = sorted((row for row in rows if not row.is_open), key=lambda row: row.mean)
    names = [row for row in rows if row.is_open] + done
    canvas, (axes,) = sheet(6.4, max(1.8, 0.3 * len(names) + 1.1))
    shares = all(row.unit == "share" for row in done)
    methods = list(dict.fromkeys(row.method for row in rows if row.method not in BASELINES))
    for place, row in enumerate(names):
        if row.is_open:
            continue
        colour = BASE_COLOUR
        if row.method in methods:
            colour = COLOURS[methods.index(row.method) % len(COLOURS)]
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [place, place], color=colour, linewidth=2, alpha=0.55)
        axes.plot(row.mean, place, "o", color=colour, markersize=6)
        text = f"{row.mean * 100:.1f}" if shares else f"{row.mean:.3g}"
        right = row.high if row.high is not None else row.mean
        axes.annotate(
            text, (right, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8
        )
    labels = [_row_label(row) + (" (open)" if row.is_open else "") for row in names]
    axes.set_yticks(range(len(names)), labels, fontsize=8.5)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.margins(x=0.12)
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    if shares:
        percent(axes.xaxis)
    metric = next((row.metric for row in rows if row.metric), "")
    caption(axes, title, metric, "")
    return save(canvas, path)


def over(path: str | PathLike[str], rows: Sequence[ResultRow], axis: str, title: str = "") -> Path:
    """Draw results over one of their places `x`: a line for each `line`, with intervals.

    Baselines are dashed levels, for they have no place. An axis that spans a factor of eight is
    logarithmic. Lines stand a little beside one another, so that intervals do not cover each other.
    Differences get a line at zero.

    Args:
        path: A `.png`, `.svg` or `.pdf` file.
        rows: Results of one metric and unit.
        axis: Key of `x`, such as `epochs`.
        title: Title.
    """
    canvas, (axes,) = sheet(6.4, 4.0)
    done = [row for row in rows if not row.is_open]
    names = dict.fromkeys(row.line for row in done if axis in row.x)
    where = [row.x[axis] for row in done if axis in row.x]
    is_wide = min(where) > 0 and max(where) >= 8 * min(where)
    has_intervals = any(row.low is not None for row in done)
    for index, name in enumerate(names):
        aside = DODGE * (index - (len(names) - 1) / 2) if has_intervals else 0.0
        points = sorted((row for row in done if row.line == name and axis in row.x), key=_at(axis))
        step = 0.0 if is_wide else aside * (max(where) - min(where))
        factor = (max(where) / min(where)) ** aside if is_wide else 1.0
        places, values = [row.x[axis] * factor + step for row in points], [r.mean for r in points]
        look = {**stroke(index), "marker": "o", "linewidth": 1.6, "markersize": 4}
        ends = [(row.low, row.high) for row in points]
        if any(end is None for pair in ends for end in pair):
            axes.plot(places, values, label=name, **look)
            continue
        below = [value - low for value, (low, _) in zip(values, ends)]
        above = [high - value for value, (_, high) in zip(values, ends)]
        whiskers = {"capsize": 2.5, "elinewidth": 0.9}
        axes.errorbar(places, values, [below, above], label=name, **look, **whiskers)
    levels = [row for row in done if row.method in BASELINES and not row.x]
    for row, style in zip(levels, ("--", ":", "-.")):
        axes.axhline(row.mean, color=BASE_COLOUR, linestyle=style, label=_row_label(row))
    if any(row.metric.endswith("_difference") for row in done):
        axes.axhline(0, color=INK, linewidth=0.8)
    if is_wide:
        _logarithmic(axes, sorted(set(where)))
    if all(row.unit == "share" for row in done):
        percent(axes.yaxis)
    axes.grid(color=FAINT, linewidth=0.7)
    beside = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)} if len(names) > MANY else {}
    axes.legend(frameon=False, fontsize=8.5, **beside)
    caption(axes, title, axis.replace("_", " "), next(row.metric for row in done).replace("_", " "))
    return save(canvas, path)


def _at(axis: str) -> Callable[[ResultRow], float]:
    return lambda row: row.x[axis]


def _logarithmic(axes: Axes, places: Sequence[float]) -> None:
    """Make the axis logarithmic; few places are its ticks."""
    axes.set_xscale("log")
    if len(places) <= 8:
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()


def plot_reports(path: str | PathLike[str], reports: Sequence[Report], title: str = "") -> Path:
    """Draw the main figure of each run beside the base model's, where the runs measured it."""
    figures: dict[str, Figure] = {}
    metric = ""
    for report in reports:
        main = report.primary()
        if main is None:
            continue
        metric = metric or main[0]
        base = report.figures.get(f"base_{main[0].removeprefix('adapter_')}")
        if base is not None and base not in figures.values():
            figures["base" if "base" not in figures else f"base of {report.name}"] = base
        figures[report.name] = main[1]
    return bars(path, figures, title, metric.removeprefix("adapter_") or "value")


def plot_training(path: str | PathLike[str], runs: Sequence[str | PathLike[str]]) -> Path | None:
    """Draw the training loss of run folders; None if none of them has any."""
    series = {Path(run).name: read_metrics(Path(run) / "metrics.jsonl", "loss") for run in runs}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return None
    return curves(path, series, "training loss", "loss")


def plot_metrics(
    path: str | PathLike[str],
    run: str | PathLike[str],
    panels: Sequence[Sequence[str]],
    title: str = "",
) -> Path | None:
    """Draw metrics of a run folder over its steps; None if it has none of them.

    A metric whose name ends in `_target` is a dashed line: what the others are held against.

    Args:
        path: A `.png`, `.svg` or `.pdf` file.
        run: The run folder.
        panels: Names of the metrics of each panel, from top to bottom.
        title: Title.
    """
    file = Path(run) / "metrics.jsonl"
    series = [{name: read_metrics(file, name) for name in names} for names in panels]
    series = [{name: found for name, found in part.items() if found} for part in series]
    series = [part for part in series if part]
    if not series:
        return None
    canvas, places = sheet(6.0, 1.0 + 1.7 * len(series), len(series), share_x=True)
    for axes, part in zip(places, series):
        for index, (name, points) in enumerate(part.items()):
            steps, values = zip(*points)
            is_target = name.endswith("_target")
            look = {"color": INK, "linestyle": "--", "linewidth": 1.0}
            plain = {**stroke(index), "linewidth": 1.5}
            label = name.replace("_", " ")
            axes.plot(steps, values, label=label, **(look if is_target else plain))
        axes.grid(color=FAINT, linewidth=0.7)
        axes.legend(frameon=False, fontsize=8)
    for axes in places[:-1]:
        axes.tick_params(labelbottom=False)
    caption(places[0], title, "", "")
    places[-1].set_xlabel("step", color=INK)
    return save(canvas, path)


def read_metrics(path: str | PathLike[str], key: str) -> list[tuple[float, float]]:
    """Return (step, value) of every line of a metrics.jsonl that holds `key`.

    Lines that are no JSON (the last one of a killed run) are skipped. Steps count on over stages.
    """
    points: list[tuple[float, float]] = []
    if not Path(path).is_file():
        return points
    offset, last, stage = 0.0, 0.0, None
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            log.debug("%s: line %d is no JSON", path, number)
            continue
        if not isinstance(row, dict) or not isinstance(row.get(key), int | float):
            continue
        step = float(row.get("step", len(points) + 1))
        if row.get("stage") != stage and points:
            offset = last
        stage, last = row.get("stage"), offset + step
        points.append((last, float(row[key])))
    return points


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Return the exponential moving average, corrected for its start.

    s_t = (1 − w) Σ_{i≤t} w^{t−i} x_i / (1 − w^t)

    >>> smooth([2.0, 2.0, 2.0])
    [2.0, 2.0, 2.0]
    """
    total, norm, found = 0.0, 0.0, []
    for value in values:
        total, norm = weight * total + value, weight * norm + 1.0
        found.append(total / norm)
    return found


def _whisker(axes: Axes, figure: Figure, place: float) -> None:
    below, above = figure.mean - figure.low, figure.high - figure.mean
    axes.errorbar(
        place,
        figure.mean,
        yerr=[[max(0.0, below)], [max(0.0, above)]],
        color=INK,
        capsize=4,
        linewidth=1.2,
        zorder=3,
    )


def _turn_long_labels(axes: Axes, names: Sequence[str]) -> None:
    if max((len(name) for name in names), default=0) > 12:
        for tick in axes.get_xticklabels():
            tick.set_rotation(25)
            tick.set_ha("right")
            tick.set_rotation_mode("anchor")


def _top(figure: Figure) -> float:
    ends = [end for end in (figure.mean, figure.high) if end is not None]
    return max(ends, default=0.0)


def _kind(name: str) -> str:
    return name.partition(",")[0]


def _is_base(name: str) -> bool:
    return name.lower().startswith("base")


def _row_label(row: ResultRow) -> str:
    return row.name.partition("/")[2] or row.name
