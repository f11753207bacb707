"""`reftune demo`: an adapter learns in minutes, on this machine, without a download."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reftune.cli.common import JsonFlag, SetOption, note, print_json, print_table, read_recipe, say

if TYPE_CHECKING:
    from reftune.config.recipe import AdapterSpec, Recipe
    from reftune.report.model import Report
    from reftune.report.tables import Table

COMMAND = "reftune demo"
"""Stands in the reports of the demo's runs; only such runs are replaced."""


def demo(
    overrides: SetOption = None,
    name: Annotated[str, typer.Option(help="Name of the run folder.")] = "demo",
    output: Annotated[str, typer.Option(help="Folder of run folders.")] = "runs",
    as_json: JsonFlag = False,
) -> None:
    """Train LoReFT on the embedded model, compare it with the base and with LoRA, and plot.

    The base model has never seen these families of word problems, nor solutions in prose that end
    in `#### N`. It stays frozen; 24,640 numbers learn to edit its hidden states at every token.
    LoRA gets as many parameters, the same rows, steps and learning rate.

    Examples:

        reftune demo
        reftune demo --set task.options.style=json --name demo-json
    """
    from reftune.training.stages import train

    recipe = read_recipe("demo", overrides, name, output)
    require_replaceable(recipe)
    lora = _lora(recipe)
    require_replaceable(lora)
    folder = Path(output) / name
    note(_introduction(recipe))
    report = train(recipe, overwrite=True, progress=not as_json)
    rival = train(lora, overwrite=True, progress=not as_json)
    report = conclude(folder, report, rival)
    if as_json:
        print_json(report)
        return
    print_table(table(report, rival))
    say(_summary(folder, report))


def _introduction(recipe: Recipe) -> str:
    options = recipe.task.options
    return (
        f"Task: {options.get('group')} families of word problems, solved in style "
        f"{options.get('style')}; {recipe.task.train_size} rows to learn from, "
        f"{recipe.task.test_size} unseen ones to score."
    )


def require_replaceable(recipe: Recipe) -> None:
    """Refuse to replace a run that the demo did not make.

    A run is the demo's if its report says so, or if it holds the very recipe of this demo (then
    an earlier demo was interrupted).

    Raises:
        RecipeError: If the folder holds anything else.
    """
    from reftune.errors import RecipeError, ReftuneError
    from reftune.report.cells import Cell
    from reftune.report.model import Report

    folder = Path(recipe.output) / recipe.name
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if Cell(recipe.name, recipe.seed, recipe).matches():
        return
    try:
        if Report.read(folder).command == COMMAND:
            return
    except ReftuneError:
        pass  # no report: an unfinished run, or no run at all
    raise RecipeError(
        f"{folder} is there and was not made by the demo; the demo would replace it.",
        "Choose another --name, or remove the folder.",
    )


def _lora(recipe: Recipe) -> Recipe:
    """Return the same recipe with LoRA at equal parameters."""
    from reftune.config.recipe import AdapterSpec

    ranks = [lora_rank(recipe, stage.adapter) for stage in recipe.stages]
    stages = [
        replace(stage, adapter=AdapterSpec(method="lora", options={"rank": rank}))
        for stage, rank in zip(recipe.stages, ranks)
    ]
    evaluation = replace(recipe.evaluation, compare_base=False)
    return replace(recipe, name=f"{recipe.name}-lora", stages=stages, evaluation=evaluation)


def lora_rank(recipe: Recipe, adapter: AdapterSpec) -> int:
    """Return the rank at which LoRA has most nearly as many parameters as an adapter.

    The embedded model: LoReFT of rank 8 has 24,640, LoRA of rank 5 on q and v 25,600.
    """
    from reftune.config.recipe import AdapterSpec
    from reftune.model.build import apply_adapter, load_base, trainable_summary

    counts = []
    for spec in (adapter, AdapterSpec(method="lora", options={"rank": 1})):
        model, _ = load_base(recipe.model)
        counts.append(trainable_summary(apply_adapter(model, spec)).trainable)
    return max(1, round(counts[0] / counts[1]))


