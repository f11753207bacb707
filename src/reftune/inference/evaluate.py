"""Scoring a model on a task: answers, extraction by the task, metrics with intervals.

Left out on purpose: bootstrapping over training seeds (that is `stats.over_seeds`) and judging by
another model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reftune.errors import ModelError
from reftune.inference import prompts as rows_of
from reftune.inference import stats
from reftune.inference.choose import choice_lists, choose_rows
from reftune.inference.edits import check_adapters
from reftune.inference.figures import figures_of
from reftune.inference.generate import answer_jobs
from reftune.inference.predictions import (
    Prediction,
    check_rows,
    compare,
    gold_choice,
    prompt_of,
    save_predictions,
    scored,
    show_prompt,
)
from reftune.inference.prefix import shared_prefix
from reftune.inference.running import Job, jobs_of
from reftune.tasks.base import ahead

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from reftune.config.recipe import EvaluationSpec
    from reftune.inference.decoding import Decoding
    from reftune.inference.prefix import PrefixCache
    from reftune.inference.prompts import Row
    from reftune.report.model import Figure
    from reftune.tasks.base import Example, Task

__all__ = ["Evaluation", "Prediction", "compare", "evaluate"]

log = logging.getLogger(__name__)

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

    @property
    def prompts_cut(self) -> int:
        """Rows whose prompt was cut to fit the model's context."""
        return len({prediction.id for prediction in self.predictions if prediction.cut})

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
    max_len: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a model on examples of a task.

    Generation tasks: answers are produced as `spec` says and scored by the task. Several samples a
    prompt give the mean, `pass@k` (unbiased) and `majority@k`. Choice tasks: the same (`choice_by`
    text), and the choice of highest summed log-probability as `choice_accuracy`, with
    `choice_accuracy_per_character` (length-normalised) and, where all rows share the same two
    choices, `auroc`. With `choice_by` probability nothing is generated and the main metric is that
    of the comparison. Classification: arg max (or the value) of the class head. Metrics that are no
    mean come from `task.aggregate`. Every figure has an interval: Wilson for shares of right
    answers, else bootstrap over rows.

    Prompts that leave no room for an answer are cut from the left, as in training, and counted.

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
        max_len: Longest row of a classification in tokens, as in training.
        progress: Called with (answers done, answers in all).

    Raises:
        ReftuneError: If there are no examples, two share an id, or as `generate` and `choose`.
    """
    from reftune.config.recipe import EvaluationSpec

    started = time.perf_counter()
    spec = spec or EvaluationSpec()
    check_rows(examples, "examples", "evaluate")
    run = _Run(model, tokenizer, task, examples, spec, seed, adapter_names, max_len, progress)
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


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    spec: EvaluationSpec,
    *,
    seed: int = 0,
    first: int = 0,
) -> list[Prediction]:
    """Answer examples as `evaluate` does; return each sample with what the task says of it.

    A sample depends on seed, number of its example and number of the sample only (up to rounding in
    the model), so examples may be answered some at a time.

    Args:
        model: The model with its active adapters.
        tokenizer: Its tokenizer.
        task: What to ask and how to score.
        examples: Rows.
        spec: Batch size, decoding, samples.
        seed: Seed of sampling.
        first: Number of the first example.

    Raises:
        ReftuneError: As `evaluate`.
    """
    return _generated(_Run(model, tokenizer, task, examples, spec, seed, first=first))


@dataclass(frozen=True)
class _Run:
    """The arguments of one evaluation."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    task: Task
    examples: Sequence[Example]
    spec: EvaluationSpec
    seed: int
    adapter_names: Sequence[str] | None = None
    max_len: int | None = None
    progress: Progress | None = None
    first: int = 0

    @property
    def prompts(self) -> list[Any]:
        """What the model is given for each example."""
        return [prompt_of(example) for example in self.examples]

    @property
    def subjects(self) -> list[str | None]:
        """The subject of each example, for position rules."""
        return [example.meta.get("subject") for example in self.examples]

    @property
    def subspaces(self) -> list[tuple[int, ...] | None]:
        """The dimensions of the edit that act on each example."""
        return [example.subspace for example in self.examples]

    def rows(self, max_new_tokens: int) -> list[Row]:
        """The prompts in tokens, cut so that an answer fits into the context."""
        marks = [example.meta.get("mask") for example in self.examples]
        seq2seq = rows_of.is_seq2seq(self.model)
        found = rows_of.encode_prompts(self.tokenizer, self.prompts, seq2seq, self.subjects, marks)
        return rows_of.fit(self.model, found, max_new_tokens, "prompts to score")


