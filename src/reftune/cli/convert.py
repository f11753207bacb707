"""`reftune convert`: adapters of pyreft into the format of reftune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reftune.cli.common import JsonFlag, print_json, say
from reftune.errors import RecipeError


def convert(
    pyreft_folder: Annotated[str, typer.Argument(help="Folder saved by pyreft.")],
    out_folder: Annotated[str, typer.Argument(metavar="OUT", help="New adapter folder.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Base model of the adapter.")],
    positions: Annotated[
        str, typer.Option("--positions", "-p", help="Positions it was trained with, as f7+l7.")
    ],
    activation: Annotated[
        str, typer.Option("--activation", help="The act_fn it was trained with, as relu.")
    ] = "none",
    json_: JsonFlag = False,
) -> None:
    """Convert an adapter saved by pyreft, and check that both compute the same.

    Example:

        reftune convert pyreft_out adapters/mine --model Qwen/Qwen3-0.6B --positions f7+l7

    pyreft saves neither the positions nor the activation (`act_fn`); here they are part of the
    adapter, so name them. What cannot be converted is refused by name, and nothing is written then.
    """
    from reftune.model.positions import PositionRule

    PositionRule.parse(positions)
    if Path(out_folder).exists():
        raise RecipeError(f"{out_folder} exists already.", "Choose another folder.")
    from reftune.model.convert import convert_pyreft

    facts = convert_pyreft(pyreft_folder, out_folder, model, positions, activation)
    if json_:
        print_json({"folder": out_folder, **facts})
        return
    say(
        f"{out_folder}: {facts['method']}, rank {facts['rank']}, {len(facts['layers'])} layers, "
        f"positions {facts['positions']}."
    )
    say(f"Largest relative difference to the checkpoint: {facts['largest_difference']:.1e}.")
