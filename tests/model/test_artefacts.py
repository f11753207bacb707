"""Saved adapters: complete, atomic, checked when they are loaded."""

from __future__ import annotations

import json
import os
import stat

import pytest
import torch
from contracts.architectures import GATED, batch, build, forward, llama
from contracts.helpers import wrapped
from safetensors.torch import load_file, save_file
from tiny import tiny_folder, tiny_tokenizer

from reftune import LoreftConfig, ReftConfig, get_peft_model
from reftune.errors import AdapterError, ReftuneError
from reftune.model.adapters import adapter_names
from reftune.model.artefact import adapter_bytes, describe
from reftune.model.build import apply_adapter, load_base, trainable_summary
from reftune.model.checkpoint import load_adapter, save_adapter

pytestmark = pytest.mark.quick
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def saved(tmp_path):
    """Return an adapter's folder and the logits it must give."""
    model = wrapped(build("llama"), "loreft", positions="f2+l1")
    with torch.no_grad():
        wanted = forward(model, *batch())
    return save_adapter(model, tmp_path / "adapter", {"accuracy": "0.51"}), wanted


def change(folder, **values):
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_the_folder_is_a_peft_adapter_with_a_card(saved):
    folder, _ = saved
    assert sorted(os.listdir(folder)) == ["README.md", CONFIG, WEIGHTS]
    tensors = load_file(folder / WEIGHTS)
    assert len(tensors) == 9 and all(t.dtype == torch.float32 for t in tensors.values())
    assert "base_model.model.model.layers.0.intervention.reft_tied.reft_bias" in tensors
    config = json.loads((folder / CONFIG).read_text())
    assert config["peft_type"] == "REFTUNE" and config["inference_mode"] is True
    assert config["base_dim"] == 32 and config["base_layers"] == 3
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card and "| accuracy | 0.51 |" in card
    assert "reftune.load(" in card and "import reftune.peft" in card
    assert adapter_bytes(folder) == (folder / WEIGHTS).stat().st_size
    facts = describe(folder)
    assert facts["kind"] == "reftune" and facts["method"] == "loreft"
    assert facts["positions"] == "f2+l1" and facts["intervention"]["rank"] == 3


def test_folders_are_readable_by_others(saved):
    folder, _ = saved
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask


def test_a_run_folder_stands_for_its_adapter(saved):
    folder, wanted = saved
    loaded, _ = load_adapter(folder.parent, model=build("llama"))
    assert torch.equal(forward(loaded, *batch()), wanted)


# An interrupted save


@pytest.mark.parametrize("where", ["write", "replace", "interrupt"])
def test_an_interrupted_save_leaves_the_old_adapter(saved, monkeypatch, where):
    from reftune.model import checkpoint

    folder, wanted = saved
    rename, failed = os.replace, []

    def broken(*args, **kwargs):
        raise KeyboardInterrupt if where == "interrupt" else OSError("No space left on device")

    def replace(source, target):
        if str(target) == str(folder) and not failed:
            failed.append(1)
            raise OSError("No space left on device")
        return rename(source, target)

    if where == "replace":
        monkeypatch.setattr(checkpoint.os, "replace", replace)
    else:
        monkeypatch.setattr(checkpoint, "_write_part", broken)
    with pytest.raises((OSError, KeyboardInterrupt)):
        save_adapter(wrapped(build("llama"), "red", positions="all"), folder)
    monkeypatch.undo()
    loaded, _ = load_adapter(folder, model=build("llama"))
    assert torch.equal(forward(loaded, *batch()), wanted)
    assert os.listdir(folder.parent) == ["adapter"]


def test_saving_again_replaces_the_whole_folder(saved):
    folder, _ = saved
    (folder / "stale.txt").write_text("old")
    model = wrapped(build("llama"), "red", positions="all")
    save_adapter(model, folder)
    assert not (folder / "stale.txt").exists()
    assert describe(folder)["method"] == "red"
    assert os.listdir(folder.parent) == ["adapter"]


# Damaged, foreign and unfitting folders


def refused(folder, message, model=None):
    model = build("llama") if model is None else model
    before = forward(model, *batch())
    with pytest.raises(ReftuneError, match=message):
        load_adapter(folder, model=model)
    assert adapter_names(model) == [], "nothing stays on the model"
    assert torch.equal(forward(model, *batch()), before)


