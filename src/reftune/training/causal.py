"""Causal caching in training: sources of constants, the check of both paths, the door of loops.

The mechanism is `reftune.model.causal`, the decision `reftune.training.plan`. With several
processes the main one decides for all; a store in memory is kept by each (its budget divided), one
on disk is filled and read by all together.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reftune.model import causal, cutting
from reftune.model.lookup import placed
from reftune.model.sites import base_of
from reftune.report.files import standing
from reftune.training.constants import DiskStore, Store
from reftune.training.plan import SAMPLE, Plan, Settings, make_plan, size_text, with_mode
from reftune.training.processes import (
    agreed,
    is_main_process,
    local_world_size,
    rank,
    together,
    world_size,
)
from reftune.training.stored import Stored

if TYPE_CHECKING:
    from reftune.model.run import Prepared

__all__ = ["Settings", "Stored", "difference", "make_source", "settle"]

log = logging.getLogger(__name__)

Kept = causal.Recompute | Stored
"""A source that knows, until it is told to `forget`, what it computed before."""
Batches = Callable[[int | None], Iterator["Prepared"]]
"""Returns batches of the first n rows, or of all."""


def make_source(
    model: nn.Module,
    plan: Plan,
    store: Store | None = None,
    around: causal.Around = nullcontext,
) -> Kept | None:
    """Return the source of a plan, or None where nothing is held constant.

    Args:
        model: The model with its adapters.
        plan: From `make_plan`.
        store: Where `store` keeps constants; default host memory within the plan's budget.
        around: Makes a context for passes of the base model: autocast.
    """
    if plan.mode == "off":
        return None
    if plan.mode == "recompute":
        return causal.Recompute(model, around)
    # An empty store is false, like any empty container.
    return Stored(model, Store(plan.budget) if store is None else store, plan.start, around)


# --- the check before a run ----------------------------------------------------------------------

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative difference of loss and gradient; 5e-2 in lower precision."""


