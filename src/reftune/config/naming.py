"""Names of the adapters of a run: two that are on the model together need two names."""

from __future__ import annotations

from dataclasses import replace

from reftune.config.options import PLAIN
from reftune.config.recipe import AdapterSpec, Recipe

DEFAULT = AdapterSpec.name
UNKNOWN = "?"
"""Kind of what `model.adapter` holds, until that is looked at."""


def kind_of(adapter: AdapterSpec) -> str:
    """Return `lora`, `reft`, or `model` for methods that change the model itself."""
    if adapter.method in PLAIN:
        return "model"
    return "lora" if adapter.method == "lora" else "reft"


def named(recipe: Recipe) -> Recipe:
    """Return the recipe with names of their own for adapters whose default name is taken.

    A later adapter named `default` becomes `stage2`, `stage3`, and so on, after its stage. LoRA and
    an intervention on top of it may share a name, and a stage that trains on with the adapter
    before it keeps its name.

    >>> from reftune.config.recipe import StageSpec
    >>> stages = [StageSpec(AdapterSpec("loreft")), StageSpec(AdapterSpec("red"))]
    >>> [stage.adapter.name for stage in named(Recipe(stages=stages)).stages]
    ['default', 'stage2']
    """
    taken: dict[str, str] = {DEFAULT: UNKNOWN} if recipe.model.adapter else {}
    stages = []
    before: AdapterSpec | None = None
    for number, stage in enumerate(recipe.stages, 1):
        adapter = stage.adapter
        if stages and adapter == before:
            adapter = stages[-1].adapter
        elif adapter.name == DEFAULT and is_taken(adapter, taken):
            adapter = replace(adapter, name=f"stage{number}")
        taken[adapter.name] = kind_of(adapter)
        before = stage.adapter
        stages.append(stage if adapter == stage.adapter else replace(stage, adapter=adapter))
    return replace(recipe, stages=stages)


def is_taken(adapter: AdapterSpec, taken: dict[str, str]) -> bool:
    """Return whether the name of an adapter is that of another one on the model.

    Args:
        adapter: An adapter that is about to be put on the model.
        taken: Names and kinds of those that are there.
    """
    kind = taken.get(adapter.name)
    return kind is not None and (kind, kind_of(adapter)) != ("lora", "reft")


def doubled(recipe: Recipe, taken: dict[str, str]) -> int | None:
    """Return the first stage (from 0) whose adapter has the name of another one, or None.

    Args:
        recipe: The recipe.
        taken: Names and kinds of the adapters that are on the model before the first stage.
    """
    taken = dict(taken)
    before: AdapterSpec | None = None
    for index, stage in enumerate(recipe.stages):
        if stage.adapter != before and is_taken(stage.adapter, taken):
            return index
        taken[stage.adapter.name] = kind_of(stage.adapter)
        before = stage.adapter
    return None
