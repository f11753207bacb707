"""CARFT: reinforced fine-tuning that keeps the annotated reasoning (Zhu et al. 2025, 2508.15868).

Everything of `reinforced`, with a term that pulls the vector of a sampled chain of thought towards
that of the annotated one, and a partial reward that grows with their likeness.

Two ways to add the term up. `described` is the method as its paper tells it: a mean over the right
answers of a rollout, contrasted with all answers of the rollout. `reference` does what the
published code computes, which is another thing: a sum over all answers of a forward pass, wrong
ones included, as soon as one of them is right, and without any repulsion.

Two choices of our own, both so that micro-batches and processes change nothing: a rollout's vectors
as measured before its updates are what each answer is contrasted with; and the pooled states are
those *behind* each token but the last (EOS), whose state no pass computes.

Left out on purpose: the published variants 1, 3, 5, 6, 7 and 10 (jitter, dropped annotated tokens).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor, nn

from reftune.errors import RecipeError
from reftune.model.passes import IGNORE
from reftune.objectives import contrastive
from reftune.objectives.base import Loss, share_of
from reftune.objectives.online import Actions, Tally, World
from reftune.objectives.reinforced import Reinforced, ReinforcedConfig, Seen, to_value

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftune.objectives.base import Run
    from reftune.objectives.online import Reference
    from reftune.training.encode import Encoded

EMBEDDED = (0.2, 0.1)
"""Partial reward of a wrong answer: the first, plus the second times its likeness."""


@dataclass(frozen=True)
class CarftConfig(ReinforcedConfig):
    """Settings of CARFT."""

    contrastive: Literal["positive", "negative", "both", "none"] = "positive"
    """`positive` pulls right answers towards the annotation; `negative` sets what a wrong answer
    shares with it apart from the rest; `both` is half of each."""
    c: float = 1e-3
    """Weight c of the contrastive term."""
    partial_reward: Literal["embedding", "constant"] = "embedding"
    """A wrong answer earns 0.2 + 0.1 · cos(z1, z2), or `partial`."""
    reduction: Literal["described", "reference"] = "described"
    """How the term is added up: as the paper says, or as its code does (`positive` only)."""
    pool: Literal["value", "mean", "logprob"] = "value"
    """Weights of the tokens in a vector: softmax of values, equal, or of log-probabilities."""
    tokens: Literal["all", "number"] = "all"
    """Tokens that are pooled; `number`: with a digit and without a Latin letter."""
    tau: float = 0.2
    """Temperature τ of the contrast."""
    clamp: float = 0.9
    """Cosine above which nothing more is gained."""
    dim: int = 64
    """Width of the vectors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("c", math.isfinite(self.c) and self.c >= 0, "Use 0 or more.")
        self._require("tau", math.isfinite(self.tau) and self.tau > 0)
        self._require("clamp", -1 <= self.clamp <= 1, "Use a cosine, from -1 to 1.")
        self._require("dim", self.dim >= 1, "Use at least 1.")
        if self.reduction == "reference" and self.contrastive not in ("positive", "none"):
            raise RecipeError(
                f"reduction is reference with contrastive {self.contrastive}.",
                "Use contrastive: positive; the published code of the other signals compares "
                "prompts and padding.",
            )
        if self.trunk == "separate":
            raise RecipeError(
                "trunk is separate: values and vectors of carft share their first layer, and so "
                "the hidden states.",
                "Use trunk: shared or detached, or objective: reinforced.",
            )


