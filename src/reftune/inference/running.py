"""One batch through transformers' `generate`: what `generate` and `stream` share."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reftune.inference.edits import row_adapters, row_edits

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from reftune.inference.decoding import Decoding
    from reftune.inference.prefix import PrefixCache
    from reftune.inference.prompts import Row

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One answer to produce.

    Attributes:
        row: Number of its prompt; with the sample and the seed it fixes the noise.
        sample: Number of the answer to that prompt.
        ids: What the model reads.
        budget: Most tokens to write.
        adapter: Its adapter; None is the active one.
        subject: Place of the subject's last token.
        subspace: Dimensions of the edit that act; None is all.
        mask: Marked tokens.
        prompt_len: Tokens of `ids` that are prompt, where the others begin the answer; None: all.
    """

    row: int
    sample: int
    ids: list[int]
    budget: int
    adapter: str | None
    subject: int | None
    subspace: tuple[int, ...] | None
    mask: tuple[bool, ...] | None = None
    prompt_len: int | None = None


def jobs_of(
    model: nn.Module,
    rows: Sequence[Row],
    decoding: Decoding,
    names: Sequence[str] | None,
    subspaces: Sequence[Sequence[int] | None] | None = None,
    first: int = 0,
) -> list[Job]:
    """Return one job an answer, with the tokens it may take before the context ends.

    Args:
        model: The model.
        rows: The prompts in tokens.
        decoding: How answers are produced.
        names: Adapter of each prompt.
        subspaces: Dimensions of the edit that act on each prompt.
        first: Number of the first prompt, where these are a part of many.

    Raises:
        DataError: If a prompt leaves no room for an answer, or `subspaces` has another length.
    """
    from reftune.inference import prompts as rows_of

    seq2seq = rows_of.is_seq2seq(model)
    rows_of.check_lengths(len(rows), subspaces=subspaces)
    lengths = [len(row.ids) for row in rows]
    limit = rows_of.check_context(model, lengths, reserve=0 if seq2seq else 1)
    jobs = []
    for index, row in enumerate(rows):
        budget = decoding.max_new_tokens
        if limit is not None:
            budget = min(budget, limit - (1 if seq2seq else len(row.ids)))
        dims = subspaces[index] if subspaces else None
        told = (row.subject, None if dims is None else tuple(dims), row.mask)
        adapter = names[index] if names else None
        for sample in range(decoding.samples):
            jobs.append(Job(first + index, sample, row.ids, budget, adapter, *told))
    short = {job.row for job in jobs if job.budget < decoding.max_new_tokens}
    if short:
        log.warning(
            "%d of %d prompts leave fewer than %d tokens in the context of %d: shorter answers",
            *(len(short), len(rows), decoding.max_new_tokens, limit),
        )
    return jobs


def batches(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[Job],
    decoding: Decoding,
    batch_size: int,
    shared: PrefixCache | None = None,
) -> Iterator[tuple[list[Job], Int[Tensor, "rows steps"]]]:
    """Yield jobs of similar length and equal budget with their new tokens, the longest first.

    A batch that does not fit into the GPU's memory is halved and tried again.

    Raises:
        RecipeError: If batch_size is below 1.
    """
    waiting = _in_batches(jobs, batch_size)
    while waiting:
        batch = waiting.pop()
        sequences = _try(model, tokenizer, batch, decoding, shared)
        if sequences is not None:
            yield batch, sequences
            continue
        half = (len(batch) + 1) // 2
        log.warning("%d rows do not fit in memory, trying %d", len(batch), half)
        waiting += [batch[half:], batch[:half]]


def _in_batches(jobs: Sequence[Job], batch_size: int) -> list[list[Job]]:
    """Return batches of similar length and equal budget, the longest last (it is run first)."""
    from reftune.errors import RecipeError

    if batch_size < 1:
        raise RecipeError(f"batch_size is {batch_size}.", "It must be at least 1.")
    ordered = sorted(jobs, key=lambda job: (-job.budget, len(job.ids), job.row, job.sample))
    found: list[list[Job]] = []
    for job in ordered:
        if not found or len(found[-1]) == batch_size or found[-1][0].budget != job.budget:
            found.append([])
        found[-1].append(job)
    return found


def _try(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[Job],
    decoding: Decoding,
    shared: PrefixCache | None,
) -> Int[Tensor, "rows steps"] | None:
    """Return the new tokens of a batch, or None if it ran out of memory and can be halved."""
    import torch

    try:
        return run(model, tokenizer, batch, decoding, shared=shared)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()  # outside the handler: there the failed call still holds its tensors
    return None


def run(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[Job],
    decoding: Decoding,
    criteria: Sequence[Any] | None = None,
    shared: PrefixCache | None = None,
    **extra: Any,
) -> Int[Tensor, "rows steps"]:
    """Run transformers' generate; return the new tokens.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        batch: The answers to produce.
        decoding: How they are produced.
        criteria: Further reasons to stop.
        shared: Keys and values of what all prompts begin with.
        **extra: Further arguments of `generate`.
    """
    import torch
    from transformers import LogitsProcessorList, StoppingCriteriaList

    from reftune.inference import decoding as choosing
    from reftune.inference import prompts as rows_of
    from reftune.model.lookup import calls

    seq2seq = rows_of.is_seq2seq(model)
    rows = [job.ids for job in batch]
    pad_id, device = rows_of.pad_id(tokenizer), rows_of.device_of(model)
    padded = rows_of.pad(rows, pad_id, device)
    width = 1 if seq2seq else padded.input_ids.shape[1]
    if shared is not None:
        beams = decoding.options.get("num_beams", 1)
        pads = [width - len(row) for row in rows for _ in range(beams)]
        extra["past_key_values"] = shared.cache(pads)
    processors = LogitsProcessorList()
    if decoding.sampled:
        keys = [(job.row, job.sample) for job in batch]
        numbers = choosing.uniforms(decoding.seed, keys, decoding.max_new_tokens)
        processors.append(
            choosing.SeededSampler(numbers.to(padded.input_ids.device), width, decoding)
        )
    criteria = StoppingCriteriaList(criteria or [])
    if decoding.stop:
        criteria.append(choosing.StopTexts(tokenizer, decoding.stop, width))
    extra |= row_edits(model, batch, padded.attention_mask)
    if batch[0].prompt_len is not None and calls(model):
        extra["prompt_lens"] = torch.tensor([job.prompt_len for job in batch], device=device)
    with row_adapters(model, [job.adapter for job in batch]) as adapters:
        sequences = model.generate(
            input_ids=padded.input_ids,
            attention_mask=padded.attention_mask,
            generation_config=choosing.generation_config(
                model, tokenizer, decoding, batch[0].budget
            ),
            logits_processor=processors,
            stopping_criteria=criteria,
            **adapters,
            **extra,
        )
    return sequences[:, width:]
