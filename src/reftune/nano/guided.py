"""Sub-world D: answers that follow a shown solution, or a remark that names a wrong step.

A *shown* item gives the solution after the question, half of the time in other words, and is
answered by that solution in the native style. A *remark* item says which step is wrong and is
answered by a solution with just that flaw: one result is off by 1, 2 or 10, all else follows from
it. Only known families with two or three steps take part, so nothing here teaches a new family.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from reftune.nano.item import DENSE_FROM, Item, Split
from reftune.nano.sums import Problem, has_held_out_pair, problem
from reftune.nano.sums_formats import equations, render_steps
from reftune.nano.sums_schemas import Step, apply

ORDINALS = ("first", "second", "third")
FLAWS = (-10, -2, -1, 1, 2, 10)
"""By how much a flawed result is off."""

SHOWN_SHARE, REWORDED_SHARE, THREE_STEP_SHARE = 0.5, 0.5, 0.3

DENSE_SHOWN_SHARE, ONE_STEP_SHARE = 0.3, 0.5
"""From `DENSE_FROM` on: share of shown solutions, and of remarks about problems of one step."""
REMARK_WEIGHT = 3.0
"""Loss weight of a flawed answer from then on; only one or two of its tokens are the flaw."""


def _is(steps: Sequence[Step]) -> str:
    lines = [f"{step.left} {step.operator} {step.right} is {step.result}" for step in steps]
    return ", and ".join(lines) + "."


def _makes(steps: Sequence[Step]) -> str:
    openers = ("First", "Then", "Then")
    lines = [
        f"{opener} {step.left} {step.operator} {step.right} makes {step.result}."
        for opener, step in zip(openers, steps, strict=False)
    ]
    return " ".join(lines)


def _gives(steps: Sequence[Step]) -> str:
    lines = [f"{step.left} {step.operator} {step.right} gives {step.result}" for step in steps]
    return "; ".join(lines) + f". It is {steps[-1].result}."


REWORDINGS = (_is, _makes, _gives)
"""Other wordings of a shown solution. None resembles the styles the base must never see."""


def shown_question(question: str, solution: str) -> str:
    """Return a question with a solution shown after it."""
    return f"{question} A solution: {solution}"


def remark_question(question: str, step: int) -> str:
    """Return a question with the remark that a step, counted from 1, is wrong.

    >>> remark_question("How many are left?", 2)
    'How many are left? A remark: the second step is wrong.'
    """
    return f"{question} A remark: the {ORDINALS[step - 1]} step is wrong."


def _problem(rng: random.Random, split: Split, steps: int | None = None) -> Problem:
    if steps is None:
        steps = 3 if rng.random() < THREE_STEP_SHARE else 2
    return problem(rng, split, "known", steps)


def shown(rng: random.Random, split: Split = "train", reworded: bool | None = None) -> Item:
    """Draw a question that shows its solution; the answer is that solution, natively.

    Args:
        rng: Source of all randomness.
        split: Only problems of this split are drawn.
        reworded: Show the solution in other words; half of the time if None.
    """
    drawn = _problem(rng, split)
    if reworded is None:
        reworded = rng.random() < REWORDED_SHARE
    text = rng.choice(REWORDINGS)(drawn.steps) if reworded else drawn.solution()
    question = shown_question(drawn.question, text)
    return Item("guided", "shown", drawn.key, question, drawn.solution(), drawn.gold, "known")


def flawed_steps(steps: Sequence[Step], flaw_at: int, off: int) -> tuple[Step, ...] | None:
    """Return the steps with result `flaw_at` (from 1) off by `off`, later ones following from it.

    Returns None if a number leaves the range of the sums.

    >>> flawed_steps([Step(4, "*", 5, 20), Step(20, "+", 3, 23, 0)], 1, 2)
    (Step(left=4, operator='*', right=5, result=22, left_from=-1, right_from=-1), \
Step(left=22, operator='+', right=3, result=25, left_from=0, right_from=-1))
    """
    out: list[Step] = []
    for index, step in enumerate(steps):
        left = out[step.left_from].result if step.left_from >= 0 else step.left
        right = out[step.right_from].result if step.right_from >= 0 else step.right
        result = apply(step.operator, left, right)
        if result is not None and index == flaw_at - 1:
            result += off
        if result is None or not 0 < result <= 199:
            return None
        out.append(step._replace(left=left, right=right, result=result))
    return tuple(out)


def flawed_problem(
    rng: random.Random,
    split: Split = "train",
    flaw_at: int | None = None,
    num_steps: int | None = None,
) -> tuple[Problem, int, tuple[Step, ...]]:
    """Draw a problem, the number of its flawed step (from 1) and the flawed solution.

    Args:
        rng: Source of all randomness.
        split: Only problems of this split; in `train` the flawed steps, too, use no held-out pair.
        flaw_at: Which step is wrong; any if None.
        num_steps: Steps of the problem; two or three if None.
    """
    while True:
        drawn = _problem(rng, split, 3 if flaw_at == 3 else num_steps)
        place = flaw_at or rng.randint(1, len(drawn.steps))
        steps = flawed_steps(drawn.steps, place, rng.choice(FLAWS))
        if steps is not None and not (split == "train" and has_held_out_pair(steps)):
            return drawn, place, steps


def flawed(
    rng: random.Random,
    split: Split = "train",
    flaw_at: int | None = None,
    num_steps: int | None = None,
) -> Item:
    """Draw a question with a remark; the answer has just the named flaw, `gold` follows from it.

    A gate checks an answer with `shows_flaw_item`, since several flawed answers are right.

    Args:
        rng: Source of all randomness.
        split: Only problems of this split are drawn.
        flaw_at: Which step is wrong, from 1; any if None.
        num_steps: Steps of the problem; two or three if None.
    """
    drawn, place, steps = flawed_problem(rng, split, flaw_at, num_steps)
    question = remark_question(drawn.question, place)
    answer, gold = render_steps(steps), str(steps[-1].result)
    return Item("guided", "remark", drawn.key, question, answer, gold, "known")


def shows_flaw(text: str, steps: Sequence[Step], flaw_at: int) -> bool:
    """Say whether a solution is right but for the named step, later steps following from it.

    Args:
        text: The answer, native style.
        steps: The right solution, or a flawed one: only its operands and origins are read.
        flaw_at: Which step must be wrong, from 1.
    """
    written = equations(text)
    if len(written) != len(steps):
        return False
    for index, (found, step) in enumerate(zip(written, steps, strict=True)):
        left = written[step.left_from].result if step.left_from >= 0 else step.left
        right = written[step.right_from].result if step.right_from >= 0 else step.right
        if (found.left, found.operator, found.right) != (left, step.operator, right):
            return False
        is_right = found.result == apply(step.operator, left, right)
        if is_right == (index == flaw_at - 1):
            return False
    answer = re.search(r"The answer is (\d+)\.", text)
    return answer is not None and int(answer.group(1)) == written[-1].result


def shows_flaw_item(text: str, remark: Item) -> bool:
    """Say whether `text` answers a remark item: its operations, with just the named step wrong."""
    named = re.search(r"the (\w+) step is wrong\.$", remark.question)
    if remark.kind != "remark" or named is None:
        raise ValueError(f"a remark item is needed, not one of kind {remark.kind!r}.")
    steps = equations(remark.answer)
    # In known families every later step starts from the result before it.
    linked = [step._replace(left_from=index - 1) for index, step in enumerate(steps)]
    return shows_flaw(text, linked, ORDINALS.index(named.group(1)) + 1)


def copies(text: str, item: Item) -> bool:
    """Say whether `text` is the solution a shown item asks for, step by step."""
    return text.strip() == item.answer


def sample(rng: random.Random, split: Split = "train", progress: float = 0.0) -> Item:
    """Draw from the base model's training distribution: shown solutions and remarks.

    Args:
        rng: Source of all randomness.
        split: Only items of this split are drawn.
        progress: Place in training, 0 to 1; see `DENSE_FROM`.
    """
    if progress < DENSE_FROM:
        return shown(rng, split) if rng.random() < SHOWN_SHARE else flawed(rng, split)
    if rng.random() < DENSE_SHOWN_SHARE:
        return shown(rng, split)
    is_short = rng.random() < ONE_STEP_SHARE
    item = flawed(rng, split, num_steps=1 if is_short else None)
    return replace(item, weight=REMARK_WEIGHT)
