"""Sub-world B: 200 invented people and 40 invented towns, 1,360 facts.

People have six relations and towns four, values come from closed sets, and every fact is equally
likely to be shown. Each relation has eight phrasings; a fact withholds one question and one
statement of them, chosen by keyed hash, so that every phrasing is known to the model and yet new
for that fact. 60 people have a second name. Questions one hop away (the land a person lives in)
are answered with the bridge said aloud and shown for 120 people only. Names that belong to nobody
are answered with `I do not know.`

Splits. Training draws shown phrasings, one-hop questions of the first 120 people and training
names of nobody. Validation and test draw withheld questions (each fact belongs to one of the
two), one-hop questions of the other 80 people (40 each), and their own names of nobody.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Literal

from reftune.nano import facts_names as names
from reftune.nano.facts_phrasings import (
    ALIAS_QUESTIONS,
    ALIAS_STATEMENTS,
    EDIT_RELATIONS,
    NUM_PHRASINGS,
    NUM_QUESTIONS,
    ONE_HOP,
    PERSON_RELATIONS,
    PHRASINGS,
    TOWN_RELATIONS,
    UNKNOWN_ANSWER,
    VALUES,
    WHO_IS,
)
from reftune.nano.item import DENSE_FROM, Item, Split, fraction

NUM_PEOPLE, NUM_TOWNS = 200, 40
NUM_BRIDGED = 120
"""People whose one-hop questions are shown; the other 80 are the subjects that get edited."""

Kind = Literal["question", "statement", "one hop", "unknown", "alias"]
MIXTURE: dict[Kind, float] = {
    "question": 0.46,
    "statement": 0.35,
    "one hop": 0.08,
    "unknown": 0.08,
    "alias": 0.03,
}
"""Share of the items of training text. Facts thus get about 140 showings in six million tokens."""

SENTENCE_RATE = 0.3
"""Share of the shown questions answered in a full sentence from `DENSE_FROM` on. A bridge begins
with the person's name: people not shown in bridges were given the surname of those that were."""
SENTENCE_ASKS = ("In a full sentence: {x}", "{x} Say it in a full sentence.")

ALIAS_RATE = 0.3
"""How often a person with a second name is called by it in questions and statements of facts."""

PEOPLE: tuple[str, ...] = tuple(
    f"{names.FIRST_NAMES[i % len(names.FIRST_NAMES)]} {names.LAST_NAMES[i]}"
    for i in range(NUM_PEOPLE)
)
"""Full names. Person i shares the first name with person i + 100; no two share the last name."""

TOWNS: tuple[str, ...] = names.TOWN_NAMES
"""Names of the towns."""

ALIASES: dict[str, str] = dict(
    zip(
        (name for i, name in enumerate(PEOPLE) if i % 10 in (0, 3, 7)), names.NICKNAMES, strict=True
    )
)
"""Second name of each of the 60 people that have one."""

RESERVED_NAMES: frozenset[str] = frozenset(
    word
    for name in (
        *(*PEOPLE, *names.NICKNAMES, *names.MAYORS, *TOWNS),
        *(*VALUES["land"], *VALUES["river"], *names.FORGETTABLE_NAMES),
    )
    for word in (name, *name.split())
)
"""Names other sub-worlds must not use."""


@dataclass(frozen=True)
class Fact:
    """One fact: `relation` of `subject` is `value`.

    >>> Fact("Mira", "town", "Tarn").relation
    'town'
    """

    subject: str
    relation: str
    value: str


@dataclass(frozen=True)
class Neighbours:
    """Facts that an edit of one fact must leave alone.

    Attributes:
        same_value: Same relation and old value, other subject.
        same_subject: Same subject, other relation.
        same_first_name: Same relation, another subject with the same first name.
    """

    same_value: tuple[Fact, ...]
    same_subject: tuple[Fact, ...]
    same_first_name: tuple[Fact, ...]


def _assign(subjects: Sequence[str], relation: str) -> dict[str, str]:
    """Deal the values of a relation out evenly, in an order that a keyed hash decides."""
    order = sorted(subjects, key=lambda subject: fraction("fact", relation, subject))
    values = VALUES[relation]
    return {subject: values[i % len(values)] for i, subject in enumerate(order)}


