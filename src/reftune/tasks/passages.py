"""Nano's passages: a few sentences about a village and one question, open or yes/no.

Kinds: 1 stated, 2 denied or changed later, 3 two sentences joined, 4 counted or compared. The base
model is good at 1 and 2, weak at 3 and was never shown 4. Yes/no questions are balanced, and are
scored by comparing ` Yes.` with ` No.` and by the leading word of greedy text. `passage: false`
asks the same questions without their passages, for a baseline.

`why: true` asks for the sentences that settle the question before the answer; counted ones carry a
tally. Then nothing is compared by probability, and the last sentence of greedy text is scored.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar, Literal

from reftune.errors import RecipeError
from reftune.nano import passages
from reftune.nano.passages_turns import WHY
from reftune.rewards import Rule
from reftune.rewards.choice import BOOLEAN
from reftune.rewards.exact import CONTAINS
from reftune.tasks import world
from reftune.tasks.base import Example, Split
from reftune.tasks.world import World

_ANSWERS = (" Yes.", " No.")


@dataclass(frozen=True)
class Options(world.Options):
    """Options of `passages`."""

    kind: int | tuple[int, ...] = (3, 4)
    """Kinds of passage, 1 to 4; several are drawn equally often."""
    form: Literal["yes_no", "open"] = "yes_no"
    """Yes/no questions, or open look-ups."""
    passage: bool = True
    """Whether the passage stands in the prompt; false is the question-only baseline."""
    why: bool = False
    """Answer with the sentences that settle the question first, as `Say why.` asks for."""


class Passages(World):
    """Passages of nano's world."""

    name = "passages"
    kind = "choice"
    max_new_tokens = 12
    Options: ClassVar[type] = Options
    sizes: ClassVar[dict[str, int]] = {"train": 2000, "validation": 300, "test": 3000}

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        given = self.options.kind
        self.kinds = (given,) if isinstance(given, int) else tuple(given)
        wrong = [kind for kind in self.kinds if kind not in passages.KINDS]
        if wrong or not self.kinds:
            raise RecipeError(
                f"Task passages: kind {wrong or 'empty'} is not among {passages.KINDS}.",
                "Set task.options.kind to one or more of them.",
            )
        self.is_check = self.options.form == "yes_no"
        self.kind = "choice" if self.is_check and not self.options.why else "generation"
        if self.options.why:
            self.max_new_tokens = 64
            if not self.options.passage:
                raise RecipeError(
                    "Task passages: why asks for sentences of the passage, and passage is false.",
                    "Set task.options.why to false as well.",
                )

    def rows_of(self, split: Split) -> list[Example]:
        """Return freshly drawn passages; the facts of the splits never meet."""

        def one(rng: random.Random) -> passages.Passage:
            kind = rng.choice(self.kinds)
            return passages.sample_passage(rng, split, 1.0, kind, self.options.form)

        salt = f"{self.kinds}|{self.options.form}"
        drawn = self.draw(split, one, lambda found: (found.passage, found.question), salt)
        return [self._example(split, i, found) for i, found in enumerate(drawn)]

    def _example(self, split: Split, index: int, drawn: passages.Passage) -> Example:
        question = f"{drawn.passage} {drawn.question}" if self.options.passage else drawn.question
        target = drawn.answer
        if self.options.why:
            question, target = question + WHY, f"{drawn.reason} {target}"
        meta = {"kind": drawn.kind, "question": drawn.question, "keep": drawn.question}
        if not self.is_check:
            return self.row(split, index, question, target, drawn.gold, meta=meta)
        label = 0 if drawn.gold == "yes" else 1
        # With the space in chat form too: nano's chat template writes one before an answer.
        return self.row(
            split,
            index,
            question,
            target,
            drawn.gold,
            choices=_ANSWERS,
            label=label,
            meta=meta,
        )

    def extract(self, text: str, example: Example) -> str | None:
        """Return the answer in a text: true or false, or the text itself for open questions."""
        return self._rule.extract(self._answer(text))

    def score(self, text: str, example: Example) -> dict[str, float]:
        """Return the accuracy of one generated text."""
        return {"accuracy": self._rule.reward(self._answer(text), example.answer)}

    def _answer(self, text: str) -> str:
        """Return the text, or its last sentence where reasons come first."""
        if not self.options.why:
            return text
        return text.strip().removesuffix(".").rpartition(". ")[2]

    @property
    def _rule(self) -> Rule:
        return BOOLEAN if self.is_check else CONTAINS
