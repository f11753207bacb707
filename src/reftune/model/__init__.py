"""The seam to transformers and PEFT: only here are their internals known."""

from __future__ import annotations

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
