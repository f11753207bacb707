"""The plan of causal caching: which mode, what it saves, and why.

`recompute` pays if the prefix of the median row has at least 16 tokens and a quarter of the row;
`store` if, besides, every example is used three times or more and all constants fit into half of
the free memory. `store` also pays without a prefix where blocks can be left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from reftune.errors import TrainingError
from reftune.model import causal
from reftune.model.lookup import sites
from reftune.model.obstacles import obstacle, start_obstacle
from reftune.model.sites import base_of

if TYPE_CHECKING:
    from reftune.model.run import Prepared

Mode = Literal["auto", "off", "recompute", "store"]

LEAST_PREFIX, LEAST_SHARE, LEAST_USES, MEMORY_SHARE = 16, 0.25, 3, 0.5
SAMPLE = 256
"""Rows a plan looks at."""


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
        memory = f", {size_text(self.nbytes)} of constants" if self.mode == "store" else ""
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
    reason = obstacle(model)
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
    found.start = found.l0 >= 1 and start_obstacle(model) is None
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
                why = f"{size_text(found.nbytes)} of constants do not fit into {size_text(budget)}"
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
        predicts = (batch.labels != causal.IGNORE).roll(-1, 1)
        edited += int(where.edited.sum())
        useful += int((where.edited & predicts).sum())
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


def size_text(nbytes: float) -> str:
    """Return a number of bytes in words.

    >>> size_text(3 * 2**20)
    '3 MiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    raise AssertionError
