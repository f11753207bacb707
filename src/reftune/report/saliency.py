"""Maps of single tokens: an answer's text, each token coloured by its weight, sets marked.

Two forms of the same: a page (`.html`, no scripts, nothing fetched) and a picture.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from reftune.report.drawing import COLOURS, INK, headline, save, sheet
from reftune.report.files import write_text_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RIGHT, WRONG = COLOURS[0], COLOURS[1]
"""Colours of tokens that are learned, and of tokens that are trained away."""
COLUMNS = 96
"""Characters a line of the picture."""

Pieces = Callable[[Sequence[int]], list[str]]
"""Turns token ids into their texts."""


@dataclass(frozen=True)
class TokenMap:
    """What an objective says of the tokens of one answer.

    Attributes:
        id: Name of the row.
        tokens: Token ids.
        weights: Weight of each, 0 or more.
        marked: Whether it is in the set.
        near: Whether it is a neighbour of the set.
        set_name: Name of the set: `S`, or `U` of an answer that was judged wrong.
    """

    id: str
    tokens: list[int]
    weights: list[float]
    marked: list[bool]
    near: list[bool]
    set_name: str = "S"

    @property
    def title(self) -> str:
        """A line that says what is to be seen."""
        kind = "judged wrong" if self.set_name == "U" else "right"
        count = sum(self.marked)
        return f"{self.id}: {kind}, {count} of {len(self.tokens)} tokens in {self.set_name}"


def write_maps(folder: str | PathLike[str], maps: Sequence[TokenMap], pieces: Pieces) -> list[Path]:
    """Write `saliency.html` and `saliency.png` of some answers; nothing if there are none.

    Args:
        folder: Where to.
        maps: The answers.
        pieces: Turns token ids into their texts.
    """
    if not maps:
        return []
    texts = [[_shown(text) for text in pieces(found.tokens)] for found in maps]
    page = write_text_atomic(Path(folder) / "saliency.html", _page(maps, texts))
    return [page, _picture(Path(folder) / "saliency.png", maps, texts)]


def _shown(text: str) -> str:
    """Return a token's text with its line breaks visible, so that nothing is without width."""
    return text.replace("\r", "").replace("\n", "↵").replace("\t", "  ") or "∅"


# Page

_STYLE = f"""
body {{ font: 15px/1.9 system-ui, sans-serif; color: {INK}; max-width: 60rem; margin: 2rem auto; }}
h2 {{ font-size: 1rem; margin: 1.6rem 0 .3rem; }}
span {{ white-space: pre-wrap; padding: .1rem 0; border-bottom: 3px solid transparent; }}
span.marked {{ border-bottom-color: {INK}; font-weight: 600; }}
span.near {{ border-bottom: 3px dotted {INK}; }}
"""


def _page(maps: Sequence[TokenMap], texts: Sequence[Sequence[str]]) -> str:
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Token weights</title>',
        f"<style>{_STYLE}</style><h1>Token weights</h1>",
        "<p>The stronger the colour, the larger the weight: blue is learned, orange is trained "
        "away. Underlined: in the set; dotted: its neighbour.</p>",
    ]
    for found, pieces in zip(maps, texts, strict=True):
        parts.append(f"<h2>{html.escape(found.title)}</h2><p>{''.join(_spans(found, pieces))}</p>")
    return "\n".join([*parts, "</html>", ""])


def _spans(found: TokenMap, pieces: Sequence[str]) -> list[str]:
    spans = []
    for index, text in enumerate(pieces):
        kind = "marked" if found.marked[index] else "near" if found.near[index] else ""
        red, green, blue, alpha = _colour(found, index)
        shade = f"rgba({red}, {green}, {blue}, {alpha:.2f})"
        tip = f"{found.weights[index]:.3f}"
        spans.append(
            f'<span class="{kind}" title="{tip}" style="background: {shade}">'
            f"{html.escape(text)}</span>"
        )
    return spans


def _colour(found: TokenMap, index: int) -> tuple[int, int, int, float]:
    """Return red, green and blue of a token, and how strong: 2 is the largest weight there is."""
    away = found.set_name == "U" and found.marked[index]
    code = (WRONG if away else RIGHT).lstrip("#")
    red, green, blue = (int(code[i : i + 2], 16) for i in (0, 2, 4))
    return red, green, blue, 0.6 * min(1.0, max(0.0, found.weights[index]) / 2)


# Picture


def _picture(path: Path, maps: Sequence[TokenMap], texts: Sequence[Sequence[str]]) -> Path:
    lines = [_lines(pieces) for pieces in texts]
    height = 0.5 + sum(0.45 + 0.26 * len(part) for part in lines)
    canvas, places = sheet(8.6, height, len(maps))
    for axes, found, part in zip(places, maps, lines, strict=True):
        _draw(axes, found, part)
    headline(canvas, "token weights")
    return save(canvas, path)


def _lines(pieces: Sequence[str]) -> list[list[tuple[int, int, str]]]:
    """Return lines of (number, column, text) of tokens, broken before a token that is too long."""
    lines: list[list[tuple[int, int, str]]] = [[]]
    column = 0
    for index, text in enumerate(pieces):
        if column and column + len(text) > COLUMNS:
            lines.append([])
            column = 0
        lines[-1].append((index, column, text))
        column += len(text)
    return lines


def _draw(axes: Axes, found: TokenMap, lines: Sequence[Sequence[tuple[int, int, str]]]) -> None:
    from matplotlib.patches import Rectangle

    axes.set_axis_off()
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(len(lines), 0)
    axes.set_title(found.title, loc="left", fontsize=9, color=INK)
    for row, tokens in enumerate(lines):
        for index, column, text in tokens:
            red, green, blue, alpha = _colour(found, index)
            shade = (red / 255, green / 255, blue / 255, alpha)
            axes.add_patch(Rectangle((column, row + 0.1), len(text), 0.75, color=shade, lw=0))
            if found.marked[index] or found.near[index]:
                line = "-" if found.marked[index] else ":"
                ends = [column + 0.1, column + len(text) - 0.1]
                axes.plot(ends, [row + 0.9] * 2, line, color=INK, linewidth=1.2)
            for offset, character in enumerate(text):  # a place each, whatever the font
                place = (column + offset + 0.5, row + 0.5)
                axes.text(
                    *place,
                    "\\$" if character == "$" else character,
                    ha="center",
                    va="center",
                    fontsize=7,
                    family="monospace",
                    color=INK,
                )
