"""HEFT: the two stages of a recipe, arranged by one budget of epochs.

A recipe with `heft:` names a LoRA stage and a ReFT stage; this file decides which comes first, how
long each trains and what goes on training beside it. Arranging an arranged recipe changes nothing,
so that a resolved recipe can be read, changed (`heft.order=joint`) and resolved again.
"""

from __future__ import annotations

import math
from dataclasses import replace

from reftune.config import options as registries
from reftune.config.naming import kind_of
from reftune.config.recipe import HeftSpec, Recipe, StageSpec

ARRANGED = ("epochs", "below", "merge_below")
"""Keys of stages that follow from `heft`, with `below_lr` of the optimiser."""
SLOWER = 0.1
"""Rate of LoRA in a joint second stage, as a share of its own."""
_DIGITS = 6


def split_epochs(total: float, fraction: float) -> tuple[float, float]:
    """Return the epochs of LoRA and of ReFT, rounded down to a millionth.

    A third of an epoch of 63 steps is 21 steps; 0.33333333333333337 of it would be 22. Where the
    split falls between two steps, each stage rounds up: the two may take one step more than one.

    >>> split_epochs(3, 2 / 3), split_epochs(1, 2 / 3)
    ((2.0, 1.0), (0.666666, 0.333333))
    """
    return _down(total * fraction), _down(total * (1 - fraction))


def _down(value: float) -> float:
    size = 10**_DIGITS
    return math.floor(round(value * size, 3)) / size


def pair_of(recipe: Recipe) -> tuple[StageSpec | None, StageSpec | None]:
    """Return the LoRA stage and the ReFT stage of a recipe; None where there is not exactly one."""
    found = [
        [stage for stage in recipe.stages if kind_of(stage.adapter) == kind]
        for kind in ("lora", "reft")
    ]
    lora, reft = (part[0] if len(part) == 1 else None for part in found)
    return lora, reft


def arranged(recipe: Recipe) -> Recipe:
    """Return a recipe whose stages are as its `heft` says; one without `heft` as it is.

    >>> from reftune.config.recipe import AdapterSpec
    >>> stages = [StageSpec(AdapterSpec("lora")), StageSpec(AdapterSpec("loreft"))]
    >>> both = arranged(Recipe(stages=stages, heft=HeftSpec(order="reft_first"))).stages
    >>> [(stage.adapter.method, stage.epochs) for stage in both]
    [('loreft', 1.0), ('lora', 2.0)]
    """
    heft = recipe.heft
    if heft is None:
        return recipe
    lora, reft = pair_of(recipe)
    lora = lora and _plain(lora)
    reft = reft and _at_identity(_plain(reft))
    if lora is None or reft is None:  # one method alone, with the whole budget
        only = lora or reft
        stages = [replace(only, epochs=float(heft.epochs_total))] if only else recipe.stages
    elif heft.order == "joint":
        stages = _joint(heft, lora, reft)
    else:
        stages = _in_turn(heft, lora, reft)
    return replace(recipe, stages=stages)


def _joint(heft: HeftSpec, lora: StageSpec, reft: StageSpec) -> list[StageSpec]:
    """Return both adapters trained at the same time, each at its own rate."""
    optimiser = replace(reft.optimiser, below_lr=lora.optimiser.lr)
    both = replace(reft, epochs=float(heft.epochs_total), below="trained", optimiser=optimiser)
    return [replace(lora, epochs=0.0), both]


def _in_turn(heft: HeftSpec, lora: StageSpec, reft: StageSpec) -> list[StageSpec]:
    """Return the stages one after the other; one that has no epochs is left out."""
    coarse, fine = split_epochs(heft.epochs_total, heft.coarse_fraction)
    if heft.order == "lora_first":
        reft = replace(reft, merge_below=heft.merge_before_stage2)
        if heft.stage2_train == "reft+lora":
            rate = heft.stage2_lora_lr or SLOWER * lora.optimiser.lr
            optimiser = replace(reft.optimiser, below_lr=rate)
            reft = replace(reft, below="trained", optimiser=optimiser)
    lora, reft = replace(lora, epochs=coarse), replace(reft, epochs=fine)
    if coarse == 0:
        return [_plain(reft, fine)]
    stages = [lora] if fine == 0 else [lora, reft]
    return stages[::-1] if heft.order == "reft_first" else stages


def _plain(stage: StageSpec, epochs: float = StageSpec.epochs) -> StageSpec:
    """Return a stage without what `heft` decides."""
    optimiser = replace(stage.optimiser, below_lr=None)
    return replace(stage, epochs=epochs, below="frozen", merge_below=False, optimiser=optimiser)


def _at_identity(stage: StageSpec) -> StageSpec:
    """Return a ReFT stage that starts where the stage before it ended, unless it says otherwise."""
    if "init" in stage.adapter.options or stage.adapter.method not in registries.method_names():
        return stage
    options = {**stage.adapter.options, "init": "identity"}
    return replace(stage, adapter=replace(stage.adapter, options=options))
