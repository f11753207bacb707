"""What is printed, in narrow windows and into files: nothing broken, cut, or said in vain."""

from __future__ import annotations

import importlib
import io
import json
import logging
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.console import Console

from reftune.cli.common import FILE_WIDTH, out, print_table
from reftune.report.model import Figure, Report
from reftune.report.tables import report_table

NONE = ("--set", "evaluation.split=none", "--set", "max_steps=1")
LONG = "one two three four five six seven eight nine ten eleven twelve\tthirteen\nsecond line"


@pytest.fixture
def trained(cli, recipe_file):
    code, _, err = cli("train", recipe_file, *NONE)
    assert code == 0, err
    return Path("runs/sums")


@pytest.fixture
def answering(monkeypatch):
    """Let every prompt be answered with a long text, `samples` times."""

    def answer(model, tokenizer, prompts, samples=1, **_):
        return [[LONG] * samples for _ in prompts]

    monkeypatch.setattr("reftune.cli.generate.load_any", lambda *_, **__: (None, None))
    monkeypatch.setattr("reftune.cli.generate.has_adapter", lambda _: True)
    monkeypatch.setattr("reftune.cli.generate.trained_form", lambda _: None)
    module = importlib.import_module("reftune.inference.generate")
    monkeypatch.setattr(module, "generate", answer)
    monkeypatch.setattr("reftune.model.off", nullcontext)
    monkeypatch.setenv("COLUMNS", "30")


# Answers


@pytest.mark.quick
def test_answers_are_printed_as_they_are(cli, answering):
    assert cli("generate", "any", "a")[1] == f"{LONG}\n"
    assert cli("generate", "any", "a" * 50, "b")[1] == f"{'a' * 50}\n{LONG}\n\nb\n{LONG}\n"
    assert cli("generate", "any", "a", "--base")[1] == f"base     {LONG}\nadapter  {LONG}\n"


@pytest.mark.quick
def test_samples_stand_apart(cli, answering):
    words = ("generate", "any", "a", "--temperature", 1, "--samples", 2)
    assert cli(*words)[1] == f"--- 1 of 2\n{LONG}\n--- 2 of 2\n{LONG}\n"
    assert "--- base 2 of 2\n" in cli(*words, "--base")[1]
    assert "--- adapter 1 of 2\n" in cli(*words, "--base")[1]


