"""Causal caching with every method, with other adapters around, and where it must step aside."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from contracts.cached import FOUR, MODES, backward, batch, llama_of, model_of, source_of, worst
from contracts.helpers import attached
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import reftune
from reftune.interventions import names
from reftune.model import causal, cutting, off, prompt_scope
from reftune.model.lookup import blocks_of, placed
from reftune.model.obstacles import angle_limit, obstacle, start_obstacle
from reftune.model.run import Runner


def on_lora(frozen: bool = True):
    """Return a Llama with a LoRA that does something, and an adapter on top."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(llama_of(), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    base = model.get_base_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    reftune.attach(base, "loreft", layers="late", positions="l4")
    for parameter in trained:
        parameter.requires_grad_(not frozen)
    return model.double().train()


# What is trained


@pytest.mark.parametrize("method", names())
def test_every_method_is_exact(method):
    for layers in ("all", "late"):
        model = attached(llama_of(), method, layers=layers, positions="l4").double().train()
        for mode in MODES:
            assert worst(model, mode) <= 1e-12, (layers, mode)


def test_parameters_of_their_own_for_first_and_last_tokens():
    model = llama_of()
    reftune.attach(model, "loreft", layers="late", positions="f2+l2", tied=False)
    model = model.double().train()
    assert len(placed(model)[0].groups("default")) == 2
    for mode in MODES:
        assert worst(model, mode) <= 1e-12
    assert cutting.split(model, batch()).where.l0 == 2


@pytest.mark.parametrize("mode", MODES)
def test_rows_with_subspaces_of_their_own(mode):
    model, prepared = model_of("llama", "l4", "late"), batch()
    prepared.select = [(0,), None, (1,)]
    assert worst(model, mode, prepared) <= 1e-12
    assert not torch.equal(backward(model, None, prepared), backward(model, None, batch()))


@pytest.mark.parametrize("mode", MODES)
def test_rows_with_adapters_of_their_own(mode):
    model = model_of("llama", "l4", "late")
    reftune.attach(model, "red", name="other", layers=[1, 2], positions="last")
    reftune.use(model.double(), ["default", "other"])
    prepared = batch((20, 20, 17))
    with reftune.mix(model, ["default", "other", "__base__"]):
        assert worst(model, mode, prepared) <= 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_on_a_frozen_one(mode):
    model = model_of("llama", "l2", [1, 2])
    below = [p for p in model.parameters() if p.requires_grad]
    reftune.attach(model, "red", name="upper", layers=[1], positions="l4")
    reftune.use(model.double(), ["default", "upper"])
    for parameter in below:
        parameter.requires_grad_(False)
    assert worst(model, mode) <= 1e-12
    assert cutting.cut(model, batch()).p0.tolist() == [16, 13, 10]


@pytest.mark.parametrize("mode", MODES)
def test_frozen_lora_is_part_of_the_base_until_it_is_switched_off(mode):
    model, prepared = on_lora(), batch()
    source = source_of(model, mode)
    assert obstacle(model) is None and worst(model, mode) <= 1e-12
    run = Runner(model, source)
    with torch.no_grad():
        run(prepared)
        with off(model):
            reference, plain = run(prepared).logits, Runner(model)(prepared).logits
        again, trained = run(prepared).logits, Runner(model)(prepared).logits
    assert torch.allclose(reference, plain, atol=1e-12)
    assert torch.allclose(again, trained, atol=1e-12) and not torch.allclose(plain, trained)


@pytest.mark.parametrize("mode", MODES)
def test_a_base_that_changes_is_noticed(mode):
    model, prepared = model_of("llama", "l4", "late"), batch()
    run = Runner(model, source_of(model, mode))
    with torch.no_grad():
        run(prepared)
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)
        cached, plain = run(prepared).logits, Runner(model)(prepared).logits
    assert torch.allclose(cached, plain, atol=1e-12)


def test_states_at_the_labels_are_the_same():
    model = model_of("llama", "l4", "late")
    plain = Runner(model)(batch(), hidden=True)
    for mode in MODES:
        cached = Runner(model, source_of(model, mode))(batch(), hidden=True)
        assert torch.equal(cached.rows, plain.rows) and torch.equal(cached.labels, plain.labels)
        assert torch.allclose(cached.hidden, plain.hidden, atol=1e-12)


def test_a_copy_runs_on_its_own_blocks_and_sites():
    model = model_of("llama", "l4", "late")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    inside = {id(module) for module in twin.modules()}
    assert all(id(site) in inside for site in placed(twin)) and len(placed(twin)) == 2
    assert all(id(block) in inside for block in blocks_of(twin).modules)
    assert worst(twin, "start") <= 1e-12 and worst(model, "start") <= 1e-12
    reftune.detach(twin)
    assert placed(twin) == [] and len(placed(model)) == 2


# Where passes begin


