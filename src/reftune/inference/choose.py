"""Comparing given answers by their log-probability."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from reftune.errors import DataError, RecipeError
from reftune.inference.edits import check_adapters, row_adapters, row_edits

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from reftune.inference.prefix import PrefixCache
    from reftune.inference.prompts import Marks, Prompt, Row


@dataclass(frozen=True)
class Ask:
    """An answer to score after a prompt.

    Attributes:
        prompt: Token ids of the prompt, at least one.
        answer: Token ids of the answer, at least one.
        adapter: Adapter of the row, or None for the active ones.
        subject: Place of the subject's last token in the prompt, or None.
        subspace: Dimensions of the edit that act, or None for all.
        mask: Which prompt tokens are marked for the rule `mask`, or None.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    adapter: str | None = None
    subject: int | None = None
    subspace: tuple[int, ...] | None = None
    mask: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class Score:
    """How likely an answer is.

    Attributes:
        logprob: Summed log-probability of its tokens, in nats.
        greedy: Whether every token is the most likely one.
    """

    logprob: float
    greedy: bool


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
    marks: Sequence[Marks | None] | None = None,
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
        marks: Marked pieces of each prompt, for the position rule `mask`.
        progress: Called with (rows done, rows in all).

    Raises:
        DataError: If a choice is empty, a prompt too long, or the two lists differ in length.
        AdapterError: If a named adapter is not attached.
        ModelError: If the model has no language-model head.
    """
    from reftune.inference import prompts as rows_of

    rows_of.require_generation(model)
    lists = choice_lists(len(prompts), choices)
    rows = rows_of.encode_prompts(tokenizer, prompts, rows_of.is_seq2seq(model), subjects, marks)
    return choose_rows(
        model, tokenizer, rows, lists, batch_size, adapter_names, subspaces, progress
    )


def choose_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    lists: Sequence[Sequence[str]],
    batch_size: int = 32,
    adapter_names: Sequence[str] | None = None,
    subspaces: Sequence[Sequence[int] | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    shared: PrefixCache | None = None,
) -> list[list[float]]:
    """Score the choices of prompts given in tokens; see `choose` and, for `shared`, `score`."""
    from reftune.inference import prompts as rows_of

    if batch_size < 1:
        raise RecipeError(f"batch_size is {batch_size}.", "It must be at least 1.")
    names = check_adapters(model, adapter_names, len(rows))
    rows_of.check_lengths(len(rows), subspaces=subspaces)
    asks = _asks(tokenizer, rows, lists, names, subspaces)
    _check_lengths(model, asks, list(map(len, lists)), rows_of.is_seq2seq(model))
    how = {"batch_size": batch_size, "progress": progress, "shared": shared}
    scores = iter(score(model, tokenizer, asks, **how))
    return [[next(scores).logprob for _ in found] for found in lists]


def score(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    asks: Sequence[Ask],
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
    shared: PrefixCache | None = None,
) -> list[Score]:
    """Score answers given in tokens; what `choose` and the lm-evaluation-harness model stand on.

    Answers that differ in their last token only share one row. A batch that does not fit on the
    GPU is halved and tried again.

    Args:
        model: A causal or encoder-decoder model, with or without adapters.
        tokenizer: Its tokenizer.
        asks: Prompts and answers.
        batch_size: Rows a forward pass.
        progress: Called with (rows done, rows in all).
        shared: Keys and values of what all prompts begin with, of a causal model.
    """
    import torch

    from reftune.inference import prompts as rows_of

    rows: dict[Ask, list[int]] = {}  # what is run, and which asks it answers
    for index, ask in enumerate(asks):
        rows.setdefault(replace(ask, answer=ask.answer[:-1]), []).append(index)
    order = sorted(rows, key=lambda row: -len(row.prompt) - len(row.answer))
    waiting = [order[i : i + batch_size] for i in range(0, len(order), batch_size)][::-1]
    scores: list[Score | None] = [None] * len(asks)
    done = 0
    seq2seq = rows_of.is_seq2seq(model)
    forward = _forward_seq2seq if seq2seq else partial(_forward_causal, shared=shared)
    with rows_of.evaluating(model):
        while waiting:
            batch = waiting.pop()
            try:
                outcome = forward(model, tokenizer, batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                outcome = None
            if outcome is None:  # outside the handler, which still holds the failed tensors
                torch.cuda.empty_cache()
                half = (len(batch) + 1) // 2
                waiting += [batch[half:], batch[:half]]
                continue
            for row, logits in zip(batch, outcome, strict=True):
                for index, found in zip(rows[row], _scores(row, logits, rows[row], asks)):
                    scores[index] = found
            done += len(batch)
            if progress is not None:
                progress(done, len(order))
    return [found for found in scores if found is not None]


def choice_lists(
    num_prompts: int, choices: Sequence[str] | Sequence[Sequence[str]]
) -> list[list[str]]:
    """Return one list of choices a prompt.

    Raises:
        DataError: If there is another number of lists.
    """
    if choices and isinstance(choices[0], str):
        return [list(map(str, choices)) for _ in range(num_prompts)]
    if len(choices) != num_prompts:
        raise DataError(
            f"There are {len(choices)} lists of choices for {num_prompts} prompts.",
            "Give one list a prompt, or one list of texts for all.",
        )
    return [list(found) for found in choices]


def _asks(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    lists: Sequence[Sequence[str]],
    names: Sequence[str] | None,
    subspaces: Sequence[Sequence[int] | None] | None,
) -> list[Ask]:
    """Return one ask a choice, prompt by prompt."""
    asks: list[Ask] = []
    known: dict[str, tuple[int, ...]] = {}
    for index, (row, found) in enumerate(zip(rows, lists, strict=True)):
        dims = subspaces[index] if subspaces else None
        subspace = None if dims is None else tuple(dims)
        adapter = names[index] if names else None
        for place, text in enumerate(found):
            if text not in known:
                known[text] = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            if not known[text]:
                raise DataError(
                    f"Choice {place} of prompt {index} is empty.", "Every choice needs a token."
                )
            asks.append(Ask(tuple(row.ids), known[text], adapter, row.subject, subspace, row.mask))
    return asks


def _check_lengths(
    model: nn.Module, asks: Sequence[Ask], counts: Sequence[int], seq2seq: bool
) -> None:
    """Check that each prompt fits into the context with its longest choice (less a token)."""
    from reftune.inference.prompts import check_context

    lengths = iter(len(a.prompt) + (0 if seq2seq else len(a.answer) - 1) for a in asks)
    longest = [max((next(lengths) for _ in range(count)), default=0) for count in counts]
    check_context(model, longest, 0, "Prompt {index} with its longest choice")


def _scores(
    row: Ask,
    logits: Float[Tensor, "{len(row.answer)+1} vocab"],
    indices: Sequence[int],
    asks: Sequence[Ask],
) -> list[Score]:
    """Return the scores of a row's answers from the logits that predict them."""
    import torch

    shared, agrees = 0.0, True
    if row.answer:
        tokens = torch.tensor(row.answer, device=logits.device)
        shared = float(logits[:-1].log_softmax(-1).gather(1, tokens[:, None]).sum())
        agrees = bool((logits[:-1].argmax(-1) == tokens).all())
    last = logits[-1].log_softmax(-1)
    best = int(last.argmax())
    ends = [asks[index].answer[-1] for index in indices]
    return [Score(shared + float(last[end]), agrees and end == best) for end in ends]


