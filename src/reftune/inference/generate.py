"""Text from a model with adapters: in batches, sampled or greedy, with an adapter a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reftune.inference import prefix
from reftune.inference.choose import choose
from reftune.inference.edits import check_adapters
from reftune.inference.running import Job, batches, jobs_of
from reftune.inference.stream import stream

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from reftune.inference.decoding import Decoding
    from reftune.inference.prefix import PrefixCache
    from reftune.inference.prompts import Marks, Prompt

__all__ = ["choose", "generate", "stream"]

Progress = bool | Callable[[int, int], None]
"""False, True (a tqdm bar), or a function of answers done and answers in all."""


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    samples: int = 1,
    seed: int = 0,
    adapter_names: Sequence[str] | None = None,
    subjects: Sequence[str | None] | None = None,
    subspaces: Sequence[Sequence[int] | None] | None = None,
    marks: Sequence[Marks | None] | None = None,
    stop: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    prefix_cache: PrefixCache | None = None,
    progress: Progress = False,
) -> list[list[str]]:
    """Answer prompts in batches; return the samples of each prompt, in the order given.

    An answer ends at an end token (not part of the text), at a stop text, at max_new_tokens, or
    where the context ends. A sample depends on seed, row and sample number only (up to rounding in
    the model). A batch that does not fit on the GPU is halved and tried again.

    Args:
        model: A causal or encoder-decoder model, with or without adapters.
        tokenizer: Its tokenizer.
        prompts: Texts, or chats (messages with `role` and `content`) for the chat template.
        max_new_tokens: Longest answer in tokens.
        batch_size: Answers produced together.
        temperature: 0 is greedy; above 0 samples.
        top_p: Sample from the smallest set of tokens with this probability.
        top_k: Sample from the k most likely tokens; 0 is all.
        samples: Answers a prompt.
        seed: Seed of the samples.
        adapter_names: Adapter of each prompt; `__base__` is the base model, None the active one.
        subjects: Text of each prompt's subject, for the position rule `subject_last`.
        subspaces: Dimensions of the edit that act on each prompt; None is all.
        marks: Marked pieces of each prompt, for the position rule `mask`.
        stop: Texts that end an answer; they are cut off.
        options: Further fields of GenerationConfig (`num_beams`, `repetition_penalty` ...).
        prefix_cache: From `prefix_cache`: what all prompts begin with, computed once for all
            adapters.
        progress: True for a bar, or a function of (answers done, answers in all).

    Raises:
        DataError: If a prompt is empty, longer than the context, or cannot be rendered.
        ReftuneError: If settings, adapters or the model do not allow it.
    """
    from reftune.inference import prompts as rows_of
    from reftune.inference.decoding import Decoding

    sampling = (temperature, top_p, top_k, samples, seed)
    decoding = Decoding(max_new_tokens, *sampling, tuple(stop), options or {})
    rows_of.require_generation(model)
    names = check_adapters(model, adapter_names, len(prompts))
    seq2seq = rows_of.is_seq2seq(model)
    rows = rows_of.encode_prompts(tokenizer, prompts, seq2seq, subjects, marks)
    jobs = jobs_of(model, rows, decoding, names, subspaces)
    if prefix_cache is not None:
        prefix.check(model, prefix_cache, jobs, decoding.options)
    return answer_jobs(model, tokenizer, jobs, decoding, batch_size, progress, prefix_cache)


def answer_jobs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    jobs: list[Job],
    decoding: Decoding,
    batch_size: int = 32,
    progress: Progress = False,
    shared: PrefixCache | None = None,
) -> list[list[str]]:
    """Return the samples of each prompt; what `generate` and `evaluate` stand on.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        jobs: The answers to produce, from `jobs_of`.
        decoding: How they are produced.
        batch_size: Answers produced together.
        progress: See `generate`.
        shared: What all prompts begin with.
    """
    from reftune.inference import prompts as rows_of

    answers = {job.row: [""] * decoding.samples for job in jobs}
    done = 0
    with rows_of.evaluating(model), _Reporting(progress, len(jobs)) as report:
        for batch, sequences in batches(model, tokenizer, jobs, decoding, batch_size, shared):
            texts = _texts(model, tokenizer, sequences, decoding)
            for job, text in zip(batch, texts, strict=True):
                answers[job.row][job.sample] = text
            done += len(batch)
            report(done, len(jobs))
    return list(answers.values())


def _texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Int[Tensor, "rows steps"],
    decoding: Decoding,
) -> list[str]:
    """Return the answers without end tokens, padding and stop texts."""
    from reftune.inference import decoding as choosing

    stops = choosing.stop_ids(model, tokenizer)
    rows = [choosing.cut_ids(ids, stops) for ids in sequences.tolist()]
    return [choosing.cut_text(choosing.decode(tokenizer, ids), decoding.stop) for ids in rows]


class _Reporting:
    """Context manager giving a function of (done, all) for any kind of `progress`."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.bar = None
        self.call = progress if callable(progress) else None
        self.total = total if progress is True else 0

    def __enter__(self) -> Callable[[int, int], None]:
        if self.call is not None:
            return self.call
        if not self.total:
            return lambda done, total: None
        from tqdm.auto import tqdm

        self.bar = tqdm(total=self.total, desc="answers", unit="answer")
        return lambda done, total: self.bar.update(done - self.bar.n)

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()
