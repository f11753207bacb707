"""The state of one forward pass: which tokens it holds and who edits which rows.

One `Call` belongs to each hooked stack. A pre-hook on the stack describes the new tokens once; all
sites of the stack read that description. Nothing is guessed from call counters: generation opens a
scope that knows the prompt, training reads the labels, everything else says `prompt_lens`.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn

from reftune.errors import AdapterError, PositionError
from reftune.model.passes import IGNORE, Inputs, Rules, Scope, Snapshot
from reftune.model.positions import TIED, PositionRule, Tokens, row_index
from reftune.model.refusals import (
    as_mask,
    column,
    refuse_hidden_state,
    refuse_packed_with_mask,
    refuse_unreadable_mask,
    repeats,
)

EXTRA_INPUTS = ("intervention_mask", "prompt_lens", "subject_positions", "subspaces")
"""Keyword arguments of a model call that belong to interventions and never reach the model."""
MAX_PASSES = 16
"""Forward passes whose description is kept for recomputation in a backward pass."""


class Call:
    """State of the current forward pass of one stack.

    Args:
        is_encoder: Every real token belongs to the prompt.
        needs_labels: The model predicts the next token: in training a rule that needs the prompt's
            end must be told where it is.
        paired: The stack belongs to an encoder-decoder; its decoder's prompt is the start token.
    """

    def __init__(self, is_encoder: bool, needs_labels: bool, paired: bool = False) -> None:
        self.is_encoder, self.needs_labels, self.paired = is_encoder, needs_labels, paired
        self.rules: dict[str, Rules] = {}
        self.placements: dict[str, Any] = {}
        self.inputs = Inputs()
        self.said: Inputs | None = None
        self.scope: Scope | None = None
        self.rows: tuple[str, ...] | None = None
        self.now = Snapshot()
        self.passes: deque[Snapshot] = deque(maxlen=MAX_PASSES)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        fresh = Call(self.is_encoder, self.needs_labels, self.paired)
        for key in ("inputs", "said", "scope", "rows", "now", "passes"):
            state[key] = getattr(fresh, key)
        return state

    # Beginning of a forward pass

    def begin(self, stack: nn.Module, bound: dict[str, Any]) -> None:
        """Describe the new tokens of a forward pass from the stack's arguments."""
        inputs, self.inputs = self.inputs, Inputs()
        if not self.rules:
            return
        if not self.needs_labels:
            inputs.labels = None  # of a classifier: they say nothing about prompts
        inputs = inputs.filled(self.said)
        ids = bound.get("input_ids")
        ids = bound.get("inputs_embeds") if ids is None else ids
        if ids is None:
            raise PositionError(
                "The model was called without input_ids or inputs_embeds.", "Pass one."
            )
        batch, width = ids.shape[:2]
        self._refuse_continuous_batching(bound, stack, inputs)
        self.now = now = Snapshot(
            training=stack.training and self.scope is None,
            grad=torch.is_grad_enabled(),
            rows=self.rows,
            subspaces=inputs.subspaces,
            batch=batch,
            width=width,
            past=_past_length(bound.get("past_key_values")),
            scope_width=None if self.scope is None else self.scope.prompt_mask.shape[1],
        )
        now.idle = self._nothing_to_do()
        if now.idle:
            return
        now.tokens = self._describe(inputs, bound, ids.device)
        if now.grad:
            self.passes.append(now)

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
    def _refuse_continuous_batching(
        bound: dict[str, Any], stack: nn.Module, inputs: Inputs
    ) -> None:
        packed = bound.get("cu_seq_lens_q") is not None
        if packed and inputs.labels is None and not stack.training:
            raise PositionError(
                "Continuous batching packs several requests in one row; positions cannot be told "
                "apart here.",
                "Use generate().",
            )

    def _describe(self, inputs: Inputs, bound: dict[str, Any], device: torch.device) -> Tokens:
        now = self.now
        batch, width, past = now.batch, now.width, now.past
        attention = bound.get("attention_mask")
        valid = attention if isinstance(attention, Tensor) and attention.dim() == 2 else None
        if self.scope is not None and not self.is_encoder and not self.paired:
            refuse_hidden_state(now.width, now.scope_width, bound.get("past_key_values"))
            return self._in_scope(batch, width, past, device)
        if valid is None:
            segments = self._packed(bound.get("position_ids"), inputs)
            if segments is not None:
                return segments
            refuse_unreadable_mask(
                attention, [rules.current(now.training) for rules in self.rules.values()]
            )
            valid = torch.ones(batch, past + width, dtype=torch.bool, device=device)
        valid = valid.bool()
        if not past and not self.is_encoder:
            refuse_packed_with_mask(bound.get("position_ids"), valid)
        place = (valid.long().cumsum(1) - 1)[:, past : past + width]
        prompt = self._prompt_len(inputs, valid)
        mask = as_mask(inputs.mask, batch, width, device)
        subject = None if inputs.subject is None else column(inputs.subject, batch, "subject")
        subject = None if subject is None else subject.to(device)
        return Tokens(place, valid[:, past : past + width], prompt, mask, subject)

    def _in_scope(self, batch: int, width: int, past: int, device: torch.device) -> Tokens:
        """Describe columns of a generation, also for beams, chunked prefill and no cache."""
        scope = self.scope
        assert scope is not None
        times = max(1, batch // scope.prompt_mask.shape[0])
        prompt = scope.prompt_mask.to(device).repeat_interleave(times, 0)
        columns = prompt.shape[1]
        length = prompt.sum(1, keepdim=True)
        if scope.prompt_lens is not None:
            length = scope.prompt_lens.to(device).repeat_interleave(times, 0)
        valid = torch.ones(batch, max(past + width, columns), dtype=torch.bool, device=device)
        valid[:, :columns] = prompt
        place = valid.long().cumsum(1) - 1
        mask = None
        if scope.mask is not None:
            mask = torch.zeros_like(valid)
            mask[:, :columns] = scope.mask.to(device).bool().repeat_interleave(times, 0)
            mask = mask[:, past : past + width]
        subject = scope.subject
        if subject is not None:
            subject = subject.to(device).repeat_interleave(times, 0).reshape(batch, 1)
        window = slice(past, past + width)
        return Tokens(place[:, window], valid[:, window], length, mask, subject)

    def _packed(self, position_ids: Int[Tensor, " ..."] | None, inputs: Inputs) -> Tokens | None:
        """Describe packed rows: positions restart at 0 inside a row."""
        now = self.now
        if position_ids is None or now.past or position_ids.dim() != 2 or self.is_encoder:
            return None
        starts = position_ids == 0
        if position_ids.shape != (now.batch, now.width) or not bool(starts[:, 1:].any()):
            return None
        if inputs.prompt_lens is not None:
            raise PositionError(
                "prompt_lens gives one number a row, but rows hold several sequences: position_ids "
                "start again inside them.",
                "Pass labels= instead; each sequence's prompt then ends at its first label.",
            )
        segment = starts.long().cumsum(1)
        valid = torch.ones_like(starts)
        segments = int(segment.max())
        count = segment.new_zeros(now.batch, segments + 1)
        length = count.scatter_add(1, segment, torch.ones_like(segment))
        labels = inputs.labels
        if labels is not None and labels.shape == position_ids.shape:
            place = torch.where(labels == IGNORE, length.gather(1, segment), position_ids)
            length = length.scatter_reduce(1, segment, place, "amin")
        elif now.training and self.needs_labels and inputs.mask is None:
            now.unknown = "a packed row without labels"
        mask = as_mask(inputs.mask, now.batch, now.width, starts.device)
        return Tokens(position_ids, valid, length.gather(1, segment), mask, segments=segments)

    def _prompt_len(
        self, inputs: Inputs, valid: Bool[Tensor, "batch seq"]
    ) -> Int[Tensor, "batch 1"]:
        """Return the prompt's length, or note that it is not known."""
        now = self.now
        total = valid.sum(1, keepdim=True)
        if self.paired and not self.is_encoder:
            return torch.ones_like(total)
        if inputs.prompt_lens is not None:
            return column(inputs.prompt_lens, now.batch, "prompt_lens").to(total.device)
        if self.is_encoder:
            return total
        labels = inputs.labels
        if labels is not None and labels.shape == (now.batch, now.width):
            columns = slice(now.past, now.past + now.width)
            labelled = labels.to(total.device) != IGNORE
            before = (labelled.long().cumsum(1) == 0) & valid[:, columns]
            return before.sum(1, keepdim=True) + valid[:, : now.past].sum(1, keepdim=True)
        if now.past:
            now.unknown = "a call with cached tokens"
        elif now.training and self.needs_labels and inputs.mask is None:
            now.unknown = "a training step without labels (label smoothing drops them)"
        return total

    def _refuse_unknown_end(self, rule: PositionRule) -> None:
        now = self.now
        short = rule.prefix > now.past > 0  # a short prompt's first tokens may have run out
        if now.unknown and (rule.needs_prompt_end or short):
            raise PositionError(
                f'In {now.unknown} the end of the prompt is unknown, but "{rule}" depends on it.',
                "Pass labels= or prompt_lens=, or use reftune.prompt_scope(model, prompt_lens).",
            )

    # Questions of the sites

    def place(
        self, keys: tuple[tuple[str, str], ...]
    ) -> tuple[
        Int[Tensor, "batch columns"] | None,
        dict[tuple[str, str], Bool[Tensor, "batch columns 1"]],
    ]:
        """Return which columns a site gathers, and which of them each (adapter, group) pair edits.

        No columns means all of them; the masks of the pairs then have one entry a new token.
        """
        now = self.now
        found = now.places.get(keys)
        if found is None:
            found = now.places[keys] = self._place(now, keys)
        return found

    def _place(
        self, now: Snapshot, keys: tuple[tuple[str, str], ...]
    ) -> tuple[
        Int[Tensor, "batch columns"] | None,
        dict[tuple[str, str], Bool[Tensor, "batch columns 1"]],
    ]:
        assert now.tokens is not None
        masks, bound = {}, 0
        for name, group in keys:
            rules = self.rules[name]
            rule = rules.current(now.training)
            self._refuse_unknown_end(rule)
            mask = rule.select(now.tokens, group if group in rule.groups else TIED, rules.short)
            if now.rows is not None:
                mask = mask & self._rows_of(name, mask)
            masks[name, group] = mask
            bound = None if bound is None or rule.bound is None else bound + rule.bound
        union = masks[keys[0]]
        for key in keys[1:]:
            union = union | masks[key]
        index = row_index(union, None if bound is None else bound * now.tokens.segments)
        if index is not None:
            masks = {key: mask.gather(1, index) for key, mask in masks.items()}
        return index, {key: mask[..., None] for key, mask in masks.items()}

    def _rows_of(
        self, name: str, mask: Bool[Tensor, "batch new_tokens"]
    ) -> Bool[Tensor, "batch 1"]:
        rows = self.now.rows
        assert rows is not None
        if self.scope is None and mask.shape[0] != len(rows):
            raise AdapterError(
                f"{len(rows)} adapter names were given for {mask.shape[0]} rows.",
                "Give one per row.",  # only a generation repeats its rows (beams)
            )
        times = repeats(mask.shape[0], len(rows), "adapter names")
        mine = torch.tensor([row == name for row in rows], device=mask.device)
        return mine.repeat_interleave(times)[:, None]

    def subspace_mask(
        self, rank: int, batch: int, device: torch.device
    ) -> Bool[Tensor, "{batch} {rank}"] | None:
        """Return True where a dimension acts on a row, or None when all do."""
        chosen = self.now.subspaces
        if chosen is None:
            return None
        times = repeats(batch, len(chosen), "subspace rows")
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
        return mask.repeat_interleave(times, 0)

    # Questions without a forward pass

    def preview(
        self,
        names: Iterable[str],
        inputs: Inputs,
        valid: Bool[Tensor, "batch seq"],
        training: bool,
    ) -> tuple[Bool[Tensor, "batch seq"], Int[Tensor, "batch 1"]]:
        """Return the columns that adapters would edit, and the prompts' lengths; nothing runs.

        Args:
            names: The adapters; of those, where rows have their own, each edits its rows.
            inputs: What the caller of the pass would say.
            valid: True at real tokens.
            training: Which of an adapter's rules are in force.

        Raises:
            PositionError: Where the pass itself would: the prompt's end is not known, or a column
                that a rule needs was not given.
        """
        before = self.now
        batch, width = valid.shape
        self.now = now = Snapshot(training=training, rows=self.rows, batch=batch, width=width)
        try:
            tokens = self._describe(inputs, {"attention_mask": valid}, valid.device)
            edited = torch.zeros_like(valid)
            for name in sorted(names):
                rules = self.rules[name]
                rule = rules.current(training)
                self._refuse_unknown_end(rule)
                mask = rule.select(tokens, TIED, rules.short)
                edited |= mask if now.rows is None else mask & self._rows_of(name, mask)
            return edited, tokens.prompt_len
        finally:
            self.now = before

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Inside, forward passes are neither described nor edited, whatever rows they hold."""
        before = self.rules, self.now
        self.rules, self.now = {}, Snapshot()
        try:
            yield
        finally:
            self.rules, self.now = before

    # Recomputation under gradient checkpointing

    def remember(self, x: Shaped[Tensor, "*tokens dim"]) -> None:
        """Note that a block ran on `x` in this pass."""
        self.now.inputs.add((x.data_ptr(), tuple(x.shape)))

    def recall(self, x: Shaped[Tensor, "*tokens dim"]) -> None:
        """Restore the description of the last pass in which a block ran on `x`.

        A checkpoint keeps the block's input alive, so its address still names it in the backward
        pass; a later pass that used the same address can only have done so after it was freed.
        """
        key = (x.data_ptr(), tuple(x.shape))
        for seen in reversed(self.passes):
            if key in seen.inputs:
                self.now = seen
                return
        if len(self.passes) == MAX_PASSES:
            raise AdapterError(
                f"A block is recomputed that ran more than {MAX_PASSES} forward passes ago; what "
                "its edits were is no longer known.",
                f"Run backward after at most {MAX_PASSES} forward passes under checkpointing.",
            )

    def open(self, scope: Scope) -> Scope | None:
        """Enter a generation; returns the scope that was open before."""
        before, self.scope = self.scope, scope
        return before


def _past_length(cache: Any) -> int:
    if cache is None:
        return 0
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def bind(stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a stack's forward by name."""
    if not args:
        return kwargs
    names = [n for n in inspect.signature(type(stack).forward).parameters if n != "self"]
    return {**dict(zip(names, args)), **kwargs}
