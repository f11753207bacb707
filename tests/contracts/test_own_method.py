"""A registered method of somebody else goes through the same matrix, and is told its faults."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from contracts import test_interventions as matrix
from torch import nn

from reftune.errors import AdapterError, RecipeError
from reftune.interventions import REGISTRY, register
from reftune.interventions.base import Edit, Intervention, InterventionConfig
from reftune.model.doctor import check_method

pytestmark = pytest.mark.quick
KINDS = ("llama", "llama bfloat16", "llama float64", "gpt2", "bert", "t5")


@dataclass(frozen=True)
class ShiftConfig(InterventionConfig):
    sharpness: float = 1.0


class Shift(Intervention):
    """h' = h + sigmoid(k w·h) v."""

    Config = ShiftConfig
    name = "shift"

    def __init__(self, config, dim):
        super().__init__(config, dim)
        self.reft_weight = nn.Parameter(torch.zeros(dim))
        self.reft_vector = nn.Parameter(torch.zeros(dim))

    def reset(self):
        nn.init.normal_(self.reft_weight, std=0.02)
        nn.init.zeros_(self.reft_vector)

    def edit(self, h, select=None):
        gate = torch.sigmoid(self.config.sharpness * (h @ self.reft_weight.to(h.dtype)))
        return Edit(gate[:, None] * self.reft_vector.to(h.dtype))

    @classmethod
    def num_parameters(cls, config, dim):
        return 2 * dim


class NoIdentity(Shift):
    """Starts somewhere, and says so."""

    name = "no_identity"

    def reset(self):
        nn.init.normal_(self.reft_weight)
        nn.init.normal_(self.reft_vector)

    @classmethod
    def check(cls, config):
        if config.init == "identity":
            raise AdapterError("no_identity cannot start at the identity.", "Use init: paper.")


class NotTheIdentity(Shift):
    def reset(self):
        nn.init.ones_(self.reft_vector)


class WrongCount(Shift):
    @classmethod
    def num_parameters(cls, config, dim):
        return dim


class WrongName(Shift):
    def __init__(self, config, dim):
        super().__init__(config, dim)
        self.vector = self.reft_vector
        del self.reft_vector

    def reset(self):
        nn.init.zeros_(self.vector)

    def edit(self, h, select=None):
        return Edit(torch.sigmoid(h @ self.reft_weight.to(h.dtype))[:, None] * self.vector)


class NoGradient(Shift):
    def edit(self, h, select=None):
        gate = torch.sigmoid(h @ self.reft_weight.detach().to(h.dtype))
        return Edit(gate[:, None] * self.reft_vector.to(h.dtype))


class SinglePrecision(Shift):
    """Forgets that hidden states of a float64 model are float64."""

    def edit(self, h, select=None):
        return Edit(torch.sigmoid(h @ self.reft_weight)[:, None] * self.reft_vector)


class LooksAtOthers(Shift):
    def edit(self, h, select=None):
        gate = torch.sigmoid(h @ self.reft_weight.to(h.dtype)).mean()
        return Edit((gate * self.reft_vector.to(h.dtype)).expand_as(h))


FAULTS = {
    "identity": NotTheIdentity,
    "parameters": WrongCount,
    "gradients": NoGradient,
    "attach": SinglePrecision,
    "tokens": LooksAtOthers,
}


@pytest.fixture
def registered(monkeypatch):
    """Return a function that registers a class under its name until the test ends."""
    REGISTRY.names()
    monkeypatch.setattr(REGISTRY, "_targets", dict(REGISTRY._targets))

    def add(cls):
        REGISTRY._targets.pop(cls.name, None)
        register(cls.name, cls)
        return cls.name

    return add


@pytest.mark.parametrize("cls", [Shift, NoIdentity])
def test_a_good_method_passes_everywhere(registered, cls):
    checks = check_method(registered(cls), sharpness=2.0)
    assert [check for check in checks if not check.passed] == []
    assert checks[0].name == "tokens"
    assert {check.name.split(": ")[0] for check in checks[1:]} == set(KINDS)


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_faulty_method_is_told_its_fault(registered, fault):
    failed = {c.name: c.detail for c in check_method(registered(FAULTS[fault])) if not c.passed}
    assert fault in {name.split(": ")[-1] for name in failed}
    if fault == "parameters":
        assert failed["llama: parameters"] == "128 are trained, num_parameters says 64"
    if fault == "gradients":
        assert failed["gpt2: gradients"].startswith("none for reft_weight of block 0")
    if fault == "attach":
        assert set(failed) == {"llama float64: attach"}


def test_parameters_with_foreign_names_are_told(registered):
    failed = [check.detail for check in check_method(registered(WrongName)) if not check.passed]
    assert any("do not begin with reft_: vector" in detail for detail in failed)


def test_unknown_methods_and_settings(registered):
    with pytest.raises(RecipeError, match='There is no intervention "shifd"'):
        check_method("shifd")
    with pytest.raises(AdapterError, match='shift has no setting "sharpnes"'):
        check_method(registered(Shift), sharpnes=2.0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "modernbert", "t5"])
@pytest.mark.parametrize("cls", [Shift, NoIdentity])
def test_the_matrix_takes_a_method_without_an_equation(registered, cls, name, tmp_path):
    method = registered(cls)
    with pytest.raises(pytest.skip.Exception, match=f"{method} has no equation"):
        matrix.test_output_equals_the_equation(method, name)
    matrix.test_switched_off_and_detached_the_base_is_bit_identical(method, name)
    matrix.test_saved_and_loaded_is_bit_equal(method, name, tmp_path)
    matrix.test_identity_init_leaves_logits_unchanged(method, name)
    matrix.test_only_own_parameters_train_and_every_layer_gets_gradient(method, name)
    matrix.test_deepcopy_is_independent(method, name)
    matrix.test_parameter_count_is_the_docstrings_formula(method)
    matrix.test_bf16_base_keeps_the_adapter_in_fp32(method)


@pytest.mark.parametrize(("cls", "code"), [(Shift, 0), (WrongCount, 4)])
def test_the_command_line_checks_it(registered, capsys, cls, code):
    from reftune.cli.main import main

    assert main(["doctor", "--method", registered(cls), "--json"]) == code
    checks = json.loads(capsys.readouterr().out)["checks"]
    failed = [check["name"] for check in checks if not check["passed"]]
    assert len(checks) == 55 and failed == [f"{k}: parameters" for k in KINDS if code]
