"""Recipes: dataclasses, YAML with checks, and the JSON schema for editors."""

from __future__ import annotations

from reftune.config.recipe import (
    AdapterSpec,
    EvaluationSpec,
    ModelSpec,
    OptimiserSpec,
    Recipe,
    StageSpec,
    TaskSpec,
)

__all__ = [
    "AdapterSpec",
    "EvaluationSpec",
    "ModelSpec",
    "OptimiserSpec",
    "Recipe",
    "StageSpec",
    "TaskSpec",
]
