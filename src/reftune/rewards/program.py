"""Programs as answers: `solution()` is run, and what it returns is the answer.

| rule | answer | right when |
|---|---|---|
| `program` | finite number that `solution()` returns | 1e-2 |
| `program_reference` | the same with the quirks of the published code; `nan` counts | 1e-2 |
| `program_choice` | what `solution()` returns, as text | equal |

All see only what follows the last `Answer reasoning:`, if the text has one. Where the text goes on
behind a prefilled `def solution():` and its docstring, these are put before it again.

`program_reference` drops everything from the first blank line on, reads `sys.exit` as `print`, and
runs the rest in two namespaces, so that `solution` sees no function and no import beside it.

Programs run in `reftune.rewards.programs`, which says what that does not protect against.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Literal

from reftune.rewards import programs
from reftune.rewards.base import Rule
from reftune.rewards.numeric import MARKER, matches_loosely

Compat = Literal["default", "reference"]

HEAD = "def solution():"
"""First line of a program."""
LONGEST = 20_000
"""Characters of a program that is run; a longer text is none."""

_DEFINED = re.compile(r"^def\s+solution\s*\(", re.M)
_IS_CODE = re.compile(r"\b(?:return|result)\b")


def program_in(text: str, compat: Compat = "default") -> str | None:
    """Return the program in a text, or None if it has nothing that looks like one.

    Args:
        text: Generated text, with or without its prompt.
        compat: `reference` cuts it at the first blank line and reads `sys.exit` as `print`.

    >>> print(program_in("    a = 2 * 3\\n    return a"))
    def solution():
        a = 2 * 3
        return a
    """
    source = text.rpartition(MARKER)[2].strip("\n")
    if compat == "reference":
        lines = source.split("\n")
        blank = next((i for i, line in enumerate(lines) if not line.strip()), len(lines))
        source = "\n".join(lines[:blank]).replace("sys.exit", "print")
    if not _DEFINED.search(source):
        source = _with_head(source)
    return source if source and len(source) <= LONGEST else None


def _with_head(body: str) -> str:
    """Return a body with its first line before it; empty if it is no body."""
    if not _IS_CODE.search(body):
        return ""
    lines = body.split("\n")
    if not lines[0][:1].isspace():  # decoding may have taken the first indent away
        inner = (line for line in lines[1:] if line.strip() and line[:1].isspace())
        other = next(inner, "    ")
        lines[0] = other[: len(other) - len(other.lstrip())] + lines[0]
    return "\n".join([HEAD, *lines])


@lru_cache(maxsize=4096)
def value_of(text: str, compat: Compat = "default") -> programs.Outcome:
    """Return what the program in a text gives; the same text is run once.

    Args:
        text: Generated text.
        compat: See `program_in`.
    """
    source = program_in(text, compat)
    if source is None:
        return programs.Outcome(error="no program")
    return programs.shared().run(source, compat == "reference")


def extract(text: str, compat: Compat = "default") -> str | None:
    """Return the number that the program in a text gives, or None.

    Args:
        text: Generated text.
        compat: `reference` lets `nan` and `inf` count as extracted (they earn the partial reward).

    >>> extract("Answer reasoning:\\ndef solution():\\n    return 2 + 3")
    '5.0'
    """
    number = value_of(text, compat).number
    if number is None or not (compat == "reference" or math.isfinite(number)):
        return None
    return repr(number)


def extract_text(text: str) -> str | None:
    """Return what the program in a text gives as text, or None."""
    found = value_of(text, "default").text
    return None if found is None or found == "None" else found.strip() or None


def same_text(pred: str, gold: str) -> bool:
    """Say whether two texts are equal.

    >>> same_text("b", "b"), same_text("B", "b")
    (True, False)
    """
    return pred == gold


def _extract_as_reference(text: str) -> str | None:
    return extract(text, "reference")


NUMBER = Rule("program", extract, matches_loosely)
"""Number that the program returns, within 0.01."""
NUMBER_REFERENCE = Rule("program_reference", _extract_as_reference, matches_loosely)
"""The same with the quirks of the published code."""
CHOICE = Rule("program_choice", extract_text, same_text)
"""Text that the program returns."""
