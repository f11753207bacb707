"""Metrics that are no mean over examples: MCC, F1, correlations, AUROC; and the majority answer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from reftune.intervals import wilson, z_of


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
    from reftune.rewards.exact import normalise

    left, right = Counter(normalise(pred).split()), Counter(normalise(gold).split())
    shared = sum((left & right).values())
    total = sum(left.values()) + sum(right.values())
    # Texts without any word (signs only) can still be the same.
    return 2 * shared / total if total else float(pred.strip() == gold.strip())


def auroc(scores: Sequence[float], labels: Sequence[Any]) -> float:
    """Return the area under the ROC curve; nan if only one class is present.

    AUROC = (Σ ranks of positives − P(P+1)/2) / (P·N), ties sharing their mean rank.

    >>> auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    0.75
    """
    positives = sum(1 for label in labels if label)
    negatives = len(labels) - positives
    if len(scores) != len(labels):
        raise ValueError(f"auroc: {len(scores)} scores for {len(labels)} labels")
    if positives == 0 or negatives == 0:
        return math.nan
    order = sorted(range(len(scores)), key=scores.__getitem__)
    total, start = 0.0, 0
    while start < len(order):
        end = start
        while end < len(order) and scores[order[end]] == scores[order[start]]:
            end += 1
        rank = (start + 1 + end) / 2
        total += rank * sum(1 for i in order[start:end] if labels[i])
        start = end
    return (total - positives * (positives + 1) / 2) / (positives * negatives)


def auroc_interval(
    scores: Sequence[float], labels: Sequence[Any], level: float = 0.95
) -> tuple[float, float, float]:
    """Return DeLong's interval of the AUROC on the logit scale, and its standard error.

    With the share u_i of negatives below positive i (ties one half) and v_j of positives above
    negative j: Var = Var(u)/P + Var(v)/N,   logit A ± z·√Var/(A(1−A))   (DeLong et al. 1988).
    Where the classes do not overlap that variance is 0; then the far end is Wilson's for as many
    right answers as the smaller class has rows.

    Args:
        scores: One a row; higher means positive.
        labels: Truth of each row.
        level: Coverage.

    Raises:
        ValueError: If a class has no row, or the two differ in length.

    >>> low, high, _ = auroc_interval([0.1, 0.4, 0.35, 0.8, 0.7, 0.2], [0, 0, 1, 1, 1, 0])
    >>> round(low, 3), round(high, 3)
    (0.261, 0.995)
    """
    import numpy as np

    value = auroc(scores, labels)
    if math.isnan(value):
        raise ValueError("auroc_interval: one class has no row")
    chosen = np.asarray([bool(label) for label in labels])
    ordered = np.asarray(scores, dtype=np.float64)
    positive, negative = np.sort(ordered[chosen]), np.sort(ordered[~chosen])
    above = (_below(negative, positive, "left") + _below(negative, positive, "right")) / 2
    under = 1 - (_below(positive, negative, "left") + _below(positive, negative, "right")) / 2
    parts = [x.var(ddof=1) / len(x) for x in (above, under) if len(x) > 1]
    error = math.sqrt(sum(parts))
    if error == 0 or not 0 < value < 1:
        fewer = min(len(positive), len(negative))
        low, high = wilson(value * fewer, fewer, level)
        return low, high, error
    centre, half = math.log(value / (1 - value)), z_of(level) * error / (value * (1 - value))
    low, high = (1 / (1 + math.exp(-end)) for end in (centre - half, centre + half))
    return low, high, error


def _below(values: Any, points: Any, side: str) -> Any:
    """Return the share of sorted values below each point."""
    import numpy as np

    return np.searchsorted(values, points, side) / len(values)


def majority(trained: Sequence[Hashable], scored: Sequence[Hashable]) -> list[float]:
    """Return 1 or 0 a row for always answering the most frequent training label.

    What a system reaches that has learned nothing but the labels. The first one seen wins a tie.

    Raises:
        ValueError: If there are no training labels.

    >>> majority(["yes", "no", "yes"], ["no", "yes"])
    [0.0, 1.0]
    """
    if not trained:
        raise ValueError("majority: no training labels")
    answer = Counter(trained).most_common(1)[0][0]
    return [float(label == answer) for label in scored]
