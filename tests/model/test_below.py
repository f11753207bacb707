"""Adapters below the one that is trained: frozen, still, merged for a while, never left out."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from contracts.architectures import batch, blocks_of, build, forward
from contracts.equations import disturb
from contracts.helpers import equal, interventions
from model.test_merging import Int8Linear

from reftune.config.recipe import AdapterSpec
from reftune.errors import AdapterError
from reftune.model import off, use
from reftune.model.below import parameters_below, set_below, still
from reftune.model.build import apply_adapter
from reftune.model.checkpoint import load_adapter, save_adapter
from reftune.model.lookup import sites
from reftune.model.merge import merged_lora
from reftune.model.switching import foreign_layers

pytestmark = pytest.mark.quick
ORDERS = (("lora", "loreft"), ("loreft", "lora"))


def put_on(model, method, name="default", **options):
    """Apply an adapter as a stage does, and move it away from the identity."""
    options = {"rank": 2, **options}
    spec = AdapterSpec(method, positions="f2+l1", name=name, options=options)
    model = apply_adapter(model, spec, 0).eval()
    for key, p in sorted(model.named_parameters()):
        if p.requires_grad and "lora_B" in key:
            with torch.no_grad():
                p.add_(
                    0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(key)))
                )
    if method != "lora" and options.get("init") != "identity":
        for i, module in enumerate(interventions(model, name)):
            disturb(module, seed=i)
    return model


def stack(order=("lora", "loreft"), **options):
    """Return a model with two adapters, the first frozen below the second."""
    model = put_on(build("llama"), order[0], **options)
    return put_on(model, order[1], "upper", **options)


def training_pass(model, side="right"):
    ids, mask = batch(side)
    model.train()
    return model(input_ids=ids, attention_mask=mask, prompt_lens=mask.sum(1)).logits


def own(model):
    """Return the names of what is trained."""
    return {key for key, p in model.named_parameters() if p.requires_grad}


# Frozen


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_reach_the_upper_adapter_only(order):
    model = stack(order)
    below = parameters_below(model)
    assert below and {("lora_" in key) for key in below} == {order[0] == "lora"}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    training_pass(model).square().mean().backward()
    with_grad = {key for key, p in model.named_parameters() if p.grad is not None}
    assert with_grad == own(model) and all(".upper." in key for key in with_grad)
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    changed = {key for key, v in model.state_dict().items() if not torch.equal(v, state[key])}
    assert changed and all(".upper." in key for key in changed), "the rest is byte-identical"


@pytest.mark.parametrize("order", ORDERS)
def test_switching_adapters_off_and_on_unfreezes_nothing(order):
    """PEFT's own layers take gradients again whenever they are enabled."""
    model = stack(order)
    before = own(model)
    with model.disable_adapter():
        pass
    assert own(model) == before
    model.enable_adapter_layers()
    assert own(model) == before
    with off(model):
        pass
    assert own(model) == before


def test_both_may_be_trained():
    model = stack()
    set_below(model, trained=True)
    training_pass(model).square().mean().backward()
    assert all(p.grad is not None for p in parameters_below(model).values())
    assert own(model) == {k for k, p in model.named_parameters() if p.grad is not None}
    set_below(model)
    assert not any(p.requires_grad for p in parameters_below(model).values())


def test_what_was_loaded_to_be_trained_on_brings_its_lower_part_frozen(tmp_path):
    folder = save_adapter(stack(), tmp_path / "stack")
    model, _ = load_adapter(folder, model=build("llama"), trainable=True)
    set_below(model)
    assert own(model) and not any("lora" in key for key in own(model))


