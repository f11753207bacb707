"""Sub-world F: coherence of slots, splits, variety, and no clash with sub-world B."""

from __future__ import annotations

import random
import re

import pytest

from reftune.nano import facts, stories, stories_parts
from reftune.nano.item import split as split_of
from reftune.nano.names import ACTORS


def draws(split, number, kind=None, seed=1):
    rng = random.Random(seed)
    return [stories.sample(rng, split, kind) for _ in range(number)]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_items_stay_in_their_split_and_out_of_training(split):
    items = draws(split, 2_000)
    assert all(split_of(*item.key) == split for item in items)
    train = {(item.question, item.answer) for item in draws("train", 20_000)}
    assert not train & {(item.question, item.answer) for item in items}


def test_training_keys_are_training_keys_except_the_closed_chat_lines():
    for item in draws("train", 3_000):
        assert split_of(*item.key) == "train" or (item.kind == "chat" and len(item.key) == 2)


def test_stories_have_four_to_ten_sentences_and_two_actors_at_most():
    for item in draws("train", 2_000, "story"):
        assert 5 <= len(re.findall(r"[.?!]", item.answer)) <= 12
        named = {name for name in ACTORS if re.search(rf"\b{name}\b", item.answer)}
        assert item.key[1] in named and named <= set(item.key[1:3])
        assert "{" not in item.answer and "  " not in item.answer


def test_a_story_keeps_its_thing_and_animal():
    for item in draws("train", 2_000, "story"):
        animals = {a for a in stories_parts.ANIMALS if re.search(rf"\b{a}\b", item.answer)}
        assert len(animals) <= 1


def test_asked_stories_name_their_hero():
    items = [item for item in draws("train", 500, "story") if item.question]
    assert 180 < len(items) < 320
    assert all(item.gold in item.question and item.gold in item.answer for item in items)


def test_stories_hardly_ever_repeat():
    texts = [item.answer for item in draws("train", 5_000, "story")]
    assert len(set(texts)) > 4_990


def test_questions_without_an_answer_get_the_reply_and_chat_never_does():
    for item in draws("train", 3_000):
        assert (item.answer == stories.UNKNOWN_ANSWER) == (item.group == "unknown")


def test_no_name_of_the_facts_occurs():
    words = set()
    for item in draws("train", 5_000):
        words |= set(re.findall(r"[A-Z]\w+", f"{item.question} {item.answer}"))
    assert not words & facts.RESERVED_NAMES
    assert len(words) > 60


def test_the_same_seed_gives_the_same_items():
    assert draws("train", 200) == draws("train", 200)
