"""The run seam: the one call through which objectives reach the model.

Logits exist at label positions only. The base runs without its head, the rows that carry a label
are gathered, and the head sees nothing else: with a vocabulary of 128,000 that is most of the
memory and a third of the time of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reftune.errors import ModelError
from reftune.model.adapters import prompt_scope
from reftune.model.sites import base_of

IGNORE = -100


@dataclass
class Prepared:
    """A batch ready to run.

    Attributes:
        input_ids: Token ids `[B, T]`.
        attention_mask: 1 at real tokens, `[B, T]`.
        labels: Token ids at labels, -100 elsewhere, unshifted `[B, T]`; or class labels `[B]`.
        intervention_mask: Explicit edit columns `[B, T]`, or None.
        select: Subspace dimensions per row, or None.
        prompt_lens: Real prompt tokens per row `[B]`; None: what stands before the first label.
        subject_positions: Place of the subject's last token `[B]`, or None.
        extra: Further model inputs, for instance `token_type_ids` or `position_ids`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    intervention_mask: Tensor | None = None
    select: list | None = None
    prompt_lens: Tensor | None = None
    subject_positions: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return self.input_ids.shape[0]


@dataclass
class RunOutput:
    """What came back at the label positions.

    Attributes:
        logits: `[n, V]`, one row a label, in the order of `rows` and then of position.
        labels: `[n]`.
        rows: Batch row of each label, `[n]`.
        hidden: Last hidden states that predict the labels, `[n, d]`, if asked for.
        class_logits: `[B, C]` of a sequence classifier; then the fields above are empty.
        num_rows: Rows of the batch.
    """

    logits: Tensor | None
    labels: Tensor
    rows: Tensor | None
    hidden: Tensor | None = None
    class_logits: Tensor | None = None
    num_rows: int = 0


class Runner:
    """Runs prepared batches.

    Args:
        model: A transformers model, plain, with our adapters, or inside PEFT or DDP.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, prepared: Prepared, hidden: bool = False) -> RunOutput:
        """Run one batch.

        Raises:
            ModelError: If a row has no label, or the model has no head for its labels.
        """
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
        labels = prepared.labels[:, 1:]
        where = labels != IGNORE
        rows, columns = where.nonzero(as_tuple=True)
        if rows.numel() == 0:
            raise ModelError("No row of the batch has a label.", "Check that rows have a target.")
        catcher = _HeadGather(base_of(_unwrapped(self.model)), rows, columns, keep=hidden)
        with self._scope(prepared), catcher:
            output = self.model(
                input_ids=prepared.input_ids,
                attention_mask=None
                if "position_ids" in prepared.extra
                else prepared.attention_mask,
                use_cache=False,
                **prepared.extra,
            )
        logits = output.logits
        logits = logits.reshape(-1, logits.shape[-1]) if catcher.used else logits[rows, columns]
        return RunOutput(logits, labels[where], rows, catcher.hidden, num_rows=prepared.num_rows)

    def _seq2seq(self, prepared: Prepared, hidden: bool) -> RunOutput:
        where = prepared.labels != IGNORE
        rows, columns = where.nonzero(as_tuple=True)
        with self._scope(prepared):
            output = self.model(
                input_ids=prepared.input_ids,
                attention_mask=prepared.attention_mask,
                labels=prepared.labels,
                use_cache=False,
                output_hidden_states=hidden,
                **prepared.extra,
            )
        states = output.decoder_hidden_states[-1][rows, columns] if hidden else None
        return RunOutput(
            output.logits[rows, columns],
            prepared.labels[where],
            rows,
            states,
            num_rows=prepared.num_rows,
        )

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

    def __init__(self, base: nn.Module, rows: Tensor, columns: Tensor, keep: bool) -> None:
        self.head = base.get_output_embeddings()
        self.rows, self.columns, self.keep = rows, columns, keep
        self.hidden: Tensor | None = None
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


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DDP or torch.compile."""
    while hasattr(model, "module") and not hasattr(model, "config"):
        model = model.module
    return getattr(model, "_orig_mod", model)


@torch.no_grad()
def label_log_probs(run: Runner, prepared: Prepared) -> Tensor:
    """Return the summed log-probability of each row's labels, `[B]` in fp32."""
    output = run(prepared)
    assert output.logits is not None and output.rows is not None
    chosen = output.logits.float().log_softmax(-1).gather(1, output.labels[:, None])[:, 0]
    return chosen.new_zeros(output.num_rows).index_add(0, output.rows, chosen)
