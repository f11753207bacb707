"""BREP: prefix training under a restraint on the bias (Liang et al. 2025, arXiv 2511.10707).

The intervention is `red` at `site: mlp.up_proj`; the early-stage intervention is a position rule,
`positions: all_prompt+generated:n` with `train_positions: all`. This file is the rest: which labels
a row has, the loss, and what keeps the bias vectors near a length.

Left out on purpose: the fixed loss weights of the rows (w_i below), which only `reference_quirks`
brings back, and sharded parameters (FSDP), which a restraint refuses.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor, nn
from torch.nn import functional as F

from reftune.errors import AdapterError, RecipeError, TrainingError
from reftune.objectives import prefixes, restraint
from reftune.objectives.base import Loss, Objective, ObjectiveConfig, share_of
from reftune.objectives.restraint import Pid

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftune.config.recipe import AdapterSpec
    from reftune.model.run import Prepared
    from reftune.objectives.base import Run
    from reftune.training.encode import Encoded

log = logging.getLogger(__name__)

PUBLISHED_ROWS, PUBLISHED_WEIGHT = 500, 0.1
"""The published code weighs a row by 500 / rows, 0.1 for its 5,000."""
WHOLE = 1 << 30
"""A length no row has."""


@dataclass(frozen=True)
class BrepConfig(ObjectiveConfig):
    """Settings of BREP."""

    prefix_tokens: int = 64
    """Target tokens k that a prefix row learns; EOS is never one of them."""
    prefix_share: float = 0.9
    """Share of rows that become prefixes. The others learn the whole answer and its EOS."""
    normalise: Literal["sequence", "token"] = "sequence"
    """Mean over rows of the mean over a row's labels, as published; or the mean over labels."""
    restraint: Literal["pid", "project", "hinge", "none"] = "pid"
    """What keeps the bias vectors near the target: `pid` moves the loss weight (as published),
    `project` shortens the vectors after each step, `hinge` adds a penalty, `none` does nothing."""
    target: float = 1.0
    """Length of a bias vector, before `limit`."""
    limit: float = 0.8
    """Share of `target` that is aimed at: τ = target · limit."""
    weight_start: float = Pid.weight
    """Loss weight ω at the start; without `pid` it stays so."""
    weight_min: float = Pid.low
    """Least ω."""
    weight_max: float = Pid.high
    """Largest ω. As published it equals the start, so that ω can only fall at first."""
    k_p: float = Pid.k_p
    """Gain of the error τ − mean length."""
    k_i: float = Pid.k_i
    """Gain of its sum."""
    k_d: float = Pid.k_d
    """Gain of its change."""
    gain: float = Pid.gain
    """Factor on all three."""
    every: int = Pid.every
    """Optimiser steps between two corrections of ω."""
    hinge_weight: float = 1.0
    """Factor λ of the penalty of `hinge`; ω does not weigh it."""
    seed: int = 42
    """Seed of the draw of prefix rows."""
    reference_quirks: bool = False
    """Train as the published code does, with its mistakes in labels, weights and rounding. For
    comparisons only: every row is as long as `max_len`."""

    def __post_init__(self) -> None:
        above = ("target", "limit", "weight_start", "weight_min", "weight_max", "hinge_weight")
        for name in above:
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise RecipeError(f"{name} is {value}.", "Use a number above 0.")
        for name in ("prefix_tokens", "every"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}.", "Use at least 1.")
        if not 0 <= self.prefix_share <= 1:
            raise RecipeError(f"prefix_share is {self.prefix_share}.", "Use a share from 0 to 1.")
        if not self.weight_min <= self.weight_start <= self.weight_max:
            raise RecipeError(
                f"weight_start is {self.weight_start}, outside of weight_min {self.weight_min} and "
                f"weight_max {self.weight_max}.",
                "Choose one between them.",
            )


