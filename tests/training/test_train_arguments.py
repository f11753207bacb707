"""Stage to TrainingArguments: shares of a batch, steps, refusals."""

from __future__ import annotations

import pytest
import torch

from reftune.config.recipe import OptimiserSpec, Recipe, StageSpec, TaskSpec
from reftune.errors import RecipeError
from reftune.training.arguments import (
    Split,
    arguments,
    check_trackers,
    precision,
    total_steps,
)
from reftune.training.stages import check


def test_rows_of_a_step_are_shared_out():
    assert Split.of(StageSpec(batch_size=16), 1) == Split(16, 1, 1)
    assert Split.of(StageSpec(batch_size=16, micro_batch_size=4), 2) == Split(4, 2, 2)
    assert Split.of(StageSpec(batch_size=16), 2) == Split(8, 1, 2)
    with pytest.raises(RecipeError, match="batch_size 16 is not a multiple of micro_batch_size 5"):
        Split.of(StageSpec(batch_size=16, micro_batch_size=5), 1)
    with pytest.raises(RecipeError, match="batch_size 3 is not"):
        Split.of(StageSpec(batch_size=3), 2)


def test_steps_and_warmup(tmp_path):
    stage = StageSpec(epochs=2.5, batch_size=8, optimiser=OptimiserSpec(warmup=0.1))
    assert total_steps(stage, 22) == 8
    args = arguments(stage, tmp_path, 22, seed=3)
    assert args.warmup_steps == 1 and args.num_train_epochs == 2.5 and args.seed == 3
    assert total_steps(StageSpec(max_steps=5), 22) == 5


def test_what_the_trainer_must_not_do_itself(tmp_path):
    args = arguments(StageSpec(), tmp_path, 22, seed=3)
    assert not args.remove_unused_columns and not args.logging_nan_inf_filter
    assert args.report_to == [] and args.logging_steps == 1


def test_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert precision(StageSpec(), torch.bfloat16) == "fp32"
    assert precision(StageSpec(precision="bf16"), torch.float32) == "bf16"
    with pytest.raises(RecipeError, match="fp16 needs a CUDA device"):
        precision(StageSpec(precision="fp16"), torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert precision(StageSpec(), torch.bfloat16) == "bf16"
    assert precision(StageSpec(), torch.float32) == "fp32"


def test_trackers(monkeypatch):
    import importlib.util

    assert check_trackers([]) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"wandb. is not installed.*-e '\.\[track\]'"):
        check_trackers(["wandb"])


def test_numbers_out_of_range_are_named_together():
    stage = StageSpec(epochs=0, max_len=1, optimiser=OptimiserSpec(lr=-1, warmup=1))
    with pytest.raises(RecipeError) as caught:
        check(Recipe(task=TaskSpec(name="families"), stages=[stage]))
    for name in ("optimiser.lr", "optimiser.warmup", "epochs", "max_len"):
        assert f"stages.0.{name}: " in caught.value.what
