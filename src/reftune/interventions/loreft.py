"""LoReFT: low-rank linear subspace edit (Wu et al. 2024, arXiv 2404.03592, eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reftune.errors import AdapterError
from reftune.interventions.base import (
    ACTIVATIONS,
    Edit,
    Intervention,
    LowRankConfig,
    Orthonormal,
    linear_parameter,
    masked,
    reset_linear_,
)


@dataclass(frozen=True)
class LoreftConfig(LowRankConfig):
    """Settings of LoReFT."""

    activation: Literal["none", "relu", "gelu", "silu", "tanh", "sigmoid"] = "none"
    """Function sigma on the source term: sigma(W h + b)."""


class Loreft(Orthonormal, Intervention):
    """Low-rank linear subspace edit.

    h' = h + Rᵀ(σ(W h + b) − R h),   R ∈ ℝ^{r×d} with orthonormal rows, W ∈ ℝ^{r×d}, b ∈ ℝ^r.
    Parameters per site: 2·r·d + r.   Source: arXiv 2404.03592, eq. 2; subspaces: appendix G.1.

    With `init="identity"` W = R and b = 0, so that h' = h.

    Raises:
        AdapterError: For `init="identity"` with an activation: no W and b make σ(W h + b) = R h.
    """

    Config = LoreftConfig
    name = "loreft"
    title = "LoReFT"
    source = "Wu et al. 2024, arXiv 2404.03592, eq. 2"
    subspaces = True

    @classmethod
    def check(cls, config: LoreftConfig) -> None:
        """Refuse `init="identity"` with an activation."""
        if config.init == "identity" and config.activation != "none":
            raise AdapterError(
                f"loreft cannot start at the identity with an activation (activation is "
                f'"{config.activation}").',
                'Use activation "none", init "paper", or noreft, which can.',
            )

    def __init__(self, config: LoreftConfig, dim: int) -> None:
        super().__init__(config, dim)
        self._make_rotation(config.rank, dim)
        self.reft_weight = linear_parameter(config.rank, dim)
        self.reft_bias = nn.Parameter(torch.zeros(config.rank, dtype=torch.float32))

    @torch.no_grad()
    def reset(self) -> None:
        """Initialise R orthogonal; W and b like nn.Linear, or W = R and b = 0 for identity."""
        self._reset_rotation()
        if self.config.init == "identity":
            self.reft_weight.copy_(self.rotation())
            self.reft_bias.zero_()
        else:
            reset_linear_(self.reft_weight, self.reft_bias)

    def weight(self, h: Float[Tensor, "sites dim"]) -> Float[Tensor, "sites rank"] | None:
        """Return weights of the dimensions, or None for 1. Subclasses override it."""
        return None

    def edit(
        self, h: Float[Tensor, "sites dim"], select: Bool[Tensor, "sites rank"] | None = None
    ) -> Edit:
        """Compute Rᵀ(σ(W h + b) − R h)."""
        rotation = self.rotation(select).to(h.dtype)
        weight, bias = self.reft_weight.to(h.dtype), self.reft_bias.to(h.dtype)
        if self.config.activation == "none":
            low = nn.functional.linear(h, weight - rotation, bias)
        else:
            activation = ACTIVATIONS[self.config.activation]
            low = activation(nn.functional.linear(h, weight, bias)) - h @ rotation.T
        scale = self.weight(h)
        low = masked(low if scale is None else low * scale, select)
        return Edit(low @ rotation, scale)

    @classmethod
    def num_parameters(cls, config: LoreftConfig, dim: int) -> int:
        """Return 2·r·d + r."""
        return 2 * config.rank * dim + config.rank
