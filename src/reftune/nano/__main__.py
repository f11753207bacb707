"""Command line of the embedded world: `python -m reftune.nano --help`."""

from __future__ import annotations

import json
import logging
import random
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Make the embedded world's tokenizer and models again, look at them, measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

NameOption = Annotated[str, typer.Option("--model", help="nano, nano-gpt2 or nano-encoder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _start() -> None:
    from reftune.nano.train import limit_threads

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    limit_threads()


@app.command()
def tokenizer(
    out: Annotated[Path | None, typer.Option(help="Folder; default: the packaged one.")] = None,
) -> None:
    """Train the tokenizer on the generator's own text (some seconds) and save it."""
    from reftune.nano import WEIGHTS
    from reftune.nano.tokenizer import train_tokenizer

    target = out or WEIGHTS / "nano"
    train_tokenizer().save_pretrained(target)
    typer.echo(f"Tokenizer written to {target}.")


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    model: NameOption = "nano",
    plan: Annotated[float, typer.Option(help="Tokens at which the curriculum is complete.")] = 30e6,
    tokens: Annotated[float, typer.Option(help="Stop at this many tokens in all.")] = float("inf"),
    minutes: Annotated[float, typer.Option(help="Stop after this time.")] = float("inf"),
    rate: Annotated[float, typer.Option(help="Learning rate of the constant phase.")] = 1.5e-3,
    step_tokens: Annotated[int, typer.Option(help="Tokens of an optimiser step.")] = 6144,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    decay_from: Annotated[
        Path | None, typer.Option(help="Checkpoint to branch the decay off; settings come from it.")
    ] = None,
    tokenizer_dir: Annotated[
        Path | None, typer.Option(help="Tokenizer of a new run; default: the packaged one.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Go on from a released model: its name or folder.")
    ] = None,
) -> None:
    """Train a base model: constant rate until --tokens or --minutes, or a decay branch."""
    _start()
    from reftune.nano import NAMES, path
    from reftune.nano import train as training

    settings = training.Settings(
        model=model, plan=plan, rate=rate, step_tokens=step_tokens, seed=seed
    )
    _known(model)
    begin = None if weights is None else path(weights) if weights in NAMES else Path(weights)
    run = training.open_run(out, settings, resume, decay_from, tokenizer_dir, begin)
    last = training.train(run, tokens, minutes)
    typer.echo(f"Newest checkpoint: {last}")


@app.command()
def release(
    run: Annotated[Path, typer.Option(help="Folder of a constant-rate run; it may go on.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Default: the newest one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Default: the packaged weights.")] = None,
) -> None:
    """Run the decay branch from the newest checkpoint and write bf16 weights, config, card."""
    _start()
    from reftune.nano.card import card as make_card
    from reftune.nano.release import release as make_release

    folder = make_release(run, out, checkpoint)
    (folder / "gates.json").unlink(missing_ok=True)
    (folder / "README.md").write_text(make_card(folder.name, folder))
    typer.echo(f"Released to {folder}. Next: python -m reftune.nano card")


def _known(model: str) -> None:
    from reftune.nano import NAMES

    if model not in NAMES:
        raise ValueError(f'No embedded model is called "{model}". Known: {", ".join(NAMES)}.')


def _print(rows: list[dict], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in ("", "gate", "value", "95 % interval", "n", "bar", "holds"):
        table.add_column(column)
    words = {True: "yes", False: "[bold red]no[/]", None: ""}
    for row in rows:
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        star = "*" if row["starred"] else ""
        value, bar = f"{row['value']:.3f}", row["bar"] or ""
        table.add_row(star, row["name"], value, interval, str(row["n"]), bar, words[row["holds"]])
    Console(width=110).print(table)


@app.command()
def probe(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint, or a run folder: its newest.")],
    n: Annotated[int, typer.Option(help="Items of each set.")] = 200,
    as_json: JsonOption = False,
) -> None:
    """Measure a checkpoint in training: drills, steps, look-ups, recall (about a minute)."""
    _start()
    import torch

    from reftune.nano import gates
    from reftune.nano.shapes import build_model
    from reftune.nano.tokenizer import load_tokenizer
    from reftune.nano.train import newest

    file = newest(checkpoint) if checkpoint.is_dir() else checkpoint
    state = torch.load(file, weights_only=False)
    model = build_model(state["settings"]["model"]).eval()
    model.load_state_dict(state["model"])
    own = file.parent.parent / "tokenizer"
    measure = gates.Measure(model, load_tokenizer(own if own.is_dir() else None), n)
    rows = [gate.row() for gate in measure.probe()]
    if as_json:
        typer.echo(json.dumps({"tokens": state["tokens"], "gates": rows}))
    else:
        _print(rows, f"{file.name}, {state['tokens'] / 1e6:.2f} M tokens")


def _measure(name: str, weights: Path | None, quick: bool, show: bool) -> dict:
    _start()
    from transformers import AutoModelForCausalLM

    from reftune.nano import gates as measures
    from reftune.nano import path
    from reftune.nano.tokenizer import load_tokenizer

    _known(name)
    if name == "nano-encoder":
        raise ValueError("nano-encoder writes no answers; its gates would have nothing to measure.")
    folder = weights or path(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    n, samples_n = (200, 100) if quick else (1000, 1000)
    measure = measures.Measure(model, load_tokenizer(folder), n, samples_n)
    rows = []
    for gate in measure.all():
        rows.append(gate.row())
        if show:
            typer.echo(f"{gate.name}: {gate.value:.3f}", err=True)
    return {"model": name, "quick": quick, "gates": rows}


WeightsOption = Annotated[Path | None, typer.Option(help="Folder; default: the packaged one.")]


@app.command()
def gates(
    model: NameOption = "nano",
    weights: WeightsOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="200 items a gate, minutes.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure every gate on shipped weights (n = 1,000; greedy; intervals)."""
    measured = _measure(model, weights, quick, show=not as_json)
    if as_json:
        typer.echo(json.dumps(measured))
    else:
        _print(measured["gates"], f"Gates of {model}{', quick' if quick else ''}")


@app.command()
def card(
    model: NameOption = "nano",
    weights: WeightsOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="200 items a gate.")] = False,
    measure: Annotated[bool, typer.Option(help="Measure the gates anew.")] = True,
) -> None:
    """Measure the gates, keep them in gates.json and write the card (README.md) from them."""
    from reftune.nano import path
    from reftune.nano.card import card as make_card

    folder = weights or path(model)
    if measure:
        measured = _measure(model, folder, quick, show=True)
        (folder / "gates.json").write_text(json.dumps(measured, indent=1) + "\n")
    (folder / "README.md").write_text(make_card(model, folder))
    typer.echo(f"Card written to {folder / 'README.md'}.")


@app.command()
def sample(
    world: Annotated[str, typer.Argument(help="A sub-world, or all.")] = "all",
    number: Annotated[int, typer.Option("-n", help="Items of each sub-world.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
) -> None:
    """Print rendered items, so that the world can be read."""
    from reftune.nano import mix

    if world not in ("all", *mix.WORLDS):
        raise ValueError(f'No sub-world is called "{world}". Known: {", ".join(mix.WORLDS)}, all.')
    for name in mix.WORLDS if world == "all" else (world,):
        typer.secho(f"== {name}", bold=True)
        rng = random.Random(seed)
        for index in range(number):
            item = mix.draw(name, rng, split, progress=(index + 0.5) / number)
            typer.secho(f"[{item.kind}{', ' + item.group if item.group else ''}]", dim=True)
            typer.echo(f"{mix.prompt_text(item)} {item.answer}".strip())


def main() -> None:
    """Run a command; what the user can mend is one line and exit code 2."""
    try:
        app()
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
