"""Causal caching in training: equal curves, resume, and what happens where both paths differ."""

from __future__ import annotations

import json
import logging
from functools import cache

import pytest
import torch
from causal_parts import MODES, adapted, curve, long_rows, losses
from crashes import StopAt
from tiny import tiny_llama, tiny_tokenizer

from reftune.config.recipe import AdapterSpec
from reftune.errors import TrainingError
from reftune.model import causal as mechanism
from reftune.model.build import apply_adapter
from reftune.tasks.base import Example
from reftune.training import plan as plans
from reftune.training.backward import set_checkpointing
from reftune.training.causal import Settings, Stored
from reftune.training.constants import DiskStore
from reftune.training.encode import Rows, encode_all

# Test 4 of the design: curves


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "layers"), [("recompute", "all"), ("store", "late")])
def test_curves_over_forty_epochs_are_the_plain_ones(trainer_for, trained, tmp_path, mode, layers):
    settings = {"epochs": 40, "lr": 1e-3}
    rows = Rows(long_rows().rows[::4])
    plain, a = curve(
        trainer_for, rows, Settings("off"), tmp_path / "a", adapted("l2", layers), **settings
    )
    cached, b = curve(
        trainer_for, rows, Settings(mode), tmp_path / "b", adapted("l2", layers), **settings
    )
    assert cached.plan.mode == mode and len(losses(plain)) == 40
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-5)
    for name, value in trained(a).items():
        assert torch.allclose(value, trained(b)[name], atol=2e-5), name


@pytest.mark.parametrize("mode", MODES)
def test_accumulation_and_checkpointing_give_the_same_curve(trainer_for, tmp_path, mode):
    plain, _ = curve(trainer_for, long_rows(), Settings("off"), tmp_path / "a", max_steps=6)
    model = adapted()
    set_checkpointing(model, True)
    cached, _ = curve(
        *(trainer_for, long_rows(), Settings(mode), tmp_path / "b", model),
        max_steps=6, micro_batch_size=2,
    )  # fmt: skip
    assert cached.plan.mode == mode
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_bf16_goes_on_with_caching(trainer_for, tmp_path, mode, monkeypatch):
    stage = {"max_steps": 4, "precision": "bf16"}
    plain, _ = curve(trainer_for, long_rows(), Settings("off"), tmp_path / "b", **stage)
    made = []
    real = Stored._make
    monkeypatch.setattr(Stored, "_make", lambda self, *a: made.append(1) or real(self, *a))
    cached, _ = curve(trainer_for, long_rows(), Settings(mode), tmp_path / "a", **stage)
    assert cached.plan.mode == mode
    assert losses(cached) == pytest.approx(losses(plain), rel=2e-2)
    # Four batches are computed once: the precision of the build is that of the steps.
    assert len(made) == (4 if mode == "store" else 0)


def test_validation_sees_the_same_loss(trainer_for, tmp_path):
    found = []
    for mode in ("off", "recompute", "store"):
        trainer = trainer_for(
            *(adapted(), long_rows(), long_rows()),
            folder=tmp_path / mode, max_steps=2, evaluate_every=2,
        )  # fmt: skip
        trainer.causal = Settings(mode)
        trainer.train()
        found.append([x["eval_loss"] for x in trainer.state.log_history if "eval_loss" in x][-1])
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


# Resume


def settings(where, folder):
    if where == "recompute":
        return Settings("recompute")
    # "full" has room for some rows only: those it keeps must be the same ones after a resume.
    return Settings(
        "store",
        budget=15_000 if "full" in where else None,
        folder=folder if "disk" in where else None,
    )


