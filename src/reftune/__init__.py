"""reftune: adapt language models by their representations and by rewards.

*Representation* fine-tuning edits hidden states of a frozen model with small trained interventions.
*Reinforced* fine-tuning trains on rewards computed from the answer. In the code "ReFT" means the
first; the second is called `reinforced`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "ReftConfig": "reftune.model.face",
    "get_peft_model": "reftune.model.face",
    "LoreftConfig": "reftune.interventions.loreft",
    "DireftConfig": "reftune.interventions.direft",
    "LowRankConfig": "reftune.interventions.base",
    "RedConfig": "reftune.interventions.red",
    "Intervention": "reftune.interventions.base",
    "InterventionConfig": "reftune.interventions.base",
    "Edit": "reftune.interventions.base",
    "register": "reftune.interventions",
    "attach": "reftune.model.adapters",
    "detach": "reftune.model.adapters",
    "use": "reftune.model.adapters",
    "off": "reftune.model.adapters",
    "mix": "reftune.model.adapters",
    "set_strength": "reftune.model.adapters",
    "prompt_scope": "reftune.model.adapters",
    "PositionRule": "reftune.model.positions",
    "load_base": "reftune.model.build",
    "load": "reftune.model.checkpoint:load_adapter",
    "save": "reftune.model.checkpoint:save_adapter",
    "push": "reftune.model.hub",
    "generate": "reftune.inference.generate",
    "prefix_cache": "reftune.inference.prefix",
    "train": "reftune.training.stages",
    "ReftTrainer": "reftune.training.trainer",
    "ReftuneError": "reftune.errors",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from reftune.errors import ReftuneError
    from reftune.inference.generate import generate
    from reftune.inference.prefix import prefix_cache
    from reftune.interventions import register
    from reftune.interventions.base import Edit, Intervention, InterventionConfig, LowRankConfig
    from reftune.interventions.direft import DireftConfig
    from reftune.interventions.loreft import LoreftConfig
    from reftune.interventions.red import RedConfig
    from reftune.model.adapters import attach, detach, mix, off, prompt_scope, set_strength, use
    from reftune.model.build import load_base
    from reftune.model.checkpoint import load_adapter as load
    from reftune.model.checkpoint import save_adapter as save
    from reftune.model.face import ReftConfig, get_peft_model
    from reftune.model.hub import push
    from reftune.model.positions import PositionRule
    from reftune.training.stages import train
    from reftune.training.trainer import ReftTrainer


def __getattr__(name: str) -> Any:
    """Import public names on first use: `import reftune` alone stays light."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'reftune' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = getattr(import_module(module), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
