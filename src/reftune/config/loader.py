"""Recipes from YAML, with all faults at once, and back to YAML.

A recipe is checked before any model loads: unknown keys with the nearest valid name, wrong types,
options of the method, grammar of layers and positions, and values that do not fit each other. Every
fault names its line (or its `--set`), the value and the remedy.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from reftune.config import options as registries
from reftune.config.checks import check_recipe, check_task
from reftune.config.heft import ARRANGED, arranged
from reftune.config.naming import named
from reftune.config.nodes import Faults, Node, from_plain, override, parse
from reftune.config.reading import read_recipe
from reftune.config.recipe import AdapterSpec, Recipe, TaskSpec
from reftune.config.shorthand import canonical, known_keys, route
from reftune.config.types import field_types
from reftune.errors import RecipeError

log = logging.getLogger(__name__)


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    Args:
        path: A YAML file.
        overrides: Changes such as `epochs=5` or `adapter.rank=8`; values are read as YAML. An
            override replaces what stands there: `task=gsm8k` drops other keys of `task`.

    Raises:
        RecipeError: If the file cannot be read or has faults; `faults` lists them.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        what = f"There is no recipe {path}."
        raise RecipeError(
            what, f"{_siblings(path)}`reftune recipes` lists those shipped."
        ) from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder.", "Give the YAML file in it.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}.", "Give a UTF-8 YAML file.") from error
    return loads(text, overrides, str(path), path.stem)


def loads(
    text: str, overrides: Sequence[str] = (), source: str = "The recipe", name: str = ""
) -> Recipe:
    """Read a recipe from YAML text.

    Args:
        text: The YAML.
        overrides: Changes such as `adapter.rank=8`.
        source: What to call it in messages.
        name: Name of the run if the text gives none; `load` passes the file's.

    Raises:
        RecipeError: If it has faults; `faults` lists them.

    >>> loads("model: nano\\ntask: families\\nadapter: {method: loreft, rank: 2}").model.name
    'nano'
    """
    faults = Faults()
    root = parse(text, source, faults)
    _refuse_grid(root, source)
    if name and isinstance(root.value, dict):
        root.value.setdefault("name", Node(name))
    return _finish(root, overrides, source, faults)


def _refuse_grid(root: Node, source: str) -> None:
    """Refuse the other kind of YAML file there is, and name the command for it."""
    if isinstance(root.value, dict) and {"recipe", "rows"} <= root.value.keys():
        raise RecipeError(
            f"{source} is a grid, no recipe.", f"Run it: python -m reftune.report.grid {source}"
        )


def from_dict(
    values: dict[str, Any], overrides: Sequence[str] = (), source: str = "The recipe"
) -> Recipe:
    """Make a recipe of plain values, in the form YAML would give.

    Raises:
        RecipeError: If it has faults; `faults` lists them.
    """
    return _finish(from_plain(values), overrides, source, Faults())


def change(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Return a recipe with overrides applied and checked again.

    Raises:
        RecipeError: If the result has faults.
    """
    return from_dict(to_dict(recipe), overrides) if overrides else recipe


def checked(recipe: Recipe) -> Recipe:
    """Return a recipe made in Python as it would be if it had been read from a file.

    Raises:
        RecipeError: If it has faults; `faults` lists them.
    """
    return from_dict(to_dict(recipe))


def task_of(values: dict[str, Any], overrides: Sequence[str] = ()) -> TaskSpec:
    """Return a task by itself, where nothing is trained: `train` may be missing.

    Args:
        values: The keys under `task:`.
        overrides: Changes such as `task.style=prose`; others are read but not checked together.

    Raises:
        RecipeError: If it has faults; `faults` lists them.
    """
    faults = Faults()
    root = _overridden(from_plain({"task": values}), overrides, "The task", faults)
    recipe, reader = read_recipe(root, faults)
    check_task(recipe.task, reader)
    faults.check("The task")
    return recipe.task


def _finish(root: Node, overrides: Sequence[str], source: str, faults: Faults) -> Recipe:
    recipe, reader = read_recipe(_overridden(root, overrides, source, faults), faults)
    check_recipe(recipe, reader)
    faults.check(source)
    return named(arranged(recipe))


def _overridden(root: Node, overrides: Sequence[str], source: str, faults: Faults) -> Node:
    """Return the document in canonical form with the changes of the command line."""
    root = canonical(root, faults)
    if not root.value:  # no mapping at all: nothing further can be said
        faults.check(source)
    for text in overrides:
        override(root, text, faults, route, known_keys)
        root = canonical(root, faults)
        if "method" in text.partition("=")[0]:
            _drop_foreign_options(root)
    return root


def _drop_foreign_options(root: Node) -> None:
    """Leave out options of the recipe that a method chosen by an override does not have.

    Without this `adapter.method=red` could not be tried on a recipe that sets `rank`. Options that
    came by an override themselves stay, and are refused if they do not fit.
    """
    for stage in root.value["stages"].value if isinstance(root.value["stages"].value, list) else []:
        adapter = stage.value.get("adapter") if isinstance(stage.value, dict) else None
        entries = adapter.value if adapter is not None else None
        method = entries.get("method") if isinstance(entries, dict) else None
        if method is None or not method.origin or method.value not in registries.method_names():
            continue
        known = {*field_types(AdapterSpec), *field_types(registries.method_config(method.value))}
        for name in [name for name in entries if name not in known and not entries[name].origin]:
            log.info("%s of the recipe does not apply to %s: left out", name, method.value)
            del entries[name]


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain values that `from_dict` reads back to an equal recipe.

    Options stand beside the method, task or objective they belong to. What follows from `heft` is
    left out of the stages.
    """
    values = _plain(recipe)
    for task in (values["task"], *values["evaluation"]["also"].values()):
        task |= task.pop("options")
    for stage in values["stages"]:
        stage["adapter"] |= stage["adapter"].pop("options")
        options = stage.pop("objective_options")
        if options:
            stage["objective"] = {"name": stage["objective"], **options}
        for key in ARRANGED if recipe.heft else ():
            del stage[key]
        if recipe.heft:
            del stage["optimiser"]["below_lr"]
    if recipe.heft is None:
        del values["heft"]
    first = ["name", "model", "task", *(["heft"] if recipe.heft else []), "stages"]
    return {key: values[key] for key in [*first, *(key for key in values if key not in first)]}


def dump(recipe: Recipe) -> str:
    """Return a recipe as YAML with every value written out, defaults included.

    >>> recipe = loads("task: families")
    >>> loads(dump(recipe)) == recipe
    True
    """
    return yaml.dump(
        to_dict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class _Dumper(yaml.SafeDumper):
    """Writes short lists in one line and floats so that they are read back as floats."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write_list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    flat = not any(isinstance(item, dict | list) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=flat)


_Dumper.add_representer(list, _write_list)


def _siblings(path: Path) -> str:
    """Name the nearest recipe in the same folder."""
    import difflib

    names = [item.name for item in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f'Did you mean "{path.parent / close[0]}"? ' if close else ""
