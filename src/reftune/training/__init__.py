"""Supervised training: rows, loop, run folders, stages and sweeps.

`train(recipe)` and `sweep(recipe, grid)` are the doors; the rest can be used on its own.
"""

from __future__ import annotations

from typing import Any

_DOORS = {"train": "stages", "sweep": "sweep", "ReftTrainer": "trainer", "RunFolder": "runfolder"}


def __getattr__(name: str) -> Any:
    """Import a door on first use: `--help` must not pay for torch."""
    if name not in _DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_DOORS[name]}"), name)
