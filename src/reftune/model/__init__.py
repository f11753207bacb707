"""The seam to transformers and PEFT: only here are their internals known.

What `adapters` offers is imported on first use: checking a recipe needs positions and layers alone,
and `adapters` brings transformers with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reftune.model.adapters import (
        Handle,
        Placement,
        adapter_names,
        attach,
        detach,
        mix,
        off,
        prompt_scope,
        set_strength,
        use,
    )
    from reftune.model.positions import PositionRule

__all__ = [
    "Handle",
    "Placement",
    "PositionRule",
    "adapter_names",
    "attach",
    "detach",
    "mix",
    "off",
    "prompt_scope",
    "set_strength",
    "use",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'reftune.model' has no attribute {name!r}")
    home = "positions" if name == "PositionRule" else "adapters"
    value = getattr(import_module(f"reftune.model.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
