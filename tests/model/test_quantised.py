"""Bases quantised by bitsandbytes and torchao: they train, serve and are not merged into.

Whatever library is not installed, or has no kernel for this machine, is skipped with the reason.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
import re

import pytest
import torch
from contracts.architectures import batch, forward
from contracts.helpers import equal, interventions
from safetensors.torch import load_file
from tiny import tiny_folder
from torch import nn

from reftune import ReftConfig, attach, get_peft_model, off
from reftune.config.loader import loads
from reftune.config.recipe import AdapterSpec, ModelSpec
from reftune.errors import AdapterError, ModelError, RecipeError
from reftune.model import quantised
from reftune.model.build import apply_adapter, load_base, trainable_summary
from reftune.model.checkpoint import load_adapter, save_adapter
from reftune.model.doctor import self_check
from reftune.model.merge import merge_adapter

pytestmark = pytest.mark.quick
BITS = {"int8": 8, "int4": 4, "torchao_int8": 8}
LOREFT = AdapterSpec(method="loreft", positions="f1+l1", options={"rank": 2})
RED = AdapterSpec(method="red", site="mlp.up_proj", positions="all")
LORA = AdapterSpec(method="lora", options={"rank": 2})
WAYS = {"loreft": (LOREFT,), "red": (RED,), "stack": (LORA, LOREFT)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tiny Llama whose key and value projections are 16 wide, no multiple of 32."""
    folder = tmp_path_factory.mktemp("plain") / "base"
    return tiny_folder(folder, dim=64, layers=3, num_key_value_heads=1)


@pytest.fixture(params=list(BITS))
def kind(request):
    library = quantised.LIBRARIES[request.param]
    pytest.importorskip(library, reason=f"{library} is not installed")
    return request.param


@pytest.fixture
def load(plain, kind):
    """A function that loads the quantised base, or the skip that says why it cannot be."""

    def run(**values):
        values = {"quantize": kind, **values}
        try:
            return load_base(ModelSpec(str(plain), **values), device="cpu")[0]
        except ModelError as error:
            if not re.search("no kernel|could not be quantised|is too old", str(error)):
                raise
            pytest.skip(str(error))

    return run


def linears(model):
    return {n: m for n, m in model.named_modules() if n.startswith("model.") and is_linear(m)}


def is_linear(module):
    return hasattr(module, "in_features") and not hasattr(module, "base_layer")


def dequantised(module):
    weight = module.weight
    if type(module).__name__ == "Linear4bit":
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    if type(module).__name__ == "Linear8bitLt":
        scale = weight.SCB if weight.SCB is not None else module.state.SCB
        return weight.data * scale[:, None] / 127
    return weight.dequantize()


def twin(plain, model):
    """Return the same model in fp32, with the values that the quantised weights stand for."""
    twin = load_base(str(plain), device="cpu")[0]
    with torch.no_grad():
        for name, module in linears(model).items():
            twin.get_submodule(name).weight.copy_(dequantised(module))
    return twin


def adapted(model, specs):
    for spec in specs:
        model = apply_adapter(model, spec, seed=0)
    return model


def labelled():
    ids, mask = batch()
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(model, steps=12, lr=0.05):
    """Train what requires grad; return the loss of each step."""
    rows, losses = labelled(), []
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        loss = model.train()(**rows).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def gradients(model):
    """Return the gradients of one training step by name."""
    model.zero_grad()
    model.train()(**labelled()).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def frozen(model):
    """Return what must not change: the values that all base weights stand for."""
    values = {n: p.detach().clone() for n, p in model.named_parameters() if quantised.is_plain(p)}
    return values | {n: dequantised(m).clone() for n, m in linears(model).items()}


def logits(model, side="right"):
    with torch.no_grad():
        return forward(model.eval(), *batch(side))


# Loading


def test_weights_are_quantised_and_the_rest_is_not(load, plain, kind):
    model = load()
    found = linears(model)
    assert len(found) == 3 * 7
    assert all(quantised.weight_type(m) for m in found.values())
    assert quantised.weight_type(model.lm_head) is None
    assert model.model.norm.weight.dtype == torch.float32
    assert quantised.kind_of(model.config.quantization_config) == kind
    exact = load_base(str(plain), device="cpu")[0]
    weights = exact.model.layers[0].mlp.up_proj.weight
    values = dequantised(model.model.layers[0].mlp.up_proj).float()
    assert 0 < (values - weights).norm() / weights.norm() < (0.15 if kind == "int4" else 0.02)
    assert equal(logits(model), logits(twin(plain, model)), 2e-2)
    assert load(dtype="bfloat16").dtype == torch.bfloat16
    assert trainable_summary(model).total == trainable_summary(exact).total


