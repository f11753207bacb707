"""Programs as answers: `solution()` is run, and what it returns is the answer.

| rule | answer | right when |
|---|---|---|
| `program` | finite number that `solution()` returns | 1e-2 |
| `program_reference` | the same with the quirks of the published code; `nan` counts | 1e-2 |
| `program_choice` | what `solution()` returns, as text | equal |
| `program_choice_reference` | the same, published quirks; a failed program gives `none` | equal |

All see only what follows the last `Answer reasoning:`, if the text has one. Where the text goes on
behind a prefilled `def solution():` and its docstring, these are put before it again.

The `reference` rules drop everything from the first blank line on, read `sys.exit` as `print`, and
run the rest in two namespaces, so that `solution` sees no function and no import beside it.

Programs run in `reftune.rewards.programs`, which says what that does not protect against. Several
are run at once where a rule is told of them in advance (`Rule.ahead`).
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from reftune.rewards import programs
from reftune.rewards.base import Rule
from reftune.rewards.numeric import MARKER, matches_loosely
from reftune.rewards.programs import Limits, Outcome

Compat = Literal["default", "reference"]

HEAD = "def solution():"
"""First line of a program."""
LONGEST = 20_000
"""Characters of a program that is run; a longer text is none."""
KEPT = 4096
"""Programs whose outcome is remembered."""

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
    if _DEFINED.match(source.lstrip()):
        source = source.lstrip()
    elif source[:1].isspace() or not _DEFINED.search(source):
        source = _with_head(source)  # also where a body goes on to another program
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


_known: OrderedDict[tuple[str, Compat, Limits], Outcome] = OrderedDict()


def values_of(
    texts: Sequence[str], compat: Compat = "default", limits: Limits | None = None
) -> list[Outcome]:
    """Return what the programs in texts give; several run at once, and equal ones once.

    Args:
        texts: Generated texts.
        compat: See `program_in`.
        limits: What a program may use.
    """
    limits = limits or Limits()
    sources = [program_in(text, compat) for text in texts]
    keys = [None if source is None else (source, compat, limits) for source in sources]
    found = {key: _known.pop(key) for key in dict.fromkeys(keys) if key in _known}
    new = [key for key in dict.fromkeys(keys) if key is not None and key not in found]
    if new:
        run = programs.shared(limits).run_all
        outcomes = run([source for source, *_ in new], compat == "reference")
        found.update(zip(new, outcomes, strict=True))
    _known.update(found)
    while len(_known) > KEPT:
        _known.popitem(last=False)
    return [Outcome(error="no program") if key is None else found[key] for key in keys]


def value_of(
    text: str, compat: Compat = "default", limits: Limits | None = None
) -> programs.Outcome:
    """Return what the program in a text gives; see `values_of`."""
    return values_of([text], compat, limits)[0]


def extract(text: str, compat: Compat = "default", limits: Limits | None = None) -> str | None:
    """Return the number that the program in a text gives, or None.

    Args:
        text: Generated text.
        compat: `reference` lets `nan` and `inf` count as extracted (they earn the partial reward).
        limits: What a program may use.

    >>> extract("Answer reasoning:\\ndef solution():\\n    return 2 + 3")
    '5.0'
    """
    number = value_of(text, compat, limits).number
    if number is None or not (compat == "reference" or math.isfinite(number)):
        return None
    return repr(number)


def extract_text(text: str, compat: Compat = "default", limits: Limits | None = None) -> str | None:
    """Return what the program in a text gives as text, or None.

    Args:
        text: Generated text.
        compat: `reference` is never None: a program that fails or gives nothing gives `none`, so
            that a wrong answer always earns the partial reward.
        limits: What a program may use.
    """
    found = value_of(text, compat, limits).text
    answer = "" if found is None or found == "None" else found.strip()
    return answer or ("none" if compat == "reference" else None)


def same_text(pred: str, gold: str) -> bool:
    """Say whether two texts are equal.

    >>> same_text("b", "b"), same_text("B", "b")
    (True, False)
    """
    return pred == gold


def _rule(
    name: str,
    read: Callable[[str, Compat, Limits | None], str | None],
    matches: Callable[[str, str], bool],
    limits: Limits | None = None,
) -> Rule:
    """Return a rule that runs programs within limits."""
    compat: Compat = "reference" if name.endswith("_reference") else "default"

    def ahead(texts: Sequence[str]) -> None:
        values_of(texts, compat, limits)

    return Rule(
        name,
        partial(read, compat=compat, limits=limits),
        matches,
        ahead,
        partial(_rule, name, read, matches),
    )


NUMBER = _rule("program", extract, matches_loosely)
"""Number that the program returns, within 0.01."""
NUMBER_REFERENCE = _rule("program_reference", extract, matches_loosely)
"""The same with the quirks of the published code."""
CHOICE = _rule("program_choice", extract_text, same_text)
"""Text that the program returns."""
CHOICE_REFERENCE = _rule("program_choice_reference", extract_text, same_text)
"""The same with the quirks of the published code."""
