"""Published results: run folders in, `docs/results.json`, `docs/results.md` and plots out.

`results.json` is the only source; the page and the plots are made from it and never edited.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

from pydantic import ValidationError

from reftune.errors import DataError
from reftune.inference.stats import t_quantile, wilson
from reftune.report.files import write_json_atomic, write_text_atomic
from reftune.report.model import Figure, Report, ResultRow
from reftune.report.plots import forest
from reftune.report.tables import result_table

log = logging.getLogger(__name__)

SEED_SUFFIX = re.compile(r"[-_/](?:seed|s)[-_=]?(\d+)$")
COST_UNITS = {"seconds", "bytes", "tokens/s"}
HEAD = """# Results

Made from `results.json` by `python -m reftune.report.results`; do not edit. Values are means over
seeds ± standard deviation over seeds, with a 95 % interval in brackets that covers both the choice
of test rows and the seeds. Bold is the best mean of a table, which is no claim of significance.
`open` is a cell that has not been run yet.
"""


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
    main = main.removeprefix("base_").removeprefix("adapter_")
    rows = []
    for metric in dict.fromkeys(key for report in reports for key in report.figures):
        figures = [report.figures[metric] for report in reports if metric in report.figures]
        is_base = metric.startswith("base_")
        short = metric.removeprefix("base_").removeprefix("adapter_")
        primary = short == main
        owner = _base_name(name) if is_base else name
        rows.append(
            ResultRow(
                name=owner if primary else f"{owner}:{short}",
                method="base" if is_base else "+".join(first.methods),
                task=first.task,
                model=first.model,
                trainable=0 if is_base else first.trainable_parameters,
                metric=short,
                command=command or first.command,
                seconds=None if is_base else _seconds(reports),
                versions=first.versions,
                **join_seeds(figures).model_dump(include=_NUMBERS),
            )
        )
    return rows


_NUMBERS = {"mean", "sd", "seeds", "n", "low", "high", "unit"}


def join_seeds(figures: Sequence[Figure]) -> Figure:
    """Join the figures of several seeds into one.

    A share with n rows: the variance of the mean is p(1−p)/n (choice of rows, which the seeds have
    in common) plus sd²/seeds; the Wilson interval of the number of rows with that variance is
    given. Anything else: the t interval over seeds. A single seed keeps its own interval.

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
        low, high = _share_interval(mean, sd**2 / len(means), min(sizes))
    else:
        half = t_quantile(0.975, len(means) - 1) * sd / math.sqrt(len(means))
        low, high = mean - half, mean + half
    return Figure(mean=mean, sd=sd, n=n, seeds=len(means), low=low, high=high, unit=unit)


def _share_interval(mean: float, variance: float, n: int) -> tuple[float, float]:
    rows = mean * (1 - mean) / n
    if rows == 0:
        return wilson(mean * n, n)
    size = max(1, round(mean * (1 - mean) / (rows + variance)))
    return wilson(mean * size, size)


def _base_name(name: str) -> str:
    """Return the name of the base row beside a cell: the same place, `base`, the same suffix."""
    place, _, last = name.rpartition("/")
    suffix = last[last.index("@") :] if "@" in last else ""
    return f"{place}/base{suffix}".lstrip("/")


def _seconds(reports: Sequence[Report]) -> float | None:
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
    rows = read_results(path)
    sections: dict[str, list[ResultRow]] = {}
    for row in rows:
        sections.setdefault(row.section, []).append(row)
    parts = [HEAD]
    for section, members in sections.items():
        parts += _section(section, members, path.parent, (titles or {}).get(section, ""))
    open_rows = [row.name for row in rows if row.is_open]
    if open_rows:
        parts.append(f"## Open cells\n\n{len(open_rows)} of {len(rows)}: {', '.join(open_rows)}.\n")
    return write_text_atomic(path.with_suffix(".md"), "\n".join(parts))


def _section(section: str, rows: list[ResultRow], folder: Path, title: str) -> list[str]:
    """Return the Markdown of a section and draw its plot."""
    parts = [f"## {title or section.replace('_', ' ').capitalize()}\n"]
    by_metric: dict[str, list[ResultRow]] = {}
    for row in rows:
        by_metric.setdefault(row.metric, []).append(row)
    for index, (metric, members) in enumerate(by_metric.items()):
        if len(by_metric) > 1:
            parts.append(f"### {metric.replace('_', ' ') or 'not measured yet'}\n")
        parts.append(result_table(members).to_markdown() + "\n")
        done = [row for row in members if not row.is_open]
        if len(done) > 1 and len({row.unit for row in done}) == 1:
            stem = section if index == 0 else f"{section}-{metric}"
            name = re.sub(r"[^\w.-]+", "-", stem) + ".png"
            forest(folder / "plots" / name, members, f"{section}: {metric}")
            parts.append(f"![{section}: {metric}](plots/{name})\n")
    commands = list(dict.fromkeys(row.command for row in rows if row.command and not row.is_open))
    if commands:
        shown = "\n".join(commands)
        parts.append(f"<details><summary>Commands</summary>\n\n```bash\n{shown}\n```\n</details>\n")
    return parts


def main() -> None:
    """Write results.md and plots again: `python -m reftune.report.results [docs/results.json]`."""
    import sys

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path = sys.argv[1] if len(sys.argv) > 1 else "docs/results.json"
    log.info("wrote %s", render(path))


if __name__ == "__main__":
    main()
