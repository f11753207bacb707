"""What comes after training: scoring adapter and base on the same rows, and the report."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from reftune.config.options import PLAIN
from reftune.report.model import Figure, Report
from reftune.training.processes import shards

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from reftune.inference.evaluate import Evaluation
    from reftune.model.run import RunOutput
    from reftune.tasks.base import Example, Task
    from reftune.training.encode import Encoded
    from reftune.training.stage import Run

log = logging.getLogger(__name__)


def conclude(run: Run) -> Report:
    """Evaluate what was trained and write predictions, report and plots; the run is finished."""
    figures: dict[str, Figure] = {}
    extra: dict[str, Any] = {}
    seconds = 0.0
    if shards(run.model):
        log.warning("sharded by FSDP2: not scored here. Run: reftune eval %s", run.folder.path)
    elif run.recipe.evaluation.split != "none":
        scored = _evaluations(run)
        for one in scored:
            seconds += one.after.seconds + (one.before.seconds if one.before else 0.0)
            figures |= one.figures()
            _save_predictions(run, one)
        figures |= _majority(run)
        tests = {one.name: test for one in scored if (test := one.test())}
        extra |= {"adapter_minus_base": tests.pop("")} if "" in tests else {}
        extra |= {"adapter_minus_base_on": tests} if tests else {}
        cut = sum(one.after.prompts_cut for one in scored)
        extra |= {"prompts_cut": cut} if cut else {}
    report = _report(run, figures, seconds, extra)
    _write_card(run, report)
    _plots(run, report)
    run.folder.write_report(report, markdown(report))
    run.folder.finish()
    return report


@dataclass
class Scored:
    """What was found on one set of rows.

    Attributes:
        name: Name of the set in `evaluation.also`; empty for the run's own.
        after: The trained model's answers.
        before: The base model's, if they were asked for.
    """

    name: str
    after: Evaluation
    before: Evaluation | None = None

    @property
    def place(self) -> str:
        """What names of figures and files end in."""
        return f"_on_{self.name}" if self.name else ""

    def figures(self) -> dict[str, Figure]:
        """Return figures by their names in the report: all of the run's own set, else the main."""
        found: dict[str, Figure] = {}
        for name, figure in self.after.figures.items():
            if self.name and name != self.after.metric:
                continue
            found[f"adapter_{name}{self.place}"] = figure
            if self.before is not None and name in self.before.figures:
                found[f"base_{name}{self.place}"] = self.before.figures[name]
        return found

    def test(self) -> dict[str, float] | None:
        """Return the paired test of adapter against base on the main metric, if there is one."""
        from reftune.inference.predictions import compare

        metric = self.after.metric
        if self.before is None or not all(metric in p.scores for p in self.after.predictions):
            return None  # a metric over the whole set, such as MCC, has no value per row
        found = compare(self.after, self.before, metric)
        return {name: getattr(found, name) for name in ("difference", "low", "high", "p_value")}


def _evaluations(run: Run) -> list[Scored]:
    """Score the trained model, then the base model, on every set of rows."""
    found = [Scored(name, _evaluate(run, run.model, "adapter", name)) for name in _sets(run)]
    if not run.recipe.evaluation.compare_base:
        return found
    if run.data.kind == "classification":
        log.info("the base model has no trained class head: not compared")
        return found
    model, adapters_off = _base(run)
    with adapters_off:
        for one in found:
            one.before = _evaluate(run, model, "base", one.name)
    return found


def _majority(run: Run) -> dict[str, Figure]:
    """Score the most frequent training label on the run's own rows, where all share their choices.

    No model is asked: a system that stays below it has learned less than how often each answer is.
    """
    from reftune.inference.predictions import gold_choice
    from reftune.intervals import wilson
    from reftune.tasks.metrics import majority

    task, examples = _sets(run)[""]
    trained = run.data.splits["train"]
    if not examples[0].choices or len({e.choices for e in (*trained, *examples)}) != 1:
        return {}
    right = majority([*map(gold_choice, trained)], [*map(gold_choice, examples)])
    low, high = wilson(sum(right), len(right))
    figure = Figure(mean=sum(right) / len(right), n=len(right), low=low, high=high)
    names = (task.metric, "choice_accuracy") if task.kind == "choice" else (task.metric,)
    return {f"majority_{name}": figure for name in names}


def _sets(run: Run) -> dict[str, tuple[Task, list[Example]]]:
    return run.data.scored(run.recipe.evaluation.split)


