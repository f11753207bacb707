"""What a reward is: an extraction, a comparison, and the number they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """One way to check an answer, used by evaluation and by reinforced training alike.

    Attributes:
        name: Registry key.
        extract: Takes the generated text, gives the answer in it, or None.
        matches: Compares an extracted answer with the gold answer.
        ahead: Takes texts that `extract` will be asked of next. None: there is nothing to gain from
            doing several at once.
        within: Returns the same rule within other limits of what it runs (`programs.Limits`). None:
            it runs nothing.
    """

    name: str
    extract: Callable[[str], str | None]
    matches: Callable[[str, str], bool]
    ahead: Callable[[Sequence[str]], None] | None = None
    within: Callable[[Any], Rule] | None = None

    def reward(self, text: str, gold: str, partial: float = 0.0) -> float:
        """Return 1 for a right answer, `partial` for a wrong one, 0 for none at all.

        Args:
            text: Generated text.
            gold: Gold answer.
            partial: Reward of an answer that was extracted but is wrong (Luong et al. 2024: 0.1).

        >>> from reftune.rewards.numeric import LAST_NUMBER
        >>> [LAST_NUMBER.reward(t, "7", partial=0.1) for t in ("It is 7.", "It is 8.", "Well.")]
        [1.0, 0.1, 0.0]
        """
        answer = self.extract(text)
        if answer is None:
            return 0.0
        return 1.0 if self.matches(answer, gold) else partial


def after(text: str, trigger: str, first: bool = False) -> str | None:
    """Return the stripped text after the last `trigger`, or None if it does not occur.

    Args:
        text: Generated text.
        trigger: What announces the answer.
        first: Take all that follows the first trigger instead.

    >>> after("The answer is: 7. The answer is: 8 ", "The answer is: ")
    '8'
    >>> after("The answer is: 7. The answer is: 8 ", "The answer is: ", first=True)
    '7. The answer is: 8'
    """
    _, found, rest = text.partition(trigger) if first else text.rpartition(trigger)
    return rest.strip() if found else None
