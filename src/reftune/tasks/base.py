"""What a task is: examples with prompt and target, extraction, and a metric."""

from __future__ import annotations

import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal

from reftune.config.recipe import TaskSpec
from reftune.errors import DataError, RecipeError, nearest

log = logging.getLogger(__name__)

Split = Literal["train", "validation", "test"]
Kind = Literal["generation", "choice", "classification"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One row of a task.

    Prompt and target are tokenised apart and concatenated; the target carries its own leading
    space where the template needs one, and no end-of-sequence token (training appends it).

    Attributes:
        id: Unique within its split.
        prompt: Text the model is given. Empty for chat rows.
        target: Text to learn. May be empty in rows that are only scored.
        answer: Short gold answer.
        question: The bare question, for overlap reports. Empty: the prompt is used.
        messages: Chat rows (`role`, `content`) up to and with the assistant message to learn;
            `prompt` and `target` are then empty and the chat template renders them.
        choices: Full continuations of the prompt to compare by log-probability.
        label: Index of the right choice or class, or a number to regress on.
        pair: Second text of a sentence pair.
        subspace: Dimensions of the edit this row trains and applies.
        meta: Anything else, for reading predictions.
    """

    id: str
    prompt: str
    target: str
    answer: str
    question: str = ""
    messages: tuple[dict[str, str], ...] | None = None
    choices: tuple[str, ...] = ()
    label: int | float | None = None
    pair: str | None = None
    subspace: tuple[int, ...] | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt_messages(self) -> tuple[dict[str, str], ...] | None:
        """The chat rows without a closing assistant message: what generation is given."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            return self.messages[:-1]
        return self.messages

    @property
    def solution(self) -> str:
        """The annotated text: the target, or what the assistant says last."""
        return self.messages[-1]["content"] if self.messages else self.target


@dataclass(frozen=True)
class Options:
    """Options every task understands. Set them under `task.options`."""

    seed: int = 42
    """Seed of the samples that train_size, validation_size and test_size draw."""


class Task(ABC):
    """A benchmark or a set of the user's own.

    Subclasses give `rows_of` (examples of a split) and `rule_for` or `score`. Sizes, seeded
    sampling and options are handled here.

    Args:
        spec: Where the data are and which options apply.

    Raises:
        RecipeError: If an option is unknown or has the wrong type.
    """

    name: ClassVar[str] = ""
    kind: Kind = "generation"
    metric: str = "accuracy"
    max_new_tokens: int = 64
    splits: ClassVar[tuple[Split, ...]] = SPLITS
    num_labels: int | None = None
    """Outputs of the classification head; 1 means regression, None means no head."""
    Options: ClassVar[type] = Options

    hold_out: bool = True
    """Whether validation rows that are cut from the training rows are kept out of those. Training
    switches it off where no one reads them."""

    def __init__(self, spec: TaskSpec) -> None:
        self.spec = spec
        self.options = parse_options(self.Options, spec.options, type(self).name or spec.name)

    @classmethod
    def kind_of(cls, options: dict[str, Any]) -> Kind:
        """Return the kind of the task under these options, without making one."""
        return cls.kind

    @classmethod
    def gives(cls, options: dict[str, Any]) -> frozenset[str]:
        """Return what rows tell position rules under these options: `subject`, `mask`."""
        return frozenset()

    @property
    def prompt_form(self) -> str | None:
        """Prompt around a question, with `{prompt}` in its place; None: chat, or not known."""
        return None

    def cut_from_training(self, split: Split) -> bool:
        """Return whether a split is a part of the training rows that `hold_out` keeps back."""
        return False

    def load(self, split: Split) -> list[Example]:
        """Return the examples of a split, at most `train_size` (and so on) of them.

        Training rows are a seeded sample in shuffled order when `train_size` is set; the others
        are a seeded sample in their own order.

        Raises:
            DataError: If data are missing, malformed, or must not be used this way.
        """
        if split not in self.splits:
            raise DataError(
                f'Task "{self.spec.name}" has no split "{split}".', nearest(split, self.splits)
            )
        examples = list(self.rows_of(split))
        if not examples:
            raise DataError(f'Task "{self.spec.name}" has no {split} rows.', "Check its options.")
        if split == "train":
            _require_targets(examples, self)
        return sample(examples, self.size(split), self.options.seed, shuffled=split == "train")

    def size(self, split: Split) -> int | None:
        """Return the most rows of a split the user wants, or None."""
        return getattr(self.spec, f"{split}_size")

    @abstractmethod
    def rows_of(self, split: Split) -> Sequence[Example]:
        """Return all examples of a split."""

    @abstractmethod
    def extract(self, text: str, example: Example) -> str | None:
        """Return the answer in a generated text, or None."""

    @abstractmethod
    def score(self, text: str, example: Example) -> dict[str, float]:
        """Return 1.0 or 0.0 (or a share) for each metric; the main one is `self.metric`."""

    def look_ahead(self, texts: Sequence[str], examples: Sequence[Example]) -> None:  # noqa: B027
        """Take the texts that `extract` and `score` are asked of next; see `ahead`.

        For tasks that run what is in an answer, which is quicker for several at once. By default
        nothing is done.
        """

    def is_right(self, scores: Mapping[str, float]) -> bool:
        """Return whether what `score` gave says that an answer is right: the main metric is 1."""
        return scores.get(self.metric, 0.0) >= 1.0

    def aggregate(
        self,
        scores: Sequence[dict[str, float]],
        examples: Sequence[Example],
        predictions: Sequence[Any],
    ) -> dict[str, float]:
        """Return metrics that are no mean over examples (MCC, Pearson, F1). Empty by default.

        Args:
            scores: What `score` gave for each example.
            examples: The examples.
            predictions: Generated texts, or class indices (numbers for regression).
        """
        return {}


AHEAD = 1024
"""Texts that a task is told of at once."""


def ahead(
    task: Task, texts: Sequence[str], examples: Sequence[Example]
) -> Iterator[tuple[str, Example]]:
    """Yield texts with their examples, each after the task has looked ahead at it.

    Args:
        task: What will extract and score.
        texts: Generated texts.
        examples: The example of each.
    """
    for start in range(0, len(texts), AHEAD):
        some, own = texts[start : start + AHEAD], examples[start : start + AHEAD]
        task.look_ahead(some, own)
        yield from zip(some, own, strict=True)


def sample(
    examples: Sequence[Example], size: int | None, seed: int, shuffled: bool
) -> list[Example]:
    """Return at most `size` examples: a seeded sample, shuffled or in the given order.

    >>> rows = [Example(str(i), "", "", "") for i in range(9)]
    >>> [row.id for row in sample(rows, 3, 0, shuffled=False)]
    ['1', '5', '7']
    """
    if size is None or (size >= len(examples) and not shuffled):
        return list(examples)
    if size < 1:
        raise RecipeError(f"A size of {size} rows was asked for.", "Ask for at least 1.")
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    chosen = order[:size]
    return [examples[i] for i in (chosen if shuffled else sorted(chosen))]


def _require_targets(examples: Sequence[Example], task: Task) -> None:
    if task.kind == "classification":
        return
    for example in examples:
        if not (example.target.strip() or example.messages):
            raise DataError(
                f'Row {example.id} of task "{task.spec.name}" has no target to learn.',
                "Fill in its answer, or drop the row.",
            )


def parse_options(schema: type, given: dict[str, Any], task: str) -> Any:
    """Return `given` as the options dataclass of a task.

    Raises:
        RecipeError: All unknown or wrong options at once, with the nearest valid name.
    """
    from pydantic import TypeAdapter, ValidationError

    assert is_dataclass(schema)
    known = [entry.name for entry in fields(schema)]
    faults = [
        f'unknown option "{name}" ({nearest(name, known)})' for name in given if name not in known
    ]
    try:
        parsed = TypeAdapter(schema).validate_python(
            {name: value for name, value in given.items() if name in known}
        )
    except ValidationError as error:
        faults += [
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}, got {fault['input']!r}"
            for fault in error.errors()
        ]
    if faults:
        raise RecipeError(
            f'Options of task "{task}": ' + "; ".join(faults) + ".", "Mend task.options."
        )
    return parsed


def hold_out(examples: list[Example], holdout: int, split: Split) -> list[Example]:
    """Return the training rows, or the rows at their end that are kept back for validation.

    At most a tenth of the rows is kept back; with fewer than ten rows none is.
    """
    cut = len(examples) - min(holdout, len(examples) // 10)
    if split == "train" and cut < len(examples):
        rest = len(examples) - cut
        log.info("%d of %d training rows are held out for validation", rest, len(examples))
    return examples[:cut] if split == "train" else examples[cut:]
