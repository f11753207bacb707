"""`reftune convert`: adapters of pyreft into the format of reftune."""

from __future__ import annotations

from typing import Annotated

import typer

from reftune.cli.common import JsonFlag, out, print_json


def convert(
    pyreft_folder: Annotated[str, typer.Argument(help="Folder saved by pyreft.")],
    out_folder: Annotated[str, typer.Argument(metavar="OUT", help="New adapter folder.")],
    model: Annotated[str, typer.Option(help="Base model the adapter belongs to.")],
    positions: Annotated[
        str | None, typer.Option(help="Position rule it was trained with, such as f7+l7.")
    ] = None,
    json_: JsonFlag = False,
) -> None:
    """Convert a LoReFT adapter saved by pyreft, and check that outputs agree.

    Example:

        reftune convert pyreft_out/ adapters/mine --model Qwen/Qwen3-0.6B --positions f7+l7

    pyreft does not save the positions; they are part of an adapter here, so name them. What cannot
    be converted is refused by name, and nothing is written then.
    """
    from reftune.model.convert import convert_pyreft

    more = {} if positions is None else {"positions": positions}
    made = convert_pyreft(pyreft_folder, out_folder, model, **more)
    if json_:
        print_json({"folder": str(out_folder), "result": made})
        return
    out().print(f"Converted to {out_folder}.", markup=False)
    if isinstance(made, dict):
        for key, value in made.items():
            out().print(f"  {key}: {value}", markup=False)
