"""`reftune eval`: score a model, an adapter or a stack; compare two on the same rows."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reftune.cli.common import (
    JsonFlag,
    load_any,
    out,
    print_json,
    progress,
    run_recipe,
    task_spec,
)
from reftune.errors import DataError, RecipeError

if TYPE_CHECKING:
    from reftune.config.recipe import EvaluationSpec, Recipe, TaskSpec
    from reftune.inference.evaluate import Evaluation

BASE = "base"


def evaluate(
    model: Annotated[str, typer.Argument(help="Base model, adapter, stack or run folder.")],
    task: Annotated[
        str | None,
        typer.Option("--task", "-t", help="Task, or a data file. Default: the run's own task."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help='Compare with this model, adapter or run on the same rows; or "base".'),
    ] = None,
    split: Annotated[str, typer.Option(help="test or validation.")] = "test",
    data_dir: Annotated[str | None, typer.Option(help="Folder with files of the task.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Key of the task, as style=prose.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Score at most this many rows.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows a batch.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Answers a prompt.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    output: Annotated[str | None, typer.Option(help="Folder of report and predictions.")] = None,
    json_: JsonFlag = False,
) -> None:
    """Score answers on a task, with a 95 % interval; predictions are saved to be read.

    Examples:

        reftune eval runs/demo
        reftune eval nano --task families --size 200
        reftune eval runs/demo --against base              # paired test on the same rows
        reftune eval runs/rank8 --against runs/rank4
        reftune eval nano --task my_test.jsonl --option prompt=question

    Exit code 0 says that scoring worked, not that a score is good.
    """
    if split not in ("test", "validation"):
        raise RecipeError(f'There is no split "{split}" to score.', "Use test or validation.")
    recipe = run_recipe(model)
    spec = _task(task, recipe, data_dir, option or [], size, split)
    decoding = _decoding(recipe, split, batch_size, max_new_tokens, temperature, samples)
    names = [model] + ([against] if against else [])
    results = _evaluate_all(names, spec, decoding, seed)
    folder = Path(output) if output else Path("runs/evaluations") / _slug(model, spec.name, split)
    test = results[0].compare(results[1]) if against else None
    reports = _write(folder, names, results, spec, decoding, seed, test)
    if json_:
        first = {"folder": str(folder), "report": reports[0]}
        second = {"against": reports[1], "test": asdict(test)} if test else {}
        print_json({**first, **second})
        return
    _show(reports, test, names, folder)


def _task(
    task: str | None,
    recipe: Recipe | None,
    data_dir: str | None,
    options: list[str],
    size: int | None,
    split: str,
) -> TaskSpec:
    """Return the task asked for, or the run's own with the changes asked for."""
    sizes = {f"{split}_size": size}
    if task is not None:
        return task_spec(task, data_dir, options, sizes)
    if recipe is None:
        raise RecipeError(
            "No task is given.", "Add --task NAME; `reftune methods --tasks` lists them."
        )
    from reftune.config.loader import change

    spec = change(recipe, [f"task.{text}" for text in options]).task
    more = {key: value for key, value in sizes.items() if value is not None}
    return replace(spec, **more, **({"data_dir": data_dir} if data_dir else {}))


def _decoding(
    recipe: Recipe | None,
    split: str,
    batch_size: int | None,
    max_new_tokens: int | None,
    temperature: float | None,
    samples: int | None,
) -> EvaluationSpec:
    from reftune.config.recipe import EvaluationSpec

    given = {
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "samples": samples,
    }
    spec = recipe.evaluation if recipe else EvaluationSpec()
    changes = {key: value for key, value in given.items() if value is not None}
    spec = replace(spec, split=split, **changes)
    if spec.samples > 1 and spec.temperature == 0:
        raise RecipeError(f"{spec.samples} greedy answers are the same.", "Set --temperature 0.8.")
    return spec


def _evaluate_all(
    names: list[str], spec: TaskSpec, decoding: EvaluationSpec, seed: int
) -> list[Evaluation]:
    """Score one or two models on the same rows, one after the other."""
    from contextlib import nullcontext

    from reftune import tasks
    from reftune.inference.evaluate import evaluate as score

    made = tasks.get(spec)
    examples = made.load(decoding.split)
    num_labels = made.num_labels if made.kind == "classification" else None
    results: list[Evaluation] = []
    loaded: Any = None
    for name in names:
        use_base = name == BASE and loaded is not None
        if not use_base:
            loaded = load_any(name, num_labels=num_labels)
        with _off(loaded[0]) if use_base else nullcontext(), progress(f"evaluate {name}") as report:
            results.append(score(*loaded, made, examples, decoding, seed=seed, progress=report))
    return results


def _off(model: Any) -> Any:
    """Switch the adapters of a model off; refuse where the base is not there any more."""
    from reftune.model import off
    from reftune.model.levels import levels

    if not levels(model):
        raise DataError(
            "This model has no adapter to switch off.", "Name the base model: --against nano."
        )
    return off(model)


def _write(
    folder: Path,
    names: list[str],
    results: list[Evaluation],
    spec: TaskSpec,
    decoding: EvaluationSpec,
    seed: int,
    test: Any,
) -> list[Any]:
    """Write reports and predictions; the first into the folder itself."""
    from reftune.report.model import Report

    reports = []
    for number, (name, result) in enumerate(zip(names, results)):
        place = folder if number == 0 else folder / "against"
        paired = {"paired_test": asdict(test)} if test and number == 0 else {}
        report = Report(
            name=name,
            figures=result.figures,
            model=name,
            task=spec.name,
            seed=seed,
            metric=result.metric,
            eval_seconds=result.seconds,
            split=decoding.split,
            evaluation=asdict(decoding),
            **paired,
        )
        result.save(place / "predictions.jsonl")
        report.write(place / "report.json")
        reports.append(report)
    return reports


def _show(reports: list[Any], test: Any, names: list[str], folder: Path) -> None:
    from reftune.report.tables import report_table

    out().print(report_table(reports).to_rich())
    if test:
        share = f"{test.difference * 100:+.1f} points"
        ends = f"[{test.low * 100:+.1f}, {test.high * 100:+.1f}]"
        out().print(
            f"{names[0]} minus {names[1]}: {share} {ends}, p = {test.p_value:.2g} "
            f"({test.method}, {test.n} rows; only first right {test.only_a}, only second "
            f"{test.only_b})",
            markup=False,
            soft_wrap=True,
        )
    out().print(f"Read answers: {folder / 'predictions.jsonl'}", markup=False)


def _slug(*parts: str) -> str:
    text = "-".join(part.strip("./") for part in parts)
    return re.sub(r"[^\w.-]+", "-", text)
