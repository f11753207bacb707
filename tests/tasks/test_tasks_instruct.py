from __future__ import annotations

import pytest
from task_lookalikes import gold_accuracy, make, write_rows

from reftune.errors import DataError

pytestmark = pytest.mark.quick
ROWS = [{"instruction": f"Say {i}", "input": "", "output": f"It is {i}."} for i in range(30)]


def test_local_rows_are_cut_in_three(tmp_path):
    write_rows(tmp_path / "instruct" / "ultrafeedback_1k.jsonl.gz", ROWS)
    task = make("ultrafeedback", tmp_path)
    parts = {split: task.load(split) for split in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [24, 3, 3]
    assert len({e.question for part in parts.values() for e in part}) == 30
    first = parts["train"][0]
    assert first.prompt.endswith("### Instruction:\nSay 0\n\n### Response:\n")
    assert first.target == "It is 0."
    assert gold_accuracy(task, parts["test"]) == 1.0
    assert task.score("It was 0.", first)["word_f1"] == pytest.approx(2 / 3)


def test_input_is_a_part_of_its_own_and_alpaca_eval_is_the_test_set(tmp_path):
    write_rows(tmp_path / "ultrafeedback.jsonl", ROWS)
    write_rows(tmp_path / "alpaca_eval.jsonl", [{**ROWS[0], "input": "here"}])
    task = make("ultrafeedback", tmp_path)
    assert (len(task.load("train")), len(task.load("validation"))) == (27, 3)
    assert "### Input:\nhere\n\n### Response:\n" in task.load("test")[0].prompt


def test_binarised_hub_rows(hub):
    chosen = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    for split in ("train_sft", "test_sft"):
        hub.sets["HuggingFaceH4/ultrafeedback_binarized", None, split] = [
            {"prompt": "Hi", "chosen": chosen}
        ] * 20
    task = make("ultrafeedback")
    assert task.load("test")[0].target == "Hello."
    assert len(task.load("train")) == 18
    hub.sets["HuggingFaceH4/ultrafeedback_binarized", None, "test_sft"] = [{"chosen": []}]
    with pytest.raises(DataError, match="does not end in an assistant message"):
        task.load("test")


def test_too_few_rows_are_refused(tmp_path):
    write_rows(tmp_path / "ultrafeedback.jsonl", ROWS[:5])
    with pytest.raises(DataError, match="5 Ultrafeedback rows are too few"):
        make("ultrafeedback", tmp_path).load("train")
