"""Rewards: verifiable checks of an answer, one definition for evaluation and training.

A rule of your own is one line: `register("mine", "my_package.checks:RULE")`, or an entry point in
the group `reftune.rewards` whose value is a `Rule`.
"""

from __future__ import annotations

from reftune.registry import Registry
from reftune.rewards.base import Rule

__all__ = ["REGISTRY", "Rule", "get", "names", "register"]

_TARGETS = {
    "exact": "reftune.rewards.exact:EXACT",
    "commonsense": "reftune.rewards.exact:COMMONSENSE",
    "contains": "reftune.rewards.exact:CONTAINS",
    "numeric": "reftune.rewards.numeric:LAST_NUMBER",
    "numeric_trigger": "reftune.rewards.numeric:WHOLE_NUMBER",
    "numeric_trigger_reference": "reftune.rewards.numeric:WHOLE_NUMBER_REFERENCE",
    "choice": "reftune.rewards.choice:LETTER",
    "choice_reference": "reftune.rewards.choice:LETTER_REFERENCE",
    "choice_trigger": "reftune.rewards.choice:AFTER_TRIGGER",
    "choice_trigger_reference": "reftune.rewards.choice:AFTER_TRIGGER_REFERENCE",
    "program": "reftune.rewards.program:NUMBER",
    "program_reference": "reftune.rewards.program:NUMBER_REFERENCE",
    "program_choice": "reftune.rewards.program:CHOICE",
    "program_choice_reference": "reftune.rewards.program:CHOICE_REFERENCE",
    "boolean": "reftune.rewards.choice:BOOLEAN",
}

REGISTRY: Registry[Rule] = Registry("reward", _TARGETS)
"""Name to `module:attribute` of a `Rule`."""

names, register = REGISTRY.names, REGISTRY.register


def get(name: str) -> Rule:
    """Return the rule called `name`.

    Raises:
        RecipeError: If there is no such rule.

    >>> get("exact").reward(" yes ", "yes")
    1.0
    """
    return REGISTRY.get(name)
