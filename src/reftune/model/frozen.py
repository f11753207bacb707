"""A cache that is only read, and running less of a frozen model.

Parts of causal caching (`reftune.model.causal`) that know the insides of transformers: keys and
values given to a forward pass, blocks that are left out, passes that end early. Everything here is
undone when its context ends, also after an error.

Left out on purpose: trimming sliding windows to their width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from reftune.errors import ModelError
from reftune.model.lookup import calls
from reftune.model.sites import base_of

WITH_CACHE = "_can_checkpoint_with_cache"
"""Flag by which a transformers block keeps a cache it only reads under gradient checkpointing."""


# --- a cache that is only read --------------------------------------------------------------------


class FrozenLayer(DynamicLayer):
    """Keys and values of one block that can be read but not added to.

    Args:
        keys: Of U different prefixes; None where the block is not run.
        values: Likewise.
        length: P, also where no tensors are held.
        rows: Prefix of each row of the batch; None if they are the same, in order.
    """

    def __init__(
        self,
        keys: Float[Tensor, "prefixes heads prefix dim"] | None,
        values: Float[Tensor, "prefixes heads prefix value_dim"] | None,
        length: int,
        rows: Int[Tensor, " batch"] | None,
    ) -> None:
        super().__init__()
        self.keys, self.values, self.length, self.rows = keys, values, length, rows
        self.is_initialized = True

    def update(
        self,
        key_states: Float[Tensor, "batch heads new dim"],
        value_states: Float[Tensor, "batch heads new value_dim"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[
        Float[Tensor, "batch heads prefix_and_new dim"],
        Float[Tensor, "batch heads prefix_and_new value_dim"],
    ]:
        """Return prefix and new states joined; keep nothing."""
        return self._join(self.keys, key_states), self._join(self.values, value_states)

    def _join(
        self,
        prefix: Float[Tensor, "prefixes heads prefix dim"] | None,
        new: Float[Tensor, "batch heads new dim"],
    ) -> Float[Tensor, "batch heads prefix_and_new dim"]:
        if prefix is None:
            raise ModelError(
                "A block below the start was run after all.",
                "Set causal: recompute; this architecture cannot start at a later block.",
            )
        if self.rows is not None:
            prefix = prefix.index_select(0, self.rows.to(prefix.device))
        return torch.cat([prefix.to(new.device, new.dtype), new], dim=-2)

    def get_seq_length(self) -> int:
        """Return P, also where no tensors are held."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys and the offset of the first."""
        return self.length + query_length, 0


class FrozenPrefix(Cache):
    """A read-only cache: any number of forward passes, replays and retries leave it as it is.

    Args:
        keys: One tensor a block, None at blocks that are not run.
        values: Likewise.
        length: P.
        rows: Row of the tensors of each row of the batch; None where U = B, in order.
    """

    def __init__(
        self,
        keys: Sequence[Float[Tensor, "prefixes heads prefix _"] | None],
        values: Sequence[Float[Tensor, "prefixes heads prefix _"] | None],
        length: int,
        rows: Int[Tensor, " batch"] | None = None,
    ) -> None:
        super().__init__(layers=[FrozenLayer(k, v, length, rows) for k, v in zip(keys, values)])


# --- running less --------------------------------------------------------------------------------


class _Whole:
    """Stands in for the forward of a block below l0: what comes in goes out."""

    def __init__(self, size: int | None) -> None:
        self.size = size

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return as_output(hidden_states, self.size)


class _Known:
    """Stands in for the forward of block l0: its known output comes out."""

    def __init__(self, hidden: Float[Tensor, "batch seq dim"], size: int | None) -> None:
        self.hidden, self.size = hidden, size

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return as_output(self.hidden, self.size)


def as_output(hidden: Float[Tensor, "batch seq dim"], size: int | None) -> Any:
    """Return what a block returns: the states, or a tuple of `size` that begins with them."""
    return hidden if size is None else (hidden, *[None] * (size - 1))


@contextmanager
def start_at(
    blocks: Sequence[nn.Module],
    l0: int,
    hidden: Float[Tensor, "batch seq dim"],
    size: int | None = None,
) -> Iterator[None]:
    """Begin forward passes with the output of block l0; the blocks below it do not run.

    Hooks stay in force, so the intervention on block l0 edits `hidden` as it would the real output.

    Args:
        blocks: The blocks of the model.
        l0: Index of the block whose output is known.
        hidden: That output, before any edit.
        size: Length of the tuple that blocks return; None if they return a tensor.
    """
    before = [block.__dict__.get("forward") for block in blocks[: l0 + 1]]
    try:
        for block in blocks[:l0]:
            block.__dict__["forward"] = _Whole(size)
        blocks[l0].__dict__["forward"] = _Known(hidden, size)
        yield
    finally:
        for block, own in zip(blocks[: l0 + 1], before):
            if own is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = own  # as accelerate leaves it on blocks it moves


@contextmanager
def checkpoint_with_cache(stack: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Keep a read-only cache under gradient checkpointing, which drops caches otherwise.

    A dropped cache is not always an error: with one new token a row, gradients are silently wrong.
    """
    if not is_checkpointed(blocks):
        yield
        return
    # Some stacks (GPT-2) drop the cache themselves; blocks keep their own flag.
    own = stack.__dict__.get("gradient_checkpointing")
    try:
        for block in blocks:
            block.__dict__[WITH_CACHE] = True
        if own:
            stack.__dict__["gradient_checkpointing"] = False
        yield
    finally:
        for block in blocks:
            block.__dict__.pop(WITH_CACHE, None)
        if own:
            stack.__dict__["gradient_checkpointing"] = own


def is_checkpointed(blocks: Sequence[nn.Module]) -> bool:
    """Say whether the blocks recompute their activations in the backward pass."""
    return any(getattr(block, "gradient_checkpointing", False) for block in blocks)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run the frozen model: our edits off, no dropout, no checkpointing; frozen LoRA stays on."""
    training = [module for module in model.modules() if module.training]
    with ExitStack() as scopes:
        for call in calls(model):
            scopes.enter_context(call.silent())
        scopes.enter_context(torch.no_grad())
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


# --- passes that end early -----------------------------------------------------------------------


class _Stop(Exception):
    """Ends a forward pass whose remaining blocks nobody needs."""


class Captured:
    """Takes the output of one block in a forward pass and ends the pass there.

    Attributes:
        hidden: The output `[B, S, d]`.
        size: Length of the tuple the block returned; None if it was a tensor.
    """

    def __init__(self) -> None:
        self.hidden: Float[Tensor, "batch seq dim"] | None = None
        self.size: int | None = None

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook."""
        if isinstance(output, tuple):
            self.hidden, self.size = output[0], len(output)
        else:
            self.hidden = output
        raise _Stop


def capture(model: nn.Module, block: nn.Module, **inputs: Any) -> Captured:
    """Run the frozen model up to `block` and return what came out of it.

    Args:
        model: The model; its edits are off in this pass.
        block: One of its blocks.
        **inputs: Inputs of the model.
    """
    found = Captured()
    handle = block.register_forward_hook(found, prepend=True)
    try:
        with untouched(model):
            base_of(model)(use_cache=False, **inputs)
    except _Stop:
        pass
    finally:
        handle.remove()
    return found
