"""BoolQ with its passage in the prompt (open book), the task of coarse-to-fine tuning.

Prompt: `Passage: {passage}\\nQuestion: {question}?\\nAnswer:`; target ` True` or ` False`. Scored
by comparing the log-probabilities of the two, and by a leading true/false/yes/no in greedy text.
The passage comes first and long prompts are cut from the left, into the passage: a `max_len` that
would cut into the question is refused. `passage: false` asks the question alone, for a baseline.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from reftune.errors import DataError
from reftune.rewards.choice import BOOLEAN, same_truth
from reftune.tasks import benchmark, templates
from reftune.tasks.base import Example, Split
from reftune.tasks.benchmark import Benchmark
from reftune.tasks.files import Row, place, text, value
from reftune.tasks.sources import Hub, Rows, Source

ASKED = "Question: {question}?\nAnswer:"
TEMPLATE = "Passage: {passage}\n" + ASKED
_INSTRUCTION = re.compile(r"question:\s*(.+?)\s*\n", re.DOTALL)
"""The question in a row of LLM-Adapters, which has no passage."""
_NOTE = "The original BoolQ files have question, passage and answer; LLM-Adapters' lack passages."


@dataclass(frozen=True)
class Options(benchmark.Options):
    """Options of BoolQ with passage."""

    passage: bool = True
    """Whether the passage stands in the prompt; false is the question-only baseline, for which
    LLM-Adapters' files will do too."""
    passage_words: int | None = None
    """Keep only the last n words of a passage, in training and scoring alike. Default: all of it;
    training then cuts it to `max_len`."""

    def __post_init__(self) -> None:
        if self.passage_words is not None and self.passage_words < 1:
            raise ValueError(
                f"passage_words is {self.passage_words}. Keep at least one word, or set "
                "`passage: false`."
            )


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

    def source(self, split: Split) -> Source | None:
        """Return where a split comes from; without passages more files will do."""
        found = super().source(split)
        if found is None or self.options.passage:
            return found
        return replace(found, files=(*found.files, f"boolq_{split}", f"boolq/{split}"))

    def example(self, row: Row, index: int, rows: Rows, split: Split) -> Example:
        """Return a row as prompt and one of two answers."""
        passage = text(row, "passage", rows.origin).strip() if self.options.passage else ""
        question = self._question(row, rows.origin)
        key = "answer" if "answer" in row else "label"
        truth = _truth(value(row, key, rows.origin))
        if truth is None:
            raise DataError(
                f"{place(row, rows.origin)}: the {key} {row[key]!r} is neither true nor false.",
                "Mend or drop this row.",
            )
        if self.options.passage_words is not None:
            passage = " ".join(passage.split()[-self.options.passage_words :])
        asked = templates.fill(ASKED, question=question)
        whole = templates.fill(TEMPLATE, passage=passage, question=question)
        return Example(
            id=f"{self.name}-{split}-{index}",
            prompt=whole if self.options.passage else asked,
            target=" True" if truth else " False",
            answer="true" if truth else "false",
            question=question,
            choices=(" True", " False"),
            label=0 if truth else 1,
            meta={"keep": asked},
        )

    def _question(self, row: Row, origin: str) -> str:
        """Return the question without its mark: some rows have one, some have not."""
        found = None
        if not self.options.passage and "question" not in row:
            found = _INSTRUCTION.search(text(row, "instruction", origin) + "\n")
        question = found[1] if found else text(row, "question", origin)
        return question.strip().rstrip("?").rstrip()

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
