"""A diagnosis on paper: tables for the terminal and the page, pictures, and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from reftune.report.files import to_json, write_json_atomic, write_text_atomic
from reftune.report.panels import Panel, draw
from reftune.report.tables import Cell, Table, show_figure, show_seconds

if TYPE_CHECKING:
    from reftune.inference.chains import ErrorAccumulation
    from reftune.inference.diagnose import Diagnosis
    from reftune.inference.handover import PrefixQuality
    from reftune.inference.probes import NumberEncoding
    from reftune.inference.stats import PairedTest
    from reftune.report.model import Figure

WRITTEN = ("diagnosis.json", "diagnosis.md", "answers.jsonl", "plots")
"""What `write` puts into a folder."""
PICTURES = ("prefix.png", "numbers.png", "errors.png")
WRITERS = ("base", "adapter")
NAMES = {"base": "base", "adapter": "adapter", "base_on_adapter": "base's probe on the adapter"}
BEGINS = {
    "adapter": "adapter begins, base goes on",
    "base": "base begins, adapter goes on",
}
WHERE = {"own": "its own last token", "last": "the last prompt token"}
AT = {"own": "own token", "last": "prompt's last"}
CLEAR = 0.05
"""A difference with a p-value below counts as seen."""


def write(folder: str | PathLike[str], diagnosis: Diagnosis) -> Path:
    """Write figures, page, pictures and answers, each file whole or not at all.

    Args:
        folder: Where; files of an earlier diagnosis are replaced.
        diagnosis: What was found out.

    Returns:
        The page, `diagnosis.md`.
    """
    folder = Path(folder)
    draw_prefix(folder / "plots" / "prefix.png", diagnosis.prefix)
    draw_numbers(folder / "plots" / "numbers.png", diagnosis.numbers)
    if diagnosis.errors is not None:
        draw_errors(folder / "plots" / "errors.png", diagnosis.errors)
    else:  # that of an earlier diagnosis would pass for this one's
        (folder / "plots" / "errors.png").unlink(missing_ok=True)
    lines = [to_json(answer) + "\n" for answer in diagnosis.answers]
    write_text_atomic(folder / "answers.jsonl", "".join(lines))
    write_json_atomic(folder / "diagnosis.json", diagnosis.as_dict())
    return write_text_atomic(folder / "diagnosis.md", page(diagnosis))


def tables(diagnosis: Diagnosis) -> list[Table]:
    """Return the tables of a diagnosis for a terminal: numbers at three depths, no tests."""
    layers = diagnosis.numbers.layers
    depths = sorted({0, layers // 2, layers - 1})
    numbers = numbers_table(diagnosis.numbers, depths, False)
    errors = [errors_table(diagnosis.errors, False)] if diagnosis.errors else []
    return [prefix_table(diagnosis.prefix), numbers, *errors]


def prefix_table(prefix: PrefixQuality) -> Table:
    """Return accuracy by who begins, with what the first tokens changed."""
    orders = (("adapter", "base"), ("base", "adapter"))
    table = Table(
        ["tokens", *(head for f, s in orders for head in (f"{f} begins", f"change of the {s}"))],
        title=f"Prefix quality: {prefix.metric} when one writes the first tokens, the other the "
        "rest",
    )
    for tokens in sorted({point.tokens for point in prefix.points}):
        points = [prefix.at(first, tokens) for first, _ in orders]
        cells = [cell for point in points for cell in (_cell(point.figure), _change(point.test))]
        table.add(str(tokens), *cells)
    return table


def numbers_table(
    numbers: NumberEncoding, layers: Sequence[int] | None = None, full: bool = True
) -> Table:
    """Return R² of the probes, for some layers or all; `full`: also errors and tests."""
    source = "two-operand additions" if numbers.source == "additions" else "the task's questions"
    others = ("adapter", "base_on_adapter")
    errors = ["error, base", *(f"change, {NAMES[name]}" for name in others)]
    heads = ["operand", "at", "layer", *(f"R², {name}" for name in NAMES.values())]
    title = f"log2 of the operands of {source}, {numbers.held_out} held-out prompts"
    table = Table([*heads, *(errors if full else [])], title=f"Number encoding: {title}")
    for probe in numbers.probes:
        if layers is not None and probe.layer not in layers:
            continue
        cells = [_cell(probe.r2[name]) for name in NAMES]
        if full:
            changes = (_change(probe.tests[name], False) for name in others)
            cells += [_cell(probe.error["base"]), *map(Cell, changes)]
        table.add(probe.operand, AT[probe.place], str(probe.layer), *cells)
    return table


def errors_table(errors: ErrorAccumulation, full: bool = True) -> Table:
    """Return each step after right ones and after a wrong number; `full`: also tests and counts."""
    heads = ["step", "writer", "right", "equation holds", "consistent"]
    heads += ["recovered", "lost"]
    more = ["rows", "change, right", "rows with a wrong number", "change, consistent"]
    table = Table(
        [*heads, *(more if full else [])],
        title="Error accumulation: after right steps right, equation holds; after a wrong number "
        "consistent, recovered, lost",
        dispensable=["lost", "equation holds"],
    )
    for step in errors.steps:
        for who in WRITERS:
            figures = [step.right[who], step.true_equation[who]]
            figures += [step.wrong[kind][who] for kind in ("consistent", "recovered", "lost")]
            is_last = who == WRITERS[-1]
            tests = [_change(test) if is_last else "" for test in (step.test, step.wrong_test)]
            counts = [str(step.rows), tests[0], str(step.wrong_rows), tests[1]] if full else []
            table.add(str(step.step), who, *(_cell(figure, "") for figure in figures), *counts)
    return table


def sentences(diagnosis: Diagnosis) -> list[str]:
    """Return what the figures say, a sentence each."""
    prefix = diagnosis.prefix
    alone = {who: show_figure(prefix.alone[who]) for who in WRITERS}
    found = [
        f"Alone: base {alone['base']}, adapter {alone['adapter']} {prefix.metric}; adapter minus "
        f"base {_said(prefix.test)}."
    ]
    tokens = sorted({point.tokens for point in prefix.points} - {0})
    for first, second in (("adapter", "base"), ("base", "adapter")):
        points = [prefix.at(first, count) for count in tokens]
        clear = [f"{p.tokens}: {_said(p.test)}" for p in points if p.test.p_value < CLEAR]
        told = f"First tokens of the {first}, and what they change for the {second}:"
        found.append(f"{told} {'; '.join(clear) or 'nothing that could not be chance'}.")
    found += _of_numbers(diagnosis.numbers)
    return [*found, *(_of_errors(diagnosis.errors) if diagnosis.errors else [_missing(diagnosis)])]


def page(diagnosis: Diagnosis) -> str:
    """Return the whole diagnosis in Markdown."""
    facts = {**diagnosis.more, "task": diagnosis.task, "rows": diagnosis.rows}
    told = " · ".join(f"{key} {value}" for key, value in facts.items())
    level = f"{diagnosis.level * 100:g} % intervals"
    time = show_seconds(diagnosis.seconds)
    numbers = numbers_table(diagnosis.numbers)
    parts = [
        "# Diagnosis of reasoning",
        f"{told} · seed {diagnosis.seed} · {level} · {time}\n\n{_TESTS}",
        "\n".join(f"- {sentence}" for sentence in sentences(diagnosis)),
        "## Prefix quality\n\n" + _PREFIX,
        "![accuracy over first tokens](plots/prefix.png)",
        prefix_table(diagnosis.prefix).to_markdown(),
        "## Number encoding\n\n" + _NUMBERS,
        "![R² over layers](plots/numbers.png)",
        numbers.to_markdown(),
        "## Error accumulation\n\n" + _ERRORS,
    ]
    if diagnosis.errors is None:
        parts.append(_missing(diagnosis))
    else:
        parts.append("![shares over steps](plots/errors.png)")
        parts.append(errors_table(diagnosis.errors).to_markdown())
    return "\n\n".join(parts) + "\n"


def draw_prefix(path: str | PathLike[str], prefix: PrefixQuality) -> Path:
    """Draw accuracy over the number of first tokens, for both orders."""
    tokens = sorted({point.tokens for point in prefix.points})
    lines = {
        BEGINS[first]: [(i, prefix.at(first, t).figure) for i, t in enumerate(tokens)]
        for first in ("adapter", "base")
    }
    panel = Panel(
        title="who begins, who goes on",
        lines=lines,
        levels={f"{who} alone": figure for who, figure in prefix.alone.items()},
        label=prefix.metric,
        along="first tokens",
        names={i: str(t) for i, t in enumerate(tokens)},
    )
    return draw(path, [panel], "Prefix quality")


def draw_numbers(path: str | PathLike[str], numbers: NumberEncoding) -> Path:
    """Draw R² over layers, a panel for each operand and place."""
    panels = [
        Panel(
            title=f"{operand} operand, at {WHERE[place]}",
            lines={
                label: [(probe.layer, probe.r2[name]) for probe in numbers.at(operand, place)]
                for name, label in NAMES.items()
            },
            label="R² of log2",
            along="layer",
            limits=(-0.5, 1.05),
        )
        for operand in ("first", "second")
        for place in WHERE
    ]
    return draw(path, panels, "Number encoding")


def draw_errors(path: str | PathLike[str], errors: ErrorAccumulation) -> Path:
    """Draw shares over steps: right after right steps, and what follows a wrong number."""

    def panel(title: str, of: Any, rows: str = "rows") -> Panel:
        names = {step.step: f"{step.step}\nn = {getattr(step, rows)}" for step in errors.steps}
        return Panel(
            title=title,
            lines={who: [(step.step, of(step)[who]) for step in errors.steps] for who in WRITERS},
            label="share of rows",
            along="step",
            names=names,
            bands=False,
        )

    panels = [
        panel("right, after right steps", lambda step: step.right),
        panel("equation holds, after right steps", lambda step: step.true_equation),
        panel(
            "consistent with a wrong number", lambda step: step.wrong["consistent"], "wrong_rows"
        ),
        panel("recovered from a wrong number", lambda step: step.wrong["recovered"], "wrong_rows"),
    ]
    return draw(path, panels, "Error accumulation")


def _of_numbers(numbers: NumberEncoding) -> list[str]:
    """Say how well numbers are read in the base and with the adapter, over all places."""

    def middle(name: str) -> str:
        values = [probe.r2[name].mean for probe in numbers.probes]
        return f"{median(value for value in values if value is not None):.3f}"

    told = (
        ("adapter", "A probe of the adapter's own states"),
        ("base_on_adapter", "The base's probe on the adapter's states"),
    )
    return [
        f"{what} reaches R² {middle(name)} in the median of {len(numbers.probes)} places, in the "
        f"base {middle('base')}; its error is clearly larger at "
        f"{sum(probe.tests[name].low > 0 for probe in numbers.probes)} of them."
        for name, what in told
    ]


def _of_errors(errors: ErrorAccumulation) -> list[str]:
    found = []
    for step in errors.steps:
        line = f"Step {step.step} after right steps: adapter minus base {_said(step.test)}"
        if step.wrong_test is not None:
            line += f"; consistent with a wrong number {_said(step.wrong_test)}"
        found.append(f"{line}.")
    return found


def _missing(diagnosis: Diagnosis) -> str:
    return f"No figures on error accumulation: {diagnosis.errors_missing}"


def _said(test: PairedTest) -> str:
    """Return a difference of shares with its interval and p-value, in words of a sentence."""
    return _change(test).replace(" [", " points [", 1)


def _change(test: PairedTest | None, shares: bool = True) -> str:
    """Return a difference with its interval and p-value."""
    if test is None:
        return ""
    values = (test.difference, test.low, test.high)
    shown = [f"{value * 100:+.1f}" if shares else f"{value:+.3f}" for value in values]
    p = "< 0.001" if test.p_value < 0.001 else f"= {test.p_value:.2g}"
    return f"{shown[0]} [{shown[1]}, {shown[2]}], p {p}"


def _cell(figure: Figure, missing: str = "open") -> Cell:
    if figure.mean is None:
        return Cell(missing)
    if figure.unit == "share":
        return Cell(show_figure(figure), figure.mean)
    ends = f" [{figure.low:.3f}, {figure.high:.3f}]" if figure.has_interval else ""
    return Cell(f"{figure.mean:.3f}{ends}", figure.mean)


_TESTS = """\
Base and adapter on the same rows: McNemar's exact test for shares, a bootstrap over rows for
errors. The p-values are those of single comparisons; of twenty, one falls below 0.05 by chance."""
_PREFIX = """\
One model writes the first tokens of the answer, the other reads them in a fresh pass and goes on.
`change` is against the model that goes on, alone, on the same rows: what the first tokens of the
other did. If an adapter hurts through its first tokens, `adapter begins` falls at a small number of
tokens already, and `base begins` rises."""
_NUMBERS = """\
Ridge probes of log2 of the operands, in closed form, tried on held-out prompts. `base`: probe and
states of the base. `adapter`: probe and states of the adapter; a number that can still be read is
not lost. `base's probe on the adapter`: how far it still stands where the base reads it (both
centred). `error` is the mean absolute error in log2, `change` against that of the base."""
_ERRORS = """\
Right steps: the reference solution is shown up to the step. Wrong number: the number that the step
goes on from is replaced by a near one, and what comes from it is computed anew. The next equation
of the model is consistent with it, recovered (the true result nevertheless), or lost. `equation
holds`: what was written is true in itself, whatever it is about."""
