"""Predictions on disk, and two sets of them against each other."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from reftune.errors import DataError, nearest
from reftune.inference.stats import PairedTest, mcnemar, paired_bootstrap

if TYPE_CHECKING:
    from reftune.tasks.base import Example, Task


@dataclass(frozen=True)
class Prediction:
    """One answer and what it scored.

    Attributes:
        id: Id of the example.
        prompt: What the model was given; chats as `role: content` lines.
        text: What it answered.
        extracted: The answer found in the text, or None.
        answer: The gold answer.
        scores: Value of each metric.
        sample: Number of the sample, from 0.
        logprobs: Log-probability of each choice in nats, where choices were compared.
        cut: Tokens of the prompt that were cut off because it was too long.
        p_right: Probability that it is right, where a reward model was asked.
    """

    id: str
    prompt: str
    text: str
    extracted: str | None
    answer: str
    scores: dict[str, float] = field(default_factory=dict)
    sample: int = 0
    logprobs: tuple[float, ...] | None = None
    cut: int = 0
    p_right: float | None = None


class HasPredictions(Protocol):
    """An evaluation."""

    predictions: list[Prediction]
    metric: str


def save_predictions(path: str | PathLike[str], predictions: Iterable[Prediction]) -> Path:
    """Write one JSON object a line, the whole file or none."""
    from reftune.report.files import to_json, write_text_atomic

    return write_text_atomic(path, "".join(to_json(asdict(p)) + "\n" for p in predictions))


def load_predictions(path: str | PathLike[str]) -> list[Prediction]:
    """Read what `save_predictions` wrote.

    Raises:
        DataError: If the file is missing or a line is no prediction.
    """
    path, found = Path(path), []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}).", "Give a predictions file.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if row.get("logprobs") is not None:
                row["logprobs"] = tuple(row["logprobs"])
            found.append(Prediction(**row))
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} line {number} is no prediction ({error}).",
                "Give a file that `reftune eval` or Evaluation.save wrote.",
            ) from error
    return found


def compare(
    a: HasPredictions | Sequence[Prediction],
    b: HasPredictions | Sequence[Prediction],
    metric: str | None = None,
    level: float = 0.95,
) -> PairedTest:
    """Test whether two evaluations of the same rows differ; the difference is a minus b.

    McNemar's exact test where every row is right or wrong; otherwise (several samples a row,
    graded metrics) a paired bootstrap over rows.

    Args:
        a: An evaluation, or its predictions.
        b: The other one; rows are matched by id.
        metric: Metric to compare; default is the main metric of `a`.
        level: Coverage of the interval.

    Raises:
        DataError: If the two do not hold the same rows or lack the metric.
    """
    metric = metric or getattr(a, "metric", "accuracy")
    left, right = row_values(_rows(a), metric), row_values(_rows(b), metric)
    if left.keys() != right.keys():
        differ = sorted(left.keys() ^ right.keys())
        raise DataError(
            f"The two evaluations hold different rows: {len(left)} against {len(right)}, of which "
            f'{len(differ)} are in one only ("{differ[0]}").',
            "Evaluate both on the same split with the same size and seed.",
        )
    x, y = list(left.values()), [right[key] for key in left]
    if all(value in (0.0, 1.0) for value in (*x, *y)):
        return mcnemar(x, y, level)
    return paired_bootstrap(x, y, level=level)


def row_values(predictions: Sequence[Prediction], metric: str) -> dict[str, float]:
    """Return the value of a metric for each row, the mean over its samples.

    Raises:
        DataError: If there are no predictions or one lacks the metric.
    """
    if not predictions:
        raise DataError("There are no predictions to compare.", "Evaluate at least one row.")
    collected: dict[str, list[float]] = {}
    for prediction in predictions:
        if metric not in prediction.scores:
            raise DataError(
                f'Prediction "{prediction.id}" has no metric "{metric}".',
                nearest(metric, prediction.scores),
            )
        collected.setdefault(prediction.id, []).append(prediction.scores[metric])
    return {key: math.fsum(values) / len(values) for key, values in collected.items()}


def show_prompt(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """Return a prompt as text to read.

    >>> show_prompt([{"role": "user", "content": "Hello"}])
    'user: Hello'
    """
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def prompt_of(example: Example) -> Any:
    """Return what a model is asked: a text, or the messages before the answer."""
    return example.prompt if example.messages is None else list(example.prompt_messages or ())


def scored(task: Task, example: Example, text: str, sample: int = 0, cut: int = 0) -> Prediction:
    """Return an answer with what the task finds in it and what that scores.

    Args:
        task: The task.
        example: The row that was asked.
        text: The answer.
        sample: Number of the sample.
        cut: Tokens of the prompt that were cut off.
    """
    return Prediction(
        id=example.id,
        prompt=show_prompt(prompt_of(example)),
        text=text,
        extracted=task.extract(text, example),
        answer=example.answer,
        scores={name: float(value) for name, value in task.score(text, example).items()},
        sample=sample,
        cut=cut,
    )


def check_rows(examples: Sequence[Example], rows: str = "rows", purpose: str = "score") -> None:
    """Check that there are rows, each with an id of its own.

    Args:
        examples: The rows.
        rows: What a message calls them.
        purpose: What they are for, in a message.

    Raises:
        DataError: If there are none, or two share an id.
    """
    if not examples:
        raise DataError(f"There are no {rows} to {purpose}.", "Check the split and its size.")
    double, times = Counter(example.id for example in examples).most_common(1)[0]
    if times > 1:
        raise DataError(f'{times} {rows} have the id "{double}".', "Give each row its own id.")


def gold_choice(example: Example) -> int:
    """Return the index of the right choice: its label, else where target or answer stand.

    Raises:
        DataError: If there are fewer than two choices or none of them is right.
    """
    if len(example.choices) < 2:
        raise DataError(
            f'Row "{example.id}" has {len(example.choices)} choices to compare.',
            "Give at least two, or score generated text only (choice_by: text).",
        )
    if isinstance(example.label, int) and 0 <= example.label < len(example.choices):
        return example.label
    for texts in (example.choices, [choice.strip() for choice in example.choices]):
        for wanted in (example.target, example.answer, example.answer.strip()):
            if wanted in texts:
                return list(texts).index(wanted)
    raise DataError(
        f'Row "{example.id}": the answer "{example.answer}" is none of its choices.',
        "Set label to the index of the right choice.",
    )


def _rows(source: HasPredictions | Sequence[Prediction]) -> Sequence[Prediction]:
    return getattr(source, "predictions", source)
