"""How the next token is chosen: settings, seeded sampling, stopping.

Left out on purpose: sampling together with beams, and constrained decoding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from reftune.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_PLAIN = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "num_return_sequences": 1,
    "early_stopping": False,
    "use_cache": True,
}
"""Settings written out in full, because `generate` takes what is missing from the checkpoint's own
generation_config (a temperature, a repetition penalty), which would make two models incomparable.
The values of the sampling fields are the ones `generate` ignores when it does not sample."""

_OWN = {
    *("max_new_tokens", "max_length", "do_sample", "temperature", "top_p", "top_k"),
    *("num_return_sequences", "stop_strings", "eos_token_id", "pad_token_id"),
}
"""Fields of GenerationConfig that have an argument of their own here."""


@dataclass(frozen=True)
class Decoding:
    """Settings of one call."""

    max_new_tokens: int
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 is greedy; above 0 samples."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 is all."""
    samples: int = 1
    """Answers a prompt."""
    seed: int = 0
    """Seed of the samples."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are cut off."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of transformers' GenerationConfig, such as `repetition_penalty`."""

    def __post_init__(self) -> None:
        faults = []
        if self.max_new_tokens < 1:
            faults.append(f"max_new_tokens is {self.max_new_tokens}, must be at least 1")
        if self.temperature < 0:
            faults.append(f"temperature is {self.temperature}, must not be negative")
        if not 0 < self.top_p <= 1:
            faults.append(f"top_p is {self.top_p}, must lie in (0, 1]")
        if self.top_k < 0:
            faults.append(f"top_k is {self.top_k}, must not be negative")
        if self.samples < 1:
            faults.append(f"samples is {self.samples}, must be at least 1")
        if self.samples > 1 and not self.sampled:
            faults.append(f"{self.samples} greedy samples would all be the same")
        if self.sampled and self.options.get("num_beams", 1) > 1:
            faults.append("sampling cannot be combined with beams")
        own = _OWN & set(self.options)
        if own:
            faults.append(f"options holds {', '.join(sorted(own))}, set by other arguments")
        if faults:
            raise RecipeError(
                f"Decoding: {'; '.join(faults)}.",
                "Greedy is temperature 0 with one sample; sampling needs a temperature above 0.",
            )

    @property
    def sampled(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature > 0


class SeededSampler(LogitsProcessor):
    """Draw the next token of each row with that row's own random numbers.

    Token = the first one whose cumulated probability exceeds u, with u uniform in [0, 1) fixed by
    (seed, row, sample, step). The draw is exact, and a row's answer does not depend on which rows
    it shares a batch with (up to rounding in the model itself).

    Args:
        uniforms: The numbers u, float64.
        prompt_width: Width of the (padded) prompts.
        decoding: Temperature and truncation.
    """

    def __init__(
        self, uniforms: Float[Tensor, "rows steps"], prompt_width: int, decoding: Decoding
    ) -> None:
        self.uniforms, self.prompt_width = uniforms, prompt_width
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(float(decoding.temperature))])
        if decoding.top_k:
            self.warpers.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            self.warpers.append(TopPLogitsWarper(float(decoding.top_p)))

    def __call__(
        self, input_ids: Int[Tensor, "rows seq"], scores: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "rows vocab"]:
        """Return scores that leave only the drawn token."""
        step = input_ids.shape[1] - self.prompt_width
        warped = self.warpers(input_ids, scores.float())
        precise = torch.float32 if warped.device.type == "mps" else torch.float64
        cumulated = warped.softmax(-1, dtype=precise).cumsum(-1)
        u = self.uniforms[:, step, None].to(cumulated) * cumulated[:, -1:]
        token = torch.searchsorted(cumulated, u, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


class Cancelled(StoppingCriteria):
    """Stop as soon as an event is set: the reader of a stream went away."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(
        self, input_ids: Int[Tensor, "rows seq"], scores: Any, **kwargs: Any
    ) -> Bool[Tensor, " rows"]:
        """Return one truth value a row."""
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class StopTexts(StoppingCriteria):
    """End a row when its answer contains one of some texts.

    Decodes the last tokens of each row. (transformers' own `stop_strings` tabulates the whole
    vocabulary for each new list of texts and refuses texts it cannot spell.)

    Args:
        tokenizer: The tokenizer.
        stops: The texts.
        prompt_width: Width of the (padded) prompts.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], prompt_width: int
    ) -> None:
        self.tokenizer, self.stops, self.prompt_width = tokenizer, tuple(stops), prompt_width
        # Byte tokens: up to 4 a character; a few more that decode to nothing.
        self.window = 4 * max(len(stop) for stop in self.stops) + 8

    def __call__(
        self, input_ids: Int[Tensor, "rows seq"], scores: Any, **kwargs: Any
    ) -> Bool[Tensor, " rows"]:
        """Return one truth value a row."""
        start = max(self.prompt_width, input_ids.shape[1] - self.window)
        texts = [decode(self.tokenizer, ids) for ids in input_ids[:, start:].tolist()]
        found = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(found, device=input_ids.device)


