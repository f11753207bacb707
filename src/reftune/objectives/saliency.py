"""Token weights of NLFT: what guidance says of each token of a model's own answer.

Pure functions of probabilities. Tokens of several answers stand one after the other; `rows` says
which answer a token belongs to, and nothing crosses from one answer to another.

Notation, for token t of an answer y to a question: p_b = P(y_t) behind the question, p_s behind the
question and its right solution, p_j behind the question and a judgment of a wrong answer.

Source of the constants: the published code of Liu et al. 2024, arXiv 2412.20382.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from reftune.errors import RecipeError

Rule = Literal["reference", "similar"]

FLOOR = 1e-5
"""Least 1 − p under the logarithm of an unlikely-to-be token."""


@dataclass(frozen=True)
class Constants:
    """The numbers in the weights."""

    sure: float = 0.95
    """Right answers: tokens with p_s above this are salient (set S)."""
    sure_power: float = 5.0
    """Their weight is 1 + ((p_s − sure) / (1 − sure)) to this power: 1 to 2."""
    near_power: float = 0.3
    """Weight of their neighbours: (p_s / sure) to this power."""
    far_power: float = 0.6
    """Weight of all other tokens: (p_s / sure) to this power."""
    nll_weight: float = 1.0
    """Right answers: plain likelihood that is added to each token's weight."""
    ratio: float = 1.5
    """Wrong answers: tokens with p_j / p_b and p_j / p_s above this are wrong (set U)."""
    least: float = 0.01
    """And with p_j above this."""
    threshold: float = 1.5
    """Weight of a wrong token: unlike_scale · sigmoid(p_j / p_b − threshold)."""
    unlike_scale: float = 2.0
    """Largest weight of a wrong token."""
    keep_power: float = 0.5
    """Wrong answers: weight of the other tokens, p_s to this power."""
    most_wrong: float = 0.06
    """Wrong answers with a larger share of wrong tokens learn no other token."""
    distance: float = 0.4
    """Cosine distance that decides whether a neighbour joins."""
    cluster_rule: Rule = "reference"
    """`reference`: neighbours further away than `distance` join, as in the published code, which
    calls the distance a similarity; `similar`: nearer ones, presumably what was meant."""

    def __post_init__(self) -> None:
        if not 0 < self.sure < 1:
            raise RecipeError(f"sure is {self.sure}.", "Use a probability between 0 and 1.")
        for name in ("least", "most_wrong"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name} is {getattr(self, name)}.", "Use a number from 0 to 1.")
        positive = ("sure_power", "near_power", "far_power", "keep_power", "nll_weight", "ratio")
        for name in (*positive, "unlike_scale", "distance"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise RecipeError(f"{name} is {getattr(self, name)}.", "Use 0 or more.")


@dataclass
class Saliency:
    """What guidance says of each token.

    Attributes:
        weights: w, 0 or more.
        marked: S of right answers, U of wrong ones.
        near: Their neighbours (cluster without S or U).
        wrong: Whether the token's answer was judged wrong.
        crowded: Whether it was so wrong that its other tokens are left out.
    """

    weights: Float[Tensor, " tokens"]
    marked: Bool[Tensor, " tokens"]
    near: Bool[Tensor, " tokens"]
    wrong: Bool[Tensor, " tokens"]
    crowded: Bool[Tensor, " tokens"]

    def factors(self, nll_weight: float = 1.0) -> Float[Tensor, " tokens"]:
        """Return one signed number a token: the whole of what training needs.

        w + nll_weight in right answers, w in wrong ones, −w where a token is to become unlikely.

        Args:
            nll_weight: Plain likelihood added in right answers.
        """
        signed = torch.where(self.marked & self.wrong, -self.weights, self.weights)
        return torch.where(self.wrong, signed, signed + nll_weight)


@torch.no_grad()
def saliency(
    p_base: Float[Tensor, " tokens"],
    p_std: Float[Tensor, " tokens"],
    p_judge: Float[Tensor, " tokens"],
    hidden: Float[Tensor, "tokens dim"],
    rows: Int[Tensor, " tokens"],
    wrong: Bool[Tensor, " tokens"],
    constants: Constants | None = None,
) -> Saliency:
    """Weigh the tokens of right and of wrong answers. No gradient flows into weights.

    Right: S = {p_s > 0.95}; w = 1 + ((p_s − 0.95)/0.05)⁵ in S, (p_s/0.95)^0.3 in cluster(S) \\ S,
    (p_s/0.95)^0.6 elsewhere.

    Wrong: U = {p_j/p_b > 1.5, p_j/p_s > 1.5, p_j > 0.01}; w = 2 σ(p_j/p_b − 1.5) in U, 0 in
    cluster(U) \\ U, √p_s elsewhere, but 0 there too if |U|/N > 0.06.

    Args:
        p_base: p_b.
        p_std: p_s.
        p_judge: p_j; not read in right answers.
        hidden: Last hidden state that predicts each token, behind the question alone.
        rows: Answer of each token; tokens of one answer stand together.
        wrong: Whether that answer has a judgment.
        constants: The numbers; default the published ones.

    >>> from torch import tensor
    >>> p, zero = tensor([1.0, 0.9, 0.5], dtype=torch.double), torch.zeros(3)
    >>> h, row = torch.ones(3, 2), torch.zeros(3, dtype=torch.long)
    >>> saliency(p, p, zero, h, row, zero.bool()).weights.tolist()
    [2.0, 0.968..., 0.680...]
    """
    own = constants or Constants()
    tiny = torch.finfo(p_base.dtype).tiny
    ratio = p_judge / p_base.clamp(min=tiny)  # 0/0 is 0: not told apart from "as likely as not"
    is_wrong = (ratio > own.ratio) & (p_judge / p_std.clamp(min=tiny) > own.ratio)
    marked = torch.where(wrong, is_wrong & (p_judge > own.least), p_std > own.sure)
    near = cluster(marked, hidden, rows, own.distance, own.cluster_rule) & ~marked

    surely = 1 + ((p_std - own.sure).clamp(min=0) / (1 - own.sure)) ** own.sure_power
    scaled = p_std / own.sure
    right_weights = torch.where(near, scaled**own.near_power, scaled**own.far_power)
    right_weights = torch.where(marked, surely, right_weights)

    unlike = own.unlike_scale * torch.sigmoid(ratio - own.threshold)
    shares = mean_of_rows((marked & wrong).to(p_std.dtype), rows)
    crowded = wrong & (shares > own.most_wrong)
    kept = torch.where(near | crowded, 0.0, p_std**own.keep_power)
    weights = torch.where(wrong, torch.where(marked, unlike, kept), right_weights)
    return Saliency(weights, marked, near, wrong, crowded)


def cluster(
    seeds: Bool[Tensor, " tokens"],
    hidden: Float[Tensor, "tokens dim"],
    rows: Int[Tensor, " tokens"],
    distance: float = 0.4,
    rule: Rule = "reference",
) -> Bool[Tensor, " tokens"]:
    """Return the seeds with the neighbours that join them.

    From each seed a walk goes left and one goes right. With d = 1 − cos(centre, h_next), the next
    token joins if d > distance (`reference`) or d < distance (`similar`), and the centre becomes
    the mean of centre and h_next; else, and at the end of the answer, the walk stops. All walks of
    all answers take their steps together.

    Args:
        seeds: S or U.
        hidden: Hidden state of each token.
        rows: Answer of each token.
        distance: Where neighbours are told apart.
        rule: Which of them join.

    >>> from torch import tensor
    >>> h = tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    >>> seeds, rows = tensor([True, False, False]), torch.zeros(3, dtype=torch.long)
    >>> cluster(seeds, h, rows).tolist(), cluster(seeds, h, rows, rule="similar").tolist()
    ([True, True, False], [True, False, False])
    """
    found, last = seeds.clone(), len(seeds) - 1
    start = seeds.nonzero()[:, 0]
    place, centre = torch.cat([start, start]), torch.cat([hidden[start], hidden[start]])
    step = torch.cat([torch.ones_like(start), -torch.ones_like(start)])
    while len(place):
        following = (place + step).clamp(0, last)
        inside = (following == place + step) & (rows[following] == rows[place])
        beside = hidden[following]
        apart = 1 - F.cosine_similarity(centre, beside, dim=-1)
        joins = inside & (apart > distance if rule == "reference" else apart < distance)
        found[following[joins]] = True
        place, step = following[joins], step[joins]
        centre = (centre[joins] + beside[joins]) / 2
    return found


def token_losses(
    log_p: Float[Tensor, " tokens"], factors: Float[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """Return f · −log p, and |f| · −log(1 − p) where the factor f is negative.

    log(1 − p) comes from log p without loss of digits, and 1 − p never falls below 1e-5.

    Args:
        log_p: log p_b, with gradients.
        factors: From `Saliency.factors`, without.

    >>> from torch import tensor
    >>> token_losses(tensor([0.5, 0.5]).log(), tensor([1.0, -2.0])).tolist()
    [0.693..., 1.386...]
    """
    absent = torch.log((-torch.expm1(log_p)).clamp(min=FLOOR))
    return torch.where(factors < 0, factors * absent, -factors * log_p)


def mean_of_rows(
    values: Float[Tensor, " tokens"], rows: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """Return for each token the mean over its answer.

    >>> mean_of_rows(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0, 0, 3])).tolist()
    [1.5, 1.5, 5.0]
    """
    count = int(rows.max()) + 1 if len(rows) else 0
    sums = values.new_zeros(count).index_add(0, rows, values)
    return (sums / torch.bincount(rows, minlength=count).clamp(min=1))[rows]
