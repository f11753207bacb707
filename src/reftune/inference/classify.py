"""Logits of a sequence-classification head, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from reftune.errors import DataError, ModelError, RecipeError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def class_logits(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | tuple[str, str | None]],
    *,
    batch_size: int = 32,
    adapter_names: Sequence[str] | None = None,
    subjects: Sequence[str | None] | None = None,
    subspaces: Sequence[Sequence[int] | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Return the class logits `[texts, classes]` in fp32 on the CPU.

    Texts longer than the model's context are cut, the longer of a pair first.

    Args:
        model: A sequence-classification model, with or without adapters.
        tokenizer: Its tokenizer.
        texts: Texts, or pairs of texts.
        batch_size: Rows a forward pass.
        adapter_names: Adapter of each text; `__base__` is the base model.
        subjects: Text of each row's subject, for the position rule `subject_last`.
        subspaces: Dimensions of the edit that act on each row.
        progress: Called with (rows done, rows in all).

    Raises:
        ModelError: If the model has no class head.
        DataError: If the columns differ in length.
    """
    import torch

    from reftune.inference import prompts as rows_of

    if batch_size < 1:
        raise RecipeError(f"batch_size is {batch_size}.", "It must be at least 1.")
    pairs = [(text, None) if isinstance(text, str) else text for text in texts]
    names = _rows(rows_of.check_adapters(model, adapter_names, len(pairs)), pairs)
    rows_of.check_lengths(len(pairs), subjects=subjects, subspaces=subspaces)
    edits = list(zip(names, _subject_places(tokenizer, pairs, subjects), _rows(subspaces, pairs)))
    rows = _encode(model, tokenizer, pairs)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    found: dict[int, torch.Tensor] = {}
    with rows_of.evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            logits = _forward(
                model, tokenizer, [rows[i] for i in chosen], [edits[i] for i in chosen]
            )
            found.update(zip(chosen, logits, strict=True))
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order))
    return torch.stack([found[i] for i in range(len(rows))])


def _forward(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    edits: Sequence[tuple[str | None, int | None, Sequence[int] | None]],
) -> torch.Tensor:
    """Return the class logits of one batch; `edits` are adapter, subject and subspace a row."""
    from reftune.inference import prompts as rows_of
    from reftune.model import prompt_scope

    names, subjects, subspaces = zip(*edits, strict=True)
    padded = rows_of.pad(rows, rows_of.pad_id(tokenizer), rows_of.device_of(model), side="right")
    extra = rows_of.row_edits(model, subjects, subspaces)
    with (
        rows_of.row_adapters(model, names) as adapters,
        prompt_scope(model, padded.attention_mask.sum(1), **extra),
    ):
        output = model(input_ids=padded.input_ids, attention_mask=padded.attention_mask, **adapters)
    if output.logits.dim() != 2:
        raise ModelError(
            f"{type(model).__name__} has no class head.", "Set model.head: classification."
        )
    return output.logits.float().cpu()


def _rows(column: Sequence[Any] | None, pairs: Sequence[Any]) -> Sequence[Any]:
    return [None] * len(pairs) if column is None else column


def _encode(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str | None]],
) -> list[list[int]]:
    """Return token ids with special tokens, cut to what model and tokenizer allow."""
    from reftune.inference.prompts import context_len

    limits = [context_len(model), tokenizer.model_max_length]
    limit = min(value for value in limits if value is not None)
    bounded = {"truncation": "longest_first", "max_length": limit} if limit < 1 << 20 else {}
    rows = [list(tokenizer(text, pair, **bounded)["input_ids"]) for text, pair in pairs]
    for index, row in enumerate(rows):
        if not row:
            raise DataError(f"Text {index} is empty.", "Remove it.")
    return rows


def _subject_places(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str | None]],
    subjects: Sequence[str | None] | None,
) -> list[int | None]:
    """Return the place of each subject in the first text."""
    from reftune.inference.prompts import subject_place
    from reftune.tasks.texts import frame

    if subjects is None or not any(subjects):
        return [None] * len(pairs)
    lead = len(frame(tokenizer).lead)
    return [
        None if not subject else lead + subject_place(tokenizer, text, subject, index)
        for index, ((text, _), subject) in enumerate(zip(pairs, subjects, strict=True))
    ]
