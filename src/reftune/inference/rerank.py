"""Reranking: of sampled answers the one that an outcome reward model holds most likely right.

The reward model is a sequence classifier of answers into right and wrong, trained on all rows of
`reftune sample` (Luong et al. 2024, arXiv 2401.08967; Cobbe et al. 2021, arXiv
2110.14168). It reads question and answer as text and tells by the last token.

Left out on purpose: scores of single steps, and votes weighed by the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from reftune.errors import DataError, RecipeError
from reftune.inference.classify import class_logits
from reftune.inference.figures import choice_figure
from reftune.inference.sampling import shown_row

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from reftune.inference.evaluate import Evaluation
    from reftune.inference.predictions import Prediction
    from reftune.tasks.base import Example, Task
    from reftune.tasks.own import Own

RIGHT = ("true", "1", "yes", "right", "correct")
"""Names, in lower case, of the class that says an answer is right."""

Rater = Callable[[Sequence["Example"], Sequence["Prediction"]], list[float]]
"""Scores of answers, the higher the better, each with the example it answers."""


def reward_task(task: Task) -> tuple[Own, int]:
    """Return a task of right and wrong answers, and the index of the class of right ones.

    Raises:
        RecipeError: If the task is no classification of own data with one class of `RIGHT`.
    """
    from reftune.tasks.own import Own

    remedy = "Train on rows of `reftune sample --keep all` with `label: right`."
    if not isinstance(task, Own) or task.kind != "classification":
        raise RecipeError(
            f'The task "{task.spec.name}" of the reward model does not classify answers.', remedy
        )
    right = [i for i, name in enumerate(task.labels) if name.lower() in RIGHT]
    if len(task.labels) != 2 or len(right) != 1:
        raise RecipeError(
            f"The reward model has the classes {', '.join(task.labels)}; which is right?", remedy
        )
    return task, right[0]


class OutcomeModel:
    """P(right) of answers, by a sequence classifier; a `Rater`.

        P(right | question, answer) = softmax(z)[right],   z the logits at the last token

    Args:
        model: The classifier.
        tokenizer: Its tokenizer.
        task: What it was trained on: how question and answer are put together, and its classes.
        batch_size: Answers a forward pass.
        max_len: Longest text in tokens, as in training.
        progress: Called with (answers done, answers in all).

    Raises:
        RecipeError: If the task is none of right and wrong answers.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        batch_size: int = 32,
        max_len: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.task, self.right = reward_task(task)
        self.settings = {"batch_size": batch_size, "max_len": max_len, "progress": progress}

    def __call__(
        self, examples: Sequence[Example], predictions: Sequence[Prediction]
    ) -> list[float]:
        """Return P(right) of each answer.

        Args:
            examples: The example of each answer.
            predictions: The answers.

        Raises:
            DataError: If the task's template asks for a field that an unscored answer has not.
            ModelError: If the model has no class head.
        """
        pairs = zip(examples, predictions, strict=True)
        rows = [shown_row(example, given.text, given.extracted) for example, given in pairs]
        texts = [self.task.shown(row, "An answer to rerank") for row in rows]
        logits = class_logits(self.model, self.tokenizer, texts, **self.settings)
        return logits.double().softmax(-1)[:, self.right].tolist()


def rerank(
    evaluation: Evaluation,
    examples: Sequence[Example],
    rater: Rater,
    *,
    seed: int = 0,
    level: float = 0.95,
) -> Evaluation:
    """Add `rerank@k` to an evaluation of k sampled answers a question.

    Of the answers to a question in which something was found, the one with the highest score counts
    (the earlier one on a tie); where there is none the question counts as wrong. `majority@k` and
    `pass@k` of the evaluation are of the same answers.

    Args:
        evaluation: The evaluation; its predictions get `p_right`.
        examples: The rows that were scored.
        rater: Scores the answers, such as `OutcomeModel`.
        seed: Seed of a bootstrap interval.
        level: Coverage of the interval.

    Raises:
        DataError: If a question has one answer only, or is not among the examples.
    """
    known = {example.id: example for example in examples}
    given = evaluation.predictions
    missing = next((p.id for p in given if p.id not in known), None)
    if missing is not None:
        raise DataError(f'There is no example "{missing}".', "Give the rows that were scored.")
    samples = 1 + max(p.sample for p in given)
    if samples < 2:
        raise DataError(
            "There is one answer a question, and nothing to rerank.",
            "Sample several: --samples 16 --temperature 1.",
        )
    scores = rater([known[p.id] for p in given], given)
    rated = [replace(p, p_right=score) for p, score in zip(given, scores, strict=True)]
    figure = choice_figure(rated, evaluation.metric, best, seed, level)
    figures = {**evaluation.figures, f"rerank@{samples}": figure}
    return replace(evaluation, figures=figures, predictions=rated)


def best(answers: Sequence[Prediction]) -> Prediction | None:
    """Return the answer of the highest `p_right` among those in which something was found."""
    found = [p for p in answers if p.extracted is not None]
    return max(found, key=lambda p: p.p_right or 0.0, default=None)