class Brep(Objective):
    """Bias-restrained prefix training: ω times the mean loss of answers cut to their beginning.

    L = ω · (1/N) Σ_i (1/|y_i|) Σ_{t ∈ y_i} −log p(y_t | y_<t),   N = rows of the optimiser step,
    y_i = the first k target tokens of a prefix row, all tokens and EOS of a whole row.

    Restraints of the bias vectors b_l of RED, τ = target · limit, n̄ = mean_l ‖b_l‖:

    - `pid`: e = τ − n̄ moves ω, see `reftune.objectives.restraint.Pid`;
    - `project`: b_l ← b_l · min(1, τ / ‖b_l‖) after each step;
    - `hinge`: L + λ Σ_l max(0, ‖b_l‖ − τ)².

    Without gradients (validation) the loss has neither ω nor the penalty. Metrics: `cross_entropy`
    (the loss without ω) and `token_accuracy`, both averaged like the loss; after each step
    `bias_norm` n̄, `bias_target` τ, `bias_error` e, `omega` (of the next step) and
    `restraint_acted`: 1 where `pid` lowered ω, or the share of vectors that `project` shortened or
    that `hinge` finds too long.

    The published code sums over the rows of a forward pass, with a fixed weight w_i = 500 / rows
    each and ω starting at 500 / rows too: its loss is B · w times ours, B = rows of a forward pass
    (0.8 with 8 and 5,000 rows). Under AdamW a constant factor is felt by `clip` and `eps` only.
    """

    Config = BrepConfig
    name = "brep"
    title = "BREP"
    source = "Liang et al. 2025, arXiv 2511.10707"
    plots: ClassVar = {
        "restraint": (("bias_norm", "bias_target"), ("omega",), ("restraint_acted",))
    }

    config: BrepConfig

    def __init__(self, config: BrepConfig | None = None) -> None:
        super().__init__(config)
        own = self.config
        self.target = own.target * own.limit
        self.vectors: list[nn.Parameter] = []
        self.row_weight = PUBLISHED_WEIGHT
        self.pid = Pid(
            weight=PUBLISHED_WEIGHT if own.reference_quirks else own.weight_start,
            low=own.weight_min,
            high=own.weight_max,
            k_p=own.k_p,
            k_i=own.k_i,
            k_d=own.k_d,
            gain=own.gain,
            every=own.every,
            last=-1 if own.reference_quirks else 0,
        )

    # Before training

    def check(self, adapter: AdapterSpec) -> None:
        """Refuse a restraint of an adapter without bias vectors."""
        from reftune import interventions
        from reftune.interventions.red import Red

        if self.config.restraint == "none":
            return
        known = adapter.method in interventions.names()
        if not known or not issubclass(interventions.get(adapter.method), Red):
            raise RecipeError(
                f"restraint: {self.config.restraint} holds the bias vectors of red, and the "
                f"adapter's method is {adapter.method}.",
                "Use method: red, or restraint: none.",
            )

    def row_limit(self, max_len: int) -> int:
        """Return `max_len`; the published code takes any row and cuts it."""
        return WHOLE if self.config.reference_quirks else max_len

    def training_rows(
        self, rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, max_len: int
    ) -> list[Encoded]:
        """Return the rows with a share of them cut to the first k target tokens."""
        own, eos = self.config, tokenizer.eos_token_id
        chosen = prefixes.draw(rows, own.prefix_share, own.seed)
        log.info(
            "%d of %d rows learn the first %d tokens of their answer",
            sum(chosen),
            len(rows),
            own.prefix_tokens,
        )
        if own.reference_quirks:
            return self._published_rows(rows, chosen, tokenizer, max_len)
        return [
            prefixes.prefix_of(row, own.prefix_tokens, eos) if is_prefix else row
            for row, is_prefix in zip(rows, chosen, strict=True)
        ]

    def _published_rows(
        self,
        rows: Sequence[Encoded],
        chosen: Sequence[bool],
        tokenizer: PreTrainedTokenizerBase,
        max_len: int,
    ) -> list[Encoded]:
        from reftune.tasks.texts import frame

        if any(row.decoder_labels is not None for row in rows):
            raise RecipeError(
                "reference_quirks: the published code knows no encoder-decoder.",
                "Leave it out, or use a causal model.",
            )
        self.row_weight = self.pid.weight = PUBLISHED_ROWS / len(rows)
        lead, settings = list(frame(tokenizer).lead), (tokenizer.eos_token_id, max_len)
        return [
            prefixes.as_published(
                row,
                is_prefix,
                self.config.prefix_tokens,
                len(lead) if lead and row.input_ids[: len(lead)] == lead else 0,
                *settings,
            )
            for row, is_prefix in zip(rows, chosen, strict=True)
        ]

    # Loss

    def __call__(self, run: Run, prepared: Prepared, num_items: Real[Tensor, ""] | None) -> Loss:
        """Return the weighted loss of a batch, with the penalty's share in it."""
        out, own = run(prepared), self.count(prepared)
        losses = F.cross_entropy(out.logits.float(), out.labels, reduction="none")
        hits = (out.logits.argmax(-1) == out.labels).float()
        if self.config.normalise == "sequence":
            labels = torch.bincount(out.rows, minlength=out.num_rows)[out.rows]
            losses, hits = losses / labels, hits / labels
        total = losses.sum()
        metrics = {
            "cross_entropy": total.detach() / own.clamp(min=1),
            "token_accuracy": hits.sum() / own.clamp(min=1),
        }
        loss = share_of(total, num_items, own)
        if not torch.is_grad_enabled():
            return Loss(loss, metrics)
        factor = self.pid.weight
        if self.config.reference_quirks:
            factor *= self.row_weight * prepared.num_rows
        loss = loss * factor
        if self.config.restraint == "hinge":
            loss = loss + self._penalty(loss) * share_of(own.float(), num_items, own)
        return Loss(loss, metrics)

    def _penalty(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        excess = restraint.excess(self.vectors, self.target)
        return self.config.hinge_weight * excess.to(loss.device)

    def count(self, prepared: Prepared) -> Int[Tensor, ""]:
        """Return the rows that have a label, or with `normalise: token` the labels."""
        labelled = prepared.labels != prefixes.IGNORE
        if self.config.normalise == "token":
            return labelled.sum()
        return labelled.reshape(len(labelled), -1).any(1).sum()

    # Restraint

    def bind(self, trained: Mapping[str, nn.Parameter], sharded: bool = False) -> None:
        """Find the bias vectors of RED.

        Raises:
            AdapterError: If a restraint has none to hold.
            TrainingError: If a restraint would see parts of them only.
        """
        kind = self.config.restraint
        self.vectors = [] if sharded else restraint.red_biases(trained)
        if kind == "none":
            return
        if sharded:
            raise TrainingError(
                f"restraint: {kind} needs whole bias vectors; FSDP leaves a part of them to each "
                "process.",
                "Use DDP (accelerate launch --multi_gpu), or restraint: none.",
            )
        if not self.vectors:
            names = ", ".join(sorted({name.rpartition(".")[2] for name in trained})) or "nothing"
            raise AdapterError(
                f"restraint: {kind} holds the bias vectors of red, and none is trained. Trained: "
                f"{names}.",
                "Train an adapter of method red, or use restraint: none.",
            )

    def after_step(self) -> dict[str, float]:
        """Act on ω or on the vectors; return lengths, error and what was done."""
        if not self.vectors:
            return {}
        kind, acted = self.config.restraint, 0.0
        if kind == "project":
            acted = restraint.project_(self.vectors, self.target)
        norms = restraint.lengths(self.vectors)
        if self.config.reference_quirks:
            norms = [round(norm, 2) for norm in norms]
        mean = math.fsum(norms) / len(norms)
        if kind == "pid":
            acted = float(self.pid.update(self.target - mean))
        elif kind == "hinge":
            acted = sum(norm > self.target for norm in norms) / len(norms)
        return {
            "bias_norm": mean,
            "bias_target": self.target,
            "bias_error": self.target - mean,
            "omega": self.pid.weight,
            "restraint_acted": acted,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the controller."""
        return self.pid.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the state of the controller."""
        self.pid.load_state_dict(state)
