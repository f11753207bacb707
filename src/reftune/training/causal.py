"""Causal caching in training: where constants come from, and the check of both paths before a run.

The mechanism is `reftune.model.causal`, the decision `reftune.training.plan`.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reftune.model import causal
from reftune.model.lookup import sites
from reftune.model.sites import base_of
from reftune.training.constants import DiskStore, Store, digest, fingerprint
from reftune.training.plan import MEMORY_SHARE, SAMPLE, Mode, Plan, free_memory, make_plan

if TYPE_CHECKING:
    from reftune.model.run import Prepared

log = logging.getLogger(__name__)

# --- the source that keeps constants -------------------------------------------------------------


@dataclass
class Stored:
    """Source that keeps what it computed.

    Args:
        model: The model with its adapters.
        store: Where constants are kept.
        start: Whether to leave out the blocks up to l0.
        around: Makes a context for passes of the base model: autocast.
    """

    model: nn.Module
    store: Store
    start: bool = False
    around: Callable[[], AbstractContextManager] = nullcontext
    _print: str | None = field(default=None, repr=False)
    _size: int | None = field(default=None, repr=False)

    def __call__(self, suffix: causal.Suffix) -> causal.Given:
        """Return the constants of a batch; what is missing is computed and kept if it fits."""
        keys = self._keys(suffix)
        entries = {key: self.store.get(key) for key in {*keys.prefix, *keys.hidden}}
        lacking = [u for u, key in enumerate(keys.prefix) if entries[key] is None]
        rows = [b for b, key in enumerate(keys.hidden) if entries[key] is None]
        if lacking or rows:
            with self.around():
                entries |= self._make(suffix, keys, lacking, rows)
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
            suffix = causal.split(self.model, batch)
            if suffix is not None:
                self(suffix)
            tick(batch.num_rows)

    def _keys(self, suffix: causal.Suffix) -> _Keys:
        if self._print is None:
            self._print = fingerprint(base_of(self.model), sites(self.model))
        device = suffix.prepared.input_ids.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        l0 = suffix.where.l0 if self.start else -1
        same = (self._print, cast, l0)
        prefix: list[str] = []
        if suffix.prefix is not None:
            for ids, length in zip(suffix.prefix.ids.cpu(), suffix.prefix.lengths.tolist()):
                prefix.append(digest("prefix", *same, ids[:length].numpy().tobytes()))
        hidden: list[str] = []
        if self.start:
            where, whole = suffix.where, suffix.whole
            tokens = whole.input_ids.cpu()
            for row, p0, offset, length in zip(tokens, where.p0, where.offset, where.length):
                ids = row[int(offset) : int(offset) + int(length)]
                hidden.append(digest("hidden", *same, int(p0), ids.numpy().tobytes()))
        return _Keys(prefix, hidden)

    def _make(
        self, suffix: causal.Suffix, keys: _Keys, lacking: list[int], rows: list[int]
    ) -> dict[str, dict[str, Tensor]]:
        """Compute and keep the constants of prefixes `lacking` and of the suffixes of `rows`."""
        made: dict[str, dict[str, Tensor]] = {}
        prefix, cache, wanted = suffix.prefix, None, lacking
        if prefix is not None:
            wanted = sorted({*lacking, *(int(prefix.rows[b]) for b in rows)})
            part = causal.Prefix(prefix.ids[wanted], prefix.lengths[wanted], prefix.rows)
            valid = part.valid
            cache = causal.prefill(self.model, part)
            lowest = suffix.where.l0 + 1 if self.start else 0
            for place, u in enumerate(wanted):
                columns = valid[place]
                entry: dict[str, Tensor] = {}
                for index, layer in enumerate(cache.layers):
                    if index >= lowest:
                        entry[f"k{index}"] = layer.keys[place][:, columns]
                        entry[f"v{index}"] = layer.values[place][:, columns]
                made[keys.prefix[u]] = entry
        if rows:
            places = {u: place for place, u in enumerate(wanted)}
            for b, hidden in zip(rows, self._hidden(suffix, cache, places, rows)):
                made[keys.hidden[b]] = {"hidden": hidden}
        for key, entry in made.items():
            self.store.put(key, entry)
        return made

    def _hidden(
        self, suffix: causal.Suffix, cache: Any, places: dict[int, int], rows: list[int]
    ) -> list[Tensor]:
        """Return the output of block l0 at the suffixes of `rows`, without padding."""
        batch, where = suffix.prepared, suffix.where
        extra = {name: tensor[rows] for name, tensor in batch.extra.items()}
        if cache is not None:
            own = [places[int(suffix.prefix.rows[b])] for b in rows]
            index = torch.tensor(own, device=batch.input_ids.device)
            extra["past_key_values"] = causal.FrozenPrefix(
                [layer.keys for layer in cache.layers],
                [layer.values for layer in cache.layers],
                suffix.prefix.ids.shape[1],
                index,
            )
        block = causal.blocks_of(self.model).modules[where.l0]
        found = causal.capture(self.model, block, input_ids=batch.input_ids[rows], **extra)
        self._size = found.size
        sizes = (where.length - where.p0)[rows].tolist()
        return [states[:size] for states, size in zip(found.hidden, sizes)]

    def _assemble(
        self, suffix: causal.Suffix, keys: _Keys, entries: dict[str, Any]
    ) -> causal.Given:
        """Pad entries to a batch."""
        device = suffix.prepared.input_ids.device
        prefix = None
        if suffix.prefix is not None:
            width = suffix.prefix.ids.shape[1]
            rows = suffix.prefix.rows if len(keys.prefix) < len(suffix.prefix.rows) else None
            parts = [entries[key] for key in keys.prefix]
            number = len(causal.blocks_of(self.model).modules)
            joined = [
                [_left(parts, f"{kind}{layer}", width, device) for layer in range(number)]
                for kind in "kv"
            ]
            prefix = causal.FrozenPrefix(*joined, width, rows)
        hidden = None
        if self.start:
            hidden = _right([entries[key]["hidden"] for key in keys.hidden], device)
            if self._size is None and len(self.store):
                self._size = self._block_size(suffix)
        return causal.Given(prefix, hidden, self._size)

    def _block_size(self, suffix: causal.Suffix) -> int | None:
        """Learn what a block returns, where all constants came from an earlier run."""
        batch = suffix.prepared
        block = causal.blocks_of(self.model).modules[0]
        ids = batch.input_ids[:1, :1]
        return causal.capture(self.model, block, input_ids=ids).size


@dataclass
class _Keys:
    """Keys of a batch: one a different prefix, one a row (or none)."""

    prefix: list[str]
    hidden: list[str]


def _left(parts: list[dict[str, Tensor]], name: str, width: int, device: torch.device) -> Any:
    """Pad `[heads, p0, dim]` tensors on the left with zeros to `[U, heads, width, dim]`."""
    if name not in parts[0]:
        return None
    if len(parts) == 1 and parts[0][name].shape[1] == width:
        return parts[0][name][None].to(device, non_blocking=True)
    first = parts[0][name]
    out = first.new_zeros(len(parts), first.shape[0], width, first.shape[2])
    for row, part in zip(out, parts):
        row[:, width - part[name].shape[1] :] = part[name]
    return out.to(device, non_blocking=True)


def _right(parts: list[Tensor], device: torch.device) -> Tensor:
    """Pad `[S, d]` tensors on the right with zeros to `[B, S, d]`."""
    width = max(len(part) for part in parts)
    out = parts[0].new_zeros(len(parts), width, parts[0].shape[1])
    for row, part in zip(out, parts):
        row[: len(part)] = part
    return out.to(device, non_blocking=True)


def make_source(
    model: nn.Module,
    plan: Plan,
    store: Store | None = None,
    around: Callable[[], AbstractContextManager] = nullcontext,
) -> causal.Source | None:
    """Return the source of a plan, or None where nothing is held constant.

    Args:
        model: The model with its adapters.
        plan: From `make_plan`.
        store: Where `store` keeps constants; default host memory within half of what is free.
        around: Makes a context for passes of the base model: autocast.
    """
    if plan.mode == "off":
        return None
    if plan.mode == "recompute":
        return causal.Recompute(model, around)
    # An empty store is false, like any empty container.
    return Stored(model, open_store(None, None) if store is None else store, plan.start, around)


def open_store(budget: float | None, folder: Path | None) -> Store:
    """Return a store in memory, or on disk where a folder is given."""
    if folder is None:
        return Store(MEMORY_SHARE * free_memory() if budget is None else budget)
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    return DiskStore(MEMORY_SHARE * free if budget is None else budget, folder)


# --- the check before a run ----------------------------------------------------------------------

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative difference of loss and gradient; 5e-2 in lower precision."""


