"""The backward pass ends at the lowest site, also with gradient checkpointing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from contracts.architectures import build, rows
from contracts.helpers import interventions, wrapped

pytestmark = pytest.mark.quick
CALLS = ("none", "before", "after", "twice")


def adapted(calls="none", reentrant=False, early=False):
    """Return a training model with checkpointing, and input gradients asked for as trainers do."""
    base = build("llama")
    if early:
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model = wrapped(base, "loreft", positions="f2+l1", layers="2").train()
    if calls in ("before", "twice"):
        model.enable_input_require_grads()
    if not early:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if calls in ("after", "twice"):
        model.enable_input_require_grads()
    return model


def step(model):
    """Return whether each block's input requires grad, after a step."""
    ids = torch.stack(rows((9, 9)))
    labels = ids.clone()
    labels[:, :4] = -100
    seen, handles = [], []
    for block in model.get_base_model().model.layers:
        handles.append(
            block.register_forward_pre_hook(lambda m, args: seen.append(args[0].requires_grad))
        )
    with torch.enable_grad():
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    for handle in handles:
        handle.remove()
    return seen[:3]


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("calls", CALLS)
def test_nothing_below_the_lowest_site_requires_grad(calls, early):
    model = adapted(calls, early=early)
    assert step(model) == [False] * 3
    plain = wrapped(build("llama"), "loreft", positions="f2+l1", layers="2").train()
    step(plain)
    for a, b in zip(interventions(model), interventions(plain), strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert q.grad.abs().sum() > 0 and torch.allclose(p.grad, q.grad, atol=1e-6)


@pytest.mark.parametrize("early", [False, True])
def test_the_reentrant_kind_gets_what_it_needs(early):
    model = adapted("after", reentrant=True, early=early)
    assert step(model) == [True] * 3
    assert all(p.grad is not None for m in interventions(model) for p in m.parameters())


def test_without_checkpointing_in_sight_the_gradients_stay():
    model = wrapped(build("llama"), "loreft", positions="f2+l1", layers="2").train()
    model.enable_input_require_grads()
    assert step(model) == [True] * 3


def test_trained_embeddings_keep_their_gradients():
    model = adapted("after")
    embedding = model.get_input_embeddings().weight.requires_grad_(True)
    assert step(model) == [True] * 3
    assert embedding.grad.abs().sum() > 0


def test_it_can_be_disabled_and_leaves_with_the_adapter():
    model = adapted("after")
    model.disable_input_require_grads()
    assert step(model) == [False] * 3
    base = model.unload()
    assert "enable_input_require_grads" not in vars(base)
    assert not base.get_input_embeddings()._forward_hooks
    base.enable_input_require_grads()
    assert len(base.get_input_embeddings()._forward_hooks) == 1


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_look_at_themselves(how):
    model = wrapped(build("llama"), "loreft", positions="f2+l1", layers="2").train()
    twin = how(model)
    twin.gradient_checkpointing_enable({"use_reentrant": False})
    twin.enable_input_require_grads()
    model.enable_input_require_grads()
    assert step(twin) == [False] * 3 and step(model) == [True] * 3


def test_trainer_with_checkpointing_stops_at_the_lowest_site(tmp_path):
    from test_trainers import trainer

    seen = []
    model = wrapped(build("llama"), "loreft", positions="f2+l2", layers="2")
    model.get_base_model().model.layers[0].register_forward_pre_hook(
        lambda m, args: seen.append(args[0].requires_grad)
    )
    run = trainer(
        tmp_path, model, max_steps=1, gradient_checkpointing=True, eval_strategy="no",
        gradient_checkpointing_kwargs={"use_reentrant": False}, save_strategy="no",
    )  # fmt: skip
    run.train()
    assert seen and not any(seen)
