"""Sampled answers as training data: right ones for self-training, all for an outcome reward model.

Each question is answered several times; the answers are scored by the task and those that are the
same text count once (Luong et al. 2024, arXiv 2401.08967, offline self-training and reranking).

Left out on purpose: answers told apart by more than their text (an equation, a tree of steps), and
a random choice among the right ones: the first ones are as random, and the same in every call.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from reftune.errors import RecipeError
from reftune.inference.evaluate import answer
from reftune.inference.predictions import show_prompt
from reftune.inference.resuming import Row, rows_to_file

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from reftune.config.recipe import EvaluationSpec
    from reftune.inference.predictions import Prediction
    from reftune.tasks.base import Example, Split, Task

Answering = Callable[[Sequence["Example"], int], list["Prediction"]]
"""Answers to examples, all samples of each; the number is the place of the first of them."""
BATCHES = 8
"""Batches between two lines of the unfinished file."""


@dataclass(frozen=True)
class Keep:
    """Which answers to a question are kept.

    Raises:
        RecipeError: If `most` is below 1.
    """

    which: Literal["right", "all"] = "right"
    """Right answers, or wrong ones too."""
    most: int | None = 10
    """The first n of them that differ, as in the published code; None is all."""
    gold: bool = False
    """Add the annotated solution where the answers that are kept do not hold it."""

    def __post_init__(self) -> None:
        if self.most is not None and self.most < 1:
            raise RecipeError(f"most is {self.most}.", "Keep at least 1 answer, or None for all.")


def shown_row(example: Example, text: str, extracted: str | None) -> Row:
    """Return what is seen of an answer without knowing whether it is right.

    Args:
        example: The question.
        text: The answer as it was written, with its leading space.
        extracted: The short answer in it, or None.
    """
    messages = example.prompt_messages
    prompt = show_prompt(example.prompt if messages is None else messages)
    row = {"question": example.question or prompt, "prompt": prompt, "completion": text}
    return {**row, "answer": extracted}


def rows_of(
    task: Task, example: Example, answers: Sequence[Prediction], split: Split, keep: Keep
) -> list[Row]:
    """Return the rows of one question: its answers that are kept, told apart by their text.

    Args:
        task: Says which metric is the main one.
        example: The question.
        answers: The answers to it, in the order of their samples.
        split: Where the question is from.
        keep: Which answers are kept.
    """
    found: dict[str, Row] = {}
    for given in answers:
        right = task.is_right(given.scores)
        if len(found) == keep.most:
            break
        if right or keep.which == "all":
            row = _row(example, str(given.sample), given.text, given.extracted, right, split)
            found.setdefault(given.text.strip(), row)
    solution = example.solution
    if keep.gold and solution.strip() not in found:
        found[solution.strip()] = _row(example, "gold", solution, example.answer, True, split)
    return list(found.values())


def _row(
    example: Example, name: str, text: str, extracted: str | None, right: bool, split: Split
) -> Row:
    row = {"id": f"{example.id}.{name}", "split": split, **shown_row(example, text, extracted)}
    row |= {"gold": example.answer, "right": right}
    if example.prompt_messages is not None:  # what trains is rendered by the chat template
        turn = {"role": "assistant", "content": text}
        row["messages"] = [*example.prompt_messages, turn]
    return row


def answering(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    spec: EvaluationSpec,
    seed: int = 0,
) -> Answering:
    """Return a function that has a model answer examples; the noise is by seed, place and sample.

    Args:
        model: The model with its active adapters.
        tokenizer: Its tokenizer.
        task: What to ask and how to score.
        spec: Batch size, temperature, samples.
        seed: Seed of the noise.
    """

    def answers(examples: Sequence[Example], first: int) -> list[Prediction]:
        return answer(model, tokenizer, task, examples, spec, seed=seed, first=first)

    return answers


def collect(
    path: str | os.PathLike[str],
    task: Task,
    examples: Sequence[Example],
    answers: Answering,
    spec: EvaluationSpec,
    settings: dict[str, Any],
    *,
    split: Split = "train",
    keep: Keep | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Answer examples into a JSONL file, a row an answer; a killed call goes on where it was.

    A row has `id`, `split`, `question`, `prompt`, `completion`, `answer` (as extracted), `gold` and
    `right`; a chat also has `messages`.

    Args:
        path: The `.jsonl` file to write.
        task: Tells right from wrong.
        examples: The questions.
        answers: Answers them, as `answering` does.
        spec: What the answers are sampled by.
        settings: What else the rows depend on, such as model and seed.
        split: Where the questions are from.
        keep: Which answers are kept.
        progress: Called with (questions done, questions in all).

    Raises:
        DataError: If unfinished rows of another call are there.
    """
    keep = keep or Keep()
    chunk = -(-BATCHES * spec.batch_size // spec.samples)

    def make(some: Sequence[Example], start: int) -> list[Row]:
        given = answers(some, start)
        several = [given[i : i + spec.samples] for i in range(0, len(given), spec.samples)]
        pairs = zip(some, several, strict=True)
        return [row for e, samples in pairs for row in rows_of(task, e, samples, split, keep)]

    how = {"split": split, "keep": asdict(keep), "decoding": asdict(spec)}
    settings = {**settings, **how, "questions": [example.id for example in examples]}
    return rows_to_file(path, examples, make, settings, chunk, progress)
