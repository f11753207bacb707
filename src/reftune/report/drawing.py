"""What all pictures share: colours, axes without a box, files that are whole or absent.

Pictures are drawn without a display and without matplotlib's global state, so that a library user's
own figures are left alone.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from reftune.report.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure as Canvas

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#444444")
"""Told apart by people with any colour vision (Okabe and Ito)."""
BASE_COLOUR = "#9AA0A6"
INK, FAINT = "#222222", "#D5D8DC"
DPI = 160


def stroke(index: int) -> dict[str, str]:
    """Return colour and line style of the index-th line; they repeat together only after 24 lines.

    >>> stroke(8)
    {'color': '#0072B2', 'linestyle': '--'}
    """
    again, place = divmod(index, len(COLOURS))
    return {"color": COLOURS[place], "linestyle": ("-", "--", ":")[again % 3]}


def sheet(
    width: float, height: float, rows: int = 1, columns: int = 1, share_x: bool = False
) -> tuple[Canvas, list[Axes]]:
    """Return a canvas and its axes, row by row.

    Args:
        width: Inches of the whole.
        height: Likewise.
        rows: Axes below one another.
        columns: Axes side by side.
        share_x: Whether those below one another have one x axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as MplFigure

    canvas = MplFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(canvas)
    places = list(canvas.subplots(rows, columns, sharex=share_x, squeeze=False).flatten())
    for axes in places:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(BASE_COLOUR)
        axes.tick_params(colors=INK, length=3)
        axes.set_axisbelow(True)
    return canvas, places


def tiles(number: int, width: float, height: float, columns: int = 2) -> tuple[Canvas, list[Axes]]:
    """Return a canvas with `number` axes of a size, at most `columns` side by side."""
    columns = min(columns, number)
    rows = -(-number // columns)
    canvas, places = sheet(width * columns, height * rows, rows, columns)
    for axes in places[number:]:
        axes.set_axis_off()
    return canvas, places[:number]


def headline(canvas: Canvas, title: str) -> None:
    """Write a title over all axes."""
    canvas.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK, fontweight="bold")


def caption(axes: Axes, title: str, across: str, up: str) -> None:
    """Write the title of axes and what they show."""
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.set_xlabel(across, color=INK)
    axes.set_ylabel(up, color=INK)


def percent(axis: Axis) -> None:
    """Show shares as whole per cent."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def save(canvas: Canvas, path: str | PathLike[str]) -> Path:
    """Write a picture, whole or not at all; its ending says the format."""
    path = Path(path)
    form = path.suffix.lstrip(".") or "png"
    with replacing(path) as temporary:
        canvas.savefig(temporary, format=form, dpi=DPI, facecolor="white")
    return path
