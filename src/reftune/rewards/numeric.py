"""Numbers: the last one in a text (loreft.md, LLM-Adapters rule) or all of what follows a trigger.

| rule | extraction | right when |
|---|---|---|
| `numeric` | last number in the text, commas removed | difference at most 1e-3 |
| `numeric_trigger` | text after the last trigger, the whole of which must be a number | 1e-2 |
| `numeric_trigger_reference` | the same; no trigger: the whole text; `nan` counts | 1e-2 |

Both trigger rules see only what follows the last `Answer reasoning:`, if the text has one.

Left out: units, fractions, percent signs, words (`twelve`), powers (`1e5` reads as 5).
"""

from __future__ import annotations

import math
import re
from typing import Literal

from reftune.rewards.base import Rule, after

Compat = Literal["default", "reference"]

TOLERANCE = 1e-3
"""Largest difference of two equal numbers (LLM-Adapters, pyreft)."""
TRIGGER_TOLERANCE = 1e-2
"""Largest difference of two equal numbers in reinforced fine-tuning."""
TRIGGER = "Therefore, the answer is: "
"""What stands before the answer in natural-language reasoning of reinforced fine-tuning."""
MARKER = "Answer reasoning:"
"""What stands before that reasoning. A model that goes on to another question writes it again."""

_NUMBER = re.compile(r"-?[0-9]+\.?[0-9]*")


def to_float(text: str) -> float | None:
    """Return `text` as a finite number, commas removed, or None.

    >>> to_float(" 1,080 "), to_float("12 dollars")
    (1080.0, None)
    """
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def extract(text: str) -> str | None:
    """Return the last number in `text`, commas removed, or None.

    >>> extract("He pays $1,200 for 3, so 400."), extract("Nothing.")
    ('400', None)
    """
    found = _NUMBER.findall(text.replace(",", ""))
    return found[-1].rstrip(".") if found else None


def matches(pred: str, gold: str, tolerance: float = TOLERANCE) -> bool:
    """Say whether two numbers differ by at most `tolerance`; what is no number is unequal.

    >>> matches("18.0", "18"), matches("18.01", "18"), matches("eighteen", "18")
    (True, False, False)
    """
    left, right = to_float(pred), to_float(gold)
    return left is not None and right is not None and abs(left - right) <= tolerance


def final_answer(text: str, trigger: str = TRIGGER, compat: Compat = "default") -> str | None:
    """Return what follows the last trigger in the reasoning after the last `Answer reasoning:`.

    Args:
        text: Generated text, with or without its prompt.
        trigger: What announces the answer.
        compat: Without a trigger `default` returns None, `reference` the whole reasoning.

    >>> final_answer("Answer reasoning: 2 + 3 = 5.\\nTherefore, the answer is: five")
    'five'
    """
    reasoning = text.rpartition(MARKER)[2]
    answer = after(reasoning, trigger)
    return reasoning.strip() if answer is None and compat == "reference" else answer


def extract_after(text: str, trigger: str = TRIGGER, compat: Compat = "default") -> str | None:
    """Return what follows the last trigger if the whole of it is a number, else None.

    `1,000`, `$18` and `18 dollars` are refused: commas are removed from the gold answer only.

    Args:
        text: Generated text.
        trigger: What announces the answer.
        compat: `reference` reads the whole text when the trigger is missing, and lets `nan` and
            `inf` count as extracted (they earn the partial reward).

    >>> extract_after("3 * 6 = 18.\\nTherefore, the answer is: 18.0")
    '18.0'
    >>> extract_after("Therefore, the answer is: 1,000") is None
    True
    """
    answer = final_answer(text, trigger, compat)
    if answer is None:
        return None
    try:
        value = float(answer)
    except ValueError:
        return None
    return answer if compat == "reference" or math.isfinite(value) else None


def matches_loosely(pred: str, gold: str) -> bool:
    """Say whether two numbers differ by at most 0.01."""
    return matches(pred, gold, TRIGGER_TOLERANCE)


def _extract_as_reference(text: str) -> str | None:
    return extract_after(text, compat="reference")


LAST_NUMBER = Rule("numeric", extract, matches)
"""Last number in the text, within 1e-3."""
WHOLE_NUMBER = Rule("numeric_trigger", extract_after, matches_loosely)
"""Number after `Therefore, the answer is: `, within 0.01."""
WHOLE_NUMBER_REFERENCE = Rule("numeric_trigger_reference", _extract_as_reference, matches_loosely)
"""The same with the quirks of the published code."""


def reward(text: str, gold: str, partial: float = 0.0) -> float:
    """Return 1 if the last number in `text` is `gold`; see `Rule.reward`."""
    return LAST_NUMBER.reward(text, gold, partial)
