"""LobiReFT: a learned constant in an orthonormal subspace (LoReFT paper, Table 17)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reftune.interventions.base import Edit, Intervention, LowRankConfig, Orthonormal, masked


class Lobireft(Orthonormal, Intervention):
    """Low-rank bias.

    h' = h + Rᵀ b,   R ∈ ℝ^{r×d} with orthonormal rows, b ∈ ℝ^r.   Parameters per site: r·d + r.
    Source: arXiv 2404.03592, Table 17.   `init="identity"`: b = 0; `paper`: b uniform in [0, 1).
    """

    Config = LowRankConfig
    name = "lobireft"
    title = "LobiReFT"
    source = "Wu et al. 2024, arXiv 2404.03592, Table 17"
    subspaces = True

    def __init__(self, config: LowRankConfig, dim: int) -> None:
        super().__init__(config, dim)
        self._make_rotation(config.rank, dim)
        self.reft_bias = nn.Parameter(torch.zeros(config.rank, dtype=torch.float32))

    @torch.no_grad()
    def reset(self) -> None:
        """Initialise R orthogonal and b as `config.init` says."""
        self._reset_rotation()
        if self.config.init == "identity":
            self.reft_bias.zero_()
        else:
            nn.init.uniform_(self.reft_bias)

    def edit(
        self, h: Float[Tensor, "sites dim"], select: Bool[Tensor, "sites rank"] | None = None
    ) -> Edit:
        """Compute Rᵀ b for every row of h."""
        low = self.reft_bias.to(h.dtype).expand(h.shape[0], -1)
        return Edit(masked(low, select) @ self.rotation(select).to(h.dtype))

    def as_affine(self) -> tuple[Float[Tensor, " dim"], Float[Tensor, " dim"]]:
        """Return (1, Rᵀ b): the edit is a constant shift."""
        with torch.no_grad():
            shift = self.reft_bias @ self.rotation()
        return torch.ones_like(shift), shift

    @classmethod
    def num_parameters(cls, config: LowRankConfig, dim: int) -> int:
        """Return r·d + r."""
        return config.rank * dim + config.rank
