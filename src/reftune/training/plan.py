"""The plan of causal caching: which mode, what it saves, and why.

`recompute` pays if the prefix of the median row has at least 16 tokens and a quarter of the row;
`store` if, besides, every constant is used three times or more (epochs x rows that share a prompt)
and all fit into half of the free memory (or disk). `store` also pays without a prefix where blocks
can be left out; what they put out belongs to one row.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from reftune.errors import TrainingError
from reftune.model import cutting
from reftune.model.lookup import blocks_of, placed
from reftune.model.obstacles import model_obstacle, obstacle, start_obstacle
from reftune.model.sites import base_of
from reftune.report.files import standing, write_json_atomic

if TYPE_CHECKING:
    from reftune.model.run import Prepared

Mode = Literal["auto", "off", "recompute", "store"]

LEAST_PREFIX, LEAST_SHARE, LEAST_USES, MEMORY_SHARE = 16, 0.25, 3, 0.5
SAMPLE = 256
"""Rows a plan looks at."""
PLAN_FILE = "causal.json"
"""File of a checkpoint that says what was decided."""
UNCUT = "rows are packed, have holes, carry further inputs or are too long for fixed rotary angles"


@dataclass(frozen=True)
class Settings:
    """What a recipe says about causal caching.

    Attributes:
        mode: `auto`, `off`, `recompute` or `store`.
        uses: How often each row is used: epochs.
        samples: Rows that share a prompt, on average over all rows.
        budget: Bytes for the store; None: half of what is free.
        folder: Keep the store on disk, here.
        before: Mode that an interrupted run had; the resumed one goes on with it.
    """

    mode: Mode = "auto"
    uses: float = 1
    samples: float = 1
    budget: float | None = None
    folder: Path | None = None
    before: str | None = None

    def resumed(self, checkpoint: str | bool | None) -> Settings:
        """Return settings that go on as a checkpoint's run did: free memory may have changed."""
        file = Path(checkpoint) / PLAN_FILE if isinstance(checkpoint, str) else None
        if file is None or not file.is_file():
            return self
        found = json.loads(file.read_text(encoding="utf-8"))
        return replace(self, before=found["mode"], budget=found["budget"])

    def room(self) -> float:
        """Return the bytes that all constants may take."""
        if self.budget is not None:
            return self.budget
        if self.folder is None:
            return MEMORY_SHARE * free_memory()
        return MEMORY_SHARE * shutil.disk_usage(standing(self.folder)).free


@dataclass
class Plan:
    """What is constant, what is done about it, and why.

    Attributes:
        mode: `off`, `recompute` or `store`.
        why: Reason in words.
        first_layer: First edited layer; None: not known.
        l0: Last block whose output no edit has touched; -1: there is none.
        num_blocks: Blocks of the model.
        p0: First token of the suffix, median over rows.
        length: Tokens of a row, median.
        constant_share: Share of all tokens that stand before the suffix.
        sharing: Rows that share a prefix, on average.
        start: Whether stored runs leave out the blocks up to l0.
        nbytes: Bytes of all constants if they are stored, estimated.
        budget: Bytes they may take.
        cost: Arithmetic of a step over that without caching, head left out, estimated.
        dead: Edited places that never get a gradient, as words; empty if none.
    """

    mode: str
    why: str
    first_layer: int | None = None
    l0: int = -1
    num_blocks: int = 0
    p0: float = 0
    length: float = 0
    constant_share: float = 0.0
    sharing: float = 1.0
    start: bool = False
    nbytes: float = 0
    budget: float = 0
    cost: float = 1.0
    dead: str = ""

    @property
    def speed_up(self) -> float:
        """Expected speed-up of a step, by arithmetic."""
        return 1.0 / max(self.cost, 1e-9)

    def write(self, folder: Path) -> None:
        """Write the plan into a checkpoint."""
        write_json_atomic(folder / PLAN_FILE, asdict(self))

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

    def figures(self) -> dict[str, Any]:
        """Return what there is to know before a run, as values: bytes, tokens from 0."""
        return {
            "mode": self.mode,
            "why": self.why,
            "first_layer": self.first_layer,
            "first_token": self.p0,
            "median_tokens": self.length,
            "constant_share": self.constant_share,
            "constant_blocks": self.l0 + 1,
            "store_bytes": self.nbytes,
            "store_budget": self.budget,
            "speed_up": self.speed_up,
            "dead": self.dead,
            "text": self.line(),
        }

    def facts(self) -> dict[str, str]:
        """Return the same as names and texts."""
        found = {"mode": f"{self.mode} ({self.why})"}
        if not self.length:
            return found
        blocks = f"; blocks 0 to {self.l0} are constant" if self.l0 >= 0 else ""
        speed = "none" if self.mode == "off" else f"about {self.speed_up:.3g} times a step"
        return found | {
            "first layer": f"{self.first_layer} of {self.num_blocks}, counted from 0{blocks}",
            "first token": f"{self.p0:g} of {self.length:g} (median row), counted from 0",
            "constant": f"{self.constant_share:.0%} of the tokens",
            "store": f"{size_text(self.nbytes)} for all rows, of {size_text(self.budget)} allowed",
            "speed-up": f"{speed}, by arithmetic",
            "dead": self.dead or "no edit is without a gradient",
        }


