"""Keeping bias vectors near a length: a controller of the loss weight, or a projection.

The controller never touches the vectors. It turns the loss weight down while they are too long and
up while they are too short, which under Adam changes little: a constant factor on the loss cancels
in m/√v, so that only a *fall* of the weight brakes, for as long as v remembers larger gradients.
The projection does what the name promises.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

BIAS, SCALE = "reft_bias", "reft_scale"
"""Names that the parameters of RED end in."""


@dataclass
class Pid:
    """Proportional-integral-derivative control of a loss weight ω (BREP, arXiv 2511.10707).

    With the error e = target − measured, whenever `every` steps have passed since the last time:

        I ← I + k_i e
        ω ← clip(ω · (1 + gain · (k_p e + I + k_d (e − e_prev))), low, high)
        e_prev ← e

    I and e_prev start at 0.

    Attributes:
        weight: ω.
        low: Least ω.
        high: Largest ω.
        k_p: Gain of the error.
        k_i: Gain of its sum.
        k_d: Gain of its change.
        gain: Factor on all three.
        every: Steps between two corrections.
        last: Step of the last correction; 0 makes the first one after `every` steps.
        step: Steps so far.
        integral: I.
        error: e_prev.
    """

    weight: float = 0.1
    low: float = 1e-5
    high: float = 0.1
    k_p: float = 0.1
    k_i: float = 1e-4
    k_d: float = 0.01
    gain: float = 5.0
    every: int = 4
    last: int = 0
    step: int = 0
    integral: float = 0.0
    error: float = 0.0

    def update(self, error: float) -> bool:
        """Count one step, correct ω if it is time, and return whether that lowered it.

        >>> pid = Pid(every=1)
        >>> pid.update(-0.5), round(pid.weight, 6)
        (True, 0.072475)
        """
        self.step += 1
        if self.step - self.last < self.every:
            return False
        self.integral += self.k_i * error
        change = self.k_p * error + self.integral + self.k_d * (error - self.error)
        before, self.error, self.last = self.weight, error, self.step
        self.weight = min(max(before * (1 + self.gain * change), self.low), self.high)
        return self.weight < before

    def state_dict(self) -> dict[str, Any]:
        """Return what changes from step to step."""
        changing = ("weight", "last", "step", "integral", "error")
        return {name: value for name, value in asdict(self).items() if name in changing}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)


def red_biases(trained: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    """Return the bias vectors of RED among parameters, by name: those with a scale or nothing.

    LoReFT and others have a `reft_bias` too; it lives in their subspace and beside other matrices.

    Args:
        trained: Parameters by their names in the model.
    """
    modules: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in trained.items():
        module, _, last = name.rpartition(".")
        modules.setdefault(module, {})[last] = parameter
    return [own[BIAS] for own in modules.values() if BIAS in own and own.keys() <= {BIAS, SCALE}]


def lengths(vectors: Iterable[Float[Tensor, " _"]]) -> list[float]:
    """Return the L2 norm of each vector; the device is asked once."""
    norms = [torch.linalg.vector_norm(vector.detach().float()) for vector in vectors]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).tolist() if norms else []


def excess(vectors: Iterable[Float[Tensor, " _"]], target: float) -> Float[Tensor, ""]:
    """Return Σ max(0, ‖b‖ − target)², differentiable also where b = 0.

    Args:
        vectors: The bias vectors b.
        target: Length that costs nothing.
    """
    vectors = list(vectors)
    # A norm has no gradient at 0, so vectors within the target are left out, not multiplied by 0.
    long = [vector for vector, norm in zip(vectors, lengths(vectors)) if norm > target]
    if not long:
        return torch.zeros(())
    parts = [(torch.linalg.vector_norm(vector) - target).square() for vector in long]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


@torch.no_grad()
def project_(vectors: Iterable[nn.Parameter], target: float) -> float:
    """Shorten vectors in place to b · min(1, target / ‖b‖); return the share that was too long.

    Args:
        vectors: The bias vectors b.
        target: Largest length.
    """
    vectors = list(vectors)
    norms = lengths(vectors)
    for vector, norm in zip(vectors, norms):
        if norm > target:
            vector.mul_(target / norm)
    return sum(norm > target for norm in norms) / max(1, len(norms))
