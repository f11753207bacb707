"""The matrix registry x architectures: what every intervention must do on every model.

It reads the registry: a method that an installed package announces is tried too, all but its
equation. `pytest tests/contracts/test_interventions.py -k steer` tries one.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from contracts.architectures import (
    ARCHITECTURES,
    CAUSAL,
    DIM,
    FEW,
    LENGTHS,
    batch,
    blocks_of,
    build,
    forward,
    position_ids,
    rows,
)
from contracts.equations import EQUATIONS, tensors
from contracts.helpers import (
    attached,
    captured,
    changed,
    edited_mask,
    equal,
    interventions,
    settings,
    wrapped,
)

from reftune import attach, detach, off
from reftune.errors import AdapterError
from reftune.interventions import get, names
from reftune.model.checkpoint import load_adapter, save_adapter

QUICK = ("llama", "t5")
matrix = [
    pytest.param(method, name, marks=pytest.mark.quick if name in QUICK else ())
    for name in ARCHITECTURES
    for method in names()
]
full = pytest.mark.parametrize(("method", "name"), matrix)
few = pytest.mark.parametrize("name", FEW)
every = pytest.mark.parametrize("method", names())


def equation_of(method):
    """Return a method's equation; without one the test does not apply."""
    if method not in EQUATIONS:
        pytest.skip(f"{method} has no equation in equations.py")
    return EQUATIONS[method]


def refusal(method):
    """Return why a method cannot start at the identity, or None."""
    try:
        settings(method, init="identity")
        get(method).check(settings(method, init="identity"))
    except AdapterError as error:
        return error.what
    return None


def check_equation(model, records, method, mask, tolerance):
    """Check that each block changed the edited tokens alone, by the equation in float64."""
    modules = interventions(model)
    assert len(modules) == len(records) == len(blocks_of(model))
    for record in records:
        h, out = record["before"], record["after"]
        assert torch.equal(out[~mask], h[~mask])
        assert not torch.equal(out[mask], h[mask])
    equation = equation_of(method)
    for module, record in zip(modules, records):
        expected = equation.edit(record["before"][mask].double(), tensors(module))
        difference = (record["after"][mask].double() - expected).abs().max()
        assert difference / expected.abs().max() <= tolerance


def test_every_registered_method_has_an_equation():
    assert set(names()) >= set(EQUATIONS)
    own = [name for name in names() if get(name).__module__.startswith("reftune.")]
    assert set(own) == set(EQUATIONS), "a new method needs its equation in equations.py"


@full
@torch.no_grad()
def test_output_equals_the_equation(method, name):
    model = attached(build(name), method, positions="f2+l1")
    ids, mask = batch()
    with captured(model) as records:
        forward(model, ids, mask)
    check_equation(model, records, method, edited_mask(LENGTHS, 2, 1), 1e-6)


@every
@few
@torch.no_grad()
def test_output_equals_the_equation_on_a_float64_base(method, name):
    model = attached(build(name).double(), method, positions="f2+l1")
    ids, mask = batch()
    with captured(model) as records:
        forward(model, ids, mask)
    assert all(p.dtype == torch.float32 for m in interventions(model) for p in m.parameters())
    check_equation(model, records, method, edited_mask(LENGTHS, 2, 1), 1e-12)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh", "sigmoid"])
@pytest.mark.parametrize("method", ["loreft", "direft", "direft_orth", "noreft"])
def test_activation_acts_on_the_source_term_only(method, activation):
    module = get(method)(get(method).Config(rank=3, activation=activation), DIM)
    module.reset()
    h = torch.randn(5, DIM, generator=torch.Generator().manual_seed(0))
    p = tensors(module)
    function = getattr(torch, activation, None) or getattr(torch.nn.functional, activation)
    source = function(h.double() @ p["W"].T + p["b"])
    out = p["P"] if "P" in p else p["R"]
    low = source - h.double() @ out.T if method in ("loreft", "noreft") else source
    assert equal(module.eval()(h).delta, low @ out, 1e-6)


