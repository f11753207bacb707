"""The run seam: the one call through which objectives reach the model.

Logits exist at label positions only. The base runs without its head, the rows that carry a label
are gathered, and the head sees nothing else: with a vocabulary of 128,000 that is most of the
memory and a third of the time of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor, nn

from reftune.errors import ModelError
from reftune.model import causal, cutting
from reftune.model.adapters import prompt_scope
from reftune.model.passes import IGNORE
from reftune.model.sites import base_of


@dataclass
class Prepared:
    """A batch ready to run.

    Attributes:
        input_ids: Token ids.
        attention_mask: 1 at real tokens; cached ones come first where `extra` brings a cache.
        labels: Token ids at labels, -100 elsewhere, unshifted; one a column of `input_ids`, or of
            the decoder's targets. Or class labels.
        intervention_mask: Explicit edit columns, or None.
        select: Subspace dimensions per row, or None.
        prompt_lens: Real prompt tokens per row; None: what stands before the first label.
        subject_positions: Place of the subject's last token, or None.
        weights: A number for each label (one a column), for objectives that weigh tokens, or None.
        guides: The targets of these rows behind other prompts, by the names of the prompts.
        rows: In a guide: the rows of the batch that its own rows stand for.
        extra: Further model inputs, for instance `token_type_ids` or `position_ids`.
    """

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch cached_and_seq"]
    labels: Int[Tensor, "batch targets"] | Real[Tensor, " batch"]
    intervention_mask: Bool[Tensor, "batch seq"] | None = None
    select: list | None = None
    prompt_lens: Int[Tensor, " batch"] | None = None
    subject_positions: Int[Tensor, " batch"] | None = None
    weights: Float[Tensor, "batch _"] | None = None
    guides: dict[str, Prepared] = field(default_factory=dict)
    rows: Int[Tensor, " batch"] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return self.input_ids.shape[0]


@dataclass
class RunOutput:
    """What came back at the label positions.

    Attributes:
        logits: One row a label, in the order of `rows` and then of position.
        labels: Those of the tokens, or of the classes.
        rows: Batch row of each label.
        hidden: Last hidden states that predict the labels, if asked for.
        class_logits: Of a sequence classifier, one row a label; then only `labels` goes with them.
        num_rows: Rows of the batch.
    """

    logits: Float[Tensor, "labels vocab"] | None
    labels: Real[Tensor, " labels"]
    rows: Int[Tensor, " labels"] | None
    hidden: Float[Tensor, "labels dim"] | None = None
    class_logits: Float[Tensor, "labels classes"] | None = None
    num_rows: int = 0


class Runner:
    """Runs prepared batches.

    Args:
        model: A transformers model, plain, with our adapters, or inside PEFT or DDP.
        source: Where the constants of a batch come from; None computes everything at each call.
            Objectives cannot tell the difference.
    """

    def __init__(self, model: nn.Module, source: causal.Source | None = None) -> None:
        self.model, self.source = model, source

    def __call__(
        self, prepared: Prepared, hidden: bool = False, inference: bool = False
    ) -> RunOutput:
        """Run one batch.

        Args:
            prepared: The batch.
            hidden: Also return the last hidden states.
            inference: Run the model as it is used afterwards: no gradients, no dropout, the edits
                of inference, and no other process waited for.

        Raises:
            ModelError: If a row has no label, or the model has no head for its labels.
        """
        if inference:
            with as_used(self.model) as model:
                return Runner(model)(prepared, hidden)
        if prepared.labels.dim() == 1:
            return self._classify(prepared)
        base = base_of(_unwrapped(self.model))
        if getattr(base.config, "is_encoder_decoder", False):
            return self._seq2seq(prepared, hidden)
        return self._causal(prepared, hidden)

    def _scope(self, prepared: Prepared) -> Any:
        return prompt_scope(
            _unwrapped(self.model),
            prepared.prompt_lens,
            labels=prepared.labels,
            intervention_mask=prepared.intervention_mask,
            subject_positions=prepared.subject_positions,
            subspaces=prepared.select,
        )

    def _causal(self, prepared: Prepared, hidden: bool) -> RunOutput:
        model = _unwrapped(self.model)
        suffix = None if self.source is None else cutting.split(model, prepared)
        if suffix is None:
            return self._predict(prepared, hidden)
        with causal.running(model, suffix, self.source(suffix)) as batch:
            return self._predict(batch, hidden)

    def _predict(self, prepared: Prepared, hidden: bool) -> RunOutput:
        labels = prepared.labels[:, 1:]
        where = labels != IGNORE
        catcher = _HeadGather(base_of(_unwrapped(self.model)), *_labelled(where), keep=hidden)
        packed = "position_ids" in prepared.extra
        mask = None if packed else prepared.attention_mask
        inputs = {"attention_mask": mask, "use_cache": False, **prepared.extra}
        with self._scope(prepared), catcher:
            output = self.model(input_ids=prepared.input_ids, **inputs)
        return catcher.output(output.logits, labels[where], prepared.num_rows)

    def _seq2seq(self, prepared: Prepared, hidden: bool) -> RunOutput:
        base = base_of(_unwrapped(self.model))
        where = prepared.labels != IGNORE
        catcher = _HeadGather(base, *_labelled(where), keep=hidden)
        extra = {"decoder_input_ids": _shifted(base, prepared.labels), **prepared.extra}
        with self._scope(prepared), catcher:
            output = self.model(
                input_ids=prepared.input_ids,
                attention_mask=prepared.attention_mask,
                use_cache=False,
                **extra,
            )
        return catcher.output(output.logits, prepared.labels[where], prepared.num_rows)

    def _classify(self, prepared: Prepared) -> RunOutput:
        with self._scope(prepared):
            output = self.model(
                input_ids=prepared.input_ids,
                attention_mask=prepared.attention_mask,
                **prepared.extra,
            )
        return RunOutput(
            None, prepared.labels, None, class_logits=output.logits, num_rows=prepared.num_rows
        )


class _HeadGather:
    """For one forward pass, let the output head see only the columns that predict a label."""

    def __init__(
        self,
        base: nn.Module,
        rows: Int[Tensor, " labels"],
        columns: Int[Tensor, " labels"],
        keep: bool,
    ) -> None:
        self.head = base.get_output_embeddings()
        self.rows, self.columns, self.keep = rows, columns, keep
        self.hidden: Float[Tensor, "labels dim"] | None = None
        self.used = False

    def __enter__(self) -> _HeadGather:
        if self.head is None:
            raise ModelError(
                "The model has no language-model head.", "Load a causal language model."
            )
        self.handle = self.head.register_forward_pre_hook(self._gather)
        return self

    def _gather(self, head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states = args[0][self.rows, self.columns]
        self.used = True
        if self.keep:
            self.hidden = states
        return (states[None], *args[1:])

    def __exit__(self, *error: object) -> None:
        self.handle.remove()

    def output(
        self, logits: Float[Tensor, "_ _ vocab"], labels: Int[Tensor, " labels"], num_rows: int
    ) -> RunOutput:
        """Return what came back of the model's logits: one row of `labels`, or every token's."""
        if self.used:
            logits = logits.reshape(-1, logits.shape[-1])
        else:
            logits = logits[self.rows, self.columns]
        return RunOutput(logits, labels, self.rows, self.hidden, num_rows=num_rows)


@contextmanager
def as_used(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the bare model in evaluation mode without gradients; every module's mode comes back.

    Without the wrapper of DDP, whose forward passes talk to the other processes: one of them may
    have nothing to ask.
    """
    model = _unwrapped(model)
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield model
    finally:
        for module in training:
            module.training = True


def _labelled(
    where: Bool[Tensor, "batch targets"],
) -> tuple[Int[Tensor, " labels"], Int[Tensor, " labels"]]:
    """Return rows and columns of the labels."""
    rows, columns = where.nonzero(as_tuple=True)
    if rows.numel() == 0:
        raise ModelError("No row of the batch has a label.", "Check that rows have a target.")
    return rows, columns


def _shifted(base: nn.Module, labels: Int[Tensor, "batch targets"]) -> Int[Tensor, "batch targets"]:
    """Return what the decoder reads to predict `labels`: the start token, then they."""
    if hasattr(base, "prepare_decoder_input_ids_from_labels"):
        return base.prepare_decoder_input_ids_from_labels(labels=labels)
    config = base.config
    start = getattr(config, "decoder_start_token_id", None)
    start = config.pad_token_id if start is None else start
    ids = labels.roll(1, dims=1)
    ids[:, 0] = start
    return ids.masked_fill(ids == IGNORE, config.pad_token_id)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DDP or torch.compile."""
    while hasattr(model, "module") and not hasattr(model, "config"):
        model = model.module
    return getattr(model, "_orig_mod", model)
