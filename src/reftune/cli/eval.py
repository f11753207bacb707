"""`reftune eval`: score a model, an adapter or a stack; compare two on the same rows."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reftune.cli.common import (
    AskedOption,
    DataDirOption,
    JsonFlag,
    SetOption,
    TaskOption,
    changes_of,
    print_json,
    print_table,
    progress,
    run_recipe,
    say,
)
from reftune.cli.generate import NO_REPEAT, PENALTY
from reftune.cli.models import BaseModelOption, HeadOption, has_adapter, load_any
from reftune.cli.reranking import check_rerank, reranked
from reftune.cli.scoring import (
    BASE,
    check_models,
    check_output,
    check_unseen,
    same_rows,
    slug,
    task_of_run,
    top_key,
)
from reftune.errors import DataError, RecipeError

if TYPE_CHECKING:
    from reftune.config.recipe import EvaluationSpec, Recipe, TaskSpec
    from reftune.inference.evaluate import Evaluation

CHANGED = ("task", "evaluation", "seed")
"""What of a recipe scoring reads; other keys belong to training."""
SHORT = {
    "samples": "k",
    "temperature": "t",
    "max_new_tokens": "tokens",
    "top_p": "p",
    "top_k": "top",
    "num_beams": "beams",
    "repetition_penalty": "penalty",
    "no_repeat_ngram_size": "ngram",
}
"""Flags that change answers, and how a folder's name calls them."""


