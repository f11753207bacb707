"""Intervals and tests for scored answers, without scipy.

Every function states its equation. Random ones take a seed and give the same answer each time.
Shares are numbers between 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from reftune.inference.quantiles import t_quantile
from reftune.intervals import wilson, z_of

_RESAMPLES = 2000
_CHUNK = 1 << 22  # numbers drawn at once by a bootstrap: 32 MiB of float64


@dataclass(frozen=True)
class PairedTest:
    """Two systems on the same rows: is one better?

    `difference` is a minus b; `low` and `high` are its interval.
    """

    p_value: float
    """Two-sided probability of a difference this large if there were none."""
    only_a: int
    """Rows where a scores higher than b."""
    only_b: int
    """Rows where b scores higher than a."""
    difference: float
    """Mean of a minus mean of b."""
    low: float
    """Lower end of the interval of the difference."""
    high: float
    """Upper end of the interval of the difference."""
    n: int = 0
    """Rows compared."""
    method: str = "mcnemar"
    """`mcnemar` (exact; Newcombe interval), `bootstrap`, or `normal` (several seeds)."""


@dataclass(frozen=True)
class SeedSpread:
    """Mean over seeds, its spread, and the t interval of the mean."""

    mean: float
    """Mean over seeds."""
    sd: float | None
    """Sample standard deviation (n - 1); None for a single seed."""
    low: float | None
    """Lower end of the t interval; None for a single seed."""
    high: float | None
    """Upper end of the t interval; None for a single seed."""
    seeds: int
    """Number of values."""


def bootstrap(
    values: Sequence[Any],
    statistic: Callable[[list[Any]], float] | None = None,
    level: float = 0.95,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a statistic.

    Draw n rows with replacement, compute the statistic, repeat; the interval runs from the
    (1−level)/2 to the (1+level)/2 quantile of what came out.

    Args:
        values: One entry a row. Numbers when the statistic is the mean, else anything.
        statistic: Maps a list of entries to a number. Default: their mean. A resample where it is
            not finite (a correlation of constants) is left out.
        level: Coverage.
        resamples: Number of repetitions.
        seed: Seed of the draws.

    Raises:
        ValueError: If there are no values, or the statistic is finite on no resample.
    """
    import numpy as np

    if len(values) == 0:
        raise ValueError("bootstrap: no values")
    z_of(level)
    if statistic is None:
        means = _resampled_means(np.asarray(values, dtype=np.float64)[None], resamples, seed)[0]
    else:
        generator = np.random.default_rng(seed)
        draws = (generator.integers(0, len(values), len(values)) for _ in range(resamples))
        means = np.array([statistic([values[i] for i in draw]) for draw in draws], dtype=float)
        means = means[np.isfinite(means)]
        if means.size == 0:
            raise ValueError("bootstrap: the statistic is finite on no resample")
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(a: Sequence[Any], b: Sequence[Any], level: float = 0.95) -> PairedTest:
    """Compare two systems that answered the same rows right or wrong.

    p = min(1, 2 Σ_{i≤min(x,y)} C(x+y, i) / 2^{x+y}),   x = only a right, y = only b right
    (exact, two-sided). The interval of the difference (x − y)/n is Newcombe's (`newcombe_paired`).

    Args:
        a: Truth values of the first system.
        b: Truth values of the second, same order.
        level: Coverage of the interval.

    Raises:
        ValueError: If the two differ in length, are empty or hold other values than 0 and 1.

    >>> test = mcnemar([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0])
    >>> test.only_a, test.only_b, test.p_value
    (5, 0, 0.0625)
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"mcnemar: {len(a)} rows against {len(b)}")
    if not _binary(a) or not _binary(b):
        raise ValueError("mcnemar: values must be 0 or 1; use paired_bootstrap for others")
    both = sum(1 for x, y in zip(a, b) if x and y)
    only_a = sum(1 for x, y in zip(a, b) if x and not y)
    only_b = sum(1 for x, y in zip(a, b) if y and not x)
    n = len(a)
    low, high = newcombe_paired(both, only_a, only_b, n - both - only_a - only_b, level)
    return PairedTest(
        p_value=_sign_test(only_a, only_b),
        only_a=only_a,
        only_b=only_b,
        difference=(only_a - only_b) / n,
        low=low,
        high=high,
        n=n,
    )


def newcombe_paired(
    both: int, only_a: int, only_b: int, neither: int, level: float = 0.95
) -> tuple[float, float]:
    """Return Newcombe's interval of the difference of two paired shares (1998, method 10).

    With Wilson intervals (l₁,u₁), (l₂,u₂) of p₁, p₂ and the correlation φ of the 2x2 table:
    low = D − √((p₁−l₁)² − 2φ(p₁−l₁)(u₂−p₂) + (u₂−p₂)²),   D = p₁ − p₂
    high = D + √((u₁−p₁)² − 2φ(u₁−p₁)(p₂−l₂) + (p₂−l₂)²).
    φ's numerator ad − bc is moved towards zero by n/2 when it is positive (continuity).

    Args:
        both: Rows both answer rightly.
        only_a: Rows only the first answers rightly.
        only_b: Rows only the second answers rightly.
        neither: Rows neither answers rightly.
        level: Coverage.

    >>> [round(end, 4) for end in newcombe_paired(20, 12, 2, 16)]
    [0.0562, 0.3292]
    """
    n = both + only_a + only_b + neither
    right_a, right_b = both + only_a, both + only_b
    low_a, high_a = wilson(right_a, n, level)
    low_b, high_b = wilson(right_b, n, level)
    p_a, p_b = right_a / n, right_b / n
    product = right_a * (n - right_a) * right_b * (n - right_b)
    cross = both * neither - only_a * only_b
    cross = max(cross - n / 2, 0) if cross > 0 else cross
    phi = cross / math.sqrt(product) if product else 0.0
    return (
        max(-1.0, p_a - p_b - _correlated(p_a - low_a, high_b - p_b, phi)),
        min(1.0, p_a - p_b + _correlated(high_a - p_a, p_b - low_b, phi)),
    )


def paired_bootstrap(
    a: Sequence[Any],
    b: Sequence[Any],
    statistic: Callable[[list[Any]], float] | None = None,
    level: float = 0.95,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> PairedTest:
    """Compare two systems on the same rows by any statistic.

    The same rows are drawn for both, D* = s(a*) − s(b*); the interval holds the middle `level` of
    D*, and p = min(1, 2·(1 + min(#{D* ≤ 0}, #{D* ≥ 0}))/(resamples + 1)).

    Args:
        a: Entries of the first system, one a row.
        b: Entries of the second, same order.
        statistic: Maps a list of entries to a number. Default: their mean.
        level: Coverage of the interval.
        resamples: Number of repetitions.
        seed: Seed of the draws.

    Raises:
        ValueError: If the two differ in length or are empty.
    """
    import numpy as np

    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"paired_bootstrap: {len(a)} rows against {len(b)}")
    z_of(level)
    if statistic is None:
        both = np.asarray([a, b], dtype=np.float64)
        means = _resampled_means(both, resamples, seed)
        differences = means[0] - means[1]
        difference = float(both[0].mean() - both[1].mean())
    else:
        differences = _resampled_differences(a, b, statistic, resamples, seed)
        difference = statistic(list(a)) - statistic(list(b))
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    tail = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    numbers = all(isinstance(x, int | float) for x in (*a, *b))
    return PairedTest(
        p_value=min(1.0, 2 * (1 + tail) / (len(differences) + 1)),
        only_a=sum(1 for x, y in zip(a, b) if x > y) if numbers else 0,
        only_b=sum(1 for x, y in zip(a, b) if y > x) if numbers else 0,
        difference=float(difference),
        low=float(low),
        high=float(high),
        n=len(a),
        method="bootstrap",
    )


def paired_over_seeds(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], level: float = 0.95
) -> PairedTest:
    """Compare two systems on the same rows, each trained with several seeds.

    With d_is = a_is − b_is for row i of n and seed s of S, and means over the index left out:
    D = d̄,   SE² = Var_i(d_i)/n + Var_s(d_s)/S,   interval D ± z·SE,   p = 2(1 − Φ(|D|/SE)).
    Rows and seeds are both a choice. The second term counts a share of the rows' noise once more:
    the interval is rather too wide than too narrow. One seed: `mcnemar`, where it applies.

    Args:
        a: Values of the first system, one list a seed.
        b: Those of the second; same seeds, same rows, same order.
        level: Coverage of the interval.

    Raises:
        ValueError: If they differ in shape or are empty.

    >>> test = paired_over_seeds([[1, 1, 0, 1], [1, 0, 1, 1]], [[0, 1, 0, 1], [1, 0, 0, 1]])
    >>> test.difference, test.n, test.method
    (0.25, 4, 'normal')
    """
    sizes = {len(row) for row in (*a, *b)}
    if len(a) != len(b) or not a or len(sizes) != 1 or sizes == {0}:
        raise ValueError(f"paired_over_seeds: {len(a)} seeds against {len(b)}, rows {sizes}")
    if len(a) == 1:
        plain = _binary(a[0]) and _binary(b[0])
        return mcnemar(a[0], b[0], level) if plain else paired_bootstrap(a[0], b[0], level=level)
    rows = [math.fsum(x) / len(a) for x in zip(*(map(_minus, x, y) for x, y in zip(a, b)))]
    seeds = [math.fsum(map(_minus, x, y)) / len(x) for x, y in zip(a, b)]
    difference = math.fsum(rows) / len(rows)
    error = math.sqrt(_variance(rows) / len(rows) + _variance(seeds) / len(seeds))
    half = z_of(level) * error
    tail = math.erfc(abs(difference) / error / math.sqrt(2)) if error else float(not difference)
    return PairedTest(
        p_value=tail,
        only_a=sum(value > 0 for value in rows),
        only_b=sum(value < 0 for value in rows),
        difference=difference,
        low=max(-1.0, difference - half) if _unit(a, b) else difference - half,
        high=min(1.0, difference + half) if _unit(a, b) else difference + half,
        n=len(rows),
        method="normal",
    )


def over_seeds(values: Sequence[float], level: float = 0.95) -> SeedSpread:
    """Return mean, sample standard deviation and t interval over seeds.

    mean ± t_{(1+level)/2, n−1} · sd/√n,   sd² = Σ(x − mean)²/(n − 1)

    Args:
        values: One value a seed.
        level: Coverage.

    Raises:
        ValueError: If there are no values.

    >>> spread = over_seeds([0.70, 0.74, 0.72])
    >>> round(spread.mean, 4), round(spread.sd, 4), round(spread.low, 4), round(spread.high, 4)
    (0.72, 0.02, 0.6703, 0.7697)
    """
    if not values:
        raise ValueError("over_seeds: no values")
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return SeedSpread(mean, None, None, None, 1)
    sd = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1))
    half = t_quantile((1 + level) / 2, n - 1) * sd / math.sqrt(n)
    return SeedSpread(mean, sd, mean - half, mean + half, n)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the unbiased estimate of "at least one of k answers is right" from n answers.

    pass@k = 1 − C(n−c, k)/C(n, k)   (Chen et al. 2021)

    Raises:
        ValueError: If not 0 <= correct <= n and 1 <= k <= n.

    >>> pass_at_k(10, 3, 1), pass_at_k(4, 1, 2)
    (0.3, 0.5)
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k: n={n}, correct={correct}, k={k}")
    if correct == 0:
        return 0.0
    every, miss = math.comb(n, k), math.comb(n - correct, k)
    return (every - miss) / every


def _minus(x: float, y: float) -> float:
    return float(x) - float(y)


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((x - mean) ** 2 for x in values) / max(1, len(values) - 1)


def _unit(*systems: Sequence[Sequence[float]]) -> bool:
    """Return whether all values lie between 0 and 1."""
    return all(0 <= value <= 1 for system in systems for row in system for value in row)


def _sign_test(x: int, y: int) -> float:
    """Return the two-sided exact binomial probability of a split as uneven as x against y."""
    n, smaller = x + y, min(x, y)
    tail = sum(math.comb(n, i) for i in range(smaller + 1))
    return min(1.0, (2 * tail) / (1 << n))


def _resampled_means(values: Any, resamples: int, seed: int) -> Any:
    """Return means [systems, resamples] of rows drawn with replacement, in bounded memory."""
    import numpy as np

    generator, n = np.random.default_rng(seed), values.shape[1]
    rows, means = max(1, _CHUNK // n), []
    for start in range(0, resamples, rows):
        draw = generator.integers(0, n, (min(rows, resamples - start), n))
        means.append(np.stack([system[draw].mean(axis=1) for system in values]))
    return np.concatenate(means, axis=1)


def _resampled_differences(
    a: Sequence[Any],
    b: Sequence[Any],
    statistic: Callable[[list[Any]], float],
    resamples: int,
    seed: int,
) -> Any:
    """Return finite values of statistic(a*) - statistic(b*) over shared resamples."""
    import numpy as np

    generator, found = np.random.default_rng(seed), []
    for _ in range(resamples):
        draw = generator.integers(0, len(a), len(a))
        found.append(statistic([a[i] for i in draw]) - statistic([b[i] for i in draw]))
    differences = np.array(found, dtype=float)
    differences = differences[np.isfinite(differences)]
    if differences.size == 0:
        raise ValueError("paired_bootstrap: the statistic is finite on no resample")
    return differences


def _correlated(x: float, y: float, phi: float) -> float:
    """Return the length of two half-widths with correlation phi."""
    return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))


def _binary(values: Sequence[Any]) -> bool:
    """Return whether every value is 0 or 1."""
    return all(value in (0, 1) for value in values)