def test_training_and_evaluation_compute_the_same_four_bits(load, kind):
    """bitsandbytes repacks 4-bit weights on CPUs with bf16 instructions, unless told not to."""
    model = load()
    with torch.no_grad():
        training = forward(model.train(), *batch())
    tolerance = 2e-2 if kind == "int8" else 1e-6  # LLM.int8 rounds hidden states too
    assert equal(logits(model), training, tolerance)


def test_eight_bits_are_not_announced_at_every_step(load, caplog):
    model = load()
    with caplog.at_level(logging.WARNING):
        logits(model)
    assert "inputs will be cast" not in caplog.text


@pytest.mark.parametrize("width", [32, 48, 96, 352])
def test_widths_that_four_bits_get_wrong_are_refused(tmp_path, width):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    folder = tiny_folder(tmp_path / "odd", dim=width)
    values = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    code = bitsandbytes.functional.quantize_4bit(values, quant_type="nf4")
    error = (bitsandbytes.functional.dequantize_4bit(*code) - values).norm() / values.norm()
    spec = ModelSpec(str(folder), quantize="int4")
    if error < 0.15:
        assert load_base(spec, device="cpu")
        return
    with pytest.raises(ModelError, match=r"wrongly on this CPU where they are \d+ wide: .*64"):
        load_base(spec, device="cpu")


# Training


@pytest.mark.parametrize("name", list(WAYS))
def test_the_loss_falls_and_only_the_adapter_learns(load, name):
    model = load()
    before = frozen(model)
    peft = adapted(model, WAYS[name])
    grads = gradients(peft)
    top = "reft_" if name != "red" else "up_proj.intervention.reft_"
    assert grads and all(top in key for key in grads)
    assert all(g.abs().sum() > 0 for key, g in grads.items() if "bias" in key)
    losses = train(peft)
    assert losses[-1] < losses[0] - 0.1
    after = frozen(peft.get_base_model() if name != "stack" else model)
    assert all(torch.equal(value, after[key]) for key, value in before.items() if key in after)
    assert len(after) >= len(linears(model)) > 0


@pytest.mark.parametrize("name", ["loreft", "red"])
def test_gradients_are_those_of_the_weights_in_full(load, plain, kind, name):
    """Also after an evaluation in between, and below quantised weights."""
    model = load()
    wanted = gradients(adapted(twin(plain, model), WAYS[name]))
    peft = adapted(model, WAYS[name])
    tolerance = 5e-2 if kind == "int8" else 1e-4
    for _ in range(2):
        found = gradients(peft)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert (found[key] - value).norm() <= tolerance * value.norm(), key
        logits(peft)


def test_an_earlier_forward_pass_does_no_harm(load):
    model = load()
    logits(model)
    peft = adapted(model, (LOREFT,))
    assert train(peft)[-1] < 3.9


def test_full_and_head_only_are_refused(load):
    model = load()
    for method in ("full", "head_only"):
        with pytest.raises(AdapterError, match=f"{method} is not possible on quantised weights"):
            apply_adapter(model, AdapterSpec(method=method))


@pytest.mark.parametrize("method", ["full", "head_only"])
def test_recipes_that_would_train_quantised_weights_are_refused(method):
    text = (
        f"task: families\nadapter: {method}\nobjective: classification\n"
        "model: {head: classification, quantize: torchao_int8}"
    )
    with pytest.raises(RecipeError, match=r"adapter.method: quantised weights .* nor a head"):
        loads(text)


# Serving


@pytest.mark.parametrize("name", list(WAYS))
def test_adapters_serve(load, kind, name):
    """Generation with a cache says what whole forward passes say, padded or alone."""
    peft = adapted(load(), WAYS[name])
    train(peft, steps=6)
    ids, mask = batch("left")
    out = peft.eval().generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False,
        eos_token_id=None, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert out.sequences.shape == (3, ids.shape[1] + 4)
    width = ids.shape[1]
    whole = torch.cat([mask, torch.ones(3, 4, dtype=mask.dtype)], 1)
    with torch.no_grad():
        again = peft(input_ids=out.sequences, attention_mask=whole, prompt_lens=mask.sum(1)).logits
    tolerance = 5e-2 if kind == "int8" else 1e-4
    for step, seen in enumerate(out.logits):
        assert equal(seen, again[:, width + step - 1], tolerance)
    row = ids[2, mask[2].bool()][None]
    assert equal(forward(peft, row)[0, -1], forward(peft, ids, mask)[2, -1], tolerance)


