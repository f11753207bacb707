"""Copies of the trained parameters that can stand in for them: frozen policy and value model.

On a frozen base with an adapter this is all that a second model would differ in: megabytes. With
full fine-tuning it is a copy of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftune.errors import TrainingError
from reftune.interventions.base import Orthonormal


class Snapshot:
    """Holds the trained parameters of a model as they were.

    Args:
        model: The model; what requires grad in it is copied now.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = trained(model)
        self.held = {name: p.detach().clone() for name, p in self.parameters.items()}

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the copies in the parameters' place for a while; afterwards all is as it was.

        Storage is exchanged, not copied, so it is exact and costs no time. Neither gradients nor
        optimiser steps may be taken inside.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.held[name] = self.held[name], parameter.data
        # An exchange leaves no trace that caches of derived weights could see: of R in the edits,
        # and of casts while autocast is on. This clears them.
        self.model.train(self.model.training)
        torch.clear_autocast_cache()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the copies, on the CPU."""
        return {name: held.cpu() for name, held in self.held.items()}

    def load_state_dict(self, state: Mapping[str, Float[Tensor, " ..."]]) -> None:
        """Take back copies.

        Raises:
            TrainingError: If they are those of other parameters.
        """
        restore(self.held, state)


class Second:
    """A second model on the same base: trained parameters of its own, which start as the model's.

    Args:
        model: The model; what requires grad in it is copied now. Passes inside `swapped` must leave
            nothing to be recomputed in the backward pass (gradient checkpointing).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.parameters = model, {}
        self.places: list[tuple[nn.Module, str, str]] = []
        names = {id(p): name for name, p in trained(model).items()}
        for module in model.modules():  # a tied parameter has one copy and several places
            for key, parameter in module._parameters.items():
                name = names.get(id(parameter))
                if name is not None:
                    self.places.append((module, key, name))
                    self.parameters.setdefault(name, _copy(parameter))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the copies in the parameters' place for a while; afterwards all is as it was.

        What is computed inside belongs to the copies, gradients too, also in a backward pass that
        comes later. Optimiser steps may not be taken inside.
        """
        before = [module._parameters[key] for module, key, _ in self.places]
        rotations = [m for m in self.model.modules() if isinstance(m, Orthonormal)]
        settled = [module._settled for module in rotations]
        for module, key, name in self.places:
            module._parameters[key] = self.parameters[name]
        self._forget()
        try:
            yield
        finally:
            for (module, key, _), parameter in zip(self.places, before, strict=True):
                module._parameters[key] = parameter
            for module, state in zip(rotations, settled, strict=True):
                module._settled = state  # of dimensions trained apart: that of the model's own R
            self._forget()

    def _forget(self) -> None:
        # A cache of R knows its parameter by address and version, and freed memory is used again.
        self.model.train(self.model.training)


def _copy(parameter: nn.Parameter) -> nn.Parameter:
    """Return a parameter like another, with the marks that others of ours read."""
    made = nn.Parameter(parameter.detach().clone())
    if getattr(parameter, "_no_decay", False):
        made._no_decay = True
    return made


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by their names."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def restore(
    targets: Mapping[str, Float[Tensor, " ..."]], state: Mapping[str, Float[Tensor, " ..."]]
) -> None:
    """Copy saved tensors into those of the same names.

    Raises:
        TrainingError: If names or shapes differ.
    """
    shapes = [{name: tuple(t.shape) for name, t in side.items()} for side in (targets, state)]
    if shapes[0] != shapes[1]:
        differ = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))
        raise TrainingError(
            f"A checkpoint holds other parameters than are trained, {differ[0][0]} first.",
            "Resume with the recipe it was started with, or start again with --overwrite.",
        )
    for name, target in targets.items():
        target.data.copy_(state[name])
