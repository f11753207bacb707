"""Finding what hangs on a model: call states, sites and adapter names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from reftune.errors import AdapterError, nearest
from reftune.model.call import Call
from reftune.model.site import BASE, Site
from reftune.model.sites import Blocks, base_of, find_blocks

CALL = "_reftune_call"
"""Attribute of a hooked stack that holds its call state."""
CALLS = "_reftune_calls"
"""Attribute of the base model that lists the call states of its hooked stacks."""
BLOCKS = "_reftune_blocks"
"""Attribute of the base model that lists the blocks of its hooked stacks, in the same order."""
SITES = "_reftune_sites"
"""Attribute of the base model that lists its sites in the order in which they were placed."""
HOOKS = "_reftune_hooks"
"""Attribute of a hooked module that holds the handles of our hooks."""


def calls(model: nn.Module) -> list[Call]:
    """Return the call states of all hooked stacks of a model."""
    return base_of(model).__dict__.get(CALLS, [])


def sites(model: nn.Module) -> list[Site]:
    """Return all sites of a model, from below, whatever part of it is given."""
    return [m for m in model.modules() if isinstance(m, Site)]


def placed(model: nn.Module) -> list[Site]:
    """Return all sites of a whole model without a walk over its modules: for every step."""
    return base_of(model).__dict__.get(SITES, [])


def blocks_of(model: nn.Module) -> Blocks:
    """Return the blocks of the first hooked stack, found once, or search for them."""
    base = base_of(model)
    known = base.__dict__.get(BLOCKS)
    return known[0] if known else find_blocks(base)


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of all our adapters on a model."""
    return sorted({name for site in sites(model) for name in site.adapters()})


def check_known(model: nn.Module, names: Sequence[str]) -> None:
    """Raise AdapterError for names no adapter has; `__base__` is allowed."""
    known = adapter_names(model)
    for name in names:
        if name not in known and name != BASE:
            raise AdapterError(f'There is no adapter "{name}" on this model.', nearest(name, known))
