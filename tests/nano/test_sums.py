"""Sub-world A: number ranges, groups, splits, held-out pairs and answer formats."""

from __future__ import annotations

import json
import random
import re
from collections import Counter

import pytest

from reftune.nano import sums
from reftune.nano.item import is_held_out_pair, split
from reftune.nano.names import ACTORS
from reftune.nano.sums_formats import STYLES, equations, last_number, strict_answer
from reftune.nano.sums_schemas import SCHEMAS, solve
from reftune.nano.sums_stories import STORIES


def draws(count: int, *, seed: int = 0, **options: object) -> list[sums.Problem]:
    rng = random.Random(seed)
    return [sums.problem(rng, **options) for _ in range(count)]


def test_the_hundred_families_fall_into_their_groups() -> None:
    groups = Counter(family.group for family in sums.FAMILIES.values())
    assert groups == {"known": 64, "half": 12, "new": 16, "far": 8}
    assert len(SCHEMAS) == 20
    assert all(family.story in STORIES for family in sums.FAMILIES.values())
    assert {family.steps for family in sums.families("half")} == {2, 3}
    far = {family.schema for family in sums.families("far")}
    assert not far & {family.schema for family in sums.FAMILIES.values() if family.group != "far"}
    assert len(set(ACTORS)) == 60


@pytest.mark.parametrize("name", sums.FAMILIES)
def test_every_family_states_its_numbers_and_solves_them(name: str) -> None:
    for drawn in draws(20, family=name):
        stated = [int(number) for number in re.findall(r"\d+", drawn.question)]
        assert sorted(stated) == sorted(drawn.operands)
        assert "{" not in drawn.question and drawn.question.endswith("?")
        assert str(drawn.steps[-1].result) == drawn.gold
        assert len(drawn.steps) == sums.FAMILIES[name].steps
        for step in drawn.steps:
            value = {
                "+": step.left + step.right,
                "-": step.left - step.right,
                "*": step.left * step.right,
                "/": step.left / step.right,
            }[step.operator]
            assert value == step.result and 0 < step.result <= 199
            if step.operator in "*/":
                factors = (step.left, step.right) if step.operator == "*" else step[2:4]
                assert all(2 <= factor <= 12 for factor in factors)


def test_a_family_has_six_surface_forms() -> None:
    drawn = draws(300, family="add_sub/farm")
    masked = {
        re.sub("|".join((r"\d+", *ACTORS, *STORIES["farm"].things)), "_", each.question)
        for each in drawn
    }
    assert len(masked) == 6


def test_half_families_take_every_order_and_all_orders_agree() -> None:
    for schema in ("two_prod", "add_sub_sub"):
        orders = SCHEMAS[schema].orders
        drawn = draws(200, family=f"{schema}/farm")
        used = {next(o for o in orders if solve(o, p.operands) == p.steps) for p in drawn}
        assert len(used) == len(orders)
        for each in drawn:
            assert {solve(order, each.operands)[-1].result for order in orders} == {int(each.gold)}
    canonical = SCHEMAS["sub_sub"].orders[0]
    assert all(
        solve(canonical, each.operands) == each.steps for each in draws(50, family="sub_sub/farm")
    )


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_training_items_leak_nothing(progress: float) -> None:
    rng = random.Random(5)
    for _ in range(3_000):
        item = sums.sample(rng, "train", progress)
        assert split(*item.key) == "train"
        assert item.group in ("known", "half")
        assert item.kind == "drill" or sums.FAMILIES[item.kind].group == item.group
        for step in equations(item.answer):
            assert not is_held_out_pair(step.operator, step.left, step.right)


def test_the_curriculum_moves_from_drills_to_long_problems() -> None:
    def counts(progress: float) -> Counter[int]:
        rng = random.Random(1)
        items = [sums.sample(rng, progress=progress) for _ in range(3_000)]
        return Counter(0 if i.kind == "drill" else sums.FAMILIES[i.kind].steps for i in items)

    early, late = counts(0.1), counts(0.9)
    assert early[3] == 0 and early[0] == pytest.approx(1_500, abs=120)
    assert late[0] == pytest.approx(280, abs=70) and late[3] > 500


@pytest.mark.parametrize("pairs", ["seen", "unseen"])
def test_evaluation_pairs_are_what_was_asked_for(pairs: str) -> None:
    for drawn in draws(150, split="test", pairs=pairs):
        assert split(*drawn.key) == "test"
        held = [is_held_out_pair(s.operator, s.left, s.right) for s in drawn.steps]
        assert any(held) == (pairs == "unseen")
    rng = random.Random(2)
    for _ in range(100):
        step = equations(sums.drill(rng, "test", pairs).answer)[0]
        assert is_held_out_pair(step.operator, step.left, step.right) == (pairs == "unseen")


def test_impossible_requests_are_refused() -> None:
    rng = random.Random(0)
    with pytest.raises(ValueError, match="neither adds nor subtracts"):
        sums.problem(rng, "test", family="mul/farm", pairs="unseen")
    with pytest.raises(ValueError, match="contradicts"):
        sums.problem(rng, "train", pairs="unseen")
    with pytest.raises(ValueError, match="no far family has 3 steps"):
        sums.problem(rng, "test", group="far", steps=3)
    with pytest.raises(ValueError, match="style 'latex' is unknown"):
        sums.problem(rng).solution("latex")


def test_the_same_seed_gives_the_same_text() -> None:
    first = sums.sample(random.Random(7))
    assert first == sums.sample(random.Random(7))
    assert len({sums.sample(random.Random(seed)).answer for seed in range(50)}) > 40


@pytest.mark.parametrize("style", STYLES)
def test_each_style_is_read_back_by_its_own_reader(style: str) -> None:
    for group in ("known", "half", "new", "far"):
        for drawn in draws(40, group=group):
            text = drawn.solution(style)
            assert strict_answer(text, style) == drawn.gold
            assert strict_answer(text + " no", "json") is None
            others = [s for s in ("native", "hash", "boxed", "prose") if s != style]
            if style not in ("prose_hash",):
                assert all(strict_answer(text, other) is None for other in others)
            if style not in ("program",):
                assert last_number(text) == drawn.gold


def test_programs_run_and_json_parses() -> None:
    for drawn in draws(60, group="half") + draws(60, family="div_add/farm"):
        scope: dict = {}
        exec(drawn.solution("program"), scope)
        assert scope["solution"]() == int(drawn.gold)
        assert len(json.loads(drawn.solution("json"))["steps"]) == len(drawn.steps)


def test_no_training_item_shows_a_style_kept_for_later() -> None:
    rng = random.Random(11)
    text = "\n".join(sums.sample(rng).answer for _ in range(3_000))
    assert not re.search(r"####|boxed|def |\"answer\"|we (get|find|reach|see)|asked for", text)
