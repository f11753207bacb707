"""The state of one forward pass: which tokens it holds and who edits which rows.

One `Call` belongs to each hooked stack. A pre-hook on the stack describes the new tokens once; all
sites of the stack read that description. Nothing is guessed from call counters: generation opens a
scope that knows the prompt, training reads the labels, everything else says `prompt_lens`.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reftune.errors import PositionError
from reftune.model.positions import TIED, PositionRule, Tokens, row_index

EXTRA_INPUTS = ("intervention_mask", "prompt_lens", "subject_positions", "subspaces")
"""Keyword arguments of a model call that belong to interventions and never reach the model."""
MAX_SNAPSHOTS = 64


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
        prompt_mask: Real prompt tokens `[B, P]`.
        mask: Explicit edit columns over the prompt, `[B, P]`, or None.
        subject: Place of the subject per row, `[B]`, or None.
    """

    prompt_mask: Tensor
    mask: Tensor | None = None
    subject: Tensor | None = None


@dataclass
class Inputs:
    """What the caller said beside the model's own inputs."""

    labels: Tensor | None = None
    prompt_lens: Tensor | None = None
    mask: Tensor | None = None
    subject: Tensor | None = None
    subspaces: Any = None


@dataclass
class Snapshot:
    """The description of one forward pass, kept for recomputation in the backward pass."""

    tokens: Tokens | None
    training: bool
    rows: tuple[str, ...] | None
    subspaces: Any
    idle: bool
    width: int = 0
    past: int = 0
    scope_width: int | None = None
    places: dict[tuple, tuple[Tensor | None, dict]] = field(default_factory=dict)


