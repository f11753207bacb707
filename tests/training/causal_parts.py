"""Rows, models and batches for tests of causal caching in training."""

from __future__ import annotations

from functools import cache

from tiny import tiny_llama, tiny_tokenizer

from reftune.config.recipe import AdapterSpec
from reftune.model.build import apply_adapter
from reftune.tasks.base import Example
from reftune.training.collate import Collator, prepare
from reftune.training.encode import Rows, encode_all
from reftune.training.plan import Settings, make_plan

MODES = ("recompute", "store")


@cache
def long_rows() -> Rows:
    """Return 32 ragged rows: prompts of 20 to 51 tokens, two to four answer tokens."""
    words = "a bird sat on the old wall and "
    rows = [Example(str(i), (words * 2)[: 19 + i] + f"{i}=", f" {2 * i}", "") for i in range(32)]
    return encode_all(rows, tiny_tokenizer(), 96)


def adapted(positions="l2", layers="late", dropout=0.0, **model):
    """Return a Llama of four blocks with a LoReFT adapter."""
    spec = AdapterSpec(options={"rank": 2, "dropout": dropout}, positions=positions, layers=layers)
    return apply_adapter(tiny_llama(**{"layers": 4, **model}), spec, 0)


def batches(rows, size=8):
    """Yield prepared batches."""
    collate = Collator()
    for start in range(0, len(rows), size):
        yield prepare(collate(rows.rows[start : start + size]))


def plan(rows, mode="auto", model=None, num_rows=None, refusal=None, **settings):
    """Return the plan of a model on rows."""
    model = (adapted() if model is None else model).train()
    return make_plan(model, batches(rows), Settings(mode, **settings), num_rows, refusal)


def curve(trainer_for, rows, settings, folder, model=None, resume=None, **stage):
    """Train; return the trainer and its model."""
    model = adapted() if model is None else model
    trainer = trainer_for(model, rows, folder=folder, **stage)
    trainer.causal = settings
    trainer.train(resume)
    return trainer, model


def losses(trainer):
    """Return the loss of every step."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]
