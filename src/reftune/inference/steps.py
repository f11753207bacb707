"""Steps of a worked solution: the equations in it, and what one wrong number does to the rest.

| form | an example |
|---|---|
| equation | `47 + 38 = 85`, also `$`, `,`, brackets, `x`, several operators; nano's native style |
| calculator mark | `48/2 = <<48/2=24>>24 clips` (GSM8K) is the one step `48/2=24` |
| nano's prose | `it is 85 together, 47 and then 38 more`, read by its own templates |

Left out: equations with words inside (`3 bags * 4 = 12`), with names (`x + 3 = 5`), and programs.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

_NUMBER = r"(?:\d+(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_TERM = rf"(?:[($]\s*)*(?:{_NUMBER})%?(?:\s*\))*"
_SIGN = "[-+*/x×÷·−]"
_EQUATION = re.compile(
    rf"(?<![\w.,])(?P<left>{_TERM}(?:\s*{_SIGN}\s*{_TERM})+)\s*=\s*\$?(?P<result>-?(?:{_NUMBER}))"
)
_VALUE = re.compile(rf"(?<![\w.,])(?:{_NUMBER})")
_PLAIN = str.maketrans({"x": "*", "×": "*", "·": "*", "÷": "/", "−": "-", "$": None, " ": None})
_APPLY: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}
_SENTENCE_END = re.compile(r"[.!?;]+[\"')\]}]*(?=\s)|\n")
_MARKS = re.compile(r"[^\w\s]*")
_FARTHEST = 9
"""Largest distance of a near wrong number."""


@dataclass(frozen=True)
class Number:
    """A number in a text: its value, and the characters that it takes, the end not included."""

    value: Fraction
    start: int
    end: int


@dataclass(frozen=True)
class Step:
    """One equation of a solution, right or wrong, as it stands in the text.

    Attributes:
        form: The left side with `v0`, `v1` ... for its numbers: `(v0+v1)*v2`.
        operands: Its numbers.
        result: The number on the right.
        start: First character.
        end: First character behind it.
    """

    form: str
    operands: tuple[Number, ...]
    result: Number
    start: int
    end: int

    def compute(self, values: Sequence[Fraction]) -> Fraction | None:
        """Return the left side of other numbers; None where it cannot be computed."""
        return _evaluate(self.form, tuple(values))

    @property
    def left(self) -> tuple[list[str], list[Fraction]]:
        """Signs and numbers of the left side, whatever their order."""
        return sorted(re.findall(r"[-+*/]", self.form)), sorted(n.value for n in self.operands)

    @property
    def is_true(self) -> bool:
        """Whether the left side has the value of the right one."""
        return self.compute([number.value for number in self.operands]) == self.result.value


@dataclass(frozen=True)
class WrongChain:
    """A solution with one wrong number, up to where the next step has to be written.

    Attributes:
        text: The solution; one result is wrong, and the steps before `cut` are computed from it.
        cut: Characters that are shown. What stands behind them only serves to split tokens.
        wrong: Index of the step that was made wrong.
        followed: What the next step gives if it goes on from the wrong number.
        right: What it gives in the true solution.
    """

    text: str
    cut: int
    wrong: int
    followed: Fraction
    right: Fraction


def numbers(text: str) -> list[Number]:
    """Return the unsigned numbers in a text.

    >>> [str(number.value) for number in numbers("Ben has 1,200 pears and 2.5 kg; A4 is none.")]
    ['1200', '5/2']
    """
    found = _VALUE.finditer(text)
    return [Number(_value(match[0]), match.start(), match.end()) for match in found]


def steps_of(text: str) -> list[Step]:
    """Return the equations in a text, in the order in which they stand.

    >>> [(step.form, str(step.result.value)) for step in steps_of("(2 + 3) x 4 = 20, 20/8 = 2.5")]
    [('(v0+v1)*v2', '20'), ('v0/v1', '5/2')]
    >>> steps_of("48/2 = <<48/2=24>>24 clips")[0].end
    16
    """
    found = [step for match in _EQUATION.finditer(text) if (step := _equation(match)) is not None]
    for sign, pattern in _prose().items():
        found += [_sentence(sign, match) for match in pattern.finditer(text)]
    return sorted(found, key=lambda step: step.start)


def shown_until(text: str, steps: Sequence[Step], place: int) -> int:
    """Return how many characters of a solution are shown where step `place` is to be written.

    All steps before it, the last one to the end of its sentence or line; where the next step stands
    in the same sentence, to its last mark. So the last number shown is complete.

    >>> text = "48/2 = <<48/2=24>>24 clips. Together 48+24 = 72."
    >>> text[: shown_until(text, steps_of(text), 1)]
    '48/2 = <<48/2=24>>24 clips.'
    """
    if not place:
        return 0
    end = steps[place - 1].end
    gap = text[end : steps[place].start]
    found = _SENTENCE_END.search(gap) or _MARKS.match(gap)
    return end + (found.end() if found else 0)


def wrong_chain(text: str, question: str, place: int, seed: object = 0) -> WrongChain | None:
    """Return a solution in which the number that a step goes on from is wrong, if that can be told.

    The result of the last earlier step that step `place` takes a number from is replaced by a near
    one (same number of digits, at most 9 away), and every later number that comes from it by what
    it then gives. None where step `place` takes over no result, where a number that would change
    also stands for something else (it is in the question, or given in a step), or where no near
    number leaves whole positive results.

    Args:
        text: A right solution.
        question: The question; its numbers do not come from steps.
        place: Index of the step to be written next.
        seed: Decides between nearer wrong numbers, so that they lie on both sides.

    >>> text = "47 + 38 = 85. 85 - 12 = 73. The answer is 73."
    >>> chain = wrong_chain(text, "47, 38, 12?", 1)
    >>> chain.text[: chain.cut], str(chain.followed), str(chain.right)
    ('47 + 38 = 84.', '72', '73')
    """
    steps = steps_of(text)[: place + 1]
    given = {number.value for number in numbers(question)}
    source = _source(steps, given)
    if source is None:
        return None
    taken = given | {n.value for step in steps for n in (*step.operands, step.result)}
    for wrong in _near(steps[source].result.value, random.Random(repr(seed))):
        changed = None if wrong in taken else _changes(steps, source, wrong, given)
        followed = None if changed is None else _after(steps[-1], changed)
        if changed is not None and followed is not None:
            cut = shown_until(text, steps, place)
            head = _rewritten(text[:cut], steps[source], changed)
            right = steps[-1].result.value
            return WrongChain(head + text[cut:], len(head), source, followed, right)
    return None


def _source(steps: list[Step], given: set[Fraction]) -> int | None:
    """Return the last step whose result the final one takes over, if no other number is meant."""
    operands = {number.value for number in steps[-1].operands}
    for index in reversed(range(len(steps) - 1)):
        if steps[index].result.value in operands:
            return index if _is_own(steps, index, given) else None
    return None


def _is_own(steps: list[Step], index: int, given: set[Fraction]) -> bool:
    """Say whether a step's result is a number that only this step can have brought in."""
    value = steps[index].result.value
    others = {step.result.value for i, step in enumerate(steps[:-1]) if i != index}
    before = {number.value for step in steps[: index + 1] for number in step.operands}
    return value not in given | others | before


