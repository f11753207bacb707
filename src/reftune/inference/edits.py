"""What each row of a batch tells its adapters: which one acts, and where."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from reftune.errors import AdapterError, DataError

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor, nn


def adapters_of(model: nn.Module) -> list[str]:
    """Return the names of all adapters on a model, ours and PEFT's."""
    from reftune.model import adapter_names

    return sorted({*(getattr(model, "peft_config", None) or {}), *adapter_names(model)})


def check_adapters(
    model: nn.Module, names: Sequence[str] | None, num_prompts: int
) -> list[str] | None:
    """Return the adapter of each row, or None where all rows use the active ones.

    Raises:
        AdapterError: If the model has no such adapter or there is not one name a prompt.
    """
    from reftune.model.site import BASE

    if names is None:
        return None
    if isinstance(names, str) or len(names) != num_prompts:
        given = f'"{names}"' if isinstance(names, str) else f"{len(names)} names"
        raise AdapterError(
            f"adapter_names has {given} for {num_prompts} prompts.",
            f'Give one name a prompt; "{BASE}" is the base model.',
        )
    known = adapters_of(model)
    missing = sorted(set(names) - set(known) - {BASE})
    if missing:
        raise AdapterError(
            f"The model has no adapter {', '.join(map(repr, missing))}.",
            f"Attached: {', '.join(known) or 'none'}; the base model is {BASE!r}.",
        )
    if not known:
        return None  # a plain model is the base for every row
    return list(names)


@contextlib.contextmanager
def row_adapters(model: nn.Module, names: Sequence[str | None]) -> Iterator[dict[str, Any]]:
    """Give each row of a call its adapter; yields the keyword arguments the call must pass."""
    if not names or names[0] is None:
        yield {}
    elif hasattr(model, "get_base_model"):
        yield {"adapter_names": list(names)}
    else:
        from reftune.model import mix

        with mix(model, [str(name) for name in names]):
            yield {}


class Edited(Protocol):
    """A row of a batch: what it tells its interventions, in places of its own tokens."""

    subject: int | None
    subspace: tuple[int, ...] | None
    mask: tuple[bool, ...] | None


def row_edits(
    model: nn.Module, rows: Sequence[Edited], attention_mask: Int[Tensor, "rows width"]
) -> dict[str, Any]:
    """Return what each row tells its interventions, as keyword arguments of a model call.

    Empty for models without interventions, which would not understand them.

    Args:
        model: The model.
        rows: The rows of a batch.
        attention_mask: 1 at the columns that are tokens.

    Raises:
        DataError: If some rows have a subject and others none.
    """
    import torch

    from reftune.model import adapter_names

    extra: dict[str, Any] = {}
    subjects = [row.subject for row in rows]
    if any(place is not None for place in subjects):
        if any(place is None for place in subjects):
            raise DataError("Some prompts have a subject, others none.", "Give all a subject.")
        extra["subject_positions"] = torch.tensor(subjects, device=attention_mask.device)
    if any(row.subspace is not None for row in rows):
        extra["subspaces"] = [row.subspace for row in rows]
    if any(row.mask is not None for row in rows):
        columns = torch.zeros_like(attention_mask, dtype=torch.bool)
        for column, valid, row in zip(columns, attention_mask, rows, strict=True):
            marked = torch.tensor(row.mask or (), dtype=torch.bool, device=valid.device)
            column[valid.nonzero()[: len(marked), 0]] = marked
        extra["intervention_mask"] = columns
    return extra if adapter_names(model) else {}
