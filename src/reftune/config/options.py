"""Which options belong to which method, objective and task: read from the registries.

Everything here imports lazily: a recipe is checked with its own method's class only.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LoraOptions:
    """Options of the method `lora` (PEFT's LoRA)."""

    rank: int = 8
    """Rank of the update."""
    alpha: float = 16.0
    """Numerator of the scale alpha / rank."""
    dropout: float = 0.0
    """Dropout on the input of the update."""
    targets: list[str] | str | None = None
    """Linear modules, `[q_proj, v_proj]` or `all-linear`. Default: query and value projections."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}. Use a rank of at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}. Use a value from 0 to below 1.")


@dataclass(frozen=True)
class NoOptions:
    """Options of methods that have none."""


OTHER_METHODS: dict[str, tuple[str, type]] = {
    "lora": ("LoRA on linear modules, by PEFT", LoraOptions),
    "full": ("full fine-tuning of all weights", NoOptions),
    "head_only": ("only the classification head is trained", NoOptions),
}
"""Methods that are no interventions: what they do and their options."""
PLAIN = ("full", "head_only")
"""Methods that change the model itself; their artefact is a whole model."""


def method_names() -> list[str]:
    """Return everything `adapter.method` may name."""
    return [*_registry("interventions").names(), *OTHER_METHODS]


def method_config(name: str) -> type:
    """Return the dataclass with the options of a method.

    Raises:
        RecipeError: If there is no such method.
    """
    if name in OTHER_METHODS:
        return OTHER_METHODS[name][1]
    return intervention_class(name).Config


def intervention_class(name: str) -> type:
    """Return the class of an intervention.

    Raises:
        RecipeError: If there is no such intervention.
    """
    return _registry("interventions").get(name)


def objective_names() -> list[str]:
    """Return everything `objective` may name."""
    return list(_registry("objectives").names())


def objective_config(name: str) -> type:
    """Return the dataclass with the options of an objective.

    Raises:
        RecipeError: If there is no such objective.
    """
    return getattr(objective_class(name), "Config", NoOptions)


def objective_class(name: str) -> type:
    """Return the class of an objective.

    Raises:
        RecipeError: If there is no such objective.
    """
    return _registry("objectives").get(name)


def task_names() -> list[str]:
    """Return everything `task` may name."""
    names = list(_registry("tasks").names())
    return names if "own" in names else ["own", *names]


def task_config(name: str) -> type | None:
    """Return the dataclass with the options of a task, or None if it does not declare them."""
    names = _registry("tasks").names()
    return getattr(task_class(name), "Options", None) if name in names else NoOptions


def task_class(name: str) -> type:
    """Return the class of a task, without making one.

    Raises:
        RecipeError: If there is no such task.
    """
    return _registry("tasks").task_class(name)


def reward_names() -> list[str]:
    """Return everything `task.reward` may name."""
    return list(_registry("rewards").names())


def coming() -> list[str]:
    """Return the methods and objectives that are announced and not there yet."""
    methods = importlib.import_module("reftune.methods").catalogue()
    return [method.name for method in methods if method.status == "coming"]


def _registry(name: str) -> Any:
    return importlib.import_module(f"reftune.{name}")
