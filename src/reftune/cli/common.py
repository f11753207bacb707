"""What the verbs share: consoles, JSON output, recipes with overrides, models by any name."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reftune.errors import DataError, RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from reftune.config.recipe import Recipe, TaskSpec
    from reftune.report.tables import Table

JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a recipe value, as adapter.rank=8. Repeatable."
    ),
]
TaskOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-o", metavar="KEY=VALUE", help="Short for --set task.KEY=VALUE. Repeatable."
    ),
]
AskedOption = Annotated[
    str | None,
    typer.Option("--task", "-t", help="Task, or a data file. Default: the run's own task."),
]
DataDirOption = Annotated[
    str | None, typer.Option("--data-dir", help="Folder with files of the task.")
]


FILE_WIDTH = 400
"""Columns for a table that goes to a file or a pipe, which have no edge."""


@cache
def out() -> Console:
    """Return the console of results: standard output."""
    from rich.console import Console

    return Console(highlight=False)


@cache
def err() -> Console:
    """Return the console of everything else: standard error."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def is_main_process() -> bool:
    """Return whether this process prints; the others of a distributed run keep quiet."""
    return os.environ.get("RANK", "0") == "0"


def print_json(value: Any) -> None:
    """Print one JSON value on standard output."""
    from reftune.report.files import to_json

    if is_main_process():
        sys.stdout.write(to_json(value, indent=2) + "\n")
        sys.stdout.flush()


def note(text: str) -> None:
    """Print a remark on standard error, away from results."""
    if is_main_process():
        err().print(text, markup=False, soft_wrap=True)


def say(text: str, style: str = "") -> None:
    """Print a line of results as it is: no markup, and no line break that is not in it."""
    out().print(text, markup=False, soft_wrap=True, style=style or None)


def print_table(table: Table) -> None:
    """Print a table of figures: fitted to a terminal, whole into a file."""
    from rich.console import Console

    console = out()
    if console.is_terminal:
        console.print(table.to_rich(console.width))
    else:
        Console(highlight=False, width=FILE_WIDTH).print(table.to_rich())


def changes_of(set_: Sequence[str] | None, option: Sequence[str] | None) -> list[str]:
    """Return the changes of `--set`, then those of `--option`, which are keys of the task.

    >>> changes_of(["seed=3"], ["style=prose"])
    ['seed=3', 'task.style=prose']
    """
    return [*(set_ or []), *(f"task.{text}" for text in option or [])]


def read_recipe(
    recipe: str,
    overrides: Sequence[str] | None = None,
    name: str | None = None,
    output: str | None = None,
    seed: int | None = None,
    data_dir: str | None = None,
) -> Recipe:
    """Read a recipe file or a shipped recipe, with the changes of the command line.

    Raises:
        RecipeError: If there is none or it has faults.
    """
    from reftune.config.loader import load
    from reftune.config.shipped import find

    changes = list(overrides or [])
    options = {"name": name, "output": output, "seed": seed, "task.data_dir": data_dir}
    changes += [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    return load(find(recipe), changes)


def recipe_around(data: str, changes: Sequence[str]) -> Recipe:
    """Return the recipe of that name, or one made around a data file or a task.

    A recipe for a task has the head and the objective that its kind needs.

    Args:
        data: Recipe, training file, or name of a task.
        changes: Changes of the recipe.
    """
    from reftune.config.loader import from_dict, task_of
    from reftune.config.options import task_class, task_names
    from reftune.tasks.files import suffix_of

    if suffix_of(data) is not None:
        task = {"name": "own", "train": data}
    elif data in task_names() and not Path(data).exists():
        task = {"name": data}
    else:
        return read_recipe(data, changes)
    spec = task_of(task, changes)
    values: dict[str, Any] = {"task": task}
    if task_class(spec.name).kind_of(spec.options) == "classification":
        values |= {"model": {"head": "classification"}, "objective": "classification"}
    return from_dict(values, changes)


def task_spec(
    task: str,
    data_dir: str | None,
    changes: Sequence[str],
    sizes: dict[str, int | None],
    form: dict[str, Any] | None = None,
) -> TaskSpec:
    """Return a task by name, or own data from a file, checked like a recipe.

    Args:
        task: A task's name, or a data file whose rows are scored.
        data_dir: Folder with local files of a named task.
        changes: Further keys of the task, `task.style=prose`.
        sizes: `train_size`, `validation_size`, `test_size`.
        form: Keys of the task that apply to a data file unless they are changed.
    """
    from reftune.config.loader import task_of
    from reftune.tasks.files import suffix_of

    values: dict[str, Any] = {"name": task}
    if suffix_of(task):
        values = {**(form or {}), "name": "own", "test": task}
    values |= {key: value for key, value in sizes.items() if value is not None}
    if data_dir:
        values["data_dir"] = data_dir
    return task_of(values, changes)


def run_recipe(path: str) -> Recipe | None:
    """Return the recipe of a run folder, or None if `path` is no run folder."""
    from reftune.config.loader import load

    file = Path(path) / "recipe.yaml"
    return load(file) if file.is_file() else None


@contextmanager
def progress(title: str, show: bool = True) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar on standard error; yields a function of (done, total), or None."""
    if not (show and is_main_process() and err().is_terminal):
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    bar = Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err(),
    )
    with bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def new_rows(out: str, overwrite: bool) -> Path:
    """Return the place of a file of rows that is to be written.

    Raises:
        RecipeError: If it is no .jsonl file, or is there and must not be replaced.
    """
    path = Path(out).expanduser()
    if path.suffix != ".jsonl":
        raise RecipeError(f"--out is {out}.", "Choose a name that ends in .jsonl.")
    if path.exists() and not overwrite:
        raise RecipeError(f"{path} exists already.", "Choose another --out, or add --overwrite.")
    return path


def read_prompts(prompts: Sequence[str], file: str | None) -> list[Any]:
    """Return prompts from arguments, a file, or standard input (`-`).

    A `.jsonl` file holds `prompt` or `messages` a line; any other file one prompt a line.

    Raises:
        DataError: If the file is missing or a line is no prompt.
        RecipeError: If there are no prompts at all.
    """
    found: list[Any] = [prompt for prompt in prompts if prompt != "-"]
    if "-" in prompts:
        try:
            found += [line for line in sys.stdin.read().splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise DataError(f"Standard input is no UTF-8 text: {error}.", "Give UTF-8.") from None
    if file:
        found += _prompt_file(Path(file))
    if not found:
        raise RecipeError(
            "There is no prompt.", 'Write it in quotes, give --file, or "-" for stdin.'
        )
    return found


def _prompt_file(path: Path) -> list[Any]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.", "Give a UTF-8 text file.") from error
    if path.suffix != ".jsonl":
        return lines
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            prompt = row["messages"] if "messages" in row else row["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError):
            prompt = None
        is_chat = isinstance(prompt, list) and all(isinstance(item, dict) for item in prompt)
        if not isinstance(prompt, str) and not is_chat:
            what = f"{path} line {number} has no prompt or messages."
            raise DataError(what, 'Write {"prompt": "..."} a line.')
        found.append(prompt)
    return found
