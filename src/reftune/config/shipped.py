"""Recipes that come with reftune: in the repository's `recipes/`, in an installed package too."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from reftune.config.types import hint
from reftune.errors import RecipeError

PACKAGE = Path(__file__).resolve().parent.parent
PLACES = (PACKAGE / "_recipes", PACKAGE.parent.parent / "recipes")
"""Inside an installed package, and beside `src` in a clone."""
GRIDS = "grids"
"""Folder of grid files, which are no recipes."""


@dataclass(frozen=True)
class Shipped:
    """A recipe file and the facts in its header."""

    name: str
    """Path below the recipes folder, without `.yaml`."""
    path: Path
    title: str
    """First line of the header."""
    measured: str
    """What the header says after `measured:`, or that it was not run here."""


def folder() -> Path | None:
    """Return the recipes folder, or None if there is none."""
    return next((place for place in PLACES if place.is_dir()), None)


def shipped() -> list[Shipped]:
    """Return all recipes that come with reftune, sorted by name."""
    root = folder()
    if root is None:
        return []
    files = [path for path in sorted(root.rglob("*.yaml")) if GRIDS not in path.parts]
    return [_describe(path, root) for path in files]


def find(name: str) -> Path:
    """Return the file of a recipe: a path, or the name of a shipped recipe.

    Raises:
        RecipeError: If there is neither.
    """
    path = Path(name)
    if path.exists() or path.suffix in (".yaml", ".yml"):
        shipped_path = (folder() or path) / name.removeprefix("recipes/")
        return path if path.exists() or not shipped_path.is_file() else shipped_path
    known = {item.name: item.path for item in shipped()}
    short = {item.path.stem: item.path for item in shipped()}
    found = known.get(name) or short.get(name)
    if found is None:
        what = f'There is no recipe file or shipped recipe "{name}".'
        raise RecipeError(what, f"{hint(name, known).strip()} `reftune recipes` lists them all.")
    return found


def _describe(path: Path, root: Path) -> Shipped:
    header = _header(path.read_text(encoding="utf-8"))
    marks = ("measured:", "not run here")
    measured = [line for line in header if line.lower().startswith(marks)]
    rest = header[header.index(measured[0]) :] if measured else []
    return Shipped(
        name=path.relative_to(root).with_suffix("").as_posix(),
        path=path,
        title=header[0] if header else "",
        measured=_value(rest),
    )


def _header(text: str) -> list[str]:
    """Return the comment lines at the top, without their marks."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return [line for line in lines if line]


def _value(lines: list[str]) -> str:
    """Join a header entry with the lines that carry it on, up to the next `word:`."""
    if not lines:
        return ""
    kept = [lines[0].removeprefix("measured:").strip()]
    for line in lines[1:]:
        if re.match(r"\w+:", line):
            break
        kept.append(line)
    return " ".join(kept)