@pytest.mark.parametrize("where", ["recompute", "memory", "disk", "full memory", "full disk"])
def test_resume_is_bit_equal(trainer_for, trained, tmp_path, where):
    stage = {"checkpoint_every": 2, "epochs": 2, "micro_batch_size": 4}
    _, straight = curve(
        *(trainer_for, long_rows(), settings(where, tmp_path / "constants-a"), tmp_path / "a"),
        adapted(dropout=0.2),
        **stage,
    )
    broken = trainer_for(
        adapted(dropout=0.2), long_rows(), folder=tmp_path / "b", callbacks=[StopAt()], **stage
    )
    broken.causal = settings(where, tmp_path / "constants-b")
    with pytest.raises(RuntimeError, match="crash"):
        broken.train()
    resumed = trainer_for(adapted(dropout=0.2), long_rows(), folder=tmp_path / "b", **stage)
    resumed.causal = settings(where, tmp_path / "constants-b")
    resumed.train(True)
    if "disk" in where:
        kept = len(DiskStore(1e9, tmp_path / "constants-b"))
        assert kept == len(DiskStore(1e9, tmp_path / "constants-a"))
        assert (0 < kept < 64) if "full" in where else kept == 64
    assert resumed.plan.mode == ("recompute" if where == "recompute" else "store")
    for name, value in trained(straight).items():
        assert torch.equal(value, trained(resumed.model)[name]), name


