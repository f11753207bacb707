"""Ridge regression in closed form, float64, with the penalty chosen on rows kept back for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

STRENGTHS: tuple[float, ...] = tuple(10.0**power for power in range(-8, 3))
"""Penalties to choose from, as shares of the mean variance of the directions that occur."""


@dataclass(frozen=True)
class Ridge:
    """A fitted line, y ≈ (x − x̄)·w + ȳ.

    Attributes:
        weight: w.
        centre: x̄, the mean of the rows it was fitted on.
        intercept: ȳ.
        penalty: λ.
    """

    weight: Float[Tensor, " dim"]
    centre: Float[Tensor, " dim"]
    intercept: float
    penalty: float

    def predict(self, x: Float[Tensor, "rows dim"]) -> Float[Tensor, " rows"]:
        """Return y of new rows."""
        return (x.double() - self.centre) @ self.weight + self.intercept


def fit(
    x: Float[Tensor, "rows dim"], y: Float[Tensor, " rows"], strengths: Sequence[float]
) -> list[Ridge]:
    """Fit one line for each strength of the penalty.

    w = argmin Σ_i ((x_i − x̄)·w + ȳ − y_i)² + λ‖w‖² = V diag(s_k/(s_k² + λ)) Uᵀ(y − ȳ)

    where X − x̄ = U diag(s) Vᵀ. The intercept is not penalised. λ = strength · Σ s_k²/K with K the
    number of singular values, so that a strength means the same in every layer.

    Args:
        x: Inputs, a row each.
        y: What to predict.
        strengths: Penalties relative to the scale of x; 0 is least squares of smallest norm.
    """
    x, y = x.double(), y.double()
    centre, intercept = x.mean(0), y.mean()
    u, s, vt = torch.linalg.svd(x - centre, full_matrices=False)
    # Directions that do not occur would be divided by rounding errors.
    s = torch.where(s > s.max() * max(x.shape) * torch.finfo(s.dtype).eps, s, 0.0)
    turned = u.T @ (y - intercept)
    unit = float(s.square().mean())
    lines = []
    for strength in strengths:
        share = torch.where(s > 0, s / (s.square() + strength * unit), 0.0)
        lines.append(Ridge(vt.T @ (share * turned), centre, float(intercept), strength * unit))
    return lines


def fit_chosen(
    x: Float[Tensor, "rows dim"],
    y: Float[Tensor, " rows"],
    kept_back: Int[Tensor, " some"],
    strengths: Sequence[float] = STRENGTHS,
) -> Ridge:
    """Choose the strength on rows kept back, then fit on all rows.

    Args:
        x: Inputs.
        y: What to predict.
        kept_back: Places of the rows that choose; the smallest squared error wins, on a tie the
            stronger penalty.
        strengths: What to choose from.
    """
    x, y = x.double(), y.double()
    mask = torch.ones(len(x), dtype=torch.bool)
    mask[kept_back] = False
    lines = fit(x[mask], y[mask], strengths)
    errors = [float((line.predict(x[~mask]) - y[~mask]).square().mean()) for line in lines]
    best = min(zip(errors, (-strength for strength in strengths)))[1]
    return fit(x, y, [-best])[0]


def r_squared(y: Float[ndarray, " rows"], predicted: Float[ndarray, " rows"]) -> float:
    """Return R² = 1 − Σ(y − ŷ)²/Σ(y − ȳ)²; nan where all y are the same.

    Arrays, not tensors: a bootstrap asks many times for a few rows.

    >>> r_squared(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 2.0]))
    0.0
    """
    spread = float(np.square(y - y.mean()).sum())
    return 1 - float(np.square(y - predicted).sum()) / spread if spread > 0 else float("nan")
