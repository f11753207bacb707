"""The cells of a grid: which runs a results table needs, and which of them are done.

A grid file:

    name: families                       # section of the table, unless there are several tasks
    recipe: recipes/nano/families.yaml   # what all cells share
    tasks: [families, passages]          # optional; names or mappings as in a recipe
    models: [nano, nano-gpt2]            # optional
    seeds: [1, 2, 3]
    set: {epochs: 2}                     # optional; changes of all cells
    note: smoke figure                   # optional; shown beside every row
    rows:
      - {method: base}                   # scored beside the first run of the rows, not trained
      - {method: loreft, set: {adapter.rank: 4}}
      - {name: loreft-r16, method: loreft, set: {adapter.rank: 16}}

Rows may come from several recipes. Then a name has a place, and each place its own base row:

      - {name: svamp/base, method: base}
      - {name: svamp/loreft, recipe: recipes/smoke/svamp.yaml}

A row may be a point of a curve, and be tested against others on the same questions:

    tested: choice_accuracy              # optional; what is tested, default the main figure
    rows:
      - {method: majority}               # the most frequent training label; nothing is trained
      - {name: lora-3, line: lora, x: {epochs: 3}, set: {epochs: 3}}
      - {name: heft-3, line: heft, x: {epochs: 3}, against: [lora-3], as_long_as: [lora]}

Rows with `x` are drawn over it, and over the seconds they trained, a line for each `line`.
`against` names rows; `as_long_as` names lines: of those that trained at least as long as this one,
the row that trained least.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from reftune.config import loader
from reftune.config.recipe import Recipe
from reftune.config.shipped import find
from reftune.errors import RecipeError, ReftuneError, nearest
from reftune.report.model import BASELINES, Report, base_name

log = logging.getLogger(__name__)

GRID_KEYS = ("name", "recipe", "tasks", "models", "seeds", "set", "note", "rows", "output")
GRID_KEYS += ("tested",)
ROW_KEYS = ("name", "method", "recipe", "set", "note", "seeds")
ROW_KEYS += ("line", "x", "against", "as_long_as")
BASE = "base"


@dataclass(frozen=True)
class Point:
    """What a row of a grid is beside a table row: a point of a curve, and half of paired tests."""

    line: str = ""
    x: dict[str, float] = field(default_factory=dict)
    against: tuple[str, ...] = ()
    """Names of rows it is tested against."""
    as_long_as: tuple[str, ...] = ()
    """Lines of which the row is taken that trained for as long."""


@dataclass(frozen=True)
class Cell:
    """One run of a grid: a row of the table at one seed."""

    row: str
    """Name of the published row, `families/loreft`."""
    seed: int
    recipe: Recipe
    note: str = ""
    point: Point = field(default_factory=Point)

    @property
    def folder(self) -> Path:
        """Run folder of the cell."""
        return Path(self.recipe.output) / self.recipe.name

    def report(self) -> Report | None:
        """Return the cell's report if it is finished: same recipe, report readable."""
        if not self.matches() or not (self.folder / "report.json").is_file():
            return None
        try:
            report = Report.read(self.folder)
        except ReftuneError as error:
            log.warning("%s is run again: %s", self.folder, error)
            return None
        needs_base = self.recipe.evaluation.compare_base
        has_base = any(name.startswith("base_") for name in report.figures)
        return None if needs_base and not has_base else report

    def matches(self) -> bool:
        """Return whether the run folder holds this cell's recipe."""
        path = self.folder / "recipe.yaml"
        if not path.is_file():
            return False
        try:
            return comparable(loader.load(path)) == comparable(self.recipe)
        except ReftuneError:
            return False


