"""NoReFT: LoReFT without orthogonality (LoReFT paper, Table 17)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from reftune.interventions.base import ACTIVATIONS, Edit, masked
from reftune.interventions.direft import Direft, DireftConfig


class Noreft(Direft):
    """Low-rank edit with the difference term but free rows.

    h' = h + W2ᵀ(σ(W1 h + b) − W2 h),   W1, W2 ∈ ℝ^{r×d} free.   Parameters per site: 2·r·d + r.
    Source: arXiv 2404.03592, Table 17.   With `init="identity"` W1 = W2 and b = 0,
    with an activation W2 = 0 instead.
    """

    Config = DireftConfig
    name = "noreft"
    title = "NoReFT"
    source = "Wu et al. 2024, arXiv 2404.03592, Table 17"

    @torch.no_grad()
    def reset(self) -> None:
        """Initialise like nn.Linear; for identity as the class says."""
        super().reset()
        if self.config.init == "identity" and self.config.activation == "none":
            self.reft_weight.copy_(self.reft_projection)

    def edit(
        self, h: Float[Tensor, "sites dim"], select: Bool[Tensor, "sites rank"] | None = None
    ) -> Edit:
        """Compute W2ᵀ(σ(W1 h + b) − W2 h)."""
        projection = self.reft_projection.to(h.dtype)
        source = F.linear(h, self.reft_weight.to(h.dtype), self.reft_bias.to(h.dtype))
        low = ACTIVATIONS[self.config.activation](source) - h @ projection.T
        return Edit(masked(low, select) @ projection)
