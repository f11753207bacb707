"""What is under the adapter that is trained: frozen or not, still, and merged for a while.

A frozen adapter is a part of the model. So it gets no gradient, and it does not drop out: whatever
is trained on top would learn on a noisy model that no one uses afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from reftune.model.levels import levels, own_active
from reftune.model.lookup import sites
from reftune.model.switching import foreign_layers


def parameters_below(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of all adapters but the uppermost level's, by their names."""
    nested = levels(model)
    found: dict[str, nn.Parameter] = {}
    for level, names in list(zip(nested, own_active(nested)))[:-1]:
        prefix = level.base_model.prefix
        for key, parameter in model.named_parameters():
            places = key.split(".")
            if set(names) & set(places) and any(place.startswith(prefix) for place in places):
                found[key] = parameter
    return found


def set_below(model: nn.Module, trained: bool = False) -> None:
    """Freeze the adapters below the uppermost level, or have them trained with it.

    What makes a model for a stage leaves this open: an adapter that was loaded to be trained on
    brings those below it, trainable.
    """
    for parameter in parameters_below(model).values():
        parameter.requires_grad_(trained)


@contextmanager
def untrained(model: nn.Module) -> Iterator[None]:
    """Switch off every adapter that is trained; what is frozen below stays on.

    Weights of the model itself that are trained (full fine-tuning, a head) stay as they are. A
    frozen adapter of PEFT in the very layer of a trained one goes off with it.
    """
    layers = [*sites(model), *foreign_layers(model)]
    trained = [layer for layer in layers if any(p.requires_grad for p in _own(layer))]
    before = [layer._disable_adapters for layer in trained]
    for layer in trained:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, state in zip(trained, before):
            layer._disable_adapters = state


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Switch dropout off in adapters that are frozen, also in training mode."""
    nested = levels(model)
    names = {n for found in own_active(nested)[:-1] for n in found}
    rates = [(m, m.p) for m in _dropouts(model, names)]
    edits = [
        (module, module.config)
        for site in sites(model)
        for name in names
        for module in site.groups(name).values()
        if _is_frozen(module)
    ]
    for module, _ in rates:
        module.p = 0.0
    for module, config in edits:
        module.config = replace(config, dropout=0.0)
    try:
        yield
    finally:
        for module, rate in rates:
            module.p = rate
        for module, config in edits:
            module.config = config


def _own(layer: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of an adapter's layer, not those of the module it wraps."""
    yield from layer.parameters(recurse=False)
    for name, child in layer.named_children():
        if name not in ("base_layer", "original_module"):
            yield from child.parameters()


def _dropouts(model: nn.Module, names: set[str]) -> list[nn.Dropout]:
    """Return the dropout modules of frozen adapters of PEFT; they stand beside the weights."""
    found = []
    for layer in foreign_layers(model):
        books = [child for child in layer.children() if isinstance(child, nn.ModuleDict)]
        for name in names:
            own = [book[name] for book in books if name in book]
            if all(map(_is_frozen, own)):
                found += [m for part in own for m in part.modules() if isinstance(m, nn.Dropout)]
    return found


def _is_frozen(module: nn.Module) -> bool:
    return not any(p.requires_grad for p in module.parameters())
