"""Causal caching: compute only what the adapter can change. Exact, not an approximation.

The base is frozen and attention is causal. Let p0 be the first edited token of a row (or the token
before its first label, if that is earlier) and l0 the last block whose output no edit has touched.
Then two things are constants of the example: keys and values of the tokens before p0 at every
block, and the output of block l0 at the tokens from p0 on. `Split` gives the first to the model as
a read-only cache, `start_at` the second in place of the blocks up to l0. What is left to run and to
differentiate is the suffix above l0.

Where the constants come from (computed at each step, or kept) is the business of `Source`, behind
the run seam: an objective cannot tell. Left out on purpose: trimming sliding windows to their
width, encoders, packed rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from reftune.errors import ModelError
from reftune.model.call import Inputs, Snapshot
from reftune.model.lookup import calls, sites
from reftune.model.positions import TIED
from reftune.model.site import Site
from reftune.model.sites import Blocks, base_of, find_blocks

if TYPE_CHECKING:
    from reftune.model.run import Prepared

IGNORE = -100
WITH_CACHE = "_can_checkpoint_with_cache"
"""Flag by which a transformers block keeps a cache it only reads under gradient checkpointing."""


# --- a cache that is only read --------------------------------------------------------------------


class FrozenLayer(DynamicLayer):
    """Keys and values of one block that can be read but not added to.

    Args:
        keys: `[U, heads, P, dim]`, or None where the block is not run.
        values: Likewise.
        length: P.
        rows: Row of `keys` of each row of the batch `[B]`, or None if they are the same.
    """

    def __init__(
        self, keys: Tensor | None, values: Tensor | None, length: int, rows: Tensor | None
    ) -> None:
        super().__init__()
        self.keys, self.values, self.length, self.rows = keys, values, length, rows
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return prefix and new states joined `[B, heads, P + S, dim]`; keep nothing."""
        return self._join(self.keys, key_states), self._join(self.values, value_states)

    def _join(self, prefix: Tensor | None, new: Tensor) -> Tensor:
        if prefix is None:
            raise ModelError(
                "A block below the start was run after all.",
                "Set causal: recompute; this architecture cannot start at a later block.",
            )
        if self.rows is not None:
            prefix = prefix.index_select(0, self.rows.to(prefix.device))
        return torch.cat([prefix.to(new.dtype), new], dim=-2)

    def get_seq_length(self) -> int:
        """Return P, also where no tensors are held."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys and the offset of the first."""
        return self.length + query_length, 0


class FrozenPrefix(Cache):
    """A read-only cache: any number of forward passes, replays and retries leave it as it is.

    Args:
        keys: One tensor `[U, heads, P, dim]` a block, None at blocks that are not run.
        values: Likewise.
        length: P.
        rows: Row of the tensors of each row of the batch `[B]`; None where U = B, in order.
    """

    def __init__(
        self,
        keys: Sequence[Tensor | None],
        values: Sequence[Tensor | None],
        length: int,
        rows: Tensor | None = None,
    ) -> None:
        super().__init__(layers=[FrozenLayer(k, v, length, rows) for k, v in zip(keys, values)])


# --- running less --------------------------------------------------------------------------------


class _Stop(Exception):
    """Ends a forward pass whose remaining blocks nobody needs."""


class _Whole:
    """Stands in for the forward of a block below l0: what comes in goes out."""

    def __init__(self, size: int | None) -> None:
        self.size = size

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return as_output(hidden_states, self.size)


class _Given:
    """Stands in for the forward of block l0: its known output comes out."""

    def __init__(self, hidden: Tensor, size: int | None) -> None:
        self.hidden, self.size = hidden, size

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return as_output(self.hidden, self.size)


def as_output(hidden: Tensor, size: int | None) -> Any:
    """Return what a block returns: the states, or a tuple of `size` that begins with them."""
    return hidden if size is None else (hidden, *[None] * (size - 1))