def conclude(folder: Path, report: Report, rival: Report) -> Report:
    """Write the demo's main figures as top-level numbers, the table and the plot."""
    from reftune.report.files import write_text_atomic
    from reftune.report.plots import bars
    from reftune.training.outcome import markdown

    figures = report.figures
    names = {
        "base_accuracy": "base_accuracy",
        "base_format_accuracy": "base_format_accuracy",
        "adapter_accuracy": "adapter_accuracy",
        "adapter_format_accuracy": "adapter_format_accuracy",
    }
    top: dict[str, Any] = {key: figures[name].mean for key, name in names.items()}
    for name in ("accuracy", "format_accuracy"):
        figures[f"lora_{name}"] = rival.figures[f"adapter_{name}"]
        top[f"lora_{name}"] = figures[f"lora_{name}"].mean
    facts = ("trainable_parameters", "trainable_fraction", "adapter_bytes")
    facts += ("train_seconds", "eval_seconds")
    top["rivals"] = {"lora": {fact: getattr(rival, fact) for fact in facts}}
    full = report.model_copy(update={"figures": figures, "command": COMMAND, **top})
    full.write(folder / "report.json")
    marked = rival.model_copy(update={"command": COMMAND})
    marked.write(folder.with_name(f"{folder.name}-lora") / "report.json")
    text = f"{markdown(report)}\n{table(report, rival).to_markdown()}\n"
    write_text_atomic(folder / "report.md", text)
    method = report.methods[0]
    wanted = {
        "base": figures["base_accuracy"],
        "LoRA": figures["lora_accuracy"],
        method: figures["adapter_accuracy"],
        "base, strict": figures["base_format_accuracy"],
        "LoRA, strict": figures["lora_format_accuracy"],
        f"{method}, strict": figures["adapter_format_accuracy"],
    }
    bars(folder / "plots" / "demo.png", wanted, "Unseen problems of new families", "accuracy")
    return full


def table(report: Report, rival: Report) -> Table:
    """Return the table of the demo: base, LoRA at equal parameters, and the adapter."""
    from reftune.report.tables import (
        Cell,
        Table,
        show_bytes,
        show_figure,
        show_seconds,
        show_share,
    )

    columns = ["method", "last number", "#### form", "trained", "adapter", "training"]
    result = Table(columns, best=[None, "high", "high", None, None, None], title="Demo")

    def scores(run: Report, prefix: str) -> Sequence[Cell]:
        picked = [run.figures[f"{prefix}_{name}"] for name in ("accuracy", "format_accuracy")]
        return [Cell(show_figure(figure), figure.mean) for figure in picked]

    result.add("base, frozen", *scores(report, "base"), "0", "", "")
    for run in (rival, report):
        share = show_share(run.trainable_fraction or 0)
        result.add(
            run.methods[0],
            *scores(run, "adapter"),
            f"{run.trainable_parameters:,} ({share})",
            show_bytes(run.adapter_bytes or 0),
            show_seconds(run.train_seconds or 0),
        )
    return result


def _summary(folder: Path, report: Report) -> str:
    test = (report.model_extra or {}).get("adapter_minus_base", {})
    gain = f"{test['difference'] * 100:+.1f} points" if test else "see the table"
    return (
        f"Adapter minus base on the same {report.figures['adapter_accuracy'].n} problems: {gain}.\n"
        f"Plot: {folder / 'plots' / 'demo.png'}   report: {folder / 'report.md'}\n\n"
        f"Next, after `source .venv/bin/activate`:\n"
        f"  reftune chat {folder}           ask it a word problem; /compare asks the base too\n"
        "  reftune inspect demo            see which tokens are edited and which are learned\n"
        "  reftune train demo --set adapter.method=direft --name direft   try another method\n"
    )
