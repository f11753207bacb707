"""Runs the cells of a grid, one after the other, and publishes what is finished.

    python -m reftune.report.grid recipes/grids/families.yaml --max-minutes 30
    python -m reftune.report.grid recipes/grids/families.yaml --only loreft --seed 1
    python -m reftune.report.grid recipes/grids/families.yaml --only "loreft*"

Finished cells are skipped, an interrupted cell is resumed, and a cell that was run with another
recipe is kept under a new name and run again. Open cells are printed and published as open.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path

from reftune.errors import ReftuneError
from reftune.report.cells import Cell, Grid, read_grid
from reftune.report.model import Report, ResultRow
from reftune.report.pairs import paired_rows, training_seconds
from reftune.report.results import publish, render, rows_of

log = logging.getLogger(__name__)

Train = Callable[..., Report]


def run_cell(cell: Cell, train: Train | None = None) -> Report:
    """Train one cell, from its last checkpoint if it was interrupted.

    Args:
        cell: The cell.
        train: What trains a recipe; default is `reftune.training.stages.train`.
    """
    if train is None:
        from reftune.training.stages import train as train
    resume = cell.matches() and not (cell.folder / "report.json").is_file()
    if cell.folder.exists() and not resume:
        set_aside(cell.folder)
    return train(cell.recipe, resume=resume, progress=False)


def set_aside(folder: Path) -> Path:
    """Rename a run folder of another recipe, so that nothing is lost or mixed."""
    number = 1
    while (other := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(other)
    log.warning("%s holds another recipe; it is now %s", folder, other.name)
    return other


def run_grid(
    grid: Grid,
    max_minutes: float | None = None,
    train: Train | None = None,
    on_cell: Callable[[Cell], None] | None = None,
) -> list[tuple[Cell, str]]:
    """Train the open cells of a grid.

    No cell is started that would not fit in the time left, judged by the longest one so far.

    Args:
        grid: The grid.
        max_minutes: Time to spend; None is no limit.
        train: What trains a recipe.
        on_cell: Called after each finished cell, to publish early.

    Returns:
        Cells that failed, with the message. They do not stop the others.
    """
    start, longest, failed = time.monotonic(), 0.0, []
    waiting = [cell for cell in grid.cells if cell.report() is None]
    for number, cell in enumerate(waiting):
        spent = time.monotonic() - start
        if max_minutes is not None and spent + longest > max_minutes * 60:
            log.warning("stopped after %.1f min: %d cells open", spent / 60, len(waiting) - number)
            break
        log.info("[%d/%d] %s seed %d", number + 1, len(waiting), cell.row, cell.seed)
        began = time.monotonic()
        try:
            run_cell(cell, train)
        except ReftuneError as error:
            failed.append((cell, str(error)))
            log.error("%s seed %d failed: %s", cell.row, cell.seed, error)
            continue
        longest = max(longest, time.monotonic() - began)
        if on_cell is not None:
            on_cell(cell)
    return failed


def grid_rows(grid: Grid, command: str) -> list[ResultRow]:
    """Return the rows to publish: joined seeds where all are done, else an open row.

    Args:
        grid: The grid.
        command: The command that makes the figures.
    """
    found: dict[str, ResultRow] = {}
    open_rows: list[ResultRow] = []
    for name, cells in grid.rows().items():
        reports = [report for cell in cells if (report := cell.report()) is not None]
        own = f"{command} --only {name}"
        for row in rows_of(name, reports, own) if reports else []:
            row.note = cells[0].note
            if row.name.split(":")[0] == name:
                row.line, row.x = cells[0].point.line, _place(cells)
            found.setdefault(row.name, row)
        if len(reports) < len(cells):
            open_rows.append(_open_row(name, cells, len(reports)))
            # Some seeds only would look like a finished figure.
            found = {key: row for key, row in found.items() if key.split(":")[0] != name}
    for row in paired_rows(grid, command):
        found[row.name] = row
    for name in grid.base_rows:
        if name not in found:
            open_rows.append(ResultRow(name=name, method=_baseline(name), note=grid.note))
    named = {row.name: row for row in [*found.values(), *open_rows]}
    wanted = [*grid.base_rows, *grid.rows()]
    first = [named[name] for name in wanted if name in named]
    return first + [row for row in named.values() if row not in first and _wanted(row, wanted)]


def _place(cells: Sequence[Cell]) -> dict[str, float]:
    """Return where a row stands on the axes of pictures; seconds too, once they are known."""
    x = cells[0].point.x
    seconds = training_seconds(cells) if x else None
    return x if seconds is None else {**x, "train_seconds": round(seconds, 2)}


def _baseline(name: str) -> str:
    """Return the method of a baseline's row: `heft/majority@nano-gpt2` is of `majority`."""
    return name.rpartition("/")[2].partition("@")[0]