def difference(
    model: nn.Module, loss: Callable[[], Tensor], cached_loss: Callable[[], Tensor]
) -> float:
    """Return the largest relative difference of loss and gradients between two paths.

    Gradients that were there are left as they were.

    Args:
        model: The model.
        loss: Computes the loss without caching.
        cached_loss: Computes it with caching.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for function in (loss, cached_loss):
        with _without_dropout(model):
            value = function()
            grads = torch.autograd.grad(value, parameters, allow_unused=True)
        found.append((float(value.detach()), [None if g is None else g.double() for g in grads]))
    (first, plain), (second, cached) = found
    scale = max((float(g.abs().max()) for g in plain if g is not None), default=0.0)
    worst = abs(first - second) / max(abs(first), 1e-12)
    for a, b in zip(plain, cached):
        if a is None and b is None:
            continue
        a = torch.zeros_like(b) if a is None else a
        b = torch.zeros_like(a) if b is None else b
        worst = max(worst, float((a - b).abs().max()) / max(scale, 1e-12))
    return worst if math.isfinite(worst) else math.inf


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Switch the interventions' dropout off, which would draw other places on the two paths."""
    inside = [m for s in sites(model) for m in s.modules() if m is not s and m.training]
    try:
        for module in inside:
            module.training = False
        yield
    finally:
        for module in inside:
            module.training = True


