"""Settings are checked when they are made; identity means identity, or is refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
import torch

from reftune import (
    DireftConfig,
    InterventionConfig,
    LoreftConfig,
    LowRankConfig,
    RedConfig,
    ReftConfig,
)
from reftune.errors import AdapterError
from reftune.interventions import get, names
from reftune.interventions.base import ACTIVATIONS
from reftune.model.adapters import Placement

pytestmark = pytest.mark.quick
DIM = 12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoreftConfig(init="idendity"), 'init is "idendity".*Did you mean "identity"'),
        (lambda: LoreftConfig(activation="rleu"), 'activation is "rleu".*Did you mean "relu"'),
        (lambda: DireftConfig(dropout_on="edit"), 'dropout_on is "edit".*Known: delta, output'),
        (lambda: LoreftConfig(rank="4"), 'rank is "4".*Use a whole number'),
        (lambda: LoreftConfig(rank=4.0), r"rank is 4\.0.*Use a whole number"),
        (lambda: LoreftConfig(rank=True), r"rank is True.*Use a whole number"),
        (lambda: LowRankConfig(dropout="0.1"), 'dropout is "0.1".*Use a number'),
        (lambda: LowRankConfig(dropout=float("nan")), "dropout is nan.*Use a number"),
        (lambda: RedConfig(train_scale="no"), 'train_scale is "no".*Use True or False'),
        (lambda: ReftConfig({"rank": "4"}), 'rank is "4".*Use a whole number'),
        (lambda: Placement(tied="false"), 'tied is "false".*Use True or False'),
        (lambda: Placement(site=3), "site is 3.*Use a text"),
        (lambda: Placement(blocks=3), "blocks is 3.*Use a text or None"),
    ],
)
def test_values_that_do_not_fit_are_refused(make, message):
    with pytest.raises(AdapterError, match=message):
        make()


@dataclass(frozen=True)
class SteerConfig(InterventionConfig):
    """Settings of a third party's method."""

    sharpness: float | None = None
    side: Literal["left", "right", 3] = "left"
    table: dict | torch.Tensor | None = None


def test_settings_of_third_parties_are_checked_too():
    assert SteerConfig(sharpness=2, side=3, table=torch.zeros(2)).sharpness == 2
    with pytest.raises(AdapterError, match=r'sharpness is "2".*Use a number or None'):
        SteerConfig(sharpness="2")
    with pytest.raises(AdapterError, match=r'side is "rigth".*Did you mean "right"'):
        SteerConfig(side="rigth")


def test_settings_made_inside_a_function_are_let_through():
    class Inner:
        pass

    @dataclass(frozen=True)
    class LocalConfig(InterventionConfig):
        inner: Inner | None = None

    assert LocalConfig(inner=Inner()).dropout == 0


REFUSED = {("loreft", a) for a in ACTIVATIONS if a != "none"}
REFUSED |= {("direft_orth", "relu"), ("direft_orth", "sigmoid")}
ACTIVE = [name for name in names() if "activation" in get(name).Config.__dataclass_fields__]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("method", ACTIVE)
def test_identity_is_exact_and_learns_or_is_refused_by_name(method, activation):
    cls = get(method)
    config = cls.Config(rank=3, init="identity", activation=activation)
    if (method, activation) in REFUSED:
        with pytest.raises(AdapterError, match=f"{method} cannot start at the identity"):
            cls(config, DIM)
        with pytest.raises(AdapterError, match=f"{method} cannot start at the identity"):
            ReftConfig(config, method=method)
        return
    module = cls(config, DIM)
    module.reset()
    h = torch.randn(5, DIM, generator=torch.Generator().manual_seed(0))
    delta = module(h).delta
    assert delta.abs().max() < 1e-6
    (delta * torch.randn(5, DIM, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_consreft_refuses_identity_before_there_is_a_model():
    with pytest.raises(AdapterError, match="consreft cannot start at the identity"):
        ReftConfig(LowRankConfig(init="identity"), method="consreft")


@pytest.mark.parametrize("name", ["loreft", "direft", "direft_orth", "noreft"])
def test_paper_initialisation_is_that_of_linear_layers(name):
    dim, rank = 256, 8
    torch.manual_seed(0)
    module = get(name)(get(name).Config(rank=rank), dim)
    module.reset()
    bound = dim**-0.5
    for parameter in (module.reft_weight, module.reft_bias):
        assert parameter.abs().max() <= bound
    assert module.reft_weight.abs().max() > 0.98 * bound
    assert float(module.reft_weight.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert module.reft_bias.any()


@pytest.mark.parametrize("name", ["consreft", "lobireft"])
def test_constants_start_as_in_the_reference(name):
    torch.manual_seed(0)
    module = get(name)(get(name).Config(rank=64), 128)
    module.reset()
    bias = module.reft_bias
    assert 0 <= bias.min() < 0.1 and 0.9 < bias.max() < 1


def test_a_fresh_edit_is_small_beside_the_state():
    """Expected ratio for orthonormal R and uniform W, b: sqrt(4 r / 3 d)."""
    dim, rank = 1024, 8
    torch.manual_seed(0)
    module = get("loreft")(LoreftConfig(rank=rank), dim)
    module.reset()
    h = torch.randn(200, dim)
    ratio = (module.eval()(h).delta.norm(dim=1) / h.norm(dim=1)).mean()
    assert float(ratio.detach()) == pytest.approx((4 * rank / 3 / dim) ** 0.5, rel=0.1)
