"""`reftune judge` on the command line, and what is trained on its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def data(tmp_path):
    lines = [json.dumps({"prompt": f"{i}+{i}=", "completion": f" {2 * i}"}) for i in range(12)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def rows(path="judged.jsonl"):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def test_a_file_of_own_rows_becomes_judged_answers(cli, model_folder, data):
    words = ("judge", data, "--model", model_folder, "--size", 8, "--max-new-tokens", 3)
    code, out, err = cli(*words, "--batch-size", 4)
    assert code == 0, err
    found = rows()
    assert f"{len(found)} answers" in out and "with a judgment" in out
    assert {"id", "instruction", "input", "output", "judgment", "answer", "gold"} == set(found[0])
    assert found[0]["input"].endswith("=") and found[0]["answer"]
    assert "task.base='{input}'" in err
    code, _, err = cli(*words)
    assert code == 2 and "judged.jsonl exists already" in err
    code, out, _ = cli(*words, "--overwrite", "--json", "--judge", "self")
    facts = json.loads(out)
    assert code == 0 and facts["rows"] == facts["right"] + facts["wrong"] == len(rows())


def test_answers_by_chat_are_trained_on(cli, model_folder, data):
    words = ("judge", data, "--model", model_folder, "--chat", "--instruction", "Add.")
    code, _, err = cli(*words, "--max-new-tokens", 4, "--out", "chat.jsonl")
    assert code == 0 and "{name: judged, chat: true}" in err, err
    assert {row["instruction"] for row in rows("chat.jsonl")} == {"Add."}
    Path("nlft.yaml").write_text(
        f"model: {model_folder}\n"
        "task: {name: judged, train: chat.jsonl, test: held.jsonl, chat: true, max_new_tokens: 3}\n"
        "adapter: {method: loreft, rank: 2, positions: f2+l2}\n"
        "objective: nlft\nmax_steps: 2\nbatch_size: 4\nthreads: 1\n"
    )
    Path("held.jsonl").write_text('{"input": "1+1", "answer": "2"}\n')
    code, _, err = cli("train", "nlft.yaml")
    assert code == 0, err
    assert Path("runs/nlft/plots/saliency.html").is_file()
    code, out, err = cli("inspect", "nlft.yaml", "-n", 1)
    assert code == 0 and "Add." in out.replace("<", "").replace(">", "").title(), err


@pytest.mark.quick
@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--judge", "gpt"), '"gpt" is no address'),
        (("--judge", "http://x/v1"), "is not named"),
        (("--judge-model", "m"), "is for an address"),
        (("--instruction", "x"), "is a system prompt"),
        (("--out", "x.csv"), "ends in .jsonl"),
        (("--temperature", "inf"), "--temperature is inf"),
    ],
)
def test_flags_that_mean_nothing_are_refused(cli, data, more, told):
    code, _, err = cli("judge", data, "--model", "nano", *more)
    assert code == 2 and told in err


@pytest.mark.quick
def test_tasks_without_generated_answers_are_refused(cli, data):
    Path("labels.csv").write_text("text,label\na,b\n")
    code, _, err = cli("judge", "labels.csv", "-m", "nano", "-o", "label=label", "-o", "text=text")
    assert code == 2 and "no generated answers" in err