def make_plan(
    model: nn.Module,
    batches: Iterable[Prepared],
    settings: Settings | None = None,
    num_rows: int | None = None,
    refusal: str | None = None,
) -> Plan:
    """Decide how a model is trained on rows like these.

    Args:
        model: The model in the state in which it will be trained.
        batches: A sample of the rows.
        settings: What the recipe asks for; default `auto`.
        num_rows: Rows of the whole data; default those of the sample.
        refusal: What else rules caching out.

    Raises:
        TrainingError: If `recompute` or `store` is asked for where it would be wrong.
    """
    settings = settings or Settings()
    refusal = refusal or obstacle(model)
    found = Plan("off", "")
    if placed(model) and model_obstacle(model) is None:
        found, uncut = _measure(model, list(batches), num_rows, settings.samples)
        refusal = refusal or uncut or _without_gain(found, settings)
    found.budget = settings.room()
    if refusal is not None and settings.mode in ("recompute", "store"):
        raise TrainingError(
            f"causal: {settings.mode} is not possible: {refusal}.", "Set causal: auto or off."
        )
    if settings.mode == "off" or refusal is not None:
        why = "as the recipe says" if settings.mode == "off" else str(refusal)
        return replace(found, why=why, start=False)
    return _choose(found, settings)


def _without_gain(found: Plan, settings: Settings) -> str | None:
    """Return why a mode that is asked for would hold nothing constant, or None.

    A resumed run goes on as it began: its recipe may no longer change.
    """
    mode = settings.mode
    if mode not in ("recompute", "store") or settings.before is not None or found.constant_share:
        return None
    if mode == "recompute":
        return "no row has a token before its first edit or label"
    if found.start:
        return None
    return "no row has a token before its first edit or label, and no block can be left out"


def _measure(
    model: nn.Module, batches: list[Prepared], num_rows: int | None, samples: float
) -> tuple[Plan, str | None]:
    """Return what is constant in a sample of rows, and what is in the way of using it."""
    cuts = [(cutting.cut(model, batch), batch) for batch in batches if batch.labels.dim() == 2]
    good = [(where, batch) for where, batch in cuts if where is not None and not batch.extra]
    if not good or len(good) < len(batches):
        return Plan("off", ""), UNCUT
    p0 = torch.cat([where.p0 for where, _ in good]).tolist()
    lengths = torch.cat([where.length for where, _ in good]).tolist()
    found = Plan(
        "off",
        "",
        first_layer=min((s.layer for s in placed(model) if cutting.active(s)), default=None),
        l0=good[0][0].l0,
        num_blocks=len(blocks_of(model).modules),
        p0=statistics.median(p0),
        length=statistics.median(lengths),
        constant_share=sum(p0) / sum(lengths),
        dead=_dead(model, [where for where, _ in good]),
    )
    found.start = found.l0 >= 1 and start_obstacle(model) is None
    scale = max(1.0, (num_rows or 0) / len(p0))
    prefixes = _different_prefixes(good)
    if prefixes:
        found.sharing = sum(place > 0 for place in p0) / len(prefixes)
    own = sum(prefixes) * found.sharing  # tokens of prefixes if the rows of the sample shared none
    if scale > 1:  # a sample hides that its prompts come again
        found.sharing = max(found.sharing, samples)
    rest = sum(lengths) - sum(p0)
    found.nbytes = _bytes(model, scale * own / found.sharing, scale * rest, found)
    return found, None


