"""A whole run: data, model, stages one after the other, evaluation, report."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from reftune.config.naming import doubled
from reftune.config.recipe import Recipe
from reftune.errors import RecipeError
from reftune.report.model import Report
from reftune.training.data import (
    Data,
    count_labels,
    load_data,
    objective_of,
    training_rows,
)
from reftune.training.runfolder import RunFolder
from reftune.training.stage import Run, causal_settings, continues, restore_stage, train_stage

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from reftune.training.plan import Plan

log = logging.getLogger(__name__)


def train(
    recipe: Recipe, resume: bool = False, progress: bool = True, overwrite: bool = False
) -> Report:
    """Run a recipe: train its stages, save the adapter, evaluate, write the report.

    A killed run continues with `resume=True` to bit-equal weights at an equal number of threads and
    processes. Resuming a finished run returns its report.

    Args:
        recipe: The resolved recipe.
        resume: Continue an unfinished run.
        progress: Show progress on standard error.
        overwrite: Replace a run that is there, once the new one has done its first step.

    Returns:
        The report, as written to `report.json`. Under `accelerate launch` only the main process
        evaluates; the others return a report without figures.

    Raises:
        ReftuneError: For everything the user can mend: see `reftune.errors`.
    """
    import torch

    from reftune.training.processes import is_main_process

    recipe = check(recipe)
    folder = RunFolder.open(recipe, resume, overwrite, is_main_process())
    if folder.is_finished:
        folder.release()
        log.info("%s is finished already", folder.path)
        return Report.read(folder.path / "report.json")
    threads = torch.get_num_threads()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    try:
        with _quiet(not progress):
            return _train(recipe, folder, progress)
    except BaseException:
        folder.abandon()
        raise
    finally:
        torch.set_num_threads(threads)
        folder.release()


@contextmanager
def _quiet(on: bool) -> Iterator[None]:
    """Switch transformers' own progress bars off for a while."""
    from transformers.utils import logging as transformers_logging

    on = on and transformers_logging.is_progress_bar_enabled()
    if on:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if on:
            transformers_logging.enable_progress_bar()


def plans(recipe: Recipe, model: str | None = None) -> list[Plan]:
    """Return what causal caching would do in each stage of a recipe; nothing is trained.

    Args:
        recipe: The recipe.
        model: Another base model than the recipe's.
    """
    from reftune.model.below import set_below, still
    from reftune.model.build import apply_adapter
    from reftune.training.collate import Collator, prepare
    from reftune.training.plan import SAMPLE, make_plan

    if model is not None:
        recipe = replace(recipe, model=replace(recipe.model, name=model))
    recipe = check(recipe)
    data = load_data(recipe)
    base, tokenizer = load_model(recipe, data)
    collate, found = Collator.of(tokenizer), []
    for index, stage in enumerate(recipe.stages):
        if not continues(recipe, index):
            base = apply_adapter(base, stage.adapter, recipe.seed)
        set_below(base, trained=stage.below == "trained")
        rows = training_rows(objective_of(stage), stage, data.splits["train"], tokenizer, data.kind)
        batches = [
            prepare(collate(rows.rows[start : start + 16]))
            for start in range(0, min(SAMPLE, len(rows)), 16)
        ]
        wanted = causal_settings(stage, rows, Path(recipe.output))
        with still(base):
            found.append(make_plan(base.train(), batches, wanted, len(rows)))
    return found


def check(recipe: Recipe) -> Recipe:
    """Find faults that need neither data nor model, by the rules a recipe file is read by.

    Returns:
        The recipe, in which adapters that would be on the model together have names of their own.

    Raises:
        RecipeError: If there are faults, a tracker is not installed, the rows of a step cannot be
            shared among the processes, an objective cannot train its adapter, or `model.adapter`
            holds an adapter of a stage's name.
    """
    from reftune.config.loader import checked
    from reftune.training.arguments import Split, check_trackers
    from reftune.training.online_stage import check_stage
    from reftune.training.processes import world_size

    recipe = checked(recipe)
    check_trackers(recipe.track)
    for index, stage in enumerate(recipe.stages):
        Split.of(stage, world_size())
        objective = objective_of(stage)
        objective.check(stage.adapter)
        if objective.loop == "online":
            check_stage(recipe, index)
    index = doubled(recipe, _below(recipe))
    if index is not None:
        raise RecipeError(
            f'model.adapter holds an adapter named "{recipe.stages[index].adapter.name}", the name '
            f"of stage {index + 1}.",
            "Set adapter.name of the stage.",
        )
    return recipe


def _below(recipe: Recipe) -> dict[str, str]:
    """Return names and kinds of the adapters of a stack in `model.adapter`, where it is at hand."""
    place = recipe.model.adapter
    if not place or not Path(place).expanduser().is_dir():
        return {}
    from reftune.model.artefact import stack_kinds

    return stack_kinds(place)


def _train(recipe: Recipe, folder: RunFolder, progress: bool) -> Report:
    from transformers import set_seed

    from reftune.training.outcome import conclude
    from reftune.training.processes import is_main_process

    data = load_data(recipe)
    set_seed(recipe.seed)  # before the model: a new classification head is drawn here
    model, tokenizer = load_model(recipe, data, bare=bool(folder.stages))
    check_context(recipe, model)
    base_parameters = sum(p.numel() for p in model.parameters())
    if is_main_process():
        folder.write_environment()
    run = Run(recipe, folder, data, model, tokenizer, base_parameters, progress)
    for index in range(len(recipe.stages)):
        if index < len(folder.stages):
            restore_stage(run, index)
        else:
            train_stage(run, index)
    if not is_main_process():
        return Report(name=recipe.name)
    return conclude(run)


def load_model(
    recipe: Recipe, data: Data, bare: bool = False
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load the base model with the adapter that is on it from the start, if any.

    Args:
        recipe: The recipe.
        data: Its rows, which tell the classes of a class head.
        bare: Leave `model.adapter` out: the artefact of a finished stage holds it.
    """
    from reftune.model.build import load_base
    from reftune.model.checkpoint import load_adapter

    num_labels = None
    if data.kind == "classification":
        num_labels = data.task.num_labels or count_labels(data.splits["train"])
    model, tokenizer = load_base(recipe.model, num_labels)
    if recipe.model.adapter and not bare:
        model, _ = load_adapter(recipe.model.adapter, model=model)
    return model, tokenizer


def check_context(recipe: Recipe, model: nn.Module) -> None:
    """Check that rows of `max_len` tokens fit into the model's context.

    Raises:
        RecipeError: If they do not.
    """
    from reftune.inference.prompts import context_len

    limit = context_len(model)
    for stage in recipe.stages:
        if limit is not None and stage.max_len > limit:
            raise RecipeError(
                f"max_len is {stage.max_len}; the context of {recipe.model.name} is {limit} "
                "tokens.",
                f"Set max_len to {limit} or less, or use a model with a longer context.",
            )
