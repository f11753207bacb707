"""Sub-world A: sums, as number drills and as word problems of one to three steps.

Twenty operation sequences told in five settings make a hundred families (`sums_schemas`), each with
six surface forms (`sums_stories`) and several answer formats (`sums_formats`). Operands are 2-99,
sums at most 199, products from 2-12 x 2-12, quotients exact, nothing negative. A problem's key is
(family, operands); 10 % of the `+` and `-` pairs occur in no training text, neither in a drill nor
in an intermediate step.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

from reftune.nano.item import Item, Split, is_held_out_pair
from reftune.nano.item import split as split_of
from reftune.nano.names import ACTORS
from reftune.nano.sums_formats import Style, render_steps
from reftune.nano.sums_schemas import (
    FAMILIES,
    MAX_FACTOR,
    MAX_OPERAND,
    MAX_SUM,
    SCHEMAS,
    Family,
    Group,
    Operator,
    Schema,
    Step,
    apply,
    families,
    solve,
)
from reftune.nano.sums_stories import NUM_TEMPLATES, STORIES, tell

__all__ = ["FAMILIES", "Family", "Problem", "drill", "families", "item", "problem", "sample"]

Pairs = Literal["any", "seen", "unseen"]

CURRICULUM: tuple[tuple[float, tuple[float, float, float, float]], ...] = (
    (0.20, (0.50, 0.45, 0.05, 0.00)),
    (0.60, (0.25, 0.40, 0.35, 0.00)),
    (math.inf, (0.10, 0.25, 0.45, 0.20)),
)
"""Up to which progress, and the shares of drills, one, two and three steps among the items."""

HALF_FROM = 0.20
"""Progress from which half families are mixed in."""

HALF_SHARE = 0.066
"""Share of half families among the items from then on.

