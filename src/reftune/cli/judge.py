"""`reftune judge`: a model's own answers with judgments, the data of NLFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reftune.cli.common import (
    DataDirOption,
    JsonFlag,
    TaskOption,
    changes_of,
    new_rows,
    note,
    print_json,
    progress,
    recipe_around,
    say,
)
from reftune.cli.models import check_sampling, check_there, load_any
from reftune.errors import RecipeError

if TYPE_CHECKING:
    from reftune.inference.judging import Generator, Judge
    from reftune.tasks.base import Task

JUDGES = ("rule", "self")


def judge(
    data: Annotated[str, typer.Argument(help="Name of a task, data file, or recipe.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Who answers: base model, adapter or run folder.")
    ],
    out: Annotated[str, typer.Option("--out", help="The .jsonl file to write.")] = "judged.jsonl",
    by: Annotated[
        str, typer.Option("--judge", help="rule, self, or an OpenAI-compatible http(s)://host/v1.")
    ] = "rule",
    judge_model: Annotated[
        str | None, typer.Option(help="Name of the model at that address.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Questions. Default: all.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the chat template.")] = False,
    instruction: Annotated[str, typer.Option(help="System prompt, with --chat.")] = "",
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.3,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer. Default: the task's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers produced together.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 42,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    data_dir: DataDirOption = None,
    option: TaskOption = None,
    json_: JsonFlag = False,
) -> None:
    """Answer the training questions of a task with a model, and judge what is wrong.

    Examples:

        reftune judge families --option group=half --model nano --size 200 --out half.jsonl
        reftune judge my.jsonl --model runs/mine --judge self
        reftune judge gsm8k --model Qwen/Qwen3-0.6B --judge http://localhost:8000/v1 --judge-model M

    The file is what the task `judged` trains on. A killed command goes on where it was when it is
    given again. A key for the address is read from REFTUNE_API_KEY.
    """
    check_sampling(temperature, None)
    _check(by, judge_model, instruction, chat)
    path = new_rows(out, overwrite)
    task = _task(data, data_dir, option or [], size)
    check_there(model)
    sampling = {
        "max_new_tokens": max_new_tokens or task.max_new_tokens,
        "batch_size": batch_size,
        "temperature": temperature,
    }
    settings = {
        **{"data": data, "model": model, "judge": by, "judge_model": judge_model, "seed": seed},
        **{"chat": chat, "instruction": instruction, "options": option or [], **sampling},
    }
    rows = _build(path, task, settings, sampling, show=not json_)
    wrong = sum(row["judgment"] is not None for row in rows)
    facts = {"file": str(path), "rows": len(rows), "right": len(rows) - wrong, "wrong": wrong}
    if json_:
        print_json(facts)
        return
    say(f"{path}: {len(rows)} answers, {len(rows) - wrong} right, {wrong} wrong with a judgment.")
    _hint(task, chat)


def _build(
    path: Path, task: Task, settings: dict[str, Any], sampling: dict[str, Any], show: bool
) -> list[dict[str, Any]]:
    """Load the model, and answer and judge the training questions of a task into a file."""
    from reftune.inference.judging import build

    examples = task.load("train")
    who = (settings["seed"], settings["judge"], settings["judge_model"])
    answers, judges = _model(settings["model"], sampling, *who)
    with progress("judge", show=show) as report:
        return build(
            *(path, task, examples, answers, judges, settings, sampling["batch_size"]),
            progress=report or (lambda done, total: None),
        )


def _task(data: str, data_dir: str | None, option: list[str], size: int | None) -> Task:
    """Return the task whose training questions are asked."""
    from reftune import tasks

    changes = changes_of(None, option)
    changes += [f"task.data_dir={json.dumps(data_dir)}"] if data_dir else []
    changes += [f"task.train_size={size}"] if size else []
    task = tasks.get(recipe_around(data, changes).task)
    if task.kind != "generation":
        raise RecipeError(
            f'The task "{task.spec.name}" has no generated answers.', "Name one that has."
        )
    task.hold_out = False
    return task


def _check(by: str, judge_model: str | None, instruction: str, chat: bool) -> None:
    """Refuse flags that contradict each other."""
    from reftune.inference.judging import EndpointJudge

    if by not in JUDGES:
        EndpointJudge(by, judge_model or "")
        if not judge_model:
            raise RecipeError(f"The model at {by} is not named.", "Add --judge-model NAME.")
    elif judge_model:
        raise RecipeError(
            f"--judge-model is for an address, and the judge is {by}.", "Leave it out."
        )
    if instruction and not chat:
        raise RecipeError("--instruction is a system prompt.", "Add --chat, or leave it out.")


def _model(
    model: str, sampling: dict[str, Any], seed: int, by: str, judge_model: str | None
) -> tuple[Generator, Judge]:
    """Load the model; return who answers and who judges."""
    from reftune.inference.generate import generate
    from reftune.inference.judging import EndpointJudge, ModelJudge, judge_by_rule

    loaded, tokenizer = load_any(model)

    def answers(prompts: Any, start: int) -> list[str]:
        texts = generate(loaded, tokenizer, prompts, seed=seed + start, **sampling)
        return [samples[0] for samples in texts]

    if by == "rule":
        return answers, judge_by_rule
    if by == "self":
        return answers, ModelJudge(loaded, tokenizer, batch_size=sampling["batch_size"])
    return answers, EndpointJudge(by, judge_model or "")


def _hint(task: Task, chat: bool) -> None:
    """Say how the task `judged` asks in the form that was asked in here."""
    from reftune.tasks.judged import Options

    form = (task.prompt_form or "{prompt}").replace("{prompt}", "{input}")
    is_chat = chat or (task.prompt_form is None)
    if is_chat:
        note("The answers were asked for by chat: train with `task: {name: judged, chat: true}`.")
    elif form != Options.base:
        note(f"Train on them with the prompt they were asked by: task.base={form!r}.")
