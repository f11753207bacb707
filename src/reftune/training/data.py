"""The rows of a run: which splits it needs, what training may see, and what they share."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reftune.errors import DataError

if TYPE_CHECKING:
    from reftune.config.recipe import Recipe, StageSpec
    from reftune.tasks.base import Example, Task

log = logging.getLogger(__name__)


@dataclass
class Data:
    """The rows of a run.

    Attributes:
        task: Where they come from.
        splits: Rows of the splits that the run needs.
        kind: How they are encoded: `causal`, `classification` or `seq2seq`.
        overlap: Questions that training and scored rows share, for the report.
    """

    task: Task
    splits: dict[str, list[Example]]
    kind: str
    overlap: dict[str, Any] = field(default_factory=dict)


def load_data(recipe: Recipe) -> Data:
    """Load the splits a recipe needs.

    Raises:
        DataError: If rows are missing, or must not be used this way.
    """
    from reftune import tasks
    from reftune.tasks.guard import overlap

    task = tasks.get(recipe.task)
    task.hold_out = holds_out(recipe, task)
    splits = {"train": task.load("train")}
    scored = recipe.evaluation.split
    needs_validation = scored == "validation" or any(map(validates, recipe.stages))
    if needs_validation and "validation" in task.splits:
        splits["validation"] = task.load("validation")
    if scored == "test":
        splits["test"] = task.load("test")
    if scored != "none" and not splits.get(scored):
        raise DataError(
            f'The task "{recipe.task.name}" has no {scored} rows to score.',
            "Give some, or set evaluation.split: none.",
        )
    shared: dict[str, Any] = {}
    if scored != "none":
        found = overlap(splits["train"], splits[scored])
        shared = {"questions": found.count, "share": found.share, "text": str(found)}
        if found.count:
            log.warning("%s", found)
    return Data(task, splits, recipe.model.head, shared)


def holds_out(recipe: Recipe, task: Task) -> bool:
    """Return whether a run keeps rows out of training that stand in for another split.

    Only where the run reads them: to select a checkpoint, or to score. A run that does not trains
    on all rows, so the same recipe with and without validation trains on different rows.
    """
    scored = recipe.evaluation.split
    if scored != "none" and task.cut_from_training(scored):
        return True
    return task.cut_from_training("validation") and any(map(validates, recipe.stages))


def validates(stage: StageSpec) -> bool:
    """Return whether a stage looks at validation rows while it trains."""
    return stage.evaluate_every > 0 or stage.keep == "best"


def count_labels(examples: Sequence[Example]) -> int:
    """Return the outputs a class head needs for these rows; 1 is a regression."""
    labels = [example.label for example in examples]
    if any(isinstance(label, float) for label in labels):
        return 1
    return 1 + max(int(label) for label in labels if label is not None)