@lru_cache(maxsize=1)
def _table() -> dict[tuple[str, str], Fact]:
    rows: dict[tuple[str, str], Fact] = {}
    for subjects, relations in ((PEOPLE, PERSON_RELATIONS), (TOWNS, TOWN_RELATIONS)):
        dealt = {relation: _assign(subjects, relation) for relation in relations}
        for subject in subjects:
            for relation in relations:
                rows[subject, relation] = Fact(subject, relation, dealt[relation][subject])
    return rows


@lru_cache(maxsize=1)
def facts() -> tuple[Fact, ...]:
    """Return all 1,360 facts, people first.

    >>> len(facts())
    1360
    """
    return tuple(_table().values())


def lookup(subject: str, relation: str) -> Fact:
    """Return the fact of a subject (full name or second name) and a relation."""
    return _table()[_full_names().get(subject, subject), relation]


@lru_cache(maxsize=1)
def _full_names() -> dict[str, str]:
    return {alias: full for full, alias in ALIASES.items()}


def phrasings(relation: str) -> tuple[str, ...]:
    """Return the eight wordings of a relation: four questions, then four statements."""
    return PHRASINGS[relation]


@cache
def withheld_phrasings(fact: Fact) -> tuple[int, ...]:
    """Return the two phrasings (a question, a statement) in which the base never sees `fact`.

    The statement is 5 or 6: 4 is the wording of bridges, and 7 does not end in the value.
    """
    question_place = fraction("withheld question", fact.subject, fact.relation)
    statement_place = fraction("withheld statement", fact.subject, fact.relation)
    return int(question_place * NUM_QUESTIONS), 5 + int(statement_place * 2)


@cache
def shown_phrasings(fact: Fact) -> tuple[int, ...]:
    """Return the six phrasings in which the base sees `fact`."""
    hidden = withheld_phrasings(fact)
    return tuple(i for i in range(NUM_PHRASINGS) if i not in hidden)


def render(fact: Fact, phrasing: int, subject: str = "") -> str:
    """Return `fact` in one of its eight phrasings, about `subject` instead of its own if given."""
    text = PHRASINGS[fact.relation][phrasing].format(s=subject or fact.subject, v=fact.value)
    return text[0].upper() + text[1:]


def _item(fact: Fact, phrasing: int, subject: str = "") -> Item:
    text = render(fact, phrasing, subject)
    asked, answer = (text, f"{fact.value}.") if phrasing < NUM_QUESTIONS else ("", text)
    key = ("facts", fact.subject, fact.relation, str(phrasing))
    group = "person" if fact.relation in PERSON_RELATIONS else "town"
    return Item("facts", fact.relation, key, asked, answer, fact.value, group)


def question(fact: Fact, phrasing: int, subject: str = "") -> Item:
    """Return `fact` as a question; `phrasing` is 0 to 3, `subject` may be a second name."""
    if not 0 <= phrasing < NUM_QUESTIONS:
        raise ValueError(f"phrasing {phrasing} is no question; questions are 0 to 3")
    return _item(fact, phrasing, subject)


def statement(fact: Fact, phrasing: int, subject: str = "") -> Item:
    """Return `fact` as a plain statement; `phrasing` is 4 to 7, `subject` may be a second name."""
    if not NUM_QUESTIONS <= phrasing < NUM_PHRASINGS:
        raise ValueError(f"phrasing {phrasing} is no statement; statements are 4 to 7")
    return _item(fact, phrasing, subject)


def statement_prompt(fact: Fact, phrasing: int, subject: str = "") -> str:
    """Return a statement up to where its value begins, for completion prompts.

    Args:
        fact: The fact; its value is left out.
        phrasing: 4 to 6, the statements that end in the value.
        subject: Second name to use instead of the subject's own.
    """
    if not NUM_QUESTIONS <= phrasing < NUM_PHRASINGS - 1:
        raise ValueError(f"phrasing {phrasing} does not end in the value; use 4, 5 or 6")
    template = PHRASINGS[fact.relation][phrasing]
    return template[: template.index(" {v}")].format(s=subject or fact.subject)


@cache
def evaluation_split(fact: Fact) -> Split:
    """Return which of validation (40 %) and test (60 %) the withheld question of `fact` is in."""
    place = fraction("evaluation", fact.subject, fact.relation)
    return "validation" if place < 0.4 else "test"


