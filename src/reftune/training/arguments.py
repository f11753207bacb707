"""From a stage of a recipe to transformers' TrainingArguments."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reftune.config.recipe import StageSpec
from reftune.errors import DataError, RecipeError
from reftune.training.processes import world_size

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments


@dataclass(frozen=True)
class Split:
    """How the rows of an optimiser step are shared out.

    rows of a step = micro x accumulation x processes.
    """

    micro: int
    accumulation: int
    processes: int

    @classmethod
    def of(cls, stage: StageSpec, processes: int) -> Split:
        """Share `batch_size` rows among processes and accumulation steps.

        Raises:
            RecipeError: If it does not divide.
        """
        micro = stage.micro_batch_size or max(1, stage.batch_size // processes)
        if stage.batch_size % (micro * processes):
            raise RecipeError(
                f"batch_size {stage.batch_size} is not a multiple of micro_batch_size {micro} x "
                f"{processes} processes.",
                "Rows of a step = micro_batch_size x accumulation x processes: change one of them.",
            )
        return cls(micro, stage.batch_size // (micro * processes), processes)

    @property
    def rows(self) -> int:
        """Rows of one optimiser step."""
        return self.micro * self.accumulation * self.processes


def total_steps(stage: StageSpec, num_rows: int) -> int:
    """Return the optimiser steps of a stage."""
    if stage.max_steps is not None:
        return stage.max_steps
    return math.ceil(stage.epochs * math.ceil(num_rows / stage.batch_size))


def precision(stage: StageSpec, base_dtype: torch.dtype) -> str:
    """Return `fp32`, `bf16` or `fp16`, the autocast precision of the forward pass.

    Raises:
        RecipeError: If the device cannot do it.
    """
    import torch

    wanted = stage.precision
    if wanted == "auto":
        return "bf16" if base_dtype == torch.bfloat16 and torch.cuda.is_available() else "fp32"
    is_old = torch.cuda.is_available() and not torch.cuda.is_bf16_supported()
    if wanted == "bf16" and is_old:
        raise RecipeError("precision: bf16 is not supported by this GPU.", "Use fp16 or fp32.")
    if wanted == "fp16" and not torch.cuda.is_available():
        raise RecipeError(
            "precision: fp16 needs a CUDA device, there is none.", "Use bf16, fp32 or auto."
        )
    return wanted


def check_trackers(names: Sequence[str]) -> list[str]:
    """Return the trackers for `report_to`.

    Raises:
        RecipeError: If one is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(
                f'The tracker "{name}" is not installed.',
                "In the source folder: pip install -e '.[track]'. metrics.jsonl is written anyway.",
            )
    return list(names)


def arguments(
    stage: StageSpec,
    folder: Path,
    num_rows: int,
    *,
    seed: int,
    num_validation: int = 0,
    trackers: Sequence[str] = (),
    base_dtype: torch.dtype | None = None,
    run_name: str = "run",
) -> TrainingArguments:
    """Return TrainingArguments for one stage.

    Args:
        stage: The stage.
        folder: Folder of checkpoints.
        num_rows: Training rows.
        seed: Seed of data order and dropout.
        num_validation: Validation rows; 0 if there are none.
        trackers: Trackers beside metrics.jsonl.
        base_dtype: Dtype of the base model, for `precision: auto`.
        run_name: Name shown by trackers.

    Raises:
        RecipeError: If values do not fit together or the device.
        DataError: If validation is asked for and there are no validation rows.
    """
    import torch
    from transformers import TrainingArguments

    split = Split.of(stage, world_size())
    kind = precision(stage, base_dtype or torch.float32)
    steps = total_steps(stage, num_rows)
    optimiser = stage.optimiser
    return TrainingArguments(
        output_dir=str(folder),
        run_name=run_name,
        per_device_train_batch_size=split.micro,
        per_device_eval_batch_size=split.micro,
        gradient_accumulation_steps=split.accumulation,
        num_train_epochs=stage.epochs,
        max_steps=-1 if stage.max_steps is None else stage.max_steps,
        learning_rate=optimiser.lr,
        weight_decay=optimiser.weight_decay,
        adam_beta1=optimiser.betas[0],
        adam_beta2=optimiser.betas[1],
        adam_epsilon=optimiser.eps,
        max_grad_norm=optimiser.clip,
        lr_scheduler_type=optimiser.schedule,
        warmup_steps=math.ceil(optimiser.warmup * steps),
        optim="adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
        bf16=kind == "bf16",
        fp16=kind == "fp16",
        seed=seed,
        data_seed=seed,
        report_to=check_trackers(trackers) or "none",
        **_schedule(stage, num_validation),
        **_fixed(),
    )


def _fixed() -> dict[str, Any]:
    """Return what reftune relies on and no recipe changes."""
    import torch

    return {
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a loss that is not finite is an error, not a gap
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "label_names": ["labels"],
        "save_total_limit": None,  # rotated by reftune, which writes them under a temporary name
        "load_best_model_at_end": False,
    }


def _schedule(stage: StageSpec, num_validation: int) -> dict[str, Any]:
    """Return when to save and to score validation rows."""
    values: dict[str, Any] = {"save_strategy": "epoch", "eval_strategy": "no"}
    if stage.checkpoint_every:
        values |= {"save_strategy": "steps", "save_steps": stage.checkpoint_every}
    wanted = stage.evaluate_every > 0 or stage.keep == "best"
    if not wanted:
        return values
    if not num_validation:
        what = "keep: best" if stage.keep == "best" else f"evaluate_every: {stage.evaluate_every}"
        raise DataError(
            f"{what} needs validation rows, the task has none.",
            "Give task.validation (or validation_size), or use keep: last and evaluate_every: 0.",
        )
    if stage.evaluate_every:
        return values | {"eval_strategy": "steps", "eval_steps": stage.evaluate_every}
    return values | {"eval_strategy": "epoch"}


def check_arguments(args: TrainingArguments) -> None:
    """Refuse arguments under which the Trainer would silently train something else.

    Raises:
        RecipeError: For label smoothing, dropped columns and nn.DataParallel.
    """
    if args.label_smoothing_factor:
        raise RecipeError(
            f"label_smoothing_factor is {args.label_smoothing_factor}. Label smoothing is not "
            "supported: the Trainer would call the model without labels, so that positions could "
            "not be told from the answer.",
            "Set it to 0.",
        )
    if args.remove_unused_columns:
        raise RecipeError(
            "remove_unused_columns is on and would drop positions and subspaces from the rows.",
            "Set remove_unused_columns=False.",
        )
    if args.n_gpu > 1:
        raise RecipeError(
            f"One process sees {args.n_gpu} GPUs; nn.DataParallel is not supported.",
            f"Run: accelerate launch --multi_gpu --num_processes {args.n_gpu} -m reftune train, or "
            "set CUDA_VISIBLE_DEVICES to one GPU.",
        )