def test_paths_are_not_broken(cli, trained, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    out.cache_clear()
    place = "a-long-folder/with-a-long-name-inside"
    code, shown, err = cli("eval", trained, "--size", 1, "--output", place)
    assert code == 0, err
    assert f"Read answers: {place}/predictions.jsonl\n" in shown
    out.cache_clear()


def test_a_run_without_answers_names_none(cli, recipe_file):
    code, shown, _ = cli("train", recipe_file, *NONE)
    assert code == 0 and "Read answers" not in shown and "reftune chat runs/sums" in shown
    shown = cli("train", recipe_file, "--overwrite")[1]
    assert "Read answers   runs/sums/predictions.jsonl" in shown


# Tables


def report(name):
    share = Figure(mean=0.724, n=500, low=0.7, high=0.75)
    figures = {f"{who}_{what}": share for who in ("base", "adapter") for what in ("accuracy", "f1")}
    costs = {"trainable_parameters": 24_640, "trainable_fraction": 0.0066}
    costs |= {"adapter_bytes": 100_000, "train_seconds": 192}
    return Report(name=name, task="families", methods=["loreft"], figures=figures, **costs)


@pytest.mark.quick
@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_narrow_tables_cut_no_word(width):
    table = report_table([report("families-loreft-s1")])
    console = Console(width=width, file=io.StringIO())
    console.print(table.to_rich(width))
    shown = console.file.getvalue()
    head, left_out = shown.splitlines()[1], shown.partition("No room here for: ")[2]
    assert "…" not in shown and max(map(len, shown.splitlines())) <= width
    named = re.findall(r"\w+", left_out.partition(".")[0])
    assert {*head.split(), *named} == set(table.columns)
    assert (width >= 160) == (not named) and {"run", "accuracy", "f1"} <= set(head.split())
    assert "families-loreft-s1" in shown and "72.4" in shown


@pytest.mark.quick
def test_tables_in_files_are_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    print_table(report_table([report("families-loreft-s1")]))
    lines = [line for line in capsys.readouterr().out.splitlines() if "families-loreft-s1" in line]
    assert len(lines) == 2 and "3 min 12 s" in lines[1] and len(lines[1]) < FILE_WIDTH


def test_reports_leave_unfinished_folders_out(cli, trained):
    for name in ("half", "evaluations/x", "sweep"):
        (trained.parent / name).mkdir(parents=True)
    (trained.parent / "notes.txt").write_text("mine")
    every = sorted(map(str, trained.parent.iterdir()))
    code, shown, err = cli("report", *every, "--json")
    assert code == 0, err
    assert [run["folder"] for run in json.loads(shown)["runs"]] == [str(trained)]
    for name in ("half", "evaluations", "sweep", "notes.txt"):
        assert f"runs/{name} is left out" in err
    assert cli("report", *every, "--seeds", "--curves", "a.png")[0] == 0
    code, _, err = cli("report", "runs/half", "runs/sweep")
    assert code == 3 and "None of the 2 places holds a report.json" in err
    code, _, err = cli("report", trained, "runs/summs")  # a typo is no unfinished run
    assert code == 3 and "runs/summs does not exist" in err
    assert cli("report", "runs/half")[0] == 3


# Rows that do not fit


@pytest.fixture
def long_rows(recipe_file):
    rows = [{"prompt": f"{i}+{i}=", "completion": " 7" * (5 + 40 * (i == 3))} for i in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe_file


def test_inspect_shows_rows_that_do_not_fit(cli, long_rows):
    words = ("inspect", long_rows, "--set", "max_len=40", "--rows", 1)
    code, shown, err = cli(*words)
    assert code == 0, err
    assert "own-train-3  5 prompt + 91 learned tokens, does not fit: it needs max_len 93" in shown
    assert "7 train rows" in shown and "... and 56 tokens more" in shown
    assert "1 more rows have a target that does not fit into max_len 40" in shown
    assert "Set max_len to at least 93" in shown and "--option drop_longer=89 " in shown
    stage = json.loads(cli(*words, "--json")[1])["stages"][0]
    assert [row["needs_max_len"] for row in stage["rows"]] == [None, 93]
    assert stage["summary"]["targets_too_long"] == 1
    shown = cli(*words, "--set", "task.train=rows.jsonl", "--set", "max_len=6")[1]
    assert "0 train rows" in shown and "8 more rows" in shown


def test_what_the_context_forbids_is_not_recommended(cli, long_rows, tmp_path):
    from tiny import tiny_folder

    small = tiny_folder(tmp_path / "small", max_position_embeddings=64)
    words = ("inspect", long_rows, "-m", small, "--set", "max_len=40", "--rows", 1)
    shown = cli(*words)[1]
    assert "Set max_len" not in shown
    assert f"They need max_len 93, but the context of {small} is 64; or leave them out" in shown
    words = ("--set", f"model={small}", "--set", "max_len=40", *NONE)
    code, _, err = cli("train", long_rows, *words)
    assert code == 3 and "Set max_len" not in err.partition("rows have")[2].partition("-> ")[0]
    assert "They need max_len 93; the context of this model is 64" in err


def test_long_rows_can_be_left_out(cli, long_rows):
    words = ("--set", "max_len=40", *NONE)
    code, _, err = cli("train", long_rows, *words)
    assert code == 3 and "Set max_len to at least 93" in err and "task.drop_longer" in err
    code, _, err = cli("train", long_rows, *words, "--set", "task.drop_longer=89")
    assert code == 0, err
    assert "1 of 8 train rows have more than 89 characters to learn: left out" in err
    shown = cli("inspect", long_rows, "--set", "max_len=40", "--option", "drop_longer=89")[1]
    assert "7 train rows" in shown and "does not fit" not in shown


@pytest.fixture
def alarms():
    """What transformers' tokenizers say; its own handler is no business of capsys."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    tokenizers = logging.getLogger("transformers.tokenization_utils_base")
    tokenizers.addHandler(handler)
    yield found
    tokenizers.removeHandler(handler)


def test_no_false_alarm_of_tokenizers(cli, model_folder, recipe_file, alarms):
    file = model_folder / "tokenizer_config.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), "model_max_length": 4}))
    try:
        for words in (
            ("train", recipe_file, *NONE),
            ("inspect", recipe_file),
            ("generate", model_folder, "1+1=2, 2+2=", "--max-new-tokens", 1),
        ):
            code, _, err = cli(*words)
            assert code == 0 and alarms == [], err
            cli("--debug", *words, *(["--overwrite"] if words[0] == "train" else []))
            assert "indexing errors" in alarms.pop()
            alarms.clear()
    finally:
        file.write_text(before)
