"""Objectives that train on the model's own answers: what a rollout is, and what they share.

A step of such a stage: the model answers a batch of questions, the answers are scored, `experience`
measures them once under the policy that wrote them, and `updates` optimiser steps follow, each on
the whole rollout. `reftune.training.online` is that loop; here is what it asks of an objective.

Left out on purpose: several minibatches a rollout (Luong et al. 2024 step on the whole batch; the
micro-batches here are accumulated), replay of older rollouts, and training-mode dropout: all passes
run in evaluation mode, so that the policy that is trained is the one that answers.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor, nn

from reftune.errors import RecipeError
from reftune.model.run import Prepared
from reftune.objectives import policy
from reftune.objectives.base import Loss, Objective, ObjectiveConfig

if TYPE_CHECKING:
    from reftune.objectives.base import Run

    Reference = Callable[[], AbstractContextManager[Any]]

log = logging.getLogger(__name__)

COLLAPSED_ENTROPY = 0.1
"""Share of its first value below which the entropy counts as collapsed."""
FAR = 20.0
"""Nats of KL divergence an answer above which the policy counts as having left its reference."""


@dataclass(frozen=True)
class OnlineConfig(ObjectiveConfig):
    """Settings of all objectives that train on the model's own answers."""

    samples: int = 1
    """Answers to each question of a rollout."""
    temperature: float = 1.0
    """Temperature of the answers, and of the policy that is trained."""
    max_new_tokens: int | None = None
    """Longest answer in tokens. Default: the task's own."""
    updates: int = 2
    """Optimiser steps on each rollout, all of it every time."""
    partial: float = 0.1
    """Score of an answer that was extracted but is wrong. A right one scores 1, none at all 0."""
    generation_batch: int = 64
    """Answers written together. Changes speed and memory only."""

    def __post_init__(self) -> None:
        for name in ("samples", "updates", "generation_batch"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}.", "Use at least 1.")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise RecipeError(f"max_new_tokens is {self.max_new_tokens}.", "Use at least 1.")
        self._require("temperature", math.isfinite(self.temperature) and self.temperature > 0)
        if not 0 <= self.partial < 1:
            raise RecipeError(f"partial is {self.partial}.", "Use a score from 0 to below 1.")

    def _require(self, name: str, is_fit: bool, remedy: str = "Use a number above 0.") -> None:
        if not is_fit:
            raise RecipeError(f"{name} is {getattr(self, name)}.", remedy)


@dataclass
class Actions(Prepared):
    """A micro-batch of the model's own answers, prompt and answer in one row, ready to run.

    Attributes:
        scores: Score of each answer.
        right: Whether its answer is the gold one.
        answered: Whether an answer could be extracted.
        ended: Whether it ended by itself, not at the longest length.
        gold: The annotated answers to the same questions, where the objective asks for them; they
            have no scores.
        measured: What `experience` found, by name; one entry an action, or a row.
    """

    scores: Float[Tensor, " batch"] | None = None
    right: Bool[Tensor, " batch"] | None = None
    answered: Bool[Tensor, " batch"] | None = None
    ended: Bool[Tensor, " batch"] | None = None
    gold: Actions | None = None
    measured: dict[str, Real[Tensor, "batch ..."] | Bool[Tensor, "batch ..."]] = field(
        default_factory=dict
    )

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Actions of each answer, EOS included."""
        return (self.labels != -100).sum(1)

    @property
    def mask(self) -> Bool[Tensor, "batch steps"]:
        """Which entries of a matrix of answers are actions."""
        return policy.mask_of(self.lengths)

    def spread(self, flat: Real[Tensor, " actions *more"]) -> Real[Tensor, "batch steps *more"]:
        """Put what a run returned at labels into rows that begin with the first action."""
        mask = self.mask
        out = flat.new_zeros((*mask.shape, *flat.shape[1:]))
        out[mask] = flat
        return out


class World:
    """The processes that train together; this one is alone. Every process must call it equally."""

    size: int = 1
    """Number of processes."""

    def sum(self, tensor: Real[Tensor, " ..."]) -> Real[Tensor, " ..."]:
        """Return the sum of the tensors of all processes."""
        return tensor

    def gather(self, rows: Real[Tensor, " own *more"]) -> tuple[Real[Tensor, " all *more"], int]:
        """Return the rows of all processes, and at which of them this one's begin."""
        return rows, 0

    def lists(self, own: list[Any]) -> list[Any]:
        """Return the lists of all processes as one."""
        return own


