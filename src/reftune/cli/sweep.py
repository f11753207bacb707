"""`reftune sweep`: a small grid of settings, selected on validation rows."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from reftune.cli.common import (
    DataDirOption,
    Interrupted,
    JsonFlag,
    SetOption,
    is_main_process,
    out,
    print_json,
    read_recipe,
)
from reftune.errors import RecipeError


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
        return
    out().print(result.table().to_rich())
    out().print(f"Train the best once on the test rows:  reftune train {best}", markup=False)


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
