"""Nothing that an evaluation uses may occur in training text."""

from __future__ import annotations

import random
import re
from functools import cache

import pytest

from reftune.nano import facts, sums
from reftune.nano.gates import DRAWS, draw_items
from reftune.nano.item import Item, is_held_out_pair
from reftune.nano.logs_systems import SHOWN
from reftune.nano.mix import SHARES, draw
from reftune.nano.sums_schemas import FAMILIES

PAIR = re.compile(r"(\d+) ([+-]) (\d+)")
FORBIDDEN_FORMATS = ("####", "\\boxed", "def solution", '"answer"', "is the number wanted")


def normal(text: str) -> str:
    """Lower case; words, numbers and operators only."""
    return " ".join(re.findall(r"[a-z]+|\d+|[-+*/]", text.lower()))


def body(item: Item) -> str:
    """What identifies an item as text: its question, or the statement; of a story the story."""
    return normal(item.answer if item.group == "story" else item.question or item.answer)


@cache
def evaluation_texts() -> frozenset[str]:
    """Normalised texts of the gates' sets and of validation and test draws of each sub-world."""
    names = (*DRAWS, "fact recall, withheld phrasings", "one hop with bridge, unshown people")
    items = [item for name in names for item in draw_items(name, 1000)]
    for part in ("validation", "test"):
        rng = random.Random(f"leaks-{part}")
        items += [draw(world, rng, part) for world in SHARES for _ in range(500)]
    rng = random.Random("groups")
    for group in ("new", "far"):
        items += [sums.item(sums.problem(rng, "train", group)) for _ in range(1000)]
    # No evaluation uses pages and echoes; without their signs these short texts would coincide.
    return frozenset(body(item) for item in items if item.group not in ("page", "echo"))


@cache
def withheld_texts() -> frozenset[str]:
    """Normalised withheld phrasings of all facts, by full and by second name."""
    return frozenset(
        normal(facts.render(fact, phrasing, name))
        for fact in facts.facts()
        for phrasing in facts.withheld_phrasings(fact)
        for name in {fact.subject, facts.ALIASES.get(fact.subject, fact.subject)}
    )


def leak(item: Item) -> str:
    """Return what an item leaks, or nothing."""
    text = "" if item.group in ("page", "echo") else body(item)
    whole = f"{item.question} {item.answer}"
    if text in evaluation_texts():
        return "evaluation text"
    if text in withheld_texts() or normal(item.answer) in withheld_texts():
        return "withheld phrasing"
    for left, operator, right in PAIR.findall(whole):
        if is_held_out_pair(operator, int(left), int(right)):
            return "held-out pair"
    if item.kind in FAMILIES and FAMILIES[item.kind].group not in ("known", "half"):
        return "family"
    if item.world == "guided" and FAMILIES[item.key[0]].group != "known":
        return "family"
    if item.world == "facts" and item.group == "unbridged":
        return "one-hop question of an edit subject"
    if item.world == "passages" and item.kind == "4":
        return "passage kind"
    if item.world == "logs" and item.kind not in SHOWN:
        return "log system"
    if item.group in ("page", "echo"):  # their signs are no solutions: no page holds a sum
        return "sum" if re.search(r"\d [-+*/=] \d", whole) else ""
    return next((f"format {form}" for form in FORBIDDEN_FORMATS if form in whole), "")


def scan(number: int) -> None:
    """Draw training items over the whole curriculum and look at each."""
    rng = random.Random("leak-scan")
    worlds = rng.choices(tuple(SHARES), tuple(SHARES.values()), k=number)
    for index, world in enumerate(worlds):
        item = draw(world, rng, progress=index / number)
        found = leak(item)
        assert not found, f"{found}: {item}"


def test_no_evaluation_item_in_training_text() -> None:
    scan(20_000)


@pytest.mark.slow
def test_no_evaluation_item_in_much_training_text() -> None:
    scan(200_000)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (draw_items("two steps, known families", 1)[0], "evaluation text"),
        (draw_items("fact recall, withheld phrasings", 1)[0], "evaluation text"),
        (facts.one_hop_item(facts.PEOPLE[150], "land", 0), "evaluation text"),
        (sums.item(sums.problem(random.Random(0), "train", "far")), "family"),
        (sums.item(sums.problem(random.Random(0), "train", "known"), "hash"), "format"),
        (draw("passages", random.Random(0)), ""),
    ],
)
def test_the_scan_finds_leaks(item: Item, expected: str) -> None:
    """The scan itself is tested: a leak of each sort is seen."""
    assert leak(item).startswith(expected) and bool(leak(item)) == bool(expected)


def test_the_scan_finds_held_out_pairs() -> None:
    pairs = ((a, b) for a in range(2, 99) for b in range(2, 99))
    left, right = next(p for p in pairs if is_held_out_pair("+", *p))
    item = Item("sums", "drill", (), "", f"{left} + {right} = {left + right}.")
    assert leak(item) == "held-out pair"


def test_the_scan_finds_withheld_statements() -> None:
    fact = facts.facts()[3]
    statement = facts.statement(fact, facts.withheld_phrasings(fact)[1])
    assert leak(statement) == "withheld phrasing"
