"""Causal caching in training: which mode, what it costs, where the constants come from.

The mechanism is `reftune.model.causal`. Here: the plan (`auto` decides by the rule below and says
why in one line), the source that keeps constants, and the check of both paths before a run.

`recompute` pays if the prefix of the median row has at least 16 tokens and a quarter of the row;
`store` if, besides, every example is used three times or more and all constants fit into half of
the free memory. `store` also pays without a prefix where blocks can be left out.
"""

from __future__ import annotations

import logging
import math
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from reftune.errors import TrainingError
from reftune.model import causal
from reftune.model.lookup import sites
from reftune.model.sites import base_of
from reftune.training.constants import DiskStore, Store, digest, fingerprint

if TYPE_CHECKING:
    from reftune.model.run import Prepared

log = logging.getLogger(__name__)

Mode = Literal["auto", "off", "recompute", "store"]

LEAST_PREFIX, LEAST_SHARE, LEAST_USES, MEMORY_SHARE = 16, 0.25, 3, 0.5
SAMPLE = 256
"""Rows a plan looks at."""


# --- the plan ------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What is constant, what is done about it, and why.

    Attributes:
        mode: `off`, `recompute` or `store`.
        why: Reason in words.
        l0: Last block whose output no edit has touched; -1: none.
        num_blocks: Blocks of the model.
        p0: First token of the suffix, median over rows.
        length: Tokens of a row, median.
        constant_share: Share of all tokens that stand before the suffix.
        start: Whether stored runs leave out the blocks up to l0.
        nbytes: Bytes of all constants, estimated.
        cost: Arithmetic of a step over that without caching, head left out, estimated.
        dead: Edited places that never get a gradient, as words; empty if none.
    """

    mode: str
    why: str
    l0: int = -1
    num_blocks: int = 0
    p0: float = 0
    length: float = 0
    constant_share: float = 0.0
    start: bool = False
    nbytes: float = 0
    cost: float = 1.0
    dead: str = ""

    def line(self) -> str:
        """Return the plan as one line of a log."""
        if self.mode == "off":
            return f"causal: off ({self.why})"
        memory = f", {_size(self.nbytes)} of constants" if self.mode == "store" else ""
        blocks = f", blocks 0 to {self.l0} left out" if self.start else ""
        return (
            f"causal: {self.mode} ({self.why}): {self.constant_share:.0%} of the tokens are "
            f"constant{blocks}{memory}; a step needs about {self.cost:.2f} of the arithmetic"
        )


def make_plan(
    model: nn.Module,
    batches: Iterable[Prepared],
    mode: Mode = "auto",
    uses: float = 1,
    num_rows: int | None = None,
    budget: float | None = None,
) -> Plan:
    """Decide how a model is trained on rows like these.

    Args:
        model: The model in the state in which it will be trained.
        batches: A sample of the rows.
        mode: What the recipe asks for.
        uses: How often each row is used: epochs x samples a prompt.
        num_rows: Rows of the whole data; default those of the sample.
        budget: Bytes for the store; default half of the free memory.

    Raises:
        TrainingError: If `recompute` or `store` is asked for where it would be wrong.
    """
    if mode == "off":
        return Plan("off", "as the recipe says")
    reason = causal.obstacle(model)
    if reason is not None:
        return _refused(mode, reason)
    cuts = [(causal.cut(model, batch), batch) for batch in batches]
    if not cuts or any(where is None or batch.extra for where, batch in cuts):
        return _refused(mode, "rows are packed, have holes or carry further inputs")
    p0 = torch.cat([where.p0 for where, _ in cuts]).tolist()
    lengths = torch.cat([where.length for where, _ in cuts]).tolist()
    blocks = causal.blocks_of(model).modules
    found = Plan(
        "off",
        "",
        l0=cuts[0][0].l0,
        num_blocks=len(blocks),
        p0=statistics.median(p0),
        length=statistics.median(lengths),
        constant_share=sum(p0) / sum(lengths),
        dead=_dead(model, cuts),
    )
    found.start = found.l0 >= 1 and causal.start_obstacle(model) is None
    scale = (num_rows or len(p0)) / len(p0)
    found.nbytes = scale * _bytes(model, p0, lengths, found)
    return _choose(found, mode, uses, budget)


def _refused(mode: Mode, reason: str) -> Plan:
    if mode != "auto":
        raise TrainingError(
            f"causal: {mode} is not possible: {reason}.", "Set causal: auto or off."
        )
    return Plan("off", reason)


def _choose(found: Plan, mode: Mode, uses: float, budget: float | None) -> Plan:
    is_long = found.p0 >= max(LEAST_PREFIX, LEAST_SHARE * found.length)
    budget = MEMORY_SHARE * free_memory() if budget is None else budget
    fits = found.nbytes <= budget
    if mode == "auto":
        if uses >= LEAST_USES and fits and (is_long or found.start):
            mode, why = "store", f"every row is used {uses:g} times"
        elif is_long:
            mode, why = "recompute", "rows are used too seldom to store them"
            if uses >= LEAST_USES:
                why = f"{_size(found.nbytes)} of constants do not fit into {_size(budget)}"
        elif found.p0 < LEAST_PREFIX:
            mode, why = "off", f"the first edit or label stands at token {found.p0:g}"
        else:
            mode, why = "off", f"only {found.constant_share:.0%} of the tokens are constant"
    else:
        why = "as the recipe says"
    found.start = found.start and mode == "store"
    return replace(found, mode=mode, why=why, cost=_cost(found, mode))


def _cost(plan: Plan, mode: str) -> float:
    """Return the arithmetic of a step over that of plain hooks (a block pass of a token is 1)."""
    n, l0, total, p0 = plan.num_blocks, max(plan.l0, 0), plan.length, plan.p0
    whole = total * (2 * n - 1 - l0)
    if mode == "recompute":
        return (p0 * n + (total - p0) * (2 * n - 1 - l0)) / whole
    if mode == "store":
        rest = 2 * (n - 1 - l0) if plan.start else 2 * n - 1 - l0
        return (total - p0) * rest / whole
    return 1.0


def _bytes(model: nn.Module, p0: Sequence[float], lengths: Sequence[float], plan: Plan) -> float:
    """Return the bytes of the constants of rows: keys and values, and block outputs if they start
    later."""
    base = base_of(model)
    config = base.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    width = causal.blocks_of(model).dim
    head = getattr(config, "head_dim", None) or width // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = next(base.parameters()).element_size()
    if torch.is_autocast_enabled(base.device.type):
        size = 2
    kept = plan.num_blocks - (plan.l0 + 1 if plan.start else 0)
    total = sum(p0) * 2 * kv_heads * head * kept
    if plan.start:
        total += sum(t - p for t, p in zip(lengths, p0)) * width
    return total * size


def _dead(model: nn.Module, cuts: list[tuple[causal.Cut, Prepared]]) -> str:
    """Say which edits of the last block can never be trained: those off the label columns."""
    last = len(causal.blocks_of(model).modules) - 1
    on_top = [s for s in sites(model) if s.outer and s.layer == last and causal.active(s)]
    if not on_top:
        return ""
    edited = useful = 0
    for where, batch in cuts:
        columns = causal.edited_columns(model, batch, where.prompt_lens)
        predicts = (batch.labels != causal.IGNORE).roll(-1, 1)
        edited += int(columns.sum())
        useful += int((columns & predicts).sum())
    if not edited or useful == edited:
        return ""
    return (
        f"{edited - useful} of {edited} edits of the last block (layer {last}) are on tokens that "
        "predict no label and get no gradient"
    )


def free_memory() -> float:
    """Return the bytes of host memory that are free."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    except OSError:
        pass
    return 4e9


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    raise AssertionError


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
