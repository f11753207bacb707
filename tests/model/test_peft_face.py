"""The PEFT face: everything PEFT and transformers offer works on it unchanged."""

from __future__ import annotations

import copy
import json
import pickle
import re
import tomllib
from pathlib import Path

import pytest
import torch
from contracts.architectures import DIM, batch, build, forward
from contracts.equations import disturb
from contracts.helpers import attached, equal, interventions, wrapped
from peft import PeftConfig, PeftModel, PeftType
from safetensors.torch import load_file, save_file

from reftune import LoreftConfig, RedConfig, ReftConfig, get_peft_model
from reftune.errors import AdapterError, PositionError
from reftune.model import face
from reftune.model.adapters import adapter_names

pytestmark = pytest.mark.quick
POSITIONS = "f2+l1"


def adapter(seed=0, **where):
    model = wrapped(build("llama"), "loreft", positions=POSITIONS, **where)
    for i, module in enumerate(interventions(model)):
        disturb(module, seed=10 * seed + i)
    return model


def add(model, name, config=None, seed=70):
    model.add_adapter(name, config or ReftConfig(LoreftConfig(rank=2), positions="l2"))
    for i, module in enumerate(interventions(model, name)):
        disturb(module, seed=seed + i)


def nothing_left(model):
    """Whether a model carries no trace of ours."""
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    traces = [k for m in model.modules() for k in vars(m) if "reftune" in k or k == "generate"]
    children = [n for n, _ in model.named_modules() if n.split(".")[-1] == "intervention"]
    return not hooks and not traces and not children and not hasattr(model, "peft_config")


@torch.no_grad()
def test_both_doors_compute_the_same():
    ids, mask = batch()
    plain = attached(build("llama"), "loreft", positions=POSITIONS)
    peft = wrapped(build("llama"), "loreft", positions=POSITIONS)
    assert torch.equal(forward(peft, ids, mask), forward(plain, ids, mask))
    assert type(peft.get_base_model()) is type(build("llama"))


def test_the_enum_member_behaves():
    assert PeftType("REFTUNE") is PeftType.REFTUNE
    assert pickle.loads(pickle.dumps(PeftType.REFTUNE)) is PeftType.REFTUNE
    assert copy.deepcopy(PeftType.REFTUNE) is PeftType.REFTUNE
    config = ReftConfig(LoreftConfig(rank=2))
    assert config.peft_type == "REFTUNE" and config.task_type == "CAUSAL_LM"
    assert pickle.loads(pickle.dumps(config)) == config


def test_the_config_round_trips(tmp_path):
    config = ReftConfig(
        LoreftConfig(rank=2, dropout=0.1), layers=[0, -1], positions="f1+l1", tied=False,
        train_positions="f2+l2", short="paper", strength=0.5,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, ReftConfig)
    assert again.to_dict() == {**config.to_dict(), "inference_mode": again.inference_mode}
    assert again.settings()[1] == LoreftConfig(rank=2, dropout=0.1)


def test_bad_configs_are_refused_at_once():
    with pytest.raises(AdapterError, match='no setting "rnak"'):
        ReftConfig({"rnak": 2})
    with pytest.raises(AdapterError, match="RedConfig is no config of loreft"):
        ReftConfig(RedConfig(), method="loreft")
    with pytest.raises(PositionError, match="is not a term"):
        ReftConfig(LoreftConfig(), positions="q5")
    with pytest.raises(AdapterError, match="not just a prefix and a suffix"):
        ReftConfig(LoreftConfig(), positions="all", tied=False)
    with pytest.raises(TypeError, match="unknown"):
        ReftConfig(LoreftConfig(), unknown=1)


def test_only_the_adapter_trains_and_is_counted():
    model = get_peft_model(build("llama"), ReftConfig(LoreftConfig(rank=4)))
    trained, total = model.get_nb_trainable_parameters()
    assert trained == 3 * (2 * 4 * DIM + 4)
    assert total == trained + sum(p.numel() for p in build("llama").parameters())


@torch.no_grad()
def test_peft_save_and_from_pretrained_are_bit_equal(tmp_path):
    model = adapter()
    ids, mask = batch()
    model.save_pretrained(tmp_path)
    for lean in (False, True):
        loaded = PeftModel.from_pretrained(build("llama"), tmp_path, low_cpu_mem_usage=lean)
        assert torch.equal(forward(loaded.eval(), ids, mask), forward(model, ids, mask))
        state = {k: v for k, v in model.state_dict().items() if "reft_" in k}
        assert len(state) == 9
        assert all(torch.equal(loaded.state_dict()[k], v) for k, v in state.items())


@torch.no_grad()
def test_base_keys_are_untouched():
    model = adapter()
    keys = {k.removeprefix("base_model.model.") for k in model.state_dict()}
    assert set(build("llama").state_dict()) < keys
    key = "model.layers.2.intervention.reft_tied.default.reft_weight"
    assert key in keys