def _near(value: Fraction, rng: random.Random) -> list[Fraction]:
    """Return whole numbers near a positive whole number, with as many digits, nearest first."""
    if value.denominator != 1 or value < 1:
        return []
    sign = rng.choice((1, -1))
    found = [value + way * far for far in range(1, _FARTHEST + 1) for way in (sign, -sign)]
    return [near for near in found if near > 0 and len(str(near)) == len(str(value))]


def _changes(
    steps: list[Step], source: int, wrong: Fraction, given: set[Fraction]
) -> dict[Fraction, Fraction] | None:
    """Return old and new value of the results shown from the wrong one on, or None."""
    changed = {steps[source].result.value: wrong}
    for index in range(source + 1, len(steps) - 1):
        step = steps[index]
        new = step.compute([changed.get(n.value, n.value) for n in step.operands])
        if new == step.result.value:
            continue
        if new is None or new <= 0 or new.denominator > 1 or not _is_own(steps, index, given):
            return None
        changed[step.result.value] = new
    return changed


def _after(step: Step, changed: dict[Fraction, Fraction]) -> Fraction | None:
    """Return what a step gives after the changes: another positive number, whole like its own."""
    old = step.result.value
    new = step.compute([changed.get(n.value, n.value) for n in step.operands])
    if new is None or new <= 0 or new == old:
        return None
    return new if new.denominator == 1 or old.denominator > 1 else None


