"""Prompt templates that more than one task uses, to the letter."""

from __future__ import annotations

import re

from reftune.errors import DataError, nearest
from reftune.tasks.files import written

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""Alpaca form without input, used for Math-10K and instruction following."""
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""Alpaca form with input."""
STEPS = (
    "{question}\nAnswer the above question. First think step by step and then answer the final "
    "number.\n"
)
"""GSM8K form of the representation-finetuning paper."""
STEPS_ANSWER = "The final answer is: "
"""What replaces `####` in its targets."""
REASONING = "Question:\n{question}\nAnswer reasoning:\n"
"""Form of reinforced fine-tuning."""
PROGRAM = f'{REASONING}def solution():\n    """{{question}}"""\n'
"""The same where the answer is a program whose head is given."""
NATIVE = "Question: {question} Answer:"
"""Form in which nano knows questions."""

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


def fill(template: str, **values: str) -> str:
    """Return `template` with its fields replaced; values may hold braces.

    >>> fill("Q: {question}", question="{x}?")
    'Q: {x}?'
    """
    return _FIELD.sub(lambda found: _value(found, values, ""), template)


def field_names(template: str) -> list[str]:
    """Return the fields a template asks for, in order.

    >>> field_names("{a} and {b}, not {{c}}")
    ['a', 'b']
    """
    return [found[1].strip() for found in _FIELD.finditer(template) if found[1]]


def fill_row(template: str, row: dict[str, object], where: str) -> str:
    """Return `template` filled from a row.

    Raises:
        DataError: If the row lacks a field the template asks for, or has null there.
    """
    return _FIELD.sub(lambda found: _value(found, row, where), template)


def _value(found: re.Match[str], values: dict, where: str) -> str:
    if found[1] is None:
        return found[0][0]
    name = found[1].strip()
    if name not in values:
        known = [key for key in values if not key.startswith("__")]
        raise DataError(f'{where}: the template asks for a field "{name}".', nearest(name, known))
    return written(values[name], name, where)


def alpaca(instruction: str, context: str = "") -> str:
    """Return the Alpaca prompt, with the input part if there is one."""
    if context.strip():
        return fill(ALPACA_INPUT, instruction=instruction, input=context)
    return fill(ALPACA, instruction=instruction)
