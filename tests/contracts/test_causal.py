"""Causal caching is exact: gradients of the cached paths are those of plain hooks."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from contracts.architectures import COMMON, VOCAB, build
from contracts.cached import (
    EXTRA,
    FOUR,
    MODES,
    backward,
    batch,
    llama_of,
    loss,
    model_of,
    source_of,
    worst,
)

import reftune
from reftune.errors import ModelError
from reftune.model import causal, cutting, frozen, off
from reftune.model.lookup import blocks_of
from reftune.model.obstacles import obstacle
from reftune.model.run import Runner
from reftune.model.site import Site

NAMES = ("llama", *EXTRA, "gpt2", "opt")
OTHERS = ("mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt_neox", "falcon")
PLACES = ("last", "l4", "response", "generated:2")


# Test 1 of the design: gradients


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_plain_hooks(name, attention, mode):
    for places in PLACES:
        for layers in ("all", "late"):
            model = model_of(name, places, layers, attention)
            for prompts in ((20, 17, 14), (18, 18, 18)):
                found = worst(model, mode, batch(prompts))
                # Eager attention takes its softmax in single precision, whatever the model's.
                limit = 1e-12 if attention == "sdpa" else 1e-6
                assert found <= limit, (places, layers, prompts, found)


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_agree(name):
    for mode in ("recompute", "start"):
        assert worst(model_of(name, "last", "late"), mode) <= 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_left_padding(mode):
    # Plain left-padded rows have other positions, whose angles are in single precision.
    assert worst(model_of("llama", "l4"), mode, batch(side="left")) <= 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_without_prefix(name, mode):
    assert worst(model_of(name, "l4"), mode, batch((20, 3, 1))) <= 1e-12


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_single_precision_agrees_to_rounding(name, mode):
    for places, layers in (("l4", "all"), ("last", "late"), ("response", "late")):
        assert worst(model_of(name, places, layers).float(), mode) <= 1e-5, (places, layers)


def test_edits_inside_a_block_start_one_block_lower():
    torch.manual_seed(0)
    model = llama_of()
    reftune.attach(model, "red", layers=[2, 3], site="mlp.up_proj", positions="last")
    model = model.double().train()
    assert cutting.first_block(model) == 1
    assert worst(model, "start") <= 1e-12 and worst(model, "recompute") <= 1e-12


def test_explicit_masks_and_subjects_follow_their_tokens():
    prepared = batch()
    prepared.intervention_mask = torch.zeros_like(prepared.input_ids, dtype=torch.bool)
    prepared.intervention_mask[:, 9:11] = True
    prepared.subject_positions = torch.tensor([11, 8, 10])
    for places, p0 in (("mask", [9, 9, 9]), ("subject_last", [11, 8, 10])):
        model = model_of("llama", places)
        assert cutting.cut(model, prepared).p0.tolist() == p0
        for mode in ("recompute", "store"):
            assert worst(model, mode, prepared) <= 1e-12


def test_a_label_before_the_edit_moves_the_cut():
    model, prepared = model_of("llama", "generated:2"), batch()
    assert cutting.cut(model, prepared).p0.tolist() == [19, 16, 13]  # predicts the first label
    prepared.labels[0, 5] = prepared.input_ids[0, 5]
    assert cutting.cut(model, prepared).p0.tolist() == [4, 16, 13]
    assert worst(model, "recompute", prepared) <= 1e-12


# Test 2: checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_sliding"])
def test_checkpointing_keeps_the_prefix(name, reentrant):
    # One new token without padding is the case in which a dropped cache is no error.
    alone = batch((12,), answers=1)
    for places, layers, prepared in (
        ("l4", "all", batch()),
        ("l4", "late", batch()),
        ("last", "all", alone),
        ("last", "late", alone),
    ):
        model = model_of(name, places, layers)
        new = cutting.split(model, prepared).prepared.input_ids.shape[1]
        assert new == (1 if places == "last" else 7)
        plain = backward(model, None, prepared)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        for mode in ("recompute", "store", "start"):
            cached = backward(model, source_of(model, mode), prepared)
            assert (plain - cached).abs().max() <= 1e-12 * plain.abs().max(), (places, mode)


def test_a_prefill_in_training_mode_is_whole():
    model = model_of("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    suffix = cutting.split(model, batch())
    cache = causal.prefill(model, suffix.prefix)
    assert cache.get_seq_length() == suffix.prefix.ids.shape[1] == 16
    assert model.training and all(m.training for m in model.modules())


# Test 3: a frozen prefix is read-only


def test_two_passes_of_one_prefix_are_equal_and_leave_it_alone():
    model, prepared = model_of("llama"), batch()
    suffix = cutting.split(model, prepared)
    given = causal.Recompute(model)(suffix)
    before = [layer.keys.clone() for layer in given.prefix.layers]
    seen = []
    for _ in range(2):
        model.zero_grad()
        loss(model, lambda suffix: given, prepared)().backward()
        seen.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*seen))
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, given.prefix.layers))
    assert not any(layer.keys.requires_grad for layer in given.prefix.layers)


def test_one_prefill_serves_all_passes_over_the_same_prompts(monkeypatch):
    model, prepared = model_of("llama"), batch()
    count = []
    real = causal.prefill
    monkeypatch.setattr(causal, "prefill", lambda *a: count.append(1) or real(*a))
    run = Runner(model, causal.Recompute(model))
    first = run(prepared)
    with off(model), torch.no_grad():
        reference = run(prepared)
    rejected = copy.copy(prepared)
    rejected.input_ids = prepared.input_ids.clone()
    rejected.input_ids[:, 20:] = rejected.input_ids[:, 20:].flip(1)  # another answer in row 0
    run(rejected)
    assert len(count) == 1
    with off(model), torch.no_grad():
        plain = Runner(model)(prepared)
    assert torch.allclose(reference.logits, plain.logits, atol=1e-12)
    assert not torch.allclose(reference.logits, first.logits, atol=1e-3)


# Test 5: shared prompts and adapters


def test_a_group_from_one_prefill_is_its_rows_alone():
    model, prepared = model_of("llama"), batch((20,) * 8)
    prepared.input_ids[:, :20] = prepared.input_ids[0, :20]
    suffix = cutting.split(model, prepared)
    assert suffix.prefix.ids.shape == (1, 16)
    assert worst(model, "recompute", prepared) <= 1e-12
    assert worst(model, "start", prepared) <= 1e-12


def test_adapters_share_a_prefix_and_differ_per_row():
    model = model_of("llama")
    reftune.attach(model, "red", name="other", layers="all", positions="last")
    model.double()
    prepared = batch((20, 20, 20))
    with reftune.mix(model, ["default", "other", "__base__"]):
        assert cutting.cut(model, prepared).p0.tolist() == [16, 19, 19]
        with torch.no_grad():
            cached = Runner(model, causal.Recompute(model))(prepared)
            plain = Runner(model)(prepared)
    assert torch.allclose(cached.logits, plain.logits, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_adapters_in_turn_share_one_prefill(monkeypatch, mode):
    model, prepared = model_of("llama"), batch()
    reftune.attach(model, "red", name="other", layers="all", positions="l4")
    count, real = [], causal.prefill
    monkeypatch.setattr(causal, "prefill", lambda *a: count.append(1) or real(*a))
    run = Runner(model.double(), source_of(model, mode))
    for name in ("default", "other", "default"):
        reftune.use(model, name)
        with torch.no_grad():
            cached, plain = run(prepared).logits, Runner(model)(prepared).logits
        assert torch.allclose(cached, plain, atol=1e-12)
    assert len(count) == 1


# Test 6: refusals


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("lora", "is trained too"),
        ("dropout", "draws random numbers in training"),
        ("encoder", "bidirectional"),
        ("seq2seq", "encoder-decoder"),
        ("linear", "recurrent state"),
        ("mamba", "recurrent state"),
        ("base", "no intervention"),
        ("both ways", "bidirectional"),
    ],
)
def test_what_is_not_constant_is_refused_by_name(change, reason):
    assert reason in obstacle(ineligible(change))


def ineligible(change: str):
    if change in ("encoder", "seq2seq"):
        if change == "seq2seq":
            model = build("t5")
        else:
            small = {k: v for k, v in COMMON.items() if k != "bos_token_id"}
            model = hf.BertLMHeadModel(hf.BertConfig(**small, intermediate_size=64))
        reftune.attach(model, "loreft", positions="f1")
        return model.train()
    if change == "mamba":
        config = hf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2)
        model = hf.MambaForCausalLM(config)
        reftune.attach(model, "loreft", positions="l1")
        return model.train()
    if change == "both ways":
        config = hf.Gemma3TextConfig(**FOUR, use_bidirectional_attention=True)
        model = hf.Gemma3ForCausalLM(config)
        reftune.attach(model, "loreft", positions="last")
        return model.train()
    if change == "base":
        return build("llama").train()
    if change == "dropout":
        model = hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        )
        reftune.attach(model, "loreft", positions="last")
        return model.train()
    model = model_of("llama", "last")
    if change == "linear":
        model.config.layer_types = ["linear_attention", "full_attention", "full_attention"]
    if change == "lora":
        next(model.model.layers[0].parameters()).requires_grad_(True)
    return model


def test_nothing_is_cut_where_the_first_token_is_edited():
    assert cutting.split(model_of("llama", "f1+l1"), batch()) is None
    late = cutting.split(model_of("llama", "f1+l1", "late"), batch())
    assert late.prefix is None and late.where.l0 > 0


def test_packed_rows_and_holes_take_the_plain_path():
    model, prepared = model_of("llama"), batch()
    prepared.attention_mask[0, 3] = 0
    assert cutting.split(model, prepared) is None
    packed = batch((20, 20))
    packed.extra = {"position_ids": torch.arange(24).expand(2, 24)}
    assert cutting.split(model, packed) is None


@pytest.mark.parametrize("key", ["token_type_ids", "pixel_values"])
def test_images_and_blocks_that_see_ahead_take_the_plain_path(key):
    prepared = batch((20, 20))
    prepared.extra = {key: torch.ones(2, 24)}
    assert cutting.split(model_of("llama"), prepared) is None


def test_a_skipped_block_that_is_read_is_an_error():
    layer = frozen.FrozenLayer(None, None, 4, None)
    with pytest.raises(ModelError, match="causal: recompute"):
        layer.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))


# Test 7: nothing is left behind


def state_of(model):
    """Return what a pass may not leave changed: flags, instance attributes and hooks."""

    def same(value):
        if isinstance(value, dict):
            return [(key, id(one)) for key, one in value.items()]
        return value if isinstance(value, bool | int | float | str) else id(value)

    blocks = (m for m in model.modules() if not isinstance(m, Site))  # sites keep their last plan
    return [{key: same(value) for key, value in vars(m).items()} for m in blocks]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_stays_on_the_model_after_an_error(name, mode):
    model = model_of(name, "last", "late")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    suffix = cutting.split(model, batch())
    given = source_of(model, mode)(suffix)
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt), causal.running(model, suffix, given):
        assert state_of(model) != before
        raise KeyboardInterrupt
    assert state_of(model) == before


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_stays_on_the_model_after_an_error_in_the_prefill(name, mode):
    model = model_of(name, "last", "late")
    suffix, source = cutting.split(model, batch()), source_of(model, mode)
    block = blocks_of(model).modules[-2]

    def fail(*_):
        raise KeyboardInterrupt

    before = state_of(model)
    hook = block.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        source(suffix)
    hook.remove()
    assert state_of(model) == before
    assert worst(model, mode) <= 1e-12


def test_generation_is_as_before():
    model = model_of("llama").eval()
    ids = batch().input_ids[:1, :20]
    before = model.generate(ids, max_new_tokens=5, do_sample=False)
    worst(model.train(), "start")
    after = model.eval().generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(before, after)


def test_another_forward_of_a_block_is_put_back():
    model = model_of("llama", "last", "late")
    block = model.model.layers[0]
    own = block.forward
    block.forward = own  # as accelerate leaves it
    with frozen.start_at(list(model.model.layers), 1, torch.zeros(1, 1, 1)):
        assert block.__dict__["forward"] is not own
    assert block.__dict__["forward"] == own


# Test 9: padded columns


@pytest.mark.parametrize("mode", MODES)
def test_padded_columns_of_a_prefix_are_zero(mode):
    model = model_of("llama", attention="eager")
    source = source_of(model, mode)
    source(cutting.split(model, batch()))  # a store answers from what it kept the second time
    given = source(cutting.split(model, batch()))
    held = [layer for layer in given.prefix.layers if layer.keys is not None]
    assert len(held) == 3 - (mode == "start")  # block 0 is not run then
    for layer in held:
        assert torch.isfinite(layer.keys).all() and torch.isfinite(layer.values).all()
        assert not layer.keys[2, :, :6].any() and not layer.values[2, :, :6].any()
        assert layer.keys[2, :, 6:].abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_prefix_that_is_not_finite_is_an_error(mode):
    model = model_of("llama", "l4", "late")
    weight = model.model.layers[-1].self_attn.v_proj.weight
    source, suffix = source_of(model, mode), cutting.split(model, batch())
    with torch.no_grad():
        weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=f"not finite in block {len(model.model.layers) - 1}"):
        source(suffix)


def test_lowest_precision_is_as_far_from_plain_as_plain_from_single():
    """bf16 is compared with fp32, not bit for bit."""
    model = model_of("llama").float()
    exact = backward(model, None, batch())
    model = model.bfloat16()
    plain = backward(model, None, batch()).float()
    cached = backward(model, causal.Recompute(model), batch()).float()
    assert (cached - exact).norm() <= 1.5 * (plain - exact).norm() + 1e-3 * exact.norm()
