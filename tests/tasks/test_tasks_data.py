"""Checks on real benchmark files; set REFTUNE_DATA to their folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from task_lookalikes import gold_accuracy, make

from reftune.errors import DataError
from reftune.tasks.base import ahead
from reftune.tasks.guard import overlap, refuse_test
from reftune.tasks.problems import Problem, capital_options

FOLDER = os.environ.get("REFTUNE_DATA", "")
pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not FOLDER, reason="REFTUNE_DATA is not set"),
]

COUNTS = [
    ("gsm8k", "train", 7473),
    ("gsm8k", "test", 1319),
    ("gsm_hard", "test", 1319),
    ("svamp", "train", 3076),
    ("svamp", "test", 1000),
    ("mawps", "train", 1898),
    ("mawps", "validation", 237),
    ("mawps", "test", 238),
    ("addsub", "test", 395),
    ("multiarith", "test", 600),
    ("singleeq", "test", 508),
    ("aqua", "test", 254),
    ("mathqa", "test", 2985),
    ("mathqa_numeric", "test", 1605),
    ("math10k", "test", 2811),
    ("boolq", "train", 9427),
    ("boolq", "test", 3270),
    ("arc_easy", "train", 2251),
    ("arc_easy", "test", 2376),
    ("arc_challenge", "train", 1119),
    ("arc_challenge", "test", 1172),
    ("obqa", "train", 4957),
    ("piqa", "test", 1838),
    ("siqa", "test", 1954),
    ("winogrande", "test", 1267),
    ("hellaswag", "train", 4000),
    ("commonsense", "train", 21754),
    ("ultrafeedback", "train", 800),
]


def load(name: str, split: str, **options):
    if name != "ultrafeedback":
        options.setdefault("holdout", 0)
    task = make(name, Path(FOLDER), **options)
    return task, task.load(split)


@pytest.mark.parametrize(("name", "split", "count"), COUNTS)
def test_every_row_loads_and_its_target_is_right(name, split, count):
    task, examples = load(name, split)
    assert len(examples) == count
    assert len({example.id for example in examples}) == count
    assert gold_accuracy(task, examples) == 1.0


@pytest.mark.parametrize("name", ["gsm8k", "svamp", "mawps", "mathqa", "mathqa_numeric"])
@pytest.mark.parametrize("template", ["reinforced", "native", "alpaca", "steps"])
def test_targets_are_right_in_every_form(name, template):
    task, examples = load(name, "test", template=template)
    assert gold_accuracy(task, examples) == 1.0
    if name in ("gsm8k", "svamp", "mawps"):
        task, examples = load(name, "train", template=template)
        assert gold_accuracy(task, examples) == 1.0


def test_model_written_solutions_of_math_10k_end_in_their_answer():
    task, examples = load("math10k", "train")
    assert len(examples) == 789
    # Four of them argue that none of the options is right.
    assert gold_accuracy(task, examples) == pytest.approx(785 / 789)


def test_first_rows_to_the_letter():
    _, examples = load("gsm8k", "train")
    assert examples[0].prompt == (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
        "May. How many clips did Natalia sell altogether in April and May?\nAnswer the above "
        "question. First think step by step and then answer the final number.\n"
    )
    assert examples[0].target == (
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 "
        "clips altogether in April and May.\nThe final answer is:  72"
    )
    _, examples = load("boolq", "train")
    assert examples[0].prompt == (
        "Please answer the following question with true or false, question: do iran and "
        "afghanistan speak the same language?\n\nAnswer format: true/false\n"
    )
    assert examples[0].target == "the correct answer is true"
    _, examples = load("svamp", "train", template="reinforced")
    assert examples[0].prompt.startswith("Question:\ntyler an animal rights advocate")
    assert examples[0].target.endswith("<203>.\nTherefore, the answer is: 203.0")


def test_options_in_capitals_are_the_text_of_llm_adapters():
    _, published = load("mathqa", "test")
    _, small = load("mathqa", "test", template="reinforced")
    known = {example.question.lower(): example.answer for example in published}
    problems = [capital_options(Problem("", e.question, "", e.answer)) for e in small]
    assert all(known[problem.question.lower()] == problem.answer for problem in problems)
    assert all(" The options: " in problem.question for problem in problems)


def test_the_alpaca_form_of_svamp_is_written_as_llm_adapters_does():
    _, examples = load("math10k", "test", sets=["svamp"])
    assert examples[0].question.startswith("Matthew gave equal numbers of crackers and cakes to")


@pytest.mark.parametrize(
    ("train", "test", "count"),
    [
        ("gsm8k", "gsm8k", 0),
        ("gsm8k", "svamp", 0),
        ("svamp", "svamp", 0),
        ("svamp", "addsub", 352),
        ("svamp", "multiarith", 596),
        ("svamp", "singleeq", 320),
        ("svamp", "mawps", 180),
        ("mawps", "addsub", 327),
        ("mawps", "multiarith", 490),
        ("mawps", "singleeq", 436),
        ("mawps", "mawps", 28),
        ("math10k", "addsub", 0),
        ("math10k", "aqua", 0),
        ("boolq", "boolq", 6),
        ("arc_easy", "arc_easy", 2),
    ],
)
def test_overlap_between_training_and_test_questions(train, test, count):
    assert overlap(load(train, "train")[1], load(test, "test")[1]).count == count


def test_mawps_without_its_test_questions():
    assert len(load("mawps", "train", drop_overlap=True)[1]) < 1898


def test_no_test_file_can_be_trained_on():
    names = [p.name for p in (Path(FOLDER) / "math").iterdir()]
    names += [p.name for p in (Path(FOLDER) / "commonsense").iterdir()]
    allowed = []
    for name in names:
        try:
            refuse_test(name)
        except DataError:
            continue
        allowed.append(name)
    assert all(
        "train" in n or "svamp_nl" in n or "python_sdp" in n or "valid" in n for n in allowed
    )


@pytest.mark.parametrize("options", [{}, {"prefill": False}, {"compat": "reference"}], ids=str)
def test_every_published_program_gives_its_answer(options):
    task, examples = load("svamp", "train", template="program", **options)
    pairs = ahead(task, [example.target for example in examples], examples)
    right = [task.score(*pair)["accuracy"] for pair in pairs]
    assert len(right) == 3043 and set(right) == {1.0}