@cache
def shared_rows():
    """Return 24 rows of two prompts of different length, each twice in a row."""
    words = "a bird sat on the old wall and "
    prompts = [words[:20], (words * 2)[:50]]
    rows = [Example(str(i), prompts[i // 2 % 2], f" {i}", "") for i in range(24)]
    return encode_all(rows, tiny_tokenizer(), 96)


@pytest.mark.parametrize("settings", [Settings("recompute"), Settings("store", budget=1.0)])
@pytest.mark.parametrize("crash", [3, 5])
def test_resume_is_bit_equal_where_rows_share_prompts(
    trainer_for, trained, tmp_path, settings, crash
):
    """A prompt has other last bits in another batch, which a step must not hand to the next."""
    stage = {"checkpoint_every": 1, "max_steps": 9, "batch_size": 2, "micro_batch_size": 2}

    def wide():
        return adapted("l2", "all", dim=256)

    _, straight = curve(trainer_for, shared_rows(), settings, tmp_path / "a", wide(), **stage)
    broken = trainer_for(
        wide(), shared_rows(), folder=tmp_path / "b", callbacks=[StopAt(crash)], **stage
    )
    broken.causal = settings
    with pytest.raises(RuntimeError, match="crash"):
        broken.train()
    resumed, model = curve(
        *(trainer_for, shared_rows(), settings, tmp_path / "b", wide()), resume=True, **stage
    )
    assert resumed.plan.mode == settings.mode
    for name, value in trained(straight).items():
        assert torch.equal(value, trained(model)[name]), name


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_of_a_step_share_their_prompts(trainer_for, tmp_path, mode, monkeypatch):
    count, real = [], mechanism.prefill
    monkeypatch.setattr(mechanism, "prefill", lambda *some: count.append(1) or real(*some))
    rows = Rows(shared_rows().rows[::4] * 2)  # one prompt, 12 rows
    trainer = trainer_for(
        adapted("l2", "all"), rows, folder=tmp_path, batch_size=6, micro_batch_size=2, max_steps=4
    )
    trainer.causal = Settings(mode, budget=1.0)
    trainer.train()
    assert trainer.plan.mode == mode
    assert len(count) == 1 + 4  # to compare both paths, then one a step


def test_a_resumed_run_decides_as_the_interrupted_one_did(trainer_for, tmp_path, monkeypatch):
    """Free memory is another one by then, and would change which numbers are stored."""
    stage = {"checkpoint_every": 2, "epochs": 2}
    broken = trainer_for(
        adapted(), long_rows(), folder=tmp_path / "a", callbacks=[StopAt()], **stage
    )
    broken.causal = Settings(uses=9)
    with pytest.raises(RuntimeError, match="crash"):
        broken.train()
    file = tmp_path / "a" / "checkpoint-4" / plans.PLAN_FILE
    assert json.loads(file.read_text())["mode"] == broken.plan.mode == "store"
    monkeypatch.setattr(plans, "free_memory", lambda: 0.0)
    resumed = trainer_for(adapted(), long_rows(), folder=tmp_path / "a", **stage)
    resumed.causal = Settings(uses=9)
    resumed.train(True)
    assert resumed.plan.mode == "store" and resumed.plan.why == "as before the interruption"
    assert resumed.plan.budget == broken.plan.budget
    again = trainer_for(adapted(), long_rows(), folder=tmp_path / "b", **stage)
    again.causal = Settings(uses=9)
    again.train()
    assert again.plan.mode == "recompute"


def test_a_run_on_disk_leaves_no_constants(recipe, with_stage):
    from dataclasses import replace
    from pathlib import Path

    from reftune.training.stages import train

    adapter = replace(recipe.stages[0].adapter, positions="last", layers="all")
    recipe = with_stage(recipe, adapter=adapter, causal="store", causal_store="disk")
    train(recipe, progress=False)
    folder = Path(recipe.output) / recipe.name
    state = json.loads((folder / "state.json").read_text())
    assert [stage["causal"] for stage in state["stages"]] == ["store"]
    assert not (folder / "constants").exists() and (folder / "adapter").is_dir()


# What is said, and what happens where caching is wrong


def test_full_fine_tuning_goes_the_plain_way(trainer_for, tmp_path):
    model = apply_adapter(tiny_llama(), AdapterSpec(method="full"), 0)
    trainer, _ = curve(trainer_for, long_rows(), Settings(), tmp_path, model, max_steps=1)
    assert trainer.plan.line() == "causal: off (the model has no intervention)"


def test_one_line_says_what_was_chosen(trainer_for, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="reftune"):
        curve(trainer_for, long_rows(), Settings(uses=5), tmp_path, max_steps=1)
    lines = [r.message for r in caplog.records if r.message.startswith("causal:")]
    assert len(lines) == 1 and "causal: store" in lines[0] and "agree to" in lines[0]
    assert "of the arithmetic" in lines[0]


def wrong_values(model, prefix):
    cache = PREFILL(model, prefix)
    cache.layers[0].keys = cache.layers[0].keys + 0.5
    return cache


def no_values(model, prefix):
    raise RuntimeError("this architecture is new")


PREFILL = mechanism.prefill


@pytest.mark.parametrize(
    ("fault", "reason"), [(wrong_values, "both paths differ"), (no_values, "architecture is new")]
)
def test_paths_that_differ_or_fail_fall_back_with_a_warning(
    trainer_for, tmp_path, caplog, monkeypatch, fault, reason
):
    plain, _ = curve(
        *(trainer_for, long_rows(), Settings("off"), tmp_path / "a", adapted("l2", "all")),
        max_steps=2,
    )
    monkeypatch.setattr(mechanism, "prefill", fault)
    trainer, _ = curve(
        *(trainer_for, long_rows(), Settings(), tmp_path / "b", adapted("l2", "all")), max_steps=2
    )
    assert trainer.plan.mode == "off" and reason in trainer.plan.why
    assert "the run goes on without" in caplog.text and reason in caplog.text
    assert losses(trainer) == losses(plain)


def test_sharded_models_are_refused_by_name(trainer_for, tmp_path):
    trainer = trainer_for(adapted(), long_rows(), folder=tmp_path, max_steps=1)
    trainer.is_fsdp_enabled, trainer.causal = True, Settings(uses=9)
    trainer._settle(None)
    assert trainer.plan.mode == "off" and "sharded or replicated" in trainer.plan.why
    trainer.causal = Settings("store")
    with pytest.raises(TrainingError, match="store is not possible: the model is sharded"):
        trainer._settle(None)


def test_comparing_both_paths_is_no_step(trainer_for, tmp_path):
    """It draws no random numbers and leaves the objective's running statistics alone."""
    trainer = trainer_for(adapted(dropout=0.2), long_rows(), folder=tmp_path, max_steps=1)
    seen = {"calls": 0}
    real = trainer.objective.__call__

    class Counts(type(trainer.objective)):
        def __call__(self, *args):
            seen["calls"] += 1
            torch.rand(1)
            return real(*args)

        def state_dict(self):
            return dict(seen)

        def load_state_dict(self, state):
            seen.update(state)

    trainer.objective, trainer.causal = Counts(), Settings("recompute")
    before = torch.get_rng_state()
    trainer._settle(None)
    assert trainer.plan.mode == "recompute" and seen == {"calls": 0}
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(p.grad is not None for p in trainer.model.parameters())
