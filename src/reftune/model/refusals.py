"""What the arguments of a model call cannot tell: read with care, or refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int, Real
from torch import Tensor

from reftune.errors import AdapterError, PositionError
from reftune.model.positions import PositionRule


def column(values: Real[Tensor, " *shape"], batch: int, what: str) -> Real[Tensor, "{batch} 1"]:
    """Return one number a row.

    Raises:
        PositionError: If there are more or fewer.
    """
    if values.numel() != batch:
        raise PositionError(
            f"{what} has {values.numel()} numbers for {batch} rows.", "Give one per row."
        )
    return values.reshape(batch, 1)


def refuse_hidden_state(width: int, prompt_width: int | None, cache: Any) -> None:
    """Refuse decoding steps of models that keep their state out of sight (Mamba, RWKV)."""
    if cache is None and width < (prompt_width or 0):
        raise PositionError(
            f"A step of generation holds {width} of {prompt_width} prompt tokens and no "
            "cache of keys and values: the model keeps a recurrent state, and where the step "
            "stands cannot be told.",
            "Generate with use_cache=False.",
        )


def refuse_unreadable_mask(attention: Any, rules: Sequence[PositionRule]) -> None:
    """Refuse masks that do not say which tokens are real, where a rule counts tokens."""
    if not isinstance(attention, Tensor):
        return
    if any(not (rule.all or rule.mask) for rule in rules):
        raise PositionError(
            f"attention_mask has shape {tuple(attention.shape)}; it does not say which tokens are "
            "real, so their places cannot be counted.",
            "Pass a mask [batch, tokens], or the rule mask with intervention_mask=.",
        )


def refuse_packed_with_mask(
    position_ids: Int[Tensor, " *shape"] | None, valid: Bool[Tensor, "batch seq"]
) -> None:
    """Refuse packed rows whose sequences see each other because a mask was passed too."""
    if position_ids is None or position_ids.shape != valid.shape:
        return
    if bool((((position_ids == 0) & valid).sum(1) > 1).any()):
        raise PositionError(
            "position_ids start again inside a row, but an attention_mask was passed: the model "
            "takes such a row for one sequence.",
            "Leave attention_mask out for packed rows.",
        )


def as_mask(
    mask: Bool[Tensor, "rows columns"] | None, batch: int, width: int, device: torch.device
) -> Bool[Tensor, "{batch} {width}"] | None:
    """Return an explicit mask on the device.

    Raises:
        PositionError: If it is not as large as the tokens.
    """
    if mask is None:
        return None
    if tuple(mask.shape) != (batch, width):
        raise PositionError(
            f"intervention_mask has shape {tuple(mask.shape)}, the tokens {(batch, width)}.",
            "Give one boolean per token.",
        )
    return mask.to(device).bool()


def repeats(batch: int, given: int, what: str) -> int:
    """Return how often each given row stands in the batch (beams, returned sequences).

    Raises:
        AdapterError: If that is no whole number.
    """
    if given == 0 or batch % given:
        raise AdapterError(f"{given} {what} were given for {batch} rows.", "Give one per row.")
    return batch // given
