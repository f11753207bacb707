"""Sub-world D: shown solutions are copied, remarks get exactly the named flaw."""

from __future__ import annotations

import random
import re

import pytest

from reftune.nano import guided, sums
from reftune.nano.item import is_held_out_pair, split
from reftune.nano.sums_formats import equations
from reftune.nano.sums_schemas import apply


def test_shown_items_carry_the_solution_half_of_the_time_in_other_words() -> None:
    rng = random.Random(0)
    literal = 0
    for _ in range(1_000):
        item = guided.shown(rng)
        told = item.question.split(" A solution: ")[1]
        literal += told == item.answer
        numbers = [n for step in equations(item.answer) for n in step[0:4:2] + step[3:4]]
        assert all(str(number) in re.findall(r"\d+", told) for number in numbers)
        assert guided.copies(item.answer, item)
        assert not guided.copies(item.answer.replace(item.gold, "500"), item)
    assert 430 < literal < 570


@pytest.mark.parametrize("flaw_at", [1, 2, 3])
def test_a_flawed_answer_has_just_the_named_flaw(flaw_at: int) -> None:
    rng = random.Random(flaw_at)
    for _ in range(200):
        item = guided.flawed(rng, flaw_at=flaw_at)
        steps = equations(item.answer)
        right = [apply(s.operator, s.left, s.right) == s.result for s in steps]
        assert right == [index != flaw_at - 1 for index in range(len(steps))]
        assert item.gold == str(steps[-1].result)
        assert guided.shows_flaw_item(item.answer, item)


def test_the_checker_refuses_other_answers() -> None:
    rng = random.Random(4)
    drawn, place, steps = guided.flawed_problem(rng, "test", 2)
    text = guided.render_steps(steps)
    assert guided.shows_flaw(text, drawn.steps, place)
    assert not guided.shows_flaw(text, drawn.steps, 1)
    assert not guided.shows_flaw(drawn.solution(), drawn.steps, place)
    assert not guided.shows_flaw(text.split(". ")[0] + ".", drawn.steps, place)
    assert not guided.shows_flaw(text.replace("answer is", "answer is 1"), drawn.steps, place)
    with pytest.raises(ValueError, match="remark item is needed"):
        guided.shows_flaw_item(text, guided.shown(rng))


def test_later_steps_must_follow_from_the_flaw() -> None:
    right = "6 * 7 = 42. 42 - 12 = 30. The answer is 30."
    steps = [step._replace(left_from=at - 1) for at, step in enumerate(equations(right))]
    follows = "6 * 7 = 43. 43 - 12 = 31. The answer is 31."
    ignores = "6 * 7 = 43. 42 - 12 = 30. The answer is 30."
    assert guided.shows_flaw(follows, steps, 1)
    assert not guided.shows_flaw(ignores, steps, 1)


@pytest.mark.parametrize("side", ["train", "validation", "test"])
def test_items_stay_in_their_split_and_in_known_families(side: str) -> None:
    rng = random.Random(9)
    kinds = set()
    for _ in range(1_000):
        item = guided.sample(rng, side)
        kinds.add(item.kind)
        assert split(*item.key) == side
        assert sums.FAMILIES[item.key[0]].group == "known"
        for step in equations(item.answer) if side == "train" else ():
            assert not is_held_out_pair(step.operator, step.left, step.right)
    assert kinds == {"shown", "remark"}


def test_remarks_also_meet_one_step_late_in_training() -> None:
    rng = random.Random(5)
    items = [guided.sample(rng, progress=0.5) for _ in range(1_000)]
    remarks = [item for item in items if item.kind == "remark"]
    assert 640 < len(remarks) < 760
    short = [item for item in remarks if len(equations(item.answer)) == 1]
    assert 0.4 < len(short) / len(remarks) < 0.6
    assert all(guided.shows_flaw_item(item.answer, item) for item in remarks)
    assert {item.weight for item in remarks} == {guided.REMARK_WEIGHT}
    assert {item.weight for item in items if item.kind == "shown"} == {1.0}


def test_the_same_seed_gives_the_same_item() -> None:
    assert guided.sample(random.Random(3)) == guided.sample(random.Random(3))