class TokenQueue(BaseStreamer):
    """Tokens of one row on their way from the generating thread to a reader; iterate to read."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[int | None] = SimpleQueue()
        self.prompt_seen = False

    def put(self, value: Int[Tensor, " ..."]) -> None:
        """Take what `generate` hands over: first the prompt, then token by token."""
        if self.prompt_seen:
            for token in value.flatten().tolist():
                self.queue.put(token)
        self.prompt_seen = True

    def end(self) -> None:
        """Nothing to do: `close` also ends a reader after a failure."""

    def close(self) -> None:
        """Tell the reader that no more tokens come."""
        self.queue.put(None)

    def __iter__(self) -> Iterator[int]:
        """Yield tokens until the queue is closed."""
        return iter(self.queue.get, None)


def uniforms(
    seed: int, jobs: Sequence[tuple[int, int]], steps: int
) -> Float[Tensor, "jobs {steps}"]:
    """Return random numbers fixed by seed, row and sample alone.

    Args:
        seed: Seed of the call.
        jobs: Row and sample number of each row of the batch.
        steps: Numbers a row.
    """
    generator, rows = torch.Generator(), []
    for row, sample in jobs:
        digest = hashlib.blake2b(f"{seed}:{row}:{sample}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "big") >> 1)
        rows.append(torch.rand(steps, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token that ends an answer: the tokenizer's EOS and the checkpoint's own list."""
    found: list[int] = []
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    for value in (tokenizer.eos_token_id, own):
        for token in value if isinstance(value, list | tuple) else [value]:
            if token is not None and int(token) not in found:
                found.append(int(token))
    return found


def generation_config(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, decoding: Decoding, max_new_tokens: int
) -> GenerationConfig:
    """Return transformers' settings for one batch."""
    from reftune.inference.prompts import pad_id

    known = GenerationConfig().to_dict()
    unknown = sorted(set(decoding.options) - set(known) - set(_PLAIN))
    if unknown:
        raise RecipeError(
            f"Decoding: unknown options {', '.join(unknown)}.",
            "They must be fields of transformers.GenerationConfig.",
        )
    settings: dict[str, Any] = {
        **_PLAIN,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": stop_ids(model, tokenizer) or None,
        "pad_token_id": pad_id(tokenizer),
        **decoding.options,
    }
    return GenerationConfig(**settings)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of ids as the model wrote it, without special tokens."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def cut_ids(ids: Sequence[int], stops: Sequence[int]) -> list[int]:
    """Return ids before the first stop token; what follows is padding.

    >>> cut_ids([4, 5, 2, 0, 0], [2])
    [4, 5]
    """
    ends = set(stops)
    for place, token in enumerate(ids):
        if token in ends:
            return list(ids[:place])
    return list(ids)


def cut_text(text: str, stops: Sequence[str]) -> str:
    """Return text before the first of the stop texts.

    >>> cut_text("4 apples. Q: How", ["Q:", "A:"])
    '4 apples. '
    """
    ends = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(ends)] if ends else text
