from __future__ import annotations

import pytest
from task_lookalikes import make, write_rows

from reftune.errors import DataError
from reftune.tasks.base import Example
from reftune.tasks.guard import drop_overlap, is_test_name, overlap, refuse_same, refuse_test

pytestmark = pytest.mark.quick


def row(name: str, question: str, **more) -> Example:
    return Example(name, "", "x", "x", question, **more)


@pytest.mark.parametrize(
    "name",
    [
        "gsm8k_test.jsonl",
        "/data/gsm8k_test_socratic.jsonl",
        "mwp_reft_mathqa-numeric_test_set.jsonl",
        "mawps_testset.jsonl",
        "test.csv",
        "GSM8KTest.json",
        "svamp_original.jsonl",
        "svamp_mawps_asdiv_dev.jsonl",
        "gsm8k_example_model_solutions.jsonl.gz",
        "pal_gsmhardv2.jsonl",
        "pot_gsm8k_programs.jsonl",
        "test",
        "train+test",
    ],
)
def test_test_files_are_refused_as_training_data(name):
    assert is_test_name(name)
    with pytest.raises(DataError, match="Refusing to train on"):
        refuse_test(name, "gsm8k")


@pytest.mark.parametrize(
    "name",
    ["/home/test/train.jsonl", "latest.jsonl", "contest_train.csv", "attested.jsonl", "train_sft"],
)
def test_training_files_pass(name):
    assert not is_test_name(name)
    refuse_test(name)


def test_one_file_for_both_is_refused(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{}])
    with pytest.raises(DataError, match="also the test data"):
        refuse_same(str(path), str(tmp_path / "." / "rows.jsonl"))
    refuse_same(str(path), str(tmp_path / "other.jsonl"))
    refuse_same(str(path), None)


def test_overlap_ignores_case_spaces_and_punctuation():
    train = [row("a", "Tom has 5 apples. How many?"), row("b", "What is 2 + 2?")]
    test = [row("c", "tom has 5 apples . how  many ?"), row("d", "Tom has 6 apples. How many?")]
    found = overlap(train, test)
    assert (found.count, found.num_test, found.share) == (1, 2, 0.5)
    assert (found.train_ids, found.test_ids) == (("a",), ("c",))
    assert "1 of 2 test questions (50.0%)" in str(found)
    assert drop_overlap(train, test) == [train[1]]
    assert "none of 2" in str(overlap([train[1]], test))


def test_overlap_reads_pairs_and_chats_and_never_counts_empty_questions():
    pair = row("a", "One text.", pair="Another.")
    assert overlap([pair], [row("b", "One text.", pair="A third.")]).count == 0
    chat = ({"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Yes?"})
    other = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "No."})
    assert overlap([row("a", "", messages=chat)], [row("b", "", messages=other)]).count == 1
    assert overlap([row("a", "")], [row("b", "")]).count == 0


def test_a_task_can_drop_overlapping_training_rows(tmp_path):
    train = [{"question": f"Question {i}?", "answer": f"x\n#### {i}"} for i in range(20)]
    write_rows(tmp_path / "gsm8k_train.jsonl", train)
    write_rows(tmp_path / "gsm8k_test.jsonl", train[:3])
    assert len(make("gsm8k", tmp_path, holdout=0).load("train")) == 20
    kept = make("gsm8k", tmp_path, holdout=0, drop_overlap=True).load("train")
    assert [example.answer for example in kept] == [str(i) for i in range(3, 20)]
