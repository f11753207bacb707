"""What `reftune eval` can know before it scores: the place to write, the models, the form."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reftune.cli.common import note
from reftune.errors import DataError, RecipeError, ReftuneError

if TYPE_CHECKING:
    from reftune.config.recipe import Recipe

BASE = "base"
WRITTEN = {"report.json", "predictions.jsonl", "against"}
"""What an evaluation writes into its folder."""
SOURCES = {"name", "train", "validation", "test", "data_dir", "options"}
SOURCES |= {"train_size", "validation_size", "test_size"}
"""Fields of own data that say which rows, not how they are asked and compared."""
FORM = ("separator", "trigger", "max_new_tokens", "turns", "subspace", "subject", "mask")
FORM += ("text", "pair", "label", "labels")
"""Options of own data that say how rows are asked and compared."""


def check_output(folder: Path) -> None:
    """Refuse a folder that scores would harm, or that cannot be written, before scoring.

    Raises:
        RecipeError: If it holds a run or anything that is no evaluation, or cannot be written.
    """
    for place in (folder, folder / "against"):
        if place.is_dir():
            _check_content(place)
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise RecipeError(f"{there} is a file.", "Choose another --output folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RecipeError(f"{there} cannot be written.", "Choose another --output folder.")


def _check_content(folder: Path) -> None:
    remedy = "Nothing there was touched. Choose another --output folder."
    if (folder / "state.json").exists():
        raise RecipeError(f"{folder} holds a run.", remedy)
    others = sorted({item.name for item in folder.iterdir()} - WRITTEN)
    others = [name for name in others if not name.startswith(".")]
    if others:
        what = f"{folder} holds other files than an evaluation's: {', '.join(others[:3])}."
        raise RecipeError(what, remedy)


def check_models(names: Sequence[str]) -> None:
    """Refuse names that cannot be loaded, all of them before the first is scored.

    Raises:
        ModelError, AdapterError: If a model is not there.
        DataError: If the base is asked for and there is no adapter to switch off.
    """
    from reftune.cli.models import check_there, has_adapter

    for number, name in enumerate(names):
        if not (number and name == BASE):
            check_there(name)
        elif not has_adapter(names[0]):
            raise DataError(
                "This model has no adapter to switch off.", "Name the base model: --against nano."
            )


def form_of(run: Recipe, changes: Sequence[str]) -> dict[str, Any]:
    """Return how a run on own data asks and compares its rows, as keys of a task.

    Args:
        run: The run.
        changes: Changes of the command line; a key they set is left to them.
    """
    from reftune import tasks

    task = run.task
    form = {item.name: getattr(task, item.name) for item in fields(task)}
    form = {key: value for key, value in form.items() if key not in SOURCES}
    form |= {key: task.options[key] for key in FORM if task.options.get(key) is not None}
    if form.get("label") and not form.get("labels"):  # found in training: keep their order
        try:
            form["labels"] = list(tasks.get(task).labels)  # type: ignore[attr-defined]
        except ReftuneError:
            note("The classes are those of the rows to score: the run's own data are not there.")
    given = {text.partition("=")[0].strip().split(".")[-1] for text in changes}
    return {key: value for key, value in form.items() if key not in given and value is not None}


def tell_form(run: Recipe, form: dict[str, Any], file: str) -> None:
    """Say that rows are asked as in the run, and warn if they are the run's own training rows."""
    from dataclasses import asdict

    from reftune.config.recipe import TaskSpec

    plain = asdict(TaskSpec())
    told = [f"{key}={value}" for key, value in form.items() if value != plain.get(key)]
    if told:
        note(f"Rows are asked as the run's own: {', '.join(told)}; --option changes that.")
    train = run.task.train
    if train and Path(train).expanduser().absolute() == Path(file).expanduser().absolute():
        note(
            f"Warning: {file} is what the run was trained on; this score says nothing of new rows."
        )
