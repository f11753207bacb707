"""The interval of a share: what every accuracy of the project carries."""

from __future__ import annotations

import math
from statistics import NormalDist


def z_of(level: float) -> float:
    """Return the standard normal quantile of a two-sided interval."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level}")
    return NormalDist().inv_cdf((1 + level) / 2)


def wilson(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a share.

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n),   p = successes/n, z = Φ⁻¹((1+level)/2)

    Args:
        successes: Rows answered correctly.
        n: Rows in all. With none nothing is known: (0, 1).
        level: Coverage.

    Raises:
        ValueError: If successes are not between 0 and n, or level not between 0 and 1.

    >>> [round(end, 4) for end in wilson(8, 10)]
    [0.4902, 0.9433]
    """
    z = z_of(level)
    if n < 0 or not 0 <= successes <= n:
        raise ValueError(f"wilson: {successes} successes in {n} rows")
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, z * z
    centre = share + z2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    scale = 1 + z2 / n
    low = 0.0 if successes == 0 else max(0.0, (centre - half) / scale)
    high = 1.0 if successes == n else min(1.0, (centre + half) / scale)
    return low, high
