"""Scoring a model on a task: answers, extraction by the task, metrics with intervals.

Left out on purpose: bootstrapping over training seeds (that is `stats.over_seeds`) and judging by
another model.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reftune.errors import DataError, ModelError
from reftune.inference import stats
from reftune.inference.choose import choose
from reftune.inference.figures import figures_of
from reftune.inference.generate import generate
from reftune.inference.predictions import (
    Prediction,
    compare,
    gold_choice,
    save_predictions,
    show_prompt,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from reftune.config.recipe import EvaluationSpec
    from reftune.report.model import Figure
    from reftune.tasks.base import Example, Task

__all__ = ["Evaluation", "Prediction", "compare", "evaluate"]

ChoiceBy = Literal["both", "text", "probability"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found out.

    Attributes:
        figures: Each metric with its 95 % interval.
        predictions: Every answer with its scores, in the order of the examples.
        seconds: Wall-clock time.
        metric: Name of the main figure.
    """

    figures: dict[str, Figure]
    predictions: list[Prediction]
    seconds: float
    metric: str = "accuracy"

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the predictions as JSON lines, the whole file or none."""
        return save_predictions(path, self.predictions)

    def compare(self, other: Evaluation, metric: str | None = None) -> stats.PairedTest:
        """Test this evaluation against another on the same rows; see `predictions.compare`."""
        return compare(self, other, metric or self.metric)


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    spec: EvaluationSpec | None = None,
    *,
    seed: int = 0,
    adapter_names: Sequence[str] | None = None,
    choice_by: ChoiceBy = "both",
    level: float = 0.95,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a model on examples of a task.

    Generation tasks: answers are produced as `spec` says and scored by the task, which also
    extracts for training rewards. Several samples a prompt give the mean, `pass@k` (unbiased) and
    `majority@k`. Choice tasks: the same (`choice_by` text), and the choice of highest summed
    log-probability as `choice_accuracy`, with `choice_accuracy_per_character` (length-normalised)
    and, where all rows share the same two choices, `auroc`. With `choice_by` probability nothing
    is generated and the main metric is that of the comparison. Classification: arg max (or the
    value) of the class head. Metrics that are no mean come from `task.aggregate`.

    Every figure has an interval: Wilson for shares of right answers, bootstrap over rows else.

    Args:
        model: The model with its active adapters.
        tokenizer: Its tokenizer.
        task: What to ask and how to score.
        examples: Rows, usually `task.load("test")`.
        spec: Batch size, decoding, samples. Default: `EvaluationSpec()`.
        seed: Seed of sampling and of the bootstrap.
        adapter_names: Adapter of each example; `__base__` is the base model.
        choice_by: How choice tasks answer: by text, by probability, or both.
        level: Coverage of the intervals.
        progress: Called with (answers done, answers in all).

    Raises:
        DataError: If there are no examples, or two share an id.
        ReftuneError: As `generate` and `choose`.
    """
    from reftune.config.recipe import EvaluationSpec

    started = time.perf_counter()
    spec = spec or EvaluationSpec()
    _check(examples)
    run = _Run(model, tokenizer, task, examples, spec, seed, adapter_names, progress)
    if task.kind == "classification":
        predictions = _classified(run)
    else:
        compared = task.kind == "choice" and choice_by != "text"
        generated = task.kind == "generation" or choice_by != "probability"
        predictions = _generated(run) if generated else []
        if compared:
            predictions = _compared(run, predictions)
    figures = figures_of(run, predictions, level)
    seconds = time.perf_counter() - started
    return Evaluation(figures, predictions, seconds, task.metric)


