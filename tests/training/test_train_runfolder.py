"""Run folders: who may write where."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from reftune.config.loader import load
from reftune.errors import RecipeError, TrainingError
from reftune.training.checkpoints import STATE_FILE
from reftune.training.runfolder import RunFolder, changed_keys


def snapshot(path: Path):
    return {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


def checkpoint(folder: RunFolder):
    place = folder.stage_checkpoints(0) / "checkpoint-2"
    place.mkdir(parents=True)
    (place / STATE_FILE).write_text("{}")


def test_a_new_folder_holds_the_resolved_recipe(recipe):
    folder = RunFolder.open(recipe)
    assert load(folder.path / "recipe.yaml") == recipe
    assert not folder.is_finished and folder.stages == []


def test_environment_names_versions_but_no_person_or_place(recipe):
    folder = RunFolder.open(recipe)
    facts = folder.write_environment()
    assert {"reftune", "torch", "transformers", "peft", "python"} <= facts["versions"].keys()
    text = (folder.path / "environment.json").read_text()
    for private in (str(Path.home()), os.uname().nodename, str(folder.path)):
        assert private not in text


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_an_existing_run_is_refused_and_not_touched(recipe, state):
    folder = RunFolder.open(recipe)
    checkpoint(folder)
    if state == "finished":
        folder.finish()
    before = snapshot(folder.path)
    with pytest.raises(RecipeError, match=rf"holds an? {state} run.*Nothing there was touched"):
        RunFolder.open(recipe)
    assert snapshot(folder.path) == before


def test_remedies_fit_the_case(recipe):
    folder = RunFolder.open(recipe)
    checkpoint(folder)
    with pytest.raises(RecipeError, match=r"--resume.*--name"):
        RunFolder.open(recipe)
    folder.finish()
    with pytest.raises(RecipeError) as caught:
        RunFolder.open(recipe)
    assert "--resume" not in caught.value.remedy and "--overwrite" in caught.value.remedy


def test_overwrite_starts_afresh(recipe):
    folder = RunFolder.open(recipe)
    checkpoint(folder)
    folder.finish()
    again = RunFolder.open(recipe, overwrite=True)
    assert not again.is_finished and not again.checkpoints.exists()
    again.begin()
    assert [p.name for p in again.path.parent.iterdir()] == [again.path.name]
    again.abandon()  # too late
    assert (again.path / "state.json").is_file()


def test_a_run_that_fails_to_start_leaves_what_was_there(recipe):
    RunFolder.open(recipe).abandon()
    output = Path(recipe.output)
    assert list(output.iterdir()) == []
    folder = RunFolder.open(recipe)
    checkpoint(folder)
    folder.finish()
    folder.release()
    before = snapshot(output)
    again = RunFolder.open(recipe, overwrite=True)
    again.abandon()
    again.release()
    assert snapshot(output) == before


@pytest.mark.parametrize("moment", ["moved aside", "being set up"])
def test_a_run_whose_successor_was_killed_is_put_back(recipe, moment):
    folder = RunFolder.open(recipe)
    folder.finish()
    folder.release()
    before = snapshot(folder.path)
    RunFolder.open(recipe, overwrite=True).release()  # and nothing more
    if moment == "moved aside":
        shutil.rmtree(folder.path)
    with pytest.raises(RecipeError, match="holds a finished run"):
        RunFolder.open(recipe)
    assert snapshot(folder.path) == before
    assert [p.name for p in folder.path.parent.iterdir()] == [folder.path.name]


def test_a_run_that_never_got_to_a_checkpoint_is_started_again(recipe):
    RunFolder.open(recipe)
    changed = replace(recipe, seed=7)
    assert load(RunFolder.open(changed).path / "recipe.yaml").seed == 7


def test_resume(recipe, with_stage):
    assert not RunFolder.open(recipe, resume=True).is_finished  # nothing there: a start
    folder = RunFolder.open(recipe, resume=True)
    checkpoint(folder)
    RunFolder.open(replace(recipe, track=["wandb"]), resume=True)
    RunFolder.open(
        replace(recipe, evaluation=replace(recipe.evaluation, split="none")), resume=True
    )
    changed = with_stage(replace(recipe, seed=1), epochs=9)
    before = snapshot(folder.path)
    with pytest.raises(RecipeError, match=r"changed: (seed, )?stages\.0\.epochs(, seed)?\."):
        RunFolder.open(changed, resume=True)
    assert snapshot(folder.path) == before


def test_a_finished_run_cannot_be_resumed_with_another_evaluation(recipe):
    RunFolder.open(recipe).finish()
    other = replace(recipe, evaluation=replace(recipe.evaluation, max_new_tokens=9))
    with pytest.raises(RecipeError, match=r"changed: evaluation\.max_new_tokens"):
        RunFolder.open(other, resume=True)


def test_a_foreign_folder_is_never_touched(recipe):
    place = Path(recipe.output) / recipe.name
    place.mkdir(parents=True)
    (place / "thesis.txt").write_text("years of work")
    for more in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(RecipeError, match="is not the folder of a run"):
            RunFolder.open(recipe, **more)
    assert (place / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("text", ["{", "[]", '{"stages": 3}', '{"recipe": ["a"]}', "\xff"])
def test_damaged_state(recipe, text):
    folder = RunFolder.open(recipe)
    (folder.path / "state.json").write_bytes(text.encode("latin-1"))
    for more in ({}, {"resume": True}):
        with pytest.raises(TrainingError, match=r"state\.json cannot be read.*--overwrite"):
            RunFolder.open(recipe, **more)
    again = RunFolder.open(recipe, overwrite=True)
    assert json.loads((again.path / "state.json").read_text())["status"] == "running"


def test_a_full_disk_at_the_start(recipe, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reftune.training.runfolder.write_text_atomic", refuse)
    with pytest.raises(TrainingError, match=r"cannot be written.*No space left"):
        RunFolder.open(recipe)


def test_artefacts_of_stages(recipe):
    two = RunFolder(replace(recipe, stages=recipe.stages * 2))
    assert two.stage_artefact(0, "adapter").relative_to(two.path).as_posix() == "stages/1/adapter"
    assert two.stage_artefact(1, "adapter") == two.path / "adapter"
    assert two.stage_checkpoints(1).name == "stage-2"


def test_state_is_json(recipe):
    folder = RunFolder.open(recipe)
    folder.add_stage({"method": "loreft", "steps": 3})
    state = json.loads((folder.path / "state.json").read_text())
    assert state["status"] == "running" and state["stages"] == [{"method": "loreft", "steps": 3}]


def test_changed_keys():
    assert changed_keys({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == ["a.1.b"]
    assert changed_keys({"a": [1]}, {"a": [1, 2]}) == ["a"]
    assert changed_keys({"a": 1}, {"b": 1}) == ["a", "b"]


def test_a_folder_in_which_another_process_trains_is_refused(recipe):
    import subprocess
    import sys

    first = RunFolder.open(recipe)
    first.add_stage({"steps": 1})
    first.release()
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); "
        "f.write('process 7'); f.flush(); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(first.path / ".lock")], stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"held\n"
        for settings in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(RecipeError, match="being trained just now by process 7"):
                RunFolder.open(recipe, **settings)
        assert (first.path / "state.json").is_file()
    finally:
        other.kill()
        other.wait()
    again = RunFolder.open(recipe, resume=True)  # a killed process holds nothing
    again.release()
    assert not (again.path / ".lock").exists()
