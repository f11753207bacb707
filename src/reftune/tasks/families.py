"""Nano's word problems: 100 families in the groups known, half, new and far.

Two figures: `accuracy` is the last number in whatever format it stands; `format_accuracy` wants
the answer in the style that was asked for. A base model that knows the sums but not the style has
the first without the second. A program has no last number to speak of: it is run, and what it
returns counts; in the style asked for it has nothing but `a = 4 + 7` and the like.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from reftune.config.recipe import TaskSpec
from reftune.errors import RecipeError, nearest
from reftune.nano import sums
from reftune.nano.sums_formats import strict_answer
from reftune.rewards import numeric, program
from reftune.tasks import programs, world
from reftune.tasks.base import Example, Split
from reftune.tasks.world import World

Style = Literal["native", "hash", "boxed", "json", "program", "prose", "prose_hash"]
Group = Literal["known", "half", "new", "far"]


@dataclass(frozen=True)
class Options(world.Options, programs.ProgramOptions):
    """Options of `families`."""

    style: Style = "prose_hash"
    """How solutions are written. The base model was shown `native` only."""
    group: Group = "new"
    """Families to draw from. `far` is never trained on."""
    eval_group: Group | None = None
    """Families of validation and test rows; default is `group`."""
    pairs: Literal["any", "seen", "unseen"] = "any"
    """Validation and test rows: `unseen` wants a pair of numbers that no training text holds."""
    steps: int | None = None
    """Only problems with this number of steps."""
    family: str | None = None
    """Only this family, such as `add_sub/market`."""


class Families(World):
    """Word problems of nano's world."""

    name = "families"
    max_new_tokens = 96
    Options: ClassVar[type] = Options

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        runs = self.options.style == "program"
        self.rule = self.options.limited(program.NUMBER) if runs else numeric.LAST_NUMBER

    def rows_of(self, split: Split) -> list[Example]:
        """Return freshly drawn problems; the operands of the splits never meet."""
        options = self.options
        is_train = split == "train"
        group = options.group if is_train else options.eval_group or options.group
        if is_train and group == "far":
            raise RecipeError(
                "The far families measure transfer and are never trained on.",
                "Set task.options.eval_group: far and train on another group.",
            )
        if options.family is not None and options.family not in sums.FAMILIES:
            raise RecipeError(
                f'No family "{options.family}".', nearest(options.family, sums.FAMILIES)
            )
        pairs = "any" if is_train else options.pairs

        def one(rng: random.Random) -> sums.Problem:
            return sums.problem(rng, split, group, options.steps, options.family, pairs)

        try:
            problems = self.draw(split, one, lambda drawn: drawn.question, f"{group}|{pairs}")
        except ValueError as error:
            raise RecipeError(f"Task families: {error}", "Change task.options.") from error
        return [self._example(split, i, drawn) for i, drawn in enumerate(problems)]

    def _example(self, split: Split, index: int, drawn: sums.Problem) -> Example:
        meta = {"family": drawn.family, "group": drawn.group, "steps": len(drawn.steps)}
        solution = drawn.solution(self.options.style)
        return self.row(split, index, drawn.question, solution, drawn.gold, meta=meta)

    def extract(self, text: str, example: Example) -> str | None:
        """Return the last number in a text, or what a program returns."""
        return self.rule.extract(text)

    def look_ahead(self, texts: Sequence[str], examples: Sequence[Example]) -> None:
        """Run programs of several answers at once."""
        if self.rule.ahead is not None:
            self.rule.ahead(texts)

    def score(self, text: str, example: Example) -> dict[str, float]:
        """Return accuracy in any format, and in the format asked for."""
        strict = strict_answer(text, self.options.style)
        answer = self.extract(text, example)
        return {
            "accuracy": float(answer is not None and numeric.matches(answer, example.answer)),
            "format_accuracy": float(strict == example.answer),
        }
