"""What is known of a forward pass: rules, what the caller said, what its tokens are."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from jaxtyping import Bool, Int, Real
from torch import Tensor

from reftune.model.positions import PositionRule, Tokens

IGNORE = -100
"""Label of a token that is not learned."""


@dataclass(frozen=True)
class Rules:
    """The position rules of one adapter."""

    inference: PositionRule
    training: PositionRule
    short: str = "union"

    def current(self, training: bool) -> PositionRule:
        """Return the rule in force."""
        return self.training if training else self.inference


@dataclass
class Scope:
    """A generation: the prompt columns are known, everything after them is generated.

    Attributes:
        prompt_mask: True at the prompt's real tokens.
        mask: Explicit edit columns over the prompt, or None.
        subject: Place of the subject's last token in each row, or None.
        prompt_lens: Real prompt tokens of each row where some of what is given was written after
            it; None: all of it is prompt.
    """

    prompt_mask: Bool[Tensor, "batch prompt"]
    mask: Bool[Tensor, "batch prompt"] | None = None
    subject: Int[Tensor, " batch"] | None = None
    prompt_lens: Int[Tensor, "batch 1"] | None = None


@dataclass
class Inputs:
    """What the caller said beside the model's own inputs."""

    labels: Real[Tensor, "batch ..."] | None = None
    prompt_lens: Int[Tensor, " batch"] | None = None
    mask: Bool[Tensor, "batch columns"] | None = None
    subject: Int[Tensor, " batch"] | None = None
    subspaces: Any = None

    def filled(self, other: Inputs | None) -> Inputs:
        """Return these inputs, with what they leave open taken from `other`."""
        if other is None:
            return self
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Inputs(**{k: getattr(other, k) if v is None else v for k, v in values.items()})


@dataclass
class Snapshot:
    """The description of one forward pass, kept for recomputation in the backward pass.

    `unknown` says in what situation the prompt's end is not known; rules that depend on it refuse.
    """

    tokens: Tokens | None = None
    training: bool = False
    grad: bool = False
    rows: tuple[str, ...] | None = None
    subspaces: Any = None
    idle: bool = True
    batch: int = 0
    width: int = 0
    past: int = 0
    scope_width: int | None = None
    unknown: str | None = None
    inputs: set[tuple] = field(default_factory=set)
    places: dict[tuple, tuple[Int[Tensor, "batch columns"] | None, dict]] = field(
        default_factory=dict
    )
