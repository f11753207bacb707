"""The plan of causal caching: the rule, its figures, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from causal_parts import MODES, adapted, batches, long_rows, plan
from tiny import tiny_llama, tiny_tokenizer

from reftune.config.recipe import AdapterSpec, StageSpec
from reftune.errors import TrainingError
from reftune.model.build import apply_adapter
from reftune.model.obstacles import SHARDED
from reftune.tasks.base import Example
from reftune.training import causal
from reftune.training import plan as plans
from reftune.training.causal import make_source
from reftune.training.constants import Store
from reftune.training.encode import Rows, encode_all
from reftune.training.plan import Plan, Settings, make_plan
from reftune.training.stage import causal_settings


def test_auto_stores_what_is_used_often_and_fits():
    found = plan(long_rows(), uses=3)
    assert found.mode == "store" and found.start and found.l0 == 2
    assert 0.7 < found.constant_share < 0.95 and found.cost < 0.1
    assert "every row is used 3 times" in found.line() and "blocks 0 to 2" in found.line()


def test_auto_recomputes_what_is_used_seldom_or_does_not_fit():
    seldom = plan(long_rows(), uses=2)
    assert seldom.mode == "recompute" and "too seldom" in seldom.line()
    tight = plan(long_rows(), uses=9, budget=1000)
    assert tight.mode == "recompute" and "do not fit into" in tight.line()


def test_auto_is_off_where_little_is_constant(rows):
    early = plan(long_rows(), model=adapted("f2+l2", "all"), uses=9)
    assert early.mode == "off" and "stands at token 0" in early.line()
    short = plan(rows, model=adapted("l2", "all"), uses=9)
    assert short.mode == "off" and "stands at token" in short.line()


def test_brep_as_published_edits_every_token_and_gains_nothing():
    spec = AdapterSpec("red", site="mlp.up_proj", positions="f8", train_positions="all")
    found = plan(long_rows(), uses=40, model=apply_adapter(tiny_llama(), spec, 0))
    assert found.mode == "off" and found.p0 == 0 and found.constant_share == 0


def test_first_tokens_of_late_layers_are_stored_from_their_block_on():
    found = plan(long_rows(), model=adapted("f2+l2", "late"), uses=3)
    assert found.mode == "store" and found.start and found.constant_share == 0


def test_the_estimate_is_what_the_store_takes():
    for layers in ("all", "late"):
        model = adapted("l2", layers).train()
        found = plan(long_rows(), "store", model)
        source = make_source(model, found)
        source.build(batches(long_rows()))
        assert source.store.nbytes == pytest.approx(found.nbytes, rel=0.15), layers
        assert source.store.budget == found.budget


def of_two_prompts(count):
    """Return rows that ask one of two questions."""
    words = ("a bird sat on the old wall and ", "a dog ran from the old house to ")
    examples = [Example(str(i), words[i % 2] + "=", f" {i}", "") for i in range(count)]
    return encode_all(examples, tiny_tokenizer(), 96)


@pytest.mark.parametrize("layers", ["all", "late"])
def test_the_estimate_counts_a_shared_prompt_once(layers):
    rows, model = of_two_prompts(36), adapted("l2", layers).train()
    found = plan(rows, "store", model)
    source = make_source(model, found)
    source.build(batches(rows))
    assert len(source.store) == (2 if layers == "all" else 2 + 36)
    assert source.store.nbytes == pytest.approx(found.nbytes, rel=0.15)


def test_rows_of_one_prompt_use_it_as_often():
    rows, model = of_two_prompts(36), adapted("l2", "all")
    settings = causal_settings(StageSpec(epochs=1), rows, None)
    assert (settings.uses, settings.samples) == (1, 18)
    found = plan(rows, model=model, uses=1)
    assert found.mode == "store" and "every prefix is used 18 times" in found.why
    assert plan(long_rows(), model=model, uses=1).mode == "recompute"
    # Block outputs are of one row: sharing prompts does not make them pay.
    assert plan(rows, model=adapted("f2", "late"), uses=1).mode == "off"


def test_a_sample_may_not_show_that_prompts_come_again():
    alone, again = plan(long_rows(), num_rows=320), plan(long_rows(), num_rows=320, samples=10)
    assert alone.mode == "recompute" and again.mode == "store"
    one = plan(long_rows())
    assert one.nbytes < again.nbytes < alone.nbytes == pytest.approx(10 * one.nbytes)


@pytest.mark.parametrize("mode", MODES)
def test_asking_for_constants_where_there_are_none_is_an_error(mode):
    early = adapted("f4+l4", "all")
    with pytest.raises(TrainingError, match=f"{mode} is not possible: no row has a token before"):
        plan(long_rows(), mode, early)
    assert plan(long_rows(), model=early).mode == "off"
    assert plan(long_rows(), mode, early, before=mode).mode == mode  # as it began


def test_block_outputs_can_be_stored_and_not_recomputed():
    late = adapted("f4+l4", "late")
    assert plan(long_rows(), "store", late).start
    with pytest.raises(TrainingError, match="recompute is not possible: no row has a token"):
        plan(long_rows(), "recompute", late)


def test_the_estimate_is_scaled_to_all_rows():
    one, many = plan(long_rows()), plan(long_rows(), num_rows=3200)
    assert many.nbytes == pytest.approx(100 * one.nbytes)


def test_dead_edits_of_the_last_block_are_named():
    found = plan(long_rows(), model=adapted("l3", "all"))
    assert "64 of 96 edits of the last block (layer 3)" in found.dead
    assert not plan(long_rows(), model=adapted("last", "all")).dead
    assert not plan(long_rows(), model=adapted("l3", [0, 1])).dead


def test_dead_edits_get_no_gradient():
    from reftune.model.run import Runner

    model = adapted("f2", [3]).train()
    assert "64 of 64 edits" in plan(long_rows(), model=model).dead
    Runner(model)(next(batches(long_rows()))).logits.logsumexp(-1).sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_what_was_asked_for_and_cannot_be_is_an_error():
    model = adapted()
    next(model.get_base_model().parameters()).requires_grad_(True)
    assert "is trained too" in plan(long_rows(), model=model).why
    for mode in MODES:
        with pytest.raises(TrainingError, match="is trained too"):
            plan(long_rows(), mode, model)
        with pytest.raises(TrainingError, match="sharded or replicated"):
            plan(long_rows(), mode, refusal=SHARDED)


def test_what_is_constant_is_told_also_where_it_is_not_used():
    for found in (plan(long_rows(), "off"), plan(long_rows(), refusal=SHARDED)):
        assert found.mode == "off" and found.cost == 1 and found.first_layer == 2
        assert found.constant_share > 0.7 and found.nbytes > 0
    facts = found.facts()
    assert list(facts) == [
        "mode", "first layer", "first token", "constant", "store", "speed-up", "dead"
    ]  # fmt: skip
    assert facts["first layer"] == "2 of 4, counted from 0; blocks 0 to 2 are constant"
    assert facts["speed-up"].startswith("none")
    assert facts["dead"].startswith("32 of 64 edits of the last block")


def test_the_words_of_a_plan_that_is_used():
    facts = plan(long_rows(), uses=40, model=adapted("last", "all"), budget=2**30).facts()
    assert facts["mode"] == "store (every row is used 40 times)"
    assert facts["first layer"] == "0 of 4, counted from 0; blocks 0 to 0 are constant"
    assert facts["first token"].endswith("(median row), counted from 0")
    assert facts["store"].endswith(" KiB for all rows, of 1 GiB allowed")
    assert float(facts["speed-up"].split()[1]) > 5
    assert facts["dead"] == "no edit is without a gradient"


def test_rows_that_cannot_be_cut_are_refused_by_name():
    model, some = adapted().train(), list(batches(long_rows()))
    some[1].attention_mask[0, 3] = 0  # a hole
    assert "have holes" in make_plan(model, some).why
    with pytest.raises(TrainingError, match="rows are packed, have holes"):
        make_plan(model, some, Settings("recompute"))
    packed = next(batches(long_rows()))
    packed.extra = {"position_ids": torch.zeros_like(packed.input_ids)}
    assert "are packed" in make_plan(model, [packed]).why


def test_edits_inside_a_block_leave_one_block_less():
    spec = AdapterSpec(method="red", positions="last", layers=[2, 3], site="mlp.up_proj")
    found = plan(long_rows(), model=apply_adapter(tiny_llama(layers=4), spec, 0))
    assert found.first_layer == 2 and found.l0 == 1


def test_room_is_half_of_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "free_memory", lambda: 800.0)
    assert Settings().room() == 400 and Settings(budget=7).room() == 7
    usage = type("Usage", (), {"free": 600})
    monkeypatch.setattr(plans.shutil, "disk_usage", lambda path: usage)
    assert Settings(folder=tmp_path / "not" / "there").room() == 300


def test_a_source_belongs_to_a_mode():
    model = adapted().train()
    assert make_source(model, Plan("off", "")) is None
    assert make_source(model, Plan("recompute", "")).held is None
    assert make_source(model, Plan("store", ""), Store(7)).store.budget == 7


def settled(model, settings, refusal=None):
    from torch.nn import functional as F

    from reftune.model.run import Runner

    def some(number):
        return batches(Rows(long_rows().rows[:number]))

    def loss(source):
        def compute():
            out = Runner(model, source)(next(batches(long_rows())))
            return F.cross_entropy(out.logits, out.labels)

        return compute

    return causal.settle(model, some, 32, loss, settings, refusal=refusal)


@pytest.mark.parametrize("is_fast", [True, False])
def test_auto_reads_from_a_disk_that_is_faster_than_computing(tmp_path, monkeypatch, is_fast):
    clock = iter([0.0, 1.0, 5.0, 5.5 if is_fast else 7.0])  # computing 1 s, reading 0.5 or 2 s
    monkeypatch.setattr(causal.time, "perf_counter", lambda: next(clock))
    found, source = settled(adapted(), Settings(uses=9, folder=tmp_path / "constants"))
    if is_fast:
        assert found.mode == "store" and len(source.store) == 64
    else:
        assert found.mode == "recompute" and "the disk reads" in found.why
        assert not (tmp_path / "constants").exists()
    assert list(tmp_path.iterdir()) == ([tmp_path / "constants"] if is_fast else [])


def test_a_batch_too_large_without_caching_is_not_compared(monkeypatch):
    def too_large(*args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(causal, "difference", too_large)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found, source = settled(adapted(), Settings("recompute"))
    assert found.mode == "recompute" and source is not None


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(plans, "free_memory", lambda: 800e6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    found, _ = settled(adapted(), Settings(uses=9))
    assert found.mode == "store" and found.budget == 100e6
