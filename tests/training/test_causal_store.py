"""The store of constants: keyed by content, never stale, within its budget, on disk."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from causal_parts import adapted, batches, curve, long_rows, losses
from tiny import tiny_llama, tiny_tokenizer

import reftune
from reftune.config.recipe import AdapterSpec
from reftune.errors import TrainingError
from reftune.model import cutting
from reftune.model.build import apply_adapter
from reftune.model.identity import CHUNK, Identity
from reftune.tasks.base import Example
from reftune.training.causal import Settings
from reftune.training.collate import Collator, prepare
from reftune.training.constants import DiskStore, Store
from reftune.training.encode import encode_all
from reftune.training.stored import Stored


def first_batch():
    return prepare(Collator()(long_rows().rows[:4]))


def filled(model, store, batch=None, start=False):
    """Answer one batch from a store; return what came out."""
    suffix = cutting.split(model, first_batch() if batch is None else batch)
    return Stored(model, store, start)(suffix)


# Test 8 of the design: keys


def test_a_second_epoch_finds_everything():
    model = adapted().train()
    source = Stored(model, Store(1e9), start=True)
    source.build(batches(long_rows()))
    made = source.store.misses
    source.store.hits = source.store.misses = 0
    source.build(batches(long_rows(), size=5))  # other batches, same rows
    assert made == 64 and source.store.misses == 0 and source.store.hits == 64


def test_rows_with_equal_prompts_share_an_entry():
    examples = [Example(str(i), "a" * 30, f" {i}", "") for i in range(6)]
    rows = encode_all(examples, tiny_tokenizer(), 64)
    source = Stored(adapted("l2", "all").train(), Store(1e9))
    source.build(batches(rows))
    assert len(source.store) == 1


def on_lora(scale=4, zero=False):
    """Return a Llama with a frozen LoRA and an adapter on top."""
    torch.manual_seed(1)
    options = {"rank": 2, "alpha": scale, "dropout": 0.0}
    model = apply_adapter(tiny_llama(layers=4), AdapterSpec(method="lora", options=options), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and not zero:
                parameter.fill_(0.1)
    reftune.attach(model.get_base_model(), "loreft", layers="all", positions="l2")
    return model.train()


def changed(change):
    """Return a model, a batch, and the start flag that differ from the first in one thing."""
    model, batch, start = adapted("l2", "all"), first_batch(), False
    base = model.get_base_model()
    weight = base.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        if change == "one bit of a weight":
            weight.view(torch.int32)[3, 3] ^= 1
        elif change == "two values swapped":
            weight[3, 3], weight[3, 4] = weight[3, 4].clone(), weight[3, 3].clone()
        elif change == "dtype":
            model = model.to(torch.float64)
        elif change == "kernel":
            base.set_attn_implementation("eager")
        elif change == "config":
            base.config.rms_norm_eps = 1e-3
        elif change == "tokens":
            batch.input_ids[:, 1] = 9
        elif change == "cut":
            model = adapted("l10", "all")
        elif change == "start":
            model, start = adapted("l2", "late"), True
        elif change == "frozen adapter":
            model = on_lora()
    return model.train(), batch, start


CHANGES = (
    "one bit of a weight", "two values swapped", "dtype", "kernel", "config", "tokens", "cut",
    "start", "frozen adapter",
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_constants_of_something_else_are_not_used(tmp_path, where, change):
    first = Store(1e9) if where == "memory" else DiskStore(1e9, tmp_path)
    filled(adapted("l2", "all").train(), first)
    again = first if where == "memory" else DiskStore(1e9, tmp_path)
    again.hits = again.misses = 0
    filled(adapted("l2", "all").train(), again)
    assert again.hits == 4 and again.misses == 0  # the same once more is found
    again.hits = again.misses = 0
    model, batch, start = changed(change)
    filled(model, again, batch, start)
    assert again.hits == 0 and again.misses == (8 if start else 4)


@pytest.mark.parametrize("change", ["weight", "scale", "off", "merged"])
def test_constants_of_another_frozen_adapter_are_not_used(tmp_path, change):
    filled(on_lora(), DiskStore(1e9, tmp_path))
    again = DiskStore(1e9, tmp_path)
    filled(on_lora(), again)
    assert again.hits == 4
    again.hits = 0
    model = on_lora(scale=8 if change == "scale" else 4, zero=change == "weight")
    if change == "off":
        model.base_model.disable_adapter_layers()
    if change == "merged":
        for module in model.modules():
            if hasattr(module, "merge") and hasattr(module, "base_layer"):
                module.merge()
    filled(model, again)
    assert again.hits == 0


def test_a_change_during_a_run_is_noticed():
    model = adapted("l2", "all").train()
    source = Stored(model, Store(1e9))
    suffix = cutting.split(model, first_batch())
    source(suffix)
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.up_proj.weight.add_(1e-3)
    source.store.hits = 0
    source(suffix)
    assert source.store.hits == 0


def test_identity_is_that_of_content_and_order_and_not_of_the_adapter():
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        config = type("Config", (), {"to_dict": lambda self: {"a": 1}})()

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.arange(CHUNK + 5, dtype=torch.float32))

    one, two = Net(), Net()
    assert Identity(one).digest() == Identity(two).digest()
    with torch.no_grad():  # the same values in another order, in two different chunks
        two.weight[[0, CHUNK + 1]] = two.weight[[CHUNK + 1, 0]]
    assert Identity(one).digest() != Identity(two).digest()

    model = adapted()
    identity = Identity(model)
    before, stamp = identity.digest(), identity.stamp()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert (identity.digest(), identity.stamp()) == (before, stamp)
    model.get_base_model()(torch.tensor([[1, 2, 3]]))  # a pass is no change
    assert identity.stamp() == stamp


def test_weights_that_cannot_be_read_are_nobody_elses():
    with torch.device("meta"):
        model = tiny_llama()
    own = Identity(model).digest()
    assert own == Identity(model).digest()
    code = (
        "from tiny import tiny_llama; import torch; torch.set_default_device('meta');"
        "from reftune.model.identity import Identity; print(Identity(tiny_llama()).digest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="tests"
    )
    assert done.stdout.strip() != own and len(done.stdout.strip()) == 32


# Budget


def test_the_budget_holds_and_the_rest_is_recomputed(trainer_for, tmp_path):
    plain, _ = curve(trainer_for, long_rows(), Settings("off"), tmp_path / "a", max_steps=4)
    settings = Settings("store", budget=20_000)
    cached, _ = curve(trainer_for, long_rows(), settings, tmp_path / "b", max_steps=4)
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-5)
    store = Store(20_000)
    Stored(adapted().train(), store, start=True).build(batches(long_rows()))
    assert 0 < len(store) < 64 and 10_000 < store.nbytes <= 20_000


def test_a_full_store_takes_nothing_more():
    """What would still fit later would be there in one run, and not in a resumed one."""
    store = Store(100)
    assert store.put("a", {"x": torch.zeros(20)})
    assert not store.put("b", {"x": torch.zeros(20)})
    assert not store.put("c", {"x": torch.zeros(1)})
    assert store.put("a", {"x": torch.zeros(20)}) and len(store) == 1 and store.nbytes == 80


# On disk


def test_a_disk_store_survives_and_skips_what_is_broken(tmp_path):
    folder = tmp_path / "constants"
    model = adapted("l2", "all").train()
    first = filled(model, DiskStore(1e9, folder))
    next(iter(sorted(folder.glob("*.safetensors")))).write_bytes(b"broken")
    again = DiskStore(1e9, folder)
    assert len(again) == 4
    second = filled(model, again)
    assert (again.hits, again.misses) == (3, 1)
    for a, b in zip(first.prefix.layers, second.prefix.layers):
        assert torch.allclose(a.keys, b.keys, atol=1e-6)


def test_a_sealed_store_is_read_only_and_says_what_it_is_for(tmp_path):
    store = DiskStore(1e9, tmp_path)
    store.put("a", {"x": torch.zeros(3)})
    assert store.sealed is None
    store.seal("these rows")
    again = DiskStore(1e9, tmp_path)
    assert again.sealed == "these rows" and again.is_closed and len(again) == 1
    assert not again.put("b", {"x": torch.zeros(3)})
    again.empty()
    assert again.sealed is None and len(again) == 0
    assert again.put("b", {"x": torch.zeros(3)})


def test_a_run_on_other_rows_empties_the_folder(trainer_for, tmp_path):
    settings = Settings("store", folder=tmp_path / "constants")
    rows = type(long_rows())
    curve(trainer_for, long_rows(), settings, tmp_path / "a", max_steps=1)
    assert len(DiskStore(1e9, tmp_path / "constants")) == 64
    curve(trainer_for, rows(long_rows().rows[:8]), settings, tmp_path / "b", max_steps=1)
    assert len(DiskStore(1e9, tmp_path / "constants")) == 16


def test_half_written_files_are_not_read(tmp_path, monkeypatch):
    from reftune.training import constants

    def fails(tensors, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(constants, "save_file", fails)
    store = DiskStore(1e9, tmp_path)
    assert not store.put("a", {"x": torch.zeros(3)}) and store.is_closed
    assert list(tmp_path.iterdir()) == [] and store.get("a") is None


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(TrainingError, match="causal: recompute"):
        DiskStore(1e9, tmp_path / "file" / "constants")