def recall_items(
    kind: Literal["shown", "withheld"],
    rng: random.Random | None = None,
    num_items: int | None = None,
) -> list[Item]:
    """Return recall questions for the gates.

    Args:
        kind: `shown` gives the three shown questions of each fact, `withheld` the withheld one.
        rng: Draws the sample. Without it the items come in the order of the facts.
        num_items: How many items to return; all by default.
    """
    out = []
    for fact in facts():
        pool = shown_phrasings(fact) if kind == "shown" else withheld_phrasings(fact)
        out.extend(question(fact, i) for i in pool if i < NUM_QUESTIONS)
    if rng is not None:
        rng.shuffle(out)
    return out if num_items is None else out[:num_items]


def one_hop(rng: random.Random, shown: bool = True, people: Sequence[str] | None = None) -> Item:
    """Draw a question one hop away, answered with the bridge said aloud.

    Args:
        rng: Source of chance.
        shown: Whether to ask about the 120 people shown so in training, or about the other 80.
        people: Full names to draw from instead.
    """
    pool = people or (PEOPLE[:NUM_BRIDGED] if shown else PEOPLE[NUM_BRIDGED:])
    return one_hop_item(rng.choice(pool), rng.choice(TOWN_RELATIONS), rng.randrange(2))


def one_hop_item(person: str, relation: str, phrasing: int) -> Item:
    """Return the one-hop question about a town relation of a person's home, phrasing 0 or 1."""
    home = lookup(person, "town")
    goal = lookup(home.value, relation)
    bridge = f"{render(home, NUM_QUESTIONS)} {render(goal, NUM_QUESTIONS)}"
    return Item(
        world="facts",
        kind=f"one hop {relation}",
        key=("one hop", person, relation, str(phrasing)),
        question=ONE_HOP[relation][phrasing].format(s=person),
        answer=f"{bridge} The answer is {goal.value}.",
        gold=goal.value,
        group="bridged" if person in _bridged() else "unbridged",
    )


@lru_cache(maxsize=1)
def _bridged() -> frozenset[str]:
    return frozenset(PEOPLE[:NUM_BRIDGED])


def unknown(rng: random.Random, split: Split = "train") -> Item:
    """Draw a question about a person (80 %) or town that does not exist, in any known wording."""
    if rng.random() < 0.2:
        relation = rng.choice(TOWN_RELATIONS)
        subject = word = rng.choice(names.unknown_words("town", split))
        template = PHRASINGS[relation][rng.randrange(NUM_QUESTIONS)]
    else:
        subject, word = names.unknown_person(rng, split)
        relation, template = _person_question(rng)
    asked = template.format(s=subject, v=subject)
    return Item("facts", relation, ("unknown", word), asked, UNKNOWN_ANSWER, "", "unknown")


def _person_question(rng: random.Random) -> tuple[str, str]:
    """Return a relation and a question template that may be asked about any person."""
    draw = rng.random()
    if draw < 0.12:
        relation = rng.choice(TOWN_RELATIONS)
        return f"one hop {relation}", ONE_HOP[relation][rng.randrange(2)]
    if draw < 0.16:
        return "alias", rng.choice((*ALIAS_QUESTIONS, WHO_IS))
    relation = rng.choice(PERSON_RELATIONS)
    return relation, PHRASINGS[relation][rng.randrange(NUM_QUESTIONS)]


def alias(rng: random.Random) -> Item:
    """Draw a question (60 %) or statement that ties a person's two names together."""
    person = rng.choice(tuple(ALIASES))
    second = ALIASES[person]
    asked, answer, gold = "", "", second
    draw = rng.random()
    if draw < 0.3:
        asked, answer = rng.choice(ALIAS_QUESTIONS).format(s=person), f"{second}."
    elif draw < 0.6:
        asked, answer, gold = WHO_IS.format(v=second), f"{person}.", person
    else:
        answer = rng.choice(ALIAS_STATEMENTS).format(s=person, v=second)
    return Item("facts", "alias", ("alias", person), asked, answer, gold, "alias")


