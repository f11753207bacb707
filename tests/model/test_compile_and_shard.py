"""Compiled and sharded models edit as plain ones do."""

from __future__ import annotations

import pytest
import torch
from contracts.architectures import batch, build, llama
from contracts.helpers import attached, interventions
from torch import distributed

pytestmark = pytest.mark.slow


def step(model, module):
    """Return loss and the adapter's gradients of one training step of `module`."""
    ids, mask = batch()
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :3] = -100
    loss = module(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    found = [p.grad for m in interventions(model) for p in m.parameters()]
    found = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]
    return loss.detach(), found


def compare(got, wanted):
    assert torch.allclose(got[0], wanted[0], atol=1e-6)
    assert len(got[1]) == len(wanted[1]) > 0
    for a, b in zip(got[1], wanted[1]):
        assert torch.allclose(a, b, atol=1e-6)


def test_one_compiled_graph():
    base = llama(num_hidden_layers=1).state_dict()

    def fresh():
        model = llama(num_hidden_layers=1)
        model.load_state_dict(base)
        return attached(model, "loreft", positions="f2+l1").train()

    plain, model = fresh(), fresh()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compare(step(model, compiled), step(plain, plain))


@pytest.fixture
def one_process(tmp_path):
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_data_parallel_wrappers(kind, checkpointing, one_process):
    plain = attached(build("llama"), "loreft", positions="f2+l1").train()
    wanted = step(plain, plain)
    model = attached(build("llama"), "loreft", positions="f2+l1").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if kind == "ddp":
        module = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        module = fully_shard(model, mesh=mesh)
    compare(step(model, module), wanted)
