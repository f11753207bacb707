"""NLFT: supervised training whose token weights come from natural-language guidance.

A model's own answers are asked for again behind prompts that add the right solution, or a judgment
of what is wrong; how the probability of each token moves decides how much it is trained, and
whether it is trained away (Liu et al. 2024, arXiv 2412.20382). The weights are in
`reftune.objectives.saliency`; this file asks the model and puts the loss together.

Left out on purpose: scores in place of judgments, the packed plain-text baseline of the published
code, encoder-decoders, and `guidance: current` on sharded parameters (FSDP).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor, nn
from torch.nn import functional as F

from reftune.errors import DataError, RecipeError, TrainingError
from reftune.model.passes import IGNORE
from reftune.model.positions import PositionRule
from reftune.objectives.base import Loss, Objective, ObjectiveConfig, share_of
from reftune.objectives.saliency import (
    Constants,
    Saliency,
    saliency,
    token_losses,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftune.config.recipe import AdapterSpec
    from reftune.model.run import Prepared, RunOutput
    from reftune.objectives.base import Parts, Run
    from reftune.report.saliency import TokenMap
    from reftune.training.encode import Encoded

log = logging.getLogger(__name__)

STANDARD, JUDGE = "standard", "judge"
"""Names of the two guides: with the right solution, and with a judgment."""


@dataclass(frozen=True)
class NlftConfig(ObjectiveConfig, Constants):
    """Settings of NLFT."""

    guidance: Literal["current", "frozen"] = "current"
    """Whose probabilities make the weights: the model's as it is trained (two or three forward
    passes a step, one with gradients), or the untrained model's, once: a step then costs what
    supervised training costs."""
    scale: float = 10.0
    """Factor on the whole loss, as published. Under AdamW only `clip` and `eps` feel it."""
    wrong_nll: Literal["none", "reference"] = "none"
    """Likelihood that is added for wrong answers. `reference` brings back the published code's,
    whose labels stand at the wrong tokens; for comparisons only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale > 0:
            raise RecipeError(f"scale is {self.scale}.", "Use a number above 0.")
        if self.wrong_nll == "reference" and self.guidance == "frozen":
            raise RecipeError(
                "wrong_nll: reference needs the judgments in each step, and guidance: frozen asks "
                "once.",
                "Use guidance: current, or wrong_nll: none.",
            )


