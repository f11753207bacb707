"""An intervention of your own: one class, one line, and everything else works with it.

    python examples/own_intervention.py            # offline, on the embedded model
    python examples/own_intervention.py --steps 5  # just to see it run

It adds a learned vector where a learned gate opens. Recipes, saving, positions, layers, mixing and
evaluation need nothing from it. A package announces it by an entry point instead of `register`:

    [project.entry-points."reftune.interventions"]
    steer = "my_package.steer:Steer"
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import reftune
from reftune import Edit, Intervention, InterventionConfig
from reftune.config.loader import from_dict


@dataclass(frozen=True)
class SteerConfig(InterventionConfig):
    """Settings of Steer."""

    sharpness: float = 1.0
    """Factor of the gate's input."""


class Steer(Intervention):
    """A gated steering vector.

    h' = h + sigmoid(k (w·h + c)) v,   w, v in R^d.   Parameters per site: 2d + 1.
    """

    Config = SteerConfig
    name = "steer"
    title = "Steer"
    source = "an example of reftune"

    def __init__(self, config: SteerConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.reft_weight = nn.Parameter(torch.zeros(dim))
        self.reft_vector = nn.Parameter(torch.zeros(dim))
        self.reft_bias = nn.Parameter(torch.zeros(1))

    @torch.no_grad()
    def reset(self) -> None:
        """Start at the identity: v = 0. The gate is random, so that v receives a gradient."""
        nn.init.normal_(self.reft_weight, std=0.02)
        self.reft_vector.zero_()
        self.reft_bias.zero_()

    def edit(self, h: Tensor, select: Tensor | None = None) -> Edit:
        """Compute the change for h `[n, d]`; the gate goes with it for objectives that read it."""
        score = h @ self.reft_weight.to(h.dtype) + self.reft_bias.to(h.dtype)
        gate = torch.sigmoid(self.config.sharpness * score)[:, None]
        return Edit(gate * self.reft_vector.to(h.dtype), gate)

    @classmethod
    def num_parameters(cls, config: SteerConfig, dim: int) -> int:
        """Return 2·d + 1."""
        return 2 * dim + 1


def main() -> None:
    """Register the method and train it by a recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--rows", type=int, default=100, help="test rows")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of run folders")
    arguments = parser.parse_args()

    reftune.register("steer", Steer)
    task = {"name": "families", "group": "new", "style": "prose_hash"}
    recipe = from_dict(
        {
            "model": "nano",
            "task": {**task, "train_size": 1000, "test_size": arguments.rows},
            "adapter": {"method": "steer", "sharpness": 4.0, "positions": "all"},
            "optimiser": {"lr": 3e-3},
            "max_steps": arguments.steps,
            "max_len": 256,
            "evaluation": {"max_new_tokens": 96},
            "name": "example-steer",
            "output": str(arguments.out),
        }
    )
    report = reftune.train(recipe, overwrite=True)
    print(f"trained {report.trainable_parameters:,} parameters; read {arguments.out}/example-steer")
    for name, figure in report.figures.items():
        low, high = figure.low or 0.0, figure.high or 0.0
        print(f"  {name:<26}{figure.mean:.3f}  [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
