"""`reftune train`: from recipe to saved, evaluated adapter."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reftune.cli.common import (
    DataDirOption,
    JsonFlag,
    SetOption,
    is_main_process,
    note,
    print_json,
    print_table,
    read_recipe,
    say,
)
from reftune.cli.stopping import Interrupted
from reftune.errors import RecipeError

if TYPE_CHECKING:
    from reftune.config.recipe import Recipe
    from reftune.report.model import Report


def train(
    recipe: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped recipe.")],
    set_: SetOption = None,
    name: Annotated[str | None, typer.Option(help="Name of the run: runs/NAME.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of run folders.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of data order and initialisation.")] = None,
    data_dir: DataDirOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of this run.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run that has this name.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print the resolved recipe, then stop.")
    ] = False,
    json_: JsonFlag = False,
) -> None:
    """Train what a recipe describes, evaluate it, and save it in a run folder.

    Examples:

        reftune train my.yaml
        reftune train my.yaml --set adapter.rank=8 --name rank8
        reftune train my.yaml --dry-run    # all faults at once, nothing is loaded
        reftune train my.yaml --resume     # after Ctrl-C, a crash or kill -9

    The folder `runs/NAME` then holds the adapter, `report.md`, `predictions.jsonl` and
    `metrics.jsonl`. Several processes, on GPUs or without:
    `accelerate launch --multi_gpu --num_processes 2 -m reftune train my.yaml`.
    """
    if resume and overwrite:
        raise RecipeError("Both --resume and --overwrite are asked for.", "Choose one.")
    resolved = read_recipe(recipe, set_, name, output, seed, data_dir)
    if dry_run:
        from reftune.training.stages import check

        _print_recipe(check(resolved), json_)
        return
    from reftune.training.stages import train as train_recipe

    more = {"overwrite": True} if overwrite else {}
    try:
        report = train_recipe(resolved, resume=resume, progress=is_main_process(), **more)
    except KeyboardInterrupt:
        again = resume_command(recipe, set_, name, output, seed, data_dir)
        raise Interrupted("Interrupted.", f"Go on where it stopped with: {again}") from None
    if json_:
        print_json({"folder": str(Path(resolved.output) / resolved.name), **report.model_dump()})
    elif is_main_process():
        _show(report, Path(resolved.output) / resolved.name)


def resume_command(
    recipe: str,
    set_: list[str] | None,
    name: str | None,
    output: str | None,
    seed: int | None,
    data_dir: str | None = None,
) -> str:
    """Return the command that continues an interrupted run."""
    words = ["reftune", "train", recipe]
    for change in set_ or []:
        words += ["--set", change]
    flags = {"--name": name, "--output": output, "--seed": seed, "--data-dir": data_dir}
    for flag, value in flags.items():
        words += [flag, str(value)] if value is not None else []
    return shlex.join([*words, "--resume"])


def _print_recipe(recipe: Recipe, as_json: bool) -> None:
    from reftune.config.loader import dump, to_dict

    if as_json:
        print_json(to_dict(recipe))
    else:
        print(dump(recipe), end="")
        note(f"The recipe is fine. The run would be written to {recipe.output}/{recipe.name}.")


def _show(report: Report, folder: Path) -> None:
    """Print what came out and what to do next."""
    from reftune.report.tables import report_table

    print_table(report_table([report], title=str(folder)))
    quoted = shlex.quote(str(folder))
    if (folder / "predictions.jsonl").is_file():  # a run may be trained and not scored
        say(f"Read answers   {folder / 'predictions.jsonl'}")
    say(f"Talk to it     reftune chat {quoted}")
    say(f"Compare runs   reftune report {quoted} OTHER")
