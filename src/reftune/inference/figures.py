"""Predictions to figures: means, aggregates, several samples, AUROC, each with its interval."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from reftune.inference import stats
from reftune.inference.predictions import Prediction, gold_choice, row_values
from reftune.tasks import metrics

if TYPE_CHECKING:
    from reftune.config.recipe import EvaluationSpec
    from reftune.report.model import Figure
    from reftune.tasks.base import Example, Task

_AGGREGATE_RESAMPLES = 300


class Scored(Protocol):
    """What the figures need to know about an evaluation."""

    task: Task
    examples: Sequence[Example]
    spec: EvaluationSpec
    seed: int


def figures_of(run: Scored, predictions: list[Prediction], level: float) -> dict[str, Figure]:
    """Return every metric with its interval; the main one first."""
    names = list(dict.fromkeys(name for p in predictions for name in p.scores))
    figures = {name: _mean_figure(predictions, name, run.seed, level) for name in names}
    figures.update(_aggregates(run, [p for p in predictions if p.sample == 0], level))
    if run.spec.samples > 1 and run.task.kind != "classification":
        figures.update(_sample_figures(run, predictions, level))
    figures.update(_auroc_figure(run, predictions, level))
    main = {name: figures[name] for name in (run.task.metric,) if name in figures}
    return {**main, **figures}


def metric_names(task: Task, examples: Sequence[Example], samples: int = 1) -> list[str]:
    """Return the figures that scoring examples would give, without any model.

    Args:
        task: The task.
        examples: Rows of the split that would be scored.
        samples: Answers a prompt.
    """
    few = list(examples[:2])
    is_classified = task.kind == "classification"
    answers: list[Any] = [0 if is_classified else ""] * len(few)
    scores = [task.score(str(answer), example) for answer, example in zip(answers, few)]
    names = [task.metric, *(name for row in scores for name in row)]
    names += task.aggregate(scores, few, answers)
    if task.kind == "choice":
        names += ["choice_accuracy", "choice_accuracy_per_character"]
        names += ["auroc"] if {len(example.choices) for example in few} == {2} else []
    if samples > 1 and not is_classified:
        sizes = {samples, *(2**i for i in range(1, samples.bit_length()) if 2**i < samples)}
        names += [*(f"pass@{k}" for k in sorted(sizes)), f"majority@{samples}"]
    return list(dict.fromkeys(names))


def _mean_figure(predictions: list[Prediction], name: str, seed: int, level: float) -> Figure:
    """Return the mean of a metric over rows."""
    known = [p for p in predictions if math.isfinite(p.scores.get(name, math.nan))]
    return _figure(list(row_values(known, name).values()) if known else [], seed, level)


def _figure(values: list[float], seed: int, level: float) -> Figure:
    """Return a mean with Wilson's interval if all values are 0 or 1, else a bootstrap's."""
    from reftune.report.model import Figure

    if not values:
        return Figure(mean=None, n=0)
    total = math.fsum(values)
    if all(value in (0.0, 1.0) for value in values):
        low, high = stats.wilson(int(total), len(values), level)
    else:
        low, high = stats.bootstrap(values, level=level, seed=seed)
    unit = "share" if all(0 <= value <= 1 for value in values) else "score"
    return Figure(mean=total / len(values), n=len(values), low=low, high=high, unit=unit)


def _aggregates(run: Scored, predictions: list[Prediction], level: float) -> dict[str, Figure]:
    """Return the task's own aggregates with bootstrap intervals over rows."""
    import numpy as np

    from reftune.report.model import Figure

    outcomes = [_outcome(run, prediction) for prediction in predictions]
    rows = list(zip((p.scores for p in predictions), run.examples, outcomes, strict=True))
    point = run.task.aggregate(*map(list, zip(*rows, strict=True)))
    if not point:
        return {}
    generator = np.random.default_rng(run.seed)
    draws: dict[str, list[float]] = {name: [] for name in point}
    for _ in range(_AGGREGATE_RESAMPLES):
        chosen = [rows[i] for i in generator.integers(0, len(rows), len(rows))]
        found = run.task.aggregate(*map(list, zip(*chosen, strict=True)))
        for name, value in found.items():
            if name in draws and math.isfinite(value):
                draws[name].append(value)
    figures = {}
    for name, value in point.items():
        ends: tuple[float | None, float | None] = (None, None)
        if draws[name]:
            low, high = np.quantile(draws[name], [(1 - level) / 2, (1 + level) / 2])
            ends = float(low), float(high)
        unit = "share" if 0 <= value <= 1 else "score"
        mean = value if math.isfinite(value) else None
        figures[name] = Figure(mean=mean, n=len(rows), low=ends[0], high=ends[1], unit=unit)
    return figures


