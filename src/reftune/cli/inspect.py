"""`reftune inspect`: rows as the model will see them, before anyone trains."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reftune.cli.common import (
    DataDirOption,
    JsonFlag,
    SetOption,
    out,
    print_json,
    read_recipe,
)
from reftune.cli.models import load_tokenizer

if TYPE_CHECKING:
    from rich.text import Text

    from reftune.config.recipe import Recipe, StageSpec
    from reftune.tasks.base import Task

STYLES = {
    (True, False): "black on yellow",
    (False, True): "bold green",
    (True, True): "bold black on bright_green",
    (False, False): "",
}
MARKS = {(True, False): "[{}]", (False, True): "<{}>", (True, True): "[<{}>]", (False, False): "{}"}


def inspect(
    data: Annotated[str, typer.Argument(help="Recipe, data file, or name of a task.")],
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="Rows to print.")] = 3,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Whose tokenizer. Default: the recipe's.")
    ] = None,
    positions: Annotated[
        str | None, typer.Option("--positions", "-p", help="Positions. Default: the recipe's.")
    ] = None,
    data_dir: DataDirOption = None,
    set_: SetOption = None,
    json_: JsonFlag = False,
) -> None:
    """Print rows with the edited and the learned tokens coloured. Nothing is trained or changed.

    Examples:

        reftune inspect my.yaml
        reftune inspect my.jsonl --set task.prompt=question --set task.completion=answer
        reftune inspect families --positions f2+l2 --rows 1

    Yellow tokens are edited, green ones are learned, both together are edited and learned. Without
    colours the marks are [edited] and <learned>. Numbers below are over all rows of the split.
    """
    changes = [*(set_ or []), *([f"task.data_dir={json.dumps(data_dir)}"] if data_dir else [])]
    recipe = _recipe(data, model, positions, changes)
    from reftune import tasks
    from reftune.training.data import holds_out

    task = tasks.get(recipe.task)
    task.hold_out = holds_out(recipe, task)
    examples = task.load(split)
    tokenizer = load_tokenizer(recipe.model)
    stages = [_look(stage, examples, tokenizer, task, recipe, rows) for stage in recipe.stages]
    shared = _overlap(task, split, examples)
    if json_:
        facts = {"task": recipe.task.name, "split": split, "model": recipe.model.name}
        print_json({**facts, "overlap": shared, "stages": stages})
        return
    for stage in stages:
        _show(stage, split)
    if shared:
        out().print(f"Overlap: {shared}.", markup=False)


def _recipe(data: str, model: str | None, positions: str | None, changes: list[str]) -> Recipe:
    """Return the recipe, or one made around a data file or a task."""
    from reftune.config.options import task_names
    from reftune.tasks.files import suffix_of

    if suffix_of(data) is not None:
        recipe = _around({"name": "own", "train": data}, changes)
    elif data in task_names() and not Path(data).exists():
        recipe = _around({"name": data}, changes)
    else:
        recipe = read_recipe(data, changes)
    if model:
        recipe = replace(recipe, model=replace(recipe.model, name=model))
    if positions:
        stages = [
            replace(
                stage, adapter=replace(stage.adapter, positions=positions, train_positions=None)
            )
            for stage in recipe.stages
        ]
        recipe = replace(recipe, stages=stages)
    return recipe


def _around(task: dict[str, Any], changes: list[str]) -> Recipe:
    """Return a recipe for a task, with the head and objective its kind needs."""
    from reftune.config.loader import from_dict, task_of
    from reftune.config.options import task_class

    spec = task_of(task, changes)
    values: dict[str, Any] = {"task": task}
    if task_class(spec.name).kind_of(spec.options) == "classification":
        values |= {"model": {"head": "classification"}, "objective": "classification"}
    return from_dict(values, changes)


def _look(
    stage: StageSpec, examples: list, tokenizer: Any, task: Task, recipe: Recipe, count: int
) -> dict[str, Any]:
    """Encode the rows of a stage; describe the first ones token by token and all in numbers."""
    from reftune.config.options import OTHER_METHODS
    from reftune.training.encode import encode_all
    from reftune.training.view import decode_view, edited_tokens

    adapter = stage.adapter
    head = recipe.model.head
    encoded = encode_all(examples, tokenizer, stage.max_len, kind=head, what="inspected")
    edits = adapter.method not in OTHER_METHODS
    rule: Any = (adapter.train_positions or adapter.positions) if edits else _nothing
    shown = []
    for row in encoded.rows[:count]:
        tokens = [asdict(view) for view in decode_view(row, tokenizer, rule, adapter.short)]
        target = row.decoder_labels and tokenizer.decode(row.decoder_labels)
        shown.append(
            {
                "id": row.id,
                "tokens": tokens,
                "prompt_tokens": row.prompt_len,
                "target_tokens": len(row) - row.prompt_len or len(row.decoder_labels or []),
                "cut": row.cut,
                "label": row.class_label,
                "target": target,
            }
        )
    counts = [sum(edited_tokens(row, rule, adapter.short)) if edits else 0 for row in encoded.rows]
    labels = [len(row) - row.prompt_len or len(row.decoder_labels or []) for row in encoded.rows]
    return {
        "method": adapter.method,
        "layers": adapter.layers,
        "positions": adapter.positions if edits else None,
        "train_positions": adapter.train_positions if edits else None,
        "rows": shown,
        "summary": {
            **encoded.summary(),
            "tokens": sum(map(len, encoded.rows)),
            "edited_tokens_a_row": round(mean(counts), 2),
            "learned_tokens_a_row": round(mean(labels), 2),
        },
    }


def _nothing(row: Any) -> list[bool]:
    """Return that no token is edited: LoRA and full fine-tuning change weights."""
    return [False] * len(row)


def _overlap(task: Task, split: str, examples: list) -> str | None:
    """Return how many test questions are among the training rows, where both are at hand."""
    from reftune.errors import ReftuneError
    from reftune.tasks.guard import overlap

    if split != "train" or "test" not in task.splits:
        return None
    try:
        return str(overlap(examples, task.load("test")))
    except ReftuneError:  # no test rows: nothing to compare with
        return None


def _show(stage: dict[str, Any], split: str) -> None:
    console = out()
    console.print(_legend(console.is_terminal))
    rule = stage["train_positions"] or stage["positions"] or "no positions: weights change"
    console.print(f"{stage['method']}, layers {stage['layers']}, {rule}", markup=False, style="dim")
    for row in stage["rows"]:
        cut = f", {row['cut']} prompt tokens cut" if row["cut"] else ""
        head = (
            f"\n{row['id']}  {row['prompt_tokens']} prompt + {row['target_tokens']} learned tokens"
        )
        console.print(head + cut, markup=False, style="bold")
        console.print(render(row["tokens"], console.is_terminal), soft_wrap=True)
        if row["label"] is not None:
            console.print(f"class {row['label']}", markup=False, style="green")
        if row["target"]:
            console.print(f"learned: {row['target']}", markup=False, style="green")
    numbers = stage["summary"]
    console.print(
        f"\n{numbers['rows']} {split} rows, longest {numbers['longest']} tokens; a row has "
        f"{numbers['edited_tokens_a_row']} edited and {numbers['learned_tokens_a_row']} learned "
        f"tokens on average; {numbers['prompts_cut']} prompts cut, "
        f"{numbers['skipped_without_target']} rows without target skipped.",
        markup=False,
    )


def render(tokens: list[dict[str, Any]], colour: bool) -> Text:
    """Return tokens as text: coloured, or with marks where there are no colours."""
    from rich.text import Text

    text = Text()
    for token in tokens:
        kind = (token["edited"], token["labelled"])
        shown = token["text"].replace("\n", "⏎\n") if any(kind) else token["text"]
        text.append(shown if colour else MARKS[kind].format(shown), STYLES[kind] if colour else "")
    return text


def _legend(colour: bool) -> Text:
    from rich.text import Text

    if not colour:
        return Text("[edited]  <learned>  [<edited and learned>]")
    return Text.assemble(
        (" edited ", STYLES[True, False]),
        "  ",
        (" learned ", STYLES[False, True]),
        "  ",
        (" edited and learned ", STYLES[True, True]),
    )
