"""Causal caching: compute only what the adapter can change. Exact, not an approximation.

The base is frozen and attention is causal. Let p0 be the first edited token of a row and l0 the
last block whose output no edit has touched (`reftune.model.cutting`). Then two things are constants
of the example: keys and values of the tokens before p0 at every block, and the output of block l0
at the tokens from p0 on. The first goes to the model as a read-only cache, the second in place of
the blocks up to l0 (`reftune.model.frozen`). What is left to run and to differentiate is the suffix
above l0.

Where the constants come from (computed at each step, or kept) is the business of `Source`, behind
the run seam: an objective cannot tell. `reftune.model.obstacles` says what rules it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from reftune.errors import ModelError
from reftune.model.cutting import Prefix, Suffix
from reftune.model.frozen import FrozenPrefix, checkpoint_with_cache, start_at, untouched
from reftune.model.identity import Identity
from reftune.model.lookup import blocks_of
from reftune.model.sites import base_of

if TYPE_CHECKING:
    from reftune.model.run import Prepared

Around = Callable[[], AbstractContextManager]
"""Makes a context for passes of the base model: autocast."""


@dataclass
class Given:
    """Constants of a batch, ready for the model.

    Attributes:
        prefix: Keys and values, or None if no row has a prefix.
        hidden: Output of block l0 at the suffix, or None.
        size: Length of the tuple that blocks return; None if they return a tensor.
    """

    prefix: FrozenPrefix | None
    hidden: Float[Tensor, "batch seq dim"] | None = None
    size: int | None = None


Source = Callable[[Suffix], Given]
"""Answers with the constants of a suffix batch."""


@contextmanager
def running(model: nn.Module, suffix: Suffix, given: Given) -> Iterator[Prepared]:
    """Inside, the model runs suffixes on their constants; yields the batch to run."""
    blocks = blocks_of(model)
    with ExitStack() as scopes:
        scopes.enter_context(checkpoint_with_cache(blocks.stack, blocks.modules))
        if given.hidden is not None:
            scopes.enter_context(
                start_at(blocks.modules, suffix.where.l0, given.hidden, given.size)
            )
        extra = dict(suffix.prepared.extra)
        if given.prefix is not None:
            extra["past_key_values"] = given.prefix
        yield replace(suffix.prepared, extra=extra)


def prefill(model: nn.Module, prefix: Prefix) -> DynamicCache:
    """Return keys and values of the prefixes at every block, computed without edits.

    Computed right-padded: padding on the left would be rows of attention with nothing to see, and
    their NaN in some kernels. Returned left-padded with zeros, so that every suffix starts in the
    same column and sliding windows reach as far as they should.

    Args:
        model: The model; frozen LoRA stays on.
        prefix: The prefixes.

    Raises:
        ModelError: If the model left tokens out of its cache.
    """
    base = base_of(model)
    # Without its config the cache keeps full length, so that sliding windows stay exact.
    cache = DynamicCache()
    with untouched(model):
        backbone = base.get_decoder() if hasattr(base, "get_decoder") else base.base_model
        backbone(
            input_ids=prefix.ids,
            attention_mask=(prefix.columns < prefix.lengths[:, None]).long(),
            past_key_values=cache,
            use_cache=True,
        )
    if cache.get_seq_length() != prefix.width:
        raise ModelError(
            f"The cache holds {cache.get_seq_length()} of {prefix.width} prefix tokens.",
            "Set causal: off for this model.",
        )
    if bool((prefix.lengths < prefix.width).any()):
        for layer in cache.layers:
            layer.keys = _to_the_right(layer.keys, prefix)
            layer.values = _to_the_right(layer.values, prefix)
    return cache


def check_finite(cache: DynamicCache) -> None:
    """Check keys and values of prefixes; asked of the first batch of a source, then trusted.

    Raises:
        ModelError: If a number is not finite: it would reach every suffix, also behind a mask.
    """
    for block, layer in enumerate(cache.layers):
        if not bool(torch.isfinite(layer.keys).all() & torch.isfinite(layer.values).all()):
            raise ModelError(
                f"Keys or values of a prefix are not finite in block {block}.",
                "Set causal: off; if the loss is not finite either, use precision: fp32.",
            )


def _to_the_right(
    states: Float[Tensor, "prefixes heads prefix dim"], prefix: Prefix
) -> Float[Tensor, "prefixes heads prefix dim"]:
    """Move states to the last columns; 0 before them (0 times NaN would be NaN)."""
    source = prefix.columns - (prefix.width - prefix.lengths[:, None])
    source = source.clamp(min=0).to(states.device)[:, None, :, None].expand_as(states)
    pads = ~prefix.valid.to(states.device)[:, None, :, None]
    return states.gather(2, source).masked_fill_(pads, 0)


@dataclass
class Recompute:
    """Source that computes prefixes anew for each batch, and once for all passes over its rows.

    A later batch whose prefixes were all among those of the last one computed (rejected answers, a
    reference pass, samples one by one) is answered from it until `forget`: a prefix has other last
    bits in another batch, so a training loop forgets before each optimiser step, lest a resumed run
    differ from one that went on.

    Args:
        model: The model with its adapters.
        around: Makes a context for passes of the base model.
    """

    model: nn.Module
    around: Around = nullcontext
    held: _Held | None = field(default=None, repr=False)
    _identity: Identity | None = field(default=None, repr=False)
    _is_checked: bool = field(default=False, repr=False)

    def __call__(self, suffix: Suffix) -> Given:
        """Return the keys and values of the prefixes of a batch."""
        prefix = suffix.prefix
        if prefix is None:
            return Given(None)
        self._identity = self._identity or Identity(self.model)
        stamp = self._identity.stamp()
        if self.held is None or not self.held.has(prefix, stamp):
            self.held = None  # its memory is free before the next is made
            with self.around():
                cache = prefill(self.model, prefix)
            if not self._is_checked:
                check_finite(cache)
                self._is_checked = True
            self.held = _Held(
                stamp,
                {key: place for place, key in enumerate(prefix.keys)},
                [layer.keys for layer in cache.layers],
                [layer.values for layer in cache.layers],
            )
        return Given(self.held.part(prefix))

    def forget(self) -> None:
        """Begin a step anew, with nothing computed; gives the memory of the last batch back."""
        self.held = None


@dataclass
class _Held:
    """Keys and values of the prefixes of one batch, and when they were computed."""

    stamp: int
    places: dict[bytes, int]
    keys: list[Float[Tensor, "prefixes heads prefix _"]]
    values: list[Float[Tensor, "prefixes heads prefix _"]]

    def has(self, prefix: Prefix, stamp: int) -> bool:
        """Say whether all of these prefixes are here, of a model with this stamp."""
        return self.stamp == stamp and all(key in self.places for key in prefix.keys)

    def part(self, prefix: Prefix) -> FrozenPrefix:
        """Return these prefixes as a cache for their batch."""
        places = torch.tensor([self.places[k] for k in prefix.keys], device=prefix.rows.device)
        rows = places[prefix.rows]
        every = torch.arange(len(self.places), device=rows.device)
        # Left-padded: a narrower batch takes the last columns.
        keys = [states[:, :, -prefix.width :] for states in self.keys]
        values = [states[:, :, -prefix.width :] for states in self.values]
        return FrozenPrefix(keys, values, prefix.width, None if torch.equal(rows, every) else rows)
