"""Pictures of several panels: figures along an axis, with their intervals as bands or whiskers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from reftune.report.model import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDE, _HIGH = 4.9, 3.4
_APART = 0.06
"""Distance of two lines whose intervals are whiskers."""


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: What it shows.
        lines: Figures at places, by the name of the line; open figures leave a gap.
        levels: Figures without a place, drawn as broken lines.
        label: Name of the value axis.
        along: Name of the other axis.
        names: What stands at the places, if not the numbers themselves.
        limits: Ends of the value axis; what lies beyond is cut off. Shares have their own.
        bands: Whether intervals are bands; else whiskers, for few places that have nothing between
            them.
    """

    title: str
    lines: Mapping[str, Sequence[tuple[float, Figure]]]
    levels: Mapping[str, Figure] = field(default_factory=dict)
    label: str = ""
    along: str = ""
    names: Mapping[float, str] | None = None
    limits: tuple[float, float] | None = None
    bands: bool = True


def draw(
    path: str | PathLike[str], panels: Sequence[Panel], title: str = "", columns: int = 2
) -> Path:
    """Draw panels side by side; a line has the same colour in all of them, `base` is grey.

    Args:
        path: A `.png`, `.svg` or `.pdf` file, whole or not at all.
        panels: The panels, row by row.
        title: Title of the picture.
        columns: Panels a row.
    """
    canvas, places = tiles(len(panels), _WIDE, _HIGH, columns)
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    others = [name for name in names if name != "base"]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}
    for axes, panel in zip(places, panels):
        _panel(axes, panel, colours)
    handles, labels = places[0].get_legend_handles_labels()
    if len(labels) > 1:
        look = {"frameon": False, "fontsize": 8.5, "ncols": min(len(labels), 1 + columns)}
        canvas.legend(handles, labels, loc="outside lower left", **look)
    headline(canvas, title)
    return save(canvas, path)


def _panel(axes: Axes, panel: Panel, colours: Mapping[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for index, (name, points) in enumerate(panel.lines.items()):
        apart = 0.0 if panel.bands else _APART * (index - (len(panel.lines) - 1) / 2)
        _line(axes, name, points, colours.get(name, BASE_COLOUR), apart, panel.bands)
    known = {name: figure for name, figure in panel.levels.items() if figure.mean is not None}
    for (name, figure), style in zip(known.items(), ("--", ":", "-.")):
        axes.axhline(figure.mean, label=name, color=INK, linestyle=style, linewidth=1.0)
    figures = [figure for points in panel.lines.values() for _, figure in points]
    if all(figure.unit == "share" for figure in figures):
        percent(axes.yaxis)
        axes.set_ylim(-0.03, 1.03)
    elif panel.limits is not None:
        axes.set_ylim(*panel.limits)
    if panel.names:
        axes.set_xticks(list(panel.names), list(panel.names.values()))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8.5)
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_title(panel.title, loc="left", fontsize=9.5, color=INK)
    axes.set_xlabel(panel.along, color=INK, fontsize=9)
    axes.set_ylabel(panel.label, color=INK, fontsize=9)


def _line(
    axes: Axes,
    name: str,
    points: Sequence[tuple[float, Figure]],
    colour: str,
    apart: float,
    band: bool,
) -> None:
    known = [(place, figure) for place, figure in points if figure.mean is not None]
    if not known:
        return
    places = [place + apart for place, _ in known]
    values = [figure.mean for _, figure in known]
    width = 3.2 if name == "base" else 1.7  # it is drawn first, and seen behind the others
    look = {"color": colour, "linewidth": width, "marker": "o", "markersize": 3.5}
    axes.plot(places, values, label=name, **look)
    if not all(figure.has_interval for _, figure in known):
        return
    low, high = zip(*((figure.low, figure.high) for _, figure in known))
    if band:
        axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    else:
        axes.vlines(places, low, high, color=colour, linewidth=1.2)