def _different_prefixes(cuts: list[tuple[cutting.Cut, Prepared]]) -> list[int]:
    """Return the lengths of the different prefixes of some batches."""
    found: dict[bytes, int] = {}
    for where, batch in cuts:
        prefix = cutting.prefixes(batch, where)
        found |= zip(prefix.keys, prefix.lengths.tolist())
    return [length for length in found.values() if length]


def _choose(found: Plan, settings: Settings) -> Plan:
    is_long = found.p0 >= max(LEAST_PREFIX, LEAST_SHARE * found.length)
    fits = found.nbytes <= found.budget
    mode, why = settings.mode, "as the recipe says"
    # Rows share prefixes; the outputs of blocks that are left out are each row's own.
    uses, what = settings.uses, "row"
    if is_long and found.sharing > 1:
        uses, what = uses * found.sharing, "prefix"
    if settings.before is not None:
        mode, why = settings.before, "as before the interruption"
    elif mode == "auto":
        if uses >= LEAST_USES and fits and (is_long or found.start):
            mode, why = "store", f"every {what} is used {uses:.3g} times"
        elif is_long:
            mode, why = "recompute", "rows are used too seldom to store them"
            if uses >= LEAST_USES:
                room = size_text(found.budget)
                why = f"{size_text(found.nbytes)} of constants do not fit into {room}"
        elif found.p0 < LEAST_PREFIX:
            mode, why = "off", f"the first edit or label stands at token {found.p0:g}"
        else:
            mode, why = "off", f"only {found.constant_share:.0%} of the tokens are constant"
    return with_mode(found, mode, why)


def with_mode(found: Plan, mode: str, why: str) -> Plan:
    """Return a plan with another mode, and what it then costs."""
    start = found.start and mode == "store"
    return replace(found, mode=mode, why=why, start=start, cost=_cost(found, mode))


def _cost(plan: Plan, mode: str) -> float:
    """Return the arithmetic of a step over that of plain hooks (a block pass of a token is 1)."""
    n, l0, total, p0 = plan.num_blocks, max(plan.l0, 0), plan.length, plan.p0
    whole = total * (2 * n - 1 - l0)
    if mode == "recompute":
        return (p0 * n + (total - p0) * (2 * n - 1 - l0)) / whole
    if mode == "store":
        # Above the last block nothing is left but the edit and the head.
        rest = max(1, 2 * (n - 1 - l0)) if plan.start else 2 * n - 1 - l0
        return (total - p0) * rest / whole
    return 1.0


def _bytes(model: nn.Module, before: float, behind: float, plan: Plan) -> float:
    """Return the bytes of constants: keys and values, and block outputs if they start later.

    Args:
        model: The model.
        before: Tokens of all different prefixes.
        behind: Tokens of the suffixes of all rows.
        plan: Tells which blocks are left out.
    """
    base = base_of(model)
    config = base.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    width = blocks_of(model).dim
    head = getattr(config, "head_dim", None) or width // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = base.dtype.itemsize  # of what is computed; quantised weights are smaller
    if torch.is_autocast_enabled(base.device.type):
        size = 2
    kept = plan.num_blocks - (plan.l0 + 1 if plan.start else 0)
    total = before * 2 * kv_heads * head * kept
    if plan.start:
        total += behind * width
    return total * size


def _dead(model: nn.Module, cuts: list[cutting.Cut]) -> str:
    """Say which edits of the last block can never be trained: those off the label columns."""
    last = len(blocks_of(model).modules) - 1
    on_top = [s for s in placed(model) if s.outer and s.layer == last and cutting.active(s)]
    if not on_top:
        return ""
    edited = sum(int(where.edited.sum()) for where in cuts)
    useful = sum(int((where.edited & where.predicts).sum()) for where in cuts)
    if useful == edited:
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