@full
@torch.no_grad()
def test_switched_off_and_detached_the_base_is_bit_identical(method, name):
    model = build(name)
    keys = list(model.state_dict())
    ids, mask = batch()
    base = forward(model, ids, mask)
    attached(model, method, positions="f2+l1")
    on = forward(model, ids, mask)
    assert (on - base).abs().max() > 1e-3
    with off(model):
        assert torch.equal(forward(model, ids, mask), base)
    assert torch.equal(forward(model, ids, mask), on)
    detach(model)
    assert torch.equal(forward(model, ids, mask), base)
    assert list(model.state_dict()) == keys


@full
@torch.no_grad()
def test_saved_and_loaded_is_bit_equal(method, name, tmp_path):
    model = wrapped(build(name), method, positions="f2+l1", tied=name not in QUICK)
    ids, mask = batch()
    wanted = forward(model, ids, mask)
    save_adapter(model, tmp_path / "adapter")
    loaded, _ = load_adapter(tmp_path / "adapter", model=build(name))
    assert torch.equal(forward(loaded, ids, mask), wanted)
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.quick
@every
def test_parameter_count_is_the_docstrings_formula(method):
    has_rank = "rank" in get(method).Config.__dataclass_fields__
    for rank, dim in ((1, 8), (3, DIM), (8, 64)):
        config = settings(method, rank=rank) if has_rank else settings(method)
        module = get(method)(config, dim)
        counted = sum(p.numel() for p in module.parameters())
        assert counted == type(module).num_parameters(config, dim)
        if method in EQUATIONS:
            assert counted == EQUATIONS[method].size(dim, rank)
            assert "Parameters" in get(method).__doc__
    size = get(method).num_parameters(settings(method), DIM)
    for groups, tied in ((1, True), (2, False)):
        model = attached(build("llama"), method, positions="f2+l2", tied=tied)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == 3 * groups * size


def test_paper_parameter_counts():
    config = settings("loreft", rank=8)
    assert 32 * get("loreft").num_parameters(config, 4096) == 2_097_408
    assert 40 * get("loreft").num_parameters(config, 5120) == 3_277_120
    instruct = settings("loreft", rank=4)
    assert 4 * 2 * get("loreft").num_parameters(instruct, 4096) == 262_176
    glue = settings("loreft", rank=1)
    assert 12 * get("loreft").num_parameters(glue, 768) == 18_444


@pytest.mark.quick
@every
@few
@torch.no_grad()
def test_identity_init_leaves_logits_unchanged(method, name):
    model = build(name)
    ids, mask = batch()
    base = forward(model, ids, mask)
    why = refusal(method)
    if method in EQUATIONS:
        assert EQUATIONS[method].identity == (why is None)
    if why is not None:
        with pytest.raises(AdapterError, match=re.escape(why)):
            attach(model, settings(method, init="identity"), method=method)
        assert not hasattr(model, "_reftune_calls")
        return
    config = settings(method, init="identity")
    attach(model, config, method=method, positions="all" if name != "t5" else "f2+l1")
    assert equal(forward(model, ids, mask), base, 1e-6)


@every
def test_identity_init_still_learns(method):
    if refusal(method) is not None:
        pytest.skip("cannot start at the identity")
    model = attached(build("llama"), method, positions="all", init="identity")
    ids, _ = batch(lengths=(8, 8))
    forward(model.train(), ids, labels=ids).float().square().mean().backward()
    for module in interventions(model):
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