def test_a_prefill_knows_nothing_of_the_rows_around_it():
    model = model_of("llama")
    prefix = cutting.Prefix.alone(batch().input_ids[0, :12])
    alone = causal.prefill(model, prefix)
    with prompt_scope(model, torch.tensor([3, 3, 3])), reftune.mix(model, ["default"] * 3):
        inside = causal.prefill(model, prefix)
        assert all(call.rows is not None and call.rules for call in [placed(model)[0].call])
    for a, b in zip(alone.layers, inside.layers):
        assert torch.equal(a.keys, b.keys)


def test_padding_does_not_stand_behind_the_last_learned_position():
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=24,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip
    reftune.attach(model, "loreft", positions="subject_last")
    prepared = batch((20, 20))
    prepared.subject_positions = torch.tensor([18, 2])
    for mode in MODES:
        assert worst(model.double().train(), mode, prepared) <= 1e-12


def test_upper_blocks_that_read_keys_of_lower_ones_start_with_the_first():
    model = model_of("gemma4", "l4", "late")
    for mode in ("recompute", "store"):
        assert worst(model, mode, batch()) <= 1e-6  # norms are in single precision
    assert "keys and values of lower" in start_obstacle(model)


# Where it must step aside


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rows_whose_angles_depend_on_their_length_take_the_plain_path(kind):
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
        rope["original_max_position_embeddings"] = 22
    config = hf.LlamaConfig(**{**FOUR, "max_position_embeddings": 22}, rope_parameters=rope)
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config)
    reftune.attach(model, "loreft", positions="l4")
    model = model.double().train()
    assert angle_limit(model) == 22
    assert cutting.split(model, batch()) is None  # of 24 tokens
    assert worst(model, "recompute", batch((16, 12))) <= 1e-6
    assert angle_limit(llama_of()) is None


@pytest.mark.parametrize("name", ["bloom", "opt"])
def test_rates_that_are_no_dropout_modules_are_seen(name):
    model = model_of(name)
    assert obstacle(model) is None
    if name == "bloom":
        model.transformer.h[0].mlp.hidden_dropout = 0.1
        reason = "hidden_dropout = 0.1"
    else:
        model.model.decoder.layerdrop = 0.1
        reason = "layerdrop = 0.1"
    assert reason in obstacle(model)
    assert obstacle(model.eval()) is None


def test_checkpointing_that_would_lose_the_cache_is_refused(monkeypatch):
    model = model_of("llama", "l4", "late")
    assert start_obstacle(model) is None
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert start_obstacle(model) is None
    block = type(model.model.layers[0])
    monkeypatch.setattr(block, "__call__", torch.nn.Module.__call__, raising=False)
    assert "replays the hooks" in start_obstacle(model)
    other = model_of("llama", "l4", "late")
    other.model.layers[0].mlp = checkpoint_wrapper(other.model.layers[0].mlp)
    assert "checkpoint wrapper" in obstacle(other)


def test_models_that_were_compiled_are_refused():
    model = model_of("llama")
    model.model.layers[1].compile()
    assert "is compiled" in obstacle(model)


def test_trained_lora_below_is_refused():
    assert "lora_A" in obstacle(on_lora(frozen=False))


# An objective does not know


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("room", [1e9, 0])
def test_all_passes_over_the_same_prompts_share_a_prefill(monkeypatch, mode, room):
    """Preference pairs, a reference pass, samples of a group one by one, rows in another order."""
    model = model_of("llama", "last", "late")
    source, count, real = source_of(model, mode), [], causal.prefill
    if mode != "recompute":
        source.store.budget = room
    monkeypatch.setattr(causal, "prefill", lambda m, some: count.append(some) or real(m, some))
    pair = batch((20, 20, 14, 14))
    pair.input_ids[1, :20], pair.input_ids[3, :14] = pair.input_ids[0, :20], pair.input_ids[2, :14]

    def rows(*which):
        part = copy.copy(pair)
        for key in ("input_ids", "attention_mask", "labels", "prompt_lens"):
            setattr(part, key, getattr(pair, key)[list(which)])
        return part

    def objective(run):
        total = run(pair).logits.logsumexp(-1).sum()  # chosen and rejected in one batch
        total = total + run(rows(0, 2)).logits.sum() - run(rows(1, 3)).logits.sum()
        with off(model), torch.no_grad():
            total = total - run(rows(3, 1)).logits.sum()
        for sample in range(4):
            total = total + run(rows(sample)).logits.square().sum()
        return total

    plain, cached = objective(Runner(model)), objective(Runner(model, source))
    assert torch.allclose(plain, cached, rtol=1e-12)
    if mode != "start" or room:
        assert len(count) == 1 and len(count[0].keys) == 2
    else:  # outputs of block l0 belong to rows, not to prompts
        assert len(count) <= 2
    with torch.no_grad():
        objective(Runner(model, source))
    assert mode != "recompute" or len(count) == 1
