"""Two-choice scoring and pairs of systems: AUROC with its interval, seeds and rows together."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from reftune.inference.stats import mcnemar, paired_over_seeds
from reftune.tasks import metrics

pytestmark = pytest.mark.quick


def test_delong_is_the_covariance_of_placements():
    """Against the definition: shares of the other class below and above each row."""
    rng = random.Random(3)
    labels = [rng.random() < 0.6 for _ in range(80)]
    scores = [round(rng.gauss(float(label), 1.5), 1) for label in labels]
    positive = [s for s, label in zip(scores, labels) if label]
    negative = [s for s, label in zip(scores, labels) if not label]

    def share(x, y):
        return float(x > y) + 0.5 * float(x == y)

    u = [np.mean([share(x, y) for y in negative]) for x in positive]
    v = [np.mean([share(x, y) for x in positive]) for y in negative]
    wanted = math.sqrt(np.var(u, ddof=1) / len(u) + np.var(v, ddof=1) / len(v))
    low, high, error = metrics.auroc_interval(scores, labels)
    assert error == pytest.approx(wanted)
    value = metrics.auroc(scores, labels)
    assert value == pytest.approx(np.mean(u)) == pytest.approx(np.mean(v))
    ends = [math.log(end / (1 - end)) for end in (low, value, high)]
    assert ends[2] - ends[1] == pytest.approx(ends[1] - ends[0])
    assert ends[2] - ends[1] == pytest.approx(1.959964 * error / (value * (1 - value)), rel=1e-5)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    truth, hits = 0.7602499, 0  # Φ(1/√2)
    for _ in range(400):
        labels = np.arange(100) < 40
        low, high, _ = metrics.auroc_interval(list(rng.normal(labels, 1.0)), list(labels))
        hits += low <= truth <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_classes_that_do_not_overlap_leave_room_for_doubt():
    low, high, error = metrics.auroc_interval([0, 1, 2, 3, 4], [0, 0, 1, 1, 1])
    assert (high, error) == (1.0, 0.0) and 0.2 < low < 0.6
    with pytest.raises(ValueError, match="one class has no row"):
        metrics.auroc_interval([0, 1], [1, 1])


def test_majority_is_learned_from_the_training_labels():
    assert metrics.majority([0, 1, 1], [1, 0, 0, 1, 1]) == [1.0, 0.0, 0.0, 1.0, 1.0]
    assert metrics.majority(["a", "b"], ["b"]) == [0.0], "the first seen wins a tie"
    with pytest.raises(ValueError, match="no training labels"):
        metrics.majority([], [1])


def answers(rng, rows, rate, seeds):
    return [[float(rng.random() < rate) for _ in range(rows)] for _ in range(seeds)]


def test_one_seed_is_mcnemars_test():
    rng = random.Random(1)
    a, b = answers(rng, 50, 0.6, 1), answers(rng, 50, 0.5, 1)
    assert paired_over_seeds(a, b) == mcnemar(a[0], b[0])


def test_several_seeds_count_rows_and_seeds():
    rng = random.Random(2)
    a, b = answers(rng, 200, 0.6, 3), answers(rng, 200, 0.5, 3)
    test = paired_over_seeds(a, b)
    d = np.array(a) - np.array(b)
    rows, seeds = d.mean(0), d.mean(1)
    error = math.sqrt(rows.var(ddof=1) / 200 + seeds.var(ddof=1) / 3)
    assert test.difference == pytest.approx(d.mean())
    assert (test.high - test.low) / 2 == pytest.approx(1.959964 * error, rel=1e-5)
    assert test.p_value == pytest.approx(math.erfc(abs(d.mean()) / error / math.sqrt(2)))
    assert (test.n, test.method) == (200, "normal")
    back = paired_over_seeds(b, a)
    assert (back.difference, back.low) == (-test.difference, -test.high)


def test_seeds_that_disagree_widen_the_interval():
    """Equal seeds say nothing of seeds: the interval is that of the rows alone."""
    a, b = [[1.0, 0.0] * 50] * 3, [[0.0, 0.0] * 50] * 3
    alike = paired_over_seeds(a, b)
    apart = paired_over_seeds([[1.0] * 100, [1.0, 0.0] * 50, [0.0] * 100], b)
    assert apart.high - apart.low > 3 * (alike.high - alike.low)
    same = paired_over_seeds(a, a)
    assert (same.difference, same.p_value, same.low, same.high) == (0.0, 1.0, 0.0, 0.0)


def test_shapes_that_do_not_pair_are_refused():
    for a, b in (([], []), ([[1]], [[1], [1]]), ([[1, 0]], [[1]]), ([[]], [[]])):
        with pytest.raises(ValueError, match="paired_over_seeds"):
            paired_over_seeds(a, b)
