"""The source that keeps constants: what was computed once serves all epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftune.model import causal, cutting
from reftune.model.frozen import FrozenPrefix, capture
from reftune.model.identity import Identity, digest
from reftune.model.lookup import blocks_of
from reftune.training.constants import Entry, Store

if TYPE_CHECKING:
    from transformers.cache_utils import DynamicCache

    from reftune.model.cutting import Suffix
    from reftune.model.run import Prepared


@dataclass
class _Keys:
    """Keys of a batch: one a different prefix, one a row (or none)."""

    prefix: list[str]
    hidden: list[str]


@dataclass
class Stored:
    """Source that keeps what it computed.

    What the store has no room for is computed at each step, once for all passes over its rows;
    `forget` says where a step begins.

    Args:
        model: The model with its adapters.
        store: Where constants are kept.
        start: Whether to leave out the blocks up to l0.
        around: Makes a context for passes of the base model: autocast.
    """

    model: nn.Module
    store: Store
    start: bool = False
    around: causal.Around = nullcontext
    _identity: Identity | None = field(default=None, repr=False)
    _loose: dict[str, Entry] = field(default_factory=dict, repr=False)
    _sizes: list[int | None] = field(default_factory=list, repr=False)
    _is_checked: bool = field(default=False, repr=False)

    def __call__(self, suffix: Suffix) -> causal.Given:
        """Return the constants of a batch; what is missing is computed, and kept if it fits."""
        with self.around():
            keys = self.keys(suffix)
            wanted = dict.fromkeys((*keys.prefix, *keys.hidden))
            entries = {key: self._loose.get(key) or self.store.get(key) for key in wanted}
            lacking = [u for u, key in enumerate(keys.prefix) if entries[key] is None]
            rows = [b for b, key in enumerate(keys.hidden) if entries[key] is None]
            if lacking or rows:
                self._loose = {}
                made = self._make(suffix, keys, lacking, rows)
                entries |= made
                self._loose = {k: e for k, e in made.items() if not self.store.put(k, e)}
        return self._assemble(suffix, keys, entries)

    def build(
        self, batches: Iterable[Prepared], tick: Callable[[int], None] = lambda n: None
    ) -> None:
        """Fill the store before training.

        The same rows in the same batches give the same bits, so that a resumed run finds what the
        interrupted one had.

        Args:
            batches: All rows.
            tick: Called with the number of rows after each batch.
        """
        for batch in batches:
            suffix = cutting.split(self.model, batch)
            if suffix is not None and not self.store.is_closed:
                self(suffix)
            tick(batch.num_rows)
        self.forget()

    def forget(self) -> None:
        """Begin a step anew: only what the store keeps is known, as after a resume."""
        self._loose = {}

    def signature(self, batches: Iterable[Prepared]) -> str:
        """Return a hash of all keys that these rows ask for; nothing is computed."""
        found: list[str] = []
        with self.around():
            for batch in batches:
                suffix = cutting.split(self.model, batch)
                if suffix is not None:
                    keys = self.keys(suffix)
                    found += [*keys.prefix, *keys.hidden]
        return digest(*found)

    def keys(self, suffix: Suffix) -> _Keys:
        """Return what the constants of a batch depend on, hashed."""
        self._identity = self._identity or Identity(self.model)
        device = suffix.prepared.input_ids.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        same = (self._identity.digest(), cast, suffix.where.l0 if self.start else -1)
        prefix = [] if suffix.prefix is None else suffix.prefix.keys
        hidden: list[str] = []
        if self.start:
            tokens, where = suffix.whole.input_ids.cpu().numpy(), suffix.where
            places = zip(where.offset.tolist(), where.p0.tolist(), where.stop.tolist())
            for row, (offset, p0, stop) in zip(tokens, places):
                ids = row[offset : offset + stop].tobytes()
                hidden.append(digest("hidden", *same, p0, ids))
        return _Keys([digest("prefix", *same, ids) for ids in prefix], hidden)

    def _make(
        self, suffix: Suffix, keys: _Keys, lacking: list[int], rows: list[int]
    ) -> dict[str, Entry]:
        """Compute the constants of prefixes `lacking` and of the suffixes of `rows`."""
        made: dict[str, Entry] = {}
        prefix, cache, wanted = suffix.prefix, None, lacking
        if prefix is not None:
            wanted = sorted({*lacking, *prefix.rows[rows].tolist()})
            part = prefix.some(wanted)
            cache = causal.prefill(self.model, part)
            if not self._is_checked:
                causal.check_finite(cache)
                self._is_checked = True
            lowest = suffix.where.l0 + 1 if self.start else 0
            for place, u in enumerate(wanted):
                columns = part.valid[place]
                entry: Entry = {}
                for index, layer in enumerate(cache.layers):
                    if index >= lowest:
                        entry[f"k{index}"] = layer.keys[place][:, columns]
                        entry[f"v{index}"] = layer.values[place][:, columns]
                made[keys.prefix[u]] = entry
        if rows:
            places = {u: place for place, u in enumerate(wanted)}
            for b, hidden in zip(rows, self._hidden(suffix, cache, places, rows)):
                made[keys.hidden[b]] = {"hidden": hidden}
        return made

    def _hidden(
        self, suffix: Suffix, cache: DynamicCache | None, places: dict[int, int], rows: list[int]
    ) -> list[Float[Tensor, "_ dim"]]:
        """Return the output of block l0 at the suffixes of `rows`, without padding.

        Args:
            suffix: The batch.
            cache: Keys and values of some prefixes.
            places: Where in the cache a prefix stands.
            rows: Rows of the batch.
        """
        batch, where = suffix.prepared, suffix.where
        extra = {name: tensor[rows] for name, tensor in batch.extra.items()}
        if cache is not None and suffix.prefix is not None:
            own = [places[u] for u in suffix.prefix.rows[rows].tolist()]
            extra["past_key_values"] = FrozenPrefix(
                [layer.keys for layer in cache.layers],
                [layer.values for layer in cache.layers],
                suffix.prefix.width,
                torch.tensor(own, device=batch.input_ids.device),
            )
        block = blocks_of(self.model).modules[where.l0]
        found = capture(self.model, block, input_ids=batch.input_ids[rows], **extra)
        self._sizes = [found.size]
        sizes = (where.stop - where.p0)[rows].tolist()
        return [states[:size] for states, size in zip(found.hidden, sizes)]

    def _assemble(
        self, suffix: Suffix, keys: _Keys, entries: dict[str, Entry | None]
    ) -> causal.Given:
        """Pad entries to a batch."""
        device = suffix.prepared.input_ids.device
        prefix = None
        if suffix.prefix is not None:
            width = suffix.prefix.width
            rows = suffix.prefix.rows if len(keys.prefix) < len(suffix.prefix.rows) else None
            parts = [entries[key] for key in keys.prefix]
            layers = range(len(blocks_of(self.model).modules))
            states = [
                [
                    _left([part[f"{kind}{layer}"] for part in parts], width, device)
                    if f"{kind}{layer}" in parts[0]
                    else None
                    for layer in layers
                ]
                for kind in "kv"
            ]
            prefix = FrozenPrefix(*states, width, rows)
        if not self.start:
            return causal.Given(prefix)
        weight = next(blocks_of(self.model).modules[suffix.where.l0].parameters())
        device = device if weight.is_meta else weight.device  # of a model over several devices
        hidden = _right([entries[key]["hidden"] for key in keys.hidden], device)
        return causal.Given(prefix, hidden, self._size(suffix))

    def _size(self, suffix: Suffix) -> int | None:
        """Return what blocks return; learned once where all constants are of an earlier run."""
        if not self._sizes:
            block = blocks_of(self.model).modules[0]
            ids = suffix.prepared.input_ids[:1, :1]
            self._sizes = [capture(self.model, block, input_ids=ids).size]
        return self._sizes[0]


def _left(
    parts: list[Float[Tensor, "heads _ dim"]], width: int, device: torch.device
) -> Float[Tensor, "prefixes heads {width} dim"]:
    """Pad keys or values of prefixes on the left with zeros."""
    first = parts[0]
    if len(parts) == 1 and first.shape[1] == width:
        return first[None].to(device, non_blocking=True)
    out = _zeros((len(parts), first.shape[0], width, first.shape[2]), first, device)
    for row, part in zip(out, parts):
        row[:, width - part.shape[1] :] = part
    return out.to(device, non_blocking=True)


def _right(
    parts: list[Float[Tensor, "_ dim"]], device: torch.device
) -> Float[Tensor, "rows seq dim"]:
    """Pad hidden states of suffixes on the right with zeros."""
    out = _zeros((len(parts), max(map(len, parts)), parts[0].shape[1]), parts[0], device)
    for row, part in zip(out, parts):
        row[: len(part)] = part
    return out.to(device, non_blocking=True)


def _zeros(
    shape: tuple[int, ...], like: Float[Tensor, "*other"], device: torch.device
) -> Float[Tensor, "*shape"]:
    """Return zeros beside `like`; pinned where they go to a GPU, whose copy then overlaps."""
    pin = device.type == "cuda" and like.device.type == "cpu"
    return torch.zeros(shape, dtype=like.dtype, device=like.device, pin_memory=pin)
