"""`reftune doctor`: what is installed, what device, and does attaching work on your model."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import asdict, replace
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reftune.cli.common import JsonFlag, out, print_json, read_recipe
from reftune.cli.models import HeadOption, check_head, head_of

if TYPE_CHECKING:
    from reftune.training.plan import Plan

EXTRAS = {
    "trl": ("trl",),
    "eval": ("lm_eval",),
    "quant": ("bitsandbytes", "torchao"),
    "track": ("trackio", "wandb", "tensorboard"),
}


def doctor(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Also check attaching on this model.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Also check this recipe.")
    ] = None,
    head: HeadOption = None,
    method: Annotated[
        str | None, typer.Option("--method", help="Also check an installed method.")
    ] = None,
    json_: JsonFlag = False,
) -> None:
    """Show versions, device and extras, and check a model or a recipe before a long run.

    Examples:

        reftune doctor
        reftune doctor --model Qwen/Qwen3-0.6B
        reftune doctor --recipe my.yaml --json
        reftune doctor --model Qwen/Qwen3-0.6B --recipe my.yaml
        reftune doctor --method direft

    The check of a model attaches LoReFT to it: sites found, identity and off leave the model as it
    was, an edit changes the output, gradients reach every site, saving and loading is exact. A
    failed check makes the exit code 4.

    With a model and a recipe it also applies the recipe's adapters to that model, loads its rows
    and tells for each stage what causal caching does: the mode and why, the first edited layer and
    token, the share of constant tokens, the memory of the store, the expected speed-up, and which
    edits can never be trained.

    The check of a method, for those of your own package, does the same with it on tiny random
    models of several architectures.
    """
    facts = environment()
    checks: list[dict[str, Any]] = []
    plans: list[Plan] = []
    if recipe is not None:
        checks += _check_recipe(recipe)
    if model is not None:
        checks += _check_model(model, head, recipe)
    if method is not None:
        checks += _check_method(method)
    if recipe is not None and model is not None:
        plans = _plans(recipe, model)
    failed = [check for check in checks if not check["passed"]]
    if json_:
        figures = [plan.figures() for plan in plans]
        print_json({**facts, "checks": checks, "plans": figures, "ok": not failed})
    else:
        _show(facts, checks)
        _show_plans(plans)
    if failed:
        raise typer.Exit(4)


def environment() -> dict[str, Any]:
    """Return versions, device, threads, extras and free space."""
    from reftune import nano
    from reftune.training import runfolder

    return {
        **runfolder.environment(),
        "extras": {
            extra: {name: _installed(name) for name in names} for extra, names in EXTRAS.items()
        },
        "nano": list(nano.shipped()),
        "free_gb": round(shutil.disk_usage(".").free / 1e9, 1),
    }


def _installed(name: str) -> str | None:
    """Return the version of a package, without importing it."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return metadata.version(name.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return "unknown"


def _check_recipe(recipe: str) -> list[dict[str, Any]]:
    """Check a recipe; its faults are raised as they would be by `train`."""
    from reftune.training.stages import check

    resolved = read_recipe(recipe)
    check(resolved)
    methods = " + ".join(stage.adapter.method for stage in resolved.stages)
    detail = f"{methods} on {resolved.model.name}, task {resolved.task.name}"
    return [{"name": f"recipe {recipe}", "passed": True, "detail": detail}]


def _check_model(name: str, head: str | None, recipe: str | None) -> list[dict[str, Any]]:
    """Check a model, and that the rows of a recipe fit into its context."""
    from reftune.config.recipe import ModelSpec
    from reftune.model.build import load_base
    from reftune.model.doctor import self_check

    check_head(head)
    model, _ = load_base(ModelSpec(name=name, head=head or head_of(ModelSpec(name=name))))
    if recipe is not None:
        from reftune.training.stages import check_context

        resolved = read_recipe(recipe)
        check_context(replace(resolved, model=replace(resolved.model, name=name)), model)
    return [
        {"name": check.name, "passed": bool(check.passed), "detail": check.detail}
        for check in self_check(model)
    ]


def _check_method(name: str) -> list[dict[str, Any]]:
    from reftune.model.doctor import check_method

    return [asdict(check) for check in check_method(name)]


def _plans(recipe: str, model: str) -> list[Plan]:
    """Return the plan of each stage of a recipe, on another model if it names one."""
    from reftune.training.stages import plans

    return plans(read_recipe(recipe), model)


def _show_plans(plans: list[Plan]) -> None:
    """Print what causal caching does in each stage."""
    from rich.text import Text

    for number, plan in enumerate(plans, 1):
        out().print(f"causal caching, stage {number}", style="bold")
        for name, text in plan.facts().items():
            out().print(Text.assemble((f"  {name:<12} ", "bold"), text), soft_wrap=True)


def _show(facts: dict[str, Any], checks: list[dict[str, Any]]) -> None:
    from rich.text import Text

    console = out()

    def line(name: str, text: str, style: str = "") -> None:
        console.print(Text.assemble((f"{name:<14}", "bold"), (text, style)), soft_wrap=True)

    for name, version in facts["versions"].items():
        line(name, version or "not installed", "" if version else "red")
    line("device", facts["device"] + (", bf16" if facts["bf16"] else ""))
    line("threads", f"{facts['threads']} of {facts['cpus']} cpus")
    line("free space", f"{facts['free_gb']} GB here")
    line("nano", ", ".join(facts["nano"]) or "no weights shipped")
    for extra, packages in facts["extras"].items():
        have = [f"{name} {version}" for name, version in packages.items() if version]
        missing = [name for name, version in packages.items() if not version]
        text = ", ".join(have)
        if missing:
            text += f"{'; ' if have else ''}without {', '.join(missing)}"
            text += f": pip install -e '.[{extra}]'"
        line(f"extra {extra}", text, "" if have else "dim")
    for check in checks:
        mark, style = ("ok", "green") if check["passed"] else ("FAILED", "bold red")
        console.print(
            Text.assemble(
                (f"{mark:<8}", style), (f"{check['name']:<12} ", "bold"), check["detail"]
            ),
            soft_wrap=True,
        )
