"""Training an adapter together with those below it, each at a rate of its own.

A checkpoint of the Trainer holds the uppermost adapter only. Here it holds the others too, in a
file beside it, so that a stage that trains them resumes to the same weights.

Left out on purpose: FSDP, under which each process would hold a part of every parameter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import TrainOutput

from reftune.errors import TrainingError
from reftune.model.below import parameters_below
from reftune.training.processes import shards
from reftune.training.trainer import ReftTrainer

BELOW_FILE = "below.safetensors"


class StackTrainer(ReftTrainer):
    """Train all adapters of a stack.

    Args:
        below_lr: Peak learning rate of the adapters below; None: that of the uppermost one.
        **kwargs: What `ReftTrainer` takes.

    Raises:
        TrainingError: If there is no adapter below, or the model is sharded.
    """

    def __init__(self, *args: Any, below_lr: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.below_lr = below_lr
        if not parameters_below(self.model):
            raise TrainingError("There is no adapter below that could be trained.", "Add one.")

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train; see `ReftTrainer.train`."""
        if shards(self.model) or self.is_fsdp_enabled:
            raise TrainingError(
                "Adapters below are not trained under FSDP: checkpoints would hold parts of them.",
                "Use DDP, or `below: frozen`.",
            )
        return super().train(resume_from_checkpoint, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimiser, with groups of their own for the adapters below."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.below_lr is not None:
            below = {id(p) for p in parameters_below(self.model).values()}
            split_rates(optimizer, below, self.below_lr)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            from safetensors.torch import save_file

            below = parameters_below(self.model)
            tensors = {name: p.detach().cpu().contiguous() for name, p in below.items()}
            save_file(tensors, Path(output_dir or self.args.output_dir) / BELOW_FILE)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        from safetensors.torch import load_file

        saved = load_file(Path(resume_from_checkpoint) / BELOW_FILE)
        with torch.no_grad():
            for name, parameter in parameters_below(self.model).items():
                parameter.copy_(saved[name])


def split_rates(optimizer: torch.optim.Optimizer, chosen: set[int], lr: float) -> None:
    """Move parameters into groups of another learning rate, all else as in their groups.

    Args:
        optimizer: An optimiser that has taken no step, without a schedule.
        chosen: Ids of the parameters.
        lr: Their rate.
    """
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in chosen]
        if moved:
            group["params"] = [p for p in group["params"] if id(p) not in chosen]
            same = {key: value for key, value in group.items() if key != "params"}
            optimizer.add_param_group({**same, "params": moved, "lr": lr})
