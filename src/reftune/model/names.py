"""Names of base models, as recipes and artefacts write them."""

from __future__ import annotations

from pathlib import Path

from reftune.nano import NAMES, WEIGHTS


def public_name(name_or_path: str | None) -> str | None:
    """Return `nano` for the folder the embedded model was loaded from, else the name itself.

    >>> public_name("Qwen/Qwen3-0.6B")
    'Qwen/Qwen3-0.6B'
    """
    if not name_or_path:
        return name_or_path
    path = Path(name_or_path)
    if path.name in NAMES and path.parent.resolve() == WEIGHTS.resolve():
        return path.name
    return name_or_path


def is_embedded(name: str) -> bool:
    """Say whether a model is one of those that come with the package."""
    return name in NAMES
