"""The published equations in float64, written from the papers and not from the code.

Each function takes hidden states `[n, d]` and the plain tensors of one intervention, and returns
h'. `size` is the number of trained parameters of one site.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Equation:
    """What a method must compute.

    Attributes:
        edit: (h, tensors) -> h'.
        size: (d, r) -> trained parameters of a site.
        rank: Settings the matrix uses.
        identity: Whether it can start at the identity.
        rotated: Whether it has an orthonormal R.
    """

    edit: Callable[[Tensor, dict[str, Tensor]], Tensor]
    size: Callable[[int, int], int]
    settings: dict[str, Any] = field(default_factory=lambda: {"rank": 3})
    identity: bool = True
    rotated: bool = False


def _loreft(h: Tensor, p: dict[str, Tensor]) -> Tensor:
    return h + (h @ p["W"].T + p["b"] - h @ p["R"].T) @ p["R"]


def _direft(h: Tensor, p: dict[str, Tensor]) -> Tensor:
    return h + (h @ p["W"].T + p["b"]) @ p["P"]


def _direft_orth(h: Tensor, p: dict[str, Tensor]) -> Tensor:
    return h + (h @ p["W"].T + p["b"]) @ p["R"]


def _noreft(h: Tensor, p: dict[str, Tensor]) -> Tensor:
    return h + (h @ p["W"].T + p["b"] - h @ p["P"].T) @ p["P"]


def _consreft(h: Tensor, p: dict[str, Tensor]) -> Tensor:
    return h + (p["b"] - h @ p["R"].T) @ p["R"]


def _lobireft(h: Tensor, p: dict[str, Tensor]) -> Tensor:
    return h + p["b"] @ p["R"]


def _red(h: Tensor, p: dict[str, Tensor]) -> Tensor:
    return p["s"] * h + p["b"]


EQUATIONS = {
    "loreft": Equation(_loreft, lambda d, r: 2 * r * d + r, rotated=True),
    "direft": Equation(_direft, lambda d, r: 2 * r * d + r),
    "direft_orth": Equation(_direft_orth, lambda d, r: 2 * r * d + r, rotated=True),
    "noreft": Equation(_noreft, lambda d, r: 2 * r * d + r),
    "consreft": Equation(_consreft, lambda d, r: r * d + r, identity=False, rotated=True),
    "lobireft": Equation(_lobireft, lambda d, r: r * d + r, rotated=True),
    "red": Equation(_red, lambda d, r: 2 * d, settings={}),
}
"""Of the methods in this project; others that are installed go through the matrix without one."""


def tensors(intervention: nn.Module) -> dict[str, Tensor]:
    """Return the plain tensors of an intervention in float64; R is checked to be orthonormal."""
    names = {"W": "reft_weight", "b": "reft_bias", "P": "reft_projection", "s": "reft_scale"}
    found = {
        short: getattr(intervention, name).detach().double()
        for short, name in names.items()
        if hasattr(intervention, name)
    }
    if hasattr(intervention, "rotation"):
        found["R"] = intervention.rotation().detach().double()
        assert orthonormality(found["R"]) < 1e-5
    return found


def orthonormality(rows: Tensor) -> float:
    """Return the largest entry of |R Rᵀ - I|."""
    rows = rows.detach().double()
    return float((rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)).abs().max())


def disturb(module: nn.Module, seed: int = 3, scale: float = 0.3) -> None:
    """Move all trained parameters, as training would, so that no term vanishes by its init."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if ".reft_" in f".{name}":
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(scale * noise.to(parameter.device, parameter.dtype))
