"""GLUE: sentence and sentence-pair classification with a head, and STS-B as regression.

Plain pair encoding: `prompt` is the first text, `pair` the second. GLUE's own test labels are
secret, so the published validation rows are cut in two by seed (1,000 rows if there are more than
5,000, else half): one part is `validation` and selects, the other is `test` and is reported.

Metrics: MCC for CoLA, Pearson for STS-B, accuracy elsewhere (F1 beside it for MRPC and QQP). MNLI
uses the matched rows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from reftune.errors import DataError
from reftune.tasks import benchmark, metrics
from reftune.tasks.base import Example, Split
from reftune.tasks.benchmark import Benchmark
from reftune.tasks.files import Row, place, text, value
from reftune.tasks.sources import Hub, Rows, Source

NAME = "nyu-mll/glue"
"""The hub data set."""


@dataclass(frozen=True)
class Options(benchmark.Options):
    """Options of GLUE tasks; `seed` also cuts the validation rows in two."""


class Glue(Benchmark):
    """One GLUE task."""

    kind = "classification"
    max_new_tokens = 8
    Options: ClassVar[type] = Options
    text_fields: ClassVar[tuple[str, ...]] = ("sentence1", "sentence2")
    labels: ClassVar[tuple[str, ...]] = ()
    folder: ClassVar[str] = ""
    validation_split: ClassVar[str] = "validation"

    @property
    def num_labels(self) -> int:
        """Outputs of the head: classes, or 1 for regression."""
        return len(self.labels) or 1

    def source(self, split: Split) -> Source:
        """Return where training or validation rows come from."""
        name, split_name = self.name, self.validation_split
        if split == "train":
            files = (f"{name}_train", f"{name}/train", f"{self.folder}/train")
            return Source(files, Hub(NAME, name, "train"))
        parts = (split_name, "validation", "dev_matched", "dev", "val")
        files = tuple(
            stem
            for part in parts
            for stem in (f"{name}_{part}", f"{name}/{part}", f"{self.folder}/{part}")
        )
        return Source(files, Hub(NAME, name, split_name))

    def example(self, row: Row, index: int, rows: Rows, split: Split) -> Example:
        """Return a row as one or two texts with a label."""
        label = self._label(row, rows.origin)
        texts = [text(row, field, rows.origin) for field in self.text_fields]
        number = row.get("idx", index)
        return Example(
            id=f"{self.name}-{'train' if split == 'train' else 'dev'}-{number}",
            prompt=texts[0],
            target="",
            answer=self.labels[int(label)] if self.labels else str(label),
            question=texts[0],
            label=label,
            pair=texts[1] if len(texts) > 1 else None,
        )

    def _label(self, row: Row, origin: str) -> int | float:
        given = value(row, "label", origin)
        if not self.labels:
            try:
                return float(given)
            except (TypeError, ValueError):
                given = str(given)
        elif str(given) in self.labels:
            return self.labels.index(str(given))
        elif str(given).removesuffix(".0").isdigit() and int(float(given)) < len(self.labels):
            return int(float(given))
        known = ", ".join(self.labels) or "a number"
        raise DataError(
            f"{place(row, origin)}: label {given!r} is none of: {known}.",
            "Rows of GLUE's secret test set have label -1 and cannot be scored.",
        )

    def rows_of(self, split: Split) -> Sequence[Example]:
        """Return training rows, or one of the two parts of the published validation rows."""
        if split == "train":
            return super().rows_of(split)
        examples = super().examples("validation")
        order = list(range(len(examples)))
        random.Random(self.options.seed).shuffle(order)
        cut = 1000 if len(examples) > 5000 else len(examples) // 2
        chosen = order[:cut] if split == "validation" else order[cut:]
        return [examples[i] for i in sorted(chosen)]

    def examples(self, split: Split) -> list[Example]:
        """Return training rows, or a part of the published validation rows."""
        return super().examples("train") if split == "train" else list(self.rows_of(split))

    def extract(self, text: str, example: Example) -> str | None:
        """Return the class or number in `text`, which is an index, a name or a number."""
        text = text.strip()
        if self.labels and text.isdigit() and int(text) < len(self.labels):
            return self.labels[int(text)]
        return text or None

    def score(self, text: str, example: Example) -> dict[str, float]:
        """Return the accuracy of one prediction, or its absolute error for regression."""
        if self.labels:
            return {"accuracy": float(self.extract(text, example) == example.answer)}
        return {"absolute_error": abs(float(text) - float(example.label))}

    def aggregate(
        self,
        scores: Sequence[dict[str, float]],
        examples: Sequence[Example],
        predictions: Sequence[Any],
    ) -> dict[str, float]:
        """Return the correlation or F1 of a task that is judged by it."""
        gold = [example.label for example in examples]
        if self.metric == "pearson":
            values = [float(prediction) for prediction in predictions]
            return {
                "pearson": metrics.pearson(values, gold),
                "spearman": metrics.spearman(values, gold),
            }
        pred = [self._index(str(prediction)) for prediction in predictions]
        if self.metric == "matthews":
            return {"matthews": metrics.matthews(pred, gold)}
        if self.name in ("mrpc", "qqp"):
            return {"f1": metrics.f1(pred, gold)}
        return {}

    def _index(self, prediction: str) -> int:
        prediction = prediction.strip()
        return self.labels.index(prediction) if prediction in self.labels else int(prediction)


class Cola(Glue):
    """CoLA: is the sentence grammatical? (8,551 / 1,043)."""

    name, folder, metric = "cola", "CoLA", "matthews"
    text_fields = ("sentence",)
    labels = ("unacceptable", "acceptable")


class Sst2(Glue):
    """SST-2: sentiment of a sentence (67,349 / 872)."""

    name, folder = "sst2", "SST-2"
    text_fields = ("sentence",)
    labels = ("negative", "positive")


class Mrpc(Glue):
    """MRPC: do two sentences say the same? (3,668 / 408)."""

    name, folder = "mrpc", "MRPC"
    labels = ("not_equivalent", "equivalent")


class Qqp(Glue):
    """QQP: do two questions ask the same? (363,846 / 40,430)."""

    name, folder = "qqp", "QQP"
    text_fields = ("question1", "question2")
    labels = ("not_duplicate", "duplicate")


class Stsb(Glue):
    """STS-B: likeness of two sentences, 0 to 5, by regression (5,749 / 1,500)."""

    name, folder, metric = "stsb", "STS-B", "pearson"


class Mnli(Glue):
    """MNLI, matched: does the premise entail the hypothesis? (392,702 / 9,815)."""

    name, folder, validation_split = "mnli", "MNLI", "validation_matched"
    text_fields = ("premise", "hypothesis")
    labels = ("entailment", "neutral", "contradiction")


class Qnli(Glue):
    """QNLI: does the sentence answer the question? (104,743 / 5,463)."""

    name, folder = "qnli", "QNLI"
    text_fields = ("question", "sentence")
    labels = ("entailment", "not_entailment")


class Rte(Glue):
    """RTE: does the first sentence entail the second? (2,490 / 277)."""

    name, folder = "rte", "RTE"
    labels = ("entailment", "not_entailment")