@torch.no_grad()
def test_disable_adapter_is_bit_identical_to_the_base():
    model = adapter()
    ids, mask = batch()
    on = forward(model, ids, mask)
    with model.disable_adapter():
        assert torch.equal(forward(model, ids, mask), forward(build("llama"), ids, mask))
    assert torch.equal(forward(model, ids, mask), on)


@torch.no_grad()
def test_a_second_adapter_is_added_switched_and_deleted():
    model = adapter()
    ids, mask = batch()
    first = forward(model, ids, mask)
    add(model, "second", ReftConfig(RedConfig(), positions="l1", layers="0"))
    assert torch.equal(forward(model, ids, mask), first), "adding does not activate"
    model.set_adapter("second")
    second = forward(model, ids, mask)
    assert not torch.equal(second, first)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".second." in n for n in trained)
    model.base_model.set_adapter(["default", "second"])
    both = forward(model, ids, mask)
    assert not torch.equal(both, first) and not torch.equal(both, second)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(forward(model, ids, mask), first)
    assert adapter_names(model) == ["default"] and list(model.peft_config) == ["default"]
    assert not any(".second." in n for n, _ in model.named_parameters())


@torch.no_grad()
def test_deleting_the_last_adapter_leaves_nothing():
    model = adapter()
    ids, mask = batch()
    model.delete_adapter("default")
    base = model.base_model.model
    assert adapter_names(model) == [] and "generate" not in vars(base)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert torch.equal(forward(base, ids, mask), forward(build("llama"), ids, mask))


@torch.no_grad()
def test_unload_returns_the_base_as_it_was():
    ids, mask = batch()
    original = build("llama")
    keys = list(original.state_dict())
    model = get_peft_model(original, ReftConfig(LoreftConfig(rank=2), positions=POSITIONS))
    add(model, "second")
    base = model.unload()
    assert base is original and nothing_left(base)
    assert list(base.state_dict()) == keys
    assert torch.equal(forward(base, ids, mask), forward(build("llama"), ids, mask))
    again = get_peft_model(base, ReftConfig(LoreftConfig(rank=2)))
    assert adapter_names(again) == ["default"]


def test_a_failed_injection_leaves_nothing():
    base = build("llama")
    with pytest.raises(AdapterError, match="rank 64 is larger than the width 32"):
        get_peft_model(base, ReftConfig(LoreftConfig(rank=64)))
    assert not [n for n, _ in base.named_modules() if "intervention" in n]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert "generate" not in vars(base)


@torch.no_grad()
def test_an_adapter_named_like_a_parameter_loses_nothing(tmp_path):
    """A second adapter whose name ends keys of the first one must not hide them when saving."""
    model = adapter()
    for name in ("bias", "weight", "tied", "rotation", "reft"):
        add(model, name)
    with pytest.raises(AdapterError, match="cannot name an adapter"):
        model.add_adapter("reft_bias", ReftConfig(LoreftConfig(rank=2)))
    with pytest.raises(AdapterError, match="also the name of a module"):
        model.add_adapter("layers", ReftConfig(LoreftConfig(rank=2)))
    model.peft_config.pop("reft_bias", None), model.peft_config.pop("layers", None)
    ids, mask = batch()
    for name in ("default", "bias", "weight", "tied", "rotation", "reft"):
        model.set_adapter(name)
        wanted = forward(model, ids, mask)
        model.save_pretrained(tmp_path, selected_adapters=[name])
        folder = tmp_path if name == "default" else tmp_path / name
        loaded = PeftModel.from_pretrained(build("llama"), folder).eval()
        assert torch.equal(forward(loaded, ids, mask), wanted), name


@torch.no_grad()
def test_loading_a_second_adapter_beside_the_first(tmp_path):
    other = adapter(seed=4)
    other.save_pretrained(tmp_path)
    model = adapter()
    ids, mask = batch()
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    assert torch.equal(forward(model.eval(), ids, mask), forward(other, ids, mask))


@torch.no_grad()
def test_transformers_own_adapter_methods(tmp_path):
    adapter(seed=4).save_pretrained(tmp_path)
    ids, mask = batch()
    wanted = forward(adapter(seed=4), ids, mask)
    model = build("llama")
    model.load_adapter(str(tmp_path))
    assert equal(forward(model.eval(), ids, mask), wanted, 1e-6)
    model.disable_adapters()
    assert torch.equal(forward(model, ids, mask), forward(build("llama"), ids, mask))
    model.enable_adapters()
    assert equal(forward(model, ids, mask), wanted, 1e-6)
    assert model.active_adapters() == ["default"]
    out = model.generate(ids[:1], max_new_tokens=2, do_sample=False)
    assert out.shape == (1, ids.shape[1] + 2)
    model.delete_adapter("default")
    assert torch.equal(forward(model, ids, mask), forward(build("llama"), ids, mask))


