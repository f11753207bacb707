"""Paired tests between the rows of a grid: the same questions, the same seeds.

A row minus another is a row of its own, `heft/heft-3:minus lora-3`, with metric
`accuracy_difference`, its interval and, in the note, p and how it was tested.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence

from reftune.errors import ReftuneError
from reftune.inference.predictions import load_predictions, row_values
from reftune.inference.stats import PairedTest, paired_over_seeds
from reftune.report.cells import Cell, Grid
from reftune.report.model import Report, ResultRow, owner_of
from reftune.report.tables import DIFFERENCE

log = logging.getLogger(__name__)


def training_seconds(cells: Sequence[Cell]) -> float | None:
    """Return the seconds that a row trained, the mean over its seeds; None while one is open."""
    reports = [cell.report() for cell in cells]
    spent = [report.train_seconds for report in reports if report is not None]
    if len(spent) < len(cells) or None in spent:
        return None
    return math.fsum(spent) / len(spent)


def paired_rows(grid: Grid, command: str) -> Iterator[ResultRow]:
    """Give the tests that a grid asks for, of the rows whose seeds are all done.

    Args:
        grid: The grid.
        command: The command that makes the figures.
    """
    rows = grid.rows()
    points = {name: cells[0].point for name, cells in rows.items()}
    if not any(point.against or point.as_long_as for point in points.values()):
        return
    seconds = {name: training_seconds(cells) for name, cells in rows.items()}
    spent = {name: value for name, value in seconds.items() if value is not None}
    for name in spent:
        others = dict.fromkeys(points[name].against, "")
        for line in points[name].as_long_as:
            alike = {n: value for n, value in spent.items() if points[n].line == line}
            enough = [n for n, value in alike.items() if value >= spent[name]]
            if enough:
                others.setdefault(min(enough, key=spent.__getitem__), "trained as long")
        for other, how in others.items():
            row = _tested(grid, rows, name, other, how) if other in spent else None
            if row is not None:
                yield row.model_copy(update={"command": f"{command} --only {name}"})


def _tested(
    grid: Grid, rows: dict[str, list[Cell]], name: str, other: str, how: str
) -> ResultRow | None:
    """Return the difference of two rows that are done, or None if their answers are gone."""
    cells, rivals = rows[name], rows[other]
    report = cells[0].report()
    if report is None:
        return None
    metric = grid.tested or _main(report)
    try:
        ours, theirs = _values(cells, metric), _values(rivals, metric)
        test = _compare(ours, theirs)
    except (ReftuneError, ValueError) as error:
        log.warning("%s is not tested against %s: %s", name, other, error)
        return None
    last = other.rpartition("/")[2]
    lines = cells[0].point.line, rivals[0].point.line
    words = [f"p = {test.p_value:.2g}", *([how] if how else [])]
    return ResultRow(
        name=f"{name}:minus {last}",
        method=" − ".join(lines),
        task=report.task,
        model=report.model,
        metric=f"{metric}{DIFFERENCE}",
        mean=test.difference,
        low=test.low,
        high=test.high,
        n=test.n,
        seeds=len(cells),
        note=", ".join(words),
        versions=report.versions,
        line="" if how else f"{lines[0]} minus {lines[1]}",
        x={} if how else cells[0].point.x,
        p_value=test.p_value,
        test=test.method,
    )


def _main(report: Report) -> str:
    found = report.primary()
    return owner_of(found[0])[1] if found else "accuracy"


def _values(cells: Sequence[Cell], metric: str) -> list[dict[str, float]]:
    """Return the value of a metric for each question, a dict for each seed."""
    return [
        row_values(load_predictions(cell.folder / "predictions.jsonl"), metric)
        for cell in sorted(cells, key=lambda cell: cell.seed)
    ]


def _compare(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> PairedTest:
    """Test two rows on the same questions, in the same order.

    Raises:
        ValueError: If they were asked other questions.
    """
    asked = list(ours[0])
    if any(values.keys() != ours[0].keys() for values in (*ours, *theirs)):
        raise ValueError("they were not asked the same questions")
    return paired_over_seeds(
        [[values[key] for key in asked] for values in ours],
        [[values[key] for key in asked] for values in theirs],
    )
