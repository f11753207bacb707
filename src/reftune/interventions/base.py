"""What every intervention is: hidden states in, the change to them out.

An intervention knows nothing of models, positions or training. The site that owns it gathers the
hidden states of the edited tokens, calls it, scales and adds its `delta`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, ClassVar, Literal
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from reftune.errors import AdapterError
from reftune.interventions.checking import check_fields

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


@dataclass
class Edit:
    """What an intervention answers.

    Attributes:
        delta: Change to add, in the dtype of the computation (fp32 or wider).
        gate: Optional gate values, which some objectives read.
    """

    delta: Float[Tensor, "sites dim"]
    gate: Float[Tensor, "sites gates"] | None = None


@dataclass(frozen=True)
class InterventionConfig:
    """Settings shared by all interventions."""

    dropout: float = 0.0
    """Probability of dropping a component in training."""
    dropout_on: Literal["delta", "output"] = "delta"
    """`delta` drops parts of the edit; `output` drops parts of h + delta, as the reference does."""
    init: Literal["paper", "identity"] = "paper"
    """`paper` initialises as published; `identity` leaves the base model's logits unchanged."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"dropout is {self.dropout}.", "Use a value from 0 to below 1.")

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class LowRankConfig(InterventionConfig):
    """Settings of the interventions that act in a subspace of r dimensions."""

    rank: int = 4
    """Dimension r of the edited subspace."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise AdapterError(f"rank is {self.rank}.", "Use a rank of at least 1.")


class Intervention(nn.Module):
    """Base class of all interventions.

    A subclass sets `Config`, creates its parameters (names start with `reft_`) in `__init__`, fills
    them in `reset`, and computes `edit`. Parameters stay in fp32 whatever the base model's dtype.

    Args:
        config: Settings, an instance of the class's `Config`.
        dim: Width d of the hidden states.
    """

    Config: ClassVar[type[InterventionConfig]] = InterventionConfig
    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    source: ClassVar[str] = ""
    subspaces: ClassVar[bool] = False
    """Whether single dimensions of the subspace can be selected per row."""

    def __init__(self, config: InterventionConfig, dim: int) -> None:
        super().__init__()
        self.check(config)
        self.config, self.dim = config, dim
        rank = getattr(config, "rank", 1)
        if rank > dim:
            raise AdapterError(
                f"{type(self).__name__}: rank {rank} is larger than the width {dim} of the site.",
                f"Use a rank of at most {dim}.",
            )

    @classmethod
    def check(cls, config: InterventionConfig) -> None:
        """Raise AdapterError for settings that the method cannot follow. Subclasses extend it."""

    def reset(self) -> None:
        """Initialise the parameters in place, as `config.init` says."""
        raise NotImplementedError

    def edit(
        self, h: Float[Tensor, "sites dim"], select: Bool[Tensor, "sites rank"] | None = None
    ) -> Edit:
        """Compute the change.

        Args:
            h: Hidden states of the edited tokens, fp32 (fp64 on a fp64 model).
            select: The dimensions of the subspace that act on each row; None: all.
        """
        raise NotImplementedError

    def forward(
        self, h: Float[Tensor, "sites dim"], select: Bool[Tensor, "sites rank"] | None = None
    ) -> Edit:
        """Compute the change with dropout; see `edit`."""
        if select is not None and not self.subspaces:
            raise AdapterError(
                f"{type(self).__name__} has no subspace dimensions to select.",
                "Remove the subspace column or use loreft.",
            )
        edit = self._edit_apart(h, select)
        rate = self.config.dropout
        if self.training and rate > 0:
            if self.config.dropout_on == "output":
                edit.delta = F.dropout(h + edit.delta, rate) - h
            else:
                edit.delta = F.dropout(edit.delta, rate)
        return edit

    def _edit_apart(
        self, h: Float[Tensor, "sites dim"], select: Bool[Tensor, "sites rank"] | None
    ) -> Edit:
        """Edit the rows of each subspace by themselves while gradients are taken.

        Orthonormal rows depend on each other; in one go the loss of a row would move dimensions
        that other rows of the batch selected.
        """
        if select is None or not torch.is_grad_enabled():
            return self.edit(h, select)
        kinds, kind = select.unique(dim=0, return_inverse=True)
        if len(kinds) < 2:
            return self.edit(h, select)
        rows = [(kind == number).nonzero()[:, 0] for number in range(len(kinds))]
        parts = [self.edit(h[where], select[where]) for where in rows]
        back = torch.cat(rows).argsort()
        gates = [part.gate for part in parts if part.gate is not None]
        delta = torch.cat([part.delta for part in parts])[back]
        return Edit(delta, torch.cat(gates)[back] if gates else None)

    def as_affine(self) -> tuple[Float[Tensor, " dim"], Float[Tensor, " dim"]] | None:
        """Return (scale, shift) when the edit is h' = scale * h + shift, else None."""
        return None

    @classmethod
    def num_parameters(cls, config: InterventionConfig, dim: int) -> int:
        """Return the trainable parameters of one site, as the docstring's formula says."""
        raise NotImplementedError

    @classmethod
    def config_from(cls, values: dict[str, Any]) -> InterventionConfig:
        """Build the config from plain values; what the method cannot follow raises AdapterError."""
        from reftune.errors import nearest

        known = {f.name for f in fields(cls.Config)}
        for key in values:
            if key not in known:
                raise AdapterError(f'{cls.name} has no setting "{key}".', nearest(key, known))
        config = cls.Config(**values)
        cls.check(config)
        return config


