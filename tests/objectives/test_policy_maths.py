"""Rewards, advantages and clipped losses against cases that were worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from reftune.objectives import policy

pytestmark = pytest.mark.quick
F64 = torch.float64


def matrix(*rows):
    return torch.tensor(rows, dtype=F64)


# Two answers of at most six tokens: the first ends by EOS after four, the second is cut off at six.
MASK = policy.mask_of(torch.tensor([4, 6]))
LOGP = matrix([-1.0, -2.0, -0.5, -0.1, 0, 0], [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0])
FROZEN = matrix([-1.5, -1.0, -0.5, -0.3, 0, 0], [-1.0, -2.0, -1.0, -1.0, -1.0, -0.5])
VALUES = matrix([0.5, 0.25, 0.5, 1.0, 9, 9], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
SCORES = torch.tensor([1.0, 0.1], dtype=F64)


def rewards(beta=0.5):
    return policy.kl_rewards(SCORES, LOGP, FROZEN, MASK, beta)


def test_the_score_stands_on_the_last_action_and_the_penalty_on_all():
    wanted = matrix([-0.25, 0.5, 0.0, 1 - 0.1, 0, 0], [0, -0.5, 0, 0, 0, 0.1 + 0.25])
    assert torch.allclose(rewards(), wanted, atol=1e-12)
    assert torch.equal(rewards(0.0), matrix([0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0.1]))


def test_advantages_by_hand():
    """gamma 1, lambda 0.95; the first row backwards from EOS, V = 0 behind it."""
    advantages, returns = policy.gae(rewards(), VALUES, MASK, 1.0, 0.95)
    a3 = 0.9 - 1.0
    a2 = (0.0 + 1.0 - 0.5) + 0.95 * a3
    a1 = (0.5 + 0.5 - 0.25) + 0.95 * a2
    a0 = (-0.25 + 0.25 - 0.5) + 0.95 * a1
    assert torch.allclose(advantages[0], matrix([a0, a1, a2, a3, 0, 0])[0], atol=1e-12)
    b5 = 0.35 - 0.6
    b4 = 0.1 + 0.95 * b5
    b3 = 0.1 + 0.95 * b4
    b2 = 0.1 + 0.95 * b3
    b1 = (-0.5 + 0.1) + 0.95 * b2
    b0 = 0.1 + 0.95 * b1
    assert torch.allclose(advantages[1], matrix([b0, b1, b2, b3, b4, b5])[0], atol=1e-12)
    assert torch.allclose(returns, (advantages + VALUES) * MASK, atol=1e-12)


def test_a_discount_by_hand():
    advantages, _ = policy.gae(matrix([0, 1.0]), matrix([0.5, 0.25]), MASK[:1, :2], 0.9, 0.5)
    assert torch.allclose(advantages, matrix([0.9 * 0.25 - 0.5 + 0.45 * 0.75, 0.75]), atol=1e-12)


def test_whole_returns_without_values_are_the_score_everywhere():
    zeros = torch.zeros(2, 6, dtype=F64)
    advantages, returns = policy.gae(rewards(0.0), zeros, MASK, 1.0, 1.0)
    assert torch.equal(advantages, SCORES[:, None] * MASK) and torch.equal(returns, advantages)


def test_values_behind_the_last_action_do_not_leak():
    one = policy.gae(rewards(), VALUES, MASK)
    other = policy.gae(rewards(), VALUES.masked_fill(~MASK, -77.0), MASK)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not one[0][~MASK].any()


def test_whitening_of_parts_is_whitening_of_the_whole():
    torch.manual_seed(0)
    entries, mask = torch.randn(5, 7, dtype=F64), policy.mask_of(torch.tensor([7, 1, 3, 5, 2]))
    whole = policy.whiten(entries, mask, policy.moments(entries, mask))
    own = whole[mask]
    assert abs(float(own.mean())) < 1e-12 and float(own.var()) == pytest.approx(1, abs=1e-6)
    assert not whole[~mask].any()
    found = policy.moments(entries[:2], mask[:2]) + policy.moments(entries[2:], mask[2:])
    parts = [policy.whiten(entries[s], mask[s], found) for s in (slice(2), slice(2, 5))]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-12)
    mean, variance = entries[mask].mean(), entries[mask].var()
    assert torch.allclose(own, (entries[mask] - mean) / (variance + 1e-8).sqrt(), atol=1e-12)


def test_one_action_in_all_is_no_division_by_zero():
    mask = policy.mask_of(torch.tensor([1]))
    found = policy.whiten(matrix([3.0]), mask, policy.moments(matrix([3.0]), mask))
    assert torch.equal(found, matrix([0.0]))


def test_the_first_update_has_ratio_one_and_the_mean_advantage_for_a_loss():
    logp = LOGP.clone().requires_grad_()
    advantages = policy.gae(rewards(), VALUES, MASK)[0]
    loss = policy.policy_loss(logp, LOGP, advantages, MASK)
    assert torch.allclose(loss, -advantages.sum(1) / torch.tensor([4, 6]), atol=1e-12)
    assert not policy.clip_fraction(logp, LOGP, MASK).any()
    loss.mean().backward()
    wanted = -advantages / torch.tensor([[4.0], [6.0]]) / 2
    assert torch.allclose(logp.grad, wanted, atol=1e-12), "the policy gradient, by hand"


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 1.0, -1.2, 0.0),  # better and already too far: clipped, no gradient
        (0.5, -1.0, 0.8, 0.0),
        (0.5, 1.0, -0.5, -0.5),  # the wrong way: not clipped
        (1.5, -1.0, 1.5, 1.5),
        (1.1, 1.0, -1.1, -1.1),
    ],
)
def test_clipping_by_hand(ratio, advantage, loss, slope):
    mask, old = policy.mask_of(torch.tensor([1])), matrix([-2.0])
    logp = (old + math.log(ratio)).requires_grad_()
    found = policy.policy_loss(logp, old, matrix([advantage]), mask, 0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(loss) and float(logp.grad) == pytest.approx(slope)
    outside = abs(ratio - 1) > 0.2
    assert float(policy.clip_fraction(logp, old, mask, 0.2)) == float(outside)


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope"),
    [
        (0.1, 1.0, 0.5 * 0.81, -0.9),
        (0.9, 1.0, 0.5 * 0.64, 0.0),  # moved more than 0.2 towards the target: clipped at 0.2
        (-0.9, 1.0, 0.5 * 3.61, -1.9),  # moved away: the worse of both, with gradient
    ],
)
def test_value_clipping_by_hand(value, target, loss, slope):
    values = matrix([value]).requires_grad_()
    mask = policy.mask_of(torch.tensor([1]))
    found = policy.value_loss(values, matrix([0.0]), matrix([target]), mask, 0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(loss) and float(values.grad) == pytest.approx(slope)


def test_rows_count_alike_however_long():
    mask = policy.mask_of(torch.tensor([3, 1]))
    found = policy.row_means(matrix([1.0, 2.0, 3.0], [2.0, 99.0, 99.0]), mask)
    assert found.tolist() == [2.0, 2.0]


def test_probabilities_and_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)]])
    tokens = torch.tensor([1])
    assert float(policy.log_probs(logits, tokens)) == pytest.approx(math.log(0.75))
    hot = policy.log_probs(logits, tokens, 2.0)
    assert float(hot) == pytest.approx(math.log(3**0.5 / (1 + 3**0.5)), abs=1e-6)
    wanted = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert float(policy.entropy(logits)) == pytest.approx(wanted, abs=1e-6)


def test_explained_variance_by_hand():
    mask = policy.mask_of(torch.tensor([4]))
    returns = matrix([1.0, 2.0, 3.0, 4.0])
    of = lambda entries: policy.moments(entries, mask)  # noqa: E731
    assert policy.explained_variance(of(returns * 0), of(returns)) == 1.0
    assert policy.explained_variance(of(returns), of(returns)) == 0.0
    assert policy.explained_variance(of(0.5 * returns), of(returns)) == pytest.approx(0.75)
    assert policy.explained_variance(of(returns), of(returns * 0 + 5)) == 0.0