def tolerance(model: nn.Module) -> float:
    """Return the difference that rounding explains at the model's precision."""
    base = base_of(model)
    if torch.is_autocast_enabled(base.device.type):
        return 5e-2
    return TOLERANCE.get(next(base.parameters()).dtype, 5e-2)


# --- the door of training loops ------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What a recipe says about causal caching.

    Attributes:
        mode: `auto`, `off`, `recompute` or `store`.
        uses: How often each row is used.
        budget: Bytes for the store; None: half of what is free.
        folder: Keep the store on disk, here.
    """

    mode: Mode = "auto"
    uses: float = 1
    budget: float | None = None
    folder: Path | None = None


def settle(
    model: nn.Module,
    batches: Callable[[int | None], Iterator[Prepared]],
    num_rows: int,
    loss: Callable[[causal.Source | None], Callable[[], Tensor]],
    settings: Settings,
    around: Callable[[], AbstractContextManager] = nullcontext,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Plan, causal.Source | None]:
    """Plan, check both paths on one batch, and fill the store.

    Args:
        model: The model, on its device and in the state in which it will be trained.
        batches: Returns batches of the first n rows, or of all.
        num_rows: Rows of the data.
        loss: Returns a function that computes the loss of the first batch with a source.
        settings: What the recipe says.
        around: Makes a context for passes of the base model: autocast.
        progress: Called with rows done and all rows while the store is filled.

    Raises:
        TrainingError: If a mode is asked for where it would be wrong.
    """
    was_training = model.training
    model.train()
    try:
        plan = make_plan(
            model, batches(SAMPLE), settings.mode, settings.uses, num_rows, settings.budget
        )
        if plan.mode == "off":
            log.info(plan.line())
            return plan, None
        store = None
        if plan.mode == "store":
            store = open_store(settings.budget, settings.folder)
        source = make_source(model, plan, store, around)
        found = difference(model, loss(None), loss(source))
        with around():
            allowed = tolerance(model)
        if found > allowed:
            log.warning(
                "causal: off. Both paths were tried on one batch and differ by %.1e (at most "
                "%.0e is rounding); the run goes on without caching.",
                *(found, allowed),
            )
            return replace(plan, mode="off", why="the two paths differ", cost=1.0), None
        log.info("%s; both paths agree to %.0e", plan.line(), found)
        if plan.dead:
            log.info("%s", plan.dead)
        if isinstance(source, Stored):
            done = 0

            def tick(rows: int) -> None:
                nonlocal done
                done += rows
                progress(done, num_rows)

            source.build(batches(None), tick)
        return plan, source
    finally:
        model.train(was_training)
