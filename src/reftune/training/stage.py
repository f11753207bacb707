"""One stage of a run: put its adapter on, train it, keep what came of it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reftune.config.options import PLAIN
from reftune.config.recipe import Recipe, StageSpec
from reftune.training.data import Data, objective_of, training_rows, validates
from reftune.training.runfolder import RunFolder

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from reftune.objectives.base import Objective
    from reftune.training.causal import Settings
    from reftune.training.encode import Rows
    from reftune.training.online import OnlineTrainer
    from reftune.training.trainer import ReftTrainer

log = logging.getLogger(__name__)


@dataclass
class Run:
    """What the stages of a run share."""

    recipe: Recipe
    folder: RunFolder
    data: Data
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    base_parameters: int
    progress: bool


def continues(recipe: Recipe, index: int) -> bool:
    """Return whether a stage trains on the adapter of the stage before it."""
    return index > 0 and recipe.stages[index].adapter == recipe.stages[index - 1].adapter


def artefact_kind(recipe: Recipe, index: int) -> str:
    """Return `adapter`, `stack` or `model`: what stands on the base after a stage (from 0)."""
    if recipe.stages[index].adapter.method in PLAIN:
        return "model"
    own = sum(not continues(recipe, i) for i in range(index + 1))
    return "stack" if own + bool(recipe.model.adapter) > 1 else "adapter"


def restore_stage(run: Run, index: int) -> None:
    """Load what a finished stage left, trainable if the next stage goes on with it."""
    from reftune.model.build import apply_adapter, load_base
    from reftune.model.checkpoint import load_adapter

    if index < len(run.folder.stages) - 1:
        return  # a later artefact holds this one too
    recipe, adapter = run.recipe, run.recipe.stages[index].adapter
    folder = run.folder.stage_artefact(index, artefact_kind(recipe, index))
    is_next = index + 1 < len(recipe.stages) and continues(recipe, index + 1)
    if adapter.method in PLAIN:
        labels = run.model.config.num_labels if run.data.kind == "classification" else None
        model, _ = load_base(replace(recipe.model, name=str(folder.resolve())), labels)
        run.model = apply_adapter(model, adapter, recipe.seed)
    else:
        run.model, _ = load_adapter(folder, model=run.model, trainable=is_next)
    log.info("stage %d is finished already", index + 1)


def train_stage(run: Run, index: int) -> None:
    """Put the adapter of a stage on the model, train it, and write artefact and record."""
    from reftune.model.below import set_below
    from reftune.model.build import apply_adapter, trainable_summary
    from reftune.training import online_stage as online
    from reftune.training.processes import gathered, is_main_process

    recipe, stage = run.recipe, run.recipe.stages[index]
    objective = objective_of(stage)
    if not continues(recipe, index):
        adapter = online.start_of(stage) if objective.loop == "online" else stage.adapter
        run.model = apply_adapter(run.model, adapter, recipe.seed)
    set_below(run.model, trained=stage.below == "trained")
    rows = _encode(run, stage, objective)
    if is_main_process():
        run.folder.check_rows(index, rows["train"].digest())
    facts = _fit(run, index, objective, rows) if stage.epochs else UNTRAINED
    with gathered(run.model, everything=stage.adapter.method in PLAIN):
        path = _save(run, index) if is_main_process() else None
    if path is None:
        return
    shutil.rmtree(run.folder.constants(index).parent, ignore_errors=True)
    summary = trainable_summary(run.model)
    run.folder.add_stage(
        {
            "method": stage.adapter.method,
            "objective": stage.objective,
            "artefact": path.relative_to(run.folder.path).as_posix(),
            "trainable_parameters": summary.trainable,
            "trainable_fraction": summary.trainable / max(1, run.base_parameters),
            "adapter_bytes": _bytes(path),
            **facts,
            "data": {name: split.summary() for name, split in rows.items()},
        }
    )


UNTRAINED = {"steps": 0, "causal": "off", "train_seconds": 0.0, "validation_loss": None}
"""What is noted of a stage that only puts its adapter on."""


def _fit(run: Run, index: int, objective: Objective, rows: dict[str, Rows]) -> dict[str, Any]:
    """Train a stage; return what is noted of it."""
    from reftune.training.callbacks import MetricsWriter, place_events

    writer = MetricsWriter(run.folder.metrics, index + 1)
    make = _online_trainer if objective.loop == "online" else _trainer
    trainer = make(run, index, objective, rows, writer)
    place_events(trainer.callback_handler.callbacks, run.folder.tensorboard(index))
    try:
        with _held(run.model, run.recipe.stages[index]):
            result = trainer.train(resume_from_checkpoint=True)
    finally:
        for callback in trainer.callback_handler.callbacks:
            getattr(callback, "close", lambda: None)()
    return {
        "steps": result.global_step,
        "causal": trainer.plan.mode if trainer.plan else "off",
        "train_seconds": writer.seconds,
        "validation_loss": _last_validation(trainer),
    }


@contextmanager
def _held(model: nn.Module, stage: StageSpec) -> Iterator[None]:
    """Hold a model as a stage wants it: frozen parts still, LoRA merged, blocks checkpointed."""
    from reftune.model.below import still
    from reftune.model.merge import merged_lora
    from reftune.training.backward import set_checkpointing

    with still(model), merged_lora(model) if stage.merge_below else nullcontext():
        if stage.gradient_checkpointing:
            set_checkpointing(model, True)
        try:
            yield
        finally:
            if stage.gradient_checkpointing:
                set_checkpointing(model, False)


def _encode(run: Run, stage: StageSpec, objective: Objective) -> dict[str, Rows]:
    """Encode training rows as the objective wants them, and validation rows with all labels."""
    from reftune.inference.prompts import context_len
    from reftune.training.encode import encode_all

    data, context = run.data, context_len(run.model)
    rows = (data.splits["train"], run.tokenizer, data.kind, context)
    found = {"train": training_rows(objective, stage, *rows)}
    if validates(stage) and data.splits.get("validation"):
        found["validation"] = encode_all(
            data.splits["validation"],
            run.tokenizer,
            stage.max_len,
            kind=data.kind,
            what="validation",
            context=context,
        )
    return found


def _trainer(
    run: Run, index: int, objective: Objective, rows: dict[str, Rows], writer: Any
) -> ReftTrainer:
    from reftune.training.collate import Collator
    from reftune.training.progress import Counting
    from reftune.training.stacked import StackTrainer
    from reftune.training.trainer import ReftTrainer

    stage = run.recipe.stages[index]
    kind, more = ReftTrainer, {"counting": Counting("constants")} if run.progress else {}
    if stage.below == "trained":
        kind, more = StackTrainer, {**more, "below_lr": stage.optimiser.below_lr}
    return kind(
        run.model,
        _arguments(run, index, rows),
        objective,
        train_dataset=rows["train"],
        eval_dataset=rows.get("validation"),
        data_collator=Collator.of(run.tokenizer),
        keep_best=stage.keep == "best",
        score=_scorer(run, stage) if stage.keep_by == "metric" else None,
        callbacks=_callbacks(run, index, writer),
        causal=causal_settings(stage, rows["train"], run.folder.constants(index)),
        **more,
    )


def _online_trainer(
    run: Run, index: int, objective: Objective, rows: dict[str, Rows], writer: Any
) -> OnlineTrainer:
    from reftune.training.online import OnlineTrainer
    from reftune.training.rollouts import Sampler

    recipe, stage = run.recipe, run.recipe.stages[index]
    examples = run.data.splits["train"]
    shared = (run.data.task, rows["train"], examples, objective.config)
    return OnlineTrainer(
        run.model,
        run.tokenizer,
        stage,
        _arguments(run, index, rows),
        objective,
        rows["train"],
        Sampler(run.model, run.tokenizer, *shared, stage.max_len, recipe.seed),
        validation=rows.get("validation"),
        score=_scorer(run, stage),
        callbacks=_callbacks(run, index, writer),
    )


def _arguments(run: Run, index: int, rows: dict[str, Rows]) -> TrainingArguments:
    from reftune.training.arguments import arguments

    return arguments(
        run.recipe.stages[index],
        run.folder.stage_checkpoints(index),
        len(rows["train"]),
        seed=run.recipe.seed,
        num_validation=len(rows.get("validation", ())),
        trackers=run.recipe.track,
        base_dtype=next(run.model.parameters()).dtype,
        run_name=run.recipe.name,
    )


def _callbacks(run: Run, index: int, writer: Any) -> list[Any]:
    """Return what watches a stage: the writer of metrics, and progress where it is shown."""
    from reftune.training.callbacks import Begun
    from reftune.training.progress import Progress

    begun = Begun(run.folder.begin)
    if not run.progress:
        return [writer, begun]
    title, count = run.recipe.stages[index].adapter.method, len(run.recipe.stages)
    shown = Progress(f"stage {index + 1}/{count} {title}" if count > 1 else title)
    return [writer, begun, shown]


def _scorer(run: Run, stage: StageSpec) -> tuple[str, Callable[[], float]]:
    """Return the task's main metric and a function that computes it on the validation rows."""
    from reftune.inference.evaluate import evaluate

    task = run.data.task

    def score() -> float:
        rows = run.data.splits["validation"]
        spec = replace(run.recipe.evaluation, samples=1, temperature=0.0)
        found = evaluate(
            *(run.model, run.tokenizer, task, rows, spec),
            choice_by="probability",
            max_len=stage.max_len,
        )
        return found.figures[task.metric].mean or 0.0

    return task.metric, score


