"""Interventions of a user's own: `register()`, entry points, and the same contract."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest
import torch
from contracts.architectures import batch, build, forward
from contracts.helpers import attached, captured, edited_mask, equal, interventions, wrapped
from torch import Tensor, nn

from reftune import detach, off
from reftune import registry as registries
from reftune.errors import RecipeError
from reftune.interventions import REGISTRY, get, names, register
from reftune.interventions.base import Edit, Intervention, InterventionConfig
from reftune.model.checkpoint import load_adapter, save_adapter
from reftune.registry import Registry

pytestmark = pytest.mark.quick


@dataclass(frozen=True)
class ShiftConfig(InterventionConfig):
    """Settings of Shift."""

    start: float = 0.5


class Shift(Intervention):
    """h' = h + b.   Parameters per site: d."""

    Config = ShiftConfig
    name = "shift"

    def __init__(self, config: ShiftConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.reft_shift = nn.Parameter(torch.zeros(dim))

    def reset(self) -> None:
        nn.init.constant_(self.reft_shift, 0.0 if self.config.init == "identity" else 0.5)

    def edit(self, h: Tensor, select: Tensor | None = None) -> Edit:
        return Edit(self.reft_shift.expand_as(h))

    @classmethod
    def num_parameters(cls, config: ShiftConfig, dim: int) -> int:
        return dim


@pytest.fixture
def shift():
    register("shift", Shift)
    yield "shift"
    REGISTRY._targets.pop("shift")


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@torch.no_grad()
def test_a_users_intervention_keeps_the_contract(shift, name, tmp_path):
    ids, mask = batch()
    base = forward(build(name), ids, mask)
    model = attached(build(name), shift, positions="f2+l1")
    with captured(model) as records:
        on = forward(model, ids, mask)
    where = edited_mask((11, 7, 4), 2, 1)
    for module, record in zip(interventions(model), records):
        expected = record["before"] + where[..., None] * module.reft_shift
        assert equal(record["after"], expected, 1e-6)
    with off(model):
        assert torch.equal(forward(model, ids, mask), base)
    detach(model)
    assert torch.equal(forward(model, ids, mask), base)
    identity = attached(build(name), shift, positions="f2+l1", init="identity")
    assert equal(forward(identity, ids, mask), base, 1e-6)
    peft = wrapped(build(name), shift, positions="f2+l1")
    assert torch.equal(forward(peft, ids, mask), on)
    loaded, _ = load_adapter(save_adapter(peft, tmp_path / "a"), model=build(name))
    assert torch.equal(forward(loaded, ids, mask), on)
    assert loaded.peft_config["default"].intervention["start"] == 0.5


def test_registered_by_target(shift):
    registry = Registry("intervention", {"loreft": "reftune.interventions.loreft:Loreft"})
    registry.register("other", "reftune.interventions.red:Red")
    assert registry.names()[0] == "loreft" and "other" in registry.names()
    assert registry.get("other") is get("red")
    assert registry.target("other") == "reftune.interventions.red:Red"


def test_entry_points_are_found(monkeypatch):
    entry = EntryPoint("theirs", "reftune.interventions.red:Red", "reftune.interventions")
    clash = EntryPoint("loreft", "somewhere:Else", "reftune.interventions")
    asked = []
    monkeypatch.setattr(
        registries, "entry_points", lambda group: asked.append(group) or [entry, clash]
    )
    registry = Registry("intervention", {"loreft": "reftune.interventions.loreft:Loreft"})
    assert registry.names() == ["loreft", "theirs"]
    assert asked == ["reftune.interventions"]
    assert registry.get("theirs") is get("red")
    assert registry.get("loreft") is get("loreft"), "built-in names win"


def test_a_broken_entry_point_hurts_nobody_else(monkeypatch, caplog):
    from reftune.model.adapters import resolve

    monkeypatch.setitem(REGISTRY._targets, "theirs", "a_module_that_is_not_there:Method")
    assert resolve(get("loreft").Config())[0] is get("loreft")
    assert "theirs cannot be imported" in caplog.text


def test_unknown_and_taken_names(shift):
    with pytest.raises(RecipeError, match=r'no intervention "loreff".*Did you mean "loreft"'):
        get("loreff")
    with pytest.raises(RecipeError, match='intervention "red" exists already'):
        register("red", Shift)
    register("shift", Shift)  # the same again is no clash
    get("red")
    register("red", "reftune.interventions.red:Red")
    for bad in ("Shift", "two words", "reft_x", "1st", ""):
        with pytest.raises(RecipeError, match="is no valid intervention name"):
            register(bad, Shift)


def test_listing_imports_no_method():
    import subprocess
    import sys

    code = (
        "import sys; from reftune.interventions import names; assert 'loreft' in names();"
        "assert 'reftune.interventions.loreft' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_configs_find_their_method():
    from reftune.errors import AdapterError
    from reftune.interventions.base import LowRankConfig
    from reftune.interventions.red import RedConfig
    from reftune.model.adapters import resolve

    for name in names():
        method = get(name)
        assert method.name == name and method.title and method.source
        assert issubclass(method.Config, InterventionConfig)
        assert resolve(name)[0] is method
        assert resolve(method.Config(), name)[0] is method
    assert resolve(get("loreft").Config())[0] is get("loreft")
    assert resolve(get("direft").Config())[0] is get("direft")
    with pytest.raises(AdapterError, match=r"LowRankConfig belongs to 2 .*consreft, lobireft"):
        resolve(LowRankConfig())
    with pytest.raises(AdapterError, match="RedConfig is no config of loreft"):
        resolve(RedConfig(), "loreft")
    with pytest.raises(AdapterError, match=r'loreft has no setting "rnak".*Did you mean "rank"'):
        get("loreft").config_from({"rnak": 2})
