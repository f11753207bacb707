"""Answers that somebody else began: a model goes on from a prompt and the first tokens behind it.

The model reads prompt and first tokens in one fresh forward pass of its own, so nothing that
another model computed can leak in. Position rules count from where the prompt itself ends: `l4`
edits the last tokens of the question, `generated:8` the first eight of the answer, whoever wrote
them.

Left out on purpose: sampling and beams (a hand-over compares greedy answers), encoder-decoders, and
adapters with the rule `mask`, which say nothing about tokens that are not in the prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from reftune.errors import AdapterError, ModelError
from reftune.inference.edits import adapters_of
from reftune.inference.running import Job, batches

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from reftune.inference.decoding import Decoding
    from reftune.inference.prompts import Row

Writer = Literal["base", "adapter"]
"""Who writes: the model with its adapters off, or as it is."""
WRITERS: tuple[Writer, ...] = get_args(Writer)


@dataclass(frozen=True)
class Start:
    """Where a model goes on.

    Attributes:
        prompt: The prompt in tokens.
        given: First tokens of the answer.
        budget: Most tokens to write.
        subspace: Dimensions of the edit that act on this row; None is all.
    """

    prompt: Row
    given: tuple[int, ...] = ()
    budget: int = 1
    subspace: tuple[int, ...] | None = None

    mask: ClassVar[None] = None
    """No token is marked: `check_model` refuses rules that ask for it."""

    @property
    def ids(self) -> list[int]:
        """All tokens that the model reads."""
        return [*self.prompt.ids, *self.given]

    @property
    def subject(self) -> int | None:
        """Place of the last token of the prompt's subject."""
        return self.prompt.subject


@dataclass(frozen=True)
class Written:
    """What a model wrote behind a start.

    Attributes:
        ids: The tokens, without the end token.
        ended: Whether it ended by itself: by an end token or a stop text.
    """

    ids: tuple[int, ...]
    ended: bool


def check_model(model: nn.Module) -> None:
    """Check that a model's adapters can be told from its base, row by row of an answer.

    Raises:
        AdapterError: If it has no adapter, or one with the position rule `mask`.
        ModelError: If it is an encoder-decoder or produces no text.
    """
    from reftune.inference import prompts as rows_of
    from reftune.model.lookup import calls

    rows_of.require_generation(model)
    if rows_of.is_seq2seq(model):
        raise ModelError(
            "An answer cannot be handed over in an encoder-decoder.",
            "Give a model that reads prompt and answer in one row.",
        )
    if not adapters_of(model):
        raise AdapterError(
            "This model has no adapter to compare with its base.",
            "Give an adapter, a stack or a run folder.",
        )
    rules = [(name, r.inference) for call in calls(model) for name, r in call.rules.items()]
    marked = next((f'"{name}" ({rule})' for name, rule in rules if rule.mask), None)
    if marked is not None:
        raise AdapterError(
            f"Adapter {marked} edits marked tokens; which tokens of an answer are marked is not "
            "known.",
            "Give an adapter whose positions are counted, such as f4+l4.",
        )


@contextlib.contextmanager
def writing(model: nn.Module, who: Writer) -> Iterator[nn.Module]:
    """Let the base or the adapters write inside; `base` is bit-identical to the base model."""
    from reftune.model import off

    with off(model) if who == "base" else contextlib.nullcontext():
        yield model


def go_on(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    starts: Sequence[Start],
    decoding: Decoding,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[Written]:
    """Let a model write on from each start, greedily, in batches.

    With nothing given this is what `generate` answers. A batch that does not fit on the GPU is
    halved and tried again.

    Args:
        model: A causal language model; its active adapters act.
        tokenizer: Its tokenizer.
        starts: Prompts and first tokens.
        decoding: Stop texts and options; lengths are the starts' own.
        batch_size: Rows written together.
        progress: Called with (rows done, rows in all).
    """
    from reftune.inference import decoding as choosing
    from reftune.inference import prompts as rows_of

    pad_id, stops = rows_of.pad_id(tokenizer), choosing.stop_ids(model, tokenizer)
    jobs = [
        Job(i, 0, s.ids, s.budget, None, s.subject, s.subspace, prompt_len=len(s.prompt.ids))
        for i, s in enumerate(starts)
    ]
    found: dict[int, Written] = {}
    with rows_of.evaluating(model):
        for batch, sequences in batches(model, tokenizer, jobs, decoding, batch_size):
            for job, ids in zip(batch, sequences.tolist(), strict=True):
                start = starts[job.row]
                found[job.row] = _written(tokenizer, start, ids, stops, pad_id, decoding)
            if progress is not None:
                progress(len(found), len(starts))
    return [found[index] for index in range(len(starts))]


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], decoding: Decoding) -> str:
    """Return tokens of an answer as text, up to the first stop text."""
    from reftune.inference import decoding as choosing

    return choosing.cut_text(choosing.decode(tokenizer, ids), decoding.stop)


def has_stop(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], decoding: Decoding) -> bool:
    """Return whether tokens of an answer hold a stop text."""
    from reftune.inference.decoding import decode

    text = decode(tokenizer, ids) if decoding.stop else ""
    return any(stop in text for stop in decoding.stop)


def _written(
    tokenizer: PreTrainedTokenizerBase,
    start: Start,
    ids: list[int],
    stops: Sequence[int],
    pad_id: int,
    decoding: Decoding,
) -> Written:
    """Return what a row wrote, without what stands behind its end."""
    from reftune.inference.decoding import cut_ids

    kept = cut_ids(ids, stops)
    stopped = has_stop(tokenizer, [*start.given, *kept], decoding)
    if stopped:  # the rows of a batch that end early are padded
        while kept and kept[-1] == pad_id:
            kept.pop()
    return Written(tuple(kept), stopped or len(kept) < len(ids))
