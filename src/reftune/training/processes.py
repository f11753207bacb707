"""Several processes: who is who, and what each owes the others."""

from __future__ import annotations

import atexit
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reftune.model.run import Prepared


def world_size() -> int:
    """Return the number of processes `accelerate launch` or torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this process writes files and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def leave_at_exit() -> None:
    """Close the process group at exit: left open, its threads may abort the interpreter."""
    atexit.register(_leave)


def _leave() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def with_one_label(prepared: Prepared) -> Prepared:
    """Give a batch of blank rows one label, so that its process takes part in the step.

    Its loss must be multiplied by 0.
    """
    if prepared.labels.shape == prepared.input_ids.shape:
        prepared.labels = prepared.labels.clone()
        prepared.labels[0, 1] = prepared.input_ids[0, 1]
    return prepared
