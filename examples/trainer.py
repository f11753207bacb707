"""Train LoReFT with transformers' Trainer, save it, load it, compare it with the base model.

    python examples/trainer.py            # offline, on the embedded model
    python examples/trainer.py --steps 5  # just to see it run

The task: word problems of new families, solved in prose and ended with "#### N".
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

import reftune
from reftune import LoreftConfig, ReftConfig, get_peft_model, load_base
from reftune.config.recipe import TaskSpec
from reftune.tasks import get
from reftune.tasks.base import Example


def encode(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Tokenise prompt and answer apart; the labels leave the prompt out.

    This is how the adapter knows in training where the prompt ends.
    """
    prompt = tokenizer(example.prompt)["input_ids"]
    answer = tokenizer(example.target, add_special_tokens=False)["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def main() -> None:
    """Train, save, load, answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps")
    parser.add_argument("--out", type=Path, default=Path("runs/example-trainer"), help="folder")
    arguments = parser.parse_args()

    model, tokenizer = load_base("nano")
    intervention = LoreftConfig(rank=8)
    model = get_peft_model(model, ReftConfig(intervention, layers="all", positions="f4+l8"))
    model.print_trainable_parameters()

    options = {"group": "new", "style": "prose_hash"}
    task = get(TaskSpec("families", train_size=1000, test_size=8, options=options))
    rows = [encode(example, tokenizer) for example in task.load("train")]
    trainer = Trainer(
        model,
        TrainingArguments(
            str(arguments.out / "checkpoints"),
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            warmup_steps=arguments.steps // 20,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    model.save_pretrained(arguments.out / "adapter")

    model, tokenizer = reftune.load(arguments.out / "adapter")
    examples = task.load("test")
    prompts = [example.prompt for example in examples]
    answers = reftune.generate(model, tokenizer, prompts, max_new_tokens=96)
    with reftune.off(model):
        before = reftune.generate(model, tokenizer, prompts, max_new_tokens=96)
    for example, (old,), (new,) in zip(examples, before, answers):
        print(f"\n{example.prompt}\n  base:    {old.strip()}\n  adapter: {new.strip()}")
        print(f"  right:   {example.answer}")


if __name__ == "__main__":
    main()
