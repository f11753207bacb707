"""What test_online_distributed runs, alone or in each of two processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from online_toys import Fixed, Toy, adapted, objective_of, sampler_of, trainer_of, weights
from safetensors.torch import save_file

from reftune.training.world import world_of

COUNT = 17
"""Questions: in the last step of an epoch one of two processes has none."""
NAMES = ("reinforced", "online_st", "separate")
WATCHED = ("loss", "reward", "grad_norm", "tokens", "eval_loss", "length")
PPO = ("kl", "entropy", "advantage_std", "explained_variance", "value_loss", "clip_fraction")


def made(name: str) -> Any:
    """Return an objective; `separate` is reinforced with a value model of its own."""
    return objective_of(trunk="separate") if name == "separate" else objective_of(name)


def walk(out: Path, micro: int, name: str) -> None:
    """Train on fixed answers to 17 questions, 8 a rollout; save what was logged and learned."""
    task, objective = Toy("7", COUNT), made(name)
    model = adapted()
    fixed = Fixed(sampler_of(adapted(), objective_of(), task))
    if name == "online_st":  # no answer of a random model is right
        for step in fixed.known:
            for place, rollout in enumerate(step):
                object.__setattr__(rollout.score, "right", place % 3 == 0)
    stage = {"micro_batch_size": micro, "evaluate_every": 2, "checkpoint_every": 2, "keep": "best"}
    trainer = trainer_of(model, out / f"ck-{name}", objective, task, True, **stage)
    trainer.sampler = fixed
    trainer.train()
    history = trainer.state.log_history
    found = {f"weight.{n}": value for n, value in weights(model).items()}
    for key in WATCHED + (() if name == "online_st" else PPO):
        found[key] = torch.tensor([line[key] for line in history if key in line]).double()
    rank = os.environ.get("RANK", "0")
    save_file(found, str(out / f"{name}{rank}.safetensors"))


def meet(out: Path) -> None:
    """Gather rows of which each process has another number, and sum what they have."""
    rank = int(os.environ.get("RANK", "0"))
    world = world_of(torch.device("cpu"))
    rows, start = world.gather(torch.full((rank + 1, 2), float(rank)))
    own = {"rows": rows, "start": torch.tensor(start), "sum": world.sum(torch.tensor(rank + 1.0))}
    save_file(own, str(out / f"met{rank}.safetensors"))


def main() -> None:
    """Walk with all objectives, then meet."""
    torch.set_num_threads(1)
    for name in NAMES:
        walk(Path(sys.argv[1]), 2, name)
    meet(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
