"""Online self-training: learn from one's own right answers, beside the annotated ones.

The baseline of reinforced fine-tuning (Luong et al. 2024, section 4): same warm-up, rollouts and
rate, but no KL penalty, no value function and nothing learned from wrong answers.

Left out on purpose: deduplication of answers, which offline self-training does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor
from torch.nn import functional as F

from reftune.errors import RecipeError
from reftune.objectives import policy
from reftune.objectives.base import Loss
from reftune.objectives.online import Actions, OnlineConfig, OnlineObjective

if TYPE_CHECKING:
    from reftune.objectives.base import Run


@dataclass(frozen=True)
class OnlineStConfig(OnlineConfig):
    """Settings of online self-training."""

    gold_weight: float = 0.5
    """Weight w of the annotated answers; the right own ones get 1 − w. 1 is plain SFT."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gold_weight <= 1:
            raise RecipeError(f"gold_weight is {self.gold_weight}.", "Use a share from 0 to 1.")


class OnlineSt(OnlineObjective):
    """Cross-entropy on the model's own right answers and on the annotated ones.

    L = (1 − w) · (1/N_own) Σ_{i right} Σ_t −log p(y_it) + w · (1/N_gold) Σ_i Σ_t −log p(e_it)

    N_own and N_gold are the tokens of both sums over the whole rollout. Where no answer is right
    the first half is 0 and the second keeps its weight, as published.

    Metrics: those of a rollout, and `gold_loss` (mean over rows of a row's mean).
    """

    Config = OnlineStConfig
    name = "online_st"
    title = "Online self-training"
    source = "Luong et al. 2024, arXiv 2401.08967, section 4 (baselines)"
    gold = True

    config: OnlineStConfig

    def count(self, prepared: Actions) -> Int[Tensor, " 2"]:
        """Return the tokens of right own answers, and of annotated ones."""
        own = (prepared.lengths * prepared.right).sum()
        return torch.stack([own, (prepared.gold.labels != -100).sum()]).cpu()

    def __call__(self, run: Run, prepared: Actions, num_items: Real[Tensor, " 2"] | None) -> Loss:
        """Return both halves of the loss, each divided by its tokens of the whole rollout."""
        share = self.config.gold_weight
        items = self.count(prepared) if num_items is None else num_items
        num_own, num_gold = items.clamp(min=1).tolist()
        out = run(prepared.gold)
        losses = F.cross_entropy(out.logits.float(), out.labels, reduction="none")
        metrics = {"gold_loss": _row_mean(losses.detach(), out.rows, prepared.num_rows)}
        total = share * losses.sum() / num_gold
        if bool(prepared.right.any()):
            out = run(prepared)
            logp = prepared.spread(policy.log_probs(out.logits, out.labels))
            total = total - (1 - share) * (logp.sum(1) * prepared.right).sum() / num_own
        return Loss(total, metrics)


def _row_mean(
    losses: Float[Tensor, " labels"], rows: Int[Tensor, " labels"], num_rows: int
) -> Float[Tensor, ""]:
    """Return the mean over rows of the mean over a row's labels."""
    labels = torch.bincount(rows, minlength=num_rows).clamp(min=1)
    return (losses / labels[rows]).sum() / num_rows
