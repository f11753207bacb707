"""Contrast between annotated and sampled reasoning, as pure functions (Zhu et al. 2025, CARFT).

A chain of thought becomes one vector; InfoNCE pulls the vector of a sampled chain towards that of
the annotated one (positive signal), or sets what both have in common apart from the rest of the
sampled one (negative signal). Every loss comes back by row: the caller weighs and divides.

Left out on purpose: the jitter and the noised copies of the published variants 1, 3, 5 and 10.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


def pool(
    embeddings: Float[Tensor, "rows steps dim"],
    weights: Float[Tensor, "rows steps"],
    mask: Bool[Tensor, "rows steps"],
) -> tuple[Float[Tensor, "rows dim"], Float[Tensor, " rows"]]:
    """Return one vector a row, z = Σ_t w_t e_t with w = softmax_t(weights + log mask), and H(w).

    A row without a pooled token takes its first. The entropy H(w), in nats and without gradient,
    falls to 0 as the weights collapse onto one token.

    Args:
        embeddings: e_t.
        weights: Logits of the weights: values V_t, log-probabilities, or zeros for a plain mean.
        mask: Which tokens are pooled.
    """
    first = torch.arange(mask.shape[1], device=mask.device) == 0
    mask = mask | (first & ~mask.any(1, keepdim=True))
    shares = weights.masked_fill(~mask, -torch.inf).softmax(1)
    with torch.no_grad():
        entropy = -torch.xlogy(shares, shares).sum(1)
    return torch.einsum("rs,rsd->rd", shares, embeddings), entropy


def cosines(
    left: Float[Tensor, "rows dim"], right: Float[Tensor, "others dim"]
) -> Float[Tensor, "rows others"]:
    """Return cos(left_i, right_j)."""
    return F.normalize(left, dim=1) @ F.normalize(right, dim=1).T


def cosine(
    left: Float[Tensor, "rows dim"], right: Float[Tensor, "rows dim"]
) -> Float[Tensor, " rows"]:
    """Return cos(left_i, right_i)."""
    return (F.normalize(left, dim=1) * F.normalize(right, dim=1)).sum(1)


def positive(
    annotated: Float[Tensor, "rows dim"],
    sampled: Float[Tensor, "rows dim"],
    others: Float[Tensor, "all dim"],
    places: Int[Tensor, " rows"],
    tau: float = 0.2,
    clamp: float = 0.9,
) -> Float[Tensor, " rows"]:
    """Return the positive signal of each row, an InfoNCE loss in nats.

    l_i = −min(cos(z1_i, z2_i), clamp) / τ + log Σ_j exp(cos(z1_i, z2_j) / τ)

    The sum runs over `others`, in which z2_i stands at its own place, with its gradient: the loss
    of a row depends on no other row that is trained beside it.

    Args:
        annotated: z1, of the annotated chains.
        sampled: z2, of the sampled ones.
        others: z2 of everything that is contrasted, as measured at the rollout.
        places: Row of `others` that is each row's own.
        tau: Temperature τ.
        clamp: Cosine above which nothing is gained.
    """
    own = cosine(annotated, sampled)
    near = cosines(annotated, others).scatter(1, places[:, None], own[:, None])
    return (near / tau).logsumexp(1) - own.clamp(max=clamp) / tau


def published(
    annotated: Float[Tensor, "rows dim"],
    sampled: Float[Tensor, "rows dim"],
    right: Bool[Tensor, " rows"],
    tau: float = 0.2,
    clamp: float = 0.9,
) -> Float[Tensor, ""]:
    """Return what the published code of the positive signal computes for a forward pass.

    Σ_i l_i · n / (n + 1e-8),   n right answers: a sum over *all* rows once one is right, because
    its mask [B, 1] meets losses [B]. The vectors in the log-sum carry no gradient there, so that
    nothing is repelled, and below the clamp there is attraction alone.

    Args:
        annotated: z1.
        sampled: z2, with gradient.
        right: Which answers are right.
        tau: Temperature τ.
        clamp: Cosine above which nothing is gained.
    """
    total = (cosines(annotated, sampled.detach()) / tau).logsumexp(1)
    losses = total - cosine(annotated, sampled).clamp(max=clamp) / tau
    hits = right.sum()
    return losses.sum() * hits / (hits + 1e-8)


def negative(
    annotated: Float[Tensor, "rows dim"],
    shared: Float[Tensor, "rows dim"],
    apart: Float[Tensor, "rows dim"],
    others: tuple[Float[Tensor, "all dim"], Float[Tensor, "all dim"]],
    places: Int[Tensor, " rows"],
    tau: float = 0.2,
    clamp: float = 0.9,
) -> Float[Tensor, " rows"]:
    """Return the negative signal of each row, an InfoNCE loss in nats.

    l_i = −min(cos(z1_i, z2_i), clamp) / τ
          + log [ Σ_j exp(cos(z2_i, z2_j) / τ) + Σ_k exp(cos(z2_i, z3_k) / τ) ]

    Args:
        annotated: z1, of the common tokens in the annotated chains.
        shared: z2, of the common tokens in the sampled ones.
        apart: z3, of the sampled chains' other tokens.
        others: z2 and z3 of everything that is contrasted, as measured at the rollout.
        places: Row of `others` that is each row's own.
        tau: Temperature τ.
        clamp: Cosine above which nothing is gained.
    """
    at = places[:, None]
    near = cosines(shared, others[0]).scatter(1, at, cosine(shared, shared)[:, None])
    far = cosines(shared, others[1]).scatter(1, at, cosine(shared, apart)[:, None])
    pull = cosine(annotated, shared).clamp(max=clamp) / tau
    return (torch.cat([near, far], 1) / tau).logsumexp(1) - pull


def common(left: Sequence[int], right: Sequence[int]) -> tuple[list[bool], list[bool]]:
    """Return which tokens of two rows lie on their longest common subsequence.

    Row by row with numpy: O(n · m) comparisons, milliseconds for a thousand tokens each. Of several
    longest ones the one that ends earliest in `left`, then in `right`.

    >>> common([1, 2, 3, 4], [2, 9, 4])
    ([False, True, False, True], [True, False, True])
    """
    a, b = np.asarray(left, dtype=np.int64), np.asarray(right, dtype=np.int64)
    longest = np.zeros((len(a) + 1, len(b) + 1), dtype=np.int32)
    for i, token in enumerate(a, 1):
        above = longest[i - 1]
        here = np.maximum(above[1:], above[:-1] + (b == token))
        longest[i, 1:] = np.maximum.accumulate(here)
    on_left, on_right = [False] * len(a), [False] * len(b)
    i, j = len(a), len(b)
    while i and j:
        if longest[i, j] == longest[i - 1, j]:
            i -= 1
        elif longest[i, j] == longest[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            on_left[i] = on_right[j] = True
    return on_left, on_right
