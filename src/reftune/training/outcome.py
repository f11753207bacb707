"""What comes after training: scoring adapter and base on the same rows, and the report."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from reftune.config.options import PLAIN
from reftune.report.model import Figure, Report
from reftune.training.processes import shards

if TYPE_CHECKING:
    from torch import nn

    from reftune.inference.evaluate import Evaluation
    from reftune.training.stages import Run

log = logging.getLogger(__name__)


def conclude(run: Run) -> Report:
    """Evaluate what was trained and write predictions, report and plots; the run is finished."""
    figures: dict[str, Figure] = {}
    extra: dict[str, Any] = {}
    seconds = 0.0
    if shards(run.model):
        log.warning("sharded by FSDP2: not scored here. Run: reftune eval %s", run.folder.path)
    elif run.recipe.evaluation.split != "none":
        after, before = _evaluations(run)
        seconds = after.seconds + (before.seconds if before else 0.0)
        for name, figure in after.figures.items():
            figures[f"adapter_{name}"] = figure
            if before is not None and name in before.figures:
                figures[f"base_{name}"] = before.figures[name]
        extra |= _save_predictions(run, after, before)
        if after.prompts_cut:
            extra["prompts_cut"] = after.prompts_cut
    report = _report(run, figures, seconds, extra)
    _write_card(run, report)
    _plots(run, report)
    run.folder.write_report(report, markdown(report))
    run.folder.finish()
    return report


def _evaluations(run: Run) -> tuple[Evaluation, Evaluation | None]:
    """Score the trained model, then the base model on the same rows."""
    after = _evaluate(run, run.model, "adapter")
    if not run.recipe.evaluation.compare_base:
        return after, None
    if run.data.kind == "classification":
        log.info("the base model has no trained class head: not compared")
        return after, None
    model, adapters_off = _base(run)
    with adapters_off:
        return after, _evaluate(run, model, "base")


def _base(run: Run) -> tuple[nn.Module, AbstractContextManager[Any]]:
    """Return the base model: ours with its adapters off, or loaded again if it was changed."""
    from reftune.model import off
    from reftune.model.build import load_base

    if any(stage.adapter.method in PLAIN for stage in run.recipe.stages):
        model, _ = load_base(replace(run.recipe.model, adapter=None))
        return model.to(next(run.model.parameters()).device), nullcontext()
    return run.model, off(run.model)


def _evaluate(run: Run, model: nn.Module, what: str) -> Evaluation:
    from reftune.inference.evaluate import evaluate
    from reftune.training.progress import Counting

    spec = run.recipe.evaluation
    examples = run.data.splits[spec.split]
    with Counting(f"evaluate {what}") as counting:
        return evaluate(
            model,
            run.tokenizer,
            run.data.task,
            examples,
            spec,
            seed=run.recipe.seed,
            max_len=run.recipe.stages[-1].max_len,
            progress=counting if run.progress else None,
        )


def _save_predictions(run: Run, after: Evaluation, before: Evaluation | None) -> dict[str, Any]:
    """Write predictions; return the paired test of adapter against base, if there is one."""
    from reftune.inference.predictions import compare

    after.save(run.folder.path / "predictions.jsonl")
    if before is None:
        return {}
    before.save(run.folder.path / "predictions_base.jsonl")
    if not all(run.data.task.metric in p.scores for p in after.predictions):
        return {}  # a metric over the whole set, such as MCC, has no value per row
    test = compare(after, before, run.data.task.metric)
    names = ("difference", "low", "high", "p_value")
    return {"adapter_minus_base": {name: getattr(test, name) for name in names}}


def _write_card(run: Run, report: Report) -> None:
    """Give the artefact a card with the figures; it was saved before they were known."""
    from reftune.model.checkpoint import write_card
    from reftune.report.tables import show_figure

    facts: dict[str, Any] = {"task": f"{report.task}, {run.recipe.evaluation.split} rows"}
    for name, figure in report.figures.items():
        rows = f", {figure.n} rows" if figure.n else ""
        facts[name.replace("_", " ")] = show_figure(figure) + rows
    if not report.figures:
        facts = {"task": f"{report.task}, not scored"}
    facts["trained parameters"] = f"{report.trainable_parameters:,}"
    facts["steps"], facts["seed"] = report.steps, report.seed
    write_card(run.model, run.folder.path / run.folder.stages[-1]["artefact"], facts)


def _report(run: Run, figures: dict[str, Figure], seconds: float, extra: dict[str, Any]) -> Report:
    from reftune.training.runfolder import environment

    recipe, facts = run.recipe, environment()
    stages = run.folder.stages
    last, trained = stages[-1], _trained(run)
    metric = f"adapter_{run.data.task.metric}"
    return Report(
        name=recipe.name,
        figures=figures,
        model=recipe.model.name,
        task=recipe.task.name,
        methods=[stage["method"] for stage in stages],
        objectives=[stage["objective"] for stage in stages],
        seed=recipe.seed,
        trainable_parameters=trained,
        trainable_fraction=trained / max(1, run.base_parameters),
        adapter_bytes=last["adapter_bytes"],
        train_seconds=sum(stage["train_seconds"] for stage in stages),
        eval_seconds=seconds,
        steps=sum(stage["steps"] for stage in stages),
        metric=metric if metric in figures else "",
        command=f"reftune train {run.folder.path / 'recipe.yaml'} --overwrite",
        versions=facts["versions"],
        device=facts["device"],
        threads=facts["threads"],
        split=recipe.evaluation.split,
        validation_loss=last["validation_loss"],
        stages=stages,
        overlap=run.data.overlap,
        **extra,
    )


def _trained(run: Run) -> int:
    """Count what the stages trained: an adapter that several trained counts once."""
    from reftune.training.stages import continues

    stages = run.folder.stages
    counts = [
        s["trainable_parameters"] for i, s in enumerate(stages) if not continues(run.recipe, i)
    ]
    is_plain = any(stage.adapter.method in PLAIN for stage in run.recipe.stages)
    return max(counts) if is_plain else sum(counts)


def markdown(report: Report) -> str:
    """Return the report as a page."""
    from reftune.report.tables import report_table

    lines = [f"# {report.name}", "", report_table([report]).to_markdown(), ""]
    extra = report.model_extra or {}
    test = extra.get("adapter_minus_base")
    if test:
        lines += [
            f"Adapter minus base: {test['difference']:+.3f} (95 % interval {test['low']:+.3f} to "
            f"{test['high']:+.3f}, p = {test['p_value']:.2g}, same rows).",
            "",
        ]
    if extra.get("overlap"):
        lines += [f"Overlap: {extra['overlap']['text']}.", ""]
    if extra.get("prompts_cut"):
        lines += [
            f"{extra['prompts_cut']} scored prompts left no room for an answer in the model's "
            "context and were cut from the left.",
            "",
        ]
    for number, stage in enumerate(extra.get("stages", []), 1):
        rows = stage["data"]["train"]
        lines.append(
            f"Stage {number}: {stage['method']} with {stage['objective']}, {stage['steps']} steps, "
            f"{rows['rows']} rows (longest {rows['longest']} tokens, {rows['prompts_cut']} prompts "
            f"cut, {rows['skipped_without_target']} rows without target skipped)."
        )
    lines += ["", f"Model {report.model}, seed {report.seed}. Repeat: `{report.command}`", ""]
    return "\n".join(lines)


def _plots(run: Run, report: Report) -> None:
    from reftune.report.plots import plot_reports, plot_training

    folder = run.folder.path / "plots"
    plot_training(folder / "loss.png", [run.folder.path])
    if report.primary() is not None:
        plot_reports(folder / "figures.png", [report], report.task)
