"""What the parts of a diagnosis share: a model with adapters, a task, the same rows for both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from reftune.inference.continuing import Start, Writer, Written, go_on, writing

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from reftune.config.recipe import EvaluationSpec
    from reftune.inference.decoding import Decoding
    from reftune.inference.predictions import Prediction
    from reftune.report.model import Figure
    from reftune.tasks.base import Example, Task

Bars = Callable[[str], AbstractContextManager[Callable[[int, int], None] | None]]
"""Opens a progress bar with a title; gives a function of rows done and rows in all, or None."""


@dataclass(frozen=True)
class Study:
    """A model whose base and adapters are compared on the same rows.

    Attributes:
        model: The model with its active adapters.
        tokenizer: Its tokenizer.
        task: What is asked, and how answers are scored.
        examples: The rows.
        spec: Batch size, longest answer, repetition penalties; answers are greedy.
        seed: Seed of draws and of the bootstrap.
        level: Coverage of the intervals.
        bars: How progress is shown.
    """

    model: nn.Module = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    task: Task
    examples: Sequence[Example] = field(repr=False)
    spec: EvaluationSpec
    seed: int = 0
    level: float = 0.95
    bars: Bars | None = None

    @property
    def max_new_tokens(self) -> int:
        """Longest answer in tokens."""
        return self.spec.max_new_tokens or self.task.max_new_tokens

    @cached_property
    def decoding(self) -> Decoding:
        """How answers are produced: greedily, with the stop texts of the task."""
        from reftune.inference.decoding import Decoding

        return Decoding(
            self.max_new_tokens,
            stop=tuple(getattr(self.task, "stop", ())),
            options={
                "repetition_penalty": self.spec.repetition_penalty,
                "no_repeat_ngram_size": self.spec.no_repeat_ngram_size,
            },
        )

    @cached_property
    def starts(self) -> list[Start]:
        """The prompts, with room for the longest answer; long prompts are cut from the left."""
        from reftune.inference import prompts as rows_of
        from reftune.inference.predictions import prompt_of

        asked = [prompt_of(example) for example in self.examples]
        subjects = [example.meta.get("subject") for example in self.examples]
        rows = rows_of.encode_prompts(self.tokenizer, asked, subjects=subjects)
        rows = rows_of.fit(self.model, rows, self.max_new_tokens, "prompts")
        limit = rows_of.context_len(self.model)
        longest = self.max_new_tokens
        return [
            Start(
                row,
                budget=longest if limit is None else min(longest, limit - len(row.ids)),
                subspace=example.subspace,
            )
            for row, example in zip(rows, self.examples, strict=True)
        ]

    def bar(self, title: str) -> AbstractContextManager[Callable[[int, int], None] | None]:
        """Open a progress bar."""
        return nullcontext() if self.bars is None else self.bars(title)

    def write(self, who: Writer, starts: Sequence[Start], title: str) -> list[Written]:
        """Let the base or the adapter go on from starts."""
        with writing(self.model, who) as model, self.bar(title) as report:
            batch_size = self.spec.batch_size
            return go_on(model, self.tokenizer, starts, self.decoding, batch_size, report)

    def predictions(self, texts: Sequence[str]) -> list[Prediction]:
        """Return one scored answer a row."""
        from reftune.inference.predictions import scored

        pairs = zip(self.examples, texts, strict=True)
        return [scored(self.task, example, text) for example, text in pairs]

    def share(self, values: Sequence[bool]) -> Figure:
        """Return a share of rows with Wilson's interval; an open figure where there are none."""
        from reftune.intervals import wilson
        from reftune.report.model import Figure

        if not values:
            return Figure(mean=None, n=0)
        low, high = wilson(sum(values), len(values), self.level)
        return Figure(mean=sum(values) / len(values), n=len(values), low=low, high=high)
