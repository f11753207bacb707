from __future__ import annotations

import json

import pytest
from task_lookalikes import gold_accuracy, make, write_rows

from reftune.errors import DataError

pytestmark = pytest.mark.quick


def adapters(labels: str, answer: str, question: str = "Which?") -> dict:
    return {
        "instruction": f"{question}\n\nAnswer format: {labels}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def boolq(n: int) -> list[dict]:
    return [adapters("true/false", ("true", "false")[i % 2], f"is {i} even") for i in range(n)]


def test_prompt_target_and_choices(tmp_path):
    write_rows(tmp_path / "commonsense" / "boolq_train.jsonl.gz", boolq(40))
    write_rows(tmp_path / "commonsense" / "boolq_test.jsonl", boolq(4))
    task = make("boolq", tmp_path)
    train, test = task.load("train"), task.load("test")
    assert (len(train), len(task.load("validation")), len(test)) == (36, 4, 4)
    first = train[1]
    assert first.prompt == "is 1 even\n\nAnswer format: true/false\n"
    assert first.target == "the correct answer is false"
    assert first.choices == ("the correct answer is true", "the correct answer is false")
    assert (first.label, first.answer) == (1, "false")
    assert (task.kind, task.max_new_tokens) == ("choice", 32)
    assert gold_accuracy(task, [*train, *test]) == 1.0
    assert task.extract("false", first) is None
    twice = "the correct answer is true\nthe correct answer is false"
    assert task.score(twice, first) == {"accuracy": 0.0}


def test_an_answer_outside_the_format_is_refused(tmp_path):
    write_rows(tmp_path / "piqa_test.jsonl", [adapters("solution1/solution2", "solution3")])
    with pytest.raises(DataError, match=r"line 1: the answer \"solution3\" is none of"):
        make("piqa", tmp_path).load("test")


HUB = {
    "boolq": (
        ("google/boolq", None, "validation"),
        {"question": "does it rain", "answer": True, "passage": "It does."},
        "Please answer the following question with true or false, question: does it rain?"
        "\n\nAnswer format: true/false\n",
        "true",
    ),
    "piqa": (
        ("baber/piqa", None, "validation"),
        {"goal": "Dry hands?", "sol1": "Towel.", "sol2": "Water.", "label": 0},
        "Please choose the correct solution to the question: Dry hands?\n\nSolution1: Towel."
        "\n\nSolution2: Water.\n\nAnswer format: solution1/solution2\n",
        "solution1",
    ),
    "siqa": (
        ("allenai/social_i_qa", None, "validation"),
        {"context": "Ann left.", "question": "Why?", "answerA": "a", "answerB": "b",
         "answerC": "c", "label": "3"},
        "Please choose the correct answer to the question: Ann left. Why?\n\nAnswer1: a Answer2: "
        "b Answer3: c\n\nAnswer format: answer1/answer2/answer3\n",
        "answer3",
    ),
    "hellaswag": (
        ("Rowan/hellaswag", None, "validation"),
        {"activity_label": "Pool", "ctx_a": "She plays.", "ctx_b": "then she",
         "endings": ["a.", "b.", "c.", "d."], "label": "1"},
        "Please choose the correct ending to complete the given sentence: Pool: She plays. then "
        "she\n\nEnding1: a. Ending2: b. Ending3: c. Ending4: d.\n\nAnswer format: ending1/ending2/"
        "ending3/ending4\n",
        "ending2",
    ),
    "winogrande": (
        ("allenai/winogrande", "winogrande_xl", "validation"),
        {"sentence": "Ann saw Eve so _ ran.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "Ann saw Eve so _ ran.\n\nOption1: Ann Option2: Eve Answer format: option1/option2\n",
        "option2",
    ),
    "arc_easy": (
        ("allenai/ai2_arc", "ARC-Easy", "test"),
        {"question": "What?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]},
         "answerKey": "2"},
        "Please choose the correct answer to the question: What?\n\nAnswer1: x Answer2: y "
        "Answer3: z\n\nAnswer format: answer1/answer2/answer3\n",
        "answer2",
    ),
    "obqa": (
        ("allenai/openbookqa", "main", "test"),
        {"question_stem": "The sun is", "choices": {"text": ["x", "y"], "label": ["A", "B"]},
         "answerKey": "B"},
        "Please choose the correct answer to the question: The sun is\n\nAnswer1: x Answer2: y"
        "\n\nAnswer format: answer1/answer2\n",
        "answer2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_original_rows_take_the_same_form(hub, name):
    key, row, prompt, answer = HUB[name]
    hub.sets[key] = [row]
    task = make(name)
    example = task.load("test")[0]
    assert (example.prompt, example.answer) == (prompt, answer)
    assert gold_accuracy(task, [example]) == 1.0


def test_original_rows_that_lack_a_field_are_named(hub):
    hub.sets["baber/piqa", None, "validation"] = [{"goal": "x", "sol1": "y", "label": 0}]
    with pytest.raises(DataError, match=r"validation, line 1: not a row of \"piqa\".*sol2"):
        make("piqa").load("test")


def test_the_mix_trains_on_what_is_there_and_tests_on_all(tmp_path, caplog):
    write_rows(tmp_path / "boolq_train.jsonl", boolq(60))
    write_rows(tmp_path / "arc_easy_train.jsonl", [adapters("answer1/answer2", "answer1")] * 40)
    write_rows(tmp_path / "boolq_test.jsonl", boolq(4))
    write_rows(tmp_path / "arc_easy_test.jsonl", [adapters("answer1/answer2", "answer2")])
    task = make("commonsense", tmp_path, sets=["boolq", "arc_easy"])
    train, validation = task.load("train"), task.load("validation")
    assert (len(train), len(validation)) == (90, 10)
    assert {e.id for e in train}.isdisjoint(e.id for e in validation)
    assert {e.meta["set"] for e in validation} == {"boolq", "arc_easy"}
    test = task.load("test")
    figures = task.aggregate(
        [{"accuracy": float(e.meta["set"] == "boolq")} for e in test], test, []
    )
    assert figures == {"accuracy_boolq": 1.0, "accuracy_arc_easy": 0.0, "macro_accuracy": 0.5}
    everything = make("commonsense", tmp_path)
    assert len(everything.load("train")) == 90
    assert "no training rows of piqa" in caplog.text
    with pytest.raises(DataError, match=r"task \"piqa\".*Or leave piqa out of options.sets"):
        everything.load("test")


def test_commonsense_170k_is_taken_whole(tmp_path):
    (tmp_path / "commonsense_170k.json").write_text(json.dumps(boolq(30)))
    assert len(make("commonsense", tmp_path, holdout=0).load("train")) == 30


def test_boolq_with_its_passage(tmp_path, hub):
    rows = [
        {"question": "is it wet?", "passage": " It rains a lot. ", "answer": True},
        {"question": "is it dry", "passage": "It rains.", "label": 0},
    ]
    write_rows(tmp_path / "boolq_passage_test.jsonl", rows)
    task = make("boolq_passage", tmp_path)
    first, second = task.load("test")
    assert first.prompt == "Passage: It rains a lot.\nQuestion: is it wet?\nAnswer:"
    assert (first.target, first.choices, first.label) == (" True", (" True", " False"), 0)
    assert (second.target, second.answer, second.label) == (" False", "false", 1)
    assert task.score("yes", first) == {"accuracy": 1.0}
    assert task.score("true or false", first) == {"accuracy": 0.0}
    assert gold_accuracy(task, [first, second]) == 1.0
    short = make("boolq_passage", tmp_path, passage_words=2).load("test")[0]
    assert short.prompt.startswith("Passage: a lot.\n")
    hub.sets["google/boolq", None, "train"] = rows * 10
    assert len(make("boolq_passage").load("train")) == 18


def test_boolq_rows_without_a_passage_are_refused(tmp_path):
    write_rows(tmp_path / "boolq_passage_test.jsonl", boolq(1))
    with pytest.raises(DataError, match='line 1: no field "passage"'):
        make("boolq_passage", tmp_path).load("test")
    row = {"question": "q", "passage": "p", "answer": "maybe"}
    write_rows(tmp_path / "boolq_passage_test.jsonl", [row])
    with pytest.raises(DataError, match="'maybe' is neither true nor false"):
        make("boolq_passage", tmp_path).load("test")
