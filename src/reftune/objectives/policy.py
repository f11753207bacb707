"""Policy gradients on answers: rewards, advantages and clipped losses, as pure functions.

Every matrix is `[rows, steps]`: one row an answer, entry t its t-th generated token (an *action*),
EOS included, beginning at column 0. There are no prompt columns and `mask` comes from lengths, so
that padding cannot be taken for an EOS. Rows are right-padded with zeros; each has an action.

What is averaged over rows or processes is returned as sums or by row, never as a mean: the caller
divides by the rows of the whole step.

Left out on purpose: an entropy bonus, a KL term in the loss and adaptive KL weights (Luong et al.
2024 use none), and the bootstrap of truncated answers: their value behind the last action is 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-8
"""Added to a variance before its root is taken."""


def mask_of(lengths: Int[Tensor, " rows"]) -> Bool[Tensor, "rows steps"]:
    """Return which entries are actions.

    >>> mask_of(torch.tensor([2, 1])).tolist()
    [[True, True], [True, False]]
    """
    places = torch.arange(int(lengths.max()), device=lengths.device)
    return places < lengths[:, None]


def log_probs(
    logits: Float[Tensor, "actions vocab"],
    tokens: Int[Tensor, " actions"],
    temperature: float = 1.0,
) -> Float[Tensor, " actions"]:
    """Return log π(a_t | s_t) in nats, computed in fp32 from the logits divided by temperature."""
    return -F.cross_entropy(logits.float() / temperature, tokens, reduction="none")


def entropy(
    logits: Float[Tensor, "actions vocab"], temperature: float = 1.0
) -> Float[Tensor, " actions"]:
    """Return H_t = −Σ_a π(a | s_t) log π(a | s_t) in nats."""
    logs = F.log_softmax(logits.float() / temperature, -1)
    return -(logs.exp() * logs).sum(-1)


def kl_rewards(
    scores: Float[Tensor, " rows"],
    logp: Float[Tensor, "rows steps"],
    reference: Float[Tensor, "rows steps"],
    mask: Bool[Tensor, "rows steps"],
    beta: float,
) -> Float[Tensor, "rows steps"]:
    """Return the reward of each action: the score on the last one, less a penalty on all.

    R_t = [t = T] · score − β · (log π(a_t) − log π_0(a_t)),   T the last action.

    The penalty is the k1 estimate of the KL divergence, of the sampled token only: it may be
    negative (Luong et al. 2024, section 3; the paper writes the full divergence, the published
    code computes this).

    Args:
        scores: Score of each answer.
        logp: log π of the policy that wrote the answers.
        reference: log π_0 of the frozen policy.
        mask: Which entries are actions.
        beta: Weight β of the penalty.
    """
    rewards = -beta * (logp - reference) * mask
    last = mask.sum(1) - 1
    rewards[torch.arange(len(scores), device=scores.device), last] += scores.to(rewards.dtype)
    return rewards


def gae(
    rewards: Float[Tensor, "rows steps"],
    values: Float[Tensor, "rows steps"],
    mask: Bool[Tensor, "rows steps"],
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Tensor, "rows steps"], Float[Tensor, "rows steps"]]:
    """Return generalised advantage estimates and returns (Schulman et al. 2016, eq. 16).

    δ_t = R_t + γ V_{t+1} − V_t,   A_t = δ_t + γ λ A_{t+1},   Ret_t = A_t + V_t

    with V = 0 behind the last action, whether it is EOS or the answer was cut off there.

    Args:
        rewards: R_t.
        values: V_t of the policy that wrote the answers.
        mask: Which entries are actions.
        gamma: Discount γ.
        lam: λ, from 0 (one step) to 1 (whole returns).
    """
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(rewards)
    following, next_value = rewards.new_zeros(len(rewards)), rewards.new_zeros(len(rewards))
    for step in reversed(range(rewards.shape[1])):
        delta = rewards[:, step] + gamma * next_value - values[:, step]
        following = (delta + gamma * lam * following) * mask[:, step]
        advantages[:, step], next_value = following, values[:, step]
    return advantages, advantages + values


def moments(
    entries: Float[Tensor, "rows steps"], mask: Bool[Tensor, "rows steps"]
) -> Float[Tensor, " 3"]:
    """Return sum, sum of squares and number of the actions' entries, float64 on the CPU.

    Those of several batches and processes add up, whatever their sizes.

    >>> moments(torch.tensor([[1.0, 2.0], [4.0, 9.0]]), mask_of(torch.tensor([2, 1]))).tolist()
    [7.0, 21.0, 3.0]
    """
    own = entries[mask].detach().cpu().double()
    return torch.stack([own.sum(), (own * own).sum(), torch.tensor(len(own)).double()])


def spread(found: Float[Tensor, " 3"]) -> tuple[float, float]:
    """Return mean and unbiased variance of what `moments` counted; 0 for less than two."""
    total, squares, number = found.tolist()
    mean = total / max(number, 1.0)
    return mean, max(0.0, squares - number * mean * mean) / max(number - 1.0, 1.0)


def whiten(
    entries: Float[Tensor, "rows steps"],
    mask: Bool[Tensor, "rows steps"],
    found: Float[Tensor, " 3"],
) -> Float[Tensor, "rows steps"]:
    """Return (A − mean) / √(var + 1e-8) at actions, 0 elsewhere.

    Args:
        entries: Advantages A.
        mask: Which entries are actions.
        found: `moments` of all rows of the rollout, over all processes. One action in all becomes
            0: there is nothing to compare it with.
    """
    mean, variance = spread(found)
    return (entries - mean) * (variance + EPSILON) ** -0.5 * mask


def row_means(
    entries: Float[Tensor, "rows steps"], mask: Bool[Tensor, "rows steps"]
) -> Float[Tensor, " rows"]:
    """Return (1/n_i) Σ_t m_it x_it for each row i, with n_i = max(1, Σ_t m_it)."""
    return (entries * mask).sum(1) / mask.sum(1).clamp(min=1)


def policy_loss(
    logp: Float[Tensor, "rows steps"],
    old: Float[Tensor, "rows steps"],
    advantages: Float[Tensor, "rows steps"],
    mask: Bool[Tensor, "rows steps"],
    clip: float = 0.2,
) -> Float[Tensor, " rows"]:
    """Return the clipped surrogate of each row (Schulman et al. 2017, eq. 7, as a loss).

    L_i = (1/n_i) Σ_t max(−A_t ρ_t, −A_t clip(ρ_t, 1 − ε, 1 + ε)),   ρ_t = π(a_t) / π_old(a_t)

    Args:
        logp: log π of the policy that is trained, with gradient.
        old: log π_old of the policy that wrote the answers.
        advantages: A_t.
        mask: Which entries are actions.
        clip: ε.
    """
    ratio = (logp - old).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return row_means(torch.maximum(-advantages * ratio, -advantages * clipped), mask)


def value_loss(
    values: Float[Tensor, "rows steps"],
    old: Float[Tensor, "rows steps"],
    returns: Float[Tensor, "rows steps"],
    mask: Bool[Tensor, "rows steps"],
    clip: float = 0.2,
) -> Float[Tensor, " rows"]:
    """Return the clipped squared error of the values of each row.

    L_i = 0.5 · (1/n_i) Σ_t max((V_t − Ret_t)², (Vc_t − Ret_t)²),   Vc_t = V_t kept within V_old ± ε

    Args:
        values: V_t, with gradient.
        old: V_old of the policy that wrote the answers.
        returns: Ret_t.
        mask: Which entries are actions.
        clip: ε.
    """
    clipped = torch.minimum(torch.maximum(values, old - clip), old + clip)
    errors = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * row_means(errors, mask)


def clip_fraction(
    logp: Float[Tensor, "rows steps"],
    old: Float[Tensor, "rows steps"],
    mask: Bool[Tensor, "rows steps"],
    clip: float = 0.2,
) -> Float[Tensor, " rows"]:
    """Return the share of each row's actions whose ratio lies outside 1 ± ε."""
    outside = ((logp - old).exp() - 1).abs() > clip
    return row_means(outside.float(), mask)


def explained_variance(errors: Float[Tensor, " 3"], returns: Float[Tensor, " 3"]) -> float:
    """Return 1 − Var(Ret − V) / Var(Ret) from `moments`: 1 is perfect, 0 no better than a constant.

    0 where all returns are equal: there was nothing to explain.
    """
    variance = spread(returns)[1]
    return 1.0 - spread(errors)[1] / variance if variance > EPSILON else 0.0
