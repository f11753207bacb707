"""`reftune sample` on the command line, and what is trained on its file: also to rerank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SHORT = ("--samples", 3, "--max-new-tokens", 3, "--batch-size", 8)


def rows(path="samples.jsonl"):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


@pytest.fixture
def run(cli, recipe_file):
    """A run on own sums."""
    code, _, err = cli("train", recipe_file)
    assert code == 0, err
    return "runs/sums"


def test_a_run_is_asked_in_its_own_form_without_rows_it_held_out(cli, run, recipe_file):
    code, out, err = cli("sample", run, *SHORT, "--keep", "all", "--gold")
    assert code == 0, err
    found = rows()
    right = sum(row["right"] for row in found)
    assert f"{len(found)} answers to 16 of 16 questions, {right} right" in out
    assert {row["prompt"] for row in found} == {f"{i}+{i}=" for i in range(16)}
    assert {row["split"] for row in found} == {"train"} and right >= 16
    code, _, err = cli("sample", run, *SHORT)
    assert code == 2 and "samples.jsonl exists already" in err
    more = ("--overwrite", "--json", "--gold", "--size", 4)
    code, out, err = cli("sample", run, *SHORT, *more)
    facts = json.loads(out)
    assert code == 0 and facts["questions"] == facts["kept"] == 4, err
    assert facts["rows"] == facts["right"] == len(rows()) and facts["wrong"] == 0
    recipe = recipe_file.read_text().replace("validation: val.jsonl, ", "")
    recipe_file.write_text(recipe.replace("test: held.jsonl", "holdout: 1"))
    code, _, err = cli("train", recipe_file, "--overwrite", "--set", "keep=best")
    assert code == 0, err
    code, _, err = cli("sample", run, *SHORT, "--gold", "--out", "fewer.jsonl")
    assert code == 0 and len({row["prompt"] for row in rows("fewer.jsonl")}) == 15, err


def test_test_rows_are_asked_by_name_and_never_trained_on(cli, run, model_folder):
    code, _, err = cli("sample", run, *SHORT, "--split", "test", "--gold")
    assert code == 0, err
    found = rows("samples_test.jsonl")
    assert {row["split"] for row in found} == {"test"}
    assert {row["prompt"] for row in found} == {f"{i}+{i}=" for i in range(22, 30)}
    Path("st.yaml").write_text(
        f"model: {model_folder}\n"
        "task: {train: samples_test.jsonl, test: held.jsonl}\n"
        "adapter: {method: loreft, rank: 2, positions: f2+l2}\nmax_steps: 1\n"
    )
    code, _, err = cli("train", "st.yaml")
    assert code == 3 and "holds test questions" in err
    Path("samples_test.jsonl").rename("innocent.jsonl")
    code, _, err = cli("train", "st.yaml", "--set", "task.train=innocent.jsonl")
    assert code == 3 and 'row 1 has the split "test"' in err
    code, _, err = cli("sample", run, *SHORT, "--split", "test", "--out", "mine.jsonl")
    assert code == 3 and "its name does not say so" in err


def test_a_reward_model_is_trained_on_all_answers_and_reranks(cli, run, model_folder):
    code, _, err = cli("sample", run, *SHORT, "--keep", "all", "--gold", "--out", "all.jsonl")
    assert code == 0, err
    Path("reward.yaml").write_text(
        f"model: {{name: {model_folder}, head: classification}}\n"
        'task: {train: all.jsonl, text: "{prompt}{completion}", label: right, '
        'labels: ["False", "True"]}\n'
        "adapter: {method: lora, rank: 2}\nobjective: classification\n"
        "max_steps: 2\nbatch_size: 8\nthreads: 1\nevaluation: {split: validation}\n"
    )
    code, _, err = cli("train", "reward.yaml")
    assert code == 0, err
    many = ("--samples", 3, "--temperature", 1)
    words = ("eval", run, *many, "--rerank", "runs/reward", "--output", "out")
    code, out, err = cli(*words, "--json")
    assert code == 0, err
    report = json.loads(out)["report"]
    assert {"pass@3", "majority@3", "rerank@3"} <= set(report["figures"])
    assert report["evaluation"]["rerank"] == "runs/reward"
    assert report["figures"]["rerank@3"]["n"] == 8
    found = rows("out/predictions.jsonl")
    assert len(found) == 24 and all(0 < row["p_right"] < 1 for row in found)
    code, out, err = cli(*words)
    assert code == 0 and "rerank@3" in out, err
    for more, told in (
        ((run, "--rerank", "runs/reward"), "there is one"),
        ((run, *many, "--rerank", run), "does not classify answers"),
        ((run, *many, "--rerank", model_folder), "is no run folder"),
        (("runs/reward", *many, "--rerank", "runs/reward"), "no generated answers to rerank"),
    ):
        code, _, err = cli("eval", *more)
        assert code == 2 and told in err


@pytest.mark.quick
@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--keep", "wrong"), '--keep is "wrong"'),
        (("--split", "dev"), 'There is no split "dev"'),
        (("--temperature", 0), "3 greedy answers are all the same"),
        (("--top-p", 0), "--top-p is 0"),
        (("--out", "x.csv"), "ends in .jsonl"),
        (("--task", "sst2"), "no generated answers"),
        ((), "No task is given"),
    ],
)
def test_flags_that_mean_nothing_are_refused(cli, more, told):
    code, _, err = cli("sample", "nano", *SHORT, *more)
    assert code == 2 and told in err


def test_a_data_file_is_asked_as_training_rows(cli, model_folder, recipe_file):
    code, out, err = cli("sample", model_folder, "--task", "rows.jsonl", *SHORT, "--gold", "--json")
    assert code == 0, err
    assert json.loads(out)["questions"] == 15  # the last tenth stands in for validation rows
    assert {row["split"] for row in rows()} == {"train"}