def test_off_is_the_base(load):
    model = load()
    wanted = logits(model)
    attach(model, "loreft", positions="f1+l1")
    for module in interventions(model):
        with torch.no_grad():
            module.reft_bias.add_(1.0)
    assert not equal(logits(model), wanted, 1e-2)
    with off(model):
        assert torch.equal(logits(model), wanted)


def test_the_self_check_passes(load):
    checks = self_check(load())
    assert len(checks) > 5 and [c for c in checks if not c.passed] == []


# Artefacts


@pytest.mark.parametrize("name", list(WAYS))
def test_the_adapter_alone_is_saved_and_loaded(load, plain, kind, name, tmp_path):
    peft = adapted(load(), WAYS[name])
    train(peft, steps=4)
    wanted = logits(peft)
    folder = save_adapter(peft, tmp_path / "adapter")
    files = {f: load_file(f) for f in folder.rglob("*.safetensors")}
    assert len(files) == (2 if name == "stack" else 1)
    for tensors in files.values():
        assert all("reft_" in key or "lora_" in key for key in tensors)
        assert all(value.dtype == torch.float32 for value in tensors.values())
    place = folder / "reft" if name == "stack" else folder
    config = json.loads((place / "adapter_config.json").read_text())
    assert config["base_model"]["quantize"] == kind
    loaded, _ = load_adapter(folder, device="cpu")  # the base as it was: quantised
    base = loaded.get_base_model()
    assert quantised.kind_of(base.config.quantization_config) == kind
    assert torch.equal(logits(loaded), wanted)
    other, _ = load_adapter(folder, model=load_base(str(plain), device="cpu")[0])
    assert equal(logits(other), wanted, 1.0) and not equal(logits(other), wanted, 1e-6)