def _rewritten(text: str, first: Step, changed: dict[Fraction, Fraction]) -> str:
    """Put the changed numbers into a text, from the result of the wrong step on."""
    places = [first.result]
    places += [n for n in numbers(text) if first.end <= n.start and n.value in changed]
    pieces, at = [], 0
    for number in places:
        pieces += [text[at : number.start], str(changed[number.value])]
        at = number.end
    return "".join([*pieces, text[at:]])


def _equation(match: re.Match[str]) -> Step | None:
    """Return the step of a matched equation; None where its brackets do not close."""
    left, start = match["left"], match.start("left")
    operands = [Number(n.value, start + n.start, start + n.end) for n in numbers(left)]
    places = iter(range(len(operands)))
    form = _VALUE.sub(lambda _: f"v{next(places)}", left)
    form = form.replace("%", "/100").translate(_PLAIN)
    form = re.sub(r"(v\d+/100)", r"(\1)", form)
    if _evaluate(form, tuple(n.value for n in operands)) is None:
        return None
    result = Number(_value(match["result"]), match.start("result"), match.end("result"))
    return Step(form, tuple(operands), result, match.start(), match.end())


def _sentence(sign: str, match: re.Match[str]) -> Step:
    left, right, result = (
        Number(_value(match[name]), match.start(name), match.end(name))
        for name in ("left", "right", "result")
    )
    return Step(f"v0{sign}v1", (left, right), result, match.start(), match.end())


@cache
def _prose() -> dict[str, re.Pattern[str]]:
    """Return how nano's prose tells each operation, learned from what it writes."""
    from reftune.nano.sums_formats import render_steps
    from reftune.nano.sums_schemas import Step as Sum

    names = {"7001": "left", "7002": "right", "7003": "result"}
    patterns = {}
    for sign in "+-*/":
        told = render_steps([Sum(7001, sign, 7002, 7003)], "prose").partition(".")[0]
        pattern = re.escape(told.partition(" ")[2])  # without its opener: "First", "Then"
        for number, name in names.items():
            pattern = pattern.replace(number, rf"(?P<{name}>\d+)")
        patterns[sign] = re.compile(rf"\b{pattern}")
    return patterns


def _value(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


@cache
def _tree(form: str) -> ast.expr | None:
    try:
        return ast.parse(form, mode="eval").body
    except (SyntaxError, ValueError):
        return None


def _evaluate(form: str, values: tuple[Fraction, ...]) -> Fraction | None:
    """Return the value of `form`, exactly; None if it is no sum, or divides by zero."""

    def value(node: ast.expr | None) -> Fraction:
        if isinstance(node, ast.Name):
            return values[int(node.id.removeprefix("v"))]
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in _APPLY:
            return _APPLY[type(node.op)](value(node.left), value(node.right))
        raise ValueError(form)

    try:
        return value(_tree(form))
    except (ValueError, ZeroDivisionError):
        return None