def _generated(run: _Run) -> list[Prediction]:
    """Return a prediction for each sample of each example."""
    task, spec = run.task, run.spec
    decoding = _decoding(run)
    rows_of.require_generation(run.model)
    names = check_adapters(run.model, run.adapter_names, len(run.examples))
    rows = run.rows(decoding.max_new_tokens)
    jobs = jobs_of(run.model, rows, decoding, names, run.subspaces, run.first)
    progress = run.progress or False
    batch = (spec.batch_size, progress, _shared(run, jobs, decoding.options))
    answers = answer_jobs(run.model, run.tokenizer, jobs, decoding, *batch)
    asked = [
        (example, text, sample, row.cut)
        for example, row, texts in zip(run.examples, rows, answers, strict=True)
        for sample, text in enumerate(texts)
    ]
    pairs = ahead(task, [text for _, text, *_ in asked], [example for example, *_ in asked])
    return [scored(task, *told) for told, _ in zip(asked, pairs, strict=True)]


def _shared(run: _Run, jobs: Sequence[Job], options: Mapping[str, Any]) -> PrefixCache | None:
    """Return what all prompts begin with, computed once, where that pays."""
    with rows_of.evaluating(run.model):
        shared = shared_prefix(run.model, jobs, options)
    if shared is not None:
        log.info(
            "all %d prompts begin with the same %d tokens; they are computed once",
            *(len(run.examples), len(shared)),
        )
    return shared


def _decoding(run: _Run) -> Decoding:
    """Return how answers are produced."""
    from reftune.inference.decoding import Decoding

    spec = run.spec
    return Decoding(
        spec.max_new_tokens or run.task.max_new_tokens,
        spec.temperature,
        spec.top_p,
        spec.top_k,
        spec.samples,
        run.seed,
        tuple(getattr(run.task, "stop", ())),
        {
            "num_beams": spec.num_beams,
            "repetition_penalty": spec.repetition_penalty,
            "no_repeat_ngram_size": spec.no_repeat_ngram_size,
        },
    )


def _compared(run: _Run, generated: list[Prediction]) -> list[Prediction]:
    """Add the comparison of choices to predictions, or make them of it alone."""
    golds = [gold_choice(example) for example in run.examples]
    lists = choice_lists(len(golds), [example.choices for example in run.examples])
    rows_of.require_generation(run.model)
    tokens = (run.tokenizer(c, add_special_tokens=False)["input_ids"] for c in {*chain(*lists)})
    rows = run.rows(max(map(len, tokens)))
    names = check_adapters(run.model, run.adapter_names, len(rows))
    told = [(r.subject, None, r.mask) for r in rows]
    jobs = [Job(i, 0, r.ids, 0, names[i] if names else None, *told[i]) for i, r in enumerate(rows)]
    logprobs = choose_rows(
        *(run.model, run.tokenizer, rows, lists, run.spec.batch_size),
        *(run.adapter_names, run.subspaces, run.progress, _shared(run, jobs, {})),
    )
    extra: dict[str, tuple[dict[str, float], tuple[float, ...]]] = {}
    alone = []
    for example, gold, values, row in zip(run.examples, golds, logprobs, rows, strict=True):
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
        told = (main, 0, tuple(values), row.cut)
        alone.append(Prediction(example.id, prompt, text, extracted, example.answer, *told))
    if not generated:
        return alone
    return [
        replace(p, scores={**p.scores, **extra[p.id][0]}, logprobs=extra[p.id][1])
        for p in generated
    ]


def _classified(run: _Run) -> list[Prediction]:
    """Return the class (or value) the model's class head gives each example."""
    from reftune.inference.classify import class_rows, logits_of

    texts = [(example.prompt, example.pair or None) for example in run.examples]
    rows = class_rows(
        *(run.model, run.tokenizer, texts),
        *(run.adapter_names, run.subjects, run.subspaces, run.max_len),
    )
    logits = logits_of(run.model, run.tokenizer, rows, run.spec.batch_size, run.progress)
    if run.task.num_labels is not None and logits.shape[1] != run.task.num_labels:
        raise ModelError(
            f"The model's head gives {logits.shape[1]} numbers a row; the task has "
            f"{run.task.num_labels}.",
            "Load the adapter that was trained for this task.",
        )
    predictions = []
    for example, row, values in zip(run.examples, rows, logits.tolist(), strict=True):
        text = str(values[0]) if len(values) == 1 else str(values.index(max(values)))
        predictions.append(
            Prediction(
                id=example.id,
                prompt="\n".join(filter(None, (example.prompt, example.pair))),
                text=text,
                extracted=text,
                answer=example.answer,
                scores={k: float(v) for k, v in run.task.score(text, example).items()},
                cut=row.cut,
            )
        )
    return predictions
