"""LoRA and ReFT together: nested, saved as a stack of two PEFT artefacts."""

from __future__ import annotations

import json

import pytest
import torch
from contracts.architectures import batch, build, forward
from contracts.equations import disturb
from contracts.helpers import equal, interventions
from peft import LoraConfig

from reftune import LoreftConfig, RedConfig, ReftConfig, get_peft_model
from reftune.errors import AdapterError
from reftune.model.adapters import adapter_names, sites

pytestmark = pytest.mark.quick
POSITIONS = "f2+l1"


def stack(reft=None):
    lora = get_peft_model(
        build("llama"), LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for i, (n, p) in enumerate(sorted(lora.named_parameters())):
            if "lora_B" in n:
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    config = reft or ReftConfig(LoreftConfig(rank=2), positions=POSITIONS)
    model = get_peft_model(lora, config).eval()
    for i, module in enumerate(interventions(model)):
        disturb(module, seed=i)
    return lora, model


@torch.no_grad()
def test_a_stack_saves_and_loads(tmp_path):
    from reftune.model.artefact import describe
    from reftune.model.checkpoint import load_adapter, save_adapter

    _, model = stack()
    ids, mask = batch()
    wanted = forward(model, ids, mask)
    folder = save_adapter(model, tmp_path / "stack", {"accuracy": 0.5})
    assert json.loads((folder / "stack.json").read_text())["order"] == [
        {"folder": "lora", "kind": "lora", "name": "default"},
        {"folder": "reft", "kind": "reft", "name": "default"},
    ]
    for part, prefix in (("lora", "lora_"), ("reft", "reft_")):
        from safetensors.torch import load_file

        tensors = load_file(folder / part / "adapter_model.safetensors")
        assert tensors and all(prefix in key for key in tensors)
    loaded, _ = load_adapter(folder, model=build("llama"))
    assert torch.equal(forward(loaded, ids, mask), wanted)
    assert describe(folder)["kind"] == "stack" and describe(folder)["order"] == ["lora", "reft"]
    assert "| accuracy | 0.5 |" in (folder / "README.md").read_text()
    again = save_adapter(loaded, tmp_path / "again")
    twice, _ = load_adapter(again, model=build("llama"))
    assert torch.equal(forward(twice, ids, mask), wanted)


@torch.no_grad()
def test_the_upper_level_of_a_stack_needs_the_lower_one(tmp_path):
    from reftune.model.checkpoint import load_adapter, save_adapter

    _, model = stack()
    folder = save_adapter(model, tmp_path / "stack")
    base = build("llama")
    with pytest.raises(AdapterError, match='on top of a "lora" adapter, which is not on the model'):
        load_adapter(folder / "reft", model=base)
    assert adapter_names(base) == []
    lora, _ = load_adapter(folder / "lora", model=build("llama"))
    ids, mask = batch()
    loaded, _ = load_adapter(folder / "reft", model=lora)
    assert torch.equal(forward(loaded, ids, mask), forward(model, ids, mask))


def test_a_stack_switches_off_trains_and_unloads():
    from reftune import off

    lora, model = stack()
    ids, mask = batch()
    base = forward(build("llama"), ids, mask)
    with torch.no_grad():
        with model.disable_adapter():
            assert torch.equal(forward(model, ids, mask), base)
        with off(model):
            assert torch.equal(forward(model, ids, mask), base)
    kinds = {
        n.split(".")[-3 if "lora" in n else -1]
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    assert any("lora" in k for k in kinds) and any("reft" in k for k in kinds)
    model.train()(
        input_ids=ids, attention_mask=mask, labels=ids, prompt_lens=mask.sum(1) - 1
    ).loss.backward()
    assert all(
        p.grad is not None for n, p in model.named_parameters() if "lora_A" in n or "reft" in n
    )
    ids, mask = batch("left")
    out = model.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=2)
    assert out.shape[1] <= ids.shape[1] + 2
    below = model.unload()
    assert below is lora and adapter_names(lora) == []
    assert list(lora.peft_config) == ["default"]
    with torch.no_grad():
        assert torch.isfinite(forward(lora, ids, mask)).all()


@torch.no_grad()
def test_sites_of_a_stack_may_be_modules_lora_wraps():
    _, model = stack(ReftConfig(RedConfig(), site="self_attn.q_proj", positions="all"))
    ids, mask = batch()
    on = forward(model, ids, mask)
    for site in sites(model):
        assert not site.outer
    with pytest.raises(AdapterError, match="the module carries a LoRA"):
        model.merge_and_unload()
    assert torch.equal(forward(model, ids, mask), on)


# Stacks of one kind


def two_refts():
    """Return two ReFT adapters on one model, the second trained on top of the first."""
    below = get_peft_model(build("llama"), ReftConfig(LoreftConfig(rank=2), positions="l1"))
    for i, module in enumerate(interventions(below)):
        disturb(module, seed=i)
    alone = forward(below.eval(), *batch()).detach()
    config = ReftConfig(RedConfig(), positions="f2")
    model = get_peft_model(below, config, adapter_name="upper").eval()
    assert equal(forward(model, *batch()), alone, 1e-6), "the lower one goes on acting"
    for i, module in enumerate(interventions(model, "upper")):
        disturb(module, seed=20 + i)
    return model, alone


@torch.no_grad()
def test_a_stack_of_two_adapters_of_one_kind_keeps_both(tmp_path):
    from reftune.model.artefact import describe
    from reftune.model.checkpoint import load_adapter, save_adapter

    model, alone = two_refts()
    wanted = forward(model, *batch())
    assert not torch.equal(wanted, alone)
    folder = save_adapter(model, tmp_path / "stack")
    assert describe(folder)["order"] == ["reft", "reft-2"]
    loaded, _ = load_adapter(folder, model=build("llama"))
    assert torch.equal(forward(loaded, *batch()), wanted)
    again, _ = load_adapter(save_adapter(loaded, tmp_path / "again"), model=build("llama"))
    assert torch.equal(forward(again, *batch()), wanted)
    with pytest.raises(AdapterError, match='on top of a "reft" adapter'):
        load_adapter(folder / "reft-2", model=build("llama"))


@torch.no_grad()
def test_a_stack_of_two_loras_keeps_both(tmp_path):
    from reftune.config.recipe import AdapterSpec
    from reftune.model.artefact import describe
    from reftune.model.build import apply_adapter
    from reftune.model.checkpoint import load_adapter, save_adapter

    model = build("llama")
    for name, targets in (("first", ["q_proj"]), ("second", ["q_proj", "v_proj"])):
        spec = AdapterSpec(method="lora", name=name, options={"rank": 2, "targets": targets})
        model = apply_adapter(model, spec, 0).eval()
        for i, (key, p) in enumerate(sorted(model.named_parameters())):
            if f"lora_B.{name}" in key:
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    trained = [key for key, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".second." in key for key in trained)
    wanted = forward(model, *batch())
    folder = save_adapter(model, tmp_path / "stack")
    assert describe(folder)["order"] == ["lora", "lora-2"]
    loaded, _ = load_adapter(folder, model=build("llama"))
    assert torch.equal(forward(loaded, *batch()), wanted)
    with pytest.raises(AdapterError, match='The adapter "second" exists already'):
        apply_adapter(model, spec, 0)


@torch.no_grad()
def test_stacks_that_list_folders_alone_still_load(tmp_path):
    from reftune.model.checkpoint import load_adapter, save_adapter

    _, model = stack()
    folder = save_adapter(model, tmp_path / "stack")
    (folder / "stack.json").write_text(json.dumps({"order": ["lora", "reft"], "base": None}))
    loaded, _ = load_adapter(folder, model=build("llama"))
    assert torch.equal(forward(loaded, *batch()), forward(model, *batch()))
    (folder / "stack.json").write_text(json.dumps({"order": [{"folder": "../stack/lora"}]}))
    with pytest.raises(AdapterError, match=r"The stack .* lacks"):
        load_adapter(folder, model=build("llama"))
