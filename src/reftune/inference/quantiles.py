"""Quantiles of the normal and Student's t distribution, without scipy."""

from __future__ import annotations

import math


def t_quantile(probability: float, degrees: float) -> float:
    """Return the quantile of Student's t distribution by bisection of its distribution function.

    P(T ≤ t) = 1 − ½ I_{ν/(ν+t²)}(ν/2, ½) for t ≥ 0, I the regularised incomplete beta function.

    Raises:
        ValueError: If probability is not inside (0, 1) or degrees are not positive.

    >>> round(t_quantile(0.975, 2), 4)
    4.3027
    """
    if not 0 < probability < 1 or degrees <= 0:
        raise ValueError(f"t_quantile: probability {probability}, degrees {degrees}")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    tail = 2 * (1 - probability)
    low, high = 0.0, 1.0
    while _beta_share(degrees / (degrees + high * high), degrees / 2, 0.5) > tail:
        low, high = high, high * 2
    for _ in range(200):
        middle = (low + high) / 2
        share = _beta_share(degrees / (degrees + middle * middle), degrees / 2, 0.5)
        low, high = (middle, high) if share > tail else (low, middle)
    return (low + high) / 2


def _beta_share(x: float, a: float, b: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b) by its continued fraction."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast only on this side
        return 1 - _beta_share(1 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_front += a * math.log(x) + b * math.log1p(-x)
    value, upper, lower, tiny = 1.0, 1.0, 0.0, 1e-300
    for step in range(500):
        half = step // 2
        if step == 0:
            term = 1.0
        elif step % 2:
            term = -(a + half) * (a + b + half) * x / ((a + 2 * half) * (a + 2 * half + 1))
        else:
            term = half * (b - half) * x / ((a + 2 * half - 1) * (a + 2 * half))
        lower = 1 / (1 + term * lower or tiny)
        upper = 1 + term / upper or tiny
        value *= upper * lower
        if abs(1 - upper * lower) < 1e-15:
            break
    return math.exp(log_front) / a * (value - 1)
