"""Published results: run folders in, `docs/results.json`, `docs/results.md` and plots out.

`results.json` is the only source; the page and the plots are made from it and never edited.

    python -m reftune.report.results                  write the page and the plots again
    python -m reftune.report.results add speed.json --section speed --command "make results-speed"
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

from pydantic import ValidationError

from reftune.errors import DataError, ReftuneError
from reftune.inference.stats import t_quantile, wilson
from reftune.report.files import write_json_atomic, write_text_atomic
from reftune.report.model import Figure, Report, ResultRow, base_name, owner_of
from reftune.report.page import page

log = logging.getLogger(__name__)

SEED_SUFFIX = re.compile(r"[-_/](?:seed|s)[-_=]?(\d+)$")
COST_UNITS = {"seconds", "bytes", "tokens/s"}


def collect(runs: Iterable[str | PathLike[str]]) -> list[ResultRow]:
    """Read run folders and join those that differ only in the seed.

    Two runs belong together when their names agree up to `-seed1`, `-s1` or `/seed-1`.

    Args:
        runs: Finished run folders.

    Returns:
        One row per figure: `name` for the primary figure, `name:metric` for others, and
        `section/base` for those of the base model.

    Raises:
        DataError: If a folder has no report.
    """
    groups: dict[str, list[Report]] = {}
    for run in runs:
        report = Report.read(run)
        groups.setdefault(SEED_SUFFIX.sub("", report.name), []).append(report)
    found: dict[str, ResultRow] = {}
    for name, reports in groups.items():
        for row in rows_of(name, reports):
            found.setdefault(row.name, row)
    return list(found.values())


def rows_of(name: str, reports: Sequence[Report], command: str = "") -> list[ResultRow]:
    """Return the rows of one cell: its seeds joined, one row per figure.

    Args:
        name: Name of the cell, with its section.
        reports: Its runs, one per seed.
        command: What made them; default is what the first report says.
    """
    first = reports[0]
    found = first.primary()
    main = first.metric or (found[0] if found else "")
    main = owner_of(main)[1]
    rows = []
    for metric in dict.fromkeys(key for report in reports for key in report.figures):
        figures = [report.figures[metric] for report in reports if metric in report.figures]
        kind, short = owner_of(metric)
        is_trained = kind == "adapter"
        primary = short == main
        owner = name if is_trained else base_name(name, kind)
        rows.append(
            ResultRow(
                name=owner if primary else f"{owner}:{short}",
                method="+".join(first.methods) if is_trained else kind,
                task=first.task,
                model=first.model,
                trainable=first.trainable_parameters if is_trained else 0,
                metric=short,
                command=command or first.command,
                seconds=_seconds(reports) if is_trained else None,
                versions=first.versions,
                **join_seeds(figures).model_dump(include=_NUMBERS),
            )
        )
    return rows


_NUMBERS = {"mean", "sd", "seeds", "n", "low", "high", "unit"}


def join_seeds(figures: Sequence[Figure]) -> Figure:
    """Join the figures of several seeds into one.

    A share with n rows: the variance of the mean is p(1−p)/n (choice of rows, which the seeds have
    in common; the square of `error` where figures know it) plus sd²/seeds; the Wilson interval of
    the number of rows with that variance is given. Anything else: the t interval over seeds. A
    single seed keeps its own interval.

    >>> joined = join_seeds([Figure(mean=0.70, n=100), Figure(mean=0.80, n=100)])
    >>> round(joined.mean, 4), round(joined.sd, 4), joined.seeds
    (0.75, 0.0707, 2)
    """
    known = [figure for figure in figures if figure.mean is not None]
    if not known:
        return Figure(mean=None, seeds=0, unit=figures[0].unit if figures else "share")
    if len(known) == 1:
        return known[0]
    means = [figure.mean for figure in known]
    mean = math.fsum(means) / len(means)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in means) / (len(means) - 1))
    sizes = [figure.n for figure in known]
    n, unit = sizes[0], known[0].unit
    if unit == "share" and all(sizes) and min(means) >= 0 and max(means) <= 1:
        errors = [figure.error for figure in known if figure.error is not None]
        own = mean * (1 - mean) / min(sizes)
        rows = math.fsum(e**2 for e in errors) / len(errors) if errors else own
        low, high = _share_interval(mean, sd**2 / len(means), rows, min(sizes))
    else:
        half = t_quantile(0.975, len(means) - 1) * sd / math.sqrt(len(means))
        low, high = mean - half, mean + half
    return Figure(mean=mean, sd=sd, n=n, seeds=len(means), low=low, high=high, unit=unit)


def _share_interval(mean: float, variance: float, rows: float, n: int) -> tuple[float, float]:
    """Return Wilson's interval for the variances over seeds and over n rows."""
    if rows == 0:
        return wilson(mean * n, n)
    size = max(1, round(mean * (1 - mean) / (rows + variance)))
    return wilson(mean * size, size)


def _seconds(reports: Sequence[Report]) -> float | None:
    """Return what a cell took: training and evaluation, summed over its seeds."""
    spent = [report.train_seconds for report in reports if report.train_seconds is not None]
    spent += [report.eval_seconds for report in reports if report.eval_seconds is not None]
    return round(math.fsum(spent), 1) if spent else None


def read_results(path: str | PathLike[str]) -> list[ResultRow]:
    """Read `results.json`; a file that is not there holds no rows.

    Raises:
        DataError: If it is there and is no list of results.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        return [ResultRow.model_validate(row) for row in json.loads(path.read_text("utf-8"))]
    except (ValidationError, TypeError, ValueError) as error:
        what = f"{path} is no list of results ({str(error).splitlines()[0]})."
        raise DataError(what, "Restore it from version control.") from error


def publish(rows: Iterable[ResultRow], path: str | PathLike[str]) -> list[ResultRow]:
    """Merge rows into `results.json` by name; an open row never replaces a measured one.

    Returns:
        All rows now in the file, in its order: old ones keep their place.
    """
    merged = {row.name: row for row in read_results(path)}
    for row in rows:
        if row.is_open and row.name in merged and not merged[row.name].is_open:
            continue
        merged[row.name] = row
    write_json_atomic(path, list(merged.values()))
    return list(merged.values())


def render(path: str | PathLike[str], titles: dict[str, str] | None = None) -> Path:
    """Write `results.md` and `plots/*.png` beside a `results.json`.

    Args:
        path: The `results.json`.
        titles: Titles of sections by the first part of the rows' names.
    """
    path = Path(path)
    text = page(read_results(path), path.parent, titles)
    return write_text_atomic(path.with_suffix(".md"), text)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m reftune.report.results", description="Write the page of results."
    )
    parser.add_argument("--results", default="docs/results.json", help="the results file")
    verbs = parser.add_subparsers(dest="verb")
    add = verbs.add_parser("add", help="publish a measurement first")
    add.add_argument("file", help="what a benchmark or the gates print with --json, or a report")
    add.add_argument("--section", required=True, help="speed, parity, gates, demo ...")
    add.add_argument("--command", required=True, help="the command that made the file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and plots, with `add` after publishing a file; returns the exit code."""
    arguments = _arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path = Path(arguments.results)
    try:
        if arguments.verb == "add":
            from reftune.report.measured import add

            rows = add(arguments.file, arguments.section, arguments.command, path)
            log.info("%d rows in section %s", len(rows), arguments.section)
        log.info("wrote %s", render(path))
    except ReftuneError as error:
        log.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
