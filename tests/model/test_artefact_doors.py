"""What `save` writes of attached adapters, and of models on which several are active."""

from __future__ import annotations

import json

import pytest
import torch
from contracts.architectures import batch, build, forward
from contracts.equations import disturb
from contracts.helpers import attached, interventions, wrapped
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from reftune import LoreftConfig, RedConfig, ReftConfig, attach, get_peft_model, set_strength, use
from reftune.errors import AdapterError
from reftune.model.artefact import describe
from reftune.model.checkpoint import load_adapter, save_adapter

pytestmark = pytest.mark.quick
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def same(folder, name, wanted):
    """Whether an artefact gives these logits, loaded by us and by PEFT."""
    loaded, _ = load_adapter(folder, model=build(name))
    by_peft = PeftModel.from_pretrained(build(name), folder).eval()
    return all(torch.equal(forward(m, *batch()), wanted) for m in (loaded, by_peft))


# The plain door


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "t5", "bert", "deberta_v2"])
def test_an_attached_adapter_is_saved_as_a_peft_artefact(name, tmp_path):
    where = {"positions": "f2+l1", "train_positions": "f1+l1", "tied": False, "layers": [0, -1]}
    model = attached(build(name), "loreft", **where)
    set_strength(model, "default", 0.5)
    wanted = forward(model, *batch())
    folder = save_adapter(model, tmp_path / "adapter")
    assert sorted(f.name for f in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    tensors = load_file(folder / WEIGHTS)
    ours = [key for key in tensors if ".intervention.reft_" in key]
    assert len(ours) == 2 * 2 * 3 and len(tensors) - len(ours) == (2 if name == "bert" else 0)
    config = json.loads((folder / CONFIG).read_text())
    assert config["layers"] == [0, -1] and config["tied"] is False and config["strength"] == 0.5
    assert config["train_positions"] == "f1+l1" and config["base_dim"] == 32
    assert same(folder, name, wanted)


@torch.no_grad()
def test_both_doors_write_the_same(tmp_path):
    for model, folder in (
        (attached(build("llama"), "red", positions="all", site="mlp.up_proj"), "plain"),
        (wrapped(build("llama"), "red", positions="all", site="mlp.up_proj"), "peft"),
    ):
        save_adapter(model, tmp_path / folder)
    a, b = (load_file(tmp_path / folder / WEIGHTS) for folder in ("plain", "peft"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    a, b = (json.loads((tmp_path / folder / CONFIG).read_text()) for folder in ("plain", "peft"))
    assert a == b


@torch.no_grad()
def test_of_several_attached_adapters_the_active_one_is_saved(tmp_path):
    model = build("llama")
    for name, rule in (("a", "l1"), ("b", "f2")):
        attached(model, "loreft", name, positions=rule)
    use(model, "a")
    wanted = forward(model, *batch())
    assert same(save_adapter(model, tmp_path / "one"), "llama", wanted)
    use(model, ["a", "b"])
    with pytest.raises(AdapterError, match=r'"a", "b" are active together.*name="a"'):
        save_adapter(model, tmp_path / "two")
    assert not (tmp_path / "two").exists()
    assert same(save_adapter(model, tmp_path / "two", name="a"), "llama", wanted)
    use(model, [])
    with pytest.raises(AdapterError, match=r'None of the adapters "a", "b" is active'):
        save_adapter(model, tmp_path / "none")
    with pytest.raises(AdapterError, match=r'no adapter "c" on this model.*Known: a, b'):
        save_adapter(model, tmp_path / "none", name="c")


def test_an_attached_adapter_with_trained_base_weights_is_refused(tmp_path):
    model = attached(build("llama"), "loreft", positions="l1")
    model.lm_head.requires_grad_(True)
    with pytest.raises(AdapterError, match=r'"default" cannot be saved alone: lm_head.weight'):
        save_adapter(model, tmp_path / "adapter")


@torch.no_grad()
def test_an_adapter_attached_on_top_of_a_lora_is_part_of_a_stack(tmp_path):
    lora = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], r=2))
    for key, p in sorted(lora.named_parameters()):
        if "lora_B" in key:
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(key))))
    attach(lora, LoreftConfig(rank=2), name="top", positions="l1")
    for i, module in enumerate(interventions(lora, "top")):
        disturb(module, seed=i)
    wanted = forward(lora.eval(), *batch())
    folder = save_adapter(lora, tmp_path / "stack")
    assert describe(folder)["order"] == ["lora", "reft"]
    loaded, _ = load_adapter(folder, model=build("llama"))
    assert torch.equal(forward(loaded, *batch()), wanted)


