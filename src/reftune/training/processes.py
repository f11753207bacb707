"""Several processes: who is who, and what each owes the others."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from reftune.model.run import Prepared


_ADAPTER_MARKS = ("reft_", "lora_", "modules_to_save")


def world_size() -> int:
    """Return the number of processes `accelerate launch` or torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def agreed(value: Any) -> Any:
    """Return the main process's value in every process. All must call it."""
    if world_size() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def together() -> None:
    """Wait until every process has got here."""
    if world_size() > 1:
        from accelerate.utils import wait_for_everyone

        wait_for_everyone()


def is_main_process() -> bool:
    """Return whether this process writes files and prints."""
    return rank() == 0


def leave_at_exit() -> None:
    """Close the process group at exit: left open, its threads may abort the interpreter."""
    atexit.register(_leave)


def _leave() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def shards(model: nn.Module) -> list[Any]:
    """Return the modules FSDP2 has sharded; none outside FSDP2."""
    if world_size() == 1:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def gathered(model: nn.Module, everything: bool = False) -> Iterator[None]:
    """Hold whole tensors in place of FSDP2 shards for a while, to save. All processes must enter.

    Args:
        model: The model; without shards nothing happens.
        everything: All parameters, not just those of adapters and heads.
    """
    import torch

    replaced = []
    for prefix, module in model.named_modules() if shards(model) else ():
        for name, parameter in list(module._parameters.items()):
            own = f"{prefix}.{name}"
            wanted = everything or any(mark in own for mark in _ADAPTER_MARKS)
            if not hasattr(parameter, "full_tensor") or not (wanted or parameter.requires_grad):
                continue
            whole = parameter.detach().full_tensor()
            module._parameters[name] = torch.nn.Parameter(whole, parameter.requires_grad)
            replaced.append((module, name, parameter))
    try:
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


def with_one_label(prepared: Prepared) -> Prepared:
    """Give a batch of blank rows one label, so that its process takes part in the step.

    Its loss must be multiplied by 0.
    """
    if prepared.labels.shape == prepared.input_ids.shape:
        prepared.labels = prepared.labels.clone()
        prepared.labels[0, 1] = prepared.input_ids[0, 1]
    return prepared