def test_add_adapter_of_transformers():
    model = build("llama")
    model.add_adapter(ReftConfig(LoreftConfig(rank=2), positions="l1"))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".intervention.reft_" in n for n in trained)


@torch.no_grad()
def test_hidden_states_show_the_edited_stream_even_if_captured_before():
    ids, mask = batch()
    before = build("llama")
    before(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    results = []
    for base in (before, build("llama")):
        model = wrapped(base, "loreft", positions="l1", layers="1")
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        results.append(states)
        plain = build("llama")(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        different = [(a != b).any().item() for a, b in zip(states, plain.hidden_states)]
        assert different == [False, False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(*results))


@torch.no_grad()
def test_copies_and_torch_save_keep_working(tmp_path):
    model = adapter()
    ids, mask = batch()
    wanted = forward(model, ids, mask)
    twin = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (twin, loaded):
        assert torch.equal(forward(other, ids, mask), wanted)
        base = other.get_base_model()
        assert base.generate.model is base
        other.unload()
        assert nothing_left(base)
    assert torch.equal(forward(model, ids, mask), wanted)


def test_untyped_models_open_the_scope_too():
    """PEFT without a task type calls the base model's generate directly."""
    ids, mask = batch("left")
    kwargs = {"attention_mask": mask, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    typed = wrapped(build("llama"), "loreft", positions="l1+generated:1")
    untyped = wrapped(build("llama"), "loreft", positions="l1+generated:1", task_type=None)
    assert type(untyped) is PeftModel
    a = typed.generate(input_ids=ids, **kwargs)
    assert torch.equal(a, untyped.generate(input_ids=ids, **kwargs))


def test_model_status_is_known_to_peft():
    model = adapter()
    status = model.get_model_status()
    assert status.peft_types == {"default": "REFTUNE"} and status.enabled is True
    assert status.num_adapter_layers == 3 and status.trainable_params > 0


def test_a_ready_made_config_file_may_lack_what_has_a_default(tmp_path):
    model = adapter()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text())
    for key in ("strength", "short", "stack", "blocks", "stacked_on", "bias"):
        values.pop(key)
    values["a_key_of_a_later_version"] = 1
    file.write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="a_key_of_a_later_version"):
        loaded = PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    ids, mask = batch()
    assert torch.equal(forward(loaded, ids, mask), forward(model, ids, mask))


# Sequence classification


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_the_classification_head_trains_and_is_saved(name, tmp_path):
    from reftune.model.checkpoint import load_adapter, save_adapter

    model = get_peft_model(
        build(name), ReftConfig(LoreftConfig(rank=1), positions="f1", task_type="SEQ_CLS")
    )
    heads = [n for n, p in model.named_parameters() if p.requires_grad and "intervention" not in n]
    assert heads and all("modules_to_save" in n for n in heads)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
    ids, mask = batch()
    wanted = forward(model.eval(), ids, mask)
    assert not torch.equal(wanted, forward(build(name), ids, mask))
    for folder in (save_adapter(model, tmp_path / "ours"), tmp_path / "peft"):
        if folder.name == "peft":
            model.save_pretrained(folder)
        loaded, _ = load_adapter(folder, model=build(name))
        assert torch.equal(forward(loaded, ids, mask), wanted)
    model.train()(
        input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1, 2])
    ).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_peft_loads_no_adapter_with_weights_missing_or_left_over(tmp_path):
    """PEFT itself would warn, and leave untrained weights in their place."""
    adapter().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("reft_bias"))
    fewer = {k: v for k, v in tensors.items() if k != key}
    renamed = {k.replace("reft_bias", "bias"): v for k, v in tensors.items()}
    for saved, message in ((fewer, "1 missing, 0 without"), (renamed, "3 missing, 3 without")):
        save_file(saved, file)
        with pytest.raises(AdapterError, match=message):
            PeftModel.from_pretrained(build("llama"), tmp_path)
        model = wrapped(build("llama"), "loreft", name="other", positions=POSITIONS)
        with pytest.raises(AdapterError, match=message):
            model.load_adapter(tmp_path, adapter_name="second")


def test_a_peft_that_would_load_untrained_weights_is_refused():
    for old in ("0.19.1", "0.20.0", "0.20.1.dev0"):
        with pytest.raises(AdapterError, match=f"PEFT {old} is installed.*0.21 or newer.*-U 'peft"):
            face._check_peft(old)
    for new in ("0.21.0", "0.21.0.dev0", "1.0"):
        face._check_peft(new)
    file = Path(__file__).parents[2] / "pyproject.toml"
    needs = tomllib.loads(file.read_text("utf-8"))["project"]["dependencies"]
    bound = next(re.fullmatch(r"peft>=([\d.]+)", need) for need in needs if "peft" in need)
    # The package may ask for more than what keeps weights safe, never for less.
    assert tuple(map(int, bound[1].split("."))) >= face.OLDEST_PEFT
