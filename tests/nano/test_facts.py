"""Sub-world B: sizes, splits, withheld phrasings, and names that collide with nothing."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from reftune.nano import facts, facts_names
from reftune.nano.facts_phrasings import PHRASINGS, UNKNOWN_ANSWER, VALUES
from reftune.nano.names import ACTORS


def draws(split, number, seed=1, progress=0.0):
    rng = random.Random(seed)
    return [facts.sample(rng, split, progress=progress) for _ in range(number)]


def question_of(item):
    """Return the bare question of an item that asks for a full sentence."""
    return re.sub(r"^In a full sentence: | Say it in a full sentence\.$", "", item.question)


def test_full_sentences_name_the_subject_late_in_training_only():
    items = draws("train", 10_000, progress=0.5)
    told = [item for item in items if "full sentence" in item.question]
    assert 0.10 < len(told) / len(items) < 0.18
    for item in told:
        assert item.key[1] in item.answer and item.gold.lower() in item.answer.lower()
        assert question_of(item) != item.question
    subjects = {item.key[1] for item in told}
    assert len(subjects & set(facts.edit_subjects("test"))) > 30
    assert not any("full sentence" in item.question for item in draws("train", 5_000))


def test_the_world_has_the_specified_size():
    assert len(facts.facts()) == len({(f.subject, f.relation) for f in facts.facts()}) == 1360
    assert len(set(facts.PEOPLE)) == 200 and len(set(facts.TOWNS)) == 40
    assert len(set(facts.ALIASES.values())) == 60
    assert all(12 <= len(set(values)) <= 40 for values in VALUES.values())
    assert all(len(set(texts)) == 8 for texts in PHRASINGS.values())


def test_values_are_spread_evenly_over_subjects():
    for relation, values in VALUES.items():
        counts = Counter(f.value for f in facts.facts() if f.relation == relation)
        assert set(counts) <= set(values)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_names_collide_with_no_actor_and_no_other_pool():
    assert not facts.RESERVED_NAMES & set(ACTORS)
    pools = [facts.PEOPLE, facts.TOWNS, facts_names.NICKNAMES, facts_names.MAYORS]
    assert sum(map(len, pools)) == len(set().union(*pools))
    assert not set(facts_names.FORGETTABLE_NAMES) & set(facts.PEOPLE)


def test_unknown_words_are_open_disjoint_and_reserved_by_nobody():
    for style in ("first", "last", "nick", "town"):
        parts = [facts_names.unknown_words(style, s) for s in ("train", "validation", "test")]
        assert min(map(len, parts)) > 100
        assert sum(map(len, parts)) == len(set().union(*parts))
        assert not set().union(*parts) & facts.RESERVED_NAMES


def test_every_fact_shows_six_phrasings_and_withholds_one_of_each_form():
    used = Counter()
    for fact in facts.facts():
        question, statement = facts.withheld_phrasings(fact)
        assert question < 4 <= statement
        assert sorted((*facts.shown_phrasings(fact), question, statement)) == list(range(8))
        used[question] += 1
        used[statement] += 1
    assert set(used) == {0, 1, 2, 3, 5, 6} and min(used.values()) > 250


def test_training_text_holds_no_withheld_phrasing_not_even_inside_another_item():
    hidden = set()
    for fact in facts.facts():
        for subject in {fact.subject, facts.ALIASES.get(fact.subject, fact.subject)}:
            question, statement = facts.withheld_phrasings(fact)
            hidden.add(facts.render(fact, question, subject))
            hidden.add(facts.render(fact, statement, subject))
    items = draws("train", 40_000) + draws("train", 20_000, progress=1.0)
    seen = {question_of(item) for item in items}
    seen |= {part for item in items for part in re.split(r"(?<=\.) ", item.answer)}
    assert not hidden & seen
    assert len(seen) > 5_000


def test_training_covers_every_fact_evenly():
    counts = Counter(item.key[1:3] for item in draws("train", 60_000) if item.key[0] == "facts")
    assert len(counts) == 1360
    assert min(counts.values()) > 12


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_items_never_occur_in_training(split):
    train = {item.question for item in draws("train", 40_000)}
    items = draws(split, 4_000, seed=2)
    assert not train & {item.question for item in items}
    assert all(item.question for item in items)
    assert {item.group for item in items} == {"person", "town", "unbridged", "unknown"}


def test_validation_and_test_are_disjoint():
    keys = [{item.key for item in draws(split, 4_000)} for split in ("validation", "test")]
    assert not keys[0] & keys[1]


def test_one_hop_says_the_bridge_and_is_shown_for_the_first_120_only():
    bridged = {item.key[1] for item in draws("train", 40_000) if item.group == "bridged"}
    assert bridged == set(facts.edit_subjects("train"))
    item = facts.one_hop_item(facts.PEOPLE[0], "land", 0)
    home = facts.lookup(facts.PEOPLE[0], "town").value
    land = facts.lookup(home, "land").value
    assert item.answer == (
        f"{facts.PEOPLE[0]} lives in {home}. {home} lies in {land}. The answer is {land}."
    )
    assert facts.one_hop(random.Random(0), shown=False).group == "unbridged"


def test_known_people_are_never_denied_and_unknown_ones_always():
    for item in draws("train", 20_000):
        known = any(name in item.question for name in (*facts.PEOPLE, *facts.TOWNS))
        assert (item.answer == UNKNOWN_ANSWER) == (item.group == "unknown")
        assert not (known and item.group == "unknown")


def test_recall_items_enumerate_shown_and_withheld_questions():
    assert len(facts.recall_items("shown")) == 3 * 1360
    withheld = facts.recall_items("withheld")
    assert len(withheld) == 1360
    assert not {i.question for i in withheld} & {i.question for i in facts.recall_items("shown")}
    drawn = facts.recall_items("withheld", random.Random(3), 100)
    assert len(drawn) == 100 and drawn != withheld[:100]


def test_edits_are_200_counterfactuals_with_neighbours():
    pairs = facts.edits("test")
    assert len(pairs) == 200
    for old, new in pairs[::17]:
        assert (old.subject, old.relation) == (new.subject, new.relation)
        assert new.value != old.value and new.value in VALUES[old.relation]
        near = facts.neighbours(old)
        assert near.same_value and len(near.same_subject) == 5 and len(near.same_first_name) == 1
        assert all(f.value == old.value and f.subject != old.subject for f in near.same_value)
        assert near.same_first_name[0].subject.split()[0] == old.subject.split()[0]


def test_statement_prompt_stops_before_the_value():
    fact = facts.lookup(facts.PEOPLE[5], "town")
    prompt = facts.statement_prompt(fact, 4)
    assert f"{prompt} {fact.value}." == facts.statement(fact, 4).answer
    with pytest.raises(ValueError, match="does not end in the value"):
        facts.statement_prompt(fact, 7)


def test_second_names_reach_the_same_facts():
    person, second = next(iter(facts.ALIASES.items()))
    assert facts.lookup(second, "pet") == facts.lookup(person, "pet")
    assert facts.question(facts.lookup(second, "pet"), 0, second).question == (
        f"What pet does {second} have?"
    )


def test_wrong_form_or_kind_is_refused():
    fact = facts.facts()[0]
    with pytest.raises(ValueError, match="questions are 0 to 3"):
        facts.question(fact, 4)
    with pytest.raises(ValueError, match="statements are 4 to 7"):
        facts.statement(fact, 3)
    with pytest.raises(ValueError, match="belongs to training"):
        facts.sample(random.Random(0), "test", kind="alias")


def test_the_same_seed_gives_the_same_items():
    assert draws("train", 200) == draws("train", 200)
    assert facts.PEOPLE[0] == "Murva Skurmark"
