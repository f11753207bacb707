"""The rows of a run: which splits it needs, what training may see, and what they share."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from reftune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftune.config.recipe import Recipe, StageSpec
    from reftune.objectives.base import Objective
    from reftune.tasks.base import Example, Task
    from reftune.training.encode import Rows

log = logging.getLogger(__name__)


@dataclass
class Data:
    """The rows of a run.

    Attributes:
        task: Where they come from.
        splits: Rows of the splits that the run needs.
        kind: How they are encoded: `causal`, `classification` or `seq2seq`.
        overlap: Questions that training and scored rows share, for the report.
        also: Task and rows of each further set that is scored, by its name.
    """

    task: Task
    splits: dict[str, list[Example]]
    kind: str
    overlap: dict[str, Any] = field(default_factory=dict)
    also: dict[str, tuple[Task, list[Example]]] = field(default_factory=dict)

    def scored(self, split: str) -> dict[str, tuple[Task, list[Example]]]:
        """Return task and rows of all sets that are scored; the run's own has the name ""."""
        return {"": (self.task, self.splits[split]), **self.also}


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
    data = Data(task, splits, recipe.model.head)
    if scored == "none":
        return data
    for name, spec in recipe.evaluation.also.items():
        other = tasks.get(spec)
        data.also[name] = other, other.load(scored)
    for name, (_, rows) in data.scored(scored).items():
        found = overlap(splits["train"], rows)
        if found.count:
            log.warning("%s%s", f"{name}: " if name else "", found)
        if not name:
            shared = {"questions": found.count, "share": found.share, "text": str(found)}
            data.overlap |= shared
    return data


def objective_of(stage: StageSpec) -> Objective:
    """Return a fresh objective of a stage."""
    from reftune import objectives

    objective = objectives.get(stage.objective)
    return objective(objective.config_from(stage.objective_options))


def training_rows(
    objective: Objective,
    stage: StageSpec,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    context: int | None = None,
) -> Rows:
    """Encode the rows of a stage and let its objective change them.

    Args:
        objective: The objective of the stage.
        stage: The stage.
        examples: Training examples.
        tokenizer: The tokenizer of the base model.
        kind: See `reftune.training.encode.encode`.
        context: Tokens the model can see, if it sets a limit.

    Raises:
        DataError: If rows cannot be encoded, or none is left.
    """
    from reftune.training.encode import encode_all

    limit = objective.row_limit(stage.max_len)
    rows = encode_all(examples, tokenizer, limit, kind=kind, context=context)
    changed = objective.training_rows(rows.rows, tokenizer, stage.max_len)
    if not changed:
        what = f'The objective "{stage.objective}" leaves none of {len(rows)} rows to train on.'
        raise DataError(what, "Change its settings, or the data.")
    return replace(rows, rows=changed)


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
