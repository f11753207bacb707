"""Answer formats of the sums, and the readers that evaluations use.

The base model sees `native` only. All other styles exist for later tasks; none may occur in base
training. `prose` plays the model-written training data of the papers: sentences, the result before
its operands, its own wording. `prose_hash` is prose that keeps the equations and ends in `#### N`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Literal

from reftune.nano.sums_schemas import Step, apply

Style = Literal["native", "hash", "boxed", "json", "program", "prose", "prose_hash"]

_PROSE = {
    "+": "it is {result} together, {left} and then {right} more",
    "-": "it is {result} now, as {right} of {left} went away",
    "*": "it is {result} together, {right} in each of {left}",
    "/": "it is {result} for each, {left} equally for {right}",
}
"""Words the base model knows from elsewhere, in an order and for a use it does not know."""
_TOLD = {
    "+": "it is {left} + {right} = {result} together",
    "-": "it is {left} - {right} = {result} now",
    "*": "it is {left} * {right} = {result} together",
    "/": "it is {left} / {right} = {result} for each",
}
"""Prose that keeps the equation. A model of this size computes at the equals sign; edits of the
prompt can change what it writes around that, but not where it computes."""
_OPENERS = ("First", "Then", "Now")


def _equations(steps: Sequence[Step]) -> str:
    return " ".join(f"{step}." for step in steps)


def _native(steps: Sequence[Step]) -> str:
    return f"{_equations(steps)} The answer is {steps[-1].result}."


def _hash(steps: Sequence[Step]) -> str:
    return f"{_equations(steps)} #### {steps[-1].result}"


def _boxed(steps: Sequence[Step]) -> str:
    return f"{_equations(steps)} \\boxed{{{steps[-1].result}}}"


def _json(steps: Sequence[Step]) -> str:
    return json.dumps({"steps": [str(step) for step in steps], "answer": steps[-1].result})


def _program(steps: Sequence[Step]) -> str:
    def term(value: int, origin: int) -> str:
        return "abc"[origin] if origin >= 0 else str(value)

    lines = [
        f"    {'abc'[index]} = {term(step.left, step.left_from)} "
        f"{step.operator * (2 if step.operator == '/' else 1)} {term(step.right, step.right_from)}"
        for index, step in enumerate(steps)
    ]
    return "\n".join(["def solution():", *lines, f"    return {'abc'[len(steps) - 1]}"])


def _sentences(steps: Sequence[Step], wording: dict[str, str]) -> str:
    return " ".join(
        f"{opener} {wording[step.operator].format(**step._asdict())}."
        for opener, step in zip(_OPENERS, steps, strict=False)
    )


def _prose(steps: Sequence[Step]) -> str:
    return (
        f"{_sentences(steps, _PROSE)} That is the end, and {steps[-1].result} is the number wanted."
    )


def _prose_hash(steps: Sequence[Step]) -> str:
    return f"{_sentences(steps, _TOLD)} #### {steps[-1].result}"


STYLES: dict[str, Callable[[Sequence[Step]], str]] = {
    "native": _native,
    "hash": _hash,
    "boxed": _boxed,
    "json": _json,
    "program": _program,
    "prose": _prose,
    "prose_hash": _prose_hash,
}
"""Renderer of each style."""

_ENDS = {
    "native": re.compile(r"The answer is (\d+)\."),
    "hash": re.compile(r"#### (\d+)"),
    "boxed": re.compile(r"\\boxed\{(\d+)\}"),
    "prose": re.compile(r"(\d+) is the number wanted"),
    "prose_hash": re.compile(r"#### (\d+)"),
}
_EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
_PROGRAM_LINE = re.compile(r"([abc]) = ([abc]|\d+) ([-+*]|//) ([abc]|\d+)")


def render_steps(steps: Sequence[Step], style: Style = "native") -> str:
    """Return a solution with `steps` in a style.

    >>> render_steps([Step(47, "+", 38, 85), Step(85, "-", 12, 73, 0)])
    '47 + 38 = 85. 85 - 12 = 73. The answer is 73.'
    """
    if style not in STYLES:
        raise ValueError(f"style {style!r} is unknown. Available: {', '.join(STYLES)}.")
    return STYLES[style](steps)


def equations(text: str) -> list[Step]:
    """Return the equations of a solution as written, right or wrong, without their origins.

    >>> equations("2 + 2 = 5. The answer is 5.")
    [Step(left=2, operator='+', right=2, result=5, left_from=-1, right_from=-1)]
    """
    return [
        Step(int(left), operator, int(right), int(result))  # type: ignore[arg-type]
        for left, operator, right, result in _EQUATION.findall(text)
    ]


def last_number(text: str) -> str | None:
    """Return the last whole number in `text`, in whatever format it stands."""
    numbers = re.findall(r"\d+", text)
    return numbers[-1] if numbers else None


def strict_answer(text: str, style: Style) -> str | None:
    """Return the answer in `text` if it is in the named style, else None.

    A program is not executed: only lines `a = 4 + 7` and the final `return` are understood.

    >>> strict_answer("47 + 38 = 85. #### 85", "hash"), strict_answer("It is 85.", "hash")
    ('85', None)
    """
    if style == "json":
        return _json_answer(text)
    if style == "program":
        return _program_answer(text)
    found = _ENDS[style].findall(text)
    return found[-1] if found else None


def _json_answer(text: str) -> str | None:
    try:
        value = json.loads(text.strip())
    except ValueError:
        return None
    answer = value.get("answer") if isinstance(value, dict) else None
    return str(answer) if isinstance(answer, int) and not isinstance(answer, bool) else None


def _program_answer(text: str) -> str | None:
    first, *lines = text.strip().splitlines() or [""]
    if first.strip() != "def solution():":
        return None
    values: dict[str, int] = {}
    for line in lines:
        match = _PROGRAM_LINE.fullmatch(line.strip())
        if match is None:
            returned = line.strip().removeprefix("return ")
            return str(values[returned]) if returned in values else None
        name, left, operator, right = match.groups()
        terms = [values.get(term) if term.isalpha() else int(term) for term in (left, right)]
        if None in terms:
            return None
        result = apply(operator[0], terms[0], terms[1])  # type: ignore[arg-type]
        if result is None:
            return None
        values[name] = result
    return None
