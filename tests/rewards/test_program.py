"""Answers that are programs: where the program is in a text, what it gives, what it earns."""

from __future__ import annotations

import pytest

from reftune import rewards
from reftune.config.recipe import TaskSpec
from reftune.rewards import program, programs
from reftune.rewards.program import extract, extract_text, program_in, value_of
from reftune.rewards.programs import Limits

DEF = 'def solution():\n    """How many?"""\n    a = 3\n    result = a * 2\n    return result'
BODY = "    a = 3\n    result = a * 2\n    return result"


# Where the program is


@pytest.mark.quick
def test_a_program_stands_behind_the_last_marker():
    text = f"Question:\nWhat?\nAnswer reasoning:\nno\nAnswer reasoning:\n{DEF}\n"
    assert program_in(text) == DEF == program_in(DEF)


@pytest.mark.quick
@pytest.mark.parametrize("body", [BODY, "\n" + BODY, BODY.lstrip() + "\n"])
def test_a_prefilled_head_is_put_back(body):
    assert extract(body) == "6.0"
    assert program_in(body).startswith("def solution():\n    a = 3\n    result")


@pytest.mark.quick
def test_a_body_is_not_taken_for_the_program_that_follows_it():
    assert program_in(f"{BODY}\n{DEF}") == f"def solution():\n{BODY}\n{DEF}"
    assert program_in(f" {DEF}") == DEF, "a target may begin with a space"


@pytest.mark.quick
@pytest.mark.parametrize("text", ["", "  \n", "The answer is 7.", "7", "x" * 30_000 + " return 1"])
def test_texts_without_a_program_give_none(text):
    assert program_in(text) is None and value_of(text).error == "no program"
    assert extract(text) is None and extract_text(text) is None


# The table of section 5, programs


@pytest.mark.parametrize(
    ("source", "default", "reference"),
    [
        (DEF, "6.0", "6.0"),
        ("def solution():\n    return True", "1.0", "1.0"),
        ("def solution():\n    return '12'", "12.0", "12.0"),
        ("def solution():\n    return float('nan')", None, "nan"),
        ("def solution():\n    return float('inf')", None, "inf"),
        ("def solution():\n    return 'b'", None, None),
        ("def solution():\n    return 1 / 0", None, None),
        ("def solution():\n    a = 1\n\n    return a", "1.0", None),
        ("def solution():\n    return 4\n\nthis is no program", None, "4.0"),
        ("def f():\n    return 5\ndef solution():\n    return f()", "5.0", None),
        ("from math import sqrt\ndef solution():\n    return sqrt(4)", "2.0", None),
        ("def solution():\n    return math.sqrt(4)", "2.0", "2.0"),
        ("import sys\ndef solution():\n    sys.exit(1)\n    return 3", None, "3.0"),
        ("def solution():\n    import sys\n    sys.exit(1)\n    return 3", None, "3.0"),
    ],
    ids=range(14),
)
def test_what_programs_give(source, default, reference):
    assert extract(source) == default
    assert extract(source, "reference") == reference


def test_rewards_are_one_a_tenth_or_nothing():
    rule, quirk = rewards.get("program"), rewards.get("program_reference")
    assert [rule.reward(DEF, gold, partial=0.1) for gold in ("6", "6.005", "1,006", "7")] == [
        *(1.0, 1.0),
        *(0.1, 0.1),
    ]
    nan = "def solution():\n    return float('nan')"
    assert (rule.reward(nan, "6", 0.1), quirk.reward(nan, "6", 0.1)) == (0.0, 0.1)
    assert rule.reward("def solution():\n    while", "6", 0.1) == 0.0


def test_choices_are_compared_as_texts():
    rule = rewards.get("program_choice")
    text = "def solution():\n    return {}"
    given = [("'b'", "b"), ("' b '", "b"), ("'B'", "b"), ("3", "3"), ("None", "none"), ("1/0", "a")]
    found = [rule.reward(text.format(value), gold, partial=0.1) for value, gold in given]
    assert found == [1.0, 1.0, 0.1, 1.0, 0.0, 0.0]
    quirk = rewards.get("program_choice_reference")
    found = [quirk.reward(text.format(value), gold, partial=0.1) for value, gold in given]
    assert found == [1.0, 1.0, 0.1, 1.0, 1.0, 0.1], "a failed program gives the text none"


# Running


@pytest.fixture
def runs(monkeypatch):
    """Note which programs are run together, and within which limits."""
    noted = []

    class Counting:
        def __init__(self, limits):
            self.limits = limits

        def run_all(self, sources, compat):
            noted.append((list(sources), compat, self.limits))
            return [programs.Outcome(4.0, "4")] * len(sources)

    monkeypatch.setattr(programs, "shared", Counting)
    monkeypatch.setattr(program, "_known", program.OrderedDict())
    return noted


FOUR = "def solution():\n    return 2 + 2"


@pytest.mark.quick
def test_a_program_is_run_once(runs):
    assert extract(FOUR) == extract(FOUR + "\n") == "4.0" and extract_text(FOUR) == "4"
    assert extract(FOUR, "reference") == "4.0"
    assert runs == [([FOUR], False, Limits()), ([FOUR], True, Limits())]


@pytest.mark.quick
def test_programs_known_in_advance_run_together_and_equal_ones_once(runs):
    rule = rewards.get("program")
    texts = [FOUR, "no program", BODY, FOUR]
    rule.ahead(texts)
    assert [extract(text) for text in texts] == ["4.0", None, "4.0", "4.0"]
    assert [sources for sources, *_ in runs] == [[FOUR, "def solution():\n" + BODY]]


@pytest.mark.quick
def test_a_rule_within_limits_is_the_rule_but_for_them(runs):
    tight = Limits(1.5, 2**27)
    rule = rewards.get("program_reference").within(tight)
    assert (rule.name, rule.extract(FOUR)) == ("program_reference", "4.0")
    rule.within(None).extract(FOUR)
    assert runs == [([FOUR], True, tight), ([FOUR], True, Limits())]
    assert rewards.get("numeric").within is rewards.get("numeric").ahead is None


@pytest.mark.quick
def test_outcomes_are_forgotten_in_the_end(runs, monkeypatch):
    monkeypatch.setattr(program, "KEPT", 2)
    for number in (1, 2, 1, 3, 1, 2):  # 2 is the one that was not used for longest
        extract(f"def solution():\n    return {number}")
    assert [sources[0][-1] for sources, *_ in runs] == ["1", "2", "3", "2"]


def test_workers_are_shared_and_those_of_a_parent_are_not(monkeypatch):
    assert programs.shared() is programs.shared()
    mine = programs.shared()
    with monkeypatch.context() as patch:
        patch.setattr(programs.os, "getpid", lambda: -5)
        other = programs.shared()
        assert other is not mine
        programs._SHARED.pop((-5, Limits())).close()
    tight = programs.shared(Limits(1.5))
    assert tight is programs.shared(Limits(1.5)) is not mine and tight.limits.seconds == 1.5
    assert mine.workers == programs.processors() >= 1


def test_own_data_can_be_scored_by_programs(tmp_path):
    from reftune import tasks

    file = tmp_path / "held.jsonl"
    file.write_text('{"prompt": "3 times 2?", "completion": "6"}\n')
    task = tasks.get(TaskSpec(name="own", test=str(file), reward="program"))
    (row,) = task.load("test")
    assert task.score(DEF, row) == {"accuracy": 1.0} and task.extract(DEF, row) == "6.0"
    assert task.score("def solution():\n    return 5", row) == {"accuracy": 0.0}
    assert program.HEAD in DEF
