"""Objectives: training signals. One file per objective, one registry line each.

Third parties add their own by `register()` or by an entry point in the group `reftune.objectives`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from reftune.registry import Registry

if TYPE_CHECKING:
    from reftune.objectives.base import Objective

REGISTRY: Registry[Objective] = Registry(
    "objective",
    {
        "sft": "reftune.objectives.sft:Sft",
        "brep": "reftune.objectives.brep:Brep",
        "nlft": "reftune.objectives.nlft:Nlft",
        "classification": "reftune.objectives.classification:Classification",
        "reinforced": "reftune.objectives.reinforced:Reinforced",
        "carft": "reftune.objectives.carft:Carft",
        "online_st": "reftune.objectives.online_st:OnlineSt",
    },
)

get, names, register = REGISTRY.get, REGISTRY.names, REGISTRY.register
