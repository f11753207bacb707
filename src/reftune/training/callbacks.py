"""What happens beside the steps: metrics.jsonl, a line a step, and the best weights."""

from __future__ import annotations

import json
import operator
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from transformers import TrainerCallback

from reftune.report.files import to_json, write_text_atomic

if TYPE_CHECKING:
    from reftune.training.trainer import ReftTrainer

_NAMES = {"learning_rate": "lr", "eval_loss": "validation_loss"}
_DROPPED = ("total_flos", "step")


class MetricsWriter(TrainerCallback):
    """Writes one JSON line an optimiser step, and one a validation.

    Step: `stage, step, epoch, loss, lr, grad_norm, tokens, tokens_per_second, seconds` and what the
    objective reports. `tokens` (real tokens over all processes) and `seconds` (training only)
    count from the start of the stage, also over a resume.

    Lines of steps that a resumed run will do again are dropped when it starts, so that the file
    ends up as if nothing had happened, but for times.

    Args:
        path: The file.
        stage: Number of the stage, from 1.
    """

    def __init__(self, path: Path, stage: int = 1) -> None:
        self.path, self.stage = path, stage
        self.seconds = 0.0
        self._tokens_before = self._tokens = 0
        self._mark = self._step_seconds = 0.0
        self._file: TextIO | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop lines that will be written again and open the file."""
        self._mark = time.perf_counter()
        if not state.is_world_process_zero:
            return
        kept = keep_until(read_metrics(self.path), self.stage, state.global_step)
        write_text_atomic(self.path, "".join(to_json(line) + "\n" for line in kept))
        own = [line for line in kept if line["stage"] == self.stage and "loss" in line]
        if own:
            self.seconds, self._tokens_before = own[-1]["seconds"], own[-1]["tokens"]
        self._tokens = self._tokens_before
        self._file = self.path.open("a", encoding="utf-8")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        now = time.perf_counter()
        self._step_seconds, self._mark = now - self._mark, now
        self.seconds += self._step_seconds

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        """Write a line."""
        if self._file is None or not {"loss", "eval_loss"} & logs.keys():
            return
        line: dict[str, Any] = {"stage": self.stage, "step": state.global_step}
        is_step = "loss" in logs
        for name, value in logs.items():
            if name in _DROPPED or (not is_step and name.startswith("eval_") and _is_speed(name)):
                continue
            line[_NAMES.get(name, name.replace("eval_", "validation_"))] = value
        if is_step:
            line |= self._pace(logs.get("tokens", 0))
        self._file.write(to_json(line) + "\n")
        self._file.flush()

    def _pace(self, tokens: int) -> dict[str, float]:
        total = self._tokens_before + tokens
        new, self._tokens = total - self._tokens, total
        rate = new / self._step_seconds if self._step_seconds else 0.0
        return {
            "tokens": total,
            "tokens_per_second": round(rate, 1),
            "seconds": round(self.seconds, 3),
        }

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave validation out of the clock."""
        self._mark = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave saving out of the clock."""
        self._mark = time.perf_counter()

    def close(self) -> None:
        """Close the file; also after an error."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Begun(TrainerCallback):
    """Says when a step is done.

    Args:
        begin: Called after each step; the first is the one that counts.
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        self.begin = begin

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say so."""
        self.begin()


class ObjectiveSteps(TrainerCallback):
    """Lets the objective act after each optimiser step, on every process.

    Between the step and everything that looks at its result: log line, validation, checkpoint.

    Args:
        trainer: The trainer; it keeps what the objective measured for the log line.
    """

    def __init__(self, trainer: ReftTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Bind again: the model has been placed, and a checkpoint loaded."""
        self.trainer.bind_objective()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the objective act."""
        self.trainer.step_metrics = self.trainer.objective.after_step()


class KeepBest(TrainerCallback):
    """Keeps the best weights when validation rows have been scored.

    Args:
        trainer: The trainer: its `keep_best` says whether, its `score` what is compared.
    """

    def __init__(self, trainer: ReftTrainer) -> None:
        self.trainer = trainer

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Keep the weights if they are the best so far."""
        trainer = self.trainer
        if not (trainer.keep_best and trainer.is_in_train):
            return
        if trainer.score is None:
            trainer.save_best("validation_loss", metrics["eval_loss"], operator.lt)
        else:
            name = trainer.score[0]
            trainer.save_best(name, metrics[f"eval_{name}"], operator.gt)


def place_events(callbacks: Iterable[TrainerCallback], folder: Path) -> None:
    """Tell TensorBoard's callback where to write, unless TENSORBOARD_LOGGING_DIR does.

    Its default is a folder named by date and host, below the checkpoints.
    """
    from transformers.integrations import TensorBoardCallback

    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder)


def _is_speed(name: str) -> bool:
    return name.endswith(("_runtime", "_per_second", "_preparation_time"))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl; a torn last line is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def keep_until(lines: Iterable[dict[str, Any]], stage: int, step: int) -> list[dict[str, Any]]:
    """Return the lines up to a step of a stage.

    >>> keep_until([{"stage": 1, "step": 9}, {"stage": 2, "step": 1}], 2, 0)
    [{'stage': 1, 'step': 9}]
    """
    return [line for line in lines if (line["stage"], line["step"]) <= (stage, step)]
