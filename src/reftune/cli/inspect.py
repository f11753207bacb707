"""`reftune inspect`: rows as the model will see them, before anyone trains."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reftune.cli.common import (
    DataDirOption,
    JsonFlag,
    SetOption,
    TaskOption,
    changes_of,
    out,
    print_json,
    recipe_around,
    say,
)
from reftune.cli.models import context_of, load_tokenizer

if TYPE_CHECKING:
    from rich.text import Text

    from reftune.config.recipe import Recipe, StageSpec
    from reftune.tasks.base import Example, Task
    from reftune.training.encode import Rows

ENDLESS = 1 << 30
"""A `max_len` in which every row fits."""
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
    option: TaskOption = None,
    json_: JsonFlag = False,
) -> None:
    """Print rows with the edited and the learned tokens coloured. Nothing is trained or changed.

    Examples:

        reftune inspect my.yaml
        reftune inspect my.jsonl --option prompt=question --option completion=answer
        reftune inspect families --positions f2+l2 --rows 1

    Yellow tokens are edited, green ones are learned, both together are edited and learned. Without
    colours the marks are [edited] and <learned>. Numbers below are over all rows of the split.
    Rows whose target is longer than `max_len` are shown too, and what to do about them.
    """
    changes = changes_of(set_, option)
    changes += [f"task.data_dir={json.dumps(data_dir)}"] if data_dir else []
    recipe = _recipe(data, model, positions, changes)
    from reftune import tasks
    from reftune.training.data import holds_out

    task = tasks.get(recipe.task)
    task.hold_out = holds_out(recipe, task)
    examples = task.load(split)
    tokenizer = load_tokenizer(recipe.model)
    is_train = split == "train"
    stages = [
        _look(stage, examples, tokenizer, task, recipe, rows, is_train) for stage in recipe.stages
    ]
    shared = _overlap(task, split, examples)
    if json_:
        facts = {"task": recipe.task.name, "split": split, "model": recipe.model.name}
        print_json({**facts, "overlap": shared, "stages": stages})
        return
    for stage in stages:
        _show(stage, split)
    if shared:
        say(f"Overlap: {shared}.")


def _recipe(data: str, model: str | None, positions: str | None, changes: list[str]) -> Recipe:
    """Return the recipe, or one made around a data file or a task."""
    recipe = recipe_around(data, changes)
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


def _look(
    stage: StageSpec,
    examples: list,  # type: ignore[type-arg]
    tokenizer: Any,
    task: Task,
    recipe: Recipe,
    count: int,
    is_train: bool,
) -> dict[str, Any]:
    """Encode the rows of a stage; describe the first ones token by token and all in numbers.

    Training rows are shown as the stage's objective changes them.
    """
    from reftune.config.options import OTHER_METHODS
    from reftune.training.encode import encode
    from reftune.training.view import decode_view, edited_tokens

    adapter = stage.adapter
    head = recipe.model.head
    encoded, long = _changed(stage, examples, tokenizer, head, is_train)
    edits = adapter.method not in OTHER_METHODS
    rule: Any = (adapter.train_positions or adapter.positions) if edits else _nothing
    whole = {row.id: row for row in encoded.rows}
    shown = []
    for example in _chosen(examples, whole, long, count):
        row = whole.get(example.id) or encode(example, tokenizer, ENDLESS, kind=head)
        tokens = [asdict(view) for view in decode_view(row, tokenizer, rule, adapter.short)]
        target = row.decoder_labels and tokenizer.decode(row.decoder_labels)
        shown.append(
            {
                "id": row.id,
                "tokens": tokens,
                "prompt_tokens": row.prompt_len,
                "target_tokens": row.learned,
                "cut": row.cut,
                "needs_max_len": long.get(row.id),
                "label": row.class_label,
                "target": target,
            }
        )
    counts = [sum(edited_tokens(row, rule, adapter.short)) if edits else 0 for row in encoded.rows]
    labels = [row.learned for row in encoded.rows]
    return {
        "method": adapter.method,
        "layers": adapter.layers,
        "positions": adapter.positions if edits else None,
        "train_positions": adapter.train_positions if edits else None,
        "max_len": stage.max_len,
        "rows": shown,
        "summary": {
            **encoded.summary(),
            "targets_too_long": len(long),
            "tokens": sum(map(len, encoded.rows)),
            "edited_tokens_a_row": round(mean(counts), 2) if counts else 0,
            "learned_tokens_a_row": round(mean(labels), 2) if labels else 0,
        },
        "remedy": _remedy(long, examples, task, recipe) if long else None,
    }


def _changed(
    stage: StageSpec, examples: list[Example], tokenizer: Any, head: str, is_train: bool
) -> tuple[Rows, dict[str, int]]:
    """Encode the rows that fit, as the objective changes them where they are training rows."""
    from reftune.training.data import objective_of

    objective = objective_of(stage)
    limit = objective.row_limit(stage.max_len) if is_train else stage.max_len
    encoded, long = _encode(examples, tokenizer, limit, head)
    if is_train and len(encoded):
        rows = objective.training_rows(encoded.rows, tokenizer, stage.max_len)
        encoded = replace(encoded, rows=rows)
    return encoded, long


def _encode(
    examples: list[Example], tokenizer: Any, max_len: int, head: str
) -> tuple[Rows, dict[str, int]]:
    """Encode the rows that fit; return also the `max_len` each other row needs, by its id.

    Training refuses a target that does not fit. Here it shall be seen.
    """
    from reftune.tasks.texts import EmptyTargetError, frame
    from reftune.training.encode import Rows, TooLongError, encode, encode_all

    try:
        return encode_all(examples, tokenizer, max_len, kind=head, what="inspected"), {}
    except TooLongError:
        pass
    around, long = frame(tokenizer), {}
    for example in examples:
        try:
            encode(example, tokenizer, max_len, kind=head, around=around)
        except TooLongError as error:
            long[example.id] = error.needed
        except EmptyTargetError:
            continue  # counted below
    fitting = [example for example in examples if example.id not in long]
    if not fitting:
        return Rows([]), long
    return encode_all(fitting, tokenizer, max_len, kind=head, what="inspected"), long


def _chosen(
    examples: list[Example], whole: dict[str, Any], long: dict[str, int], count: int
) -> list[Example]:
    """Return the first rows with a target; one at least that does not fit, if there is any."""
    rows = [example for example in examples if example.id in whole or example.id in long]
    first = rows[:count]
    if long and not any(example.id in long for example in first):
        first += [next(example for example in rows if example.id in long)]
    return first


def _remedy(long: dict[str, int], examples: list[Example], task: Task, recipe: Recipe) -> str:
    """Say what helps rows whose target does not fit: what the model's context allows, or less."""
    from reftune.tasks.own import Own, characters_to_learn

    needed, limit = max(long.values()), context_of(recipe.model)
    if limit is None or needed <= limit:
        first = f"Set max_len to at least {needed}"
    else:
        first = f"They need max_len {needed}, but the context of {recipe.model.name} is {limit}"
    if not isinstance(task, Own):
        return f"{first}, or use another model or other rows."
    length = min(characters_to_learn(example) for example in examples if example.id in long) - 1
    return f"{first}; or leave them out: --option drop_longer={length} (characters)."


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
    say(f"{stage['method']}, layers {stage['layers']}, {rule}", "dim")
    for row in stage["rows"]:
        head = (
            f"\n{row['id']}  {row['prompt_tokens']} prompt + {row['target_tokens']} learned tokens"
        )
        head += f", {row['cut']} prompt tokens cut" if row["cut"] else ""
        if row["needs_max_len"]:
            head += f", does not fit: it needs max_len {row['needs_max_len']}"
        say(head, "bold")
        tokens = row["tokens"][: stage["max_len"]]
        console.print(render(tokens, console.is_terminal), soft_wrap=True)
        if len(tokens) < len(row["tokens"]):
            say(f"... and {len(row['tokens']) - len(tokens)} tokens more", "dim")
        if row["label"] is not None:
            say(f"class {row['label']}", "green")
        if row["target"]:
            say(f"learned: {row['target']}", "green")
    numbers = stage["summary"]
    say(
        f"\n{numbers['rows']} {split} rows, longest {numbers['longest']} tokens; a row has "
        f"{numbers['edited_tokens_a_row']} edited and {numbers['learned_tokens_a_row']} learned "
        f"tokens on average; {numbers['prompts_cut']} prompts cut, "
        f"{numbers['skipped_without_target']} rows without target skipped."
    )
    if numbers["targets_too_long"]:
        say(
            f"{numbers['targets_too_long']} more rows have a target that does not fit into max_len "
            f"{stage['max_len']}; training refuses them. {stage['remedy']}",
            "yellow",
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