class CarftHead(nn.Module):
    """e_t = W1 h_t + b1 and V_t = w2 · relu(e_t) + b2, in fp32: value and vector share W1.

    Parameters: d·k + k and k + 1, k = `dim` (arXiv 2508.15868, its published head V2).

    Args:
        width: Width d of the hidden states.
        dim: Width k of the vectors.
        zero: Start at V = 0 (w2 = 0, b2 = 0); default PyTorch's own initialisation, as published.
    """

    def __init__(self, width: int, dim: int, zero: bool = False) -> None:
        super().__init__()
        self.reduce = nn.Linear(width, dim, dtype=torch.float32)
        self.value = to_value(dim, zero)

    def embed(self, hidden: Float[Tensor, "actions width"]) -> Float[Tensor, "actions dim"]:
        """Return e of each hidden state, whatever autocast is about."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.reduce(hidden.float())

    def judge(self, embedded: Float[Tensor, "actions dim"]) -> Float[Tensor, " actions"]:
        """Return V of each e."""
        with torch.autocast(embedded.device.type, enabled=False):
            return self.value(embedded.relu())[:, 0]

    def forward(self, hidden: Float[Tensor, "actions width"]) -> Float[Tensor, " actions"]:
        """Return V of each hidden state."""
        return self.judge(self.embed(hidden))


@dataclass
class Chains:
    """Chains of thought, ready to be pooled. Column t is the state behind token t.

    Attributes:
        embeddings: e_t.
        weights: Logits of the pooling weights.
        tokens: Token ids.
        mask: Which columns are pooled.
    """

    embeddings: Float[Tensor, "rows steps dim"]
    weights: Float[Tensor, "rows steps"]
    tokens: Int[Tensor, "rows steps"]
    mask: Bool[Tensor, "rows steps"]

    def pooled(
        self, mask: Bool[Tensor, "rows steps"] | None = None
    ) -> tuple[Float[Tensor, "rows dim"], Float[Tensor, " rows"]]:
        """Return a vector a row, of all tokens or those in `mask`, and the weights' entropy."""
        return contrastive.pool(self.embeddings, self.weights, self.mask if mask is None else mask)


