"""Several adapters on one frozen model: trained one after the other, mixed in one batch.

    python examples/many_adapters.py            # offline, on the embedded model
    python examples/many_adapters.py --steps 5  # just to see it run

Two adapters learn two forms of the same answers. Then one batch asks each problem three times: with
the first adapter, with the second, and with the base model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

import reftune
from reftune import LoreftConfig, RedConfig, ReftConfig, get_peft_model, load_base
from reftune.config.recipe import OptimiserSpec, StageSpec, TaskSpec
from reftune.objectives import get as get_objective
from reftune.tasks import get as get_task
from reftune.training.arguments import arguments as training_arguments
from reftune.training.collate import Collator
from reftune.training.encode import encode_all
from reftune.training.trainer import ReftTrainer

STYLES = {"hash": "hash", "json": "json"}
"""Adapter name to the form of answers it learns."""


def train(model: nn.Module, tokenizer: object, style: str, steps: int, out: Path) -> None:
    """Train the active adapter on answers in one form."""
    task = get_task(TaskSpec("families", train_size=500, options={"style": style}))
    rows = encode_all(task.load("train"), tokenizer, max_len=256)
    stage = StageSpec(max_steps=steps, optimiser=OptimiserSpec(lr=3e-3))
    settings = training_arguments(stage, out, len(rows), seed=1)
    objective = get_objective("sft")()
    ReftTrainer(model, settings, objective, rows, data_collator=Collator.of(tokenizer)).train()


def main() -> None:
    """Train two adapters, mix them, add them up, save and load them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="optimiser steps of each adapter")
    parser.add_argument("--out", type=Path, default=Path("runs/example-adapters"), help="folder")
    arguments = parser.parse_args()

    model, tokenizer = load_base("nano")
    first = ReftConfig(LoreftConfig(rank=4), positions="f4+l4")
    model = get_peft_model(model, first, adapter_name="hash")
    model.add_adapter("json", ReftConfig(RedConfig(), positions="all"))
    for name, style in STYLES.items():
        model.set_adapter(name)  # this one is trained, the other neither acts nor changes
        train(model, tokenizer, style, arguments.steps, arguments.out / f"checkpoints-{name}")

    prompt = "Question: Ben has 3 pears and buys 4. How many pears does Ben have? Answer:"
    names = [*STYLES, "__base__"]
    answers = reftune.generate(
        model, tokenizer, [prompt] * len(names), max_new_tokens=48, adapter_names=names
    )
    print(prompt)
    for name, (answer,) in zip(names, answers):
        print(f"  {name:<9}{answer.strip()}")

    reftune.use(model, list(STYLES))  # both at once: their edits add up
    reftune.set_strength(model, "json", 0.5)
    print("  both     ", reftune.generate(model, tokenizer, [prompt], max_new_tokens=48)[0][0])

    model.save_pretrained(arguments.out / "adapters")  # a folder for each name
    fresh, tokenizer = load_base("nano")
    loaded, _ = reftune.load(arguments.out / "adapters" / "hash", model=fresh)
    loaded.load_adapter(str(arguments.out / "adapters" / "json"), adapter_name="json")
    print("loaded:", ", ".join(loaded.peft_config))


if __name__ == "__main__":
    main()