@contextmanager
def start_at(
    blocks: Sequence[nn.Module], l0: int, hidden: Tensor, size: int | None = None
) -> Iterator[None]:
    """Begin forward passes with the output of block l0; the blocks below it do not run.

    Hooks stay in force, so the intervention on block l0 edits `hidden` as it would the real output.

    Args:
        blocks: The blocks of the model.
        l0: Index of the block whose output is known.
        hidden: That output `[B, S, d]`, before any edit.
        size: Length of the tuple that blocks return; None if they return a tensor.
    """
    before = [block.__dict__.get("forward") for block in blocks[: l0 + 1]]
    try:
        for block in blocks[:l0]:
            block.__dict__["forward"] = _Whole(size)
        blocks[l0].__dict__["forward"] = _Given(hidden, size)
        yield
    finally:
        for block, own in zip(blocks[: l0 + 1], before):
            if own is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = own


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
    ours = sites(model)
    edits = [site._disable_adapters for site in ours]
    modes = [(module, module.training) for module in model.modules() if module.training]
    try:
        for site in ours:
            site._disable_adapters = True
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for site, state in zip(ours, edits):
            site._disable_adapters = state
        for module, state in modes:
            module.training = state


def blocks_of(model: nn.Module) -> Blocks:
    """Return the blocks of the model inside PEFT."""
    return find_blocks(base_of(model))


# --- where the constants end ---------------------------------------------------------------------


@dataclass
class Cut:
    """Where the constants of a batch end.

    Attributes:
        p0: First token of each row's suffix, counted in real tokens `[B]`.
        l0: Last block whose output no edit has touched; -1: there is none.
        length: Real tokens of each row `[B]`.
        offset: Column of each row's first real token `[B]`.
        prompt_lens: Real prompt tokens of each row `[B]`.
        edited: Columns that some active adapter edits `[B, T]`.
    """

    p0: Tensor
    l0: int
    length: Tensor
    offset: Tensor
    prompt_lens: Tensor
    edited: Tensor


def first_block(model: nn.Module) -> int:
    """Return l0, the last block whose output no active edit has touched; -1 if there is none.

    An edit of a block's output leaves that output, before the edit, constant; one inside a block
    leaves constant what goes into the block.
    """
    lowest = [site.layer if site.outer else site.layer - 1 for site in sites(model) if active(site)]
    return min(lowest, default=-1)


def active(site: Site) -> list[str]:
    """Return the adapters that act at a site, whether or not edits are switched off just now."""
    rows = site.call.rows
    names = site._active_names() if rows is None else dict.fromkeys(rows)
    return [name for name in names if site.groups(name)]


def cut(model: nn.Module, prepared: Prepared) -> Cut | None:
    """Find the constants of a batch, or None if its rows have holes.

    Args:
        model: The model with its adapters.
        prepared: The batch, `[B, T]`.
    """
    valid = prepared.attention_mask.bool()
    length = valid.sum(1)
    offset = valid.int().argmax(1)
    place = valid.long().cumsum(1) - 1
    columns = torch.arange(valid.shape[1], device=valid.device)
    last = torch.where(valid, columns, -1).amax(1)
    if bool((last - offset + 1 != length).any()) or bool((length == 0).any()):
        return None
    labelled = prepared.labels != IGNORE
    prompt_lens = prepared.prompt_lens
    if prompt_lens is None:
        prompt_lens = ((labelled.long().cumsum(1) == 0) & valid).sum(1)
    edited = edited_columns(model, prepared, prompt_lens)
    stops = edited | labelled.roll(-1, 1)
    # A row without edits and labels has no suffix of its own; its last token stands for one.
    first = torch.where(stops & valid, place, length[:, None] - 1).amin(1)
    prompt_lens = prompt_lens.to(first.device)
    return Cut(first, first_block(model), length, offset, prompt_lens, edited)


def edited_columns(model: nn.Module, prepared: Prepared, prompt_lens: Tensor) -> Tensor:
    """Return the columns that any active adapter edits `[B, T]`, edits switched off included."""
    batch, width = prepared.input_ids.shape
    inputs = Inputs(
        None,
        prompt_lens,
        prepared.intervention_mask,
        prepared.subject_positions,
    )
    edited = torch.zeros_like(prepared.attention_mask, dtype=torch.bool)
    training = blocks_of(model).stack.training
    for call in calls(model):
        names = {n for site in sites(model) if site.call is call for n in active(site)}
        now, call.now = call.now, Snapshot(batch=batch, width=width, training=training)
        try:
            bound = {"attention_mask": prepared.attention_mask}
            tokens = call._describe(inputs, bound, prepared.input_ids.device)
            for name in sorted(names):
                rules = call.rules[name]
                mask = rules.current(training).select(tokens, TIED, rules.short)
                if call.rows is not None:
                    mine = [row == name for row in call.rows]
                    mask = mask & torch.tensor(mine, device=mask.device)[:, None]
                edited |= mask
        finally:
            call.now = now
    return edited