def difference(
    model: nn.Module,
    loss: Callable[[], Float[Tensor, ""]],
    cached_loss: Callable[[], Float[Tensor, ""]],
) -> float:
    """Return the largest relative difference of loss and gradients between two paths.

    Gradients that were there, and the state of random numbers, are left as they were.

    Args:
        model: The model.
        loss: Computes the loss without caching.
        cached_loss: Computes it with caching.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    found = []
    for function in (loss, cached_loss):
        with _without_dropout(model), torch.random.fork_rng(devices=devices):
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
    inside = [m for s in placed(model) for m in s.modules() if m is not s and m.training]
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
    return TOLERANCE.get(base.dtype, 5e-2)


def _compared(
    model: nn.Module,
    loss: Callable[[causal.Source | None], Callable[[], Float[Tensor, ""]]],
    source: causal.Source,
    around: causal.Around,
) -> tuple[str, bool]:
    """Try both paths on one batch; return what was seen, and whether it allows caching."""
    try:
        found = difference(model, loss(None), loss(source))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "not compared: one batch without caching does not fit into memory", True
    except Exception as error:  # of an architecture nobody has seen: the plain path is always there
        log.debug("causal caching failed", exc_info=True)
        return f"caching failed on one batch, {type(error).__name__}: {error}", False
    with around():
        allowed = tolerance(model)
    if found <= allowed:
        return f"both paths agree to {found:.0e}", True
    return f"both paths differ on one batch by {found:.1e}, {allowed:.0e} is rounding", False


# --- the door of training loops ------------------------------------------------------------------


def settle(
    model: nn.Module,
    batches: Batches,
    num_rows: int,
    loss: Callable[[causal.Source | None], Callable[[], Float[Tensor, ""]]],
    settings: Settings,
    around: causal.Around = nullcontext,
    progress: Callable[[int, int], None] = lambda done, total: None,
    refusal: str | None = None,
) -> tuple[Plan, Kept | None]:
    """Plan, check both paths on one batch, and fill the store. All processes must call it.

    Args:
        model: The model, on its device and in the state in which it will be trained.
        batches: Returns batches of the first n rows, or of all.
        num_rows: Rows of the data.
        loss: Returns a function that computes the loss of the first batch with a source.
        settings: What the recipe says.
        around: Makes a context for passes of the base model: autocast.
        progress: Called with rows done and all rows while the store is filled.
        refusal: What the loop knows to rule caching out.

    Raises:
        TrainingError: If a mode is asked for where it would be wrong.
    """
    if settings.mode == "off" or settings.before == "off":
        why = "as the recipe says" if settings.mode == "off" else "as before the interruption"
        plan = Plan("off", why)
        log.info(plan.line())
        return plan, None
    was_training = model.training
    model.train()
    try:
        plan = agreed(_plan(model, batches, num_rows, settings, around, refusal))
        if plan.mode == "off":
            log.info(plan.line())
            return plan, None
        store = _store(plan, settings) if plan.mode == "store" else None
        source = make_source(model, plan, store, around)
        content = _opened(source, batches)
        seen, is_right = agreed(_compared(model, loss, source, around))
        if not is_right:
            plan = with_mode(plan, "off", seen)
            log.warning("%s; the run goes on without caching", plan.line())
            return plan, None
        log.info("%s; %s", plan.line(), seen)
        if plan.dead:
            log.info("%s", plan.dead)
        if isinstance(source, Stored):
            _fill(source, batches, num_rows, content, progress)
        return plan, source
    finally:
        model.train(was_training)


def _plan(
    model: nn.Module,
    batches: Batches,
    num_rows: int,
    settings: Settings,
    around: causal.Around,
    refusal: str | None,
) -> Plan:
    if settings.before is None:
        sharers = local_world_size() if settings.folder is None else 1
        settings = replace(settings, budget=settings.room() / sharers)
    with around():
        plan = make_plan(model, batches(SAMPLE), settings, num_rows, refusal)
    is_free = settings.mode == "auto" and settings.before is None
    if is_free and plan.mode == "store" and settings.folder is not None and is_main_process():
        slow = _slow_disk(model, next(batches(SAMPLE)), plan, around, settings.folder)
        if slow is not None:
            plan = with_mode(plan, "recompute" if plan.p0 else "off", slow)
    return plan


def _slow_disk(
    model: nn.Module, batch: Prepared, plan: Plan, around: causal.Around, folder: Path
) -> str | None:
    """Return why the constants of a batch are computed sooner than read from the disk, or None."""
    suffix = cutting.split(model, batch)
    if suffix is None:
        return None
    with tempfile.TemporaryDirectory(dir=standing(folder)) as place:
        source = Stored(model, Store(math.inf), plan.start, around)
        source(suffix)  # once before the clock runs
        source = Stored(model, Store(math.inf), plan.start, around)
        begun = time.perf_counter()
        source(suffix)
        computing = time.perf_counter() - begun
        for key, entry in source.store.entries.items():
            save_file(entry, Path(place) / key)
            _flush(Path(place) / key)
        begun = time.perf_counter()
        for key in source.store.entries:
            for tensor in load_file(Path(place) / key).values():
                tensor.sum()
        reading = time.perf_counter() - begun
    if reading < computing:
        return None
    rate = size_text(source.store.nbytes / max(reading, 1e-9))
    return f"the disk reads {rate} a second: computing constants again is faster"


def _flush(file: Path) -> None:
    """Write a file through to the disk and forget the copy in memory, so that reading reads."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _store(plan: Plan, settings: Settings) -> Store:
    if settings.folder is None:
        return Store(plan.budget)
    return DiskStore(plan.budget / world_size(), settings.folder)


def _opened(source: causal.Source, batches: Batches) -> str:
    """Empty a store on disk that holds other constants; return what it must hold."""
    store = getattr(source, "store", None)
    if not isinstance(source, Stored) or not isinstance(store, DiskStore):
        return ""
    content = source.signature(batches(None))
    if is_main_process() and store.sealed != content:
        store.empty()
    together()
    store.refresh()
    return content


def _fill(
    source: Stored,
    batches: Batches,
    num_rows: int,
    content: str,
    progress: Callable[[int, int], None],
) -> None:
    """Compute all constants; on disk each process computes its share, and all read everything."""
    store, done = source.store, 0
    is_shared = isinstance(store, DiskStore)
    if is_shared and store.sealed == content:
        return
    share = (rank(), None, world_size()) if is_shared else (0, None, 1)

    def tick(rows: int) -> None:
        nonlocal done
        done += rows * share[2]
        progress(min(done, num_rows), num_rows)

    source.build(itertools.islice(batches(None), *share), tick)
    if isinstance(store, DiskStore):
        together()
        if is_main_process():
            store.seal(content)
        together()
        store.refresh()
