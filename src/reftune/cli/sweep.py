"""`reftune sweep`: a small grid of settings, selected on validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reftune.cli.common import (
    DataDirOption,
    JsonFlag,
    SetOption,
    is_main_process,
    print_json,
    print_table,
    read_recipe,
    say,
)
from reftune.cli.stopping import Interrupted
from reftune.errors import RecipeError, TrainingError, nearest

if TYPE_CHECKING:
    from reftune.config.recipe import Recipe
    from reftune.training.sweep import Cell


NO_SPACE = ("No space left", "Disk quota exceeded", "cannot be written", "Could not write")
"""In the words of a failure: the place was at fault, not the settings of the cell."""


def sweep(
    recipe: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped recipe.")],
    grid: Annotated[
        list[str],
        typer.Option("--grid", "-g", metavar="KEY=A,B,C", help="Values to try. Repeatable."),
    ],
    metric: Annotated[
        str | None, typer.Option(help="What to compare: a metric of the task or validation_loss.")
    ] = None,
    set_: SetOption = None,
    name: Annotated[str | None, typer.Option(help="Name of the sweep: runs/NAME.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of run folders.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all cells.")] = None,
    data_dir: DataDirOption = None,
    json_: JsonFlag = False,
) -> None:
    """Try every combination of a few settings and choose by validation rows, never by test rows.

    Examples:

        reftune sweep my.yaml --grid adapter.rank=1,2,4,8
        reftune sweep my.yaml -g optimiser.lr=3e-4,9e-4,3e-3 -g adapter.positions=f5+l5,l1

    Finished cells are skipped when the command is run again. The best recipe is written as
    `runs/NAME/best.yaml`; train it once to get its test figure.
    """
    values = parse_grid(grid)
    name = name or _default_name(recipe)
    resolved = read_recipe(recipe, set_, name, output, seed, data_dir)
    _check_metric(resolved, metric)
    from reftune.training.sweep import sweep as sweep_recipe

    try:
        result = sweep_recipe(resolved, values, metric=metric, progress=is_main_process())
    except KeyboardInterrupt:
        raise Interrupted(
            "Interrupted.", "Run the same command again: finished cells are kept."
        ) from None
    if not is_main_process():
        return
    best = result.folder / "best.yaml"
    if json_:
        cells = [
            {
                "name": cell.name,
                "values": cell.values,
                "figure": cell.figure,
                "failure": cell.failure,
            }
            for cell in result.cells
        ]
        print_json({"metric": result.metric, "cells": cells, "best": str(best)})
    else:
        print_table(result.table())
    _check_written(result.cells)
    if json_:
        return
    say(f"Train the best once, to see how it does on test rows:  reftune train {best}")


def _check_metric(recipe: Recipe, metric: str | None) -> None:
    """Refuse a metric that no cell would have, before the first is trained.

    Raises:
        RecipeError: If scoring validation rows gives no such figure.
    """
    if metric in (None, "validation_loss"):
        return
    from reftune import tasks
    from reftune.inference.figures import metric_names

    task = tasks.get(recipe.task)
    if metric == task.metric or "validation" not in task.splits:
        return
    known = metric_names(task, task.load("validation"), recipe.evaluation.samples)
    if metric not in known:
        raise RecipeError(
            f'Scoring task "{recipe.task.name}" gives no metric "{metric}".',
            nearest(metric, [*known, "validation_loss"]),
        )


def _check_written(cells: Sequence[Cell]) -> None:
    """Refuse to call a cell the best if others failed for want of space, not by themselves.

    Raises:
        TrainingError: If a cell could not be written.
    """
    full = [cell for cell in cells if any(word in cell.failure for word in NO_SPACE)]
    if full:
        raise TrainingError(
            f"{len(full)} of {len(cells)} cells could not be written; the first: {full[0].failure}",
            "Free space and run the same command again: finished cells are kept. Until then the "
            "best of the others may not be the best.",
        )


def parse_grid(texts: list[str]) -> dict[str, list[Any]]:
    """Return the grid of `KEY=A,B,C` texts; the values are read as YAML.

    Raises:
        RecipeError: If a text has no key or no values.

    >>> parse_grid(["adapter.rank=1,2", "optimiser.lr=1e-3,3e-3"])
    {'adapter.rank': [1, 2], 'optimiser.lr': [0.001, 0.003]}
    """
    from reftune.config.nodes import Faults, parse

    found: dict[str, list[Any]] = {}
    for text in texts:
        key, sign, values = text.partition("=")
        if not sign or not key.strip() or not values.strip():
            raise RecipeError(f'"{text}" is no grid.', "Write --grid KEY=A,B,C.")
        if key.strip() in found:
            raise RecipeError(f'The grid names "{key.strip()}" twice.', "Give all values at once.")
        faults = Faults()
        node = parse(f"[{values}]", f"--grid {text}", faults)
        faults.check(f"--grid {text}")
        found[key.strip()] = node.plain()
    return found


def _default_name(recipe: str) -> str:
    from pathlib import Path

    return f"{Path(recipe).stem}-sweep"