# --- making the constants ------------------------------------------------------------------------


@dataclass
class Prefix:
    """Prefixes of a batch, one row for each different one.

    Attributes:
        ids: Token ids, right-padded `[U, P]`.
        lengths: Tokens of each `[U]`.
        rows: Prefix of each row of the batch `[B]`.
    """

    ids: Tensor
    lengths: Tensor
    rows: Tensor

    @property
    def columns(self) -> Tensor:
        """0 to P - 1 `[P]`."""
        return torch.arange(self.ids.shape[1], device=self.ids.device)

    @property
    def valid(self) -> Tensor:
        """True at the columns of the cache that hold a token: left-padded `[U, P]`."""
        return self.columns >= self.ids.shape[1] - self.lengths[:, None]


def take(tensor: Tensor, start: Tensor, width: int) -> Tensor:
    """Return `width` columns of each row from its `start` on `[B, width]`; out of range clamps."""
    columns = start[:, None] + torch.arange(width, device=tensor.device)
    return tensor.gather(1, columns.clamp(0, tensor.shape[1] - 1))


def prefixes(prepared: Prepared, where: Cut) -> Prefix:
    """Return the different prefixes of a batch; rows with equal prompts share one."""
    width = int(where.p0.max())
    ids = take(prepared.input_ids, where.offset, width)
    columns = torch.arange(width, device=ids.device)
    ids = torch.where(columns < where.p0[:, None], ids, 0)
    keyed = torch.cat([where.p0[:, None], ids], 1)
    places: dict[bytes, int] = {}
    rows = [places.setdefault(row.tobytes(), len(places)) for row in keyed.cpu().numpy()]
    keep = torch.tensor([rows.index(u) for u in range(len(places))], device=ids.device)
    return Prefix(ids[keep], where.p0[keep], torch.tensor(rows, device=ids.device))


def prefill(model: nn.Module, prefix: Prefix) -> DynamicCache:
    """Return keys and values of the prefixes at every block, computed without edits.

    Computed right-padded: padding on the left would be rows of attention with nothing to see, and
    their NaN in some kernels. Returned left-padded with zeros, so that every suffix starts in the
    same column and sliding windows reach as far as they should.

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
    if cache.get_seq_length() != prefix.ids.shape[1]:
        raise ModelError(
            f"The cache holds {cache.get_seq_length()} of {prefix.ids.shape[1]} prefix tokens.",
            "Set causal: off for this model.",
        )
    if bool((prefix.lengths < prefix.ids.shape[1]).any()):
        for layer in cache.layers:
            layer.keys = _to_the_right(layer.keys, prefix)
            layer.values = _to_the_right(layer.values, prefix)
    return cache


def _to_the_right(states: Tensor, prefix: Prefix) -> Tensor:
    """Move `[U, heads, P, dim]` states to the last columns; 0 before them."""
    source = prefix.columns - (prefix.ids.shape[1] - prefix.lengths[:, None])
    source = source.clamp(min=0).to(states.device)[:, None, :, None].expand_as(states)
    pads = ~prefix.valid.to(states.device)[:, None, :, None]
    return states.gather(2, source).masked_fill_(pads, 0)


def positions(base: nn.Module, position_ids: Tensor) -> dict[str, Tensor]:
    """Return `position_ids` as an argument, for models that take them."""
    if "position_ids" in inspect.signature(type(base).forward).parameters:
        return {"position_ids": position_ids}
    return {}


class Capture:
    """Takes the output of one block in a forward pass and ends the pass there.

    Attributes:
        hidden: The output `[B, S, d]`.
        size: Length of the tuple the block returned; None if it was a tensor.
    """

    hidden: Tensor
    size: int | None = None

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook."""
        if isinstance(output, tuple):
            self.hidden, self.size = output[0], len(output)
        else:
            self.hidden = output
        raise _Stop


