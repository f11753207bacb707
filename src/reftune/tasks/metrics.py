"""Metrics that are no mean over examples: MCC, F1, Pearson and Spearman correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence


def matthews(pred: Sequence[int], gold: Sequence[int]) -> float:
    """Return the Matthews correlation of two binary labellings; 0 where it is undefined.

    MCC = (TP·TN − FP·FN) / √((TP+FP)(TP+FN)(TN+FP)(TN+FN))

    >>> round(matthews([1, 1, 0, 0], [1, 0, 0, 0]), 4)
    0.5774
    """
    pairs = list(zip(pred, gold, strict=True))
    tp, tn = pairs.count((1, 1)), pairs.count((0, 0))
    fp, fn = pairs.count((1, 0)), pairs.count((0, 1))
    below = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(below) if below else 0.0


def f1(pred: Sequence[int], gold: Sequence[int]) -> float:
    """Return the F1 of class 1; 0 where it is undefined.

    >>> f1([1, 1, 0], [1, 0, 1])
    0.5
    """
    pairs = list(zip(pred, gold, strict=True))
    tp, wrong = pairs.count((1, 1)), pairs.count((1, 0)) + pairs.count((0, 1))
    return 2 * tp / (2 * tp + wrong) if tp + wrong else 0.0


def pearson(left: Sequence[float], right: Sequence[float]) -> float:
    """Return the Pearson correlation; 0 if a side is constant or not finite.

    >>> round(pearson([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]), 6)
    1.0
    """
    n = len(left)
    if n < 2 or n != len(right) or not all(map(math.isfinite, (*left, *right))):
        return 0.0
    mean_left, mean_right = math.fsum(left) / n, math.fsum(right) / n
    a, b = [x - mean_left for x in left], [y - mean_right for y in right]
    below = math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))
    return math.fsum(x * y for x, y in zip(a, b)) / below if below else 0.0


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Return the Spearman correlation (Pearson of ranks, ties averaged).

    >>> round(spearman([1.0, 5.0, 30.0], [2.0, 3.0, 4.0]), 6)
    1.0
    """
    return pearson(_ranks(left), _ranks(right))


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for i in order[start:end]:
            ranks[i] = (start + end - 1) / 2
        start = end
    return ranks


def token_f1(pred: str, gold: str) -> float:
    """Return the F1 of shared words (each counted as often as it occurs).

    >>> token_f1("the red cat", "a red cat")
    0.6666666666666666
    """
    from collections import Counter

    from reftune.rewards.exact import normalise

    left, right = Counter(normalise(pred).split()), Counter(normalise(gold).split())
    shared = sum((left & right).values())
    total = sum(left.values()) + sum(right.values())
    # Texts without any word (signs only) can still be the same.
    return 2 * shared / total if total else float(pred.strip() == gold.strip())
