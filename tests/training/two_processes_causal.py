"""What test_causal_distributed runs, alone or in each of two processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from causal_parts import adapted, long_rows
from crashes import StopAt
from safetensors.torch import save_file

FULL = 40_000
"""Bytes that hold some of the constants of all rows."""
WALKS = ("off", "recompute", "memory", "disk", "full disk")
SEVENTEEN = 17
"""Rows: in the last step of an epoch one of two processes has none."""


def trainer_of(out: Path, micro: int, how: str, callbacks=()):
    """Return a trainer on 17 rows, 8 a step, that keeps constants as `how` says."""
    from reftune import objectives
    from reftune.config.recipe import OptimiserSpec, StageSpec
    from reftune.training.arguments import arguments
    from reftune.training.collate import Collator
    from reftune.training.encode import Rows
    from reftune.training.plan import Settings
    from reftune.training.trainer import ReftTrainer

    rows = Rows(long_rows().rows[:SEVENTEEN])
    sizes = {"epochs": 2, "batch_size": 8, "micro_batch_size": micro, "checkpoint_every": 2}
    stage = StageSpec(optimiser=OptimiserSpec(lr=5e-3), **sizes)
    settings = Settings("store" if "disk" in how or how == "memory" else how)
    if "disk" in how:
        budget = FULL if "full" in how else None
        settings = Settings("store", folder=out / "constants", budget=budget)
    return ReftTrainer(
        adapted(dropout=0.0),
        arguments(stage, out / "ck", len(rows), seed=1),
        objectives.get("sft")(),
        rows,
        None,
        Collator(),
        callbacks=callbacks,
        causal=settings,
    )


def walk(out: Path, micro: int, how: str, breaks: bool = False) -> None:
    """Train and save losses, weights, and what the store of this process was asked for."""
    from reftune.training.processes import is_main_process, rank, world_size

    place = out / f"{how}{' broken' if breaks else ''}".replace(" ", "-")
    if breaks:
        try:
            trainer_of(place, micro, how, [StopAt(3)]).train()
        except RuntimeError as error:
            assert "crash" in str(error)
    trainer = trainer_of(place, micro, how)
    asked = {}
    real = trainer._settle

    def settle(checkpoint):
        real(checkpoint)
        store = getattr(trainer._source, "store", None)
        if store is not None:
            store.misses = 0
            asked["store"] = store

    trainer._settle = settle
    trainer.train(breaks)
    values = {"mode": torch.tensor(("off", "recompute", "store").index(trainer.plan.mode))}
    if asked:
        values["misses"] = torch.tensor(asked["store"].misses)
        values["kept"] = torch.tensor(len(asked["store"]))
    values["world"] = torch.tensor(world_size())
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            values[name] = parameter.detach().clone()
    if is_main_process():
        found = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        values["loss"] = torch.tensor(found, dtype=torch.float64)
    save_file(values, str(place / f"found{rank()}.safetensors"))


def sharded() -> None:
    """Check that a model under FSDP2 is refused by name."""
    from torch.distributed.fsdp import fully_shard

    from reftune.model.obstacles import SHARDED, obstacle

    model = adapted().train()
    assert obstacle(model) is None
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    assert obstacle(model) == SHARDED


def main() -> None:
    """Walk each way, once with a crash in between, then shard a model."""
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    for how in WALKS:
        walk(out, 2, how)
    for how in ("memory", "full disk"):
        walk(out, 2, how, breaks=True)
    sharded()
    (out / f"done{os.environ['RANK']}").touch()


if __name__ == "__main__":
    main()
