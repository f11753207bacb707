"""Causal caching in training: equal curves, the plan's rule, the store, refusals, resume."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny import tiny_llama
from transformers import TrainerCallback

from reftune.config.recipe import AdapterSpec
from reftune.errors import TrainingError
from reftune.model import causal as mechanism
from reftune.model.build import apply_adapter
from reftune.tasks.base import Example
from reftune.training import causal
from reftune.training.backward import set_checkpointing
from reftune.training.causal import Settings, Stored
from reftune.training.collate import Collator, prepare
from reftune.training.constants import DiskStore, Store, fingerprint
from reftune.training.encode import Rows, encode_all
from reftune.training.plan import Plan, make_plan

MODES = ("recompute", "store")


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.fixture(scope="module")
def long_rows(tokenizer):
    """32 ragged rows: prompts of 20 to 51 tokens, two to four answer tokens."""
    words = "a bird sat on the old wall and "
    rows = [Example(str(i), (words * 2)[: 19 + i] + f"{i}=", f" {2 * i}", "") for i in range(32)]
    return encode_all(rows, tokenizer, 96)


def adapted(positions="l2", layers="late", dropout=0.0, **model):
    spec = AdapterSpec(options={"rank": 2, "dropout": dropout}, positions=positions, layers=layers)
    return apply_adapter(tiny_llama(**{"layers": 4, **model}), spec, 0)


def curve(trainer_for, rows, settings, folder, model=None, **stage):
    model = adapted() if model is None else model
    trainer = trainer_for(model, rows, folder=folder, **stage)
    trainer.causal = settings
    trainer.train()
    return trainer, model


# Test 4 of the design: curves


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "layers"), [("recompute", "all"), ("store", "late")])
def test_curves_over_forty_epochs_are_the_plain_ones(
    long_rows, trainer_for, trained, tmp_path, mode, layers
):
    settings = {"epochs": 40, "lr": 1e-3}
    long_rows = Rows(long_rows.rows[::4])
    plain, a = curve(
        trainer_for, long_rows, Settings("off"), tmp_path / "a", adapted("l2", layers), **settings
    )
    cached, b = curve(
        trainer_for, long_rows, Settings(mode), tmp_path / "b", adapted("l2", layers), **settings
    )
    assert cached.plan.mode == mode and len(losses(plain)) == 40
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-5)
    for name, value in trained(a).items():
        assert torch.allclose(value, trained(b)[name], atol=2e-5), name


@pytest.mark.parametrize("mode", MODES)
def test_accumulation_and_checkpointing_give_the_same_curve(long_rows, trainer_for, tmp_path, mode):
    plain, _ = curve(trainer_for, long_rows, Settings("off"), tmp_path / "a", max_steps=6)
    model = adapted()
    set_checkpointing(model, True)
    cached, _ = curve(
        *(trainer_for, long_rows, Settings(mode), tmp_path / "b", model),
        max_steps=6, micro_batch_size=2,
    )  # fmt: skip
    assert cached.plan.mode == mode
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-5)


def test_bf16_goes_on_with_caching(long_rows, trainer_for, tmp_path):
    cached, _ = curve(
        trainer_for, long_rows, Settings("recompute"), tmp_path / "a", max_steps=4, precision="bf16"
    )
    plain, _ = curve(
        trainer_for, long_rows, Settings("off"), tmp_path / "b", max_steps=4, precision="bf16"
    )
    assert cached.plan.mode == "recompute"
    assert losses(cached) == pytest.approx(losses(plain), rel=2e-2)


def test_validation_sees_the_same_loss(long_rows, trainer_for, tmp_path):
    found = []
    for mode in ("off", "recompute", "store"):
        trainer = trainer_for(
            adapted(), long_rows, long_rows, folder=tmp_path / mode, max_steps=2, evaluate_every=2
        )
        trainer.causal = Settings(mode)
        trainer.train()
        found.append([x["eval_loss"] for x in trainer.state.log_history if "eval_loss" in x][-1])
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


# Resume


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise RuntimeError("crash")


@pytest.mark.parametrize("where", ["recompute", "memory", "disk"])
def test_resume_is_bit_equal(long_rows, trainer_for, trained, tmp_path, where):
    def settings(name):
        folder = tmp_path / f"constants-{name}" if where == "disk" else None
        return Settings("recompute" if where == "recompute" else "store", folder=folder)

    stage = {"checkpoint_every": 2, "epochs": 2}
    _, straight = curve(
        *(trainer_for, long_rows, settings("a"), tmp_path / "a", adapted(dropout=0.2)), **stage
    )
    broken = trainer_for(
        adapted(dropout=0.2), long_rows, folder=tmp_path / "b", callbacks=[StopAt()], **stage
    )
    broken.causal = settings("b")
    with pytest.raises(RuntimeError, match="crash"):
        broken.train()
    resumed = trainer_for(adapted(dropout=0.2), long_rows, folder=tmp_path / "b", **stage)
    resumed.causal = settings("b")
    resumed.train(True)
    if where == "disk":
        assert resumed.plan.mode == "store"
        assert DiskStore(1e9, tmp_path / "constants-b").files
    for name, value in trained(straight).items():
        assert torch.equal(value, trained(resumed.model)[name]), name


def test_a_run_on_disk_leaves_no_constants(recipe, with_stage):
    from dataclasses import replace
    from pathlib import Path

    from reftune.training.stages import train

    adapter = replace(recipe.stages[0].adapter, positions="last", layers="all")
    recipe = with_stage(recipe, adapter=adapter, causal="store", causal_store="disk")
    train(recipe, progress=False)
    folder = Path(recipe.output) / recipe.name
    assert not (folder / "constants").exists() and (folder / "adapter").is_dir()


# The plan


def batches(rows, size=8):
    collate = Collator()
    for start in range(0, len(rows), size):
        yield prepare(collate(rows.rows[start : start + size]))


def plan(rows, mode="auto", model=None, **options):
    model = (adapted() if model is None else model).train()
    return make_plan(model, batches(rows), mode, **options)


def test_auto_stores_what_is_used_often_and_fits(long_rows):
    found = plan(long_rows, uses=3)
    assert found.mode == "store" and found.start and found.l0 == 2
    assert 0.7 < found.constant_share < 0.95 and found.cost < 0.1
    assert "every row is used 3 times" in found.line() and "blocks 0 to 2" in found.line()


def test_auto_recomputes_what_is_used_seldom_or_does_not_fit(long_rows):
    seldom = plan(long_rows, uses=2)
    assert seldom.mode == "recompute" and "too seldom" in seldom.line()
    tight = plan(long_rows, uses=9, budget=1000)
    assert tight.mode == "recompute" and "do not fit into" in tight.line()


def test_auto_is_off_where_little_is_constant(rows, long_rows):
    early = plan(long_rows, model=adapted("f2+l2", "all"), uses=9)
    assert early.mode == "off" and "stands at token 0" in early.line()
    short = plan(rows, model=adapted("l2", "all"), uses=9)
    assert short.mode == "off" and "stands at token" in short.line()


def test_first_tokens_of_late_layers_are_stored_from_their_block_on(long_rows):
    found = plan(long_rows, model=adapted("f2+l2", "late"), uses=3)
    assert found.mode == "store" and found.start and found.constant_share == 0


def test_the_estimate_is_what_the_store_takes(long_rows):
    for layers in ("all", "late"):
        model = adapted("l2", layers).train()
        found = plan(long_rows, "store", model)
        source = causal.make_source(model, found)
        source.build(batches(long_rows))
        assert source.store.nbytes == pytest.approx(found.nbytes, rel=0.15), layers


def test_dead_edits_of_the_last_block_are_named(long_rows):
    found = plan(long_rows, model=adapted("l3", "all"))
    assert "64 of 96 edits of the last block (layer 3)" in found.dead
    assert not plan(long_rows, model=adapted("last", "all")).dead
    assert not plan(long_rows, model=adapted("l3", [0, 1])).dead


def test_what_was_asked_for_and_cannot_be_is_an_error(long_rows):
    model = adapted()
    next(model.get_base_model().parameters()).requires_grad_(True)
    assert "is trained too" in plan(long_rows, model=model).why
    for mode in MODES:
        with pytest.raises(TrainingError, match="is trained too"):
            plan(long_rows, mode, model)


def test_full_fine_tuning_goes_the_plain_way(long_rows, trainer_for, tmp_path):
    model = apply_adapter(tiny_llama(), AdapterSpec(method="full"), 0)
    trainer, _ = curve(trainer_for, long_rows, Settings(), tmp_path, model, max_steps=1)
    assert trainer.plan == Plan("off", "the model has no intervention")


def test_one_line_says_what_was_chosen(long_rows, trainer_for, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="reftune"):
        curve(trainer_for, long_rows, Settings(uses=5), tmp_path, max_steps=1)
    lines = [r.message for r in caplog.records if r.message.startswith("causal:")]
    assert len(lines) == 1 and "causal: store" in lines[0] and "agree to" in lines[0]


def test_paths_that_differ_fall_back_with_a_warning(
    long_rows, trainer_for, tmp_path, caplog, monkeypatch
):
    real = mechanism.prefill

    def wrong(model, prefix):
        cache = real(model, prefix)
        cache.layers[0].keys = cache.layers[0].keys + 0.5
        return cache

    monkeypatch.setattr(mechanism, "prefill", wrong)
    model = adapted("l2", "all")
    trainer, _ = curve(trainer_for, long_rows, Settings("recompute"), tmp_path, model, max_steps=1)
    assert trainer.plan.mode == "off" and "the run goes on without" in caplog.text


# Test 8: the store is keyed by content


def test_a_second_epoch_finds_everything(long_rows):
    model = adapted().train()
    source = Stored(model, Store(1e9), start=True)
    source.build(batches(long_rows))
    made = source.store.misses
    source.store.hits = source.store.misses = 0
    source.build(batches(long_rows, size=5))  # other batches, same rows
    assert made == 64 and source.store.misses == 0 and source.store.hits == 64


def test_rows_with_equal_prompts_share_an_entry(tokenizer):
    rows = encode_all([Example(str(i), "a" * 30, f" {i}", "") for i in range(6)], tokenizer, 64)
    source = Stored(adapted("l2", "all").train(), Store(1e9))
    source.build(batches(rows))
    assert len(source.store) == 1


@pytest.mark.parametrize("change", ["prompt", "base", "frozen adapter", "kernel"])
def test_a_stale_key_misses(long_rows, change):
    model = adapted("l2", "all").train()
    store = Store(1e9)
    rows = long_rows.rows[:4]
    batch = prepare(Collator()(rows))
    Stored(model, store)(mechanism.split(model, batch))
    store.hits = store.misses = 0
    if change == "prompt":
        batch.input_ids[:, 1] = 9
    elif change == "base":
        with torch.no_grad():
            model.get_base_model().model.layers[0].mlp.up_proj.weight[3, 3] += 1e-3
    elif change == "frozen adapter":
        other = apply_adapter(tiny_llama(layers=4), AdapterSpec(method="lora"), 0).get_base_model()
        assert fingerprint(other) != fingerprint(tiny_llama(layers=4))
        return
    else:
        model.get_base_model().set_attn_implementation("eager")
    Stored(model, store)(mechanism.split(model, batch))
    assert store.hits == 0 and store.misses == 4


def test_the_budget_holds_and_the_rest_is_recomputed(long_rows, trainer_for, tmp_path):
    plain, _ = curve(trainer_for, long_rows, Settings("off"), tmp_path / "a", max_steps=4)
    settings = Settings("store", budget=20_000)
    cached, _ = curve(trainer_for, long_rows, settings, tmp_path / "b", max_steps=4)
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-5)
    store = Store(20_000)
    source = Stored(adapted().train(), store, start=True)
    source.build(batches(long_rows))
    assert 0 < len(store) < 64 and store.nbytes <= 20_000
    assert causal.make_source(source.model, Plan("store", ""), Store(7)).store.budget == 7


def test_a_disk_store_survives_and_skips_what_is_broken(long_rows, tmp_path):
    folder = tmp_path / "constants"
    batch = prepare(Collator()(long_rows.rows[:4]))
    model = adapted("l2", "all").train()
    first = Stored(model, DiskStore(1e9, folder))(mechanism.split(model, batch))
    (folder / "half.part").write_bytes(b"x")
    next(iter(sorted(folder.glob("*.safetensors")))).write_bytes(b"broken")
    again = DiskStore(1e9, folder)
    assert len(again) == 4 and not (folder / "half.part").exists()
    second = Stored(model, again)(mechanism.split(model, batch))
    assert (again.hits, again.misses) == (3, 1)
    for a, b in zip(first.prefix.layers, second.prefix.layers):
        assert torch.allclose(a.keys, b.keys, atol=1e-6)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(TrainingError, match="causal: recompute"):
        DiskStore(1e9, tmp_path / "file" / "constants")
