"""What `eval` and `diagnose` can know before they score: place to write, models, task, form."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reftune.cli.common import note, task_spec
from reftune.errors import DataError, RecipeError, ReftuneError
from reftune.report.files import standing

if TYPE_CHECKING:
    from reftune.config.recipe import Recipe, TaskSpec
    from reftune.tasks.base import Task

BASE = "base"
WRITTEN = {"report.json", "predictions.jsonl", "against"}
"""What an evaluation writes into its folder."""
UNTOUCHED = "Nothing there was touched. Choose another --output folder."
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
        if (place / "state.json").exists():
            raise RecipeError(f"{place} holds a run.", UNTOUCHED)
        check_folder(place, WRITTEN, "an evaluation")


def check_folder(folder: Path, written: Collection[str], what: str) -> None:
    """Refuse a folder that holds anything else than what will be written, or that cannot be.

    Args:
        folder: The folder; it need not be there.
        written: Names that may be in it.
        what: What is written.

    Raises:
        RecipeError: If it is no place for that.
    """
    there = standing(folder)
    if not there.is_dir():
        raise RecipeError(f"{there} is a file.", "Choose another --output folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RecipeError(f"{there} cannot be written.", "Choose another --output folder.")
    held = {item.name for item in folder.iterdir()} if folder.is_dir() else set()
    others = sorted(name for name in held - set(written) if not name.startswith("."))
    if others:
        text = f"{folder} holds other files than {what}'s: {', '.join(others[:3])}."
        raise RecipeError(text, UNTOUCHED)


def slug(parts: Sequence[str]) -> str:
    """Return a folder name for what was asked.

    >>> slug(["runs/demo", "families", "group=new"])
    'runs-demo-families-group-new'
    """
    return re.sub(r"[^\w.-]+", "-", "-".join(part.strip("./") for part in parts))


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


def top_key(text: str) -> str:
    """Return the part of a recipe that a change is for.

    >>> top_key("task.style=prose"), top_key("seed = 3")
    ('task', 'seed')
    """
    return text.partition("=")[0].strip().partition(".")[0]


def task_of_run(
    task: str | None,
    recipe: Recipe | None,
    data_dir: str | None,
    changes: list[str],
    size: int | None,
    split: str,
) -> TaskSpec:
    """Return the task asked for, or the run's own with the changes asked for.

    A data file is read and asked as the rows of a run on own data were.

    Args:
        task: Name or data file, or None.
        recipe: The run's recipe, if a run is scored.
        data_dir: Folder with local files.
        changes: Changes of the command line; those of the task count.
        size: Most rows.
        split: Rows to score.

    Raises:
        RecipeError: If there is no task.
    """
    from reftune.tasks.files import suffix_of

    sizes = {f"{split}_size": size}
    own = [text for text in changes if top_key(text) == "task"]
    if task is not None:
        is_file = recipe is not None and recipe.task.name == "own" and suffix_of(task) is not None
        form = form_of(recipe, own) if is_file else {}
        if is_file:
            tell_form(recipe, form, task)
        return task_spec(task, data_dir, own, sizes, form)
    is_named = any(text.partition("=")[0].strip() in ("task", "task.name") for text in own)
    if recipe is None and not is_named:
        raise RecipeError(
            "No task is given.", "Add --task NAME; `reftune methods --tasks` lists them."
        )
    from reftune.config.loader import change, task_of

    spec = change(recipe, own).task if recipe else task_of({}, own)
    more = {key: value for key, value in sizes.items() if value is not None}
    return replace(spec, **more, **({"data_dir": data_dir} if data_dir else {}))


def same_rows(a: TaskSpec, b: TaskSpec) -> bool:
    """Return whether two tasks take their training rows from one place."""
    return (a.name, a.train, a.data_dir) == (b.name, b.train, b.data_dir)


def check_unseen(runs: list[Recipe], task: Task, split: str) -> None:
    """Refuse to score rows that a run was trained on because nothing else needed them.

    Raises:
        DataError: If the rows of the split are among a run's training rows.
    """
    from reftune.training.data import holds_out

    for run in runs:
        if task.cut_from_training(split) and not holds_out(run, task):
            raise DataError(
                f'The run "{run.name}" was trained on all rows; the {split} rows of task '
                f'"{run.task.name}" are among them.',
                "Score the test rows, or train with rows held out: evaluation.split: validation, "
                "keep: best or evaluate_every.",
            )
