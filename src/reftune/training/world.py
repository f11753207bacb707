"""What processes that train together on rollouts tell each other."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Real
from torch import Tensor

from reftune.objectives.online import World
from reftune.training.processes import rank, world_size


class Processes(World):
    """The processes that `accelerate launch` or torchrun started.

    Args:
        device: Where tensors are summed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.size = device, world_size()

    def sum(self, tensor: Real[Tensor, " ..."]) -> Real[Tensor, " ..."]:
        """Return the sum of the tensors of all processes."""
        from accelerate.utils import reduce

        return reduce(tensor.to(self.device), "sum").to(tensor.device)

    def gather(self, rows: Real[Tensor, " own *more"]) -> tuple[Real[Tensor, " all *more"], int]:
        """Return the rows of all processes, and at which of them this one's begin."""
        parts = self.lists([rows.detach().cpu()])
        start = sum(map(len, parts[: rank()]))
        return torch.cat(parts).to(rows.device), start

    def lists(self, own: list[Any]) -> list[Any]:
        """Return the lists of all processes as one."""
        from accelerate.utils import gather_object

        return gather_object(own)


def world_of(device: torch.device) -> World:
    """Return the processes that train together, or a world of one."""
    return Processes(device) if world_size() > 1 else World()
