"""The training loop: exact resume, decay branch, release folder, gates' arithmetic."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

import reftune.nano as nano
from reftune.nano import gates, guided, release, sums
from reftune.nano.card import card
from reftune.nano.item import Item
from reftune.nano.shapes import build_model
from reftune.nano.tokenizer import load_tokenizer
from reftune.nano.train import Settings, newest, open_run, train

TINY = Settings(plan=1e4, step_tokens=300, warmup=2, checkpoint_tokens=600, rate=1e-3)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_resume_is_bit_equal(tmp_path: Path) -> None:
    whole = open_run(tmp_path / "whole", TINY)
    train(whole, tokens=1500)
    first = open_run(tmp_path / "parts", TINY)
    train(first, tokens=700)
    second = open_run(tmp_path / "parts", TINY, resume=True)
    assert 0 < second.tokens < whole.tokens
    train(second, tokens=1500)
    assert second.tokens == whole.tokens
    pairs = zip(whole.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_decay_branch_leaves_the_run_alone_and_releases(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", TINY)
    train(run, tokens=1500)
    before = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    folder = release.release(tmp_path / "run", tmp_path / "weights" / "nano")
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == before
    record = json.loads((folder / "training.json").read_text())
    start = record["settings"]["decay_start"]
    assert start == int(before[-1].split("-")[1].split(".")[0])
    assert record["tokens"] - start >= 0.15 * record["tokens"] * 0.9
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert "3.74 M parameters" in card("nano", folder)
    assert load_tokenizer(folder).chat_template


def test_rate_warms_up_stays_and_falls() -> None:
    constant = Settings(rate=1.0, warmup=10)
    assert [constant.rate_at(s, 10**9) for s in (0, 9, 10_000)] == [0.1, 1.0, 1.0]
    decay = Settings(rate=1.0, decay_start=8500)
    assert decay.decay_tokens == pytest.approx(1500)
    assert decay.rate_at(10_000, 8500) == 1.0
    assert decay.rate_at(10_000, 10_000) == 0.0


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    train(open_run(tmp_path, TINY), tokens=300)
    with pytest.raises(FileExistsError, match="--resume"):
        open_run(tmp_path, TINY)
    with pytest.raises(FileNotFoundError, match="No checkpoint"):
        newest(tmp_path / "nowhere")


def test_encoder_and_gpt2_train(tmp_path: Path) -> None:
    for name in ("nano-gpt2", "nano-encoder"):
        run = open_run(tmp_path / name, Settings(model=name, step_tokens=300, warmup=2))
        before = [p.detach().clone() for p in run.model.parameters()]
        run.train_step()
        run.train_step()
        losses = [total / n for total, n in run.sums.values()]
        assert all(7 < loss < 9 for loss in losses)
        moved = zip(before, run.model.parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in moved)


def test_unknown_names_say_what_exists() -> None:
    with pytest.raises(ValueError, match="Known: nano, nano-gpt2"):
        nano.path("nona")
    with pytest.raises(ValueError, match="Known: nano, nano-gpt2"):
        build_model("nona")


def test_wilson_against_known_values() -> None:
    assert gates.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert gates.wilson(90, 100) == pytest.approx((0.8256, 0.9448), abs=1e-4)


def test_bars_hold_on_the_right_side() -> None:
    assert gates.Bar(0.15, 0.60).holds(0.15) and not gates.Bar(0.15, 0.60).holds(0.61)
    assert gates.Bar(None, 0.03).holds(0.0) and not gates.Bar(None, 0.03).holds(0.05)
    row = gates.Gate("tokens per log line", 26.0, 25.0, 27.0, 9).row()
    assert row["holds"] is False and row["bar"] == "at most 25" and row["starred"] is False
    assert gates.Gate("far families, last number", 0.1, 0, 1, 9).row()["holds"] is None


@pytest.mark.parametrize("name", [*gates.DRAWS, "fact recall, shown phrasings", "one hop"])
def test_native_answers_are_right_and_others_wrong(name: str) -> None:
    items = gates.draw_items(name, 8)
    assert items == gates.draw_items(name, 8)
    for item in items:
        assert gates.is_right(item, item.answer), item
        assert not gates.is_right(item, "Perhaps."), item


def test_flawed_answers_are_judged_by_rule() -> None:
    item = guided.flawed(random.Random(1), "test")
    right = sums.problem(random.Random(1), "test", "known", 2).solution()
    assert gates.is_right(item, item.answer) and not gates.is_right(item, right)


def test_measures_run_on_an_untrained_model() -> None:
    measure = gates.Measure(build_model().eval(), load_tokenizer(), n=2, samples_n=1)
    for gate in (measure.plain("drills, unseen pairs"), *measure.facts()):
        assert gate.low <= gate.value <= gate.high


def test_warm_up_learns_and_leaves_the_model_alone() -> None:
    model, tokenizer = build_model().eval(), load_tokenizer()
    before = [p.detach().clone() for p in model.parameters()]
    item = Item("sums", "", (), "Who?", "yes yes.", "yes")
    tuned = gates.warm_up(model, tokenizer, [item] * 4, epochs=25, rate=3e-3, batch=4)
    assert gates.answers(tuned, tokenizer, [item], max_new=8) == ["yes yes."]
    assert (
        gates.answers(tuned, tokenizer, [item] * 2, temperature=0.01, max_new=8) == ["yes yes."] * 2
    )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_training_goes_on_from_released_weights(tmp_path) -> None:
    path = nano.path
    run = open_run(tmp_path / "run", Settings(), weights=path("nano"))
    record = json.loads((path("nano") / "training.json").read_text())
    assert run.tokens == record["tokens"] and run.step == 0
    assert run.settings.decay_start is None
    assert run.settings.rate_at(run.step, run.tokens) < run.settings.rate / 100
    wanted, _ = nano.load("nano", torch.float32)
    for (name, a), (_, b) in zip(wanted.named_parameters(), run.model.named_parameters()):
        assert torch.equal(a, b), name
    run.train_step()
    assert run.tokens > record["tokens"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["gates", "--model", "nosuch"], 'No embedded model is called "nosuch"'),
        (["gates", "--model", "nano-encoder"], "writes no answers"),
        (["sample", "nosuch"], 'No sub-world is called "nosuch"'),
        (["train", "--model", "nosuch", "--out", "x"], "Known: nano"),
        (["train", "--resume", "--out", "nowhere"], "No checkpoint in"),
        (["release", "--run", "nowhere"], "No checkpoint in"),
    ],
)
def test_commands_name_what_is_wrong(words, says, tmp_path, monkeypatch, capsys) -> None:
    from reftune.nano import __main__ as commands

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["reftune.nano", *words])
    with pytest.raises(SystemExit) as stopped:
        commands.main()
    text = capsys.readouterr().err
    assert stopped.value.code == 2 and says in text and "Traceback" not in text
    assert not list(tmp_path.iterdir())
