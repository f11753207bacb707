"""Benchmarks, checks against bars, gates and reports as rows of `docs/results.json`.

What a file is, is told by what it holds:

| holds | from | rows |
|---|---|---|
| `figures` | a run's `report.json` | one per figure of base, run and rivals |
| `gates` | `python -m reftune.nano gates --json` | one per gate, with bar and verdict |
| `rows` with `value` and `bar` | `benchmarks/parity_pyreft.py --json` | one per check |
| `rows` with measures | `benchmarks/step.py --json` | one per row and measure |

Measures are the fields `seconds`, `*_bytes`, `ratio_*` and `tokens_per_second`. A row with `line`
and `x` is a point of a curve in the picture of its ratios.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from reftune.errors import DataError
from reftune.report.model import Report, ResultRow
from reftune.report.results import publish, render, rows_of

VERSIONS = ("reftune", "torch", "transformers", "peft", "pyreft", "pyvene", "python")
QUIET = {*VERSIONS, "shape", "seed", "quick", "peak_bytes"}
"""Settings that are no part of the sentence about settings."""


def add(
    file: str | PathLike[str],
    section: str,
    command: str,
    path: str | PathLike[str] = "docs/results.json",
) -> list[ResultRow]:
    """Publish what a JSON file holds and write the page again.

    Args:
        file: A file of one of the forms above.
        section: First part of the rows' names: `speed`, `parity`, `gates`, `demo` ...
        command: The command that made the file.
        path: The results file.

    Returns:
        The rows that were added or replaced.

    Raises:
        DataError: If the file cannot be read or has none of these forms.
    """
    try:
        data = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = f"{file} cannot be read as JSON ({error})."
        raise DataError(what, "Give what a benchmark prints with --json, or a report.") from error
    return publish_measured(data, section, command, path)


def publish_measured(
    data: Any, section: str, command: str, path: str | PathLike[str] = "docs/results.json"
) -> list[ResultRow]:
    """Publish the result of a measurement and write the page again; see `add`."""
    rows = measured_rows(data, section, command)
    publish(rows, path)
    render(path)
    return rows


def measured_rows(data: Any, section: str, command: str) -> list[ResultRow]:
    """Return a measurement as rows.

    >>> gates = {"model": "nano", "gates": [{"name": "recall", "value": 0.97, "low": 0.9,
    ...          "high": 0.99, "n": 100, "bar": "at least 0.95", "holds": True}]}
    >>> [(row.name, row.mean) for row in measured_rows(gates, "gates", "make results-gates")]
    [('gates/nano/recall', 0.97)]

    Raises:
        DataError: If it has none of the known forms, or holds nothing.
    """
    try:
        rows = list(_rows(data, section, command))
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        what = f"This measurement cannot be published ({type(error).__name__}: {error})."
        raise DataError(what, _FORMS) from error
    if not rows:
        raise DataError("This measurement holds no rows.", _FORMS)
    return rows


_FORMS = "It must hold `figures`, `gates`, or `rows` with measures or with value and bar."


def _rows(data: Any, section: str, command: str) -> Iterator[ResultRow]:
    if "figures" in data:
        return _report(data, section, command)
    if "gates" in data:
        return _gates(data, section, command)
    if any("bar" in row for row in data["rows"]):
        return _checks(data, section, command)
    return _measures(data, section, command)


def _report(data: Mapping[str, Any], section: str, command: str) -> Iterator[ResultRow]:
    """Give the figures of the base model, of the run and of what it was compared with."""
    report = Report.model_validate(data)
    rivals = (report.model_extra or {}).get("rivals", {})
    ours = {
        name: figure
        for name, figure in report.figures.items()
        if not any(name.startswith(f"{rival}_") for rival in rivals)
    }
    own = report.model_copy(update={"figures": ours})
    yield from rows_of(f"{section}/{'+'.join(report.methods) or report.name}", [own], command)
    for rival, facts in rivals.items():
        figures = {
            f"adapter_{name.removeprefix(f'{rival}_')}": figure
            for name, figure in report.figures.items()
            if name.startswith(f"{rival}_")
        }
        other = report.model_copy(update={"figures": figures, "methods": [rival], **facts})
        yield from rows_of(f"{section}/{rival}", [other], command)


def _gates(data: Mapping[str, Any], section: str, command: str) -> Iterator[ResultRow]:
    place = data.get("model", "") + (" quick" if data.get("quick") else "")
    for gate in data["gates"]:
        yield ResultRow(
            name=_name(section, place, gate["name"]),
            model=data.get("model", ""),
            metric="value",
            mean=gate["value"],
            low=gate.get("low"),
            high=gate.get("high"),
            n=gate.get("n"),
            seeds=1,
            unit="",
            command=command,
            versions=_versions(data),
            bar=gate.get("bar") or "",
            holds=gate.get("holds"),
            starred=bool(gate.get("starred")),
        )


def _checks(data: Mapping[str, Any], section: str, command: str) -> Iterator[ResultRow]:
    for row in data["rows"]:
        bar = row.get("bar")
        yield ResultRow(
            name=_name(section, row.get("d", ""), row["name"]),
            metric="value",
            mean=row["value"],
            seeds=1,
            unit="",
            note=row.get("note", ""),
            command=command,
            versions=_versions(data),
            setting=_setting(data),
            bar=f"at most {bar:g}" if isinstance(bar, int | float) else bar or "",
            holds=row.get("holds"),
        )


def _measures(data: Mapping[str, Any], section: str, command: str) -> Iterator[ResultRow]:
    """Give the measures of each row, the goals set for them, and what was left out as open."""
    goals = {(goal["d"], goal["name"], goal["column"]): goal for goal in data.get("goals", ())}
    places = []
    for row in data["rows"]:
        place = _place(row, data.get("settings", {}))
        places.append(place)
        first = True
        for key, unit in _units(row):
            goal = goals.get((row.get("d"), row["name"], key), {})
            name = _name(section, place, row["name"])
            yield ResultRow(
                name=name if first else f"{name}:{key}",
                trainable=row.get("trainable"),
                metric=key,
                mean=row[key],
                seeds=1,
                unit=unit,
                command=command,
                versions=_versions(data),
                setting=_setting(data),
                bar=goal.get("bar", ""),
                holds=goal.get("holds"),
                **({"line": row["line"], "x": row["x"]} if unit == "ratio" and "x" in row else {}),
            )
            first = False
    for place in dict.fromkeys(places):
        for name, why in data.get("skipped", {}).items():
            note = str(why).splitlines()[0].split(". ")[0]
            yield ResultRow(name=_name(section, place, name), note=note)


def _units(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Give the measures of a row that have a value, with their units."""
    for key, value in row.items():
        if value is None:
            continue
        if key == "seconds":
            yield key, "seconds"
        elif key.endswith("_bytes"):
            yield key, "bytes"
        elif key.startswith("ratio_"):
            yield key, "ratio"
        elif key == "tokens_per_second":
            yield key, "tokens/s"


def _place(row: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Name shape and device of a row; a quick run has its own, to replace no full one."""
    parts = [str(row.get("d", ""))]
    parts += [settings[key] for key in ("device", "dtype") if settings.get(key) not in _USUAL]
    parts += ["quick"] if settings.get("quick") else []
    return " ".join(part for part in parts if part)


_USUAL = (None, "cpu", "float32")


def _name(section: str, place: str, name: str) -> str:
    return "/".join(part for part in (section, place, name.replace(":", ",")) if part)


def _versions(data: Mapping[str, Any]) -> dict[str, str]:
    found = {**data.get("settings", {}), **data.get("versions", {})}
    return {key: str(found[key]) for key in VERSIONS if key in found}


def _setting(data: Mapping[str, Any]) -> str:
    """Return the settings as a sentence: `rows 8, width 256, device cpu`."""
    settings = data.get("settings", {})
    shown = {key: value for key, value in settings.items() if key not in QUIET and value}
    return ", ".join(f"{key} {value}".replace("_", " ") for key, value in shown.items())