class Nlft(Objective):
    """Likelihood and unlikelihood of answers, each token weighed by what guidance says of it.

    Right answer (no judgment): L = −(1/N) Σ_t (w_t + 1) log p_b(t)

    Wrong answer: L = −(1/N) [Σ_{t ∈ U} w_t log(1 − p_b(t)) + Σ_{t ∉ U} w_t log p_b(t)]

    N tokens of the answer, EOS among them. The loss is `scale` times the mean of L over the answers
    of the optimiser step. w and U: `reftune.objectives.saliency.saliency`; no gradient flows into
    them, and the model is asked as it is at inference: without dropout.

    Metrics, means over answers of means over tokens: `nll` (−log p_b, unweighted), `token_weight`
    (of likelihood), `unlike_tokens` (share trained away); with `guidance: current` also
    `salient_tokens`, `near_tokens`, `wrong_answers` and `crowded_answers` (those whose other tokens
    are left out), as shares.
    """

    Config = NlftConfig
    name = "nlft"
    title = "NLFT"
    source = "Liu et al. 2024, arXiv 2412.20382"
    plots: ClassVar = {
        "token_weights": (
            ("token_weight",),
            ("salient_tokens", "near_tokens", "unlike_tokens"),
            ("nll",),
        )
    }

    config: NlftConfig

    # Before training

    def check(self, adapter: AdapterSpec) -> None:
        """Refuse positions that rows must tell: guides cannot."""
        from reftune import interventions

        if self.config.guidance == "frozen" or adapter.method not in interventions.names():
            return
        for text in (adapter.positions, adapter.train_positions):
            rule = PositionRule.parse(text) if text else None
            if rule is not None and (rule.mask or rule.subject_last):
                raise RecipeError(
                    f'positions: "{text}" needs marks in the prompt, and guides have none.',
                    "Use guidance: frozen, or positions without mask and subject_last.",
                )

    def training_rows(
        self, rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, max_len: int
    ) -> list[Encoded]:
        """Return the rows after checking that each has its guide.

        Raises:
            DataError: If one has none.
        """
        for row in rows:
            _require_guide(row)
        wrong = sum(JUDGE in (row.guides or ()) for row in rows)
        log.info("nlft: %d right and %d wrong answers", len(rows) - wrong, wrong)
        return list(rows)

    def bind(self, trained: Mapping[str, nn.Parameter], sharded: bool = False) -> None:
        """Refuse what cannot be asked in each step by each process alone.

        Raises:
            TrainingError: If parameters are sharded, or a quirk would need several processes.
        """
        if sharded and self.config.guidance == "current":
            raise TrainingError(
                "guidance: current asks each process a different number of times, which FSDP does "
                "not allow.",
                "Use guidance: frozen, or DDP (accelerate launch --multi_gpu).",
            )
        if self.config.wrong_nll == "reference" and _processes() > 1:
            raise TrainingError(
                "wrong_nll: reference runs in one process only.", "Use wrong_nll: none."
            )

    def inform(self, parts: Parts, run: Run) -> list[Encoded] | None:
        """Return rows with their factors, for `guidance: frozen`; they need no guides from then on.

        Raises:
            DataError: If a row has no guide.
        """
        if self.config.guidance == "current":
            return None
        found = []
        for rows, prepared in parts:
            if all(row.weights is not None for row in rows):
                return None  # asked before
            for row in rows:
                _require_guide(row)
            out = run(prepared, hidden=True, inference=True)
            factors = self._said(run, prepared, out).factors(self.config.nll_weight)
            for index, row in enumerate(rows):
                own = iter(factors[out.rows == index].tolist())
                weights = [0.0 if label == IGNORE else next(own) for label in row.labels]
                found.append(replace(row, weights=weights, guides=None))
        return found

    def maps(self, parts: Parts, run: Run, untrained: Run) -> list[TokenMap]:
        """Return weights and sets of a few answers, for the pictures of a run folder."""
        from reftune.report.saliency import TokenMap

        run = untrained if self.config.guidance == "frozen" else run
        found = []
        for rows, prepared in parts:
            out = run(prepared, hidden=True, inference=True)
            said = self._said(run, prepared, out)
            for index, row in enumerate(rows):
                own = out.rows == index
                is_wrong = bool(said.wrong[own].any())
                found.append(
                    TokenMap(
                        row.id,
                        out.labels[own].tolist(),
                        said.weights[own].tolist(),
                        said.marked[own].tolist(),
                        said.near[own].tolist(),
                        "U" if is_wrong else "S",
                    )
                )
        return found

    # Loss

    def __call__(self, run: Run, prepared: Prepared, num_items: Real[Tensor, ""] | None) -> Loss:
        """Return the weighted loss of a batch: `scale` · mean over answers."""
        asks = prepared.weights is None and bool(prepared.guides)
        out = run(prepared, hidden=asks)
        log_p = -F.cross_entropy(out.logits.float(), out.labels, reduction="none")
        said = self._said(run, prepared, out, log_p) if asks else None
        if said is not None:
            factors = said.factors(self.config.nll_weight)
        elif prepared.weights is not None:
            factors = _at_labels(prepared.weights, prepared).to(log_p.dtype)
        else:  # rows without labels fill up the batch of a process
            factors = torch.zeros_like(log_p)
        own = self.count(prepared)
        losses = token_losses(log_p, factors)
        if self.config.wrong_nll == "reference" and JUDGE in prepared.guides:
            losses = losses + self._misplaced(run, prepared, out)
        total = (losses / _lengths(out.rows)).sum()
        metrics = self._metrics(log_p, factors, out, said, own)
        return Loss(self.config.scale * share_of(total, num_items, own), metrics)

    def count(self, prepared: Prepared) -> Int[Tensor, ""]:
        """Return the answers: rows that have a label."""
        return (prepared.labels != IGNORE).any(1).sum()

    def _said(
        self,
        run: Run,
        prepared: Prepared,
        out: RunOutput,
        log_p: Float[Tensor, " tokens"] | None = None,
    ) -> Saliency:
        """Ask for the answers behind their guides, and weigh their tokens."""
        if log_p is None:
            log_p = -F.cross_entropy(out.logits.float(), out.labels, reduction="none")
        p_base = log_p.detach().exp()
        p_std, _ = self._guided(run, prepared, out, STANDARD)
        p_judge, wrong = self._guided(run, prepared, out, JUDGE)
        hidden = out.hidden.detach().float()
        return saliency(p_base, p_std, p_judge, hidden, out.rows, wrong, self.config)

    def _guided(
        self, run: Run, prepared: Prepared, out: RunOutput, name: str
    ) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
        """Return the probability of each token behind a guide, and which tokens have that guide."""
        p = torch.zeros(len(out.labels), device=out.labels.device)
        there = torch.zeros_like(out.labels, dtype=torch.bool)
        guide = prepared.guides.get(name)
        if guide is None:
            return p, there
        member = torch.zeros(out.num_rows, dtype=torch.bool, device=out.labels.device)
        member[guide.rows] = True
        there = member[out.rows]
        again = run(guide, inference=True)
        if not torch.equal(again.labels, out.labels[there]):
            raise DataError(
                f'The answers behind the guide "{name}" are not those behind the question.',
                "Give every guide the answer of its row.",
            )
        p[there] = (-F.cross_entropy(again.logits.float(), again.labels, reduction="none")).exp()
        return p, there

    def _misplaced(self, run: Run, prepared: Prepared, out: RunOutput) -> Float[Tensor, " tokens"]:
        """Return the published likelihood of wrong answers, spread evenly over their tokens.

        Its labels stand where the answer is behind the question, in a text that has the judgment
        before it: the prompt is longer there, so it is trained on the answer's tokens.
        """
        guide = prepared.guides[JUDGE]
        width = min(guide.labels.shape[1], prepared.labels.shape[1])
        labels = torch.full_like(guide.labels, IGNORE)
        labels[:, :width] = prepared.labels[guide.rows][:, :width]
        labels[guide.attention_mask == 0] = IGNORE
        again = run(replace(guide, labels=labels))
        nll = F.cross_entropy(again.logits.float(), again.labels, reduction="none")
        sums = nll.new_zeros(len(guide.labels)).index_add(0, again.rows, nll)
        counts = torch.bincount(again.rows, minlength=len(sums)).clamp(min=1)
        spread = nll.new_zeros(out.num_rows).index_add(0, guide.rows, sums / counts)
        return spread[out.rows]

    def _metrics(
        self,
        log_p: Float[Tensor, " tokens"],
        factors: Float[Tensor, " tokens"],
        out: RunOutput,
        said: Saliency | None,
        own: Int[Tensor, ""],
    ) -> dict[str, float | Real[Tensor, ""]]:
        likely = factors.clamp(min=0)
        values = {"nll": -log_p.detach(), "token_weight": likely, "unlike_tokens": factors < 0}
        if said is not None:
            values |= {
                "salient_tokens": said.marked & ~said.wrong,
                "near_tokens": said.near,
                "wrong_answers": said.wrong,
                "crowded_answers": said.crowded,
            }
        lengths, answers = _lengths(out.rows), own.clamp(min=1)
        return {name: (value.float() / lengths).sum() / answers for name, value in values.items()}


def _processes() -> int:
    from torch import distributed

    is_ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if is_ready else 1


def _require_guide(row: Encoded) -> None:
    if STANDARD not in (row.guides or ()):
        raise DataError(
            f'Row "{row.id}" does not show its right solution to NLFT.',
            "Use the task judged, on rows that `reftune judge` wrote, and a causal model.",
        )


def _lengths(rows: Int[Tensor, " tokens"]) -> Int[Tensor, " tokens"]:
    """Return for each token how many its answer has."""
    return torch.bincount(rows)[rows]


def _at_labels(values: Float[Tensor, "batch _"], prepared: Prepared) -> Float[Tensor, " tokens"]:
    """Return the values of the columns that are labels, in the order of `RunOutput.labels`."""
    return values[:, 1:][prepared.labels[:, 1:] != IGNORE]