@torch.no_grad()
def test_an_adapter_added_by_transformers_is_saved(tmp_path):
    model = build("llama")
    model.add_adapter(ReftConfig(LoreftConfig(rank=2), positions="l1"))
    for i, module in enumerate(interventions(model)):
        disturb(module, seed=i)
    wanted = forward(model.eval(), *batch())
    assert same(save_adapter(model, tmp_path / "adapter"), "llama", wanted)


# PEFT's door


@torch.no_grad()
def test_of_several_active_adapters_one_must_be_named(tmp_path):
    model = wrapped(build("llama"), "loreft", positions="f2")
    model.add_adapter("second", ReftConfig(RedConfig(), positions="l1"))
    for i, module in enumerate(interventions(model, "second")):
        disturb(module, seed=i)
    model.set_adapter("second")
    wanted = forward(model, *batch())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(AdapterError, match=r'"default", "second" are active together.*name='):
        save_adapter(model, tmp_path / "adapter")
    folder = save_adapter(model, tmp_path / "adapter", name="second")
    assert describe(folder)["method"] == "red"
    assert same(folder, "llama", wanted)
    with pytest.raises(AdapterError, match='no adapter "third" on this model'):
        save_adapter(model, tmp_path / "adapter", name="third")


@torch.no_grad()
def test_a_name_is_looked_for_from_above(tmp_path):
    lora = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], r=2))
    model = get_peft_model(lora, ReftConfig(LoreftConfig(rank=2), positions="l1")).eval()
    model.add_adapter("other", ReftConfig(RedConfig(), positions="l1"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(AdapterError, match='"default", "other" are active together'):
        save_adapter(model, tmp_path / "stack")
    for name, method in (("other", "red"), ("default", "loreft")):
        folder = save_adapter(model, tmp_path / "stack", name=name)
        assert describe(folder)["order"] == ["lora", "reft"]
        assert describe(folder / "reft")["method"] == method


def test_a_model_whose_adapters_were_deleted_is_saved_whole(tmp_path):
    model = wrapped(build("llama"), "loreft", positions="f2")
    model.delete_adapter("default")
    folder = save_adapter(model, tmp_path / "model")
    assert describe(folder)["kind"] == "model"
    assert load_file(folder / "model.safetensors").keys() <= build("llama").state_dict().keys()


# Task types


@pytest.mark.parametrize(
    ("name", "task"),
    [("bert", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM"), ("deberta_v2", None), ("llama", "CAUSAL_LM")],
)
def test_the_task_type_left_open_is_that_of_the_model(name, task):
    config = ReftConfig(LoreftConfig(rank=2), positions="f1")
    model = get_peft_model(build(name), config)
    assert model.peft_config["default"].task_type == task
    assert config.task_type == "CAUSAL_LM", "the config stays usable for other models"
    trained = [key for key, p in model.named_parameters() if p.requires_grad]
    assert any("modules_to_save" in key for key in trained) == (task == "SEQ_CLS")


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_recipes_name_stack_blocks_and_strength(stack):
    from reftune.config.recipe import AdapterSpec
    from reftune.model.adapters import sites
    from reftune.model.build import apply_adapter

    spec = AdapterSpec(stack=stack, blocks=f"{stack}.block", strength=0.25, positions="l1")
    model = apply_adapter(build("t5"), spec, 0)
    found = sites(model)
    assert len(found) == 2 and all(site.call.is_encoder == (stack == "encoder") for site in found)
    assert all(site.strength == {"default": 0.25} for site in found)
    with pytest.raises(AdapterError, match="lora has no strength"):
        apply_adapter(build("t5"), AdapterSpec(method="lora", strength=0.5), 0)
