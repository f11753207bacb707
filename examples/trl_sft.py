"""Train LoReFT with TRL's SFTTrainer. Needs the extra `trl`: pip install -e ".[trl]"

    python examples/trl_sft.py            # offline, on the embedded model
    python examples/trl_sft.py --steps 5  # just to see it run

Data with the columns `prompt` and `completion` make TRL learn the completion only; that is also how
the adapter knows where the prompt ends.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import reftune
from reftune import LoreftConfig, ReftConfig, load_base
from reftune.config.recipe import TaskSpec
from reftune.tasks import get


def main() -> None:
    """Train and answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps")
    parser.add_argument("--out", type=Path, default=Path("runs/example-trl"), help="folder")
    arguments = parser.parse_args()

    model, tokenizer = load_base("nano")
    options = {"group": "new", "style": "prose_hash"}
    task = get(TaskSpec("families", train_size=1000, test_size=4, options=options))
    rows = [{"prompt": row.prompt, "completion": row.target} for row in task.load("train")]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            str(arguments.out / "checkpoints"),
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            max_length=256,
            bf16=False,  # TRL asks for it by default; not every device has it
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=ReftConfig(LoreftConfig(rank=8), layers="all", positions="f4+l8"),
    )
    trainer.train()
    reftune.save(trainer.model, arguments.out / "adapter")

    model, tokenizer = reftune.load(arguments.out / "adapter")
    prompts = [example.prompt for example in task.load("test")]
    for prompt, (answer,) in zip(
        prompts, reftune.generate(model, tokenizer, prompts, max_new_tokens=96)
    ):
        print(f"\n{prompt}\n  {answer.strip()}")


if __name__ == "__main__":
    main()