class Tally:
    """Weighted sums of metrics; added over batches and processes before they are divided."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, total: float, weight: float) -> None:
        """Add a sum over `weight` items."""
        before = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = before[0] + float(total), before[1] + float(weight)

    def rows(self, name: str, entries: Real[Tensor, " rows"] | Bool[Tensor, " rows"]) -> None:
        """Add one number a row."""
        self.add(name, float(entries.detach().double().sum()), len(entries))

    def merge(self, others: Iterable[dict[str, tuple[float, float]]]) -> None:
        """Add what other tallies counted."""
        for other in others:
            for name, (total, weight) in other.items():
                self.add(name, total, weight)

    def means(self) -> dict[str, float]:
        """Return the mean of each metric."""
        return {name: total / max(weight, 1.0) for name, (total, weight) in self.sums.items()}


class OnlineObjective(Objective):
    """Base class of objectives that train on the model's own answers.

    `__call__` keeps the contract of all objectives: a sum over rows divided by `num_items`, which
    is `count` (by default the rows) summed over micro-batches and processes.
    """

    Config: ClassVar[type[ObjectiveConfig]] = OnlineConfig
    loop: ClassVar[str] = "online"
    reference: ClassVar[bool] = False
    """Whether it compares with the frozen policy of the stage's start."""
    gold: ClassVar[bool] = False
    """Whether it reads the annotated answers too."""
    plots: ClassVar = {"rollouts": (("reward", "accuracy"), ("answered", "ended"), ("length",))}

    config: OnlineConfig

    def __init__(self, config: ObjectiveConfig | None = None) -> None:
        super().__init__(config)
        self.head: nn.Module | None = None
        self.second: Reference | None = None
        self.first: dict[str, float] = {}
        self.warned: set[str] = set()

    @property
    def wants_second(self) -> bool:
        """Whether it trains a second model beside the policy.

        The loop makes it: a copy of the trained parameters on the same base, as the policy is when
        the stage starts. `run` reaches it in the context that `second()` returns. It is trained at
        the stage's rate and saved with checkpoints. It is no part of the artefact.
        """
        return False

    def make_head(self, dim: int) -> nn.Module | None:
        """Return a module that is trained beside the policy and reads its last hidden states.

        The loop draws it from the seed of the run, keeps it as `head`, trains it at the stage's
        rate and saves it with checkpoints. It is no part of the artefact.

        Args:
            dim: Width of the hidden states.
        """
        return None

    def experience(
        self, run: Run, reference: Reference, batches: Sequence[Actions], world: World
    ) -> Tally:
        """Measure a rollout under the policy that wrote it, before the first update.

        Called without gradients, on all micro-batches of this process (there may be none). What
        the loss needs goes into `batch.measured`.

        Args:
            run: The only way to the model.
            reference: Context in which `run` reaches the frozen policy of the stage's start.
            batches: The rollout, in the micro-batches of the updates.
            world: The processes that train together.

        Returns:
            Metrics of the rollout.
        """
        tally = Tally()
        for batch in batches:
            tally.rows("reward", batch.scores)
            tally.rows("accuracy", batch.right)
            tally.rows("answered", batch.answered)
            tally.rows("ended", batch.ended)
            tally.rows("length", batch.lengths)
        return tally

    @abstractmethod
    def __call__(self, run: Run, prepared: Actions, num_items: Real[Tensor, " ..."] | None) -> Loss:
        """Compute the loss of a micro-batch that `experience` has measured.

        Args:
            run: The only way to the model.
            prepared: The micro-batch.
            num_items: `count` summed over the rollout and all processes; None: this batch only.

        Returns:
            The loss, and metrics that are means over the rows of this batch.
        """

    def count(self, prepared: Actions) -> Int[Tensor, " ..."]:
        """Return the items of a batch: here its rows."""
        return torch.tensor(prepared.num_rows)

    # Warnings

    def watch(self, metrics: dict[str, float]) -> None:
        """Say in words, once each, that the policy has collapsed, drifted or finds no reward.

        Args:
            metrics: Metrics of a finished step.
        """
        for name in ("entropy", "reward"):
            if name in metrics:
                self.first.setdefault(name, metrics[name])
        start = self.first.get("entropy", 0.0)
        if metrics.get("entropy", math.inf) < COLLAPSED_ENTROPY * start:
            self._warn(
                "entropy",
                "the entropy has collapsed: %.3g nats a token, %.3g at the start. Answers hardly "
                "differ any more, so nothing new is tried: lower optimiser.lr or updates, or "
                "raise beta",
                *(metrics["entropy"], start),
            )
        if abs(metrics.get("kl", 0.0)) > FAR:
            self._warn(
                "kl",
                "the policy is far from where it started: KL divergence %.1f nats an answer. "
                "Raise beta or lower optimiser.lr, and read answers before trusting the reward",
                metrics["kl"],
            )
        if metrics.get("reward") == 0.0:
            self._warn(
                "reward",
                "no answer of a rollout scored anything, so there is nothing to learn from it. "
                "Warm up longer (a stage with objective: sft before this one), or mend the "
                "extraction",
            )

    def _warn(self, what: str, text: str, *values: float) -> None:
        if what not in self.warned:
            self.warned.add(what)
            log.warning(text, *values)

    def state_dict(self) -> dict[str, Any]:
        """Return what the warnings compare with."""
        return {"first": dict(self.first), "warned": sorted(self.warned)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what the warnings compare with."""
        self.first, self.warned = dict(state["first"]), set(state["warned"])
