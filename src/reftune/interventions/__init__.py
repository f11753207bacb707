"""Interventions: one file per method, one registry line each.

Third parties add their own by `register()` or by an entry point in the group
`reftune.interventions`; everything that lists methods reads this registry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from reftune.registry import Registry

if TYPE_CHECKING:
    from reftune.interventions.base import Intervention

REGISTRY: Registry[Intervention] = Registry(
    "intervention",
    {
        "loreft": "reftune.interventions.loreft:Loreft",
        "direft": "reftune.interventions.direft:Direft",
        "direft_orth": "reftune.interventions.direft_orth:DireftOrth",
        "noreft": "reftune.interventions.noreft:Noreft",
        "consreft": "reftune.interventions.consreft:Consreft",
        "lobireft": "reftune.interventions.lobireft:Lobireft",
        "red": "reftune.interventions.red:Red",
    },
)

get, names, register = REGISTRY.get, REGISTRY.names, REGISTRY.register
