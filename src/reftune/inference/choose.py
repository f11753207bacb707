"""Comparing given answers by their log-probability."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reftune.errors import DataError, RecipeError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from reftune.inference.prompts import Prompt


@dataclass
class _Context:
    """One row of a forward pass, shared by all answers that differ in their last token only.

    Attributes:
        prompt: Token ids of the prompt.
        head: Token ids of the answers without the last one.
        asks: Prompt index, choice index and last token of each answer.
        extra: Adapter, subject and subspace of the row.
    """

    prompt: list[int]
    head: list[int]
    asks: list[tuple[int, int, int]] = field(default_factory=list)
    extra: tuple[Any, Any, Any] = (None, None, None)


def choose(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    choices: Sequence[str] | Sequence[Sequence[str]],
    *,
    batch_size: int = 32,
    adapter_names: Sequence[str] | None = None,
    subjects: Sequence[str | None] | None = None,
    subspaces: Sequence[Sequence[int] | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[float]]:
    """Return the summed log-probability of every choice after its prompt, in nats.

    score(c | p) = Σ_t log P(c_t | p, c_<t)   over the tokens of c (no end token)

    Prompt and choice are tokenised apart, as in training. Rows are padded on the left so that the
    head of the model runs on answer positions only (where it supports `logits_to_keep`); choices
    of one token share a single pass over their prompt. Adapters see where the prompt ends.

    Args:
        model: A causal or encoder-decoder model, with or without adapters.
        tokenizer: Its tokenizer.
        prompts: Texts or chats.
        choices: Continuations of all prompts, or one list a prompt; with their leading space.
        batch_size: Rows a forward pass.
        adapter_names: Adapter of each prompt; `__base__` is the base model.
        subjects: Text of each prompt's subject, for the position rule `subject_last`.
        subspaces: Dimensions of the edit that act on each prompt.
        progress: Called with (rows done, rows in all).

    Raises:
        DataError: If a choice is empty, a prompt too long, or the two lists differ in length.
        AdapterError: If a named adapter is not attached.
        ModelError: If the model has no language-model head.
    """
    from reftune.inference import prompts as rows_of

    if batch_size < 1:
        raise RecipeError(f"batch_size is {batch_size}.", "It must be at least 1.")
    rows_of.require_generation(model)
    lists = _choice_lists(prompts, choices)
    names = rows_of.check_adapters(model, adapter_names, len(prompts))
    rows_of.check_lengths(len(prompts), subjects=subjects, subspaces=subspaces)
    seq2seq = rows_of.is_seq2seq(model)
    rows = rows_of.encode_prompts(tokenizer, prompts, seq2seq, subjects)
    contexts = _contexts(tokenizer, rows, lists, names, subspaces)
    lengths = [len(c.prompt) + (0 if seq2seq else len(c.head)) for c in contexts]
    rows_of.check_context(model, lengths, reserve=0)
    scores = [[0.0] * len(found) for found in lists]
    forward = _forward_seq2seq if seq2seq else _forward_causal
    order = sorted(range(len(contexts)), key=lengths.__getitem__, reverse=True)
    with rows_of.evaluating(model):
        for start in range(0, len(order), batch_size):
            batch = [contexts[i] for i in order[start : start + batch_size]]
            for context, logits in zip(batch, forward(model, tokenizer, batch), strict=True):
                _add_scores(scores, context, logits)
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order))
    return scores


def _choice_lists(
    prompts: Sequence[Prompt], choices: Sequence[str] | Sequence[Sequence[str]]
) -> list[list[str]]:
    """Return one list of choices a prompt."""
    if choices and isinstance(choices[0], str):
        return [list(map(str, choices)) for _ in prompts]
    if len(choices) != len(prompts):
        raise DataError(
            f"There are {len(choices)} lists of choices for {len(prompts)} prompts.",
            "Give one list a prompt, or one list of texts for all.",
        )
    return [list(found) for found in choices]


def _contexts(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Any],
    lists: Sequence[Sequence[str]],
    names: Sequence[str] | None,
    subspaces: Sequence[Sequence[int] | None] | None,
) -> list[_Context]:
    """Return the distinct rows to run, each with the answers it can score."""
    contexts: list[_Context] = []
    known: dict[str, list[int]] = {}
    for index, (row, found) in enumerate(zip(rows, lists, strict=True)):
        dims = subspaces[index] if subspaces else None
        extra = (
            names[index] if names else None,
            row.subject,
            None if dims is None else tuple(dims),
        )
        mine: dict[tuple[int, ...], _Context] = {}
        for place, text in enumerate(found):
            if text not in known:
                known[text] = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            ids = known[text]
            if not ids:
                raise DataError(
                    f"Choice {place} of prompt {index} is empty.", "Every choice needs a token."
                )
            head = tuple(ids[:-1])
            if head not in mine:
                mine[head] = _Context(row.ids, ids[:-1], extra=extra)
                contexts.append(mine[head])
            mine[head].asks.append((index, place, ids[-1]))
    return contexts


def _add_scores(scores: list[list[float]], context: _Context, logits: torch.Tensor) -> None:
    """Add up the log-probabilities of a row's answers from its logits `[len(head) + 1, V]`."""
    import torch

    if not context.head:
        shared = 0.0
    else:
        tokens = torch.tensor(context.head, device=logits.device)[:, None]
        shared = float(logits[:-1].log_softmax(-1).gather(1, tokens).sum())
    last = logits[-1].log_softmax(-1)
    for index, place, token in context.asks:
        scores[index][place] = shared + float(last[token])


