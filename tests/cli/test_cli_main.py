"""Exit codes, error lines and the light verbs: no model is loaded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from reftune.cli import main as entry
from reftune.errors import DataError, SiteError, TrainingError
from reftune.methods import catalogue

pytestmark = pytest.mark.quick

VERBS = [
    "demo",
    "train",
    "eval",
    "generate",
    "chat",
    "inspect",
    "sweep",
    "report",
    "methods",
    "recipes",
    "convert",
    "doctor",
    "diagnose",
]


def test_help_names_verbs_and_exit_codes(cli):
    code, out, _ = cli("--help")
    assert code == 0
    for verb in VERBS:
        assert verb in out
    assert "5 training" in out and "130 interrupted" in out
    assert cli()[1] == out  # no words: help too
    assert cli("--version")[1].startswith("reftune ")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_teaches_with_examples(cli, verb):
    code, out, _ = cli(verb, "--help")
    assert code == 0
    assert "Example" in out and f"reftune {verb}" in out


def test_usage_errors_are_one_line_with_the_next_step(cli):
    code, out, err = cli("trian")
    assert (code, out) == (2, "")
    assert err.startswith("reftune: No such command 'trian'. Did you mean 'train'?")
    assert cli("train")[0] == 2
    code, _, err = cli("train", "x.yaml", "--rnak", "3")
    assert code == 2 and "No such option: --rnak" in err and "`reftune train --help`" in err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (DataError("rows.csv is empty."), 3, "rows.csv is empty. -> docs/errors.md#data"),
        (SiteError("No block."), 4, "No block."),
        (TrainingError("NaN."), 5, "NaN."),
        (ValueError("odd\nsecond"), 1, "Unexpected ValueError: odd. Run again with --debug"),
        (OSError(28, "No space left on device"), 5, "No space left on the device"),
        (RuntimeError("write: No space left on device (os error 28)"), 5, "No space left on the"),
        (PermissionError(13, "Permission denied", "/x"), 1, "PermissionError: "),
        (RuntimeError("CUDA out of memory. Tried"), 5, "smaller micro_batch_size"),
    ],
)
def test_errors_become_one_line_and_a_code(cli, monkeypatch, error, code, text):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr("reftune.methods.catalogue", failing)
    got, out, err = cli("methods")
    assert (got, out) == (code, "")
    assert text in err and err.startswith("reftune: ") and err.count("\n") == 1
    assert "Traceback" not in err
    got, out, _ = cli("methods", "--json")
    assert json.loads(out)["error"]["exit_code"] == code
    for words in (("--debug", "methods"), ("methods", "--debug")):
        got, _, err = cli(*words)
        assert got == code and "Traceback" in err and "failing" in err and text in err


def test_only_training_is_said_to_go_on():
    full = OSError(28, "No space left on device")
    assert "--resume" in entry.translate(full, "train").remedy
    assert "--resume" not in entry.translate(full, "report").remedy


def test_a_terminal_without_utf_8_is_written_to():
    done = subprocess.run(
        [sys.executable, "-m", "reftune", "methods"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        timeout=120,
    )
    assert done.returncode == 0 and b"loreft" in done.stdout, done.stderr


def test_no_space_is_found_behind_other_errors():
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError as cause:
            raise RuntimeError("writer failed") from cause
    except RuntimeError as error:
        assert entry.no_space_left(error)
        assert entry.translate(error).exit_code == 5
    assert not entry.no_space_left(OSError(2, "missing"))


def test_interrupts_exit_with_130(cli, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("reftune.methods.catalogue", stopped)
    code, out, err = cli("methods")
    assert (code, out) == (130, "")
    assert "Interrupted" in err


def test_the_end_of_a_damaged_file_is_no_interrupt(cli, monkeypatch):
    def ended(*_, **__):
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")

    monkeypatch.setattr("reftune.methods.catalogue", ended)
    code, _, err = cli("methods")
    assert code == 1 and "Interrupted" not in err and "Compressed file ended" in err


@pytest.mark.parametrize(
    ("signals", "code", "text"),
    [
        (["SIGINT"] * 3, 130, "reftune: Interrupted."),
        (["SIGTERM"], 143, "reftune: Terminated."),
    ],
)
def test_signals_end_a_command_with_one_message(signals, code, text):
    script = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored under `nohup`
        "import reftune.methods\n"
        "from reftune.cli import main\n"
        "def slow(*_):\n"
        "    print('ready', flush=True)\n"
        "    try:\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        time.sleep(0.3)\n"  # what cleans up is not disturbed
        "reftune.methods.catalogue = slow\n"
        "main.run(['methods'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    for name in signals:
        process.send_signal(getattr(signal, name))
        time.sleep(0.05)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.startswith(text) and err.count("\n") == 1


def test_ctrl_c_before_the_verb_is_reported(cli, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(entry.Group, "make_context", stopped)
    code, _, err = cli("methods")
    assert code == 130 and "Interrupted" in err


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m reftune.cli.main methods --json | head -c 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=os.environ, timeout=120
    )
    assert done.stdout == "[" and "Traceback" not in done.stderr and "Broken" not in done.stderr


def test_methods_lists_all_nine_systems_honestly(cli):
    code, out, _ = cli("methods", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    systems = [name for name, row in rows.items() if row["system"]]
    assert systems == [
        "loreft",
        "brep",
        "baft",
        "grun",
        "reinforced",
        "carft",
        "nlft",
        "heft",
        "logad",
    ]
    assert rows["loreft"]["status"] == "available"
    assert rows["loreft"]["file"] == "interventions/loreft.py"
    assert rows["loreft"]["recipe"] == "demo"  # one that was run here
    for name in systems:
        assert rows[name]["source"]
        assert (rows[name]["status"] == "available") == bool(rows[name]["file"])
    assert rows["red"]["title"] == "RED" and "2402.15179" in rows["red"]["source"]
    assert rows["sft"]["kind"] == "objective" and rows["lora"]["kind"] == "baseline"
    assert "loreft" in cli("methods")[1]


def test_methods_reads_third_party_entries(monkeypatch):
    from reftune import interventions

    monkeypatch.setitem(interventions.REGISTRY._targets, "mine", "missing_package.file:Mine")
    mine = next(method for method in catalogue() if method.name == "mine")
    assert (mine.kind, mine.status, mine.file) == (
        "intervention",
        "available",
        "missing_package/file.py",
    )


def test_methods_available_only(cli):
    rows = json.loads(cli("methods", "--available", "--json")[1])
    assert rows and all(row["status"] == "available" for row in rows)


def test_tasks(cli):
    rows = json.loads(cli("methods", "--tasks", "--json")[1])
    names = [row["name"] for row in rows]
    assert {"own", "families", "gsm8k"} <= set(names) and all(row["about"] for row in rows)


def test_recipes_are_listed_shown_and_described(cli):
    rows = json.loads(cli("recipes", "--json")[1])
    assert "demo" in [row["name"] for row in rows]
    assert "task:" in cli("recipes", "--show", "demo")[1]
    assert json.loads(cli("recipes", "--show", "demo", "--json")[1])["recipe"]["model"]
    assert json.loads(cli("recipes", "--schema")[1])["title"] == "reftune recipe"
    code, _, err = cli("recipes", "--show", "dmo")
    assert code == 2 and 'Did you mean "demo"?' in err


def test_light_verbs_do_not_load_torch():
    words = "['methods', '--json'], ['recipes', '--json'], ['train', '--help']"
    code = (
        "import sys\nfrom reftune.cli.main import main\n"
        f"codes = [main(words) for words in ({words})]\n"
        "assert codes == [0, 0, 0], codes\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_checking_a_recipe_does_not_load_transformers(recipe_file):
    code = (
        "import sys\nfrom reftune.config.loader import load\n"
        f"load({str(recipe_file)!r})\n"
        "assert 'transformers' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_dry_run_prints_the_resolved_recipe(cli, recipe_file):
    code, out, err = cli("train", recipe_file, "--dry-run", "--set", "adapter.rank=1")
    assert code == 0 and "rank: 1" in out and "weight_decay: 0.0" in out
    assert "runs/sums" in err
    made = json.loads(cli("train", recipe_file, "--dry-run", "--json", "--seed", 7)[1])
    assert made["seed"] == 7 and made["name"] == "sums"


def test_recipe_faults_exit_with_2_and_are_listed_in_json(cli, recipe_file):
    words = ("train", recipe_file, "--set", "adapter.rnak=1", "--set", "epochs=x")
    code, out, err = cli(*words)
    assert (code, out) == (2, "")
    assert "has 2 faults" in err and 'Did you mean "rank"?' in err
    faults = json.loads(cli(*words, "--json")[1])["error"]["faults"]
    assert len(faults) == 2
    code, _, err = cli("train", "nothing.yaml")
    assert code == 2 and "There is no recipe nothing.yaml" in err


def test_interrupted_training_says_how_to_go_on(cli, recipe_file, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("reftune.training.stages.train", stopped)
    code, _, err = cli("train", recipe_file, "--set", "task.prompt={prompt} =", "--name", "x")
    assert code == 130
    assert f"reftune train {recipe_file} --set 'task.prompt={{prompt}} =' --name x --resume" in err


def test_bad_words_of_other_verbs(cli, recipe_file):
    code, _, err = cli("report", "runs/none")
    assert code == 3 and "does not exist" in err
    code, _, err = cli("sweep", recipe_file, "--grid", "adapter.rank")
    assert code == 2 and "Write --grid KEY=A,B,C" in err
    code, _, err = cli("generate", "nano")
    assert code == 2 and "There is no prompt" in err
    code, _, err = cli("eval", "nano")
    assert code == 2 and "Add --task NAME" in err
    code, _, err = cli("eval", "nano", "--task", "families", "--split", "train")
    assert code == 2 and "Use test or validation" in err
    code, _, err = cli("eval", "nano", "--task", "familie")
    assert code == 2 and 'Did you mean "families"?' in err
    code, _, err = cli("convert", "a", ".", "--model", "nano", "--positions", "l1")
    assert code == 2 and "exists already" in err
    code, _, err = cli("convert", "a", "b", "--model", "nano", "--positions", "x9")
    assert code == 4 and '"x9"' in err
