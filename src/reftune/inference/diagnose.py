"""Why does an adapter help or hurt reasoning? Three possible causes, measured on the same rows.

The claims of BREP (Liang et al. 2025, section 1) about representation edits, as measurements that
hold for any adapter, LoRA and stacks included: through the first tokens of the answer (`handover`),
through the encoding of numbers (`probes`), through errors that add up along the steps (`chains`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from reftune.errors import RecipeError, nearest
from reftune.inference.chains import ErrorAccumulation, error_accumulation
from reftune.inference.continuing import check_model
from reftune.inference.handover import TOKENS, PrefixQuality, check_tokens, prefix_quality
from reftune.inference.predictions import check_rows
from reftune.inference.probes import LEAST, ROWS, NumberEncoding, Source, number_encoding
from reftune.inference.study import Bars, Study

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from reftune.config.recipe import EvaluationSpec
    from reftune.tasks.base import Example, Task


@dataclass(frozen=True)
class Diagnosis:
    """What was found out about an adapter.

    Attributes:
        task: Name of the task.
        rows: Rows that base and adapter answered.
        seed: Seed of draws and of the bootstrap.
        level: Coverage of the intervals.
        seconds: Wall-clock time.
        prefix: What the first tokens of answers are worth.
        numbers: What probes read of numbers.
        errors: How steps follow from one another; None where the task has no steps to read.
        errors_missing: Why there are none, else empty.
    """

    task: str
    rows: int
    seed: int
    level: float
    seconds: float
    prefix: PrefixQuality
    numbers: NumberEncoding
    errors: ErrorAccumulation | None
    errors_missing: str = ""
    more: dict[str, Any] = field(default_factory=dict)
    """Facts of the caller: the adapter's name, the split."""

    @property
    def answers(self) -> list[dict[str, Any]]:
        """Every answer that was written on the way, to be read."""
        return [*self.prefix.answers, *(self.errors.answers if self.errors else [])]

    def as_dict(self) -> dict[str, Any]:
        """Return all figures, tests and counts, without the answers."""
        found = {key: getattr(self, key) for key in ("task", "rows", "seed", "level", "seconds")}
        for name in ("prefix", "numbers", "errors"):
            part = getattr(self, name)
            found[name] = None if part is None else _without_answers(part)
        return {**self.more, **found, "errors_missing": self.errors_missing}


def diagnose_reasoning(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    spec: EvaluationSpec | None = None,
    *,
    tokens: Sequence[int] = TOKENS,
    numbers: Source = "additions",
    probe_rows: int = ROWS,
    seed: int = 0,
    level: float = 0.95,
    progress: Bars | None = None,
) -> Diagnosis:
    """Measure by which way a model's adapters change its reasoning.

    The base is the same model with all its adapters off. `reftune.report.diagnosis.write` makes
    tables and pictures of what comes back.

    Args:
        model: A causal language model with adapters: ReFT, LoRA or a stack of them.
        tokenizer: Its tokenizer.
        task: A task whose answers are generated.
        examples: Rows to answer, usually `task.load("test")`.
        spec: Batch size, longest answer, repetition penalties. Answers are greedy.
        tokens: How many first tokens are handed over.
        numbers: Which numbers are probed: of two-operand `additions` in the prompt form of the
            task, or the first two of the `task`'s own questions.
        probe_rows: Most prompts that are probed.
        seed: Seed of draws and of the bootstrap.
        level: Coverage of the intervals.
        progress: Opens a progress bar with a title.

    Raises:
        RecipeError: If the task asks for classes, or a setting has no meaning.
        DataError: If there are no rows, two share an id, or too few hold numbers to probe.
        AdapterError: If the model has no adapter, or one that cannot be handed over.
        ModelError: If the model is an encoder-decoder or produces no text.
    """
    from reftune.config.recipe import EvaluationSpec

    started = time.perf_counter()
    tokens = check_tokens(tokens)
    check_settings(task, numbers, probe_rows)
    check_rows(examples, "rows", "diagnose")
    check_model(model)
    spec = spec or EvaluationSpec()
    study = Study(model, tokenizer, task, examples, spec, seed, level, progress)
    encoding = number_encoding(study, numbers, probe_rows)  # finds missing numbers before the rest
    prefix = prefix_quality(study, tokens)
    errors = error_accumulation(study)
    told = (None, errors) if isinstance(errors, str) else (errors, "")
    facts = (task.spec.name, len(examples), seed, level, time.perf_counter() - started)
    return Diagnosis(*facts, prefix, encoding, *told)


def check_settings(task: Task, numbers: str = "additions", probe_rows: int = ROWS) -> None:
    """Check what can be checked without rows and without a model.

    Raises:
        RecipeError: If the task asks for classes, or a setting has no meaning.
    """
    if task.kind == "classification":
        raise RecipeError(
            f'Task "{task.spec.name}" asks for classes; there is no reasoning to follow.',
            "Choose a task whose answers are generated, such as families or gsm8k.",
        )
    if numbers not in get_args(Source):
        raise RecipeError(
            f'There are no numbers "{numbers}" to probe.', nearest(numbers, get_args(Source))
        )
    if probe_rows < LEAST:
        raise RecipeError(f"{probe_rows} prompts are too few to probe.", f"Give at least {LEAST}.")


def _without_answers(part: Any) -> dict[str, Any]:
    """Return a part as plain values; figures stay as they are."""
    return {key: value for key, value in vars(part).items() if key != "answers"}