def _forward_causal(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch: list[_Context]
) -> list[torch.Tensor]:
    """Return fp32 logits `[len(head) + 1, V]` of each row: those that predict its answers."""
    import torch

    from reftune.inference import prompts as rows_of
    from reftune.model import prompt_scope

    device = rows_of.device_of(model)
    rows = [[*context.prompt, *context.head] for context in batch]
    padded = rows_of.pad(rows, rows_of.pad_id(tokenizer), device)
    place = (padded.attention_mask.cumsum(-1) - 1).clamp_(min=0)
    keep = max(len(context.head) for context in batch) + 1
    inputs: dict[str, Any] = {
        "input_ids": padded.input_ids,
        "attention_mask": padded.attention_mask,
        "use_cache": False,
    }
    # Some families take positions from the mask themselves, and have no such argument.
    if rows_of.accepts(model, "position_ids"):
        inputs["position_ids"] = place
    if rows_of.accepts(model, "logits_to_keep"):
        inputs["logits_to_keep"] = keep
    lens = torch.tensor([len(context.prompt) for context in batch], device=device)
    logits = _call(model, batch, inputs, lambda extra: prompt_scope(model, lens, **extra))
    logits = logits[:, -keep:]
    return [row[keep - len(c.head) - 1 :].float() for row, c in zip(logits, batch, strict=True)]


def _forward_seq2seq(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch: list[_Context]
) -> list[torch.Tensor]:
    """Return fp32 decoder logits `[len(head) + 1, V]` of each row."""
    import torch

    from reftune.inference import prompts as rows_of
    from reftune.model import prompt_scope

    device, pad_id = rows_of.device_of(model), rows_of.pad_id(tokenizer)
    padded = rows_of.pad([c.prompt for c in batch], pad_id, device, side="right")
    start = model.config.decoder_start_token_id
    starts = [[pad_id if start is None else start, *c.head] for c in batch]
    decoder = rows_of.pad(starts, pad_id, device, side="right")
    inputs = {
        "input_ids": padded.input_ids,
        "attention_mask": padded.attention_mask,
        "decoder_input_ids": decoder.input_ids,
        "use_cache": False,
    }
    lens = torch.tensor([len(context.prompt) for context in batch], device=device)
    logits = _call(model, batch, inputs, lambda extra: prompt_scope(model, lens, **extra))
    return [row[: len(c.head) + 1].float() for row, c in zip(logits, batch, strict=True)]


def _call(
    model: nn.Module,
    batch: list[_Context],
    inputs: dict[str, Any],
    scope: Callable[[dict[str, Any]], Any],
) -> torch.Tensor:
    """Run one forward pass with each row's adapter, subject and subspace; return the logits."""
    from reftune.inference import prompts as rows_of

    columns = defaultdict(list)
    for context in batch:
        for name, value in zip(("names", "subjects", "subspaces"), context.extra, strict=True):
            columns[name].append(value)
    extra = rows_of.row_edits(model, columns["subjects"], columns["subspaces"])
    with rows_of.row_adapters(model, columns["names"]) as adapters, scope(extra):
        return model(**inputs, **adapters).logits