class Carft(Reinforced):
    """Reinforced fine-tuning with a contrastive term (Zhu et al. 2025).

    L = L_π + α L_V + c · L_con,   L_con = Σ_i M_i l_i / Σ_i M_i over the rollout,

    l_i of `reftune.objectives.contrastive`; M_i = 1 for right answers (positive) or for wrong ones
    that share a token with the annotation (negative). z1 of the annotated chain is measured once a
    rollout, without gradient; z2 of the sampled one in each update. With c = 0 and a constant
    partial reward it is `reinforced` with another head.

    Metrics beside those of `reinforced`: `cosine` (mean cos(z1, z2) of right answers), `weights`
    (entropy of the pooling weights in nats; it falls to 0 as they collapse onto one token), and of
    the updates `contrastive` (L_con).
    """

    Config = CarftConfig
    name = "carft"
    title = "CARFT"
    source = "Zhu et al. 2025, arXiv 2508.15868"
    gold = True
    plots: ClassVar = {
        "rollouts": (*Reinforced.plots["rollouts"], ("cosine",), ("contrastive",), ("weights",))
    }

    config: CarftConfig
    head: CarftHead

    def __init__(self, config: CarftConfig | None = None) -> None:
        super().__init__(config)
        self.numbers: Bool[Tensor, " vocab"] | None = None
        self.others: dict[str, tuple[Float[Tensor, "all dim"], ...]] = {}
        self.right = 0.0

    def make_head(self, dim: int) -> nn.Module | None:
        """Return the head of values and vectors."""
        return CarftHead(dim, self.config.dim, zero=self.config.head_init == "zero")

    def training_rows(
        self, rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, max_len: int
    ) -> list[Encoded]:
        """Return all rows; note which tokens are numbers."""
        if self.config.tokens == "number":
            texts = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
            self.numbers = torch.tensor([_is_number(text) for text in texts])
        return list(rows)

    def read(
        self, hidden: Float[Tensor, "actions width"]
    ) -> tuple[Float[Tensor, " actions"], Float[Tensor, "actions dim"]]:
        """Return V and e of each hidden state; W1 h is computed once.

        Twice only with gradients and `trunk: detached`: there e trains the trunk and V must not.
        """
        embedded = self.head.embed(hidden)
        is_apart = self.config.trunk == "detached" and torch.is_grad_enabled()
        values = self.values(hidden) if is_apart else self.head.judge(embedded)
        return values, embedded

    # Measuring a rollout

    def measure(self, run: Run, batch: Actions) -> None:
        """Re-score a micro-batch; note z2, and z1 of the annotated chains."""
        seen = self.look(run, batch)
        self.note(batch, seen)
        if not self.compares:
            return
        gold = batch.gold
        annotated, sampled = self._chains(gold, self.look(run, gold)), self._chains(batch, seen)
        known = batch.measured
        known["z1"] = annotated.pooled()[0]
        known["z2"], known["weights"] = sampled.pooled()
        if self._negative in self.signals:
            known["shared"], left = self._common(batch, annotated, sampled)
            known["y1"] = annotated.pooled(left)[0]
            known["y2"], known["y3"] = _halves(sampled, known["shared"])
            known["fits"] = left.any(1)

    def _chains(self, batch: Actions, seen: Seen) -> Chains:
        """Return the chains of a batch: the states behind each token of an answer but the last."""
        states = batch.spread(seen.states)
        tokens = batch.spread(batch.labels[batch.labels != IGNORE])
        mask, alone = batch.mask, batch.mask.shape[1] == 1  # nothing but an end: the state before
        now, behind = (slice(None), slice(None)) if alone else (slice(-1), slice(1, None))
        weights = {
            "value": seen.values[:, behind],
            "mean": torch.zeros_like(seen.values[:, behind]),
            "logprob": seen.logp[:, now],
        }
        tokens, mask = tokens[:, now], mask[:, behind]
        if self.numbers is not None:
            mask = mask & self.numbers.to(tokens.device)[tokens]
        return Chains(states[:, behind], weights[self.config.pool], tokens, mask)

    def _common(
        self, batch: Actions, annotated: Chains, sampled: Chains
    ) -> tuple[Bool[Tensor, "rows steps"], Bool[Tensor, "rows other_steps"]]:
        """Return which tokens of a wrong answer lie on its longest common subsequence with the
        annotation, and which of the annotation do. Prompts and padding have no part in it.
        """
        left, right = torch.zeros_like(annotated.mask), torch.zeros_like(sampled.mask)
        for row in (~batch.right).nonzero()[:, 0].tolist():
            ours, theirs = annotated.mask[row], sampled.mask[row]
            one, other = contrastive.common(
                annotated.tokens[row, ours].tolist(), sampled.tokens[row, theirs].tolist()
            )
            left[row, ours] = torch.tensor(one, dtype=torch.bool, device=left.device)
            right[row, theirs] = torch.tensor(other, dtype=torch.bool, device=left.device)
        return right, left

    def scores(self, batch: Actions) -> Float[Tensor, " batch"]:
        """Return the scores, those of wrong answers by their likeness to the annotation."""
        if self.config.partial_reward == "constant":
            return batch.scores
        first, second = EMBEDDED
        likeness = contrastive.cosine(batch.measured["z1"], batch.measured["z2"])
        is_wrong = batch.answered & (batch.scores == self.config.partial)
        return torch.where(is_wrong, first + second * likeness.to(batch.scores), batch.scores)

    def experience(
        self, run: Run, reference: Reference, batches: Sequence[Actions], world: World
    ) -> Tally:
        """Measure a rollout, and gather what its answers are contrasted with."""
        tally = super().experience(run, reference, batches, world)
        for batch in batches if self.compares else ():
            known = batch.measured
            near = contrastive.cosine(known["z1"], known["z2"])[batch.right]
            tally.add("cosine", float(near.double().sum()), len(near))
            tally.rows("weights", known["weights"])
        if self._positive in self.signals:
            everything = [torch.ones_like(batch.right) for batch in batches]
            self._gather(world, batches, ("z2",), everything)
            own = torch.tensor(float(sum(int(batch.right.sum()) for batch in batches)))
            self.right = float(world.sum(own))
            if len(self.others["z2"][0]) == 1:
                self._warn(
                    "alone",
                    "a rollout has one answer, and nothing to contrast it with: the positive "
                    "signal is 0 below the clamp. Raise batch_size or samples",
                )
        if self._negative in self.signals:
            fits = [batch.measured["fits"] for batch in batches]
            self._gather(world, batches, ("y2", "y3"), fits)
        return tally

    def _gather(
        self,
        world: World,
        batches: Sequence[Actions],
        names: tuple[str, ...],
        chosen: Sequence[Bool[Tensor, " rows"]],
    ) -> None:
        """Keep the vectors of chosen answers of all processes, and note where each has its own."""
        own = [torch.zeros(0, len(names), self.config.dim)]
        for batch, rows in zip(batches, chosen, strict=True):
            vectors = torch.stack([batch.measured[name] for name in names], 1)
            own.append(vectors[rows].cpu())
        whole, start = world.gather(torch.cat(own))
        self.others[names[0]] = whole.unbind(1)
        for batch, rows in zip(batches, chosen, strict=True):
            batch.measured[f"place_{names[0]}"] = start + rows.cumsum(0) - 1
            start += int(rows.sum())

    # Learning

    @property
    def compares(self) -> bool:
        """Whether annotated chains are looked at; `gold` says so to the loop."""
        return bool(self.signals) or self.config.partial_reward == "embedding"

    @property
    def signals(self) -> tuple[Callable[[Chains, Actions], Float[Tensor, ""]], ...]:
        """What the contrastive term is the mean of; nothing where it has no weight."""
        known = {
            "positive": (self._positive,),
            "negative": (self._negative,),
            "both": (self._positive, self._negative),
        }
        return known.get(self.config.contrastive, ()) if self.config.c else ()

    def __call__(self, run: Run, prepared: Actions, num_items: Real[Tensor, " ..."] | None) -> Loss:
        """Return the loss of `reinforced` plus c times the contrastive term."""
        seen = self.look(run, prepared)
        loss = self.ppo(seen, prepared, num_items)
        if not self.signals:
            return loss
        chains = self._chains(prepared, seen)
        share = share_of(self.count(prepared).float(), num_items, self.count(prepared))
        if self.config.reduction == "reference":
            # A mean over forward passes, as gradients of the published code are accumulated
            term = self._published(chains, prepared) * share.to(loss.loss)
        else:
            found = [signal(chains, prepared) for signal in self.signals]
            term = torch.stack(found).mean()
        metrics = {**loss.metrics, "contrastive": term.detach() / share.to(term)}
        return Loss(loss.loss + self.config.c * term, metrics)

    def _positive(self, chains: Chains, batch: Actions) -> Float[Tensor, ""]:
        """Return this batch's part of the mean of l_i over the right answers of the rollout."""
        known, rows = batch.measured, batch.right
        losses = contrastive.positive(
            known["z1"][rows],
            chains.pooled()[0][rows],
            self.others["z2"][0].to(rows.device),
            known["place_z2"][rows],
            self.config.tau,
            self.config.clamp,
        )
        return losses.sum() / max(self.right, 1.0)

    def _negative(self, chains: Chains, batch: Actions) -> Float[Tensor, ""]:
        """Return this batch's part of the mean of l_i over wrong answers with something shared."""
        known, rows = batch.measured, batch.measured["fits"]
        shared, apart = _halves(chains, known["shared"])
        others = tuple(vectors.to(rows.device) for vectors in self.others["y2"])
        losses = contrastive.negative(
            known["y1"][rows],
            shared[rows],
            apart[rows],
            others,
            known["place_y2"][rows],
            self.config.tau,
            self.config.clamp,
        )
        return losses.sum() / max(len(others[0]), 1)

    def _published(self, chains: Chains, batch: Actions) -> Float[Tensor, ""]:
        sampled = chains.pooled()[0]
        own = self.config
        return contrastive.published(batch.measured["z1"], sampled, batch.right, own.tau, own.clamp)


def _halves(
    sampled: Chains, shared: Bool[Tensor, "rows steps"]
) -> tuple[Float[Tensor, "rows dim"], Float[Tensor, "rows dim"]]:
    """Return the vectors of what an answer shares with its annotation, and of the rest."""
    return sampled.pooled(shared)[0], sampled.pooled(sampled.mask & ~shared)[0]


def _is_number(text: str) -> bool:
    """Return whether a token has a digit and no Latin letter.

    >>> _is_number("▁12"), _is_number("x1"), _is_number("+")
    (True, False, False)
    """
    has_letter = any(sign.isascii() and sign.isalpha() for sign in text)
    return not has_letter and any(sign.isdigit() for sign in text)
