"""What stages may ask of the adapters below them, and what `heft` asks of the stages."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from reftune.config import options as registries
from reftune.config.heft import ARRANGED, pair_of
from reftune.config.naming import kind_of
from reftune.config.reading import join
from reftune.config.types import show
from reftune.errors import ReftuneError

if TYPE_CHECKING:
    from reftune.config.checks import Checker
    from reftune.config.recipe import Recipe, StageSpec

QUANTISED = (
    "LoRA cannot be merged into quantised weights: they hold no numbers that could be added to. "
    "Leave it out (false), or set `quantize: none` under `model:`."
)


def check_stages(recipe: Recipe, keys: list[str], checker: Checker) -> None:
    """Note the faults of what each stage asks of those before it.

    Args:
        recipe: The recipe.
        keys: Dotted key of each stage, as the user wrote it.
        checker: Where faults go.
    """
    for index, (stage, key) in enumerate(zip(recipe.stages, keys, strict=True)):
        _epochs(recipe.stages, index, key, checker)
        below = [other.adapter for other in recipe.stages[:index] if other.adapter != stage.adapter]
        has_below = bool(below or recipe.model.adapter)
        if stage.below == "trained" and not has_below:
            text = "there is no adapter below that could be trained: no other stage stands before."
            checker.fault(join(key, "below"), text)
        if stage.optimiser.below_lr is not None and stage.below != "trained":
            text = "has no effect without `below: trained`. Set it beside `optimiser`."
            checker.fault(join(key, "optimiser.below_lr"), text)
        if not stage.merge_below:
            continue
        place = join(key, "merge_below")
        others = [adapter.method for adapter in below if kind_of(adapter) != "lora"]
        if recipe.model.quantize != "none":
            checker.fault(place, QUANTISED, ("model.quantize",))
        elif stage.below == "trained":
            checker.fault(place, "what is merged cannot be trained. Use `below: frozen`.")
        elif others:
            text = f"{others[0]} cannot be merged: only LoRA is a change of weights. Leave it out."
            checker.fault(place, text)
        elif not has_below:
            checker.fault(place, "there is no LoRA below. Put a LoRA stage before this one.")


def _epochs(stages: list[StageSpec], index: int, key: str, checker: Checker) -> None:
    epochs = stages[index].epochs
    if math.isfinite(epochs) and epochs > 0:
        return
    is_used = any(
        later.below == "trained" and later.adapter != stages[index].adapter
        for later in stages[index + 1 :]
    )
    if epochs == 0 and is_used and kind_of(stages[index].adapter) != "model":
        return
    text = f"{show(epochs)} is not above 0."
    if epochs == 0 and len(stages) > 1:
        text += " 0 is for an adapter that a later stage trains with `below: trained`."
    checker.fault(join(key, "epochs"), text)


def check_heft(recipe: Recipe, keys: list[str], checker: Checker) -> None:
    """Note the faults of `heft`, and of stages that it cannot arrange."""
    heft = recipe.heft
    if heft is None:
        return
    checker.ranges(heft, "heft", "heft")
    if not 0 <= heft.coarse_fraction <= 1:
        text = f"{show(heft.coarse_fraction)} is no share. Use a value from 0 to 1."
        checker.fault("heft.coarse_fraction", text)
    for key in keys:
        for name in (*ARRANGED, "optimiser.below_lr"):
            if join(key, name) in checker.reader.places:
                text = "follows from `heft`. Leave it out; `heft.epochs_total` says how long."
                checker.fault(join(key, name), text)
    _pair(recipe, checker)
    _second_stage(recipe, checker)
    if recipe.model.adapter:
        text = "HEFT starts from the base model. Leave it out, or write `stages` without `heft`."
        checker.fault("model.adapter", text)


def _pair(recipe: Recipe, checker: Checker) -> None:
    """Check that the stages are a LoRA and a ReFT, or the one that the whole budget goes to."""
    if checker.reader.bad:  # a method may be a default that stands in for a faulty one
        return
    heft, (lora, reft) = recipe.heft, pair_of(recipe)
    alone = {1.0: lora, 0.0: reft}.get(float(heft.coarse_fraction))
    is_alone = len(recipe.stages) == 1 and alone is not None and heft.order != "joint"
    if not is_alone and (lora is None or reft is None or len(recipe.stages) != 2):
        there = ", ".join(stage.adapter.method for stage in recipe.stages)
        text = (
            "needs two stages, one with `method: lora` and one with an intervention such as "
            f"loreft; there are: {there}. One alone will do with coarse_fraction 1 or 0."
        )
        checker.fault("heft", text, ("stages",))
        return
    if reft is None or "init" in reft.adapter.options:
        return
    method = registries.intervention_class(reft.adapter.method)
    try:
        method.config_from({**reft.adapter.options, "init": "identity"})
    except ReftuneError as error:
        text = f"the ReFT stage starts where LoRA ended, at the identity. {error.what} "
        checker.fault("heft", text + "Choose another method, or set its `init`.")


def _second_stage(recipe: Recipe, checker: Checker) -> None:
    heft = recipe.heft
    if heft.stage2_train == "reft+lora" and heft.order != "lora_first":
        text = f"is for `order: lora_first`; the order is {heft.order}. Leave it out."
        checker.fault("heft.stage2_train", text, ("heft.order",))
    if heft.stage2_lora_lr is not None and heft.stage2_train == "reft":
        text = "has no effect without `stage2_train: reft+lora`."
        checker.fault("heft.stage2_lora_lr", text, ("heft.stage2_train",))
    if not heft.merge_before_stage2:
        return
    key = "heft.merge_before_stage2"
    if recipe.model.quantize != "none":
        checker.fault(key, QUANTISED, ("model.quantize",))
    elif heft.order != "lora_first":
        text = f"needs `order: lora_first`, LoRA below ReFT; the order is {heft.order}."
        checker.fault(key, text, ("heft.order",))
    elif heft.stage2_train != "reft":
        checker.fault(key, "what is merged cannot be trained. Use `stage2_train: reft`.")
