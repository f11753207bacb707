"""Text as it is generated, token by token."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from reftune.inference import prefix
from reftune.inference.edits import check_adapters

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from reftune.inference.decoding import Decoding
    from reftune.inference.prefix import PrefixCache
    from reftune.inference.prompts import Marks, Prompt
    from reftune.inference.running import Job

_REPLACEMENT = "\ufffd"  # what a decoder shows for the first bytes of an unfinished character


def stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    adapter_name: str | None = None,
    subject: str | None = None,
    subspace: Sequence[int] | None = None,
    marks: Marks | None = None,
    stop: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    prefix_cache: PrefixCache | None = None,
) -> Iterator[str]:
    """Yield the answer to one prompt piece by piece; joined they equal `generate`'s answer.

    Generation runs in a thread. What goes wrong there is raised here; closing the iterator (or
    Ctrl-C in its reader) stops it after the current token. Arguments are checked at once.

    Args:
        model: See `generate`; one stream at a time on a model.
        tokenizer: Its tokenizer.
        prompt: A text or a chat.
        max_new_tokens: Longest answer in tokens.
        temperature: 0 is greedy; above 0 samples.
        top_p: See `generate`.
        top_k: See `generate`.
        seed: Seed of the sample.
        adapter_name: Adapter to answer with; `__base__` is the base model, None the active one.
        subject: Text of the prompt's subject, for the position rule `subject_last`.
        subspace: Dimensions of the edit that act; None is all.
        marks: Marked pieces of the prompt, for the position rule `mask`.
        stop: Texts that end the answer; they are cut off.
        options: See `generate`; beams cannot be streamed.
        prefix_cache: See `generate`.

    Raises:
        ReftuneError: As `generate`.
    """
    from reftune.errors import RecipeError
    from reftune.inference import prompts as rows_of
    from reftune.inference.decoding import Decoding
    from reftune.inference.running import jobs_of

    decoding = Decoding(
        max_new_tokens, temperature, top_p, top_k, 1, seed, tuple(stop), options or {}
    )
    if decoding.options.get("num_beams", 1) > 1:
        raise RecipeError("Beams cannot be streamed.", "Leave num_beams out, or use generate.")
    rows_of.require_generation(model)
    given = None if adapter_name is None else [adapter_name]
    names = check_adapters(model, given, 1)
    seq2seq = rows_of.is_seq2seq(model)
    rows = rows_of.encode_prompts(tokenizer, [prompt], seq2seq, [subject], [marks])
    job = jobs_of(model, rows, decoding, names, [subspace])[0]
    if prefix_cache is not None:
        prefix.check(model, prefix_cache, [job], decoding.options)
    return _until(_pieces(model, tokenizer, job, decoding, prefix_cache), decoding.stop)


def _pieces(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    job: Job,
    decoding: Decoding,
    shared: PrefixCache | None,
) -> Generator[str]:
    """Yield text as tokens arrive from a thread that generates."""
    from threading import Event, Thread

    from reftune.inference import decoding as choosing
    from reftune.inference import prompts as rows_of
    from reftune.inference.running import run

    tokens, cancel, failures = choosing.TokenQueue(), Event(), []

    def work() -> None:
        try:
            criteria = [choosing.Cancelled(cancel)]
            with rows_of.evaluating(model):  # here: autograd's mode belongs to the thread
                run(model, tokenizer, [job], decoding, criteria, shared, streamer=tokens)
        except BaseException as error:  # handed to the reader
            failures.append(error)
        finally:
            tokens.close()

    thread = Thread(target=work, name="reftune-stream", daemon=True)
    thread.start()
    try:
        yield from _decoded(tokenizer, tokens, choosing.stop_ids(model, tokenizer))
    finally:
        cancel.set()
        thread.join()
    if failures:
        raise failures[0]


def _decoded(
    tokenizer: PreTrainedTokenizerBase, tokens: Iterator[int], stops: Sequence[int]
) -> Iterator[str]:
    """Yield the text each token adds; an unfinished character waits for its last byte.

    Only the last pieces are decoded again, so that a long answer stays linear.
    """
    from reftune.inference.decoding import decode

    ids: list[int] = []
    start = shown = 0  # ids[start:shown] is decoded as context, its text is out already
    for token in tokens:
        if token in stops:
            break
        ids.append(token)
        before, after = decode(tokenizer, ids[start:shown]), decode(tokenizer, ids[start:])
        if len(after) > len(before) and not after.endswith(_REPLACEMENT):
            yield after[len(before) :]
            start, shown = shown, len(ids)
    rest = decode(tokenizer, ids[start:])[len(decode(tokenizer, ids[start:shown])) :]
    if rest:
        yield rest


def _until(pieces: Generator[str], stops: Sequence[str]) -> Iterator[str]:
    """Yield pieces up to the first stop text, holding back what may be the beginning of one."""
    held = ""
    with closing(pieces):  # ends the thread behind it, also when the reader stops early
        for piece in pieces:
            held += piece
            ends = [place for place in (held.find(stop) for stop in stops) if place >= 0]
            if ends:
                held = held[: min(ends)]
                break
            keep = max((_overlap(held, stop) for stop in stops), default=0)
            if len(held) > keep:
                yield held[: len(held) - keep]
                held = held[len(held) - keep :]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of text begin the stop text.

    >>> _overlap("so 4.\\nQ", "\\nQ:")
    2
    """
    longest = min(len(text), len(stop) - 1)
    return next((k for k in range(longest, 0, -1) if text.endswith(stop[:k])), 0)
