"""What a stage of a recipe may ask of the online loop, and where its adapter starts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from reftune.config.options import OTHER_METHODS, intervention_class
from reftune.errors import RecipeError

if TYPE_CHECKING:
    from reftune.config.recipe import AdapterSpec, Recipe, StageSpec


def check_stage(recipe: Recipe, index: int) -> None:
    """Refuse what the online loop cannot do, before anything is loaded.

    Args:
        recipe: The recipe.
        index: Number of the stage, from 0.

    Raises:
        RecipeError: If the stage asks for it.
    """
    stage = recipe.stages[index]
    if recipe.model.head == "seq2seq":
        raise RecipeError(
            f'objective "{stage.objective}" trains decoders only; model.head is seq2seq.',
            "Use a causal model, or objective: sft.",
        )
    refused = (
        (stage.gradient_checkpointing, "gradient_checkpointing", "Use a smaller micro_batch_size."),
        (stage.precision == "fp16", "precision: fp16", "Use bf16 or fp32."),
        (stage.causal in ("recompute", "store"), f"causal: {stage.causal}", "Leave it out."),
    )
    for is_asked, what, remedy in refused:
        if is_asked:
            text = f'{what} does not go with objective "{stage.objective}".'
            raise RecipeError(text, remedy)
    continued = index > 0 and stage.adapter == recipe.stages[index - 1].adapter
    if not continued:
        adapter = start_of(stage)
        if adapter.method not in OTHER_METHODS:
            intervention_class(adapter.method).config_from(adapter.options)


def start_of(stage: StageSpec) -> AdapterSpec:
    """Return the adapter of a stage without a warm-up: one that starts as the base model.

    A random edit would make the first answers worse than the base's, and the frozen policy too.
    """
    adapter = stage.adapter
    if adapter.method in OTHER_METHODS or "init" in adapter.options:
        return adapter
    return replace(adapter, options={**adapter.options, "init": "identity"})
