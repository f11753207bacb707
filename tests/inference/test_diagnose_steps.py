"""Steps of solutions: what counts as one, and what a wrong number does to those behind it."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from reftune.inference.steps import numbers, shown_until, steps_of, wrong_chain
from reftune.nano import sums

pytestmark = pytest.mark.quick


def told(text):
    return [
        (step.form, [str(n.value) for n in step.operands], str(step.result.value))
        for step in steps_of(text)
    ]


@pytest.mark.parametrize(
    ("text", "form", "operands", "result"),
    [
        ("47 + 38 = 85.", "v0+v1", ["47", "38"], "85"),
        ("16-3-4=9", "v0-v1-v2", ["16", "3", "4"], "9"),
        ("so 2*(3+4) = 14 in all", "v0*(v1+v2)", ["2", "3", "4"], "14"),
        ("$1,200 x 3 = $3,600", "v0*v1", ["1200", "3"], "3600"),
        ("20% * 50 = 10", "(v0/100)*v1", ["20", "50"], "10"),
        ("12 ÷ 60 = .2", "v0/v1", ["12", "60"], "1/5"),
        ("5 − 8 = -3", "v0-v1", ["5", "8"], "-3"),
        ("In 2020. 5 + 3 = 8", "v0+v1", ["5", "3"], "8"),
        ("He pays 48/2 = <<48/2=24>>24", "v0/v1", ["48", "2"], "24"),
        ("it is 85 together, 47 and then 38 more.", "v0+v1", ["47", "38"], "85"),
        ("it is 4 for each, 12 equally for 3", "v0/v1", ["12", "3"], "4"),
    ],
)
def test_equations_in_many_forms(text, form, operands, result):
    assert told(text) == [(form, operands, result)]
    (step,) = steps_of(text)
    assert step.is_true
    for number in (*step.operands, step.result):
        written = text[number.start : number.end].replace(",", "")
        assert Fraction(written) == number.value
    assert step.start <= step.operands[0].start and step.result.end <= step.end


@pytest.mark.parametrize(
    "text",
    ["", "x + 3 = 5", "3 bags * 4 = 12", "(2 + 3 = 5", "4 / 0 = 3", "It is 85.", "return a + b"],
)
def test_what_is_no_equation(text):
    assert steps_of(text) == []


def test_a_wrong_equation_is_a_step_that_does_not_hold():
    (step,) = steps_of("2 + 2 = 5")
    assert not step.is_true and step.compute([Fraction(3), Fraction(4)]) == 7


@pytest.mark.parametrize("style", ["native", "hash", "boxed", "json", "prose", "prose_hash"])
def test_the_steps_of_the_small_world_are_read_in_every_style_that_tells_them(style):
    rng = random.Random(style)
    for _ in range(60):
        drawn = sums.problem(rng, "test", rng.choice(["known", "half", "new", "far"]))
        found = steps_of(drawn.solution(style))
        values = [[int(n.value) for n in (*s.operands, s.result)] for s in found]
        assert values == [[s.left, s.right, s.result] for s in drawn.steps]
        assert all(step.is_true for step in found)
    assert steps_of(drawn.solution("program")) == []


def test_numbers_stand_alone():
    assert [str(n.value) for n in numbers("A4 has 1,000 sheets, 0.5 g each, 80 g/m2.")] == [
        *("1000", "1/2", "80")
    ]


def test_shown_text_ends_behind_the_sentence_and_never_behind_the_next_step():
    text = "48/2 = <<48/2=24>>24 clips in May. So 24*3 = 72, and 72 + 1 = 73."
    steps = steps_of(text)
    assert [text[: shown_until(text, steps, i)] for i in range(3)] == [
        "",
        "48/2 = <<48/2=24>>24 clips in May.",
        "48/2 = <<48/2=24>>24 clips in May. So 24*3 = 72,",
    ]
    lines = "1 + 2 = 3\n3 + 4 = 7"
    assert lines[: shown_until(lines, steps_of(lines), 1)] == "1 + 2 = 3\n"


def shown(chain):
    return chain.text[: chain.cut]


def test_a_wrong_number_is_carried_through_the_shown_steps():
    text = "2 + 3 = 5. 5 * 4 = 20. 20 - 7 = 13. The answer is 13."
    chain = wrong_chain(text, "2, 3, 4 and 7?", 2)
    assert chain.wrong == 1  # the last step that step 3 goes on from
    wrong = int(shown(chain).rpartition("= ")[2].strip("."))
    assert shown(chain) == f"2 + 3 = 5. 5 * 4 = {wrong}." and 0 < abs(wrong - 20) <= 9
    assert (chain.followed, chain.right) == (wrong - 7, 13)
    far = "2 + 3 = 5. 9 * 4 = 36. 5 * 6 = 30."  # step 3 goes on from the first
    chain = wrong_chain(far, "2, 3, 9, 4 and 6?", 2)
    assert chain.wrong == 0 and chain.followed == 6 * int(shown(chain)[8])
    assert shown(chain).endswith(" 9 * 4 = 36.")
    side = "2 + 3 = 5. 5 * 4 = 20. 5 + 6 = 11."  # what is shown beside it follows too
    chain = wrong_chain(side, "2, 3, 4 and 6?", 2)
    wrong = int(chain.followed) - 6
    assert chain.wrong == 0 and shown(chain) == f"2 + 3 = {wrong}. {wrong} * 4 = {4 * wrong}."
    between = "2 + 3 = 5. 5 * 4 = 20. 20 - 5 = 15."
    chain = wrong_chain(between, "2, 3 and 4?", 2)
    assert chain.wrong == 1 and chain.followed == chain.right + int(shown(chain)[-3:-1]) - 20


def test_copies_of_the_wrong_number_change_too():
    text = "48/2 = <<48/2=24>>24 clips. She keeps those 24. Then 48+24 = <<48+24=72>>72."
    chain = wrong_chain(text, "48 clips, half?", 1)
    wrong = chain.followed - 48
    assert shown(chain) == f"48/2 = <<48/2={wrong}>>{wrong} clips." and wrong != 24
    assert chain.text[chain.cut :] == text[text.index(" She") :]


@pytest.mark.parametrize(
    ("text", "question", "place"),
    [
        ("2 + 3 = 5. 5 + 5 = 10.", "5 pears?", 1),  # its number is in the question
        ("2 + 3 = 5. 4 + 6 = 10.", "", 1),  # nothing is taken over
        ("2 + 3 = 5. 4 + 1 = 5. 5 * 2 = 10.", "", 2),  # two steps give it
        ("5 - 4 = 1. 1 / 3 = 4.", "", 0),  # there is nothing before
        ("1 + 1.5 = 2.5. 2.5 * 2 = 5.", "", 1),  # no whole number
        ("6 - 4 = 2. 9 - 2 = 7. 7 * 0 = 0.", "", 2),  # nothing follows from another number
    ],
)
def test_where_no_wrong_number_can_be_told(text, question, place):
    assert wrong_chain(text, question, place) is None


def test_wrong_numbers_leave_whole_positive_results_on_both_sides():
    rng, above = random.Random(1), []
    for number in range(200):
        drawn = sums.problem(rng, "test", "known", rng.choice([2, 3]))
        text = drawn.solution()
        chain = wrong_chain(text, drawn.question, len(drawn.steps) - 1, number)
        if chain is None:
            continue
        step = steps_of(shown(chain))[chain.wrong]
        true = drawn.steps[chain.wrong].result
        assert step.result.value != true and len(str(step.result.value)) == len(str(true))
        assert chain.followed > 0 and chain.followed.denominator == 1
        assert chain.followed != chain.right == drawn.steps[-1].result
        above.append(step.result.value > true)
    assert len(above) > 100 and 0.3 < sum(above) / len(above) < 0.7