def _save(run: Run, index: int) -> Path:
    from reftune.model.checkpoint import save_adapter

    folder = run.folder.stage_artefact(index, artefact_kind(run.recipe, index))
    save_adapter(run.model, folder)
    if run.recipe.stages[index].adapter.method in PLAIN:
        run.tokenizer.save_pretrained(folder)
    return folder


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*.safetensors"))


def _last_validation(trainer: ReftTrainer) -> float | None:
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    return losses[-1] if losses else None


def causal_settings(stage: StageSpec, rows: Rows, folder: Path | None) -> Settings:
    """Return what a stage says about causal caching.

    Args:
        stage: The stage.
        rows: Its training rows: how often they are used, and how many share a prompt.
        folder: Where a store on disk lies.
    """
    from reftune import objectives
    from reftune.training.causal import Settings

    if objectives.get(stage.objective).loop == "online":
        return Settings("off")  # the rows of a rollout are new: nothing is constant
    uses = stage.epochs
    if stage.max_steps is not None:
        uses = stage.max_steps * stage.batch_size / max(1, len(rows))
    samples = 1.0
    if stage.causal != "off":
        prompts = {hash(tuple(row.input_ids[: row.prompt_len])) for row in rows.rows}
        samples = len(rows) / max(1, len(prompts))
    budget = None if stage.causal_budget is None else stage.causal_budget * 2**30
    on_disk = folder if stage.causal_store == "disk" else None
    return Settings(stage.causal, uses, samples, budget, on_disk)
