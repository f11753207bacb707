"""The twenty operation sequences of the sums, and which hundred families they make.

A family is a schema told in a setting, `add_sub/market`. Its group says what the base model sees:
*known* families fully, *half* families rarely and with their steps in any valid order, *new* and
*far* families never. New ones recombine known parts: a known schema in another known setting (4),
a known schema in an unseen setting (2), or two schemas made of known operations (10). Far ones are
two schemas that no recipe may train on.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Group = Literal["known", "half", "new", "far"]
Operator = Literal["+", "-", "*", "/"]

MAX_OPERAND, MAX_SUM, MAX_FACTOR = 99, 199, 12


class Step(NamedTuple):
    """One equation; `left_from` and `right_from` name the earlier step used, -1 for an operand."""

    left: int
    operator: Operator
    right: int
    result: int
    left_from: int = -1
    right_from: int = -1

    def __str__(self) -> str:
        """Return `47 + 38 = 85`."""
        return f"{self.left} {self.operator} {self.right} = {self.result}"


def apply(operator: Operator, left: int, right: int) -> int | None:
    """Return `left operator right`, or None outside the number range of the sums.

    >>> apply("-", 47, 38), apply("-", 38, 47), apply("/", 56, 7)
    (9, None, 8)
    """
    if operator == "+":
        return left + right if left + right <= MAX_SUM else None
    if operator == "-":
        return left - right if left > right else None
    small = 2 <= right <= MAX_FACTOR
    if operator == "*":
        return left * right if small and 2 <= left <= MAX_FACTOR else None
    quotient = left // right
    return quotient if small and 2 <= quotient <= MAX_FACTOR and quotient * right == left else None


Formula = tuple[tuple[str, Operator, str], ...]
"""Steps over operands `a b c d e` and earlier results `0 1`."""


@dataclass(frozen=True)
class Schema:
    """An operation sequence and how it is told.

    Attributes:
        name: First half of a family's name.
        draw: Draws candidate operands; those for which an order is impossible are drawn again.
        orders: Valid orders of the steps. The first is canonical.
        events: Event and the operands it states, in the order of the telling.
        question: Key of `sums_stories.QUESTIONS`.
        shuffles: Other tellings, one a template, as permutations of `events`.
    """

    name: str
    draw: Callable[[random.Random], tuple[int, ...]]
    orders: tuple[Formula, ...]
    events: tuple[tuple[str, str], ...]
    question: str
    shuffles: tuple[tuple[int, ...], ...] = ()

    @property
    def steps(self) -> int:
        """Number of equations in a solution."""
        return len(self.orders[0])

    @property
    def operators(self) -> str:
        """Operators of the canonical solution."""
        return "".join(operator for _, operator, _ in self.orders[0])


@dataclass(frozen=True)
class Family:
    """A schema told in one setting."""

    name: str
    schema: str
    story: str
    group: Group
    steps: int


def solve(formula: Formula, operands: tuple[int, ...]) -> tuple[Step, ...] | None:
    """Return the steps of `formula`, or None if one leaves the number range."""
    steps: list[Step] = []
    for left, operator, right in formula:
        values, origins = [], []
        for term in (left, right):
            origin = int(term) if term.isdigit() else -1
            origins.append(origin)
            values.append(steps[origin].result if origin >= 0 else operands["abcde".index(term)])
        result = apply(operator, values[0], values[1])
        if result is None:
            return None
        steps.append(Step(values[0], operator, values[1], result, origins[0], origins[1]))
    return tuple(steps)


def _draw(kinds: str) -> Callable[[random.Random], tuple[int, ...]]:
    """Return a drawer of operands: `w` is 2-99, `s` a factor 2-12."""
    widths = tuple(MAX_OPERAND - 1 if kind == "w" else MAX_FACTOR - 1 for kind in kinds)

    def draw(rng: random.Random) -> tuple[int, ...]:
        return tuple([2 + int(rng.random() * width) for width in widths])

    return draw


def _draw_div(rng: random.Random) -> tuple[int, ...]:
    divisor, quotient = _draw("ss")(rng)
    return divisor * quotient, divisor


def _draw_div_add(rng: random.Random) -> tuple[int, ...]:
    divisor, quotient, more = _draw("ssw")(rng)
    return divisor * quotient, divisor, more


def _draw_sub_div(rng: random.Random) -> tuple[int, ...]:
    divisor, quotient, less = _draw("ssw")(rng)
    start = divisor * quotient + less
    # A start out of range would make a step impossible; 0 sends the draw back.
    return (start if start <= MAX_OPERAND else 0), less, divisor


def _draw_descending(rng: random.Random) -> tuple[int, ...]:
    first, second = _draw("ww")(rng)
    return (first, second) if first >= second else (second, first)


_LATE = (
    (0, 1, 2, 3, 4),
    (0, 2, 4, 1, 3),
    (2, 1, 4, 3, 5),
    (0, 4, 2, 3, 1),
    (1, 4, 2, 3, 5),
    (4, 2, 1, 3, 5),
)
"""Tellings of `add_sub_sub`: event 5 states the start last."""

_GAIN, _LOSS = ("gain", "b"), ("loss", "b")
_NOW = "now"

SCHEMAS: dict[str, Schema] = {
    schema.name: schema
    for schema in (
        Schema("add", _draw("ww"), ((("a", "+", "b"),),), (("start", "a"), _GAIN), _NOW),
        Schema("sub", _draw_descending, ((("a", "-", "b"),),), (("start", "a"), _LOSS), _NOW),
        Schema("mul", _draw("ss"), ((("a", "*", "b"),),), (("groups", "ab"),), "all"),
        Schema("div", _draw_div, ((("a", "/", "b"),),), (("share", "ab"),), "each"),
        Schema(
            "before", lambda rng: _draw_descending(rng)[::-1], ((("b", "-", "a"),),),
            (("some", "a"), ("gain", "a"), ("then_now", "b")), "first",
        ),
        Schema(
            "extra_sub", lambda rng: _draw_descending(rng) + _draw("w")(rng),
            ((("a", "-", "b"),),), (("start", "a"), ("extra", "c"), _LOSS), _NOW,
        ),
        Schema(
            "add_add", _draw("www"),
            ((("a", "+", "b"), ("0", "+", "c")), (("b", "+", "c"), ("a", "+", "0"))),
            (("start", "a"), _GAIN, ("gain2", "c")), _NOW,
        ),
        Schema(
            "add_sub", _draw("www"), ((("a", "+", "b"), ("0", "-", "c")),),
            (("start", "a"), _GAIN, ("loss", "c")), _NOW,
        ),
        Schema(
            "sub_sub", _draw("www"),
            ((("a", "-", "b"), ("0", "-", "c")), (("b", "+", "c"), ("a", "-", "0"))),
            (("start", "a"), _LOSS, ("loss2", "c")), _NOW,
        ),
        Schema(
            "mul_add", _draw("ssw"), ((("a", "*", "b"), ("0", "+", "c")),),
            (("groups", "ab"), ("gain", "c")), _NOW,
        ),
        Schema(
            "mul_sub", _draw("ssw"), ((("a", "*", "b"), ("0", "-", "c")),),
            (("groups", "ab"), ("loss", "c")), _NOW,
        ),
        Schema(
            "div_add", _draw_div_add, ((("a", "/", "b"), ("0", "+", "c")),),
            (("share", "ab"), ("one_more", "c")), "that",
        ),
        Schema(
            "add_sub_add", _draw("wwww"),
            ((("a", "+", "b"), ("0", "-", "c"), ("1", "+", "d")),),
            (("start", "a"), _GAIN, ("loss", "c"), ("gain2", "d")), _NOW,
        ),
        Schema(
            "mul_add_sub", _draw("ssww"),
            ((("a", "*", "b"), ("0", "+", "c"), ("1", "-", "d")),),
            (("groups", "ab"), ("gain", "c"), ("loss", "d")), _NOW,
        ),
        # Half: shown rarely, with the steps in any of several orders.
        Schema(
            "two_prod", _draw("ssssw"),
            (
                (("a", "*", "b"), ("c", "*", "d"), ("0", "+", "1")),
                (("c", "*", "d"), ("a", "*", "b"), ("1", "+", "0")),
                (("c", "*", "d"), ("a", "*", "b"), ("0", "+", "1")),
            ),
            (("groups", "ab"), ("extra", "e"), ("groups2", "cd")), "all",
            ((0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 0, 2), (2, 0, 1), (1, 2, 0)),
        ),
        Schema(
            "add_sub_sub", _draw("wwwww"),
            (
                (("a", "+", "b"), ("0", "-", "c"), ("1", "-", "d")),
                (("a", "-", "c"), ("0", "+", "b"), ("1", "-", "d")),
                (("c", "+", "d"), ("a", "+", "b"), ("1", "-", "0")),
            ),
            (
                ("start", "a"), _GAIN, ("loss", "c"), ("loss2", "d"), ("extra", "e"),
                ("late_start", "a"),
            ), _NOW, _LATE,
        ),
        # New: made of known operations, never shown.
        Schema(
            "compare", _draw("www"), ((("a", "+", "b"), ("0", "-", "c")),),
            (("start", "a"), _GAIN, ("other", "c")), "than",
        ),
        Schema(
            "add_mul", _draw("sss"), ((("a", "+", "b"), ("0", "*", "c")),),
            (("start", "a"), _GAIN, ("price", "c")), "coins",
        ),
        # Far: never shown by any recipe.
        Schema(
            "before_two", _draw("www"), ((("c", "-", "b"), ("0", "+", "a")),),
            (("some", "a"), ("loss", "a"), ("gain2", "b"), ("then_now", "c")), "first",
        ),
        Schema(
            "sub_div", _draw_sub_div, ((("a", "-", "b"), ("0", "/", "c")),),
            (("start", "a"), _LOSS, ("share_rest", "c")), "each",
        ),
    )
}  # fmt: skip

_FIVE = ("market", "farm", "school", "kitchen", "forest")
_HALF = ("add_add/forest", "sub_sub/market")
_NEW = ("add_sub/market", "mul_add/farm", "sub/kitchen", "mul_add_sub/school")
_UNSEEN_SETTING = ("add_sub/harbour", "mul_sub/harbour")


def _group(schema: str, name: str) -> Group:
    if schema in ("before_two", "sub_div"):
        return "far"
    if schema in ("compare", "add_mul") or name in _NEW or name in _UNSEEN_SETTING:
        return "new"
    if schema in ("two_prod", "add_sub_sub") or name in _HALF:
        return "half"
    return "known"


def _families() -> dict[str, Family]:
    names = [
        f"{schema}/{story}"
        for schema in SCHEMAS
        for story in _FIVE
        # Eight far families, not ten: the two schemas come in four settings.
        if not (_group(schema, "") == "far" and story == "forest")
    ]
    table = {}
    for name in [*names, *_UNSEEN_SETTING]:
        schema, story = name.split("/")
        group = _group(schema, name)
        table[name] = Family(name, schema, story, group, SCHEMAS[schema].steps)
    return table


FAMILIES: dict[str, Family] = _families()
"""All hundred families by name: 64 known, 12 half, 16 new, 8 far."""


def families(group: Group | None = None, steps: int | None = None) -> tuple[Family, ...]:
    """Return the families of a group and a number of steps, in a fixed order.

    >>> [len(families(group)) for group in ("known", "half", "new", "far")]
    [64, 12, 16, 8]
    """
    return tuple(
        family
        for family in FAMILIES.values()
        if group in (None, family.group) and steps in (None, family.steps)
    )
