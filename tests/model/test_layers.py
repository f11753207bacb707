"""Layer choice and the search for sites."""

from __future__ import annotations

import pytest
import torch
from contracts.architectures import ARCHITECTURES, batch, build, forward, llama
from contracts.helpers import attached
from torch import nn

from reftune import attach
from reftune.errors import AdapterError, SiteError
from reftune.interventions.loreft import LoreftConfig
from reftune.model.adapters import adapter_names, sites
from reftune.model.layers import parse_layers
from reftune.model.sites import find_blocks

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("late", [4, 5, 6, 7]),
        ("half", [0, 2, 4, 6]),
        ("3", [3]),
        (3, [3]),
        (-1, [7]),
        ("-1", [7]),
        ("0,-1", [0, 7]),
        ("3;1;3", [1, 3]),
        ([2, -1, 2], [2, 7]),
        ("2-5", [2, 3, 4, 5]),
        ("2..5", [2, 3, 4, 5]),
        ("-3--1", [5, 6, 7]),
        ("0.5-1.0", [4, 5, 6, 7]),
        ("0.0-0.25", [0, 1]),
        ("0, 2-3 ,0.9-1.0", [0, 2, 3]),
        (range(2), [0, 1]),
    ],
)
def test_choices(choice, expected):
    got = parse_layers(choice, 8)
    assert got == expected


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("8", "Layer 8 in '8' does not exist: the model has 8 blocks, 0 to 7"),
        ("-9", "Layer -9 .* does not exist"),
        ([0, 12], "Layer 12 .* does not exist"),
        ("5-2", "runs backwards"),
        ("0.9-0.1", "must rise within 0.0 to 1.0"),
        ("0.5-1.5", "must rise within 0.0 to 1.0"),
        ("0.5", "a fraction needs an end"),
        ("some", "'some' in the layer choice 'some' is not understood"),
        ("", "is not understood"),
        ([], "names no layer"),
        ("0.01-0.02", "names no layer"),
    ],
)
def test_bad_choices(choice, message):
    with pytest.raises(SiteError, match=message):
        parse_layers(choice, 8)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_a_named_linear_module_is_a_site(name):
    inner = ARCHITECTURES[name].inner
    model = attached(build(name), "red", site=inner, positions="all", layers="-1")
    (site,) = sites(model)
    assert not site.outer and site.layer == len(find_blocks(model).modules) - 1
    ids, mask = batch()
    with torch.no_grad():
        changed = forward(model, ids, mask)
        assert not torch.allclose(changed, forward(build(name), ids, mask))


def test_a_missing_module_lists_those_there_are():
    with pytest.raises(SiteError, match=r'has no module "mlp.up".*mlp.gate_proj, mlp.up_proj'):
        attach(build("llama"), "red", site="mlp.up")


def test_a_module_of_unknown_width_is_refused():
    with pytest.raises(SiteError, match=r'"input_layernorm" in .* is a LlamaRMSNorm'):
        attach(build("llama"), "red", site="input_layernorm")


def test_a_module_that_sees_other_tokens_is_refused():
    model = build("t5")
    site = "layer.1.EncDecAttention.k"  # reads the encoder's tokens in the decoder's pass
    attach(model, "red", site=site, stack="decoder", positions="all")
    ids, mask = batch()
    with pytest.raises(SiteError, match="but the call has 3 x 3 tokens"):
        forward(model, ids, mask)


class Strange(nn.Module):
    """A model whose blocks do not look like transformers' blocks."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"hidden_size": 8})()
        self.embed = nn.Embedding(16, 8)
        self.stages = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.extras = nn.ModuleList([nn.Identity(), nn.Linear(8, 8)])

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for stage in self.stages:
            x = stage(x)
        return x


def test_blocks_that_cannot_be_found_are_named_by_hand():
    model = Strange()
    with pytest.raises(SiteError, match=r'blocks="model.layers".*stages, extras') as error:
        attach(model, "red")
    assert "Strange were not found" in str(error.value)
    with pytest.raises(SiteError, match=r'no list of blocks "stage".*Did you mean "stages"'):
        attach(model, "red", blocks="stage")
    ids = torch.arange(6)[None]
    before = model(ids)
    attached(model, "red", blocks="stages", positions="f1", layers="0")
    after = model(ids)
    assert not torch.equal(after[:, 0], before[:, 0])
    assert torch.equal(after[:, 1:], before[:, 1:])


def test_unknown_stack_is_refused():
    with pytest.raises(SiteError, match='no stack "encodr"'):
        attach(build("t5"), "red", stack="encodr")


def test_blocks_of_other_depths():
    assert len(find_blocks(llama(num_hidden_layers=5)).modules) == 5
    model = attached(llama(num_hidden_layers=1), "loreft")
    assert [site.layer for site in sites(model)] == [0]


def test_a_failed_attach_leaves_nothing_behind():
    model = build("llama")
    grads = [p.requires_grad for p in model.parameters()]
    keys = set(vars(model))
    with pytest.raises(AdapterError, match="rank 33 is larger than the width 32"):
        attach(model, LoreftConfig(rank=33))
    assert adapter_names(model) == [] and sites(model) == []
    assert set(vars(model)) == keys and "generate" not in vars(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == grads


def test_bare_backbones_take_adapters():
    model = build("llama").model
    attached(model, "loreft", positions="l1")
    ids, mask = batch()
    with torch.no_grad():
        edited = model(input_ids=ids, attention_mask=mask)[0]
        plain = build("llama").model(input_ids=ids, attention_mask=mask)[0]
    different = (edited != plain).any(-1)
    assert different[0].nonzero().flatten().tolist() == [10]
    assert different[2].nonzero().min() == 3
