"""Tasks of files that are scored on the rows of another task, by that task's own rule.

    task: {name: own, train: samples.jsonl, scored: {name: families, group: half}}

What a model is trained on and what it is measured by then come from two places: training rows from
a file, made by a model or by hand, and scored rows from the benchmark they were made for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from reftune.config.recipe import TaskSpec
from reftune.errors import RecipeError
from reftune.tasks import base
from reftune.tasks.base import Example, Split, Task

SCORED = "scored"
"""Key of `Example.meta` that marks the rows of the scored task, with its name."""


@dataclass(frozen=True)
class Options(base.Options):
    """Options of tasks that can be scored on another."""

    scored: dict[str, Any] | None = None
    """Task whose rows are scored, by its own rule, such as {name: gsm8k}: its test rows and, where
    the task says so, its validation rows."""


class ScoredElsewhere(Task):
    """A task of files. With the option `scored` another task's rows are scored, by its rule.

    Subclasses give `extract_own` and `score_own` for rows of their files.

    Raises:
        RecipeError: If the other task has no generated answers, or `task.test` is given too.
    """

    Options: ClassVar[type] = Options

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.scored = self._scored()
        if self.scored is not None:
            self.metric = self.scored.metric
            self.max_new_tokens = self.scored.max_new_tokens

    def _scored(self) -> Task | None:
        given = self.options.scored
        if given is None:
            return None
        from reftune import tasks
        from reftune.config.loader import task_of

        if self.spec.test:
            raise RecipeError(
                f'task.test ("{self.spec.test}") and task.scored both say what is scored.',
                "Leave one of them out.",
            )
        sizes = {f"{split}_size": self.size(split) for split in ("validation", "test")}
        given = {**given, **{key: size for key, size in sizes.items() if size is not None}}
        found = tasks.get(task_of(given, []))
        if found.kind != "generation":
            raise RecipeError(
                f'Task "{found.name}" of task.scored has no generated answers.',
                "Name one whose answers are generated.",
            )
        return found

    def scored_rows(self, split: Split) -> list[Example]:
        """Return the rows of the scored task, marked as its own."""
        assert self.scored is not None
        rows = self.scored.load(split)
        return [replace(e, meta={**e.meta, SCORED: self.scored.name}) for e in rows]

    def is_scored_elsewhere(self, example: Example) -> bool:
        """Return whether an example is one of the scored task."""
        return self.scored is not None and SCORED in example.meta

    def extract(self, text: str, example: Example) -> str | None:
        """Return the answer in a generated text, by the rule of where the example is from."""
        if self.scored is not None and self.is_scored_elsewhere(example):
            return self.scored.extract(text, example)
        return self.extract_own(text)

    def score(self, text: str, example: Example) -> dict[str, float]:
        """Return the metrics of one generated text, by the rule of where the example is from."""
        if self.scored is not None and self.is_scored_elsewhere(example):
            return self.scored.score(text, example)
        return self.score_own(text, example)

    def aggregate(
        self,
        scores: Sequence[dict[str, float]],
        examples: Sequence[Example],
        predictions: Sequence[Any],
    ) -> dict[str, float]:
        """Return the metrics of the scored task that are no mean over examples."""
        if self.scored is None or not all(map(self.is_scored_elsewhere, examples)):
            return {}
        return self.scored.aggregate(scores, examples, predictions)

    def look_ahead(self, texts: Sequence[str], examples: Sequence[Example]) -> None:
        """Tell the scored task of texts that answer its rows, this one of the others."""
        pairs = list(zip(texts, examples, strict=True))
        theirs = [pair for pair in pairs if self.is_scored_elsewhere(pair[1])]
        if self.scored is not None and theirs:
            self.scored.look_ahead(*map(list, zip(*theirs, strict=True)))
        self.look_ahead_own([text for text, e in pairs if not self.is_scored_elsewhere(e)])

    def look_ahead_own(self, texts: Sequence[str]) -> None:
        """Take texts that answer rows of the files, before each is extracted."""

    @abstractmethod
    def extract_own(self, text: str) -> str | None:
        """Return the answer in a text that answers a row of the files, or None."""

    @abstractmethod
    def score_own(self, text: str, example: Example) -> dict[str, float]:
        """Return 1.0 or 0.0 for a text that answers a row of the files."""
