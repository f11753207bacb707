"""DiReFT as the paper defines it: no orthogonality and no difference term (eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reftune.interventions.base import (
    ACTIVATIONS,
    Edit,
    Intervention,
    LowRankConfig,
    linear_parameter,
    masked,
    reset_linear_,
)


@dataclass(frozen=True)
class DireftConfig(LowRankConfig):
    """Settings of DiReFT."""

    activation: Literal["none", "relu", "gelu", "silu", "tanh", "sigmoid"] = "none"
    """Function sigma on the source term: sigma(W1 h + b)."""


class Direft(Intervention):
    """Direct low-rank edit.

    h' = h + W2ᵀ σ(W1 h + b),   W1, W2 ∈ ℝ^{r×d} free, b ∈ ℝ^r.
    Parameters per site: 2·r·d + r.   Source: arXiv 2404.03592, eq. 3.

    The reference code calls this class Nodireft; its Direft keeps the rows orthonormal and is our
    `direft_orth`. With `init="identity"` W1 = 0 and b = 0; with an activation W2 = 0 instead, since
    sigma(0) need not be 0 and relu passes no gradient at 0.
    """

    Config = DireftConfig
    name = "direft"
    title = "DiReFT"
    source = "Wu et al. 2024, arXiv 2404.03592, eq. 3"
    subspaces = True

    def __init__(self, config: DireftConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.reft_weight = linear_parameter(config.rank, dim)
        self.reft_bias = nn.Parameter(torch.zeros(config.rank, dtype=torch.float32))
        self.reft_projection = linear_parameter(config.rank, dim)

    @torch.no_grad()
    def reset(self) -> None:
        """Initialise like nn.Linear; for identity as the class says."""
        reset_linear_(self.reft_projection)
        reset_linear_(self.reft_weight, self.reft_bias)
        if self.config.init == "paper":
            return
        if self.config.activation == "none":
            self.reft_weight.zero_()
            self.reft_bias.zero_()
        else:
            self.reft_projection.zero_()

    def edit(
        self, h: Float[Tensor, "sites dim"], select: Bool[Tensor, "sites rank"] | None = None
    ) -> Edit:
        """Compute W2ᵀ σ(W1 h + b)."""
        low = nn.functional.linear(h, self.reft_weight.to(h.dtype), self.reft_bias.to(h.dtype))
        low = masked(ACTIVATIONS[self.config.activation](low), select)
        return Edit(low @ self.reft_projection.to(h.dtype))

    @classmethod
    def num_parameters(cls, config: DireftConfig, dim: int) -> int:
        """Return 2·r·d + r."""
        return 2 * config.rank * dim + config.rank