def capture(model: nn.Module, block: nn.Module, **inputs: Any) -> Capture:
    """Run the frozen model up to `block` and return what came out of it."""
    found = Capture()
    handle = block.register_forward_hook(found)
    try:
        with untouched(model):
            base_of(model)(use_cache=False, **inputs)
    except _Stop:
        pass
    finally:
        handle.remove()
    return found


# --- a batch in two parts ------------------------------------------------------------------------


Source = Callable[["Suffix"], "Given"]
"""Answers with the constants of a suffix batch."""


@dataclass
class Given:
    """Constants of a batch, ready for the model.

    Attributes:
        prefix: Keys and values, or None if no row has a prefix.
        hidden: Output of block l0 at the suffix `[B, S, d]`, or None.
        size: Length of the tuple that blocks return.
    """

    prefix: FrozenPrefix | None
    hidden: Tensor | None = None
    size: int | None = None


@dataclass
class Suffix:
    """The part of a batch from p0 on, right-padded, with what its constants depend on.

    Attributes:
        prepared: The suffixes as a batch `[B, S]`; the mask over prefixes and suffixes is among
            its further inputs.
        whole: The batch it was cut from.
        where: The cut.
        prefix: The prefixes, or None if no row has one.
    """

    prepared: Prepared
    whole: Prepared
    where: Cut
    prefix: Prefix | None


def split(model: nn.Module, prepared: Prepared) -> Suffix | None:
    """Cut a batch in two, or return None where there is nothing to gain.

    Args:
        model: The model with its adapters.
        prepared: The batch, `[B, T]`; further model inputs rule it out.
    """
    if prepared.extra or prepared.labels.dim() != 2:
        return None
    where = cut(model, prepared)
    if where is None:
        return None
    longest = int(where.p0.max())
    if longest == 0 and where.l0 < 1:
        return None
    prefix = prefixes(prepared, where) if longest else None
    start = where.offset + where.p0
    width = int((where.length - where.p0).max())
    columns = torch.arange(width, device=start.device)
    valid = columns < (where.length - where.p0)[:, None]
    mask = valid if prefix is None else torch.cat([prefix.valid[prefix.rows], valid], 1)
    edits = prepared.intervention_mask
    part = replace(
        prepared,
        input_ids=torch.where(valid, take(prepared.input_ids, start, width), 0),
        attention_mask=valid.to(prepared.attention_mask.dtype),
        labels=torch.where(valid, take(prepared.labels, start, width), IGNORE),
        intervention_mask=None if edits is None else take(edits, start, width) & valid,
        prompt_lens=where.prompt_lens,
        extra={
            "attention_mask": mask.to(prepared.attention_mask.dtype),
            **positions(base_of(model), where.p0[:, None] + columns),
        },
    )
    return Suffix(part, prepared, where, prefix)


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


@dataclass
class Recompute:
    """Source that computes the prefixes anew, once for all passes over the same rows.

    Args:
        model: The model with its adapters.
        around: Makes a context for passes of the base model: autocast.
    """

    model: nn.Module
    around: Callable[[], AbstractContextManager] = nullcontext
    last: tuple[bytes, Given] | None = field(default=None, repr=False)

    def __call__(self, suffix: Suffix) -> Given:
        """Return the keys and values of the prefixes of a batch."""
        prefix = suffix.prefix
        if prefix is None:
            return Given(None)
        parts = (prefix.lengths, prefix.ids, prefix.rows)
        key = b"".join(part.cpu().numpy().tobytes() for part in parts)
        if self.last is None or self.last[0] != key:
            with self.around():
                cache = prefill(self.model, prefix)
            rows = None if len(prefix.ids) == len(prefix.rows) else prefix.rows
            keys = [layer.keys for layer in cache.layers]
            values = [layer.values for layer in cache.layers]
            given = Given(FrozenPrefix(keys, values, prefix.ids.shape[1], rows))
            self.last = (key, given)
        return self.last[1]
