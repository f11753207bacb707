"""`reftune recipes`: what ships with reftune, and the schema for editors."""

from __future__ import annotations

from typing import Annotated

import typer

from reftune.cli.common import JsonFlag, note, out, print_json


def recipes(
    show: Annotated[
        str | None, typer.Option("--show", metavar="NAME", help="Print this recipe.")
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")
    ] = False,
    json_: JsonFlag = False,
) -> None:
    """List the recipes that come with reftune.

    Examples:

        reftune recipes
        reftune recipes --show NAME > my.yaml      # start from one of them
        reftune recipes --schema > recipe.schema.json

    With the schema, editors complete keys: put `# yaml-language-server: $schema=recipe.schema.json`
    in the first line of a recipe.
    """
    if schema:
        from reftune.config.schema import schema as recipe_schema

        print_json(recipe_schema())
    elif show:
        _show(show, json_)
    else:
        _list(json_)


def _show(name: str, as_json: bool) -> None:
    from reftune.config.loader import load, to_dict
    from reftune.config.shipped import find

    path = find(name)
    if as_json:
        print_json({"name": name, "path": str(path), "recipe": to_dict(load(path))})
    else:
        print(path.read_text(encoding="utf-8"), end="")


def _list(as_json: bool) -> None:
    from reftune.config.shipped import shipped

    found = shipped()
    if as_json:
        keys = ("name", "title", "measured")
        rows = [{key: getattr(item, key) for key in keys} for item in found]
        print_json([{**row, "path": str(item.path)} for row, item in zip(rows, found)])
        return
    if not found:
        note("No recipes are installed.")
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what, and what was measured", overflow="fold")
    for item in found:
        table.add_row(item.name, Text(f"{item.title}\n") + Text(item.measured, style="dim"))
    out().print(table)
    out().print("reftune recipes --show NAME prints one, reftune train NAME runs it.")
