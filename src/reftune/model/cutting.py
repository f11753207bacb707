"""Where the constants of a batch end, and the batch cut in two there.

Let p0 be the first edited token of a row (or the token that predicts its first label, if that is
earlier) and l0 the last block whose output no edit has touched. What stands before p0 is the
prefix, what stands from p0 to the token that predicts the last label is the suffix; behind that
nothing is read. Prefixes are padded on the left and suffixes on the right, so that every suffix
starts in the same column.

Left out on purpose: encoders, packed rows, rows with holes.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn

from reftune.model.lookup import blocks_of, calls, placed
from reftune.model.obstacles import angle_limit
from reftune.model.passes import IGNORE, Inputs
from reftune.model.site import Site
from reftune.model.sites import base_of

if TYPE_CHECKING:
    from reftune.model.run import Prepared

# --- where the constants end ---------------------------------------------------------------------


@dataclass
class Cut:
    """Where the constants of a batch end.

    Attributes:
        p0: First token of each row's suffix, counted in real tokens.
        stop: Token behind each row's suffix.
        l0: Last block whose output no edit has touched; -1: there is none.
        length: Real tokens of each row.
        offset: Column of each row's first real token.
        prompt_lens: Real prompt tokens of each row.
        edited: Columns that some active adapter edits.
        predicts: Columns that predict a label.
    """

    p0: Int[Tensor, " batch"]
    stop: Int[Tensor, " batch"]
    l0: int
    length: Int[Tensor, " batch"]
    offset: Int[Tensor, " batch"]
    prompt_lens: Int[Tensor, " batch"]
    edited: Bool[Tensor, "batch seq"]
    predicts: Bool[Tensor, "batch seq"]


def active(site: Site) -> list[str]:
    """Return the adapters that act at a site, whether or not edits are switched off just now."""
    rows = site.call.rows
    names = site._active_names() if rows is None else dict.fromkeys(rows)
    return [name for name in names if site.groups(name)]


def first_block(model: nn.Module) -> int:
    """Return l0, the last block whose output no active edit has touched; -1 if there is none.

    An edit of a block's output leaves that output, before the edit, constant; one inside a block
    leaves constant what goes into the block.
    """
    acting = (site for site in placed(model) if active(site))
    return min((site.layer if site.outer else site.layer - 1 for site in acting), default=-1)


def cut(model: nn.Module, prepared: Prepared) -> Cut | None:
    """Find the constants of a batch.

    Args:
        model: The model with its adapters.
        prepared: The batch.

    Returns:
        None if its rows have holes, or are so long that their rotary angles depend on it.
    """
    valid = prepared.attention_mask.bool()
    length = valid.sum(1)
    offset = valid.int().argmax(1)
    place = valid.long().cumsum(1) - 1
    columns = torch.arange(valid.shape[1], device=valid.device)
    last = torch.where(valid, columns, -1).amax(1)
    if bool((last - offset + 1 != length).any()) or bool((length == 0).any()):
        return None
    limit = angle_limit(model)
    if limit is not None and valid.shape[1] > limit:
        return None
    edited, prompt_lens = edited_columns(model, prepared, valid)
    predicts = torch.zeros_like(valid)
    predicts[:, :-1] = prepared.labels[:, 1:] != IGNORE
    # A row without edits and labels has no suffix of its own; its last token stands for one.
    first = torch.where((edited | predicts) & valid, place, length[:, None] - 1).amin(1)
    stop = torch.where(predicts, place + 1, 0).amax(1)
    stop = torch.where(stop > 0, stop, length)
    return Cut(first, stop, first_block(model), length, offset, prompt_lens, edited, predicts)


def edited_columns(
    model: nn.Module, prepared: Prepared, valid: Bool[Tensor, "batch seq"]
) -> tuple[Bool[Tensor, "batch seq"], Int[Tensor, " batch"]]:
    """Return the columns any active adapter edits, edits switched off included, and prompt lengths.

    Args:
        model: The model with its adapters.
        prepared: The batch.
        valid: True at real tokens.
    """
    inputs = Inputs(
        prepared.labels,
        prepared.prompt_lens,
        prepared.intervention_mask,
        prepared.subject_positions,
    )
    training = blocks_of(model).stack.training
    edited, prompt_lens = torch.zeros_like(valid), valid.sum(1)
    for call in calls(model):
        names = {name for site in placed(model) if site.call is call for name in active(site)}
        own, lens = call.preview(names, inputs, valid, training)
        edited, prompt_lens = edited | own, lens.flatten()
    return edited, prompt_lens


# --- a batch in two parts ------------------------------------------------------------------------


@dataclass
class Prefix:
    """Prefixes of a batch, one row for each different one.

    Attributes:
        ids: Token ids, right-padded.
        lengths: Tokens of each.
        rows: Prefix of each row of the batch.
        keys: The bytes of each one's token ids.
    """

    ids: Int[Tensor, "prefixes prefix"]
    lengths: Int[Tensor, " prefixes"]
    rows: Int[Tensor, " batch"]
    keys: list[bytes]

    @classmethod
    def alone(cls, ids: Int[Tensor, " prefix"]) -> Prefix:
        """Return one prefix of one row."""
        rows = torch.zeros(1, dtype=torch.long, device=ids.device)
        return cls(ids[None], rows + len(ids), rows, [ids.cpu().numpy().tobytes()])

    def some(self, which: list[int]) -> Prefix:
        """Return some of the prefixes; `rows` then counts them."""
        rows = torch.arange(len(which), device=self.ids.device)
        keys = [self.keys[u] for u in which]
        return Prefix(self.ids[which], self.lengths[which], rows, keys)

    @property
    def width(self) -> int:
        """P, the columns of the longest."""
        return self.ids.shape[1]

    @property
    def columns(self) -> Int[Tensor, " prefix"]:
        """0 to P - 1."""
        return torch.arange(self.width, device=self.ids.device)

    @property
    def valid(self) -> Bool[Tensor, "prefixes prefix"]:
        """True at the columns of the cache that hold a token: left-padded."""
        return self.columns >= self.width - self.lengths[:, None]


@dataclass
class Suffix:
    """The part of a batch from p0 on, right-padded, with what its constants depend on.

    Attributes:
        prepared: The suffixes as a batch; the mask over prefixes and suffixes is among its further
            inputs.
        whole: The batch it was cut from.
        where: The cut.
        prefix: The prefixes, or None if no row has one.
    """

    prepared: Prepared
    whole: Prepared
    where: Cut
    prefix: Prefix | None


def split(model: nn.Module, prepared: Prepared) -> Suffix | None:
    """Cut a batch in two, or return None where there is nothing to gain.

    Args:
        model: The model with its adapters.
        prepared: The batch; further model inputs rule it out.
    """
    if prepared.extra or prepared.labels.dim() != 2:
        return None
    where = cut(model, prepared)
    if where is None:
        return None
    longest = int(where.p0.max())
    if longest == 0 and where.l0 < 1:
        return None
    prefix = prefixes(prepared, where) if longest else None
    start, size = where.offset + where.p0, where.stop - where.p0
    width = int(size.max())
    columns = torch.arange(width, device=start.device)
    valid = columns < size[:, None]
    mask = valid if prefix is None else torch.cat([prefix.valid[prefix.rows], valid], 1)
    edits = prepared.intervention_mask
    # Padding gets the place of the last token: learned positions end somewhere.
    places = torch.minimum(where.p0[:, None] + columns, where.stop[:, None] - 1)
    # One column more than tokens: the last label is predicted, but not read.
    is_target = torch.arange(width + 1, device=start.device) <= size[:, None]
    part = replace(
        prepared,
        input_ids=torch.where(valid, take(prepared.input_ids, start, width), 0),
        attention_mask=valid.to(prepared.attention_mask.dtype),
        labels=torch.where(is_target, take(prepared.labels, start, width + 1), IGNORE),
        intervention_mask=None if edits is None else take(edits, start, width) & valid,
        prompt_lens=where.prompt_lens,
        extra={
            "attention_mask": mask.to(prepared.attention_mask.dtype),
            **_positions(base_of(model), places),
        },
    )
    return Suffix(part, prepared, where, prefix)


def take(
    tensor: Shaped[Tensor, "batch seq"], start: Int[Tensor, " batch"], width: int
) -> Shaped[Tensor, "batch {width}"]:
    """Return `width` columns of each row from its `start` on; out of range clamps."""
    columns = start[:, None] + torch.arange(width, device=tensor.device)
    return tensor.gather(1, columns.clamp(0, tensor.shape[1] - 1))


def prefixes(prepared: Prepared, where: Cut) -> Prefix:
    """Return the different prefixes of a batch; rows with equal prompts share one."""
    width = int(where.p0.max())
    ids = take(prepared.input_ids, where.offset, width)
    columns = torch.arange(width, device=ids.device)
    ids = torch.where(columns < where.p0[:, None], ids, 0)
    places: dict[bytes, int] = {}
    rows, keep = [], []
    for row, (tokens, length) in enumerate(zip(ids.cpu().numpy(), where.p0.tolist())):
        place = places.setdefault(tokens[:length].tobytes(), len(places))
        rows.append(place)
        if place == len(keep):
            keep.append(row)
    index = torch.tensor(rows, device=ids.device)
    return Prefix(ids[keep], where.p0[keep], index, list(places))


def _positions(base: nn.Module, places: Int[Tensor, "batch seq"]) -> dict[str, Tensor]:
    """Return `position_ids` as an argument, for models that take them."""
    if "position_ids" in inspect.signature(type(base).forward).parameters:
        return {"position_ids": places}
    return {}
