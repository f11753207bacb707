"""Token weights by hand, in float64: right answers, wrong answers, clusters, losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from reftune.errors import RecipeError
from reftune.objectives.saliency import Constants, Saliency, cluster, saliency, token_losses

pytestmark = pytest.mark.quick

ALIKE = Constants(distance=2.0)
"""No neighbour is further away than this: no token joins a cluster."""


def double(*values):
    return tensor(values, dtype=torch.double)


def right(p_std, hidden=None, constants=ALIKE):
    p = double(*p_std)
    hidden = torch.ones(len(p), 2).double() if hidden is None else hidden
    none = torch.zeros(len(p), dtype=torch.bool)
    return saliency(p, p, p * 0, hidden, torch.zeros(len(p)).long(), none, constants)


def wrong(p_base, p_std, p_judge, hidden=None, constants=ALIKE):
    p = double(*p_base)
    hidden = torch.ones(len(p), 2).double() if hidden is None else hidden
    every = torch.ones(len(p), dtype=torch.bool)
    given = (p, double(*p_std), double(*p_judge), hidden, torch.zeros(len(p)).long(), every)
    return saliency(*given, constants)


def close(found, *wanted):
    torch.testing.assert_close(found, double(*wanted), rtol=1e-12, atol=1e-12)


# Right answers


def test_sample_weights_of_right_answers():
    said = right([1.0, 0.99, 0.97, 0.95, 0.9, 0.5, 0.2])
    assert said.marked.tolist() == [True, True, True, False, False, False, False]
    found = [round(weight, 2) for weight in said.weights.tolist()]
    assert found == [2.0, 1.33, 1.01, 1.0, 0.97, 0.68, 0.39]
    assert not said.wrong.any() and not said.near.any() and not said.crowded.any()


def test_neighbours_of_right_answers_shrink_less():
    hidden = double(1, 0, 0, 1, 0, 1).reshape(3, 2)
    said = right([0.99, 0.5, 0.2], hidden, Constants())
    assert said.near.tolist() == [False, True, False]
    close(said.weights, 1 + 0.8**5, (0.5 / 0.95) ** 0.3, (0.2 / 0.95) ** 0.6)


@pytest.mark.parametrize(("p_std", "times"), [(1.0, 2.0), (0.95, 1.0)])
def test_a_right_answer_weighs_its_likelihood_and_adds_it(p_std, times):
    log_p = double(0.3, 0.8, 0.05).log()
    said = right([p_std] * 3)
    correct = token_losses(log_p, said.factors(0.0))
    torch.testing.assert_close(correct, -times * log_p)
    torch.testing.assert_close(token_losses(log_p, said.factors()), -(times + 1) * log_p)


# Wrong answers


def test_an_answer_without_wrong_tokens_keeps_the_root_of_its_probability():
    said = wrong([0.5, 0.4], [0.25, 0.81], [0.5, 0.1])
    assert not said.marked.any() and said.wrong.all()
    close(said.weights, 0.5, 0.9)
    log_p = double(0.5, 0.4).log()
    torch.testing.assert_close(token_losses(log_p, said.factors()), -said.weights * log_p)


def test_wrong_tokens_are_those_likely_only_under_the_judgment():
    base, std, judge = [0.1, 0.1, 0.1, 0.004], [0.1, 0.1, 0.2, 0.004], [0.16, 0.15, 0.29, 0.0099]
    said = wrong(base, std, judge, constants=Constants(distance=2.0, most_wrong=1.0))
    assert said.marked.tolist() == [True, False, False, False], "r1 and r2 above 1.5, p_j above .01"
    close(said.weights, 2 / (1 + math.exp(-(1.6 - 1.5))), 0.1**0.5, 0.2**0.5, 0.004**0.5)
    factors = said.factors()
    assert factors[0] < 0 and (factors[1:] > 0).all()
    p = double(0.1, 0.1, 0.2, 0.004)
    wanted = [-float(said.weights[0]) * math.log(1 - 0.1)]
    wanted += [-float(w) * math.log(x) for w, x in zip(said.weights[1:], p[1:])]
    close(token_losses(p.log(), factors), *wanted)


@pytest.mark.parametrize(("ratio", "weight"), [(1.6, 1.05), (3.0, 1.64), (10.0, 2.0)])
def test_sample_weights_of_wrong_tokens(ratio, weight):
    said = wrong([0.05], [0.05], [0.05 * ratio])
    assert round(float(said.weights[0]), 2) == weight


@pytest.mark.parametrize(("tokens", "crowded"), [(17, False), (16, True)])
def test_six_per_cent_are_a_cliff(tokens, crowded):
    base = [0.1] + [0.5] * (tokens - 1)
    judge = [0.9] + [0.5] * (tokens - 1)
    said = wrong(base, base, judge)
    assert said.marked.tolist() == [True] + [False] * (tokens - 1)
    assert said.crowded.tolist() == [crowded] * tokens, "1/17 is 5.9 %, 1/16 is 6.25 %"
    assert float(said.weights[0]) > 1.9
    close(said.weights[1:], *[0.0 if crowded else 0.5**0.5] * (tokens - 1))


def test_neighbours_of_wrong_tokens_are_left_out():
    hidden = double(1, 0, 0, 1, 0, 1).reshape(3, 2)
    said = wrong([0.1] * 3, [0.1] * 3, [0.9, 0.1, 0.1], hidden, Constants(most_wrong=1.0))
    assert said.near.tolist() == [False, True, False]
    assert said.weights[1] == 0 and float(said.weights[2]) == pytest.approx(0.1**0.5)


def test_membership_and_scale_are_two_settings():
    given = ([0.1], [0.1], [0.14])
    assert not wrong(*given, constants=Constants(distance=2.0, threshold=1.1)).marked.any()
    members = wrong(*given, constants=Constants(distance=2.0, ratio=1.1))
    assert members.marked.all()
    close(members.weights, 2 / (1 + math.exp(-(1.4 - 1.5))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_of_nothing_are_no_trouble(dtype):
    zero, one = torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype)
    base, std = tensor([0, 0, 0.5, 0]).to(dtype), tensor([0, 0.5, 0, 0]).to(dtype)
    judge = tensor([0, 0.9, 0.9, 0.9]).to(dtype)
    hidden, rows = torch.ones(4, 2, dtype=dtype), torch.zeros(4).long()
    said = saliency(base, std, judge, hidden, rows, one.bool(), ALIKE)
    assert said.weights.isfinite().all() and said.marked.tolist() == [False, True, True, True]
    torch.testing.assert_close(said.weights[[1, 3]], one[:2] * 2, rtol=0, atol=0)
    log_p = zero.clone().requires_grad_()  # p = 1, of which 1 - p is 0
    loss = token_losses(log_p, -one).sum()
    loss.backward()
    assert (
        float(loss.detach()) == pytest.approx(-4 * math.log(1e-5)) and log_p.grad.isfinite().all()
    )


def test_small_probabilities_lose_no_digits():
    log_p = tensor([-30.0], dtype=torch.double)
    found = float(token_losses(log_p, double(-1.0)))
    assert found == pytest.approx(math.exp(-30), rel=1e-12), "1 − p alone would be 1"


# Gradient


def test_no_gradient_flows_into_weights():
    logits = torch.randn(5, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()
    p = logits.sigmoid()
    hidden = torch.ones(5, 2).double()
    wrong_ = tensor([False, False, True, True, True])
    rows = tensor([0, 0, 1, 1, 1])
    said = saliency(p, p, 3 * p, hidden, rows, wrong_, ALIKE)
    assert not said.weights.requires_grad and said.marked[2:].all()

    def loss(values):
        return token_losses(values.sigmoid().log(), said.factors()).sum()

    (found,) = torch.autograd.grad(loss(logits), logits)
    step = 1e-6 * torch.eye(5, dtype=torch.double)
    numeric = [(loss(logits + e) - loss(logits - e)).detach() / 2e-6 for e in step]
    torch.testing.assert_close(found, torch.stack(numeric), rtol=1e-6, atol=1e-8)


# Clusters


def slow_cluster(seeds, hidden, rows, distance, rule):
    """One walk after the other, as the rule is written down."""
    found = set(seeds)
    for seed in seeds:
        for step in (-1, 1):
            place, centre = seed, hidden[seed]
            while 0 <= place + step < len(hidden) and rows[place + step] == rows[seed]:
                beside = hidden[place + step]
                apart = 1 - float(torch.dot(centre, beside) / centre.norm() / beside.norm())
                if not (apart > distance if rule == "reference" else apart < distance):
                    break
                place, centre = place + step, (centre + beside) / 2
                found.add(place)
    return [i in found for i in range(len(hidden))]


def test_the_centre_of_a_walk_moves():
    hidden = double(1, 0, 0, 1, 0, 1, 1, 0).reshape(4, 2)
    seeds, rows = tensor([True, False, False, False]), torch.zeros(4).long()
    assert cluster(seeds, hidden, rows).tolist() == [True, True, False, False]
    closer = cluster(seeds, hidden, rows, distance=0.2)
    assert closer.tolist() == [True, True, True, True], "the centre is (1, 1)/2, then (1, 3)/4"
    back = cluster(seeds.flip(0), hidden.flip(0), rows)
    assert back.tolist() == [False, False, True, True], "to the left as to the right"


def test_the_other_rule_takes_what_is_alike():
    hidden = double(1, 0, 1, 0.1, 0, 1).reshape(3, 2)
    seeds, rows = tensor([True, False, False]), torch.zeros(3).long()
    assert cluster(seeds, hidden, rows).tolist() == [True, False, False]
    assert cluster(seeds, hidden, rows, rule="similar").tolist() == [True, True, False]


@pytest.mark.parametrize("rule", ["reference", "similar"])
@pytest.mark.parametrize("seed", range(8))
def test_all_walks_at_once_are_one_after_the_other(rule, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(40, 3, generator=generator, dtype=torch.double)
    hidden = hidden.cumsum(0) if rule == "similar" else hidden  # so that neighbours are alike
    rows = tensor([0] * 13 + [2] * 1 + [3] * 26)
    seeds = torch.rand(40, generator=generator) < 0.15
    found = cluster(seeds, hidden, rows, 0.4, rule)
    wanted = slow_cluster(seeds.nonzero()[:, 0].tolist(), hidden, rows.tolist(), 0.4, rule)
    assert found.tolist() == wanted and int(found.sum()) > int(seeds.sum())


def test_no_walk_leaves_its_answer():
    hidden = double(1, 0, 0, 1, 1, 0, 0, 1).reshape(4, 2)
    seeds = tensor([False, True, False, False])
    assert cluster(seeds, hidden, tensor([0, 0, 0, 0])).tolist() == [True, True, True, False]
    assert cluster(seeds, hidden, tensor([0, 0, 1, 1])).tolist() == [True, True, False, False]
    assert cluster(seeds & False, hidden, tensor([0, 0, 1, 1])).tolist() == [False] * 4


# Several answers


def test_answers_together_weigh_as_each_alone():
    generator = torch.Generator().manual_seed(3)

    def probabilities():
        return torch.rand(30, generator=generator, dtype=torch.double)

    given = (probabilities(), probabilities(), probabilities())
    hidden = torch.randn(30, 4, generator=generator, dtype=torch.double)
    rows = tensor([0] * 10 + [1] * 5 + [4] * 15)
    wrong_ = rows == 1
    whole = saliency(*given, hidden, rows, wrong_)
    for row in (0, 1, 4):
        own = rows == row
        alone = saliency(*(p[own] for p in given), hidden[own], rows[own], wrong_[own])
        for name in ("weights", "marked", "near", "crowded"):
            assert torch.equal(getattr(whole, name)[own], getattr(alone, name)), name


def test_factors_keep_what_training_needs():
    flags = tensor([True, False, True, False])
    said = Saliency(
        double(2, 1, 2, 0.5), flags, ~flags & False, tensor([False] * 2 + [True] * 2), flags
    )
    close(said.factors(), 3, 2, -2, 0.5)
    close(said.factors(0.0), 2, 1, -2, 0.5)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("sure", 1.0), ("least", -0.1), ("most_wrong", 6), ("ratio", -1), ("distance", math.inf)],
)
def test_settings_that_mean_nothing_are_refused(setting, value):
    with pytest.raises(RecipeError, match=f"^{setting} is {value}"):
        Constants(**{setting: value})
