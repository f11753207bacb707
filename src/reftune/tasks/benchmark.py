"""Tasks whose rows come from files or the hub, with a validation part cut from training rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from reftune.errors import DataError
from reftune.tasks import base, guard
from reftune.tasks.base import Example, Split, Task
from reftune.tasks.sources import Rows, Source, load_source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options(base.Options):
    """Options of every task with files."""

    holdout: int = 300
    """Last training rows that are kept back as validation rows, at most a tenth of them all; only
    where validation rows are used."""
    drop_overlap: bool = False
    """Drop training rows whose question is also a test question."""


class Benchmark(Task):
    """A task with published files.

    Subclasses declare `sources` and give `example`. Without a validation source, the last
    `holdout` training rows are the validation split and are never trained on.
    """

    Options: ClassVar[type] = Options
    sources: ClassVar[dict[str, Source]] = {}

    def source(self, split: Split) -> Source | None:
        """Return where a split comes from, given the options; None: no such split is published."""
        return self.sources.get(split)

    def example(self, row: dict, index: int, rows: Rows, split: Split) -> Example:
        """Return one row as an example.

        Raises:
            DataError: If the row lacks a field.
        """
        raise NotImplementedError

    def read(self, split: Split) -> Rows:
        """Return the raw rows of a split, refusing test data as training data."""
        source = self.source(split)
        if source is None:
            raise DataError(
                f'Task "{self.name}" has no {split} rows.',
                "Use another split, or your own files with `task: {name: own, ...}`.",
            )
        rows = load_source(source, self.spec.data_dir, self.name, split)
        if split == "train":
            on_hub = source.hub is not None and self.spec.data_dir is None
            guard.refuse_test(source.hub.split if on_hub else rows.origin, self.name)
        return rows

    def examples(self, split: Split) -> list[Example]:
        """Return a published split as it is, nothing kept back."""
        rows = self.read(split)
        return [self.example(row, i, rows, split) for i, row in enumerate(rows.rows)]

    def rows_of(self, split: Split) -> Sequence[Example]:
        """Return a split: kept-back rows leave training and, if asked, test questions too."""
        if split == "test":
            return self.examples("test")
        has_own = self.source("validation") is not None
        if split == "validation" and has_own:
            return self.examples("validation")
        examples = self.examples("train")
        if not has_own and (split != "train" or self.hold_out):
            examples = self._cut(examples, split)
        if split == "train" and self.options.drop_overlap:
            kept = guard.drop_overlap(examples, self.examples("test"))
            log.info(
                "%s: %d training rows dropped as test questions",
                self.name,
                len(examples) - len(kept),
            )
            examples = kept
        return examples

    def cut_from_training(self, split: Split) -> bool:
        """Return whether a split is a part of the training rows."""
        return split == "validation" and self.source("validation") is None

    def _cut(self, examples: list[Example], split: Split) -> list[Example]:
        kept = base.hold_out(examples, self.options.holdout, split)
        if not kept:
            raise DataError(
                f'Task "{self.name}" has no validation rows: {len(examples)} training rows and '
                f"options.holdout {self.options.holdout}.",
                "Set options.holdout to the number of rows to keep back (at most a tenth).",
            )
        return kept