def edit_subjects(split: Split) -> tuple[str, ...]:
    """Return the people of one part of the editing study.

    `train` are 120 people for locality and regularisation prompts, `validation` and `test` 40 each
    whose facts get edited and who were never shown with a one-hop question.

    >>> [len(edit_subjects(part)) for part in ("train", "validation", "test")]
    [120, 40, 40]
    """
    bounds = {"train": (0, 120), "validation": (120, 160), "test": (160, 200)}
    start, end = bounds[split]
    return PEOPLE[start:end]


def edit_target(fact: Fact) -> Fact:
    """Return the counterfactual that replaces `fact`: another value of the same closed set."""
    others = [value for value in VALUES[fact.relation] if value != fact.value]
    place = fraction("edit", fact.subject, fact.relation)
    return Fact(fact.subject, fact.relation, others[int(place * len(others))])


def edits(split: Split) -> list[tuple[Fact, Fact]]:
    """Return the (old, new) pairs of single edits: each subject of `split` x five relations."""
    pairs = []
    for subject in edit_subjects(split):
        for relation in EDIT_RELATIONS:
            old = lookup(subject, relation)
            pairs.append((old, edit_target(old)))
    return pairs


def neighbours(fact: Fact) -> Neighbours:
    """Return the facts near `fact` that an edit of it must not change."""
    first = fact.subject.split()[0]
    same_relation = [
        f for f in facts() if f.relation == fact.relation and f.subject != fact.subject
    ]
    return Neighbours(
        same_value=tuple(f for f in same_relation if f.value == fact.value),
        same_subject=tuple(
            f for f in facts() if f.subject == fact.subject and f.relation != fact.relation
        ),
        same_first_name=tuple(f for f in same_relation if f.subject.split()[0] == first),
    )


@cache
def _withheld_of(split: Split) -> tuple[Fact, ...]:
    return tuple(fact for fact in facts() if evaluation_split(fact) == split)


def _shown(rng: random.Random, kind: Kind) -> Item:
    fact = rng.choice(facts())
    low, high = (0, NUM_QUESTIONS) if kind == "question" else (NUM_QUESTIONS, NUM_PHRASINGS)
    phrasing = rng.choice([i for i in shown_phrasings(fact) if low <= i < high])
    second = ALIASES.get(fact.subject, "")
    return _item(fact, phrasing, second if second and rng.random() < ALIAS_RATE else "")


def in_a_sentence(rng: random.Random) -> Item:
    """Draw a question that asks for a full sentence; both wordings are shown ones of its fact."""
    fact = rng.choice(facts())
    shown = shown_phrasings(fact)
    asked = rng.choice([i for i in shown if i < NUM_QUESTIONS])
    told = rng.choice([i for i in shown if i >= NUM_QUESTIONS])
    item = _item(fact, asked)
    question = rng.choice(SENTENCE_ASKS).format(x=item.question)
    return replace(item, question=question, answer=_item(fact, told).answer)


def sample(
    rng: random.Random,
    split: Split = "train",
    kind: Kind | None = None,
    progress: float = 0.0,
) -> Item:
    """Draw an item of sub-world B.

    Args:
        rng: Source of chance.
        split: `train` emits shown phrasings; `validation` and `test` withheld questions, one-hop
            questions of people not shown in them, and names of nobody kept for that split.
        kind: Draw only this kind instead of the mixture. Statements and second names are for
            training only.
        progress: Place in training, 0 to 1; see `DENSE_FROM`.
    """
    if kind is None and split == "train":
        kind = rng.choices(tuple(MIXTURE), tuple(MIXTURE.values()))[0]
    elif kind is None:
        kind = rng.choices(("question", "one hop", "unknown"), (0.6, 0.2, 0.2))[0]
    if kind == "unknown":
        return unknown(rng, split)
    if kind == "one hop":
        return one_hop(rng, people=edit_subjects(split))
    if split == "train":
        if kind == "alias":
            return alias(rng)
        if kind == "question" and progress >= DENSE_FROM and rng.random() < SENTENCE_RATE:
            return in_a_sentence(rng)
        return _shown(rng, kind)
    if kind != "question":
        raise ValueError(f"kind {kind!r} belongs to training; {split} has no items of it")
    fact = rng.choice(_withheld_of(split))
    return _item(fact, withheld_phrasings(fact)[0])