def test_a_base_loaded_by_transformers_is_recorded_too(load, plain, kind, tmp_path):
    from transformers import AutoModelForCausalLM

    load()
    config = quantised.quantisation_config(kind, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    peft = get_peft_model(model, ReftConfig("loreft"))
    assert peft.peft_config["default"].base_model["quantize"] == kind
    assert train(peft)[-1] < 4
    assert any(getattr(m, quantised.REPACKS, False) for m in model.modules()) is False


def test_weights_that_are_stored_quantised(load, kind, tmp_path):
    model = load()
    folder = tmp_path / "stored"
    model.save_pretrained(folder)
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(model.config._name_or_path).save_pretrained(folder)
    wanted = logits(model)
    for quantize in ("none", kind):
        stored = load_base(ModelSpec(str(folder), quantize=quantize), device="cpu")[0]
        assert quantised.kind_of(stored.config.quantization_config) == kind
        assert torch.equal(logits(stored), wanted)
    other = next(k for k in BITS if k != kind)
    with pytest.raises(ModelError, match=rf'stored quantised \({kind}\); quantize is "{other}"'):
        load_base(ModelSpec(str(folder), quantize=other))
    peft = adapted(stored, (LOREFT,))
    assert train(peft)[-1] < 3.9


# Merging


@pytest.mark.parametrize(
    ("method", "site"), [("red", "mlp.up_proj"), ("red", "mlp.down_proj"), ("lobireft", "block")]
)
def test_merging_is_refused(load, method, site):
    model = load()
    before = frozen(model)
    peft = adapted(model, (AdapterSpec(method=method, site=site, positions="all"),))
    names = {quantised.weight_type(m) for m in linears(model).values()}
    message = rf"the base weights are quantised \({names.pop()}\).*without quantisation to merge"
    with pytest.raises(AdapterError, match=message):
        peft.merge_and_unload()
    with pytest.raises(AdapterError, match=message):
        merge_adapter(model, "default")
    after = frozen(model)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert train(peft, steps=3)[-1] < 4.5


# What lets no gradient through


def dynamic(plain):
    """Return a model whose activations torchao quantises too."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig as Dynamic
    from transformers import AutoModelForCausalLM, TorchAoConfig

    return AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=TorchAoConfig(Dynamic()), device_map={"": "cpu"},
        dtype=torch.float32,
    ).eval()  # fmt: skip


def repacked(plain):
    """Return a 4-bit model that transformers loaded and that was evaluated on this CPU."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    has = getattr(bitsandbytes.functional, "has_avx512bf16", lambda: False)
    if not has():
        pytest.skip("bitsandbytes repacks weights on CPUs with AVX512-BF16 only")
    from transformers import AutoModelForCausalLM

    config = quantised.quantisation_config("int4", torch.float32)
    wide = tiny_folder(plain.parent / "wide", dim=64)  # all widths are multiples of 32
    model = AutoModelForCausalLM.from_pretrained(
        wide, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    logits(model)
    return model


@pytest.mark.parametrize("make", [dynamic, repacked])
def test_weights_without_gradient_are_refused_in_training(plain, make):
    model = make(plain)
    message = rf"No gradient passes through the quantised weights \({quantised.blocking(model)}\)"
    for method in ("loreft", "lora"):
        with pytest.raises(AdapterError, match=message):
            apply_adapter(model, AdapterSpec(method=method))
    with pytest.raises(AdapterError, match=message):
        get_peft_model(model, ReftConfig("loreft"))
    assert get_peft_model(copy.copy(model), ReftConfig("loreft", inference_mode=True))
    with pytest.warns(UserWarning, match=message):
        attach(model, "loreft", name="other")
    failed = {c.name: c.detail for c in self_check(make(plain)) if not c.passed}
    assert "none passes through the quantised weights" in failed["gradients"]


def test_weights_that_transformers_does_not_train_on_are_refused(plain):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    from transformers import AutoModelForCausalLM, TorchAoConfig

    config = TorchAoConfig(IntxWeightOnlyConfig(torch.int4, granularity=PerGroup(32)))
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    with pytest.raises(AdapterError, match=r"does not train on weights .* \(torchao\)"):
        apply_adapter(model, LOREFT)
    assert train(get_peft_model(model, ReftConfig("loreft")))[-1] < 4  # in a loop of one's own


# Libraries and kernels that are not there


@pytest.mark.parametrize("kind_", list(BITS))
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'x'"), "is not installed"),
        (OSError("libfoo.so: wrong ELF class"), "cannot be imported: libfoo.so"),
    ],
)
def test_libraries_that_are_missing_are_named(monkeypatch, plain, kind_, error, message):
    library, real = quantised.LIBRARIES[kind_], importlib.import_module

    def fail(name, *rest):
        if name == library:
            raise error
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(
        ModelError, match=f'quantize is "{kind_}" but {library} {message}.*pip install'
    ):
        load_base(ModelSpec(str(plain), quantize=kind_))


def test_a_kernel_that_is_missing_is_named(monkeypatch, plain):
    import transformers

    monkeypatch.setattr(quantised, "quantisation_config", lambda kind, dtype: None)

    def fail(*args, **kwargs):
        raise RuntimeError("Could not run 'bitsandbytes::quantize_4bit' with the 'CPU' backend\nX")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    message = r"could not be quantised to int4 on cpu: Could not run .bitsandbytes::quant.*newer"
    with pytest.raises(ModelError, match=message):
        load_base(ModelSpec(str(plain), quantize="int4"), device="cpu")
    with pytest.raises(RuntimeError, match="Could not run"):
        load_base(ModelSpec(str(plain)), device="cpu")


def test_weights_without_a_kernel_are_named(load, monkeypatch):
    def fail(self, x):
        raise NotImplementedError("Could not run 'aten::_weight_int4pack_mm'")

    module = next(iter(linears(load()).values()))
    monkeypatch.setattr(type(module), "forward", fail)
    with pytest.raises(pytest.skip.Exception, match=r"no kernel that runs on cpu: .*int4pack_mm"):
        load()


@pytest.mark.parametrize(
    ("config", "kind_"),
    [
        (None, "none"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({"load_in_4bit": True}, "int4"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "X"}}}, "torchao"),
        ({"bits": 4}, "unknown"),
    ],
)
def test_kinds_of_configs(config, kind_):
    assert quantised.kind_of(config) == kind_


def test_plain_weights_are_told_apart():
    linear = nn.Linear(4, 4)
    assert quantised.weight_type(linear) is None
    assert quantised.weight_type(linear.to(torch.bfloat16)) is None
    for dtype in (torch.float8_e4m3fn, torch.int8):
        linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=dtype), requires_grad=False)
        assert quantised.weight_type(linear) == "Linear"
    assert quantised.weight_type(nn.ReLU()) == "ReLU"
    assert quantised.blocking(nn.Sequential(nn.Linear(4, 4))) is None
