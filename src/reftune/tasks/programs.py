"""What tasks share whose answers are programs: the limits that these run within."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reftune.rewards import Rule
from reftune.rewards.programs import Limits


@dataclass(frozen=True)
class ProgramOptions:
    """Options of tasks whose answers may be programs.

    Raises:
        RecipeError: If they let no program run.
    """

    program_seconds: float = 10.0
    """Seconds that a program in an answer may run."""
    program_memory: int = 512
    """MiB of memory that it may take."""

    def __post_init__(self) -> None:
        Limits(self.program_seconds, self.program_memory * 2**20)

    def limited(self, rule: Rule) -> Rule:
        """Return a rule within these limits; one that runs nothing as it is."""
        limits = Limits(self.program_seconds, self.program_memory * 2**20)
        return rule if rule.within is None else rule.within(limits)


def look_ahead(rules: Sequence[Rule], texts: Sequence[str]) -> None:
    """Tell each rule of the texts it will be asked of.

    Args:
        rules: The rule of each text.
        texts: Generated texts.
    """
    for rule in {id(rule): rule for rule in rules}.values():
        if rule.ahead is not None:
            rule.ahead([text for own, text in zip(rules, texts, strict=True) if own is rule])
