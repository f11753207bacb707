"""A small grid of settings, compared on validation rows only.

Left out on purpose: random and Bayesian search, early stopping of cells, parallel cells. The grids
of the papers have a dozen cells; for more, drive `reftune train --set` from a scheduler.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reftune.config.recipe import Recipe
from reftune.errors import DataError, RecipeError, TrainingError
from reftune.report.files import plain, write_json_atomic, write_text_atomic
from reftune.report.model import Figure, Report
from reftune.training.processes import is_main_process

if TYPE_CHECKING:
    from reftune.report.tables import Table

log = logging.getLogger(__name__)

MOST_CELLS = 200
LOSS = "validation_loss"


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Attributes:
        name: Name of its run, below the sweep's.
        values: Key to value, as set on the recipe.
        figure: What it reached on validation; None if it failed.
        failure: Why it failed.
    """

    name: str
    values: dict[str, Any]
    figure: Figure | None = None
    failure: str = ""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    Attributes:
        folder: Where its files stand.
        metric: What was compared, on validation rows.
        cells: All cells, best first, failed ones last.
        recipe: The recipe with the best cell's values; its name is `<name>-best`.
    """

    folder: Path
    metric: str
    cells: list[Cell]
    recipe: Recipe

    @property
    def best(self) -> Cell:
        """The cell that was selected."""
        return self.cells[0]

    def table(self) -> Table:
        """Return the cells as a table, best first."""
        from reftune.report.tables import Table, show_figure

        keys = list(self.best.values)
        title = f"{self.metric} on validation rows"
        table = Table(columns=[*keys, self.metric], best=[None] * (len(keys) + 1), title=title)
        for cell in self.cells:
            shown = f"failed: {cell.failure}" if cell.figure is None else show_figure(cell.figure)
            table.add(*(str(cell.values[key]) for key in keys), shown)
        return table


def sweep(
    recipe: Recipe,
    grid: Mapping[str, Sequence[Any]],
    metric: str | None = None,
    progress: bool = True,
) -> SweepResult:
    """Train every combination of a grid and select the best on validation rows.

    Test rows are never looked at; the best recipe keeps the evaluation of the given one, so that
    training it once gives the test figure. Where validation rows are cut from the training rows,
    cells train without them; the best recipe, which does not read them, trains with them. Finished
    cells are not repeated, an unfinished one is resumed, one whose training fails (a loss that is
    not finite) is noted and passed over.

    Args:
        recipe: The recipe all cells start from.
        grid: Keys as for `--set` (`optimiser.lr`, `adapter.rank`, ...) to the values to try.
        metric: What to compare: a metric of the task, or `validation_loss` (needs evaluate_every
            or keep: best). Default: the task's main metric.
        progress: Show progress on standard error.

    Returns:
        The cells, best first, and the best recipe; also written as `sweep.json`, `sweep.md` and
        `best.yaml` into `<output>/<name>/`. Under `accelerate launch` only on the main process.

    Raises:
        RecipeError: If the grid is empty or does not fit the recipe.
        DataError: If the task has no validation rows.
        TrainingError: If every cell failed.
    """
    plan = cells_of(grid)
    metric = _metric(recipe, metric)
    folder = Path(recipe.output).expanduser() / recipe.name
    if (folder / "state.json").is_file():
        raise RecipeError(f"{folder} holds a run.", "Choose another --name for the sweep.")
    recipes = [_recipe_of(recipe, cell, metric) for cell in plan]  # all faults before any training
    done = [
        _run(cell, own, metric, progress, f"{number}/{len(plan)}")
        for number, (cell, own) in enumerate(zip(plan, recipes, strict=True), 1)
    ]
    if not is_main_process():  # only the main process has seen figures
        return SweepResult(folder, metric, done, recipe)
    return _conclude(recipe, folder, metric, ranked(done, metric))


def _metric(recipe: Recipe, metric: str | None) -> str:
    """Return what is compared.

    Raises:
        DataError: If the task has no validation rows.
    """
    from reftune.tasks import get

    task = get(recipe.task)
    if "validation" not in task.splits:
        raise DataError(
            f'The task "{recipe.task.name}" has no validation rows, and a sweep selects on nothing '
            "else.",
            "Give task.validation, or another task.",
        )
    return metric or task.metric


def _conclude(recipe: Recipe, folder: Path, metric: str, cells: list[Cell]) -> SweepResult:
    """Write what a sweep found; the best cell stands first."""
    from reftune.config.loader import change, dump

    if cells[0].figure is None:
        raise TrainingError(
            f"All {len(cells)} cells failed; the first: {cells[0].failure}",
            "Mend the recipe; finished cells are kept.",
        )
    best = change(recipe, [*_overrides(cells[0]), f"name={recipe.name}-best"])
    result = SweepResult(folder, metric, cells, best)
    write_json_atomic(folder / "sweep.json", {"metric": metric, "cells": plain(cells)})
    write_text_atomic(folder / "sweep.md", result.table().to_markdown() + "\n")
    write_text_atomic(folder / "best.yaml", dump(best))
    return result


def cells_of(grid: Mapping[str, Sequence[Any]]) -> list[Cell]:
    """Return all combinations of a grid, named after their values.

    Raises:
        RecipeError: If a key has no values or there are too many combinations.

    >>> [cell.name for cell in cells_of({"optimiser.lr": [0.1, 0.2], "adapter.rank": [4]})]
    ['lr-0.1_rank-4', 'lr-0.2_rank-4']
    """
    empty = [key for key, values in grid.items() if not values]
    if not grid or empty:
        raise RecipeError(
            f"The grid has no values for {', '.join(empty)}." if empty else "The grid is empty.",
            "Give keys with values, such as optimiser.lr=1e-3,3e-3 adapter.rank=4,8.",
        )
    count = math.prod(len(values) for values in grid.values())
    if count > MOST_CELLS:
        raise RecipeError(f"The grid has {count} cells.", f"Use at most {MOST_CELLS}.")
    last = [key.rsplit(".", 1)[-1] for key in grid]
    short = last if len(set(last)) == len(last) else list(grid)
    cells = []
    for values in itertools.product(*grid.values()):
        name = "_".join(f"{key}-{_slug(value)}" for key, value in zip(short, values))
        cells.append(Cell(name, dict(zip(grid, values))))
    if len({cell.name for cell in cells}) < len(cells):
        raise RecipeError("Two cells of the grid are the same.", "Give each value once.")
    return cells


def ranked(cells: Sequence[Cell], metric: str) -> list[Cell]:
    """Return cells best first; equal ones in the order of the grid, failed ones last."""
    sign = 1 if metric == LOSS else -1

    def key(cell: Cell) -> tuple[bool, float]:
        known = cell.figure is not None and cell.figure.mean is not None
        return (not known, sign * cell.figure.mean if known else 0.0)

    return sorted(cells, key=key)


def _slug(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", str(value)).strip("-.") or "none"


def _overrides(cell: Cell) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in cell.values.items()]


def _recipe_of(recipe: Recipe, cell: Cell, metric: str) -> Recipe:
    """Return the recipe of a cell: scored on its own validation rows alone, base not compared."""
    from reftune.config.loader import change

    split = "none" if metric == LOSS else "validation"
    own = change(
        recipe,
        [
            *_overrides(cell),
            f"name={json.dumps(f'{recipe.name}/{cell.name}')}",
            f"evaluation.split={split}",
            "evaluation.compare_base=false",
            "evaluation.also={}",
        ],
    )
    last = own.stages[-1]
    if metric == LOSS and not last.evaluate_every and last.keep != "best":
        raise RecipeError(
            "validation_loss is not computed by this recipe.",
            "Set evaluate_every, or keep: best, or compare the task's metric.",
        )
    return own


def _run(cell: Cell, recipe: Recipe, metric: str, progress: bool, number: str) -> Cell:
    from reftune.training.stages import train

    log.info("cell %s: %s", number, cell.name)
    try:
        report = train(recipe, resume=True, progress=progress)
    except TrainingError as error:
        log.warning("cell %s failed: %s", cell.name, error.what)
        return Cell(cell.name, cell.values, failure=error.what)
    figure = _figure(report, metric) if is_main_process() else None
    return Cell(cell.name, cell.values, figure)


def _figure(report: Report, metric: str) -> Figure:
    if metric == LOSS:
        loss = (report.model_extra or {}).get("validation_loss")
        return Figure(mean=loss, unit="nats")
    found = report.figures.get(f"adapter_{metric}")
    if found is None:
        known = ", ".join(name.removeprefix("adapter_") for name in report.figures)
        raise RecipeError(f'The task has no metric "{metric}".', f"Known: {known}.")
    return found
