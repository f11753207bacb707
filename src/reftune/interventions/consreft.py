"""ConsReFT: the subspace is set to a constant (LoReFT paper, Table 17)."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from reftune.errors import AdapterError
from reftune.interventions.base import Edit, LowRankConfig, masked
from reftune.interventions.lobireft import Lobireft


class Consreft(Lobireft):
    """Constant in a subspace.

    h' = h + Rᵀ(b − R h),   R ∈ ℝ^{r×d} with orthonormal rows, b ∈ ℝ^r.   Parameters: r·d + r.
    Source: arXiv 2404.03592, Table 17.

    Raises:
        AdapterError: For `init="identity"`: no b makes the edit vanish for every h.
    """

    Config = LowRankConfig
    name = "consreft"
    title = "ConsReFT"
    source = "Wu et al. 2024, arXiv 2404.03592, Table 17"

    @classmethod
    def check(cls, config: LowRankConfig) -> None:
        """Refuse `init="identity"`."""
        if config.init == "identity":
            raise AdapterError(
                "consreft cannot start at the identity: it overwrites R h with a constant "
                '(init is "identity").',
                'Use init "paper", or loreft, which can start at the identity.',
            )

    def edit(
        self, h: Float[Tensor, "sites dim"], select: Bool[Tensor, "sites rank"] | None = None
    ) -> Edit:
        """Compute Rᵀ(b − R h)."""
        rotation = self.rotation(select).to(h.dtype)
        low = self.reft_bias.to(h.dtype) - h @ rotation.T
        return Edit(masked(low, select) @ rotation)

    def as_affine(self) -> None:
        """Return None: the edit depends on h through a full matrix."""
        return None