def linear_parameter(rank: int, dim: int) -> Float[nn.Parameter, "{rank} {dim}"]:
    """Return an empty fp32 weight."""
    return nn.Parameter(torch.empty(rank, dim, dtype=torch.float32))


def reset_linear_(
    weight: Float[Tensor, "rank dim"], bias: Float[Tensor, " rank"] | None = None
) -> None:
    """Initialise like `nn.Linear`: uniform in +-1/sqrt(dim) for weight and bias."""
    bound = weight.shape[1] ** -0.5
    nn.init.uniform_(weight, -bound, bound)
    if bias is not None:
        nn.init.uniform_(bias, -bound, bound)


def orthonormal_rows(free: Float[Tensor, "rank dim"]) -> Float[Tensor, "rank dim"]:
    """Map a free matrix to one with orthonormal rows by QR with fixed signs.

    With freeᵀ = Q T, T upper triangular: R = (Q sign(diag T))ᵀ, so that R Rᵀ = I and matrices
    whose rows are orthonormal already are returned unchanged. Differentiable for full rank, and
    rank <= dim.
    """
    free = free.to(torch.promote_types(free.dtype, torch.float32))  # QR knows no half precision
    q, t = torch.linalg.qr(free.T)
    sign = torch.where(t.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    return (q * sign).T


FREE_SCALE = 0.5
"""Initial norm of the free rows. R does not depend on it, but its speed under Adam does: with 1/2
a step turns R as far as in the reference's Householder map, so published rates carry over."""
SETTLED = 1e-5
"""Free rows count as orthogonal up to this share of their length; rounding is below it."""


class Orthonormal:
    """Mixin: a rotation R `[r, d]` with orthonormal rows, held as a free parameter.

    R is recomputed where gradients are needed and cached otherwise, until the parameter changes.
    The free parameter is never weight-decayed: decay would only move it along directions that QR
    removes, or, as in torch's own parametrisation, destroy R.

    Training some dimensions leaves the rows of R of all others as they are, to rounding, whichever
    they are (appendix G.1 of arXiv 2404.03592 trains one skill in each part). QR alone would not:
    it turns later rows to make room for earlier ones. So from the first pass that selects
    dimensions on, the free rows are kept orthogonal, and after an optimiser step what has moved
    gives way to what has not. Nothing of this touches adapters that train without selection.
    Processes that train together must all select. Not kept where parameters are sharded (FSDP).
    """

    reft_rotation: nn.Parameter

    def _make_rotation(self, rank: int, dim: int) -> None:
        self.reft_rotation = linear_parameter(rank, dim)
        self.reft_rotation._no_decay = True
        self._forget()

    def _forget(self) -> None:
        self._rotation_cache: tuple[tuple, Float[Tensor, "rank dim"]] | None = None
        self._settled: tuple[tuple, Float[Tensor, "rank dim"]] | None = None

    def _reset_rotation(self) -> None:
        nn.init.orthogonal_(self.reft_rotation, gain=FREE_SCALE)

    def rotation(
        self, select: Bool[Tensor, "sites rank"] | None = None
    ) -> Float[Tensor, "rank dim"]:
        """Return R. With `select` only the rows it selects anywhere receive gradient."""
        free = self.reft_rotation
        if torch.is_grad_enabled() and free.requires_grad:
            return orthonormal_rows(free) if select is None else self._selected(select.any(0))
        key = _state(free)
        if self._rotation_cache is None or self._rotation_cache[0] != key:
            # What inference mode makes could not be used in a training step afterwards.
            with torch.inference_mode(False), torch.no_grad():
                self._rotation_cache = (key, orthonormal_rows(free))
        return self._rotation_cache[1]

    def _selected(self, used: Bool[Tensor, " rank"]) -> Float[Tensor, "rank dim"]:
        """Return R with gradient in some rows, across the span of all others."""
        if self._settled is None or self._settled[0] != _state(self.reft_rotation):
            self._settle(torch.ones_like(used))  # the first time, or after loading
            _follow(self)
        order = used.int().argsort(stable=True)
        free = self.reft_rotation[order]
        free = torch.where(used[order][:, None], free, free.detach())
        return orthonormal_rows(free)[order.argsort()]

    @torch.no_grad()
    def _settle(self, moved: Bool[Tensor, " rank"]) -> None:
        """Make the free rows orthogonal by turning those that moved; R of the others stays.

        Rows that are orthogonal already are not written: doing it twice, as a resumed run does,
        changes no bit.
        """
        free = self.reft_rotation
        order = moved.int().argsort(stable=True)
        rotation = orthonormal_rows(free[order])[order.argsort()]
        across = (free * rotation).sum(1, keepdim=True) * rotation
        write = moved & ((free - across).norm(dim=1) > SETTLED * free.norm(dim=1)).any()
        free.copy_(torch.where(write[:, None], across, free))
        self._settled = (_state(free), free.detach().clone())

    @torch.no_grad()
    def _after_step(self) -> None:
        """Settle what an optimiser step has moved."""
        free = self.reft_rotation
        if self._settled is None or self._settled[0] == _state(free):
            return
        before = self._settled[1]
        is_plain = type(free.data) is Tensor and before.shape == free.shape
        if not is_plain or before.device != free.device:
            self._settled = None  # sharded by now, or elsewhere
            return
        self._settle(_turned(before, free))

    def train(self, mode: bool = True) -> Any:
        """Switch mode and forget the cached R: writes through `.data` leave no trace."""
        self._rotation_cache = None
        self.reft_rotation._no_decay = True  # lost where loading put another tensor in its place
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rotation_cache": None, "_settled": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.reft_rotation._no_decay = True  # copies of a parameter lose its attributes


def _state(free: Float[Tensor, "rank dim"]) -> tuple:
    """Return what changes whenever a parameter is written to or replaced."""
    return (free._version, free.data_ptr(), free.device, free.dtype)


def _turned(
    before: Float[Tensor, "rank dim"], after: Float[Tensor, "rank dim"]
) -> Bool[Tensor, " rank"]:
    """Return which rows point elsewhere than before; weight decay only makes them shorter."""
    before, after = before.double(), after.double()
    along = F.normalize(before, dim=1)
    rest = after - (after * along).sum(1, keepdim=True) * along
    return rest.norm(dim=1) > 2 * torch.finfo(torch.float32).eps * after.norm(dim=1)


_apart: WeakSet[Orthonormal] = WeakSet()
"""Modules of which dimensions were trained apart; they are told of every optimiser step."""


def _follow(module: Orthonormal) -> None:
    _apart.add(module)
    _listen()


@cache
def _listen() -> None:
    def stepped(*_: Any) -> None:
        for module in list(_apart):
            module._after_step()

    register_optimizer_step_post_hook(stepped)


def masked(
    low: Float[Tensor, "sites rank"], select: Bool[Tensor, "sites rank"] | None
) -> Float[Tensor, "sites rank"]:
    """Zero the dimensions of `low` that `select` leaves out."""
    return low if select is None else low * select.to(low.dtype)
