"""Logits of a sequence-classification head, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reftune.errors import DataError, ModelError, RecipeError
from reftune.inference.edits import check_adapters, row_adapters, row_edits

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

Text = str | tuple[str, str | None]
"""A text, or a pair of texts."""


@dataclass(frozen=True)
class ClassRow:
    """A text in tokens.

    Attributes:
        ids: Token ids with special tokens.
        token_types: Segment of each token, where the tokenizer tells.
        adapter: Its adapter, or None for the active ones.
        subject: Place of the last token of its subject, or None.
        subspace: Dimensions of the edit that act, or None for all.
        cut: Tokens that were cut off.
        mask: None: marks are not known for pairs of texts.
    """

    ids: list[int]
    token_types: list[int] | None = None
    adapter: str | None = None
    subject: int | None = None
    subspace: tuple[int, ...] | None = None
    cut: int = 0
    mask: tuple[bool, ...] | None = None


def class_logits(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    *,
    batch_size: int = 32,
    adapter_names: Sequence[str] | None = None,
    subjects: Sequence[str | None] | None = None,
    subspaces: Sequence[Sequence[int] | None] | None = None,
    max_len: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "texts classes"]:
    """Return the class logits in fp32 on the CPU.

    Texts longer than the model's context or `max_len` are cut, the longer of a pair first.

    Args:
        model: A sequence-classification model, with or without adapters.
        tokenizer: Its tokenizer.
        texts: Texts, or pairs of texts.
        batch_size: Rows a forward pass.
        adapter_names: Adapter of each text; `__base__` is the base model.
        subjects: Text of each row's subject, for the position rule `subject_last`.
        subspaces: Dimensions of the edit that act on each row.
        max_len: Longest row in tokens, as in training.
        progress: Called with (rows done, rows in all).

    Raises:
        ModelError: If the model has no class head.
        DataError: If the columns differ in length, or a text is empty.
    """
    rows = class_rows(model, tokenizer, texts, adapter_names, subjects, subspaces, max_len=max_len)
    return logits_of(model, tokenizer, rows, batch_size, progress)


def class_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    adapter_names: Sequence[str] | None = None,
    subjects: Sequence[str | None] | None = None,
    subspaces: Sequence[Sequence[int] | None] | None = None,
    max_len: int | None = None,
) -> list[ClassRow]:
    """Return texts in tokens; see `class_logits`."""
    from reftune.inference import prompts as rows_of

    names = check_adapters(model, adapter_names, len(texts))
    rows_of.check_lengths(len(texts), subjects=subjects, subspaces=subspaces)
    limits = (max_len, rows_of.context_len(model), tokenizer.model_max_length)
    limit = min(value for value in limits if value is not None)
    rows = []
    for index, text in enumerate(texts):
        first, second = (text, None) if isinstance(text, str) else text
        made, cut = _tokens(tokenizer, first, second, limit)
        if not made["input_ids"]:
            raise DataError(f"Text {index} is empty.", "Remove it.")
        dims = None if subspaces is None else subspaces[index]
        rows.append(
            ClassRow(
                list(made["input_ids"]),
                made.get("token_type_ids"),
                None if names is None else names[index],
                _subject(tokenizer, first, subjects[index] if subjects else None, index),
                None if dims is None else tuple(dims),
                cut,
            )
        )
    return rows


def _tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, pair: str | None, limit: int
) -> tuple[Any, int]:
    """Return a text in tokens, and how many did not fit."""
    whole = tokenizer(text, pair, verbose=False)
    cut = len(whole["input_ids"]) - limit
    if cut <= 0:
        return whole, 0
    return tokenizer(text, pair, truncation="longest_first", max_length=limit), cut


def _subject(
    tokenizer: PreTrainedTokenizerBase, text: str, subject: str | None, index: int
) -> int | None:
    """Return the place of a subject in the first text."""
    from reftune.tasks.texts import frame, subject_place

    if not subject:
        return None
    lead = len(frame(tokenizer).lead)
    return lead + subject_place(tokenizer, text, subject, f"Text {index}")


def logits_of(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[ClassRow],
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "texts classes"]:
    """Return the class logits of texts given in tokens; see `class_logits`."""
    import torch

    from reftune.inference.prompts import evaluating

    if batch_size < 1:
        raise RecipeError(f"batch_size is {batch_size}.", "It must be at least 1.")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids), reverse=True)
    found: dict[int, Float[Tensor, " classes"]] = {}
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            logits = _forward(model, tokenizer, [rows[i] for i in chosen])
            found.update(zip(chosen, logits, strict=True))
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order))
    return torch.stack([found[i] for i in range(len(rows))])


def _forward(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[ClassRow]
) -> Float[Tensor, "rows classes"]:
    """Return the class logits of one batch."""
    from reftune.inference import prompts as rows_of
    from reftune.model import prompt_scope

    device, pad_id = rows_of.device_of(model), rows_of.pad_id(tokenizer)
    padded = rows_of.pad([row.ids for row in rows], pad_id, device, side="right")
    inputs = {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask}
    if all(row.token_types is not None for row in rows):
        types = [row.token_types or [] for row in rows]
        inputs["token_type_ids"] = rows_of.pad(types, 0, device, side="right").input_ids
    extra = row_edits(model, rows, padded.attention_mask)
    with (
        row_adapters(model, [row.adapter for row in rows]) as adapters,
        prompt_scope(model, padded.attention_mask.sum(1), **extra),
    ):
        output = model(**inputs, **adapters)
    if output.logits.dim() != 2:
        raise ModelError(
            f"{type(model).__name__} has no class head.", "Set model.head: classification."
        )
    return output.logits.float().cpu()
