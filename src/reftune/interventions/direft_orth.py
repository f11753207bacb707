"""DiReFT with orthonormal rows: the ablation h + Rᵀ(W h + b) of the LoReFT paper, Table 17."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from reftune.errors import AdapterError
from reftune.interventions.base import ACTIVATIONS, Edit, masked
from reftune.interventions.loreft import Loreft, LoreftConfig


class DireftOrth(Loreft):
    """Low-rank edit without the difference term.

    h' = h + Rᵀ σ(W h + b),   R ∈ ℝ^{r×d} with orthonormal rows.   Parameters per site: 2·r·d + r.
    Source: arXiv 2404.03592, Table 17 (the class the reference code calls Direft).

    With `init="identity"` W = 0 and b = 0.

    Raises:
        AdapterError: For `init="identity"` with relu or sigmoid.
    """

    Config = LoreftConfig
    name = "direft_orth"
    title = "DiReFT-orth"
    source = "Wu et al. 2024, arXiv 2404.03592, Table 17"

    @classmethod
    def check(cls, config: LoreftConfig) -> None:
        """Refuse `init="identity"` where sigma(0) is not 0, or where no gradient would flow."""
        if config.init == "identity" and config.activation in ("relu", "sigmoid"):
            why = "is not 0 at 0" if config.activation == "sigmoid" else "passes no gradient at 0"
            raise AdapterError(
                f"direft_orth cannot start at the identity with {config.activation}, which {why}.",
                'Use gelu, silu or tanh, init "paper", or direft, which can.',
            )

    def reset(self) -> None:
        """Initialise as LoReFT; W = 0 and b = 0 for identity."""
        super().reset()
        if self.config.init == "identity":
            nn.init.zeros_(self.reft_weight)

    def edit(
        self, h: Float[Tensor, "sites dim"], select: Bool[Tensor, "sites rank"] | None = None
    ) -> Edit:
        """Compute Rᵀ σ(W h + b)."""
        low = F.linear(h, self.reft_weight.to(h.dtype), self.reft_bias.to(h.dtype))
        low = masked(ACTIVATIONS[self.config.activation](low), select)
        return Edit(low @ self.rotation(select).to(h.dtype))