@torch.no_grad()
def test_the_upper_adapter_edits_what_the_lower_one_made():
    lora = put_on(build("llama"), "lora")
    ids, mask = batch()
    wanted = lora(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    model = put_on(lora, "loreft", "upper", init="identity")
    seen = {}

    def note(layer):
        return lambda module, args: seen.update({layer: args[0].clone()})

    handles = [site.register_forward_pre_hook(note(site.layer)) for site in sites(model)]
    forward(model, ids, mask)
    for handle in handles:
        handle.remove()
    assert set(seen) == set(range(len(blocks_of(model))))
    for layer, h in seen.items():
        if layer < max(seen):  # the last state of the model stands behind its norm
            assert equal(h[mask.bool()], wanted[layer + 1][mask.bool()], 1e-6)
    plain = build("llama")(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    assert not equal(seen[0][mask.bool()], plain.hidden_states[1][mask.bool()], 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
def test_padding_moves_no_edit_of_a_stack(order):
    model = stack(order)
    ids, mask = batch("right")
    whole = forward(model, ids, mask)
    left, left_mask = batch("left")
    other = forward(model, left, left_mask)
    for row in range(len(ids)):
        length = int(mask[row].sum())
        alone = forward(model, ids[row : row + 1, :length], mask[row : row + 1, :length])[0]
        assert equal(whole[row, :length], alone, 1e-5)
        assert equal(other[row, -length:], alone, 1e-5)


@torch.no_grad()
def test_an_upper_adapter_at_the_identity_changes_nothing():
    lora = put_on(build("llama"), "lora")
    ids, mask = batch()
    wanted = forward(lora, ids, mask)
    model = put_on(lora, "loreft", "upper", init="identity")
    assert equal(forward(model, ids, mask), wanted, 1e-4)
    paper = put_on(put_on(build("llama"), "lora"), "loreft", "upper", init="paper")
    assert not equal(forward(paper, ids, mask), wanted, 1e-2)


@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
def test_switching_off_one_part_or_both_is_exact(order):
    first = put_on(build("llama"), order[0])
    ids, mask = batch()
    one = forward(first, ids, mask)
    model = put_on(first, order[1], "upper")
    both = forward(model, ids, mask)
    assert not torch.equal(both, one)
    if order[1] == "loreft":
        use(model, [])
        assert torch.equal(forward(model, ids, mask), one), "the first stage's model"
        use(model, "upper")
        assert torch.equal(forward(model, ids, mask), both)
    with off(model):
        assert torch.equal(forward(model, ids, mask), forward(build("llama"), ids, mask))
    assert torch.equal(forward(model, ids, mask), both)


# Still


@pytest.mark.parametrize("order", ORDERS)
def test_frozen_adapters_do_not_drop_out(order):
    model = put_on(build("llama"), order[0], dropout=0.5)
    model = put_on(model, order[1], "upper")  # has none
    with torch.no_grad():
        assert not torch.equal(training_pass(model), training_pass(model))
        with still(model):
            assert torch.equal(training_pass(model), training_pass(model))
            wanted = forward(model.eval(), *batch())
            assert equal(training_pass(model), wanted, 1e-6)
        assert not torch.equal(training_pass(model), training_pass(model)), "as it was"


def test_what_is_trained_drops_out_all_the_same():
    model = stack(dropout=0.5)
    with torch.no_grad(), still(model):
        assert not torch.equal(training_pass(model), training_pass(model))
    model = put_on(put_on(build("llama"), "lora", dropout=0.5), "loreft", "upper")
    set_below(model, trained=True)
    with torch.no_grad(), still(model):
        assert not torch.equal(training_pass(model), training_pass(model))


# Merged


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merged_lora_gives_the_same_outputs_and_leaves_no_trace(name):
    base = build(name)
    targets = ["c_attn"] if name == "gpt2" else ["q_proj", "v_proj"]
    model = put_on(put_on(base, "lora", targets=targets), "loreft", "upper")
    ids, mask = batch()
    wanted = forward(model, ids, mask)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with merged_lora(model):
        assert equal(forward(model, ids, mask), wanted, 1e-4)
        changed = [k for k, v in model.state_dict().items() if not torch.equal(v, state[k])]
        assert changed and all(key.endswith("base_layer.weight") for key in changed)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(forward(model, ids, mask), wanted)


def test_gradients_are_those_of_the_unmerged_model():
    model = stack()
    found = []
    for merged in (False, True):
        model.zero_grad()
        if merged:
            with merged_lora(model):
                training_pass(model).square().mean().backward()
        else:
            training_pass(model).square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-3) for a, b in zip(*found))


def test_the_artefact_of_a_merged_stage_holds_both_parts(tmp_path):
    model = stack()
    with merged_lora(model):
        folder = save_adapter(model, tmp_path / "inside")
    after = save_adapter(model, tmp_path / "after")
    for part in ("lora", "reft"):
        file = f"{part}/adapter_model.safetensors"
        assert (folder / file).read_bytes() == (after / file).read_bytes()


def test_merging_is_refused_where_it_cannot_be():
    with (
        pytest.raises(AdapterError, match="There is no LoRA to merge"),
        merged_lora(build("llama")),
    ):
        pass
    model = stack()
    for layer in foreign_layers(model):
        layer.base_layer = Int8Linear(layer.base_layer)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"merged into quantised weights \(Int8Linear\)"):
        merged_lora(model).__enter__()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


# Saved and loaded


@torch.no_grad()
@pytest.mark.parametrize("order", ORDERS)
def test_the_upper_part_says_what_it_lacks(order, tmp_path):
    model = stack(order)
    folder = save_adapter(model, tmp_path / "stack")
    lower, upper = (("reft" if method == "loreft" else method) for method in order)
    manifest = json.loads((folder / "stack.json").read_text("utf-8"))
    assert [part["folder"] for part in manifest["order"]] == [lower, upper]
    place = str((folder / lower).resolve())
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder / upper, model=build("llama"))
    assert f'on top of a "{lower}" adapter, which is not on the model' in str(caught.value)
    assert f"{place} (it is there)" in str(caught.value) and "stack.json" in str(caught.value)
    below, _ = load_adapter(folder / lower, model=build("llama"))
    both, _ = load_adapter(folder / upper, model=below)
    assert equal(forward(both, *batch()), forward(model, *batch()), 1e-6)
    moved = shutil.move(folder / upper, tmp_path / "alone")
    with pytest.raises(AdapterError, match="nothing is there"):
        load_adapter(moved, model=build("llama"))
    with pytest.raises(AdapterError, match=rf"The stack .* lacks {upper}/"):
        load_adapter(folder, model=build("llama"))


def test_a_manifest_without_the_lower_part_is_refused(tmp_path):
    folder = save_adapter(stack(), tmp_path / "stack")
    manifest = json.loads((folder / "stack.json").read_text("utf-8"))
    manifest["order"] = manifest["order"][1:]
    (folder / "stack.json").write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(AdapterError, match='on top of a "lora" adapter'):
        load_adapter(folder, model=build("llama"))
