"""`reftune diagnose`: by which way an adapter changes what a model can do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reftune.cli.common import (
    AskedOption,
    DataDirOption,
    JsonFlag,
    TaskOption,
    changes_of,
    print_json,
    print_table,
    progress,
    run_recipe,
    say,
)
from reftune.cli.models import BaseModelOption, check_there, has_adapter, load_any
from reftune.cli.scoring import check_folder, check_unseen, same_rows, slug, task_of_run
from reftune.errors import AdapterError, RecipeError

if TYPE_CHECKING:
    from reftune.config.recipe import EvaluationSpec, Recipe, TaskSpec
    from reftune.tasks.base import Task

app = typer.Typer(rich_markup_mode="markdown")


@app.callback(invoke_without_command=True)
def diagnose(context: typer.Context) -> None:
    """Find out why an adapter helps or hurts: causes, not scores.

    Example:

        reftune diagnose reasoning runs/demo --size 100
    """
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


@app.command()
def reasoning(
    adapter: Annotated[str, typer.Argument(help="Adapter, stack or run folder, of any kind.")],
    task: AskedOption = None,
    size: Annotated[int, typer.Option(min=1, help="Answer at most this many rows.")] = 200,
    split: Annotated[str, typer.Option(help="test or validation.")] = "test",
    option: TaskOption = None,
    data_dir: DataDirOption = None,
    tokens: Annotated[
        str, typer.Option(metavar="A,B,C", help="Numbers of first tokens to hand over.")
    ] = "0,8,16,32,64",
    numbers: Annotated[
        str, typer.Option(help="Numbers to probe: of additions, or of the task's own questions.")
    ] = "additions",
    probe_rows: Annotated[int, typer.Option(min=1, help="Prompts to probe.")] = 512,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows a batch.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of draws and of the bootstrap.")] = 0,
    base_model: BaseModelOption = None,
    output: Annotated[str | None, typer.Option(help="Folder of page, figures, pictures.")] = None,
    json_: JsonFlag = False,
) -> None:
    """Measure three causes for which an adapter may help or hurt reasoning, against its base.

    Examples:

        reftune diagnose reasoning runs/demo                           # on the run's own task
        reftune diagnose reasoning runs/demo --task families --option group=known --size 100
        reftune diagnose reasoning runs/lora --tokens 0,4,8 --numbers task --json

    **Prefix quality.** The adapter writes the first m tokens of each answer and the base goes on,
    and the reverse. If the first tokens do the harm, the base falls with few of them, and the
    adapter rises when the base begins for it.

    **Number encoding.** Ridge probes read log2 of the operands of a sum from the hidden states of
    every layer: R² and error on held-out prompts, for the base, for the adapter, and for the base's
    probe on the adapter's states.

    **Error accumulation.** The reference solution is shown up to a step, and the model writes it:
    how often is it right? Then one number shown is wrong: does the model go on from it
    (consistent), give the true result nevertheless (recovered), or neither (lost)? Needs solutions
    with equations.

    Base and adapter answer the same rows, greedily, and every figure has an interval. The folder
    gets `diagnosis.md`, `diagnosis.json`, `plots/` and `answers.jsonl`, to be read.
    """
    from reftune.inference.diagnose import check_settings, diagnose_reasoning
    from reftune.report.diagnosis import WRITTEN, sentences, tables, write

    counts = _counts(tokens)
    _check_adapter(adapter)
    recipe = run_recipe(adapter)
    if split not in ("test", "validation"):
        raise RecipeError(f'There is no split "{split}" to diagnose.', "Use test or validation.")
    spec = task_of_run(task, recipe, data_dir, changes_of(None, option), size, split)
    place = [adapter, spec.name, split, f"n{size}", f"seed{seed}", *(option or [])]
    folder = Path(output) if output else Path("runs/diagnoses") / slug(place)
    check_folder(folder, WRITTEN, "a diagnosis")
    made = _made(spec, recipe, split)
    check_settings(made, numbers, probe_rows)
    examples = made.load(split)  # type: ignore[arg-type]
    decoding = _decoding(recipe, spec, batch_size, max_new_tokens)
    model, tokenizer = load_any(adapter, base_model=base_model)
    found = diagnose_reasoning(
        *(model, tokenizer, made, examples, decoding),
        tokens=counts,
        numbers=numbers,  # type: ignore[arg-type]
        probe_rows=probe_rows,
        seed=seed,
        progress=progress,
    )
    found = replace(found, more={"adapter": adapter, "split": split, **spec.options})
    written = write(folder, found)
    if json_:
        print_json({"folder": str(folder), **found.as_dict()})
        return
    for table in tables(found):
        print_table(table)
    for sentence in sentences(found):
        say(sentence)
    say(f"Page and pictures: {written}")


def _check_adapter(name: str) -> None:
    """Refuse what is not there, and what has no adapter.

    Raises:
        ModelError, AdapterError: Which of them.
    """
    check_there(name)
    if not has_adapter(name):
        raise AdapterError(
            f'"{name}" has no adapter to compare with its base.',
            "Give an adapter, a stack or a run folder with one.",
        )


def _counts(text: str) -> list[int]:
    """Return numbers of tokens from the command line.

    Raises:
        RecipeError: If one is no number, or negative.
    """
    from reftune.inference.handover import check_tokens

    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        what = f'--tokens is "{text}".'
        raise RecipeError(what, "Give whole numbers, such as 0,8,16,32,64.") from None
    return list(check_tokens(counts))


def _made(spec: TaskSpec, recipe: Recipe | None, split: str) -> Task:
    """Return the task; refuse rows that the run was trained on."""
    from reftune import tasks

    made = tasks.get(spec)
    check_unseen([recipe] if recipe and same_rows(recipe.task, spec) else [], made, split)
    return made


def _decoding(
    recipe: Recipe | None, task: TaskSpec, batch_size: int | None, max_new_tokens: int | None
) -> EvaluationSpec:
    """Return how rows are answered: as in the run; the length of another task is its own."""
    from reftune.config.recipe import EvaluationSpec

    spec = recipe.evaluation if recipe else EvaluationSpec()
    if recipe is None or recipe.task.name != task.name:
        spec = replace(spec, max_new_tokens=None)
    given = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    return replace(spec, samples=1, **{k: v for k, v in given.items() if v is not None})
