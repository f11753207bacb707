"""What rows tell positions, names that give test data away, and rows held out only where used."""

from __future__ import annotations

import gzip

import pytest
from task_lookalikes import make, write_rows
from tiny import tiny_tokenizer

from reftune.errors import DataError
from reftune.tasks.files import read_rows
from reftune.tasks.guard import is_test_name
from reftune.tasks.texts import marked_tokens, subject_place

pytestmark = pytest.mark.quick
TOKENIZER = tiny_tokenizer()
ROWS = [{"prompt": f"is {i} big?", "completion": " no"} for i in range(40)]


def test_subjects_and_masks_come_from_fields(tmp_path):
    rows = [{**ROWS[0], "who": "0", "where": ["big"]}, {**ROWS[1], "who": "1", "where": [[0, 2]]}]
    path = str(write_rows(tmp_path / "a.jsonl", rows))
    task = make("own", train=path, subject="who", mask="where", holdout=0)
    metas = [example.meta for example in task.load("train")]
    assert metas == [{"subject": "0", "mask": ("big",)}, {"subject": "1", "mask": ((0, 2),)}]
    assert task.gives({"subject": "who"}) == {"subject"} and task.gives({}) == frozenset()
    bad = str(write_rows(tmp_path / "b.jsonl", [{**ROWS[0], "where": [[1, 2, 3]]}]))
    with pytest.raises(DataError, match=r"line 1: the mask \[1, 2, 3\] is neither"):
        make("own", train=bad, mask="where", holdout=0).load("train")


def test_every_row_of_facts_has_its_subject():
    for kind in ("recall", "one_hop", "unknown"):
        task = make("facts", kind=kind, train_size=20)
        assert all(e.meta["subject"] in e.prompt for e in task.load("train"))


def test_places_in_a_text():
    text = "the red cat, the red dog"
    assert subject_place(TOKENIZER, text, "red", "Row") == text.rfind("red") + 2
    marked = marked_tokens(TOKENIZER, text, ["red", (0, 1)], "Row")
    assert [i for i, on in enumerate(marked) if on] == [0, 4, 5, 6, 17, 18, 19]
    with pytest.raises(DataError, match='Row 7: the marked text "cow" is not in the prompt'):
        marked_tokens(TOKENIZER, text, ["cow"], "Row 7")
    with pytest.raises(DataError, match=r"\[5, 99\] is no piece of a prompt of 24 characters"):
        marked_tokens(TOKENIZER, text, [(5, 99)], "Row")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("data/test/part-0.jsonl", True),
        ("data/test/gsm8k/part-0.jsonl", True),
        ("data/Test-Set/rows.csv", True),
        ("test/train.jsonl", False),
        ("test/a/b/rows.jsonl", False),
        ("test_names/rows.jsonl", False),
    ],
)
def test_folders_tell_too(name, told):
    assert is_test_name(name) is told


def test_own_data_in_a_test_folder_or_split_are_refused(tmp_path, hub):
    (tmp_path / "test").mkdir()
    path = write_rows(tmp_path / "test" / "part-0.jsonl", ROWS)
    with pytest.raises(DataError, match=r"Refusing to train on .*part-0"):
        make("own", train=str(path)).load("train")
    hub.sets["me/set", None, "test"] = ROWS
    with pytest.raises(DataError, match='Refusing to train on "test"'):
        make("own", train="me/set@test").load("train")
    hub.sets["me/set", "test", "train"] = ROWS
    with pytest.raises(DataError, match='Refusing to train on "test"'):
        make("own", train="me/set:test").load("train")


def test_tabs_separate_too(tmp_path):
    (tmp_path / "a.tsv").write_text("q\ta\n1, 2\tx\n")
    (row,) = read_rows(tmp_path / "a.tsv")
    assert (row["q"], row["a"]) == ("1, 2", "x")
    with gzip.open(tmp_path / "b.tsv.gz", "wt") as file:
        file.write("q\ta\n3\ty\n")
    assert read_rows(tmp_path / "b.tsv.gz")[0]["a"] == "y"


def test_rows_are_held_out_only_where_asked(tmp_path, caplog):
    path = str(write_rows(tmp_path / "rows.jsonl", ROWS))
    task = make("own", train=path, test=str(write_rows(tmp_path / "t.jsonl", ROWS[:3])))
    with caplog.at_level("INFO"):
        assert len(task.load("train")) == 36 and "4 of 40 training rows are held out" in caplog.text
    task.hold_out = False
    assert len(task.load("train")) == 40 and len(task.load("validation")) == 4
    assert task.cut_from_training("validation") and not task.cut_from_training("test")
    assert make("own", train=path).cut_from_training("test")
    assert not make("own", train=path, validation=path).cut_from_training("test")
    assert not make("families").cut_from_training("validation")


def test_prompt_forms():
    assert make("families").prompt_form == "Question: {prompt} Answer:"
    assert make("families", chat=True).prompt_form is None
    assert make("own", train="a.csv").prompt_form == "{prompt}"
    assert make("own", train="a.csv", prompt="Q: {q} A:").prompt_form == "Q: {prompt} A:"
    assert make("own", train="a.csv", prompt="{a} {b}").prompt_form is None
    assert make("own", train="a.csv", messages="m").prompt_form is None
    assert make("gsm8k").prompt_form.startswith("{prompt}\nAnswer the above question.")
    assert make("math10k").prompt_form.endswith("### Instruction:\n{prompt}\n\n### Response:\n")
    assert make("ultrafeedback").prompt_form == make("math10k").prompt_form
    assert make("sst2").prompt_form is None
