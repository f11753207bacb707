"""RED: element-wise scale and bias (Wu et al. 2024, arXiv 2402.15179)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reftune.interventions.base import Edit, Intervention, InterventionConfig


@dataclass(frozen=True)
class RedConfig(InterventionConfig):
    """Settings of RED."""

    train_scale: bool = True
    """Train s; `false` trains the bias only. BREP's paper calls it `train_scaling`."""


class Red(Intervention):
    """Representation editing.

    h' = s ⊙ h + b,   s, b ∈ ℝ^d.   Parameters per site: 2·d (d when only the bias is trained).
    Source: arXiv 2402.15179; as a ReFT: arXiv 2404.03592, appendix B. Published on all tokens.
    Starts at the identity (s = 1, b = 0) whatever `init` says, as published. On the output of
    `mlp.up_proj` it is the intervention of BREP (arXiv 2511.10707), of d = intermediate size.
    """

    Config = RedConfig
    name = "red"
    title = "RED"
    source = "Wu et al. 2024, arXiv 2402.15179"

    def __init__(self, config: RedConfig, dim: int) -> None:
        super().__init__(config, dim)
        if config.train_scale:
            self.reft_scale = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.reft_bias = nn.Parameter(torch.zeros(dim, dtype=torch.float32))

    @torch.no_grad()
    def reset(self) -> None:
        """Set s = 1 and b = 0."""
        if self.config.train_scale:
            self.reft_scale.fill_(1.0)
        self.reft_bias.zero_()

    def edit(
        self, h: Float[Tensor, "sites dim"], select: Bool[Tensor, "sites rank"] | None = None
    ) -> Edit:
        """Compute (s − 1) ⊙ h + b."""
        bias = self.reft_bias.to(h.dtype)
        if not self.config.train_scale:
            return Edit(bias.expand_as(h))
        return Edit(torch.addcmul(bias, self.reft_scale.to(h.dtype) - 1, h))

    def as_affine(self) -> tuple[Float[Tensor, " dim"], Float[Tensor, " dim"]]:
        """Return (s, b)."""
        shift = self.reft_bias.detach().clone()
        scale = (
            self.reft_scale.detach().clone() if self.config.train_scale else torch.ones_like(shift)
        )
        return scale, shift

    @classmethod
    def num_parameters(cls, config: RedConfig, dim: int) -> int:
        """Return 2·d, or d without the scale."""
        return 2 * dim if config.train_scale else dim
