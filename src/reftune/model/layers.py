"""Layer choice: `all`, `late`, lists, ranges, negative numbers and fractions of the depth."""

from __future__ import annotations

import re
from collections.abc import Sequence

from reftune.errors import SiteError

NUMBER = r"-?\d+(?:\.\d+)?"


def parse_layers(choice: str | int | Sequence[int], num_layers: int) -> list[int]:
    """Return the chosen block indices, sorted.

    Args:
        choice: `all`, `late` (the last half), `3`, `-1`, `2-5`, `0.5-1.0` (fractions of the
            depth), several joined by `,` or `;`, or a list of integers.
        num_layers: Number of blocks.

    Raises:
        SiteError: If the choice is malformed, empty or names a block the model does not have.

    >>> parse_layers("0,-1", 8)
    [0, 7]
    >>> parse_layers("0.5-1.0", 8)
    [4, 5, 6, 7]
    """
    if isinstance(choice, int) and not isinstance(choice, bool):
        choice = [choice]
    parts: Sequence[str | int]
    parts = re.split(r"[,;]", choice) if isinstance(choice, str) else list(choice)
    found: set[int] = set()
    for part in parts:
        found.update(_parse_part(str(part).strip(), num_layers, choice))
    if not found:
        raise SiteError(f"The layer choice {choice!r} names no layer.", _remedy(num_layers))
    return sorted(found)


def _parse_part(part: str, num_layers: int, choice: object) -> list[int]:
    if part == "all":
        return list(range(num_layers))
    if part == "late":
        return list(range(num_layers // 2, num_layers))
    if part == "half":
        return list(range(0, num_layers, 2))
    match = re.fullmatch(rf"({NUMBER})(?:(?:-|\.\.)({NUMBER}))?", part)
    if match is None:
        raise SiteError(
            f"{part!r} in the layer choice {choice!r} is not understood.", _remedy(num_layers)
        )
    if match[2] is None:
        if "." in part:
            raise SiteError(
                f"{part!r}: a fraction needs an end, as in 0.5-1.0.", _remedy(num_layers)
            )
        return [_index(int(part), num_layers, choice)]
    if "." in match[1] or "." in match[2]:
        low, high = float(match[1]), float(match[2])
        if not 0 <= low < high <= 1:
            raise SiteError(
                f"The fractions {part!r} must rise within 0.0 to 1.0.", _remedy(num_layers)
            )
        return [i for i in range(num_layers) if low <= i / num_layers < high]
    first, last = (_index(int(text), num_layers, choice) for text in (match[1], match[2]))
    if first > last:
        raise SiteError(f"The range {part!r} runs backwards.", _remedy(num_layers))
    return list(range(first, last + 1))


def _index(value: int, num_layers: int, choice: object) -> int:
    if not -num_layers <= value < num_layers:
        raise SiteError(
            f"Layer {value} in {choice!r} does not exist: the model has {num_layers} blocks, "
            f"0 to {num_layers - 1}.",
            _remedy(num_layers),
        )
    return value % num_layers


def _remedy(num_layers: int) -> str:
    return (
        f'Use "all", "late", "half", numbers from -{num_layers} to {num_layers - 1}, '
        'ranges as "2-5" or fractions as "0.5-1.0".'
    )