def _outcome(run: Scored, prediction: Prediction) -> Any:
    """Return what `Task.aggregate` takes: a text, a class index or a value."""
    if run.task.kind != "classification":
        return prediction.text
    return float(prediction.text) if "." in prediction.text else int(prediction.text)


def _sample_figures(run: Scored, predictions: list[Prediction], level: float) -> dict[str, Figure]:
    """Return pass@k for k = 2, 4, 8 ... and all samples, and majority@samples."""
    metric, samples = run.task.metric, run.spec.samples
    if not all(p.scores.get(metric) in (0.0, 1.0) for p in predictions):
        return {}
    right = [sum(int(p.scores[metric]) for p in row) for row in _by_row(predictions)]
    sizes = sorted({samples, *(2**i for i in range(1, samples.bit_length()) if 2**i < samples)})
    figures = {}
    for k in sizes:
        values = [stats.pass_at_k(samples, count, k) for count in right]
        figures[f"pass@{k}"] = _figure(values, run.seed, level)
    figures[f"majority@{samples}"] = choice_figure(predictions, metric, _majority, run.seed, level)
    return figures


def choice_figure(
    predictions: Sequence[Prediction],
    metric: str,
    choose: Callable[[Sequence[Prediction]], Prediction | None],
    seed: int,
    level: float = 0.95,
) -> Figure:
    """Return the mean score of the answer that is chosen among the samples of each row.

    Args:
        predictions: All answers.
        metric: What is scored.
        choose: Chooses among the answers to one row; None counts as wrong.
        seed: Seed of a bootstrap interval.
        level: Coverage of the interval.
    """
    chosen = [choose(row) for row in _by_row(predictions)]
    values = [0.0 if answer is None else answer.scores[metric] for answer in chosen]
    return _figure(values, seed, level)


def _by_row(predictions: Sequence[Prediction]) -> list[list[Prediction]]:
    """Return the answers to each row, in the order of the rows."""
    rows: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        rows.setdefault(prediction.id, []).append(prediction)
    return list(rows.values())


def _majority(row: Sequence[Prediction]) -> Prediction | None:
    """Return the first sample with the answer that most samples gave (the earlier on a tie)."""
    given = [p for p in row if p.extracted is not None]
    if not given:
        return None
    winner, _ = Counter(p.extracted for p in given).most_common(1)[0]
    return next(p for p in given if p.extracted == winner)


def _auroc_figure(run: Scored, predictions: list[Prediction], level: float) -> Mapping[str, Figure]:
    """Return the AUROC of the second choice against the first where rows share two choices."""
    from reftune.report.model import Figure

    first = [p for p in predictions if p.sample == 0]
    pairs = {example.choices for example in run.examples}
    if not all(p.logprobs for p in first) or len(pairs) != 1 or len(next(iter(pairs))) != 2:
        return {}
    margins = [p.logprobs[1] - p.logprobs[0] for p in first]
    rows = [(margin, gold_choice(e) == 1) for margin, e in zip(margins, run.examples, strict=True)]
    value = metrics.auroc(*zip(*rows))
    if not math.isfinite(value):
        return {}
    low, high, error = metrics.auroc_interval(*zip(*rows), level)
    return {"auroc": Figure(mean=value, n=len(rows), low=low, high=high, error=error)}
