"""Reinforced fine-tuning: PPO on answer rewards after a warm-up (Luong et al. 2024).

Not to be confused with representation fine-tuning, which is *what* may be trained by it: full
weights, LoRA or an intervention. The warm-up is a stage with `objective: sft` before this one; the
frozen policy π_0 of the KL penalty is the snapshot of the trained parameters at its end.

Left out on purpose: whitening within each process (it would make results depend on their number),
and the published code's habit of choosing checkpoints on the test set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from reftune.objectives import policy
from reftune.objectives.base import Loss, share_of
from reftune.objectives.online import Actions, OnlineConfig, OnlineObjective, Tally, World

if TYPE_CHECKING:
    from reftune.objectives.base import Run
    from reftune.objectives.online import Reference


@dataclass(frozen=True)
class ReinforcedConfig(OnlineConfig):
    """Settings of reinforced fine-tuning."""

    beta: float = 0.05
    """Weight β of the KL penalty in the reward."""
    gamma: float = 1.0
    """Discount γ. The published text swaps the values of γ and λ; these are those of its code."""
    lam: float = 0.95
    """λ of the advantage estimates."""
    clip: float = 0.2
    """ε: how far a ratio may move from 1."""
    value_clip: float = 0.2
    """ε: how far a value may move from the one at the rollout."""
    alpha: float = 5.0
    """Weight α of the value loss."""
    whiten: Literal["global", "none"] = "global"
    """Advantages to mean 0 and variance 1 over all actions of a rollout, or as they are."""
    head_init: Literal["random", "zero"] = "random"
    """Values at the start: a guess, as published, or 0, which misleads nobody."""
    trunk: Literal["shared", "detached", "separate"] = "shared"
    """Whose hidden states the head reads: the policy's, which the value loss then trains too, as
    published; the policy's, without training it; or those of a value model of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clip", "value_clip"):
            self._require(name, math.isfinite(getattr(self, name)) and getattr(self, name) > 0)
        for name in ("gamma", "lam"):
            self._require(name, 0 <= getattr(self, name) <= 1, "Use a number from 0 to 1.")
        for name in ("beta", "alpha"):
            is_fit = math.isfinite(getattr(self, name)) and getattr(self, name) >= 0
            self._require(name, is_fit, "Use 0 or more.")


def to_value(dim: int, zero: bool) -> nn.Linear:
    """Return w · x + b in fp32, at 0 or as PyTorch initialises it."""
    linear = nn.Linear(dim, 1, dtype=torch.float32)
    if zero:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return linear


