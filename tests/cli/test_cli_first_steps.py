"""What newcomers run into: wrong places, faults that should be found before the work."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

NONE = ("--set", "evaluation.split=none", "--set", "max_steps=1")


@pytest.fixture
def trained(cli, recipe_file):
    code, _, err = cli("train", recipe_file, *NONE)
    assert code == 0, err
    return Path("runs/sums")


@pytest.fixture
def no_scoring(monkeypatch):
    """Let scoring fail the test: what is wrong must be found before."""
    import reftune.cli.eval as verb

    def scored(*_, **__):
        raise AssertionError("scored")

    monkeypatch.setattr(verb, "_evaluate_all", scored)


def test_scores_do_not_replace_what_is_no_evaluation(cli, trained, no_scoring):
    before = (trained / "state.json").read_bytes()
    code, _, err = cli("eval", trained, "--output", trained)
    assert code == 2 and "holds a run" in err
    assert (trained / "state.json").read_bytes() == before
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("x")
    code, _, err = cli("eval", trained, "--output", "mine")
    assert code == 2 and "other files than an evaluation's: thesis.txt" in err
    code, _, err = cli("eval", trained, "--output", "held.jsonl")
    assert code == 2 and "is a file" in err


def test_both_models_are_looked_for_before_the_first_is_scored(cli, trained, model_folder):
    code, _, err = cli("eval", trained, "--against", "runs/nope")
    assert code == 4 and 'folder "runs/nope" does not exist' in err
    words = ("eval", model_folder, "--task", "held.jsonl", "--against", "base")
    code, _, err = cli(*words)
    assert code == 3 and "no adapter to switch off" in err
    assert not Path("runs/evaluations").exists()


def test_a_sweep_refuses_a_metric_before_it_trains(cli, recipe_file, monkeypatch):
    monkeypatch.setattr("reftune.training.stages.train", lambda *_, **__: pytest.fail("trained"))
    code, _, err = cli("sweep", recipe_file, "-g", "adapter.rank=1,2", "--metric", "foo")
    assert code == 2 and 'no metric "foo". Known: accuracy, validation_loss' in err


def test_a_sweep_on_a_full_disk_recommends_nothing(cli, recipe_file, monkeypatch):
    from reftune.errors import TrainingError
    from reftune.training import stages

    real = stages.train

    def train(recipe, **words):
        if recipe.stages[0].adapter.options["rank"] == 2:
            raise TrainingError("runs/x could not be written: No space left on device.", "Free it.")
        return real(recipe, **words)

    monkeypatch.setattr(stages, "train", train)
    words = ("sweep", recipe_file, "-g", "adapter.rank=1,2", "--set", "max_steps=1")
    code, out, err = cli(*words)
    assert code == 5 and "1 of 2 cells could not be written" in err
    assert "Train the best" not in out


def test_a_dry_run_refuses_rewards_and_lengths_that_cannot_be(cli, recipe_file):
    code, _, err = cli("train", recipe_file, "--dry-run", "--set", "task.reward=nummeric")
    assert code == 2 and 'there is no reward "nummeric". Did you mean "numeric"?' in err
    code, _, err = cli("train", recipe_file, "--dry-run", "--set", "task.options.max_new_tokens=0")
    assert code == 2 and "max_new_tokens: 0 is not above 0" in err


def test_another_file_is_asked_in_the_form_of_the_run(cli, recipe_file):
    rows = [{"q": f"{i}+{i}=", "a": f" {2 * i}"} for i in range(8)]
    for name in ("rows", "val", "held", "other"):
        Path(f"{name}.jsonl").write_text(
            "".join(json.dumps(row | {"id": f"{name}{i}"}) + "\n" for i, row in enumerate(rows))
        )
    form = ("task.prompt=Sum {q}", "task.completion=a", "task.reward=numeric")
    code, _, err = cli("train", recipe_file, *NONE, *(w for f in form for w in ("--set", f)))
    assert code == 0, err
    words = ("eval", "runs/sums", "--max-new-tokens", 1)
    code, out, err = cli(*words, "--task", "other.jsonl", "--json")
    assert code == 0, err
    assert "prompt=Sum {q}" in err and "Warning" not in err
    folder = Path(json.loads(out)["folder"])
    first = json.loads((folder / "predictions.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == "Sum 0+0="
    code, out, err = cli(*words, "--task", "rows.jsonl", "--option", "prompt=q", "--json")
    assert code == 0 and "rows.jsonl is what the run was trained on" in err
    folder = Path(json.loads(out)["folder"])
    first = json.loads((folder / "predictions.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == "0+0="


def test_wrong_folders_say_what_they_are(cli, trained, recipe_file):
    def said(what):
        code, out, err = cli("generate", what, "a")
        assert code == 4 and out == "" and "Couldn't instantiate" not in err, err
        return err

    Path("empty").mkdir()
    assert "the folder is empty" in said("empty")
    assert "there is no config.json in it" in said(".")
    shutil.copytree(trained, "runs/gone")
    shutil.rmtree("runs/gone/adapter")
    assert "is a run without adapter/" in said("runs/gone")
    state = Path("runs/gone/state.json")
    state.write_text(state.read_text().replace('"finished"', '"running"'))
    assert "unfinished run" in said("runs/gone")
    assert "reftune train runs/gone/recipe.yaml --resume" in said("runs/gone")
    shutil.copytree(trained / "adapter", "bare")
    Path("bare/adapter_config.json").unlink()
    assert "but no adapter_config.json" in said("bare")
    shutil.copytree(trained / "adapter", "parts/reft")
    assert "but no stack.json" in said("parts")
    words = ("train", recipe_file, *NONE, "--name", "x", "--set", f"model.name={trained}")
    code, _, err = cli(*words)
    assert code == 4 and "is a run with an adapter, no base model" in err


def test_what_is_no_text_is_refused(cli, trained, monkeypatch):
    for words in (("generate", trained, "a\udcffb"), ("generate", trained, "-")):
        monkeypatch.setattr("sys.stdin", io.StringIO("a\udcffb\n"))
        code, _, err = cli(*words)
        assert code == 3 and "Prompt 0 is no UTF-8 text: character" in err, err
    lines = iter(["a\udcffb", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, _, err = cli("chat", trained, "--max-new-tokens", 2)
    assert code == 0 and "is no UTF-8 text" in err
    for prompt in (None, 3, {"a": 1}):
        Path("n.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
        code, _, err = cli("generate", trained, "-f", "n.jsonl")
        assert code == 3 and "line 1 has no prompt" in err


def test_a_head_that_does_not_fit_is_refused(cli, trained):
    code, _, err = cli("eval", trained, "--head", "classification")
    assert code == 2 and "Leave --head out" in err
    code, _, err = cli("generate", trained, "a", "--head", "classification")
    assert code == 4 and "Leave --head out" in err


def test_another_base_model_for_an_adapter(cli, trained, model_folder):
    config = trained / "adapter/adapter_config.json"
    shutil.copytree(trained / "adapter", "alone")
    values = json.loads(config.read_text()) | {"base_model_name_or_path": None}
    Path("alone/adapter_config.json").write_text(json.dumps(values))
    code, _, err = cli("generate", "alone", "1+1=")
    assert code == 4 and "Add --base-model MODEL" in err and "model=." not in err
    words = ("--base-model", model_folder, "--max-new-tokens", 2)
    code, _, err = cli("generate", "alone", "1+1=", *words)
    assert code == 0, err
    code, _, err = cli("generate", model_folder, "1+1=", *words)
    assert code == 2 and "Leave --base-model out" in err


def test_names_without_a_network_are_answered_at_once(cli, recipe_file, monkeypatch):
    from huggingface_hub import HfApi, constants

    asked = []

    def unreachable(self, name, **_):
        asked.append(name)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", unreachable)
    code, _, err = cli("generate", "nano2", "a")
    assert code == 4 and 'Did you mean "nano"?' in err and not asked
    for name in ("nope", "some/model"):
        code, _, err = cli("generate", name, "a")
        assert code == 4 and "the hub cannot be reached" in err and asked == [name]
        asked.clear()
    code, _, err = cli("train", recipe_file, "--set", "model.name=nope")
    assert code == 4 and "the hub cannot be reached" in err
    code, _, err = cli("generate", "no model!", "a")
    assert code == 4 and "neither a folder nor a hub name" in err


def test_flags_that_contradict_each_other_are_refused(cli, recipe_file, model_folder):
    ask = ("generate", model_folder, "a")
    for words, text in (
        ((*ask, "--stop", ""), "would end every answer"),
        ((*ask, "--base"), "is no adapter: there is only one model"),
        ((*ask, "--temperature", "inf"), "--temperature is inf"),
        ((*ask, "--top-p", 0), "--top-p is 0"),
        ((*ask, "--template", "Q {prompt}", "--chat-template"), "Choose one"),
        (("chat", model_folder, "--temperature", "inf"), "--temperature is inf"),
        (("train", recipe_file, "--resume", "--overwrite"), "Choose one"),
    ):
        code, out, err = cli(*words)
        assert (code, out) == (2, "") and text in err, (words, err)


def test_faults_are_told_once_and_name_what_is_coming(cli, recipe_file):
    code, _, err = cli("train", recipe_file, "--dry-run", "--set", "adapter.tied=maybe")
    assert code == 2 and "has 1 fault:" in err and "AdapterSpec" not in err
    code, _, err = cli("train", recipe_file, "--dry-run", "--set", "adapter.method=baft")
    assert code == 2 and 'the method "baft" is coming' in err
    Path("grid.yaml").write_text("name: g\nrecipe: sums.yaml\nrows:\n  - {method: base}\n")
    code, _, err = cli("train", "grid.yaml")
    assert code == 2 and "python -m reftune.report.grid grid.yaml" in err
