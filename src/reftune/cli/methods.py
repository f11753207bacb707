"""`reftune methods`: interventions, objectives, recipes, and tasks."""

from __future__ import annotations

from typing import Annotated

import typer

from reftune.cli.common import JsonFlag, out, print_json


def methods(
    tasks: Annotated[bool, typer.Option("--tasks", help="List tasks instead.")] = False,
    available: Annotated[
        bool, typer.Option("--available", help="Leave out systems this version has not.")
    ] = False,
    json_: JsonFlag = False,
) -> None:
    """List the methods: what a recipe may name as `method:` and `objective:`.

    Examples:

        reftune methods
        reftune methods --tasks
        reftune methods --json

    A published system is an intervention (a module that edits hidden states), an objective (a
    training signal) or a recipe (stages of both). `coming` marks what this version has not.
    """
    if tasks:
        _tasks(json_)
        return
    from reftune.methods import catalogue

    found = [method for method in catalogue() if method.status == "available" or not available]
    if json_:
        print_json([method.to_dict() for method in found])
        return
    from rich.text import Text

    table = _table("name", "kind", "status", "what")
    for number, method in enumerate(found):
        if number and found[number - 1].system and not method.system:
            table.add_section()
        style = "" if method.status == "available" else "dim"
        where = " · ".join(part for part in (method.source, method.file, method.recipe) if part)
        what = Text(f"{method.title}: {method.about}\n", style=style) + Text(where, style="dim")
        table.add_row(
            *(Text(cell, style=style) for cell in (method.name, method.kind, method.status)), what
        )
    out().print(table)


def _tasks(as_json: bool) -> None:
    from reftune.methods import tasks

    rows = tasks()
    if as_json:
        print_json(rows)
        return
    table = _table("name", "kind", "metric", "about")
    for row in rows:
        table.add_row(*row.values())
    out().print(table)


def _table(*columns: str):  # noqa: ANN202
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    return table
