"""Forgettable people: sizes, form of the answers, nested forget sets, absence from the base."""

from __future__ import annotations

import random

import pytest

from reftune.nano import facts, people


def test_a_hundred_people_with_ten_questions_each():
    entries = people.forgettable()
    assert len({entry.person for entry in entries}) == 100
    assert len({entry.question for entry in entries}) == 1000
    assert not {e.question for e in entries} & {e.paraphrase for e in entries}


def test_answers_have_8_to_20_words_and_five_wrong_ones_of_equal_form():
    for entry in people.forgettable():
        for text in (entry.answer, *entry.wrong):
            assert 8 <= len(text.split()) <= 20, text
        assert (
            len({entry.answer, *entry.wrong}) == len({entry.reworded, *entry.reworded_wrong}) == 6
        )
        assert entry.reworded != entry.answer
        right = people._details(entry.person, entry.topic, 0)
        assert all(detail in entry.answer and detail in entry.reworded for detail in right)


def test_forget_sets_are_nested_whole_people_and_complete_with_retain():
    sets = [people.forget(percent) for percent in people.PERCENTS]
    assert [len({entry.person for entry in part}) for part in sets] == [1, 5, 10]
    for percent, part in zip(people.PERCENTS, sets, strict=True):
        assert part + people.retain(percent) == people.forgettable()
    with pytest.raises(ValueError, match="forget one of"):
        people.forget(2)


def test_the_base_never_hears_of_them():
    rng = random.Random(4)
    text = " ".join(
        f"{item.question} {item.answer}" for item in (facts.sample(rng) for _ in range(20_000))
    )
    words = set(text.replace(".", " ").replace("?", " ").split())
    assert not words & {part for entry in people.forget(10) for part in entry.person.split()}


def test_items_carry_the_taught_question_or_the_paraphrase():
    entry = people.forgettable()[0]
    assert entry.item().question == entry.question
    assert entry.item(paraphrase=True).question == entry.paraphrase
    assert entry.item().key == entry.item(paraphrase=True).key
