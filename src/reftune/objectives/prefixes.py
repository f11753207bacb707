"""Rows that learn only the first tokens of their answer, and rows as BREP's code labels them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from reftune.model.passes import IGNORE

if TYPE_CHECKING:
    from reftune.training.encode import Encoded

PAD = 0
"""Token the published code fills rows with, whatever the tokenizer."""


def draw(rows: Sequence[Encoded], share: float, seed: int) -> list[bool]:
    """Return which rows become prefixes: a share of them, drawn by seed and content.

    The draw depends on neither the order of the rows nor the state of any generator, so that it is
    the same in each epoch, on each process and after a resume. Below a share of 1 at least one row
    stays whole: whole rows keep the model able to finish.

    Args:
        rows: The rows.
        share: Share of prefixes, rounded to whole rows.
        seed: Another seed draws other rows.
    """

    def key(index: int) -> tuple[bytes, int]:
        row = rows[index]
        content = repr((seed, row.input_ids, row.labels, row.decoder_labels)).encode()
        return hashlib.blake2b(content, digest_size=8).digest(), index

    count = round(share * len(rows))
    if share < 1:
        count = min(count, len(rows) - 1)
    chosen = set(sorted(range(len(rows)), key=key)[:count])
    return [index in chosen for index in range(len(rows))]


def prefix_of(row: Encoded, tokens: int, eos: int | None) -> Encoded:
    """Return a row that ends with the first `tokens` tokens of its target, all of them labels.

    The closing EOS is never among them: an answer that is shorter keeps all its other tokens. What
    came behind is left out of the row, since no earlier token can see it; the loss is the same and
    costs less. Of an encoder-decoder's row the decoder's labels are cut.

    Args:
        row: An encoded row with all its labels.
        tokens: Target tokens to learn.
        eos: The EOS token.
    """
    if row.decoder_labels is not None:
        target = row.decoder_labels
        return replace(row, decoder_labels=target[: _kept(target, tokens, eos)])
    end = row.prompt_len + _kept(row.input_ids[row.prompt_len :], tokens, eos)
    mask, types = row.intervention_mask, row.token_types
    return replace(
        row,
        input_ids=row.input_ids[:end],
        labels=row.labels[:end],
        intervention_mask=None if mask is None else mask[:end],
        token_types=None if types is None else types[:end],
    )


def _kept(target: Sequence[int], tokens: int, eos: int | None) -> int:
    """Return how many tokens of a target are learned: `tokens`, or all before its EOS."""
    length = len(target) - (target[-1] == eos)
    return max(1, min(tokens, length))  # a target of nothing but EOS keeps it


def as_published(
    row: Encoded, is_prefix: bool, tokens: int, lead: int, eos: int | None, max_len: int
) -> Encoded:
    """Return a row with the labels of the published code, its mistakes included.

    1. The answer begins `lead` tokens early: there the text has its special tokens, the length of
       the prompt has not. Of a prefix the last `lead` tokens are lost instead.
    2. The last place of a prefix row is a label; it was meant for EOS and holds padding.
    3. A whole row learns all the padding behind its answer.
    4. No row is too long: what passes `max_len` is cut off, in the middle of a solution if need be.
    5. Padding is part of the row (token 0): it is edited, and attended to.

    The published text has no EOS; the one that the row ends in is taken away.

    Args:
        row: An encoded row with all its labels.
        is_prefix: Whether it becomes a prefix.
        tokens: Labels of a prefix row.
        lead: Special tokens at its beginning that the tokenizer adds.
        eos: The EOS token.
        max_len: Length of every row.
    """
    end = len(row.input_ids) - (row.input_ids[-1] == eos)
    ids = row.input_ids[:end][:max_len]
    ids = ids + [PAD] * (max_len - len(ids))
    first = row.prompt_len - lead
    last = first + tokens if is_prefix else max_len
    labels = [token if first <= place < last else IGNORE for place, token in enumerate(ids)]
    labels[-1] = ids[-1]
    mask, types = row.intervention_mask, row.token_types
    return replace(
        row,
        input_ids=ids,
        labels=labels,
        prompt_len=min(row.prompt_len, max_len),
        intervention_mask=None if mask is None else _filled(mask, max_len, False),
        token_types=None if types is None else _filled(types, max_len, 0),
    )


def _filled(values: list, length: int, fill: object) -> list:  # type: ignore[type-arg]
    return [*values, *[fill] * (length - len(values))][:length]
