"""Gradient checkpointing of every kind gives the gradients of no checkpointing."""

from __future__ import annotations

import pytest
import torch
from contracts.architectures import ARCHITECTURES, build, rows
from contracts.helpers import attached, interventions
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)

KINDS = ("hf", "hf_reentrant", "wrapper", "wrapper_reentrant")
PLACES = {"block": "f2+l1", "inner": "f1+l2"}


def prepared(name, kind, site):
    """Return a training model with an adapter and one kind of checkpointing."""
    inner = ARCHITECTURES[name].inner
    model = attached(
        build(name), "loreft", positions=PLACES[site], site="block" if site == "block" else inner
    )
    model.train()
    if kind.startswith("hf"):
        model.gradient_checkpointing_enable({"use_reentrant": kind == "hf_reentrant"})
    if kind.startswith("wrapper"):
        chosen = CheckpointImpl.REENTRANT if "reentrant" in kind else CheckpointImpl.NO_REENTRANT
        for module in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
            for i, block in enumerate(module):
                if type(block).__name__ == ARCHITECTURES[name].blocks:
                    module[i] = checkpoint_wrapper(block, checkpoint_impl=chosen)
    if "reentrant" in kind:
        model.enable_input_require_grads()
    return model


def step(model, passes):
    """Run several batches with prompts of other lengths, then one backward pass."""
    total = 0.0
    for seed in range(passes):
        ids = torch.stack(rows((9, 9), seed=seed))
        labels = ids.clone()
        labels[0, : 3 + seed] = -100
        labels[1, : 6 - seed] = -100
        total = total + model(input_ids=ids, labels=labels, use_cache=False).loss * (1 + seed)
    total.backward()
    return [p.grad.clone() for m in interventions(model) for p in m.parameters()]


@pytest.fixture(scope="module")
def reference():
    """Gradients without checkpointing, for each architecture, site and number of passes."""
    found = {}

    def get(name, site, passes):
        key = name, site, passes
        if key not in found:
            found[key] = step(prepared(name, "none", site), passes)
        return found[key]

    return get


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("site", list(PLACES))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2"), "falcon"])
def test_gradients_are_those_without_checkpointing(name, kind, site, passes, reference):
    wanted = reference(name, site, passes)
    got = step(prepared(name, kind, site), passes)
    assert len(got) == len(wanted) > 0
    for a, b in zip(got, wanted):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max().clamp(min=1.0)


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_pass_between_changes_nothing(kind, reference):
    """The pattern of preference training: policy, adapters off, policy again, one backward."""
    from reftune import off

    model = prepared("llama", kind, "block")
    ids = torch.stack(rows((9, 9), seed=0))
    other = torch.stack(rows((9, 9), seed=1))
    labels = ids.clone()
    labels[0, :3], labels[1, :6] = -100, -100
    late = other.clone()
    late[0, :4], late[1, :5] = -100, -100
    first = model(input_ids=ids, labels=labels, use_cache=False).loss
    with torch.no_grad(), off(model):
        model(input_ids=other, use_cache=False)
    second = model(input_ids=other, labels=late, use_cache=False).loss
    (first + 2 * second).backward()
    got = [p.grad for m in interventions(model) for p in m.parameters()]
    for a, b in zip(got, reference("llama", "block", 2)):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max().clamp(min=1.0)


def test_gradients_without_labels_in_an_encoder():
    model = attached(build("bert"), "loreft", positions="f1+l1").train()
    plain = attached(build("bert"), "loreft", positions="f1+l1").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.stack(rows((6, 6)))
    for m in (model, plain):
        m(input_ids=ids, labels=torch.tensor([0, 2])).loss.backward()
    for a, b in zip(interventions(model), interventions(plain)):
        for p, q in zip(a.parameters(), b.parameters()):
            assert torch.allclose(p.grad, q.grad, atol=1e-7)
