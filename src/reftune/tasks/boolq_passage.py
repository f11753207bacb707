"""BoolQ with its passage in the prompt (open book), the task of coarse-to-fine tuning.

Prompt: `Passage: {passage}\\nQuestion: {question}?\\nAnswer:`; target ` True` or ` False`. Scored
by comparing the log-probabilities of the two, and by a leading true/false/yes/no in greedy text.
The passage comes first, so an encoder that cuts long prompts from the left never cuts the question.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from reftune.errors import DataError
from reftune.rewards.choice import BOOLEAN, same_truth
from reftune.tasks import benchmark, templates
from reftune.tasks.base import Example, Split
from reftune.tasks.benchmark import Benchmark
from reftune.tasks.files import Row, place, text, value
from reftune.tasks.sources import Hub, Rows, Source

TEMPLATE = "Passage: {passage}\nQuestion: {question}?\nAnswer:"
_NOTE = "The original BoolQ files have question, passage and answer; LLM-Adapters' lack passages."


@dataclass(frozen=True)
class Options(benchmark.Options):
    """Options of BoolQ with passage."""

    passage_words: int | None = None
    """Keep only the last n words of a passage. Default: all of it."""


class BoolQPassage(Benchmark):
    """BoolQ, open book (9,427 / 3,270; tests on the published validation rows)."""

    name = "boolq_passage"
    kind = "choice"
    max_new_tokens = 8
    Options: ClassVar[type] = Options
    sources: ClassVar[dict[str, Source]] = {
        "train": Source(
            ("boolq_passage_train", "boolq_open_train", "BoolQ/train"), Hub("google/boolq"), _NOTE
        ),
        "test": Source(
            (
                "boolq_passage_test",
                "boolq_open_test",
                "boolq_passage_validation",
                "BoolQ/val",
                "BoolQ/dev",
            ),
            Hub("google/boolq", None, "validation"),
            _NOTE,
        ),
    }

    def example(self, row: Row, index: int, rows: Rows, split: Split) -> Example:
        """Return a row as prompt and one of two answers."""
        passage = text(row, "passage", rows.origin).strip()
        question = text(row, "question", rows.origin).strip().rstrip("?").rstrip()
        key = "answer" if "answer" in row else "label"
        truth = _truth(value(row, key, rows.origin))
        if truth is None:
            raise DataError(
                f"{place(row, rows.origin)}: the {key} {row[key]!r} is neither true nor false.",
                "Mend or drop this row.",
            )
        if self.options.passage_words is not None:
            passage = " ".join(passage.split()[-self.options.passage_words :])
        return Example(
            id=f"{self.name}-{split}-{index}",
            prompt=templates.fill(TEMPLATE, passage=passage, question=question),
            target=" True" if truth else " False",
            answer="true" if truth else "false",
            question=question,
            choices=(" True", " False"),
            label=0 if truth else 1,
        )

    def extract(self, text: str, example: Example) -> str | None:
        """Return `true` or `false` if the text starts with true, false, yes or no."""
        return BOOLEAN.extract(text)

    def score(self, text: str, example: Example) -> dict[str, float]:
        """Return the accuracy of one generated text."""
        return {"accuracy": BOOLEAN.reward(text, example.answer)}


def _truth(given: Any) -> bool | None:
    if isinstance(given, bool):
        return given
    word = {"1": "true", "0": "false"}.get(str(given).strip(), str(given))
    if same_truth(word, "true"):
        return True
    return False if same_truth(word, "false") else None
