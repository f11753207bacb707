"""`reftune generate`: answers to prompts."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from reftune.cli.common import (
    JsonFlag,
    note,
    out,
    print_json,
    progress,
    read_prompts,
    say,
)
from reftune.cli.models import (
    BaseModelOption,
    HeadOption,
    check_sampling,
    has_adapter,
    load_any,
    shape,
    trained_form,
)
from reftune.errors import RecipeError

PENALTY = typer.Option(min=0.01, help="Above 1 makes repeated tokens less likely.")
NO_REPEAT = typer.Option(min=0, help="No run of n tokens twice; 0 is off.")


def generate(
    model: Annotated[str, typer.Argument(help="Base model, adapter, stack or run folder.")],
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help='Prompts; "-" reads stdin.')
    ] = None,
    file: Annotated[
        str | None, typer.Option("--file", "-f", help="One prompt a line, or a .jsonl file.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help='Put around each prompt: "Question: {prompt} Answer:".')
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", "--chat-template", help="Ask through the chat template.")
    ] = False,
    base: Annotated[
        bool, typer.Option("--base", help="Also answer with the adapter switched off.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus of sampling, above 0 up to 1.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Most likely tokens to sample from.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Answers a prompt.")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends an answer. Repeatable.")
    ] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams of a greedy search.")] = 1,
    repetition_penalty: Annotated[float, PENALTY] = 1.0,
    no_repeat_ngram_size: Annotated[int, NO_REPEAT] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts a batch.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    head: HeadOption = None,
    base_model: BaseModelOption = None,
    json_: JsonFlag = False,
) -> None:
    """Answer prompts with a base model or anything trained on it.

    Examples:

        reftune generate runs/demo "Question: Ben has 3 pears and buys 4. How many? Answer:"
        reftune generate runs/demo --base --file prompts.txt
        echo "Once upon a time" | reftune generate nano - --temperature 0.8 --samples 3

    A run whose task asks in plain text is asked in that form, unless a prompt has it already.
    """
    _check(template, chat, stop or [], temperature, top_p)
    asked = _shaped(model, read_prompts(prompts or [], file), template, chat)
    if samples > 1 and temperature == 0:
        raise RecipeError(f"{samples} greedy answers are all the same.", "Set --temperature 0.8.")
    beams = {"num_beams": num_beams, "repetition_penalty": repetition_penalty}
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    settings = {
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        **sampling,
        "samples": samples,
        "stop": stop or [],
        "options": {**beams, "no_repeat_ngram_size": no_repeat_ngram_size},
    }
    rows = _answers(model, asked, settings, base, (head, base_model))
    whole = {"model": model, "settings": settings, "outputs": rows}
    print_json(whole) if json_ else _show(rows)


def _check(
    template: str | None, chat: bool, stop: list[str], temperature: float, top_p: float
) -> None:
    """Refuse flags that contradict each other or mean nothing."""
    if chat and template is not None:
        raise RecipeError("Both --template and --chat-template are asked for.", "Choose one.")
    if "" in stop:
        raise RecipeError('--stop "" would end every answer at once.', "Give a text, or leave it.")
    check_sampling(temperature, top_p)


def _answers(
    model: str,
    prompts: list[Any],
    settings: dict[str, Any],
    base: bool,
    how: tuple[str | None, str | None],
) -> list[dict[str, Any]]:
    """Return prompt and answers, and the base model's answers if they are wanted.

    `how` is the head and the base model asked for.
    """
    from reftune.inference.generate import generate as answer

    if base and not has_adapter(model):
        raise RecipeError(f'"{model}" is no adapter: there is only one model.', "Leave --base out.")
    loaded, tokenizer = load_any(model, None, *how)
    plain = None
    with progress("generate", show=len(prompts) > 1) as report:
        texts = answer(loaded, tokenizer, prompts, progress=report or False, **settings)
        if base:
            from reftune.model import off

            with off(loaded):
                plain = answer(loaded, tokenizer, prompts, progress=report or False, **settings)
    return [
        {"prompt": prompt, "texts": texts[i], **({"base": plain[i]} if plain else {})}
        for i, prompt in enumerate(prompts)
    ]


def _shaped(model: str, prompts: list[Any], template: str | None, chat: bool) -> list[Any]:
    """Put prompts into a template or the form the run was trained on, or make chats of them."""
    if chat:
        return [
            [{"role": "user", "content": item}] if isinstance(item, str) else item
            for item in (_filled(prompts, template) if template is not None else prompts)
        ]
    if template is not None:
        return _filled(prompts, template)
    trained = trained_form(model)
    if trained is None:
        return prompts
    task, form = trained
    asked = [shape(form, item) if isinstance(item, str) else item for item in prompts]
    if asked != prompts:
        shown = form.replace("{prompt}", "...").strip()
        note(f'Asked as "{shown}", the form of task {task}; --template "{{prompt}}" leaves it out.')
    return asked


def _filled(prompts: list[Any], template: str) -> list[Any]:
    if "{prompt}" not in template:
        raise RecipeError(f'The template "{template}" has no place.', "Write {prompt} in it.")
    return [
        template.replace("{prompt}", item) if isinstance(item, str) else item for item in prompts
    ]


def _show(rows: list[dict[str, Any]]) -> None:
    """Print answers alone where there is one prompt, else prompt and answers.

    An answer is printed as it is: no line break but its own, on a terminal and in a file.
    """
    for number, row in enumerate(rows):
        if number:
            print()
        if len(rows) > 1:
            shown = (
                row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
            )
            say(shown, "dim")
        _show_answers(row.get("base", []), "base", "dim")
        _show_answers(row["texts"], "adapter" if "base" in row else "", "bold green")


def _show_answers(texts: list[str], name: str, style: str) -> None:
    """Print the answers of one model; several stand apart, each under a line with its number."""
    for number, text in enumerate(texts, 1):
        if len(texts) > 1:
            head = " ".join(part for part in ("---", name, f"{number} of {len(texts)}") if part)
            say(head, "dim")
        elif name:
            out().print(f"{name:<9}", style=style, end="")
        print(text.strip("\n"))
