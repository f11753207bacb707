"""`reftune sample`: a model's own answers to training questions, several to each, scored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from reftune.cli.common import (
    AskedOption,
    DataDirOption,
    JsonFlag,
    TaskOption,
    changes_of,
    new_rows,
    print_json,
    progress,
    run_recipe,
    say,
)
from reftune.cli.models import check_sampling, check_there, load_any
from reftune.cli.scoring import task_of_run
from reftune.errors import DataError, RecipeError, nearest

if TYPE_CHECKING:
    from reftune.config.recipe import EvaluationSpec, TaskSpec
    from reftune.inference.sampling import Keep
    from reftune.tasks.base import Split, Task

KEPT = ("right", "all")


def sample(
    model: Annotated[str, typer.Argument(help="Base model, adapter, stack or run folder.")],
    task: AskedOption = None,
    out: Annotated[
        str | None, typer.Option("--out", help="The .jsonl file to write. Default: samples.jsonl.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers a question.")] = 100,
    keep: Annotated[str, typer.Option(help="Answers to keep: right or all.")] = "right",
    most: Annotated[
        int | None,
        typer.Option(min=1, help="Only the first n that differ. Default: 10 right ones, or all."),
    ] = None,
    gold: Annotated[
        bool, typer.Option("--gold", help="Add the annotated solution where it is absent.")
    ] = False,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    size: Annotated[int | None, typer.Option(min=1, help="Questions. Default: all.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Of the answers.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Most likely tokens; 0 is all.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer. Default: the task's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers produced together.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling.")] = 42,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    data_dir: DataDirOption = None,
    option: TaskOption = None,
    json_: JsonFlag = False,
) -> None:
    """Answer the training questions of a task several times, score the answers, keep them as data.

    Examples:

        reftune sample nano --task families --option group=half --samples 20 --size 300
        reftune sample runs/warmup --samples 20 --gold --out right.jsonl
        reftune sample runs/warmup --samples 20 --keep all --out all.jsonl

    Right answers are data of offline self-training, all of them train an outcome reward model. A
    run is asked in its own task and form; rows it held out for validation are not asked. A killed
    command goes on where it was when it is given again.
    """
    check_sampling(temperature, top_p)
    kept = _keep(keep, most, gold)
    decoding = _decoding(samples, temperature, top_p, top_k, max_new_tokens, batch_size)
    path = new_rows(out or _name(split), overwrite)
    made, split_ = _task(model, task, split, data_dir, changes_of(None, option), size)
    _check_place(path, split_)
    check_there(model)
    rows, asked = _collect(path, model, made, split_, decoding, kept, seed, show=not json_)
    right = sum(row["right"] for row in rows)
    facts = {"file": str(path), "split": split_, "questions": asked}
    facts |= {"kept": len({row["id"].rpartition(".")[0] for row in rows}), "rows": len(rows)}
    facts |= {"right": right, "wrong": len(rows) - right}
    if json_:
        print_json(facts)
        return
    say(
        f"{path}: {len(rows)} answers to {facts['kept']} of {asked} questions, {right} right, "
        f"{facts['wrong']} wrong."
    )


def _collect(
    path: Path,
    model: str,
    task: Task,
    split: Split,
    decoding: EvaluationSpec,
    keep: Keep,
    seed: int,
    show: bool,
) -> tuple[list[dict[str, Any]], int]:
    """Load rows and model, and answer into the file; return its rows and the questions asked."""
    from reftune.inference.sampling import answering, collect

    examples = task.load(split)
    answers = answering(*load_any(model), task, decoding, seed)
    settings = {"model": model, "task": task.spec, "seed": seed}
    with progress("sample", show=show) as report:
        rows = collect(
            *(path, task, examples, answers, decoding, settings),
            split=split,
            keep=keep,
            progress=report or (lambda done, total: None),
        )
    return rows, len(examples)


def _keep(keep: str, most: int | None, gold: bool) -> Keep:
    from reftune.inference.sampling import Keep

    if keep not in KEPT:
        raise RecipeError(f'--keep is "{keep}".', nearest(keep, KEPT))
    if keep == "right" and most is None:
        return Keep(gold=gold)
    return Keep(cast("Literal['right', 'all']", keep), most, gold)


def _decoding(
    samples: int,
    temperature: float,
    top_p: float,
    top_k: int,
    max_new_tokens: int | None,
    batch_size: int,
) -> EvaluationSpec:
    """Return how answers are sampled."""
    from reftune.config.recipe import EvaluationSpec

    if samples > 1 and temperature == 0:
        raise RecipeError(
            f"{samples} greedy answers are all the same.", "Set --temperature above 0."
        )
    return EvaluationSpec(
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )


def _name(split: str) -> str:
    """Return the default name of the file; that of test rows says so."""
    return "samples.jsonl" if split == "train" else f"samples_{split}.jsonl"


def _task(
    model: str,
    task: str | None,
    split: str,
    data_dir: str | None,
    changes: list[str],
    size: int | None,
) -> tuple[Task, Split]:
    """Return the task that is asked, and the split."""
    from reftune import tasks
    from reftune.tasks.base import SPLITS

    if split not in SPLITS:
        raise RecipeError(f'There is no split "{split}".', nearest(split, SPLITS))
    spec = task_of_run(task, run_recipe(model), data_dir, changes, size, split)
    made = tasks.get(_of_file(spec, task, split))
    if made.kind == "classification":
        raise RecipeError(
            f'The task "{made.spec.name}" has no generated answers.', "Name one that has."
        )
    return made, cast("Split", split)


def _of_file(spec: TaskSpec, task: str | None, split: str) -> TaskSpec:
    """Return the task of a data file with its rows in the split that is asked."""
    from reftune.tasks.files import suffix_of

    if task is None or suffix_of(task) is None or split == "test":
        return spec
    return replace(spec, **{"test": None, split: task})


def _check_place(path: Path, split: Split) -> None:
    """Refuse to write answers to test questions under a name that does not say so."""
    from reftune.tasks.guard import is_test_name

    if split == "test" and not is_test_name(str(path)):
        raise DataError(
            f"{path} would hold answers to test questions, and its name does not say so.",
            "Choose an --out such as samples_test.jsonl: training on it is refused.",
        )