class ValueHead(nn.Module):
    """V_t = w · h_t + b on the last hidden states, in fp32. Parameters: d + 1.

    Args:
        dim: Width d of the hidden states.
        zero: Start at V = 0; default PyTorch's own initialisation, as published: a random guess.
    """

    def __init__(self, dim: int, zero: bool = False) -> None:
        super().__init__()
        self.linear = to_value(dim, zero)

    def forward(self, hidden: Float[Tensor, "actions dim"]) -> Float[Tensor, " actions"]:
        """Return one value a hidden state, whatever autocast is about."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.float())[:, 0]


@dataclass
class Seen:
    """What one pass says of the actions of a micro-batch.

    Attributes:
        logp: log π(a_t).
        values: V_t.
        entropy: H_t, without gradient.
        states: What further terms of a loss read, one row an action, in the order of rows and
            steps: the policy's last hidden states, or what a head makes of them.
    """

    logp: Float[Tensor, "rows steps"]
    values: Float[Tensor, "rows steps"]
    entropy: Float[Tensor, "rows steps"]
    states: Float[Tensor, "actions states"]


class Reinforced(OnlineObjective):
    """PPO on answer rewards with a KL penalty towards the warm-up (Luong et al. 2024, section 3).

    R_t = [t = T] · score − β (log π_old(a_t) − log π_0(a_t)),   score 1, 0.1 (wrong) or 0 (none)

    A_t, Ret_t by GAE(γ, λ);   A whitened over the rollout of all processes

    L = (1/N) Σ_i [ L_π,i + α L_V,i ],   N = rows of the rollout

    with the clipped losses of `reftune.objectives.policy`, each a mean over a row's actions before
    rows are averaged. π_old is the policy at the rollout, always re-scored by a forward pass.

    V_t = w · h_t + b on the last hidden states h_t, by default the policy's. With `trunk: separate`
    h_t is that of a value model: a second set of the trained parameters on the same base, which
    starts as the policy of the stage's start and learns from L_V alone (section 5, ablation).

    Metrics of a rollout: `reward`, `accuracy`, `answered`, `ended`, `length`; `kl` (nats an
    answer), `entropy` (nats a token), `advantage`, `advantage_std` (before whitening), `value`,
    `explained_variance`; of its updates: `policy_loss`, `value_loss`, `clip_fraction`, `drift`
    (mean of log π_old − log π).
    """

    Config = ReinforcedConfig
    name = "reinforced"
    title = "ReFT (reinforced)"
    source = "Luong et al. 2024, arXiv 2401.08967"
    reference = True
    plots: ClassVar = {
        "rollouts": (
            ("reward", "accuracy"),
            ("kl",),
            ("entropy",),
            ("length",),
            ("clip_fraction",),
            ("explained_variance",),
            ("value_loss",),
            ("advantage", "advantage_std"),
        )
    }

    config: ReinforcedConfig

    @property
    def wants_second(self) -> bool:
        """Whether values have a model of their own."""
        return self.config.trunk == "separate"

    def make_head(self, dim: int) -> nn.Module | None:
        """Return the value head."""
        return ValueHead(dim, zero=self.config.head_init == "zero")

    def look(self, run: Run, batch: Actions) -> Seen:
        """Run the policy (and a value model) over a micro-batch; with gradient where it is on."""
        out = run(batch, hidden=True)
        heat = self.config.temperature
        logp = policy.log_probs(out.logits, out.labels, heat)
        with torch.no_grad():
            entropy = policy.entropy(out.logits, heat)
        if self.wants_second:
            with self.second():
                values, states = self.values(run(batch, hidden=True).hidden), out.hidden
        else:
            values, states = self.read(out.hidden)
        return Seen(*map(batch.spread, (logp, values, entropy)), states)

    def read(
        self, hidden: Float[Tensor, "actions dim"]
    ) -> tuple[Float[Tensor, " actions"], Float[Tensor, "actions states"]]:
        """Return V of each hidden state, and what further terms of the loss read."""
        return self.values(hidden), hidden

    def values(self, hidden: Float[Tensor, "actions dim"]) -> Float[Tensor, " actions"]:
        """Return V of each hidden state."""
        return self.head(hidden.detach() if self.config.trunk == "detached" else hidden)

    def scores(self, batch: Actions) -> Float[Tensor, " batch"]:
        """Return the score of each answer."""
        return batch.scores

    def measure(self, run: Run, batch: Actions) -> None:
        """Re-score a micro-batch under π_old, without gradients."""
        self.note(batch, self.look(run, batch))

    def note(self, batch: Actions, seen: Seen) -> None:
        """Keep what a pass saw as what the updates are compared with."""
        batch.measured |= {"logp": seen.logp, "values": seen.values, "entropy": seen.entropy}

    def experience(
        self, run: Run, reference: Reference, batches: Sequence[Actions], world: World
    ) -> Tally:
        """Re-score a rollout under π_old and π_0; compute advantages and returns."""
        own, tally = self.config, super().experience(run, reference, batches, world)
        for batch in batches:
            self.measure(run, batch)
        with reference():
            for batch in batches:
                out = run(batch)
                logp = policy.log_probs(out.logits, out.labels, own.temperature)
                batch.measured["reference"] = batch.spread(logp)
        for batch in batches:
            known, mask = batch.measured, batch.mask
            rewards = policy.kl_rewards(
                self.scores(batch), known["logp"], known["reference"], mask, own.beta
            )
            advantages = policy.gae(rewards, known["values"], mask, own.gamma, own.lam)
            known["advantages"], known["returns"] = advantages
            tally.rows("kl", ((known["logp"] - known["reference"]) * mask).sum(1))
            tally.rows("entropy", policy.row_means(known["entropy"], mask))
            tally.rows("value", policy.row_means(known["values"], mask))
        self._whiten(batches, world, tally)
        return tally

    def _whiten(self, batches: Sequence[Actions], world: World, tally: Tally) -> None:
        """Whiten advantages over the rollout, and note how well the values foresaw the returns."""
        found = torch.zeros(3, 3, dtype=torch.float64)
        for batch in batches:
            known, mask = batch.measured, batch.mask
            errors = known["returns"] - known["values"]
            for row, name in enumerate((known["advantages"], errors, known["returns"])):
                found[row] += policy.moments(name, mask)
        advantages, errors, returns = world.sum(found)
        if self.config.whiten == "global":
            for batch in batches:
                known = batch.measured
                known["advantages"] = policy.whiten(known["advantages"], batch.mask, advantages)
        mean, variance = policy.spread(advantages)
        tally.add("advantage", mean, 1)
        tally.add("advantage_std", variance**0.5, 1)
        tally.add("explained_variance", policy.explained_variance(errors, returns), 1)

    def __call__(self, run: Run, prepared: Actions, num_items: Real[Tensor, " ..."] | None) -> Loss:
        """Return the clipped losses of policy and values, summed over rows and divided by N."""
        return self.ppo(self.look(run, prepared), prepared, num_items)

    def ppo(self, seen: Seen, batch: Actions, num_items: Real[Tensor, " ..."] | None) -> Loss:
        """Return the loss of what a pass saw."""
        own, known, mask = self.config, batch.measured, batch.mask
        old = known["logp"]
        policies = policy.policy_loss(seen.logp, old, known["advantages"], mask, own.clip)
        errors = policy.value_loss(
            seen.values, known["values"], known["returns"], mask, own.value_clip
        )
        total = (policies + own.alpha * errors).sum()
        with torch.no_grad():
            metrics = {
                "policy_loss": policies.mean(),
                "value_loss": errors.mean(),
                "clip_fraction": policy.clip_fraction(seen.logp, old, mask, own.clip).mean(),
                "drift": policy.row_means(old - seen.logp, mask).mean(),
            }
        return Loss(share_of(total, num_items, self.count(batch)), metrics)
