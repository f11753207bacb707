"""Runs broken off in the middle, as a crash would."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import TrainerCallback


class StopAt(TrainerCallback):
    """Breaks a trainer off after a step."""

    def __init__(self, step: int = 5) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise."""
        if state.global_step == self.step:
            raise RuntimeError("crash")


def killed_at(step: int, recipe: Any, **quiet: Any) -> None:
    """Train a recipe that is killed when `step` steps are done."""
    from reftune.training import train
    from reftune.training.trainer import ReftTrainer

    real = ReftTrainer.training_step

    def dies(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReftTrainer, "training_step", dies)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, **quiet)
