"""`reftune diagnose reasoning`: on runs and adapters of any kind, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

QUICK = ("--size", 3, "--tokens", "0,2", "--probe-rows", 24, "--max-new-tokens", 4)
NONE = ("--set", "evaluation.split=none", "--set", "max_steps=1")


@pytest.fixture
def steps_file(tmp_path):
    """Test rows whose solutions have steps."""
    lines = [
        {"id": str(i), "prompt": f"{i}+1, times 3?", "completion": f" {i} + 1 = {i + 1}. "
         f"{i + 1} * 3 = {3 * i + 3}."}
        for i in range(4, 9)
    ]  # fmt: skip
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def trained(cli, recipe_file):
    code, _, err = cli("train", recipe_file, *NONE)
    assert code == 0, err
    return Path("runs/sums")


def test_a_run_on_its_own_task(cli, trained):
    code, out, err = cli("diagnose", "reasoning", trained, *QUICK)
    assert code == 0, err
    for words in ("Prefix quality", "adapter begins", "Number encoding", "R², base", "Alone: base"):
        assert words in out
    assert "No figures on error accumulation: No solution of these rows has steps" in out
    folder = Path("runs/diagnoses/runs-sums-own-test-n3-seed0")
    assert f"Page and pictures: {folder}/diagnosis.md" in out
    assert (folder / "plots/prefix.png").is_file() and (folder / "plots/numbers.png").is_file()
    assert "adapter runs/sums" in (folder / "diagnosis.md").read_text()
    again = cli("diagnose", "reasoning", trained, *QUICK)
    assert again[0] == 0  # an earlier diagnosis is replaced


def test_steps_of_a_file_and_json_alone_on_standard_output(cli, trained, steps_file):
    words = ("--task", steps_file, "--output", "mine", "--numbers", "additions", "--json")
    code, out, err = cli("diagnose", "reasoning", trained, *QUICK, *words)
    assert code == 0, err
    found = json.loads(out)
    assert found["folder"] == "mine" and found["rows"] == 3 and found["task"] == "own"
    assert [step["step"] for step in found["errors"]["steps"]] == [1, 2]
    assert found["errors"]["steps"][1]["wrong_rows"] == 3
    assert [p["tokens"] for p in found["prefix"]["points"]] == [0, 2, 0, 2]
    assert {**json.loads(Path("mine/diagnosis.json").read_text()), "folder": "mine"} == found
    assert Path("mine/plots/errors.png").is_file()


@pytest.mark.parametrize("method", ["lora", "red"])
def test_adapters_of_other_kinds_by_their_folder(cli, recipe_file, method):
    change = ("--set", f"adapter={{method: {method}}}", "--name", method)
    code, _, err = cli("train", recipe_file, *NONE, *change)
    assert code == 0, err
    words = ("--task", "held.jsonl", "--output", "d")
    code, out, err = cli("diagnose", "reasoning", f"runs/{method}/adapter", *QUICK, *words)
    assert code == 0 and "Alone: base" in out, err


def test_answers_are_as_long_as_in_the_run_unless_the_task_is_another(
    cli, recipe_file, trained, monkeypatch
):
    asked = []

    def seen(model, tokenizer, task, examples, spec, **more):
        asked.append((spec.max_new_tokens, spec.batch_size, len(examples), more["tokens"]))
        raise KeyboardInterrupt

    monkeypatch.setattr("reftune.inference.diagnose.diagnose_reasoning", seen)
    change = ("--set", "evaluation.max_new_tokens=7", "--set", "evaluation.samples=1")
    code, _, err = cli("train", recipe_file, *NONE, *change, "--name", "seven")
    assert code == 0, err
    run = ("diagnose", "reasoning", "runs/seven")
    for words in ((), ("--max-new-tokens", 3), ("--task", "families", "--batch-size", 2)):
        assert cli(*run, "--size", 4, "--tokens", "8,0", *words)[0] == 130
    assert asked == [(7, 32, 4, [0, 8]), (3, 32, 4, [0, 8]), (None, 2, 4, [0, 8])]


def test_what_cannot_be_diagnosed(cli, trained, model_folder, monkeypatch):
    monkeypatch.setattr(
        "reftune.inference.diagnose.diagnose_reasoning", lambda *_, **__: pytest.fail("diagnosed")
    )
    run = ("diagnose", "reasoning", trained)
    for words, code, text in (
        (("diagnose", "reasoning", "runs/nope"), 4, 'folder "runs/nope" does not exist'),
        (("diagnose", "reasoning", model_folder), 4, "has no adapter to compare with its base"),
        ((*run, "--size", 0), 2, "'--size': "),
        ((*run, "--tokens", "4,x"), 2, '--tokens is "4,x"'),
        ((*run, "--tokens", "-4"), 2, "First tokens to hand over: -4"),
        ((*run, "--numbers", "sums"), 2, 'no numbers "sums"'),
        ((*run, "--probe-rows", 3), 2, "3 prompts are too few"),
        ((*run, "--split", "train"), 2, 'no split "train" to diagnose'),
        ((*run, "--task", "famlies"), 2, 'Did you mean "families"?'),
        ((*run, "--task", "sst2"), 2, '"sst2" asks for classes'),
        ((*run, "--output", trained), 2, "holds other files than a diagnosis's"),
        ((*run, "--output", "held.jsonl"), 2, "held.jsonl is a file"),
    ):
        found = cli(*words)
        assert found[0] == code and text in found[2], (words, found)
        assert found[2].startswith("reftune: ")
    assert not Path("runs/diagnoses").exists()


def test_an_adapter_without_a_run_needs_a_task(cli, trained):
    code, _, err = cli("diagnose", "reasoning", trained / "adapter", *QUICK)
    assert code == 2 and "No task is given. Add --task NAME" in err


def test_a_task_without_numbers(cli, trained):
    words = ("--numbers", "task", "--task", "facts", "--size", 30)
    code, _, err = cli("diagnose", "reasoning", trained, *words)
    assert code == 3 and "prompts hold two numbers above 0; probes need 24" in err


def test_rows_that_were_trained_on_are_refused(cli, recipe_file, trained):
    lines = Path("rows.jsonl").read_text() * 4
    Path("rows.jsonl").write_text(lines)
    change = ("--set", "task.validation=null", "--name", "all")
    code, _, err = cli("train", recipe_file, *NONE, *change)
    assert code == 0, err
    code, _, err = cli("diagnose", "reasoning", "runs/all", "--split", "validation", *QUICK)
    assert code == 3 and "trained on all rows; the validation rows" in err


def test_help_teaches(cli):
    code, out, _ = cli("diagnose", "reasoning", "--help")
    assert code == 0 and "Examples" in out and "reftune diagnose reasoning runs/demo" in out
    for word in ("Prefix quality", "Number encoding", "Error accumulation", "consistent"):
        assert word in out
    code, out, err = cli("diagnose")
    assert code == 0 and "reasoning" in out and err == ""
    code, _, err = cli("diagnose", "resoning")
    assert code == 2 and "resoning" in err
