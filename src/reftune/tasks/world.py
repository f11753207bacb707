"""What the tasks of nano's world share: drawing without repeats, and the two prompt forms."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from reftune.config.recipe import TaskSpec
from reftune.errors import RecipeError
from reftune.tasks import base, templates
from reftune.tasks.base import Example, Split, Task

log = logging.getLogger(__name__)
T = TypeVar("T")

_TRIES = 30
"""Draws a wanted item before a finite set counts as used up."""


@dataclass(frozen=True)
class Options(base.Options):
    """Options of tasks on nano's world. `seed` changes the training rows only."""

    chat: bool = False
    """Ask through the chat template instead of `Question: ... Answer:`."""


class World(Task):
    """A task whose rows are generated, not read.

    Training rows follow `options.seed`; validation and test rows are the same for every seed, so
    that runs can be compared pair by pair.
    """

    Options: ClassVar[type] = Options
    sizes: ClassVar[dict[str, int]] = {"train": 1000, "validation": 200, "test": 1000}

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        for field in ("data_dir", "train", "validation", "test"):
            if getattr(spec, field) is not None:
                raise RecipeError(
                    f'Task "{self.name}" generates its rows; task.{field} has no effect.',
                    "Leave it out, or use `task: {name: own, ...}` for your own data.",
                )

    @property
    def prompt_form(self) -> str | None:
        """Prompt around a question."""
        return None if self.options.chat else templates.NATIVE.replace("{question}", "{prompt}")

    def size(self, split: Split) -> int:
        """Return how many rows are wanted."""
        wanted = super().size(split)
        if wanted is not None and wanted < 1:
            raise RecipeError(f"A {split}_size of {wanted} was asked for.", "Ask for at least 1.")
        return self.sizes[split] if wanted is None else wanted

    def draw(
        self,
        split: Split,
        one: Callable[[random.Random], T],
        key: Callable[[T], Hashable],
        salt: str = "",
    ) -> list[T]:
        """Return `size(split)` different items, fewer if there are no more.

        Args:
            split: Which split.
            one: Draws one item.
            key: What makes two items the same.
            salt: Added to the seed, so that several draws differ.
        """
        seed = self.options.seed if split == "train" else 0
        rng = random.Random(f"{self.name}|{split}|{salt}|{seed}")
        wanted = self.size(split)
        found: dict[Hashable, T] = {}
        for _ in range(_TRIES * wanted):
            item = one(rng)
            found.setdefault(key(item), item)
            if len(found) == wanted:
                break
        else:
            log.info("%s %s: only %d different rows exist", self.name, split, len(found))
        return list(found.values())

    def row(
        self, split: Split, index: int, question: str, target: str, answer: str, **more: object
    ) -> Example:
        """Return an example in native or chat form; `target` has no leading space."""
        row_id = f"{self.name}-{split}-{index}"
        if self.options.chat:
            messages = (
                {"role": "user", "content": question},
                {"role": "assistant", "content": target},
            )
            return Example(row_id, "", "", answer, question, messages, **more)
        prompt = templates.fill(templates.NATIVE, question=question)
        return Example(row_id, prompt, f" {target}", answer, question, **more)