def test_damaged_weights(saved):
    folder, _ = saved
    data = (folder / WEIGHTS).read_bytes()
    for broken in (data[: len(data) // 2], b"not a tensor", b""):
        (folder / WEIGHTS).write_bytes(broken)
        refused(folder, r"The weights in .* cannot be read")
    (folder / WEIGHTS).unlink()
    refused(folder, r"The weights in .* cannot be read")


def test_damaged_config(saved):
    folder, _ = saved
    text = (folder / CONFIG).read_text()
    for broken in (text[: len(text) // 2], "", "[1, 2]", "\x00"):
        (folder / CONFIG).write_text(broken)
        refused(folder, "cannot be read|holds no settings")


def test_missing_and_surplus_tensors(saved):
    folder, _ = saved
    tensors = load_file(folder / WEIGHTS)
    key = next(k for k in tensors if k.endswith("reft_bias"))
    fewer = {k: v for k, v in tensors.items() if k != key}
    save_file(fewer, folder / WEIGHTS)
    refused(folder, "do not match the adapter: 1 missing, 0 without a place .first: .*reft_bias")
    save_file(
        {**tensors, key.replace("layers.0", "layers.7"): tensors[key].clone()}, folder / WEIGHTS
    )
    refused(folder, "0 missing, 1 without a place")


def test_tensors_of_another_shape(saved):
    folder, _ = saved
    change(folder, intervention={"rank": 2})
    refused(folder, "does not fit the model|do not match")


def test_what_does_not_fit_is_said(tmp_path):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    folder = save_adapter(get_peft_model(build("llama"), lora), tmp_path / "lora")
    change(folder, r=8)
    refused(folder, r"does not fit the model: .*size mismatch for .*lora_A")


def test_settings_of_a_method_nobody_has(saved):
    folder, _ = saved
    change(folder, method="from_the_future")
    refused(folder, 'no intervention "from_the_future"')


def test_foreign_folders(saved, tmp_path):
    folder, _ = saved
    change(folder, peft_type="SOMETHING_NEW")
    refused(folder, '"SOMETHING_NEW" adapter, which this PEFT does not know.*REFTUNE')
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "is not an adapter: there is no adapter_config.json")
    refused(tmp_path / "nowhere", "There is no adapter folder")
    refused("./no/such/folder", "There is no adapter folder")
    (empty / "stack.json").write_text('{"order": []}')
    refused(empty, "names no adapters")
    (empty / "stack.json").write_text('{"order": ["lora", "reft"]}')
    refused(empty, "lacks lora/")


@pytest.mark.parametrize("version", [None, "adapters.1.3.0"])
def test_folders_of_the_adapters_library_are_refused_by_name(tmp_path, version):
    config = {"config": {"r": 4}, "model_class": "LlamaForCausalLM", "name": "task"}
    config |= {"version": version} if version else {}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_adapter.bin").write_bytes(b"")
    refused(tmp_path, 'holds the adapter "task" of the adapters library')
    with pytest.raises(AdapterError, match="of the adapters library"):
        describe(tmp_path)


def test_a_wrong_base_model_is_named(saved):
    folder, _ = saved
    refused(folder, r"width 32 \(this model has 16\)", llama(hidden_size=16))
    refused(folder, r"3 blocks \(this model has 2\)", llama(num_hidden_layers=2))
    other = llama(num_hidden_layers=5, hidden_size=48)
    refused(folder, "width 32 .* and 3 blocks", other)


# Adapters find their base model


def test_an_adapter_loads_its_base_by_name(tmp_path):
    base = tiny_folder(tmp_path / "base")
    model, tokenizer = load_base(str(base))
    from reftune.config.recipe import AdapterSpec

    adapted = apply_adapter(model, AdapterSpec(options={"rank": 2}, positions="l2"), 0)
    folder = save_adapter(adapted, tmp_path / "adapter")
    assert describe(folder)["base"] == str(base)
    loaded, found = load_adapter(folder)
    ids = torch.tensor([found("1+1=").input_ids])
    with torch.no_grad():
        assert torch.equal(forward(loaded, ids), forward(adapted.eval(), ids))
    assert found.get_vocab() == tokenizer.get_vocab()
    base.rename(tmp_path / "moved")
    with pytest.raises(AdapterError, match=r"base model of .* is not available.*does not exist"):
        load_adapter(folder)


def test_a_classifier_finds_base_and_classes_by_itself(tmp_path):
    base = tiny_folder(tmp_path / "base")
    model, _ = load_base(str(base), num_labels=5)
    config = ReftConfig(LoreftConfig(rank=2), positions="l1", task_type="SEQ_CLS")
    adapted = get_peft_model(model, config).eval()
    folder = save_adapter(adapted, tmp_path / "adapter")
    loaded, _ = load_adapter(folder)
    ids, mask = batch()
    with torch.no_grad():
        wanted = forward(adapted, ids, mask)
        assert wanted.shape == (3, 5)
        assert torch.equal(forward(loaded, ids, mask), wanted)


def test_a_whole_model_saves_and_loads(tmp_path):
    from reftune.config.recipe import AdapterSpec

    base = tiny_folder(tmp_path / "base")
    model, tokenizer = load_base(str(base))
    full = apply_adapter(model, AdapterSpec(method="full"), 0)
    assert trainable_summary(full).fraction == 1.0
    with torch.no_grad():
        full.lm_head.weight.add_(1.0)
    folder = save_adapter(full, tmp_path / "model")
    tokenizer.save_pretrained(folder)
    loaded, found = load_adapter(folder)
    ids, mask = batch()
    with torch.no_grad():
        assert torch.equal(forward(loaded, ids, mask), forward(full, ids, mask))
    assert found is not None and describe(folder)["kind"] == "model"


def test_loading_for_training(saved):
    folder, _ = saved
    loaded, _ = load_adapter(folder, model=build("llama"), trainable=True)
    trained = [n for n, p in loaded.named_parameters() if p.requires_grad]
    assert len(trained) == 9 and all("intervention" in n for n in trained)


# Recipes to models


def test_base_model_errors(tmp_path):
    from reftune.config.recipe import ModelSpec
    from reftune.errors import ModelError

    with pytest.raises(ModelError, match=r"model folder .* does not exist"):
        load_base("./no/such/model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="could not be loaded"):
        load_base(str(tmp_path / "empty"))
    broken = tiny_folder(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_base(str(broken))
    with pytest.raises(ModelError, match="could not be loaded"):
        load_base("nobody/such-a-model-does-not-exist")
    folder = tiny_folder(tmp_path / "fine")
    assert load_base(ModelSpec(str(folder), dtype="bfloat16"))[0].dtype == torch.bfloat16
    (folder / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_base(str(folder))


def test_recipes_apply_lora_full_and_head():
    from reftune.config.recipe import AdapterSpec

    lora = apply_adapter(build("llama"), AdapterSpec(method="lora", options={"rank": 2}), 0)
    trained = trainable_summary(lora).trainable
    assert trained == 3 * 2 * (2 * 32 + 32 + 16)
    late = AdapterSpec(method="lora", layers="-1", options={"rank": 2})
    assert trainable_summary(apply_adapter(build("llama"), late, 0)).trainable == trained // 3
    gpt2 = apply_adapter(build("gpt2"), AdapterSpec(method="lora", options={"rank": 2}), 0)
    assert trainable_summary(gpt2).trainable > 0
    head = apply_adapter(build("bert"), AdapterSpec(method="head_only"), 0)
    assert trainable_summary(head).trainable == 3 * 32 + 3
    with pytest.raises(AdapterError, match=r'lora has no setting "rnak".*Did you mean "rank"'):
        apply_adapter(build("llama"), AdapterSpec(method="lora", options={"rnak": 2}), 0)
    spec = AdapterSpec(method="lora", options={"targets": ["nothing"]})
    with pytest.raises(AdapterError, match=r"lora: .*Name the modules with targets"):
        apply_adapter(build("llama"), spec, 0)


def test_the_seed_decides_the_initialisation():
    from reftune.config.recipe import AdapterSpec

    spec = AdapterSpec(options={"rank": 2})
    a, b, c = (apply_adapter(build("llama"), spec, seed).state_dict() for seed in (1, 1, 2))
    key = next(k for k in a if k.endswith("reft_weight"))
    assert torch.equal(a[key], b[key]) and not torch.equal(a[key], c[key])
    assert GATED["hidden_size"] == 32 and tiny_tokenizer().pad_token_id == 0