@dataclass(frozen=True)
class _Run:
    """The arguments of one evaluation."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    task: Task
    examples: Sequence[Example]
    spec: EvaluationSpec
    seed: int
    adapter_names: Sequence[str] | None
    progress: Progress | None

    @property
    def prompts(self) -> list[Any]:
        """What the model is given for each example."""
        return [e.prompt if e.messages is None else list(e.prompt_messages) for e in self.examples]

    @property
    def edits(self) -> dict[str, Any]:
        """What the examples tell the interventions."""
        return {
            "adapter_names": self.adapter_names,
            "subjects": [e.meta.get("subject") for e in self.examples],
            "subspaces": [e.subspace for e in self.examples],
        }


def _check(examples: Sequence[Example]) -> None:
    if not examples:
        raise DataError("There are no examples to evaluate.", "Check the split and its size.")
    double, times = Counter(example.id for example in examples).most_common(1)[0]
    if times > 1:
        raise DataError(f'{times} examples have the id "{double}".', "Give each row its own id.")


def _generated(run: _Run) -> list[Prediction]:
    """Return a prediction for each sample of each example."""
    task, spec = run.task, run.spec
    answers = generate(
        run.model,
        run.tokenizer,
        run.prompts,
        max_new_tokens=spec.max_new_tokens or task.max_new_tokens,
        batch_size=spec.batch_size,
        temperature=spec.temperature,
        top_p=spec.top_p,
        samples=spec.samples,
        seed=run.seed,
        stop=getattr(task, "stop", ()),
        progress=run.progress or False,
        **run.edits,
    )
    return [
        Prediction(
            id=example.id,
            prompt=show_prompt(prompt),
            text=text,
            extracted=task.extract(text, example),
            answer=example.answer,
            scores={name: float(v) for name, v in task.score(text, example).items()},
            sample=sample,
        )
        for example, prompt, texts in zip(run.examples, run.prompts, answers, strict=True)
        for sample, text in enumerate(texts)
    ]


def _compared(run: _Run, generated: list[Prediction]) -> list[Prediction]:
    """Add the comparison of choices to predictions, or make them of it alone."""
    golds = [gold_choice(example) for example in run.examples]
    logprobs = choose(
        run.model,
        run.tokenizer,
        run.prompts,
        [example.choices for example in run.examples],
        batch_size=run.spec.batch_size,
        progress=run.progress,
        **run.edits,
    )
    extra: dict[str, tuple[dict[str, float], tuple[float, ...]]] = {}
    alone = []
    for example, gold, values in zip(run.examples, golds, logprobs, strict=True):
        best = max(range(len(values)), key=values.__getitem__)
        lengths = [max(1, len(choice.strip())) for choice in example.choices]
        relative = [value / length for value, length in zip(values, lengths, strict=True)]
        scores = {
            "choice_accuracy": float(best == gold),
            "choice_accuracy_per_character": float(relative.index(max(relative)) == gold),
        }
        extra[example.id] = scores, tuple(values)
        text = example.choices[best]
        prompt = show_prompt(example.prompt if example.messages is None else example.messages)
        main = {run.task.metric: scores["choice_accuracy"], **scores}
        extracted = run.task.extract(text, example)
        alone.append(
            Prediction(example.id, prompt, text, extracted, example.answer, main, 0, tuple(values))
        )
    if not generated:
        return alone
    return [
        replace(p, scores={**p.scores, **extra[p.id][0]}, logprobs=extra[p.id][1])
        for p in generated
    ]


def _classified(run: _Run) -> list[Prediction]:
    """Return the class (or value) the model's class head gives each example."""
    from reftune.inference.classify import class_logits

    logits = class_logits(
        run.model,
        run.tokenizer,
        [(example.prompt, example.pair or None) for example in run.examples],
        batch_size=run.spec.batch_size,
        progress=run.progress,
        **run.edits,
    )
    if run.task.num_labels is not None and logits.shape[1] != run.task.num_labels:
        raise ModelError(
            f"The model's head gives {logits.shape[1]} numbers a row; the task has "
            f"{run.task.num_labels}.",
            "Load the adapter that was trained for this task.",
        )
    predictions = []
    for example, row in zip(run.examples, logits.tolist(), strict=True):
        text = str(row[0]) if len(row) == 1 else str(row.index(max(row)))
        predictions.append(
            Prediction(
                id=example.id,
                prompt="\n".join(filter(None, (example.prompt, example.pair))),
                text=text,
                extracted=text,
                answer=example.answer,
                scores={k: float(v) for k, v in run.task.score(text, example).items()},
            )
        )
    return predictions
