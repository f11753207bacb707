"""Instruction following on Ultrafeedback, in the Alpaca form.

The published measure is the AlpacaEval win rate, which needs a judge model and is not computed
here. `word_f1` (shared words with the reference answer) is a smoke figure: it shows that training
works, not how good the answers are. Predictions are saved for a judge.

Test rows: a file `alpaca_eval` (805 instructions) below `data_dir` if there is one, else the last
tenth of the rows; the tenth before it is the validation split, where one is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from reftune.errors import DataError
from reftune.tasks import templates
from reftune.tasks.base import Example, Split
from reftune.tasks.benchmark import Benchmark
from reftune.tasks.files import Row, place, text
from reftune.tasks.metrics import token_f1
from reftune.tasks.sources import Hub, Rows, Source, find_file


class Ultrafeedback(Benchmark):
    """Ultrafeedback instructions; 768 tokens a row in the paper."""

    name = "ultrafeedback"
    metric = "word_f1"
    max_new_tokens = 512
    sources: ClassVar[dict[str, Source]] = {
        "train": Source(
            ("ultrafeedback", "ultrafeedback_train", "ultrafeedback_1k", "ultrafeedback/train"),
            Hub("HuggingFaceH4/ultrafeedback_binarized", None, "train_sft"),
        ),
        "test": Source(
            ("alpaca_eval", "alpaca_eval_test", "alpaca_eval/test"),
            Hub("HuggingFaceH4/ultrafeedback_binarized", None, "test_sft"),
        ),
    }

    def source(self, split: Split) -> Source | None:
        """Return where rows come from; local test rows only if `alpaca_eval` is there."""
        found = super().source(split)
        if split == "test" and self.spec.data_dir is not None:
            return found if find_file(self.spec.data_dir, found.files) else None
        return found

    @property
    def prompt_form(self) -> str | None:
        """Prompt around an instruction."""
        return templates.alpaca("{prompt}")

    def rows_of(self, split: Split) -> Sequence[Example]:
        """Return a split; without a test file the last tenth of the rows serves."""
        if self.source("test") is not None:
            return super().rows_of(split)
        examples = self.examples("train")
        tenth = len(examples) // 10
        if tenth < 1:
            raise DataError(
                f"{len(examples)} Ultrafeedback rows are too few to keep test rows back.",
                "Give at least 10 rows, or a file alpaca_eval.jsonl.",
            )
        bounds = {
            "train": (0, -2 * tenth if self.hold_out else -tenth),
            "validation": (-2 * tenth, -tenth),
            "test": (-tenth, None),
        }
        start, end = bounds[split]
        return examples[start:end]

    def example(self, row: Row, index: int, rows: Rows, split: Split) -> Example:
        """Return an instruction with its reference answer."""
        context = ""
        if "chosen" in row:
            instruction, output = _chosen(row, rows.origin)
        else:
            instruction = text(row, "instruction", rows.origin)
            output = text(row, "output", rows.origin).strip()
            context = row.get("input") or ""
        return Example(
            id=f"{self.name}-{'test' if split == 'test' else 'row'}-{index}",
            prompt=templates.alpaca(instruction, context),
            target=output,
            answer=output,
            question=f"{instruction} {context}".strip(),
        )

    def extract(self, text: str, example: Example) -> str | None:
        """Return the stripped text, or None if there is none."""
        return text.strip() or None

    def score(self, text: str, example: Example) -> dict[str, float]:
        """Return the F1 of words shared with the reference answer."""
        return {"word_f1": token_f1(text, example.answer)}


def _chosen(row: Row, origin: str) -> tuple[str, str]:
    chosen = row["chosen"]
    if not (isinstance(chosen, list) and chosen and chosen[-1].get("role") == "assistant"):
        raise DataError(
            f'{place(row, origin)}: "chosen" does not end in an assistant message.',
            "Mend or drop this row.",
        )
    return row.get("prompt") or chosen[0]["content"], chosen[-1]["content"].strip()
