"""Registries of lazily imported classes: built in, registered at run time, or by entry point."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from reftune.errors import RecipeError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to classes, imported on first use.

    Args:
        kind: What is registered, for messages; the entry point group is `reftune.<kind>s`.
        targets: Built-in names and `"module:Class"` targets.
    """

    def __init__(self, kind: str, targets: dict[str, str]) -> None:
        self.kind = kind
        self._targets: dict[str, str | type[T]] = dict(targets)
        self._scanned = False

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        for entry in entry_points(group=f"reftune.{self.kind}s"):
            self._targets.setdefault(entry.name, entry.value)

    def names(self) -> list[str]:
        """Return all registered names, built-in ones first."""
        self._scan()
        return list(self._targets)

    def get(self, name: str) -> type[T]:
        """Return the class registered under `name`.

        Raises:
            RecipeError: If there is none; the message names the nearest one.
        """
        self._scan()
        if name not in self._targets:
            raise RecipeError(f'There is no {self.kind} "{name}".', nearest(name, self._targets))
        target = self._targets[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = getattr(importlib.import_module(module), attribute)
            self._targets[name] = target
        return target

    def target(self, name: str) -> str:
        """Return `"module:Class"` of a name without importing it."""
        self._scan()
        target = self._targets[name]
        return target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"

    def register(self, name: str, target: str | type[T]) -> None:
        """Add a class or a `"module:Class"` target.

        Raises:
            RecipeError: If the name is taken by something else, or is not lower_case.
        """
        if not name.isidentifier() or name != name.lower() or name.startswith("reft_"):
            raise RecipeError(
                f'"{name}" is no valid {self.kind} name.',
                "Use lower-case letters, digits and _, not starting with reft_.",
            )
        same = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
        if name in self.names() and self.target(name) != same:
            raise RecipeError(f'The {self.kind} "{name}" exists already.', "Choose another name.")
        self._targets[name] = target