def _forward_causal(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[Ask],
    shared: PrefixCache | None = None,
) -> list[Float[Tensor, "_ vocab"]]:
    """Return fp32 logits of each row: those that predict its answers, one more than it holds."""
    import torch

    from reftune.inference import prompts as rows_of
    from reftune.model import prompt_scope

    device = rows_of.device_of(model)
    rows = [[*row.prompt, *row.answer] for row in batch]
    padded = rows_of.pad(rows, rows_of.pad_id(tokenizer), device)
    place = (padded.attention_mask.cumsum(-1) - 1).clamp_(min=0)
    keep = max(len(row.answer) for row in batch) + 1
    begin = 0 if shared is None else len(shared)
    inputs: dict[str, Any] = {
        "input_ids": padded.input_ids[:, begin:],
        "attention_mask": padded.attention_mask,
        "use_cache": False,
    }
    if shared is not None:
        width = padded.input_ids.shape[1]
        inputs["past_key_values"] = shared.cache([width - len(row) for row in rows])
    # Some families take positions from the mask themselves, and have no such argument.
    if rows_of.accepts(model, "position_ids"):
        inputs["position_ids"] = place[:, begin:]
    if rows_of.accepts(model, "logits_to_keep"):
        inputs["logits_to_keep"] = keep
    lens = torch.tensor([len(row.prompt) for row in batch], device=device)
    logits = _call(model, batch, inputs, lambda extra: prompt_scope(model, lens, **extra))
    logits = logits[:, -keep:]
    return [x[keep - len(row.answer) - 1 :].float() for x, row in zip(logits, batch, strict=True)]


def _forward_seq2seq(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch: list[Ask]
) -> list[Float[Tensor, "_ vocab"]]:
    """Return the same of a decoder."""
    import torch

    from reftune.inference import prompts as rows_of
    from reftune.model import prompt_scope

    device, pad_id = rows_of.device_of(model), rows_of.pad_id(tokenizer)
    padded = rows_of.pad([row.prompt for row in batch], pad_id, device, side="right")
    start = model.config.decoder_start_token_id
    starts = [[pad_id if start is None else start, *row.answer] for row in batch]
    decoder = rows_of.pad(starts, pad_id, device, side="right")
    inputs = {
        "input_ids": padded.input_ids,
        "attention_mask": padded.attention_mask,
        "decoder_input_ids": decoder.input_ids,
        "use_cache": False,
    }
    lens = torch.tensor([len(row.prompt) for row in batch], device=device)
    logits = _call(model, batch, inputs, lambda extra: prompt_scope(model, lens, **extra))
    return [x[: len(row.answer) + 1].float() for x, row in zip(logits, batch, strict=True)]


def _call(
    model: nn.Module,
    batch: list[Ask],
    inputs: dict[str, Any],
    scope: Callable[[dict[str, Any]], Any],
) -> Float[Tensor, "rows width vocab"]:
    """Run one forward pass with each row's adapter, subject and subspace; return the logits."""
    # An encoder-decoder's answers go to the decoder; its interventions see the prompt alone.
    extra = row_edits(model, batch, inputs["attention_mask"])
    if "intervention_mask" in extra:  # one a new token; cached ones are not edited
        new = inputs["input_ids"].shape[1]
        extra["intervention_mask"] = extra["intervention_mask"][:, -new:]
    adapters_of = row_adapters(model, [row.adapter for row in batch])
    with adapters_of as adapters, scope(extra):
        return model(**inputs, **adapters).logits
