"""Statistics against values computed independently (scipy, tables, direct enumeration)."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from reftune.inference import stats
from reftune.inference.quantiles import t_quantile
from reftune.tasks import metrics

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("successes", "n", "level", "low", "high"),
    [  # scipy.stats.binomtest(...).proportion_ci(method="wilson")
        (8, 10, 0.95, 0.4901624715366418, 0.9433178485456248),
        (0, 25, 0.95, 0.0, 0.1331922509390485),
        (25, 25, 0.95, 0.8668077490609516, 1.0),
        (137, 400, 0.99, 0.28439862462733095, 0.4057411025500252),
    ],
)
def test_wilson_matches_independent_values(successes, n, level, low, high):
    assert stats.wilson(successes, n, level) == pytest.approx((low, high), abs=1e-9)


def test_wilson_ends_solve_the_score_equation():
    """Each end p* satisfies |p - p*| = z sqrt(p*(1 - p*)/n), which defines the interval."""
    for successes, n in ((3, 17), (40, 41), (250, 1000)):
        for end in stats.wilson(successes, n):
            score = abs(successes / n - end) / math.sqrt(end * (1 - end) / n)
            assert score == pytest.approx(1.959963984540054, rel=1e-9)


def test_wilson_without_rows_knows_nothing_and_refuses_nonsense():
    assert stats.wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="11 successes in 10 rows"):
        stats.wilson(11, 10)
    with pytest.raises(ValueError, match="level must lie between 0 and 1"):
        stats.wilson(1, 2, level=95)


def test_mcnemar_equals_enumeration_of_all_splits():
    """p = share of the 2^n equally likely splits at least as uneven as the one seen."""
    for only_a, only_b in ((5, 0), (6, 2), (3, 3), (9, 1)):
        n = only_a + only_b
        gap = abs(only_a - only_b)
        uneven = sum(abs(2 * sum(s) - n) >= gap for s in product((0, 1), repeat=n))
        a = [1] * only_a + [0] * only_b + [1, 0]
        b = [0] * only_a + [1] * only_b + [1, 0]
        test = stats.mcnemar(a, b)
        assert test.p_value == pytest.approx(float(Fraction(uneven, 2**n)))
        assert (test.only_a, test.only_b, test.n) == (only_a, only_b, n + 2)
        assert test.difference == pytest.approx((only_a - only_b) / (n + 2))
        assert test.low <= test.difference <= test.high


def test_mcnemar_is_one_where_nothing_differs_and_handles_large_counts():
    assert stats.mcnemar([1, 0, 1], [1, 0, 1]).p_value == 1.0
    large = stats.mcnemar([1] * 3000 + [0] * 2500, [0] * 3000 + [1] * 2500)
    assert large.p_value == pytest.approx(1.6615256105422665e-11, rel=1e-9, abs=0)  # scipy


def test_mcnemar_refuses_shares_and_unequal_lengths():
    with pytest.raises(ValueError, match="must be 0 or 1"):
        stats.mcnemar([0.5], [1])
    with pytest.raises(ValueError, match="2 rows against 1"):
        stats.mcnemar([1, 0], [1])


def test_newcombe_paired_covers_the_true_difference():
    rng = np.random.default_rng(3)
    p_table, n, hits, rounds = [0.4, 0.25, 0.1, 0.25], 60, 0, 800
    for _ in range(rounds):
        low, high = stats.newcombe_paired(*map(int, rng.multinomial(n, p_table)))
        hits += low <= 0.15 <= high
    assert 0.925 < hits / rounds < 0.985


def test_newcombe_paired_is_antisymmetric():
    low, high = stats.newcombe_paired(20, 12, 2, 16)
    assert stats.newcombe_paired(20, 2, 12, 16) == pytest.approx((-high, -low))


def test_bootstrap_of_a_mean_approaches_the_normal_interval_and_repeats():
    values = np.random.default_rng(0).normal(2.0, 1.0, 400).tolist()
    low, high = stats.bootstrap(values, seed=1)
    half = 1.96 * float(np.std(values)) / 20
    assert low == pytest.approx(np.mean(values) - half, abs=0.02)
    assert high == pytest.approx(np.mean(values) + half, abs=0.02)
    assert stats.bootstrap(values, seed=1) == (low, high)
    assert stats.bootstrap(values, seed=2) != (low, high)


def test_bootstrap_takes_any_statistic_and_skips_undefined_resamples():
    rows = [(1, 1), (2, 2), (3, 3)]

    def correlation(sample):
        x, y = zip(*sample)
        with np.errstate(all="ignore"):
            return float(np.corrcoef(x, y)[0, 1]) if len(set(x)) > 1 else math.nan

    assert stats.bootstrap(rows, correlation, resamples=50) == pytest.approx((1.0, 1.0))
    with pytest.raises(ValueError, match="finite on no resample"):
        stats.bootstrap(rows, lambda sample: math.nan, resamples=5)
    with pytest.raises(ValueError, match="no values"):
        stats.bootstrap([])


def test_chunks_of_the_bootstrap_change_nothing(monkeypatch):
    values = [random.Random(0).random() for _ in range(50)]
    whole = stats.bootstrap(values, resamples=300)
    monkeypatch.setattr(stats, "_CHUNK", 50 * 7)
    assert stats.bootstrap(values, resamples=300) == whole


def test_paired_bootstrap_sees_a_difference_only_where_there_is_one():
    rng = np.random.default_rng(5)
    base = rng.random(200)
    better = (base + 0.1 + rng.normal(0, 0.05, 200)).tolist()
    test = stats.paired_bootstrap(better, base.tolist())
    assert test.p_value < 0.01 and test.low > 0 and test.method == "bootstrap"
    assert test.difference == pytest.approx(np.mean(better) - base.mean())
    noise = (base + rng.normal(0, 0.2, 200)).tolist()
    assert stats.paired_bootstrap(noise, base.tolist()).p_value > 0.05


def test_paired_bootstrap_with_a_statistic_equals_the_mean_way():
    a, b = [0.2, 0.5, 0.9, 0.4], [0.1, 0.6, 0.3, 0.2]
    plain = stats.paired_bootstrap(a, b, resamples=200)
    same = stats.paired_bootstrap(a, b, lambda v: sum(v) / len(v), resamples=200)
    assert (same.low, same.high) == pytest.approx((plain.low, plain.high))
    assert same.p_value == plain.p_value


@pytest.mark.parametrize(
    ("probability", "degrees", "value"),
    [  # printed tables
        (0.975, 1, 12.7062),
        (0.975, 2, 4.30265),
        (0.975, 4, 2.77645),
        (0.95, 9, 1.83311),
        (0.995, 30, 2.75000),
        (0.975, 1e6, 1.95997),
    ],
)
def test_t_quantiles_match_tables(probability, degrees, value):
    assert t_quantile(probability, degrees) == pytest.approx(value, abs=1e-4)
    assert t_quantile(1 - probability, degrees) == pytest.approx(-value, abs=1e-4)


def test_t_quantiles_match_scipy():
    scipy = pytest.importorskip("scipy.stats")
    for probability, degrees in product((0.6, 0.9, 0.975, 0.9999), (1, 2, 3, 7, 40, 500)):
        assert t_quantile(probability, degrees) == pytest.approx(
            scipy.t.ppf(probability, degrees), rel=1e-8
        )


def test_over_seeds():
    spread = stats.over_seeds([0.60, 0.66, 0.63])
    assert spread.mean == pytest.approx(0.63)
    assert spread.sd == pytest.approx(0.03)
    assert spread.high - spread.mean == pytest.approx(4.302653 * 0.03 / math.sqrt(3), rel=1e-6)
    one = stats.over_seeds([0.5])
    assert (one.mean, one.sd, one.low, one.seeds) == (0.5, None, None, 1)
    with pytest.raises(ValueError, match="no values"):
        stats.over_seeds([])


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    from itertools import combinations

    for n, correct, k in ((5, 2, 3), (6, 1, 2), (4, 4, 1), (5, 0, 5), (5, 3, 4)):
        answers = [1] * correct + [0] * (n - correct)
        subsets = list(combinations(answers, k))
        assert stats.pass_at_k(n, correct, k) == pytest.approx(
            sum(map(any, subsets)) / len(subsets)
        )
    with pytest.raises(ValueError, match="k=6"):
        stats.pass_at_k(5, 1, 6)


def test_auroc_is_the_share_of_pairs_in_order():
    rng = random.Random(1)
    scores = [rng.choice([0.1, 0.2, 0.3, 0.4]) for _ in range(40)]  # with ties
    labels = [rng.random() < 0.4 for _ in range(40)]
    pairs = [
        1.0 if p > n else 0.5 if p == n else 0.0
        for p, is_p in zip(scores, labels)
        for n, is_n in zip(scores, labels)
        if is_p and not is_n
    ]
    assert metrics.auroc(scores, labels) == pytest.approx(sum(pairs) / len(pairs))
    assert math.isnan(metrics.auroc([0.5, 0.6], [1, 1]))
