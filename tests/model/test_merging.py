"""Merging is exact where weights can express the edit, and refused with the reason elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
from contracts.architectures import ARCHITECTURES, batch, build, forward
from contracts.equations import disturb
from contracts.helpers import attached, equal, interventions, wrapped
from torch import nn

from reftune import LoreftConfig, RedConfig, ReftConfig, detach
from reftune.errors import AdapterError
from reftune.model.merge import merge_adapter

pytestmark = pytest.mark.quick


def whole():
    """Return rows without padding: weights act on padding too, adapters do not."""
    return batch(lengths=(8, 8))


def merges(model, tolerance=1e-5):
    """Merge a PEFT adapter; compare outputs, and that nothing of ours is left."""
    ids, mask = whole()
    wanted = forward(model, ids, mask)
    merged = model.merge_and_unload()
    assert not any("intervention" in n for n, _ in merged.named_modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in merged.modules())
    assert equal(forward(merged, ids, mask), wanted, tolerance)
    assert not equal(wanted, forward(build("llama"), ids, mask), 1e-3)


@torch.no_grad()
@pytest.mark.parametrize("site", ["mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"])
def test_red_on_a_linear_module(site):
    merges(wrapped(build("llama"), "red", positions="all", site=site))


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "bert", "t5"])
def test_red_on_other_architectures(name):
    """GPT-2 stores weights transposed, OPT and NeoX have biases."""
    site = ARCHITECTURES[name].inner
    model = wrapped(build(name), "red", positions="all", site=site)
    ids, mask = whole()
    wanted = forward(model, ids, mask)
    merged = model.merge_and_unload()
    assert equal(forward(merged, ids, mask), wanted, 1e-5)


@torch.no_grad()
def test_strength_is_merged_too():
    merges(wrapped(build("llama"), "red", positions="all", site="mlp.up_proj", strength=0.5))


@torch.no_grad()
def test_lobireft_on_block_outputs_becomes_a_bias():
    model = wrapped(build("llama"), "lobireft", positions="all")
    base = copy.deepcopy(model.get_base_model())
    merges(model)
    merge_adapter(base, "default")
    assert all(layer.mlp.down_proj.bias is not None for layer in base.model.layers)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "falcon"])
def test_a_bias_on_block_outputs_of_other_architectures(name):
    model = wrapped(build(name), "lobireft", positions="all")
    ids, mask = whole()
    wanted = forward(model, ids, mask)
    assert equal(forward(model.merge_and_unload(), ids, mask), wanted, 1e-5)


@torch.no_grad()
def test_several_adapters_merge_as_their_sum():
    model = wrapped(build("llama"), "red", positions="all", site="mlp.up_proj")
    model.add_adapter("b", ReftConfig(RedConfig(), positions="all", site="mlp.up_proj"))
    model.add_adapter("c", ReftConfig(method="lobireft", positions="all"))
    for name in ("b", "c"):
        for i, module in enumerate(interventions(model, name)):
            disturb(module, seed=20 + i)
    model.base_model.set_adapter(["default", "b", "c"])
    merges(model)


@torch.no_grad()
def test_a_scale_inside_and_a_shift_outside_of_one_module():
    """down_proj is scaled and also carries the block's bias: the order of writing matters."""
    model = wrapped(build("llama"), "red", positions="all", site="mlp.down_proj")
    model.add_adapter("b", ReftConfig(method="lobireft", positions="all"))
    for i, module in enumerate(interventions(model, "b")):
        disturb(module, seed=20 + i)
    model.base_model.set_adapter(["default", "b"])
    merges(model)


@torch.no_grad()
def test_float64_and_bf16_bases():
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 2e-2)):
        model = wrapped(build("llama").to(dtype), "red", positions="all", site="mlp.up_proj")
        ids, mask = whole()
        wanted = forward(model, ids, mask)
        merged = model.merge_and_unload()
        assert merged.dtype == dtype
        assert equal(forward(merged, ids, mask), wanted, tolerance)


@torch.no_grad()
def test_merging_a_copy_leaves_the_model():
    model = attached(build("llama"), "red", positions="all", site="mlp.up_proj")
    ids, mask = whole()
    wanted = forward(model, ids, mask)
    twin = copy.deepcopy(model)
    merge_adapter(twin, "default")
    detach(twin)
    assert equal(forward(twin, ids, mask), wanted, 1e-5)
    assert torch.equal(forward(model, ids, mask), wanted)
    detach(model)
    assert torch.equal(forward(model, ids, mask), forward(build("llama"), ids, mask))


REFUSED = [
    ("loreft", {"positions": "all"}, "loreft is no element-wise scale and shift"),
    ("consreft", {"positions": "all"}, "consreft is no element-wise"),
    ("direft", {"positions": "all", "site": "mlp.up_proj"}, "direft is no element-wise"),
    ("lobireft", {"positions": "f2+l2"}, r'it edits "f2\+l2", weights act on all tokens'),
    ("red", {"positions": "all_prompt", "site": "mlp.up_proj"}, 'it edits "all_prompt"'),
    ("red", {"positions": "all"}, "it scales the residual stream"),
    ("lobireft", {"positions": "f1+l1", "tied": False}, "weights act on all tokens"),
]


@pytest.mark.parametrize(("method", "where", "message"), REFUSED)
def test_refused_with_the_reason(method, where, message):
    model = wrapped(build("llama"), method, **where)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    ids, mask = whole()
    with torch.no_grad():
        wanted = forward(model, ids, mask)
        with pytest.raises(AdapterError, match=f'"default" cannot be merged: .*{message}'):
            model.merge_and_unload()
        assert torch.equal(forward(model, ids, mask), wanted)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["gemma2", "bert"])
def test_refused_where_a_norm_stands_between(name):
    model = wrapped(build(name), "lobireft", positions="all")
    ids, mask = whole()
    with torch.no_grad():
        wanted = forward(model, ids, mask)
        with pytest.raises(
            AdapterError, match="cannot be merged exactly: the outputs would differ"
        ):
            model.merge_and_unload()
        assert torch.equal(forward(model, ids, mask), wanted), "the weights are put back"


# Quantised bases


class Int8Linear(nn.Module):
    """A fake-quantised linear module: int8 weights and a scale per row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        weight = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = None

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale).T


def quantised():
    model = build("llama")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Int8Linear(module))
    return model


@pytest.mark.parametrize(("method", "site"), [("red", "mlp.up_proj"), ("lobireft", "block")])
def test_merging_into_quantised_weights_is_refused(method, site):
    model = wrapped(quantised(), method, positions="all", site=site)
    with pytest.raises(AdapterError, match=r"base weights are quantised \(Int8Linear\)"):
        model.merge_and_unload()


@pytest.mark.parametrize("site", ["block", "mlp.up_proj"])
def test_quantised_bases_train_and_serve(site, tmp_path):
    from reftune.model.checkpoint import load_adapter, save_adapter

    model = wrapped(quantised(), "loreft", positions="f1+l1", site=site).train()
    ids, mask = whole()
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :3] = -100
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    loaded, _ = load_adapter(save_adapter(model, tmp_path / "a"), model=quantised())
    with torch.no_grad():
        assert torch.equal(forward(loaded, ids, mask), forward(model, ids, mask))
    left, left_mask = batch("left")
    out = loaded.generate(input_ids=left, attention_mask=left_mask, max_new_tokens=3)
    assert out.shape[1] > left.shape[1]
    assert LoreftConfig().rank == 4