class Call:
    """State of the current forward pass of one stack.

    Args:
        is_encoder: Every real token belongs to the prompt.
        needs_labels: In training a rule that needs the prompt's end must be told where it is.
    """

    def __init__(self, is_encoder: bool, needs_labels: bool) -> None:
        self.is_encoder, self.needs_labels = is_encoder, needs_labels
        self.rules: dict[str, Rules] = {}
        self.inputs = Inputs()
        self.said: Inputs | None = None
        self.scope: Scope | None = None
        self.rows: tuple[str, ...] | None = None
        self.now = Snapshot(None, False, None, None, idle=True)
        self.snapshots: OrderedDict[tuple, Snapshot] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        fresh = Call(self.is_encoder, self.needs_labels)
        for key in ("inputs", "said", "scope", "rows", "now", "snapshots"):
            state[key] = getattr(fresh, key)
        return state

    # Beginning of a forward pass

    def begin(self, stack: nn.Module, bound: dict[str, Any]) -> None:
        """Describe the new tokens of a forward pass from the stack's arguments."""
        inputs, self.inputs = self.inputs, Inputs()
        if not self.rules:
            return
        ids = bound.get("input_ids")
        shape = ids if ids is not None else bound.get("inputs_embeds")
        if shape is None:
            raise PositionError(
                "The model was called without input_ids or inputs_embeds.", "Pass one."
            )
        batch, width = shape.shape[:2]
        self._refuse_continuous_batching(bound, stack)
        past = _past_length(bound.get("past_key_values"))
        self.now = Snapshot(
            None,
            stack.training,
            self.rows,
            inputs.subspaces,
            False,
            width,
            past,
            None if self.scope is None else self.scope.prompt_mask.shape[1],
        )
        if self._nothing_to_do():
            self.now.idle = True
            return
        self.now.tokens = self._describe(inputs, bound, batch, width, past, shape.device)

    def _nothing_to_do(self) -> bool:
        """Say in plain integers whether no rule can touch a column of this pass (decoding)."""
        now = self.now
        if now.scope_width is None or now.past < now.scope_width:
            return False
        generated = now.past - now.scope_width
        rules = [rules.current(now.training) for rules in self.rules.values()]
        return all(
            rule.prompt_only or (rule.generated <= generated and not (rule.response or rule.all))
            for rule in rules
        )

    @staticmethod
    def _refuse_continuous_batching(bound: dict[str, Any], stack: nn.Module) -> None:
        if "cu_seq_lens_q" in bound and not stack.training:
            raise PositionError(
                "Continuous batching packs several requests in one row; positions cannot be told apart here.",
                "Use generate(), or the reftune server.",
            )

    def _describe(
        self,
        inputs: Inputs,
        bound: dict[str, Any],
        batch: int,
        width: int,
        past: int,
        device: torch.device,
    ) -> Tokens:
        attention = bound.get("attention_mask")
        valid = attention if isinstance(attention, Tensor) and attention.dim() == 2 else None
        if self.scope is not None and not self.is_encoder:
            return self._in_scope(batch, width, past, device)
        if valid is None:
            segments = self._packed(bound.get("position_ids"), inputs, past)
            if segments is not None:
                return segments
            valid = torch.ones(batch, past + width, dtype=torch.bool, device=device)
        valid = valid.bool()
        place = (valid.long().cumsum(1) - 1)[:, past : past + width]
        total = valid.sum(1, keepdim=True)
        prompt = self._prompt_len(inputs, valid, width, past, total)
        subject = None if inputs.subject is None else inputs.subject.to(device).reshape(batch, 1)
        return Tokens(
            place, valid[:, past : past + width], prompt, _as_mask(inputs.mask, width), subject
        )

    def _in_scope(self, batch: int, width: int, past: int, device: torch.device) -> Tokens:
        """Describe columns of a generation, also for beams, chunked prefill and no cache."""
        scope = self.scope
        assert scope is not None
        repeats = max(1, batch // scope.prompt_mask.shape[0])
        prompt = scope.prompt_mask.to(device).repeat_interleave(repeats, 0)
        columns = prompt.shape[1]
        length = prompt.sum(1, keepdim=True)
        valid = torch.ones(batch, max(past + width, columns), dtype=torch.bool, device=device)
        valid[:, :columns] = prompt
        place = valid.long().cumsum(1) - 1
        mask = None
        if scope.mask is not None:
            mask = torch.zeros_like(valid)
            mask[:, :columns] = scope.mask.to(device).bool().repeat_interleave(repeats, 0)
            mask = mask[:, past : past + width]
        subject = scope.subject
        if subject is not None:
            subject = subject.to(device).repeat_interleave(repeats, 0).reshape(batch, 1)
        window = slice(past, past + width)
        return Tokens(place[:, window], valid[:, window], length, mask, subject)

    def _packed(self, position_ids: Tensor | None, inputs: Inputs, past: int) -> Tokens | None:
        """Describe packed rows: positions restart at 0 inside a row."""
        if position_ids is None or past or position_ids.dim() != 2 or self.is_encoder:
            return None
        starts = position_ids == 0
        if not bool(starts[:, 1:].any()):
            return None
        segment = starts.long().cumsum(1)
        valid = torch.ones_like(starts)
        if inputs.labels is not None and inputs.labels.shape == position_ids.shape:
            labelled = (inputs.labels != -100).long()
            place_of_label = torch.where(labelled.bool(), position_ids, position_ids.max() + 1)
            fill = torch.full(
                (segment.shape[0], int(segment.max()) + 1), int(position_ids.max()) + 1
            )
            first = fill.to(segment.device).scatter_reduce(1, segment, place_of_label, "amin")
            prompt = first.gather(1, segment)
        else:
            self._refuse_unknown_end("a packed row")
            count = torch.zeros(segment.shape[0], int(segment.max()) + 1, dtype=torch.long)
            count = count.to(segment.device).scatter_add(1, segment, torch.ones_like(segment))
            prompt = count.gather(1, segment)
        return Tokens(position_ids, valid, prompt, _as_mask(inputs.mask, starts.shape[1]))

    def _prompt_len(
        self, inputs: Inputs, valid: Tensor, width: int, past: int, total: Tensor
    ) -> Tensor:
        if inputs.prompt_lens is not None:
            return inputs.prompt_lens.to(total.device).reshape(-1, 1)
        labels = inputs.labels
        if (
            labels is not None
            and labels.dim() == 2
            and labels.shape[1] == width
            and not self.is_encoder
        ):
            labelled = labels.to(total.device) != -100
            before = (labelled.long().cumsum(1) == 0) & valid[:, past : past + width]
            return before.sum(1, keepdim=True) + valid[:, :past].sum(1, keepdim=True)
        if labels is None and self.needs_labels:
            if past:
                self._refuse_unknown_end("a call with cached tokens")
            elif self.now.training and inputs.mask is None:
                self._refuse_unknown_end(
                    "a training step without labels (label smoothing drops them)"
                )
        return total

    def _refuse_unknown_end(self, situation: str) -> None:
        rules = [r.current(self.now.training) for r in self.rules.values()]
        needy = [rule for rule in rules if rule.needs_prompt_end]
        if needy:
            raise PositionError(
                f'In {situation} the end of the prompt is unknown, but "{needy[0]}" depends on it.',
                "Pass labels= or prompt_lens=, or use reftune.prompt_scope(model, prompt_lens).",
            )

    # Questions of the sites

    def place(self, keys: tuple[tuple[str, str], ...]) -> tuple[Tensor | None, dict]:
        """Return gather columns and weights for the (adapter, group) pairs of a site.

        Returns:
            (index, weights): index `[B, K]` or None for all columns; weights maps each pair to
            `[B, K, 1]` booleans, or to None when every column is edited.
        """
        now = self.now
        found = now.places.get(keys)
        if found is None:
            found = now.places[keys] = self._place(now, keys)
        return found

    def _place(
        self, now: Snapshot, keys: tuple[tuple[str, str], ...]
    ) -> tuple[Tensor | None, dict]:
        assert now.tokens is not None
        masks, bound = {}, 0
        for name, group in keys:
            rules = self.rules[name]
            rule = rules.current(now.training)
            mask = rule.select(now.tokens, group if group in rule.groups else TIED, rules.short)
            if now.rows is not None:
                mask = mask & self._rows_of(name, mask)
            masks[name, group] = mask
            bound = None if bound is None or rule.bound is None else bound + rule.bound
        union = masks[keys[0]]
        for key in keys[1:]:
            union = union | masks[key]
        index = row_index(union, bound)
        if index is not None:
            masks = {key: mask.gather(1, index) for key, mask in masks.items()}
        return index, {key: mask[..., None] for key, mask in masks.items()}

    def _rows_of(self, name: str, mask: Tensor) -> Tensor:
        rows = self.now.rows
        assert rows is not None
        repeats = max(1, mask.shape[0] // len(rows))
        mine = torch.tensor([row == name for row in rows], device=mask.device)
        return mine.repeat_interleave(repeats)[:, None]

    def subspace_mask(self, rank: int, batch: int, device: torch.device) -> Tensor | None:
        """Return `[B, rank]`, True where a dimension acts, or None when all do."""
        chosen = self.now.subspaces
        if chosen is None:
            return None
        mask = torch.zeros(len(chosen), rank, dtype=torch.bool, device=device)
        for row, dims in enumerate(chosen):
            dims = range(rank) if dims is None else dims
            for dim in dims:
                if not 0 <= dim < rank:
                    raise PositionError(
                        f"Row {row} selects subspace dimension {dim}, but the rank is {rank}.",
                        f"Use dimensions from 0 to {rank - 1}.",
                    )
                mask[row, dim] = True
        return mask.repeat_interleave(max(1, batch // len(chosen)), 0)

    # Recomputation under gradient checkpointing

    def remember(self, x: Tensor) -> None:
        """Keep this pass's description under the identity of a block's input."""
        key = (x.data_ptr(), tuple(x.shape))
        self.snapshots[key] = self.now
        self.snapshots.move_to_end(key)
        while len(self.snapshots) > MAX_SNAPSHOTS:
            self.snapshots.popitem(last=False)

    def recall(self, x: Tensor) -> None:
        """Restore the description that belonged to a block's input, inside a backward pass."""
        found = self.snapshots.get((x.data_ptr(), tuple(x.shape)))
        if found is not None:
            self.now = found

    def open(self, scope: Scope) -> Scope | None:
        """Enter a generation; returns the scope that was open before."""
        before, self.scope = self.scope, scope
        return before


def _past_length(cache: Any) -> int:
    if cache is None:
        return 0
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def _as_mask(mask: Tensor | None, width: int) -> Tensor | None:
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[1] != width:
        raise PositionError(
            f"intervention_mask has shape {tuple(mask.shape)}, but the rows have {width} tokens.",
            "Give one boolean per token.",
        )
    return mask.bool()


def bind(stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a stack's forward by name."""
    if not args:
        return kwargs
    names = [n for n in inspect.signature(type(stack).forward).parameters if n != "self"]
    return {**dict(zip(names, args)), **kwargs}