def _wanted(row: ResultRow, names: Sequence[str]) -> bool:
    """Return whether a row belongs to the grid: a base row nobody asked for does not."""
    return row.name.split(":")[0] in names


def _open_row(name: str, cells: Sequence[Cell], done: int) -> ResultRow:
    recipe = cells[0].recipe
    note = f"{done} of {len(cells)} seeds" if done else cells[0].note
    return ResultRow(
        name=name,
        method="+".join(stage.adapter.method for stage in recipe.stages),
        task=recipe.task.name,
        model=recipe.model.name,
        note=note,
    )


def publish_grid(grid: Grid, path: str | PathLike[str], command: str) -> list[ResultRow]:
    """Write the grid's rows to `results.json`, and the page and plots from it."""
    rows = publish(grid_rows(grid, command), path)
    render(path)
    return rows


def status(grid: Grid) -> str:
    """Return one line per cell: done or open, with its main figure."""
    from reftune.report.tables import show_figure

    lines = []
    for cell in grid.cells:
        report = cell.report()
        main = report.primary() if report else None
        shown = f"done  {main[0]} {show_figure(main[1])}" if main else "done" if report else "open"
        lines.append(f"{cell.row:<40} seed {cell.seed:<4} {shown}")
    done = sum(1 for cell in grid.cells if cell.report() is not None)
    return "\n".join([*lines, f"{done} of {len(grid.cells)} cells done"])


def _parallel(grid: Grid, arguments: argparse.Namespace) -> list[tuple[Cell, str]]:
    """Run open cells in processes of their own, one thread each by default."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    start = time.monotonic()

    def one(cell: Cell) -> tuple[Cell, str] | None:
        if arguments.max_minutes and time.monotonic() - start > arguments.max_minutes * 60:
            return None
        command = [sys.executable, "-m", "reftune.report.grid", str(arguments.grid)]
        command += ["--only", cell.row, "--seed", str(cell.seed), "--no-publish"]
        command += ["--output", arguments.output] if arguments.output else []
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        log.info("%s seed %d: %s", cell.row, cell.seed, "failed" if done.returncode else "done")
        return (cell, last[0]) if done.returncode else None

    waiting = [cell for cell in grid.cells if cell.report() is None]
    with ThreadPoolExecutor(arguments.workers) as pool:
        return [failure for failure in pool.map(one, waiting) if failure is not None]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m reftune.report.grid", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("grid", type=Path, help="grid file, see reftune.report.cells")
    parser.add_argument("--max-minutes", type=float, help="start no cell that would not fit")
    parser.add_argument("--workers", type=int, default=1, help="cells at the same time")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    parser.add_argument("--only", default="*", help="only the row of this name; * for any letters")
    parser.add_argument("--seed", type=int, help="only this seed")
    parser.add_argument("--output", default="", help="folder of run folders")
    parser.add_argument("--results", default="docs/results.json", help="file to publish to")
    parser.add_argument("--no-publish", action="store_true", help="train only")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a grid from the command line; returns the exit code."""
    arguments = _arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        grid = read_grid(arguments.grid, arguments.output)
    except ReftuneError as error:
        log.error("%s", error)
        return error.exit_code
    whole = replace(grid)
    grid.cells = [cell for cell in grid.cells if _chosen(cell, arguments)]
    if not grid.cells:
        rows = ", ".join(dict.fromkeys(cell.row for cell in whole.cells))
        log.error("No cell matches. Rows: %s.", rows)
        return 2
    if arguments.list:
        print(status(grid))
        return 0
    command = f"python -m reftune.report.grid {arguments.grid}"

    def publish_all(_: Cell | None = None) -> None:
        if not arguments.no_publish:
            publish_grid(whole, arguments.results, command)

    try:
        if arguments.workers > 1:
            failed = _parallel(grid, arguments)
        else:
            failed = run_grid(grid, arguments.max_minutes, on_cell=publish_all)
    except KeyboardInterrupt:
        log.error("Interrupted. The same command goes on where it stopped.")
        return 130
    publish_all()
    print(status(grid))
    for cell, message in failed:
        print(f"failed: {cell.row} seed {cell.seed}: {message}", file=sys.stderr)
    return 1 if failed else 0


def _chosen(cell: Cell, arguments: argparse.Namespace) -> bool:
    if arguments.seed is not None and cell.seed != arguments.seed:
        return False
    return any(fnmatchcase(cell.row, place + arguments.only) for place in ("", "*/"))


if __name__ == "__main__":
    sys.exit(main())