def evaluate(
    model: Annotated[str, typer.Argument(help="Base model, adapter, stack or run folder.")],
    task: AskedOption = None,
    against: Annotated[
        str | None,
        typer.Option(help='Compare with this model, adapter or run on the same rows; or "base".'),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="test (the default) or validation.", show_default=False)
    ] = None,
    data_dir: DataDirOption = None,
    set_: SetOption = None,
    option: TaskOption = None,
    size: Annotated[int | None, typer.Option(min=1, help="Score at most this many rows.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows a batch.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus of sampling.")] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Most likely tokens to sample from; 0 is all.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Answers a prompt.")] = None,
    num_beams: Annotated[int | None, typer.Option(min=1, help="Beams of a greedy search.")] = None,
    repetition_penalty: Annotated[float | None, PENALTY] = None,
    no_repeat_ngram_size: Annotated[int | None, NO_REPEAT] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of sampling. Default: the run's own, or 0.")
    ] = None,
    rerank: Annotated[
        str | None,
        typer.Option(help="A reward model's run, which chooses among the samples: rerank@k."),
    ] = None,
    head: HeadOption = None,
    base_model: BaseModelOption = None,
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
        reftune eval runs/demo --set evaluation.top_p=0.9 --temperature 0.8 --samples 4
        reftune eval runs/demo --samples 16 --temperature 1 --rerank runs/reward_model

    `--set` changes keys of `task`, `evaluation` and `seed`, for this scoring only. Exit code 0 says
    that scoring worked, not that a score is good.
    """
    recipe = run_recipe(model)
    changes = changes_of(set_, option)
    flags = {
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "samples": samples,
        "num_beams": num_beams,
        "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
    }
    settings = _settings(recipe, changes, {**flags, "split": split}, seed)
    decoding, split = settings.evaluation, settings.evaluation.split
    if split == "none":
        raise RecipeError('There is no split "none" to score.', "Use test or validation.")
    spec = task_of_run(task, recipe, data_dir, changes, size, split)
    names = [model] + ([against] if against else [])
    asked = {"n": size, "seed": seed, **{SHORT[k]: v for k, v in flags.items() if k in SHORT}}
    asked["rerank"] = rerank and rerank.strip("./")
    place = _slug(model, spec.name, split, against, [*(set_ or []), *(option or [])], asked)
    folder = Path(output) if output else Path("runs/evaluations") / place
    seed = settings.seed
    check_output(folder)
    check_models(names)
    if rerank:
        check_rerank(rerank, spec, decoding)
    results = _evaluate_all(names, spec, decoding, seed, (head, base_model))
    if rerank:
        results = reranked(results, rerank, spec, decoding, seed)
    test = results[0].compare(results[1]) if against else None
    how = {**asdict(decoding), **({"rerank": rerank} if rerank else {})}
    reports = _write(folder, names, results, spec, how, seed, test)
    if json_:
        first = {"folder": str(folder), "report": reports[0]}
        second = {"against": reports[1], "test": asdict(test)} if test else {}
        print_json({**first, **second})
        return
    _show(reports, test, names, folder)


def _settings(
    recipe: Recipe | None, changes: list[str], flags: dict[str, Any], seed: int | None
) -> Recipe:
    """Return a recipe that says how to score: the run's, the changes, then the flags.

    Raises:
        RecipeError: If a change is for training, or values do not go together.
    """
    from reftune.config.loader import change, from_dict

    for text in changes:
        if top_key(text) not in CHANGED:
            raise RecipeError(
                f'"{text.partition("=")[0].strip()}" is nothing that scoring reads.',
                "Set keys of task, evaluation or seed; `reftune train` takes the others.",
            )
    if flags["split"] not in (None, "test", "validation"):
        raise RecipeError(
            f'There is no split "{flags["split"]}" to score.', "Use test or validation."
        )
    start = recipe or from_dict({"task": "families", "seed": 0})
    start = replace(start, evaluation=replace(start.evaluation, split="test"))
    wanted = {f"evaluation.{key}": value for key, value in flags.items()} | {"seed": seed}
    given = [f"{key}={json.dumps(value)}" for key, value in wanted.items() if value is not None]
    own = [text for text in changes if top_key(text) != "task"]
    return change(start, [*own, *given])


def _evaluate_all(
    names: list[str],
    spec: TaskSpec,
    decoding: EvaluationSpec,
    seed: int,
    how: tuple[str | None, str | None],
) -> list[Evaluation]:
    """Score one or two models on the same rows, one after the other.

    `how` is the head and the base model asked for.
    """
    from contextlib import nullcontext

    from reftune import tasks
    from reftune.inference.evaluate import evaluate as score

    made = tasks.get(spec)
    runs = [run_recipe(name) for name in names]
    own = [run for run in runs if run and same_rows(run.task, spec)]
    check_unseen(own, made, decoding.split)
    examples = made.load(decoding.split)
    num_labels = made.num_labels if made.kind == "classification" else None
    results: list[Evaluation] = []
    loaded: Any = None
    max_len = None
    head, base_model = how
    if head == "classification" and made.kind != "classification":
        raise RecipeError(
            f'Task "{spec.name}" asks for text; a classification head answers none.',
            "Leave --head out.",
        )
    for number, (name, run) in enumerate(zip(names, runs)):
        use_base = name == BASE and loaded is not None
        if not use_base:
            own_base = base_model if number == 0 or has_adapter(name) else None
            loaded = load_any(name, num_labels, head, own_base)
            max_len = run.stages[-1].max_len if run else None
        with _off(loaded[0]) if use_base else nullcontext(), progress(f"evaluate {name}") as report:
            more = {"seed": seed, "max_len": max_len, "progress": report}
            results.append(score(*loaded, made, examples, decoding, **more))
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
    how: dict[str, Any],
    seed: int,
    test: Any,
) -> list[Any]:
    """Write reports and predictions; the first into the folder itself. `how` says what was done."""
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
            split=how["split"],
            evaluation=how,
            prompts_cut=result.prompts_cut,
            **paired,
        )
        result.save(place / "predictions.jsonl")
        report.write(place / "report.json")
        reports.append(report)
    return reports


def _show(reports: list[Any], test: Any, names: list[str], folder: Path) -> None:
    from reftune.report.tables import report_table

    print_table(report_table(reports))
    if test:
        share = f"{test.difference * 100:+.1f} points"
        ends = f"[{test.low * 100:+.1f}, {test.high * 100:+.1f}]"
        say(
            f"{names[0]} minus {names[1]}: {share} {ends}, p = {test.p_value:.2g} "
            f"({test.method}, {test.n} rows; only first right {test.only_a}, only second "
            f"{test.only_b})"
        )
    say(f"Read answers: {folder / 'predictions.jsonl'}")


def _slug(
    model: str,
    task: str,
    split: str,
    against: str | None,
    options: list[str],
    asked: dict[str, Any],
) -> str:
    """Return a folder name for what was asked, so that no other question's answers are replaced."""
    parts = [model, task, split, *options]
    parts += [f"{key}{value}" for key, value in asked.items() if value is not None]
    parts += [f"against-{against.strip('./')}"] if against else []
    return slug(parts)