Their items are long (1.5 times the mean) and sub-world A has 45 % of all tokens, so each of the
twelve gets about 0.3 % of all tokens of a whole training run.
"""

_TRIES = 100_000
_held_out = lru_cache(maxsize=None)(is_held_out_pair)


@dataclass(frozen=True)
class Problem:
    """A word problem with its worked solution.

    Attributes:
        family: Name of the family, `add_sub/market`.
        schema: Operation sequence.
        story: Setting.
        operands: All numbers of the text, distractors included.
        steps: Equations of the solution, in the order chosen for this problem.
        question: The text.
        gold: The answer.
        group: known, half, new or far.
        template: Surface form, 0-5.
    """

    family: str
    schema: str
    story: str
    operands: tuple[int, ...]
    steps: tuple[Step, ...]
    question: str
    gold: str
    group: Group
    template: int

    @property
    def key(self) -> tuple[str, ...]:
        """What `split` hashes. Neither the wording nor the order of the steps is part of it."""
        return _key(self.family, self.operands)

    def solution(self, style: Style = "native") -> str:
        """Return the worked solution in a style; the base model sees `native` only."""
        return render_steps(self.steps, style)


def _key(family: str, operands: tuple[int, ...]) -> tuple[str, ...]:
    return (family, *map(str, operands))


def has_held_out_pair(steps: tuple[Step, ...]) -> bool:
    """Say whether any step, intermediate ones included, uses a held-out pair."""
    return any(_held_out(step.operator, step.left, step.right) for step in steps)


def _has_pairs(family: Family) -> bool:
    """Say whether the family adds or subtracts at all: tables have no held-out pairs."""
    return any(operator in "+-" for operator in SCHEMAS[family.schema].operators)


@cache
def _pool(group: Group, steps: int | None, pairs: Pairs) -> tuple[Family, ...]:
    pool = families(group, steps)
    if pairs == "unseen":
        pool = tuple(family for family in pool if _has_pairs(family))
    if not pool:
        raise ValueError(f"no {group} family has {steps} steps and {pairs} pairs.")
    return pool


def _orders(schema: Schema, operands: tuple[int, ...]) -> list[tuple[Step, ...]] | None:
    """Return the solution in every order, or None if one of them leaves the number range."""
    orders = []
    for formula in schema.orders:
        steps = solve(formula, operands)
        if steps is None:
            return None
        orders.append(steps)
    return orders


def problem(
    rng: random.Random,
    split: Split = "train",
    group: Group = "known",
    steps: int | None = None,
    family: str | None = None,
    pairs: Pairs = "any",
) -> Problem:
    """Draw a word problem.

    Args:
        rng: Source of all randomness.
        split: Only keys of this split are drawn. `train` also refuses every held-out pair.
        group: Group of families to draw from; a named `family` overrides it.
        steps: Only families with this number of steps.
        family: Name of the one family to draw from.
        pairs: For validation and test: `unseen` needs a held-out pair in some step, `seen` allows
            none, `any` does not look.

    Raises:
        ValueError: If the family is unknown or cannot have the pairs asked for.
    """
    if split == "train" and pairs == "unseen":
        raise ValueError("pairs='unseen' contradicts split='train', which holds those pairs out.")
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family {family!r} is unknown, see sums.FAMILIES.")
    if family is not None:
        chosen = FAMILIES[family]
        if pairs == "unseen" and not _has_pairs(chosen):
            raise ValueError(f"family {family!r} neither adds nor subtracts: no pair is held out.")
    else:
        chosen = rng.choice(_pool(group, steps, pairs))
    schema = SCHEMAS[chosen.schema]
    for _ in range(_TRIES):
        operands = schema.draw(rng)
        orders = _orders(schema, operands)
        if orders is None:
            continue
        solved = rng.choice(orders) if chosen.group == "half" else orders[0]
        held_out = has_held_out_pair(solved)
        if held_out and (split == "train" or pairs == "seen"):
            continue
        if pairs == "unseen" and not held_out:
            continue
        if split_of(*_key(chosen.name, operands)) == split:
            return _worded(rng, chosen, schema, operands, solved)
    raise ValueError(f"no {split} problem of {chosen.name} with {pairs} pairs was found.")


def _worded(
    rng: random.Random,
    family: Family,
    schema: Schema,
    operands: tuple[int, ...],
    steps: tuple[Step, ...],
) -> Problem:
    story = STORIES[family.story]
    template = rng.randrange(NUM_TEMPLATES)
    first, second = rng.sample(ACTORS, 2)
    order = schema.shuffles[template] if schema.shuffles else range(len(schema.events))
    events = tuple(
        (event, tuple(operands["abcde".index(name)] for name in names))
        for event, names in (schema.events[place] for place in order)
    )
    question = tell(
        story,
        events,
        schema.question,
        template,
        {"A": first, "B": second, "x": rng.choice(story.things)},
    )
    return Problem(
        family.name,
        family.schema,
        family.story,
        operands,
        steps,
        question,
        str(steps[-1].result),
        family.group,
        template,
    )


def item(drawn: Problem, style: Style = "native") -> Item:
    """Return a problem as an item, answered in `style`."""
    return Item(
        world="sums",
        kind=drawn.family,
        key=drawn.key,
        question=drawn.question,
        answer=drawn.solution(style),
        gold=drawn.gold,
        group=drawn.group,
    )


def _draw_pair(rng: random.Random) -> tuple[Operator, int, int]:
    """Draw what a drill asks; three of ten sums start from a number that only results reach."""
    place = rng.random()
    if place < 0.30:
        left, right = (2 + int(rng.random() * (MAX_FACTOR - 1)) for _ in range(2))
        return ("*", left, right) if place < 0.15 else ("/", left * right, right)
    top = MAX_SUM if rng.random() < 0.3 else MAX_OPERAND
    left = 2 + int(rng.random() * (top - 1))
    right = 2 + int(rng.random() * (MAX_OPERAND - 1))
    return ("+" if place < 0.65 else "-"), left, right


def drill(
    rng: random.Random,
    split: Split = "train",
    pairs: Pairs = "any",
    form: Literal["statement", "question"] | None = None,
) -> Item:
    """Draw a number drill, `47 + 38 = 85.` or `What is 47 + 38?` with that equation as answer.

    Args:
        rng: Source of all randomness.
        split: As in `problem`; a statement and its question have different keys.
        pairs: As in `problem`.
        form: Half and half if None. A statement has an empty question; `gold` is its result.
    """
    if split == "train" and pairs == "unseen":
        raise ValueError("pairs='unseen' contradicts split='train', which holds those pairs out.")
    form = form or ("statement" if rng.random() < 0.5 else "question")
    for _ in range(_TRIES):
        operator, left, right = _draw_pair(rng)
        result = apply(operator, left, right)
        if result is None:
            continue
        held_out = _held_out(operator, left, right)
        if held_out and (split == "train" or pairs == "seen"):
            continue
        if pairs == "unseen" and not held_out:
            continue
        ordered = sorted((left, right)) if operator == "+" else (left, right)
        key = ("drill", form, operator, *map(str, ordered))
        if split_of(*key) == split:
            return _drill(key, form, operator, left, right, result)
    raise ValueError(f"no {split} drill with {pairs} pairs was found.")


def _drill(
    key: tuple[str, ...], form: str, operator: Operator, left: int, right: int, result: int
) -> Item:
    equation = f"{left} {operator} {right} = {result}."
    if form == "statement":
        return Item("sums", "drill", key, "", equation, str(result), "known")
    question = f"What is {left} {operator} {right}?"
    answer = f"{equation} The answer is {result}."
    return Item("sums", "drill", key, question, answer, str(result), "known")


def sample(rng: random.Random, split: Split = "train", progress: float = 1.0) -> Item:
    """Draw from the base model's training distribution: drills, known and half families.

    Args:
        rng: Source of all randomness.
        split: Only items of this split are drawn.
        progress: Share of the planned training done; it selects the row of `CURRICULUM`.
    """
    if progress >= HALF_FROM and rng.random() < HALF_SHARE:
        return item(problem(rng, split, "half"))
    shares = next(shares for until, shares in CURRICULUM if progress < until)
    place, steps = rng.random(), 0
    while steps < 3 and place >= shares[steps]:
        place -= shares[steps]
        steps += 1
    return drill(rng, split) if steps == 0 else item(problem(rng, split, "known", steps))
