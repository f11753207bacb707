"""Prefix quality: who has to write the first tokens of an answer for it to become right?

    a(f, s, m) = share of right answers when f writes the first m tokens and s the rest,
    a(f, s, 0) = s alone,   a(f, s, m) = f alone where no answer of f has more than m tokens.

BREP (Liang et al. 2025) holds that representation edits hurt reasoning through the first tokens. If
so, `a(adapter, base, m)` falls below the base already at a small m, and `a(base, adapter, m)` rises
above the adapter: the adapter goes on well from a good beginning. Answers are greedy. The end token
counts as a token, and an answer that ended among the first m stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from reftune.errors import RecipeError
from reftune.inference.continuing import WRITERS, Writer, Written, has_stop, text_of
from reftune.inference.predictions import Prediction, compare
from reftune.inference.stats import PairedTest

if TYPE_CHECKING:
    from reftune.inference.study import Study
    from reftune.report.model import Figure

TOKENS: tuple[int, ...] = (0, 8, 16, 32, 64)
"""Tokens that the first writer writes, unless others are asked for."""


@dataclass(frozen=True)
class Point:
    """Accuracy when one model writes the first tokens and the other goes on.

    Attributes:
        first: Who writes the first tokens.
        tokens: How many.
        figure: The main metric of the task.
        ended: Rows whose answer was over by then.
        test: Against the model that goes on, alone; the difference is what the first tokens did.
    """

    first: Writer
    tokens: int
    figure: Figure
    ended: int
    test: PairedTest


@dataclass(frozen=True)
class PrefixQuality:
    """What the first tokens of answers are worth.

    Attributes:
        metric: Name of the task's main metric.
        alone: Figure of each model alone.
        lengths: Mean tokens of its answers, the end token not counted.
        test: Adapter minus base, each alone.
        points: One for each first writer and number of tokens.
        answers: Every answer, to be read.
    """

    metric: str
    alone: dict[Writer, Figure]
    lengths: dict[Writer, float]
    test: PairedTest
    points: list[Point]
    answers: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def at(self, first: Writer, tokens: int) -> Point:
        """Return the point of a first writer and a number of tokens."""
        return next(p for p in self.points if (p.first, p.tokens) == (first, tokens))


def check_tokens(tokens: Sequence[int]) -> tuple[int, ...]:
    """Return numbers of first tokens in order, each once.

    Raises:
        RecipeError: If there are none, or one is negative.

    >>> check_tokens([8, 0, 8])
    (0, 8)
    """
    if not tokens or min(tokens) < 0:
        given = ", ".join(map(str, tokens)) or "none"
        raise RecipeError(
            f"First tokens to hand over: {given}.", "Give numbers from 0, such as 0,8,16,32,64."
        )
    return tuple(sorted(set(tokens)))


def prefix_quality(study: Study, tokens: Sequence[int] = TOKENS) -> PrefixQuality:
    """Score answers that one model began and the other went on with, and the reverse.

    Args:
        study: Model, task and rows.
        tokens: Numbers of first tokens.

    Raises:
        RecipeError: If a number is negative.
    """
    from reftune.inference.figures import figures_of

    tokens = check_tokens(tokens)
    metric = study.task.metric
    written = {who: study.write(who, study.starts, f"answers of the {who}") for who in WRITERS}
    alone = {
        who: study.predictions(_texts(study, [w.ids for w in written[who]])) for who in WRITERS
    }

    def figure(predictions: list[Prediction]) -> Figure:
        return figures_of(study, predictions, study.level)[metric]

    points, answers = [], []
    for first, second in (WRITERS, WRITERS[::-1]):
        handed = _handed_over(study, written[first], second, tokens)
        for count in tokens:
            texts, ended = handed.get(count, ([], 0))
            predictions = study.predictions(texts) if count else alone[second]
            test = compare(predictions, alone[second], metric, study.level)
            points.append(Point(first, count, figure(predictions), ended, test))
            answers += [_to_read(first, count, row, metric) for row in predictions]
    return PrefixQuality(
        metric,
        {who: figure(alone[who]) for who in WRITERS},
        {who: sum(len(w.ids) for w in written[who]) / len(written[who]) for who in WRITERS},
        compare(alone["adapter"], alone["base"], metric, study.level),
        points,
        answers,
    )


def _handed_over(
    study: Study, begun: list[Written], second: Writer, tokens: Sequence[int]
) -> dict[int, tuple[list[str], int]]:
    """Return for each number of tokens above 0 the answers, and how many were over by then."""
    starts = {
        (count, index): replace(start, given=written.ids[:count], budget=start.budget - count)
        for count in filter(None, tokens)
        for index, (start, written) in enumerate(zip(study.starts, begun, strict=True))
        if not _is_over(study, written, count, start.budget)
    }
    rest = study.write(second, list(starts.values()), f"the {second} goes on") if starts else []
    more = dict(zip(starts, rest, strict=True))
    handed = {}
    for count in filter(None, tokens):
        ids = [
            (*written.ids[:count], *more[count, index].ids)
            if (count, index) in more
            else written.ids
            for index, written in enumerate(begun)
        ]
        ended = sum((count, index) not in more for index in range(len(begun)))
        handed[count] = _texts(study, ids), ended
    return handed


def _is_over(study: Study, written: Written, count: int, budget: int) -> bool:
    """Return whether nothing is left to write behind the first tokens of an answer."""
    if count >= budget or (written.ended and len(written.ids) < count):
        return True
    return has_stop(study.tokenizer, written.ids[:count], study.decoding)


def _texts(study: Study, rows: Sequence[Sequence[int]]) -> list[str]:
    return [text_of(study.tokenizer, ids, study.decoding) for ids in rows]


def _to_read(first: Writer, count: int, row: Prediction, metric: str) -> dict[str, Any]:
    facts = {"part": "prefix", "first": first, "tokens": count, "id": row.id, "text": row.text}
    return {
        **facts,
        "extracted": row.extracted,
        "answer": row.answer,
        metric: row.scores[metric],
    }
