"""Guides: the target of a row behind other prompts, so that its tokens can be asked for again.

A guide is a prompt only. The target keeps its tokens, since prompt and target are tokenised apart,
so token t of the answer is the same token behind every prompt.

Left out on purpose: encoder-decoders, and subjects and marked pieces in guides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from reftune.errors import DataError
from reftune.tasks.texts import Frame, fixed_len, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftune.tasks.base import Example
    from reftune.training.encode import Encoded

Guide = str | Sequence[Mapping[str, str]]
"""A text, or chat messages that the chat template renders with its generation prompt."""


def encode_guides(
    example: Example, tokenizer: PreTrainedTokenizerBase, around: Frame, room: int
) -> tuple[dict[str, list[int]] | None, int]:
    """Return the tokens of the guides of an example, and how many the longest has lost.

    Args:
        example: The example; its guides are in `meta["guides"]`, by name.
        tokenizer: The tokenizer of the base model.
        around: `frame(tokenizer)`.
        room: Tokens a prompt may have; longer ones are cut from the left, their BOS stays.

    Raises:
        DataError: If a guide is empty, or the chat template is missing or refuses it.
    """
    given: Mapping[str, Guide] | None = example.meta.get("guides")
    if not given:
        return None, 0
    found, most = {}, 0
    for name, prompt in given.items():
        lead: tuple[int, ...] = around.lead if isinstance(prompt, str) else ()
        text = prompt if isinstance(prompt, str) else _rendered(tokenizer, prompt, example.id)
        ids = [*lead, *tokenizer(text, add_special_tokens=False)["input_ids"]] if text else []
        if len(ids) <= len(lead):
            raise DataError(f'Row "{example.id}" has an empty guide "{name}".', "Fill it in.")
        cut, fixed = max(0, len(ids) - room), fixed_len(tokenizer, lead, ids)
        found[name], most = ids[:fixed] + ids[fixed + cut :], max(most, cut)
    return found, most


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], row: str
) -> str:
    return render(tokenizer, [dict(message) for message in messages], row, True)


def guided(row: Encoded, name: str) -> Encoded:
    """Return a row with its target behind one of its guides; marks in its prompt are not there."""
    assert row.guides is not None
    prompt = row.guides[name]
    return replace(
        row,
        input_ids=prompt + row.input_ids[row.prompt_len :],
        labels=[-100] * len(prompt) + row.labels[row.prompt_len :],
        prompt_len=len(prompt),
        subject=None,
        intervention_mask=None,
        guides=None,
        weights=None,
    )


def collate_guides(rows: Sequence[Encoded], collate: Any, column: Any) -> dict[str, dict[str, Any]]:
    """Return a batch for each name of a guide, of the rows that have it.

    Args:
        rows: The rows of a batch.
        collate: Turns rows into a batch.
        column: Turns row numbers into a column of the batch.
    """
    names = dict.fromkeys(name for row in rows for name in row.guides or ())
    found = {}
    for name in names:
        places = [i for i, row in enumerate(rows) if name in (row.guides or ())]
        batch = collate([guided(rows[i], name) for i in places])
        found[name] = {**batch, "rows": column(places)}
    return found