def _base(run: Run) -> tuple[nn.Module, AbstractContextManager[Any]]:
    """Return the base model: ours with its adapters off, or loaded again if it was changed."""
    from reftune.model import off
    from reftune.model.build import load_base

    if any(stage.adapter.method in PLAIN for stage in run.recipe.stages):
        model, _ = load_base(replace(run.recipe.model, adapter=None))
        return model.to(next(run.model.parameters()).device), nullcontext()
    return run.model, off(run.model)


def _evaluate(run: Run, model: nn.Module, what: str, name: str) -> Evaluation:
    from reftune.inference.evaluate import evaluate
    from reftune.training.progress import Counting

    task, examples = _sets(run)[name]
    with Counting(f"evaluate {what} {name}".rstrip()) as counting:
        return evaluate(
            model,
            run.tokenizer,
            task,
            examples,
            run.recipe.evaluation,
            seed=run.recipe.seed,
            max_len=run.recipe.stages[-1].max_len,
            progress=counting if run.progress else None,
        )


def _save_predictions(run: Run, one: Scored) -> None:
    """Write the answers on one set of rows."""
    one.after.save(run.folder.path / f"predictions{one.place}.jsonl")
    if one.before is not None:
        one.before.save(run.folder.path / f"predictions_base{one.place}.jsonl")


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
    from reftune.training.stage import continues

    counts: list[int] = []
    for index, stage in enumerate(run.folder.stages):
        if run.recipe.stages[index].below == "trained":
            counts = []  # its own count holds those below
        elif continues(run.recipe, index):
            continue
        counts.append(stage["trainable_parameters"])
    is_plain = any(stage.adapter.method in PLAIN for stage in run.recipe.stages)
    return max(counts) if is_plain else sum(counts)


def markdown(report: Report) -> str:
    """Return the report as a page."""
    from reftune.report.tables import report_table

    lines = [f"# {report.name}", "", report_table([report]).to_markdown(), ""]
    extra = report.model_extra or {}
    own = extra.get("adapter_minus_base")
    tests = {"": own} if own else {}
    tests |= {f" on {name}": test for name, test in extra.get("adapter_minus_base_on", {}).items()}
    for place, test in tests.items():
        lines += [
            f"Adapter minus base{place}: {test['difference']:+.3f} (95 % interval "
            f"{test['low']:+.3f} to {test['high']:+.3f}, p = {test['p_value']:.2g}, same rows).",
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
    from reftune import objectives
    from reftune.report.plots import plot_metrics, plot_reports, plot_training

    folder = run.folder.path / "plots"
    plot_training(folder / "loss.png", [run.folder.path])
    for name in dict.fromkeys(stage.objective for stage in run.recipe.stages):
        for picture, panels in objectives.get(name).plots.items():
            plot_metrics(folder / f"{picture}.png", run.folder.path, panels, f"{name}: {picture}")
    if report.primary() is not None:
        plot_reports(folder / "figures.png", [report], report.task)
    if not shards(run.model):
        _maps(run, folder)


MAPPED, LOOKED_AT = 2, 64
"""Training rows of each kind (right answers, wrong ones) whose tokens are drawn, and how many of
the first rows they are taken from."""


def _maps(run: Run, folder: Path) -> None:
    """Draw what the last objective says of single tokens of a few training rows."""
    from accelerate.utils import send_to_device

    from reftune.inference.prompts import device_of
    from reftune.model import off
    from reftune.model.run import Runner
    from reftune.objectives.base import Objective
    from reftune.report.saliency import write_maps
    from reftune.training.collate import Collator, prepare
    from reftune.training.data import objective_of, training_rows

    stage, ask = run.recipe.stages[-1], Runner(run.model)
    objective = objective_of(stage)
    if type(objective).maps is Objective.maps:
        return
    some = run.data.splits["train"][:LOOKED_AT]
    kinds: dict[tuple[str, ...], list[Encoded]] = {}
    for row in training_rows(objective, stage, some, run.tokenizer, run.data.kind).rows:
        kinds.setdefault(tuple(row.guides or ()), []).append(row)
    rows = [row for found in kinds.values() for row in found[:MAPPED]]
    batch = send_to_device(Collator.of(run.tokenizer)(rows), device_of(run.model))

    def untrained(*args: Any, **kwargs: Any) -> RunOutput:
        with off(run.model):
            return ask(*args, **kwargs)

    maps = objective.maps([(rows, prepare(batch))], ask, untrained)
    write_maps(folder, maps, lambda ids: [run.tokenizer.decode([i]) for i in ids])
