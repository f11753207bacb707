"""Pooling, InfoNCE and common subsequences against their equations, written out by hand."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from reftune.objectives import contrastive

pytestmark = pytest.mark.quick


def vectors(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_equal_weights_pool_to_the_mean():
    e, mask = vectors(2, 4, 3), torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1]]).bool()
    z, entropy = contrastive.pool(e, torch.zeros(2, 4, dtype=torch.float64), mask)
    assert torch.allclose(z, torch.stack([e[0, :3].mean(0), e[1, [1, 3]].mean(0)]))
    assert torch.allclose(entropy, torch.tensor([math.log(3), math.log(2)]).double())


def test_weights_are_a_softmax_over_pooled_tokens():
    e, v = vectors(1, 3, 2), vectors(1, 3, seed=1)
    z, _ = contrastive.pool(e, v, torch.tensor([[True, False, True]]))
    share = math.exp(v[0, 0]) / (math.exp(v[0, 0]) + math.exp(v[0, 2]))
    assert torch.allclose(z[0], share * e[0, 0] + (1 - share) * e[0, 2])


def test_a_row_without_tokens_takes_its_first_and_sharp_weights_have_no_entropy():
    e = vectors(2, 3, 2)
    weights = torch.tensor([[5.0, 0.0, 0.0], [0.0, 500.0, 0.0]]).double()
    z, entropy = contrastive.pool(e, weights, torch.tensor([[False] * 3, [True] * 3]))
    assert torch.equal(z[0], e[0, 0]) and torch.allclose(z[1], e[1, 1])
    assert entropy.tolist() == pytest.approx([0.0, 0.0], abs=1e-12)


def test_values_get_gradient_through_the_weights_and_masked_tokens_none():
    e, v = vectors(1, 3, 2).requires_grad_(), vectors(1, 3, seed=1).requires_grad_()
    z, _ = contrastive.pool(e, v, torch.tensor([[True, True, False]]))
    z.sum().backward()
    assert v.grad[0, :2].abs().min() > 0 and v.grad[0, 2] == 0 and (e.grad[0, 2] == 0).all()


def by_hand(z1, z2, others, places, tau, clamp):
    def cos(a, b):
        return float(a @ b / a.norm() / b.norm())

    found = []
    for a, b, place in zip(z1, z2, places):
        everything = [b if at == place else other for at, other in enumerate(others)]
        total = sum(math.exp(cos(a, other) / tau) for other in everything)
        found.append(math.log(total) - min(cos(a, b), clamp) / tau)
    return found


def test_positive_is_info_nce_over_the_rollout():
    z1, everything = vectors(2, 4), vectors(5, 4, seed=1)
    z2, places = vectors(2, 4, seed=2), torch.tensor([3, 0])
    got = contrastive.positive(z1, z2, everything, places)
    assert got.tolist() == pytest.approx(by_hand(z1, z2, everything, places, 0.2, 0.9))
    near = contrastive.positive(z1, z1.clone(), everything, places, tau=0.5, clamp=0.7)
    assert near.tolist() == pytest.approx(by_hand(z1, z1, everything, places, 0.5, 0.7))


def test_a_sample_is_repelled_by_its_own_place_in_the_sum():
    """The published gather is not differentiable, and the sum then has no gradient at all."""
    z1, z2 = vectors(2, 4), vectors(2, 4, seed=2).requires_grad_()
    places = torch.arange(2)
    contrastive.positive(z1, z2, z2.detach(), places).sum().backward()
    full = z2.grad.clone()
    z2.grad = None
    (-contrastive.cosine(z1, z2).clamp(max=0.9) / 0.2).sum().backward()
    assert not torch.allclose(full, z2.grad)
    assert full.norm() < z2.grad.norm(), "attraction alone is stronger"


def test_alone_and_below_the_clamp_there_is_nothing_to_learn():
    z1, z2 = vectors(1, 4), vectors(1, 4, seed=2).requires_grad_()
    loss = contrastive.positive(z1, z2, z2.detach(), torch.tensor([0]))
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-12)
    assert z2.grad.abs().max() < 1e-12


@pytest.mark.parametrize("right", [[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
def test_the_published_reduction_masks_nothing(right):
    """A [B, 1] mask times [B] losses is [B, B]: all losses count once one answer is right."""
    z1, z2 = vectors(4, 3), vectors(4, 3, seed=2).requires_grad_()
    losses = torch.tensor(by_hand(z1, z2.detach(), z2.detach(), range(4), 0.2, 0.9)).double()
    mask = torch.tensor(right).double()[:, None]
    wanted = (losses * mask).sum() / (mask.sum() + 1e-8)
    got = contrastive.published(z1, z2, torch.tensor(right).bool())
    assert float(got) == pytest.approx(float(wanted), rel=1e-6, abs=1e-12)
    got.backward()
    grad = z2.grad.clone()
    z2.grad = None
    pull = -contrastive.cosine(z1, z2).clamp(max=0.9) / 0.2
    (pull.sum() * float(mask.sum() > 0)).backward()
    assert torch.allclose(grad, z2.grad, rtol=1e-6), "attraction alone"


def test_the_published_attraction_ends_at_the_clamp():
    z1 = vectors(2, 3)
    z2 = (z1 + 0.01 * vectors(2, 3, seed=4)).requires_grad_()
    contrastive.published(z1, z2, torch.tensor([True, True])).backward()
    assert (contrastive.cosine(z1, z2) > 0.9).all() and not z2.grad.any()


def test_negative_sets_common_tokens_apart_from_the_rest():
    z1, z2, z3 = (vectors(2, 3, seed=s) for s in range(3))
    others = vectors(4, 3, seed=5), vectors(4, 3, seed=6)
    places = torch.tensor([1, 2])

    def cos(a, b):
        return float(a @ b / a.norm() / b.norm())

    wanted = []
    for i, place in enumerate(places):
        shared, apart = others[0].clone(), others[1].clone()
        shared[place], apart[place] = z2[i], z3[i]
        total = sum(math.exp(cos(z2[i], other) / 0.2) for other in (*shared, *apart))
        wanted.append(math.log(total) - min(cos(z1[i], z2[i]), 0.9) / 0.2)
    got = contrastive.negative(z1, z2, z3, others, places)
    assert got.tolist() == pytest.approx(wanted)


def longest(a, b):
    """Length of the longest common subsequence, by trying all of one side."""
    for size in range(len(a), 0, -1):
        for chosen in itertools.combinations(a, size):
            rest = iter(b)
            if all(token in rest for token in chosen):
                return size
    return 0


def test_common_subsequences():
    assert contrastive.common([], [1]) == ([], [False])
    assert contrastive.common([1, 2], [3]) == ([False, False], [False])
    rng = random.Random(0)
    for _ in range(60):
        a, b = ([rng.randrange(4) for _ in range(rng.randrange(8))] for _ in range(2))
        left, right = contrastive.common(a, b)
        chosen = [token for token, on in zip(a, left) if on]
        assert chosen == [token for token, on in zip(b, right) if on]
        assert len(chosen) == longest(a, b)


def test_a_thousand_tokens_are_quick():
    import time

    rng = random.Random(0)
    a, b = ([rng.randrange(50) for _ in range(1000)] for _ in range(2))
    start = time.perf_counter()
    left, _ = contrastive.common(a, b)
    assert sum(left) > 200 and time.perf_counter() - start < 2.0
