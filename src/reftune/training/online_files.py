"""What the online loop keeps on disk: checkpoints, the frozen policy, the best weights.

A checkpoint holds the trained parameters, the objective's head, optimiser, schedule, the
objective's own state and torch's random numbers. The frozen policy of a stage is written once,
before its first step, so that a resumed run compares with the same one to the bit.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerState

from reftune.training import checkpoints
from reftune.training.processes import together
from reftune.training.snapshot import restore

if TYPE_CHECKING:
    from reftune.training.online import OnlineTrainer

log = logging.getLogger(__name__)

FILE = "online.pt"
REFERENCE = "reference"


class Files:
    """The folder of checkpoints of an online stage.

    Args:
        trainer: Whose state it is; everything it trains must have been made.
    """

    def __init__(self, trainer: OnlineTrainer) -> None:
        self.trainer, self.folder = trainer, Path(trainer.args.output_dir)

    def start(self, resume: bool) -> None:
        """Continue from the newest complete checkpoint, or begin anew."""
        if self.trainer.args.should_save:
            checkpoints.restore_best(self.folder)
        together()
        last = checkpoints.last_checkpoint(self.folder) if resume else None
        snapshot = self.trainer.snapshot
        if last is not None:
            if snapshot is not None:
                snapshot.load_state_dict(self._read(self.folder / REFERENCE))
            self._load(last)
            if self.trainer.stage.keep == "best":
                checkpoints.best_of(self.folder, self.trainer.state.log_history)
            return
        if self.trainer.args.should_save:
            shutil.rmtree(self.folder / checkpoints.BEST, ignore_errors=True)
        if snapshot is not None:
            self._write(REFERENCE, snapshot.state_dict(), "the frozen policy")
        together()

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        trainer = self.trainer
        state = {
            "weights": self._weights(),
            "optimiser": trainer.optimizer.state_dict(),
            "schedule": trainer.schedule.state_dict(),
            "objective": trainer.objective.state_dict(),
            "random": torch.get_rng_state(),
        }
        name = f"checkpoint-{trainer.state.global_step}"
        self._write(name, state, f"the checkpoint {name}", trainer.state)
        if trainer.args.should_save:
            checkpoints.rotate(self.folder)
        together()

    def save_best(self, name: str, value: float, is_better: Callable[[float, float], bool]) -> None:
        """Keep the current weights if their value is the best so far.

        Args:
            name: What is compared.
            value: Its value now.
            is_better: Whether the first of two values is the better one.
        """
        best = checkpoints.best_so_far(self.folder)
        together()  # every process has read it before one writes
        if best is not None and not is_better(value, best[1]):
            return
        step = self.trainer.state.global_step
        note = (step, value, name)
        self._write(checkpoints.BEST, self._weights(), "the best weights", best=note)
        together()

    def take_best(self) -> None:
        """Put the best weights on the model."""
        best = checkpoints.best_of(self.folder, self.trainer.state.log_history)
        if best is None:
            return
        log.info("keeping the weights of step %d, %.4f on validation rows", *best)
        restore(self.trainer.parameters, self._read(self.folder / checkpoints.BEST))

    def _load(self, checkpoint: Path) -> None:
        trainer, state = self.trainer, self._read(checkpoint)
        restore(trainer.parameters, state["weights"])
        trainer.optimizer.load_state_dict(state["optimiser"])
        trainer.schedule.load_state_dict(state["schedule"])
        trainer.objective.load_state_dict(state["objective"])
        torch.set_rng_state(state["random"])
        found = TrainerState.load_from_json(str(checkpoint / checkpoints.STATE_FILE))
        trainer.state.global_step, trainer.state.epoch = found.global_step, found.epoch
        trainer.state.log_history = found.log_history
        log.info("continuing at step %d", found.global_step)

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().cpu() for name, p in self.trainer.parameters.items()}

    def _read(self, folder: Path) -> dict[str, Any]:
        return torch.load(folder / FILE, map_location="cpu", weights_only=True)

    def _write(
        self,
        name: str,
        state: dict[str, Any],
        what: str,
        progress: TrainerState | None = None,
        best: tuple[int, float, str] | None = None,
    ) -> None:
        """Write a folder whole or not at all; only the main process does."""
        if not self.trainer.args.should_save:
            return
        with checkpoints.staging(self.folder, what) as to:
            (to / name).mkdir()
            torch.save(state, to / name / FILE)
            if progress is not None:
                progress.save_to_json(str(to / name / checkpoints.STATE_FILE))
            if best is not None:
                checkpoints.note_best(to / name, *best)
            checkpoints.publish(to / name, self.folder / name)
