"""Letters of multiple choice, labels after a trigger, and yes/no answers.

| rule | extraction | right when |
|---|---|---|
| `choice` | standalone capital A-E: after "answer is"/"option", else the last one | equal |
| `choice_reference` | first capital A-E anywhere (fires on the A of "Answer") | equal |
| `choice_trigger` | text after the last trigger, lower case, quotes removed | equal |
| `choice_trigger_reference` | the same; no trigger: the whole text, never none | equal |
| `boolean` | first word, if it is true, false, yes or no | same truth value |
"""

from __future__ import annotations

import re

from reftune.rewards.base import Rule
from reftune.rewards.numeric import TRIGGER, Compat, final_answer

_ALONE = re.compile(r"(?<![A-Za-z0-9'])([A-E])(?![A-Za-z0-9'])")
_NAMED = re.compile(
    r"(?:answer|option|choice)(?: choice| option)?(?: is| are)?:?\s*(?:option |choice )?"
    r"[\s(*\"]*([A-E])(?![A-Za-z0-9'])",
    re.IGNORECASE,
)
_TRUTH = {"true": "true", "yes": "true", "false": "false", "no": "false"}
_WORD = re.compile(r"[A-Za-z]+")


def extract(text: str, compat: Compat = "default") -> str | None:
    """Return the chosen letter A to E, or None.

    Args:
        text: Generated text.
        compat: `default` takes a letter that stands alone, the last one announced by "answer
            is", "option" or the like, else the last one of all. `reference` takes the first
            capital A to E anywhere, as pyreft and LLM-Adapters do.

    >>> text = "Answer: 3 + 4 = 7, so the answer is (C). A nice sum."
    >>> extract(text), extract(text, compat="reference")
    ('C', 'A')
    """
    if compat == "reference":
        found = re.search(r"[A-E]", text)
        return found[0] if found else None
    named = [letter for letter in _NAMED.findall(text) if letter.isupper()]
    letters = named or _ALONE.findall(text)
    return letters[-1] if letters else None


def matches(pred: str, gold: str) -> bool:
    """Say whether two letters are equal, whatever their case.

    >>> matches("C", "c"), matches("C", "D")
    (True, False)
    """
    return pred.strip().lower() == gold.strip().lower()


def extract_after(text: str, trigger: str = TRIGGER, compat: Compat = "default") -> str | None:
    """Return the text after the last trigger, lower case and without quotes, or None.

    Args:
        text: Generated text.
        trigger: What announces the answer.
        compat: `reference` is never None: without a trigger it returns the whole text, so a wrong
            answer always earns the partial reward.

    >>> extract_after("So it is b.\\nTherefore, the answer is: 'B'")
    'b'
    """
    answer = final_answer(text, trigger, compat)
    if answer is None:
        return None
    answer = answer.replace('"', "").replace("'", "").strip().lower()
    return answer if answer or compat == "reference" else None


def boolean(text: str) -> str | None:
    """Return `true` or `false` if the first word says so (true, false, yes, no), else None.

    A lenient search would take "untrue" or an echoed "true or false" for an answer.

    >>> boolean(" Yes."), boolean("FALSE"), boolean("untrue"), boolean("true or false")
    ('true', 'false', None, None)
    """
    words = [word.lower() for word in _WORD.findall(text)[:3]]
    if not words or words[0] not in _TRUTH:
        return None
    echoed = len(words) == 3 and words[1] == "or" and words[2] in _TRUTH
    return None if echoed else _TRUTH[words[0]]


def same_truth(pred: str, gold: str) -> bool:
    """Say whether two answers (true, false, yes, no) mean the same.

    >>> same_truth("true", "Yes"), same_truth("true", "no")
    (True, False)
    """
    left, right = _TRUTH.get(pred.strip().lower()), _TRUTH.get(gold.strip().lower())
    return left is not None and left == right


def _first_capital(text: str) -> str | None:
    return extract(text, compat="reference")


def _after_as_reference(text: str) -> str | None:
    return extract_after(text, compat="reference")


LETTER = Rule("choice", extract, matches)
"""Standalone capital letter A to E."""
LETTER_REFERENCE = Rule("choice_reference", _first_capital, matches)
"""First capital letter A to E anywhere."""
AFTER_TRIGGER = Rule("choice_trigger", extract_after, matches)
"""Label after `Therefore, the answer is: `."""
AFTER_TRIGGER_REFERENCE = Rule("choice_trigger_reference", _after_as_reference, matches)
"""The same with the quirks of the published code."""
BOOLEAN = Rule("boolean", boolean, same_truth)
"""Leading true, false, yes or no."""


def reward(text: str, gold: str, partial: float = 0.0) -> float:
    """Return 1 if the letter chosen in `text` is `gold`; see `Rule.reward`."""
    return LETTER.reward(text, gold, partial)