@every
@few
def test_only_own_parameters_train_and_every_layer_gets_gradient(method, name):
    model = attached(build(name), method, positions="f2+l1").train()
    own = {id(p) for m in interventions(model) for p in m.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    ids, mask = batch()
    # Labels from the middle on, so that the prompt's edits reach them.
    labels = ids.clone()
    labels[:, :3] = -100
    labels[mask == 0] = -100
    if name == "modernbert":
        loss = model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1, 2])).loss
    elif name == "t5":
        loss = model(input_ids=ids, attention_mask=mask, labels=ids[:, :4].contiguous()).loss
    else:
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    for module in interventions(model):
        for parameter_name, parameter in module.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.abs().max() > 0, parameter_name
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_padded_rows_equal_the_rows_alone(name):
    model = attached(build(name), "loreft", positions="f2+l3")
    alone = [forward(model, row[None])[0] for row in rows()]
    for side in ("right", "left"):
        ids, mask = batch(side)
        extra = {} if name == "opt" else {"position_ids": position_ids(mask)}
        logits = forward(model, ids, mask, **extra)
        for i, wanted in enumerate(alone):
            assert equal(logits[i][mask[i].bool()], wanted, 1e-5)


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n not in (*CAUSAL, "t5")])
@torch.no_grad()
def test_padded_rows_equal_the_rows_alone_in_an_encoder(name):
    model = attached(build(name), "loreft", positions="f2+l3")
    ids, mask = batch("right")
    logits = forward(model, ids, mask)
    for i, row in enumerate(rows()):
        got = logits[i] if logits.dim() == 2 else logits[i][mask[i].bool()]
        assert equal(got, forward(model, row[None])[0], 1e-5)
    # Their own positions follow the padding: on the left only the places can be compared.
    ids, mask = batch("left")
    with captured(model) as records:
        forward(model, ids, mask)
    assert torch.equal(changed(records), edited_mask(LENGTHS, 2, 3, "left"))


@torch.no_grad()
def test_padded_rows_equal_the_rows_alone_in_an_encoder_decoder():
    model = attached(build("t5"), "loreft", positions="f2+l3")
    for side in ("right", "left"):
        ids, mask = batch(side)
        with captured(model) as records:
            forward(model, ids, mask)
        assert torch.equal(changed(records), edited_mask(LENGTHS, 2, 3, side))
    ids, mask = batch("right")
    logits = forward(model, ids, mask)
    for i, row in enumerate(rows()):
        assert equal(logits[i], forward(model, row[None])[0], 1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "gemma2"])
@torch.no_grad()
def test_cache_on_equals_cache_off(name):
    model = attached(build(name), "loreft", positions="f2+l3")
    ids, mask = batch("left")
    kwargs = {
        "attention_mask": mask,
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    on = model.generate(ids, use_cache=True, **kwargs)
    without = model.generate(ids, use_cache=False, **kwargs)
    assert torch.equal(on.sequences, without.sequences)
    for a, b in zip(on.logits, without.logits):
        assert equal(a, b, 1e-5)


@every
@few
def test_deepcopy_is_independent(method, name):
    model = attached(build(name), method, positions="f2+l1")
    ids, mask = batch()
    with torch.no_grad():
        wanted = forward(model, ids, mask)
        twin = copy.deepcopy(model)
        assert torch.equal(forward(twin, ids, mask), wanted)
        for module in interventions(twin):
            for parameter in module.parameters():
                parameter.add_(1.0)
        assert not torch.equal(forward(twin, ids, mask), wanted)
        assert torch.equal(forward(model, ids, mask), wanted)
        detach(twin)
        assert torch.equal(forward(twin, ids, mask), forward(build(name), ids, mask))
        assert torch.equal(forward(model, ids, mask), wanted)


@pytest.mark.quick
@every
def test_bf16_base_keeps_the_adapter_in_fp32(method):
    model = attached(build("llama").bfloat16(), method, positions="f2+l1")
    assert all(p.dtype == torch.float32 for m in interventions(model) for p in m.parameters())
    ids, mask = batch()
    with captured(model) as records:
        logits = forward(model, ids, mask)
    assert logits.dtype == torch.bfloat16
    where = edited_mask(LENGTHS, 2, 1)
    for module, record in zip(interventions(model), records):
        assert record["after"].dtype == torch.bfloat16
        if method not in EQUATIONS:
            continue
        expected = EQUATIONS[method].edit(record["before"][where].double(), tensors(module))
        assert torch.equal(record["after"][where], expected.float().bfloat16()) or equal(
            record["after"][where].double(), expected, 5e-3
        )
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :3] = -100
    model.train()(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    assert all(p.grad.dtype == torch.float32 for m in interventions(model) for p in m.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_casting_the_whole_model_afterwards_works(dtype):
    model = attached(build("llama"), "loreft", positions="f2+l1").to(dtype)
    ids, mask = batch()
    assert torch.isfinite(forward(model, ids, mask)).all()
    rotation = interventions(model)[0].rotation()
    assert rotation.dtype == torch.float32
