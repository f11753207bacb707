"""The rotation R stays orthonormal, is cached safely and never decayed."""

from __future__ import annotations

import pytest
import torch
from contracts.architectures import batch, build, forward
from contracts.equations import orthonormality
from contracts.helpers import attached, interventions, wrapped

from reftune.interventions import get, names
from reftune.interventions.base import orthonormal_rows
from reftune.model.checkpoint import load_adapter, save_adapter

pytestmark = pytest.mark.quick
ROTATED = [n for n in names() if hasattr(get(n), "rotation")]


def train(model, steps=30, lr=0.05, decay=0.0):
    ids, mask = batch()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
    model.train()
    for _ in range(steps):
        labels = torch.where(mask.bool(), ids, -100)
        labels[:, :3] = -100
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return loss.item()


@pytest.mark.parametrize("method", ROTATED)
def test_orthonormal_after_training_reload_and_more_training(method, tmp_path):
    model = wrapped(build("llama"), method, positions="f1+l1")
    started = interventions(model)[0].rotation().detach().clone()
    first = train(model)
    trained = [m.rotation().detach().clone() for m in interventions(model)]
    assert not torch.allclose(trained[0], started, atol=1e-3)
    assert max(map(orthonormality, trained)) < 1e-4
    folder = save_adapter(model, tmp_path / "adapter")
    loaded, _ = load_adapter(folder, model=build("llama"), trainable=True)
    again = [m.rotation().detach() for m in interventions(loaded)]
    assert all(torch.equal(a, b) for a, b in zip(again, trained))
    assert train(loaded) < first
    assert max(orthonormality(m.rotation()) for m in interventions(loaded)) < 1e-4


def test_decay_would_not_hurt_and_is_marked_off():
    model = wrapped(build("llama"), "loreft", positions="f1+l1")
    for module in interventions(model):
        assert module.reft_rotation._no_decay is True
        assert not hasattr(module.reft_weight, "_no_decay")
    train(model, decay=0.3)
    assert max(orthonormality(m.rotation()) for m in interventions(model)) < 1e-4
    assert min(m.rotation().norm() for m in interventions(model)) > 1.7, "rank 3: norm sqrt(3)"


def test_the_mark_survives_loading_and_copying(tmp_path):
    import copy

    model = wrapped(build("llama"), "loreft", positions="l1")
    from peft import PeftModel

    folder = save_adapter(model, tmp_path / "a")
    loaded, _ = load_adapter(folder, model=build("llama"))
    lean = PeftModel.from_pretrained(build("llama"), folder, low_cpu_mem_usage=True)
    for twin in (loaded, lean.eval(), copy.deepcopy(model)):
        assert all(m.reft_rotation._no_decay for m in interventions(twin))


def test_qr_keeps_what_is_orthonormal_and_differentiates():
    generator = torch.Generator().manual_seed(0)
    free = torch.randn(4, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    rotation = orthonormal_rows(free)
    assert orthonormality(rotation) < 1e-12
    assert torch.allclose(orthonormal_rows(rotation.detach()), rotation, atol=1e-12)
    assert torch.autograd.gradcheck(orthonormal_rows, (free,))


def test_the_cache_follows_the_parameter():
    (module, *_) = interventions(attached(build("llama"), "loreft"))
    module.eval().requires_grad_(False)
    assert module.rotation() is module.rotation()
    before = module.rotation()
    with torch.no_grad():
        module.reft_rotation.mul_(-1.0)
    assert torch.allclose(module.rotation(), -before)
    module.reft_rotation.data = -module.reft_rotation.data
    assert torch.allclose(module.rotation(), before)
    module.reft_rotation.data.mul_(-1.0)  # leaves no trace on the parameter
    module.train()
    assert torch.allclose(module.rotation(), -before)
    state = {k: -v for k, v in module.state_dict().items()}
    module.load_state_dict(state)
    assert torch.allclose(module.rotation(), before)


def test_what_inference_mode_cached_can_be_trained_through():
    """A frozen adapter below a trained one, after an evaluation in inference mode."""
    from reftune import attach, use

    model = attached(build("llama"), "loreft", name="frozen", layers="1", positions="f1+l1")
    attach(model, "loreft", name="trained", layers="0", positions="f1+l1")
    use(model, ["frozen", "trained"])
    for module in interventions(model, "frozen"):
        module.requires_grad_(False)
    ids, mask = batch()
    with torch.inference_mode():
        forward(model, ids, mask)
    model.train()
    model(input_ids=ids, attention_mask=mask, labels=ids, prompt_lens=mask.sum(1)).loss.backward()
    assert all(p.grad is not None for m in interventions(model, "trained") for p in m.parameters())
