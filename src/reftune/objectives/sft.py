"""Supervised fine-tuning: token cross-entropy on the target.

Left out on purpose: label smoothing, z-loss, packing. The papers of the LoReFT family use none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Real
from torch import Tensor
from torch.nn import functional as F

from reftune.objectives.base import Loss, Objective, share_of

if TYPE_CHECKING:
    from reftune.model.run import Prepared
    from reftune.objectives.base import Run


class Sft(Objective):
    """Mean negative log-likelihood of the target tokens given what stands before them.

    L = −(1/N) Σ_rows Σ_t log p(y_t | y_<t),   t over labelled tokens, N = their number in the whole
    optimiser step (all accumulation steps and processes), so that 1 × 8 rows equals 8 × 1.

    No settings. Metric: `token_accuracy`, the share of labelled tokens that are the arg max.
    """

    name = "sft"
    title = "Supervised"
    source = "Wu et al. 2024, arXiv 2404.03592, section 3.2 (teacher forcing)"

    def __call__(self, run: Run, prepared: Prepared, num_items: Real[Tensor, ""] | None) -> Loss:
        """Return the cross-entropy at the labels, summed and divided by N."""
        out = run(prepared)
        total = F.cross_entropy(out.logits.float(), out.labels, reduction="sum")
        metrics = {}
        if len(out.labels):
            metrics["token_accuracy"] = (out.logits.argmax(-1) == out.labels).float().mean()
        return Loss(share_of(total, num_items, self.count(prepared)), metrics)