@dataclass
class Grid:
    """A results table: its cells, and the rows of the base model that come with them."""

    name: str
    cells: list[Cell] = field(default_factory=list)
    base_rows: list[str] = field(default_factory=list)
    note: str = ""
    tested: str = ""
    """Metric of the paired tests; empty: the main one."""

    def rows(self) -> dict[str, list[Cell]]:
        """Return the cells of every row, in the order of the file."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(cell.row, []).append(cell)
        return found


def comparable(recipe: Recipe) -> Recipe:
    """Return a recipe without what does not change its figures."""
    evaluation = replace(recipe.evaluation, compare_base=False, batch_size=1)
    return replace(recipe, evaluation=evaluation, output="", track=[])


def read_grid(path: str | PathLike[str], output: str = "") -> Grid:
    """Read a grid file and check the recipe of every cell.

    Args:
        path: The YAML file.
        output: Folder of run folders; default is the file's `output`, else `runs/results`.

    Raises:
        RecipeError: If the file or the recipe of a cell is wrong.
    """
    path = Path(path)
    plan = _read(path)
    output = output or plan.get("output", "runs/results")
    tasks = plan.get("tasks") or [None]
    models = plan.get("models") or [None]
    name, note, tested = plan.get("name", path.stem), plan.get("note", ""), plan.get("tested", "")
    grid = Grid(str(name), note=note, tested=tested)
    for task in tasks:
        section = _task_name(task) if len(tasks) > 1 else grid.name
        for model in models:
            _add_cells(grid, plan, section, task, model if len(models) > 1 else None, model, output)
    _check_unique(grid, path)
    _check_tests(grid, path)
    return grid


def _add_cells(
    grid: Grid,
    plan: dict[str, Any],
    section: str,
    task: Any,
    suffix: str | None,
    model: Any,
    output: str,
) -> None:
    """Add the cells of one task on one model."""
    ending = f"@{suffix}" if suffix else ""
    open_bases = {
        f"{section}/{row.get('name', BASE)}{ending}": None
        for row in plan["rows"]
        if row.get("method") == BASE
    }
    grid.base_rows += [
        f"{section}/{row.get('name', row['method'])}{ending}"
        for row in plan["rows"]
        if row.get("method") in BASELINES
    ]
    shared = _settings(plan.get("set"))
    shared += [f"task={json.dumps(task)}"] if task is not None else []
    shared += [f"model={json.dumps(model)}"] if model is not None else []
    for row in plan["rows"]:
        if row.get("method") in BASELINES:
            continue
        name = f"{section}/{row.get('name', row.get('method', 'run'))}{ending}"
        changes = _method(row) + shared + _settings(row.get("set"))
        source = find(row.get("recipe", plan.get("recipe", "")))
        for seed in row.get("seeds", plan.get("seeds", [42])):
            # The first run of a place scores the base model for all of them.
            with_base = base_name(name) in open_bases
            open_bases.pop(base_name(name), None)
            own = [f"seed={seed}", f"name={name}/seed-{seed}", f"output={output}"]
            own.append(f"evaluation.compare_base={json.dumps(with_base)}")
            recipe = loader.load(source, [*changes, *own])
            note = row.get("note", grid.note)
            grid.cells.append(Cell(name, seed, recipe, note, _point(row, section, ending)))
    if open_bases:
        what = f"The grid has a base row {next(iter(open_bases))} and no other row beside it."
        raise RecipeError(what, "Give rows of one place names with the same first part.")


def _point(row: dict[str, Any], section: str, ending: str) -> Point:
    """Return where a row stands on curves and what it is tested against.

    Raises:
        RecipeError: If a place is no number, or names are no list.
    """
    x = row.get("x") or {}
    if not isinstance(x, dict) or not all(isinstance(v, int | float) for v in x.values()):
        raise RecipeError(f"x of a row is {x!r}.", "Write numbers by name: x: {epochs: 3}.")
    for key in ("against", "as_long_as"):
        if not isinstance(row.get(key, []), list):
            raise RecipeError(f"{key} of a row is {row[key]!r}.", f"Write a list: {key}: [lora].")
    return Point(
        line=str(row.get("line", row.get("method", ""))),
        x={str(key): float(value) for key, value in x.items()},
        against=tuple(f"{section}/{name}{ending}" for name in row.get("against", ())),
        as_long_as=tuple(row.get("as_long_as", ())),
    )


def _method(row: dict[str, Any]) -> list[str]:
    return [f"adapter.method={row['method']}"] if "method" in row else []


def _settings(changes: dict[str, Any] | None) -> list[str]:
    """Turn a mapping of dotted keys into overrides."""
    return [f"{key}={json.dumps(value)}" for key, value in (changes or {}).items()]


def _task_name(task: Any) -> str:
    return str(task.get("name", "own")) if isinstance(task, dict) else str(task)


def _read(path: Path) -> dict[str, Any]:
    """Read a grid file with the same YAML rules as recipes."""
    from reftune.config.nodes import Faults, parse

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"The grid {path} cannot be read: {error}.", "Give a YAML file."
        ) from error
    faults = Faults()
    root = parse(text, str(path), faults)
    faults.check(str(path))
    plan = root.plain()
    _known(plan, GRID_KEYS, str(path))
    if not isinstance(plan.get("rows"), list) or not plan["rows"]:
        raise RecipeError(f"{path} has no rows.", "Write `rows:` with one `- {method: ...}` each.")
    for number, row in enumerate(plan["rows"]):
        _known(row, ROW_KEYS, f"{path}: rows.{number}")
    if "recipe" not in plan and any("recipe" not in row for row in plan["rows"]):
        raise RecipeError(f"{path} names no recipe.", "Write `recipe:` with the shared recipe.")
    return plan


def _known(values: Any, keys: Sequence[str], where: str) -> None:
    if not isinstance(values, dict):
        raise RecipeError(f"{where} is no mapping.", f"It may hold: {', '.join(keys)}.")
    for key in values:
        if key not in keys:
            close = difflib.get_close_matches(key, keys, n=1)
            hint = f'Did you mean "{close[0]}"?' if close else f"Known: {', '.join(keys)}."
            raise RecipeError(f'{where}: unknown key "{key}".', hint)


def _check_unique(grid: Grid, path: Path) -> None:
    seen: set[tuple[str, int]] = set()
    for cell in grid.cells:
        if (cell.row, cell.seed) in seen:
            what = f"{path} has two rows {cell.row} at seed {cell.seed}."
            raise RecipeError(what, "Give them different names with `name:`.")
        seen.add((cell.row, cell.seed))


def _check_tests(grid: Grid, path: Path) -> None:
    """Check that rows are tested against rows and lines that are there, of the same seeds."""
    rows = grid.rows()
    lines = {cells[0].point.line for cells in rows.values()}
    for name, cells in rows.items():
        seeds, point = [cell.seed for cell in cells], cells[0].point
        for other in point.against:
            if other not in rows:
                what = f'{path}: {name} is tested against "{other}", which is no row.'
                raise RecipeError(what, nearest(other, rows))
            if [cell.seed for cell in rows[other]] != seeds:
                raise RecipeError(f"{path}: {name} and {other} have other seeds.", "Give the same.")
        for line in point.as_long_as:
            if line not in lines:
                what = f'{path}: {name}: there is no line "{line}".'
                raise RecipeError(what, nearest(line, lines))
