"""Texts: equal after stripping, equal after a trigger, or contained.

| rule | extraction | right when |
|---|---|---|
| `exact` | the stripped text | equal |
| `commonsense` | text after the first `the correct answer is ` | equal |
| `contains` | the text | the gold words occur in it, whatever case and punctuation |
"""

from __future__ import annotations

import re
import unicodedata

from reftune.rewards.base import Rule, after

TRIGGER = "the correct answer is "
"""What announces the answer in the commonsense sets of LLM-Adapters."""

_GAP = re.compile(r"[\W_]+")


def normalise(text: str) -> str:
    """Return `text` in lower case with every run of other signs than letters and digits as a space.

    >>> normalise("  The Answer -- is: 7! ")
    'the answer is 7'
    """
    return _GAP.sub(" ", unicodedata.normalize("NFKC", text).lower()).strip()


def extract(text: str, trigger: str = "") -> str | None:
    """Return the stripped text, or what follows the first `trigger`; None if nothing is there.

    >>> extract("the correct answer is true", "the correct answer is "), extract("  ")
    ('true', None)
    """
    answer = after(text, trigger, first=True) if trigger else text.strip()
    return answer or None


def matches(pred: str, gold: str) -> bool:
    """Say whether two texts are equal after stripping.

    >>> matches(" true ", "true"), matches("True", "true")
    (True, False)
    """
    return pred.strip() == gold.strip()


def contains(pred: str, gold: str) -> bool:
    """Say whether the words of `gold` occur in `pred` one after the other.

    >>> contains("He lives in New York.", "new york"), contains("untrue", "true")
    (True, False)
    """
    wanted = normalise(gold)
    return bool(wanted) and f" {wanted} " in f" {normalise(pred)} "


def _after_trigger(text: str) -> str | None:
    return extract(text, TRIGGER)


EXACT = Rule("exact", extract, matches)
"""Equal after stripping."""
COMMONSENSE = Rule("commonsense", _after_trigger, matches)
"""All after the first `the correct answer is ` equal, as published; a missing trigger is wrong."""
CONTAINS = Rule("contains", extract, contains)
"""The gold words occur in the text."""


def reward(text: str, gold: str, partial: float = 0.0) -> float:
    """Return 1 if `text` equals `gold` after stripping; see `Rule.reward`."""
    return EXACT.reward(text, gold, partial)
