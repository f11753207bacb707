"""What follows a passage in training (sub-world C): further questions, and drills of look-up.

Drills are to passages what number drills are to word problems. A question about a passage asks for
several skills at once: to tie what a sentence says to whom it says it of, to find that sentence by
a name, and, where the answer is yes or no, to compare what was found with what was asked. Questions
alone taught none of them to the second release of the weights (its gates: 0.53 of the look-ups and
0.50 of yes and no). So drills teach one after the other:

1. notes (`key Anna. cup Ben.`), told again in another order: finding by a name;
2. passages of one relation, told again in other words, and open questions: tying;
3. yes/no questions, most of them with a reason that says what is the case before yes or no.

In drills only the words that had to be found carry loss.
"""

from __future__ import annotations

import random
from collections import Counter

from reftune.nano.item import Item, Span, Split
from reftune.nano.item import split as split_of
from reftune.nano.passages_plans import Form, Passage, Words, ask_about, pick
from reftune.nano.passages_words import COUNTED, RELATIONS

RETELL_ASKS = ("Tell it in other words.", "Say all that again.", "What do you know?")
WHY = " Say why."
"""Ends a yes/no question whose answer says first what is the case, then yes or no."""

_TOPICS = tuple(RELATIONS)

Turn = tuple[str, str]
"""Question and answer."""


def drill(rng: random.Random, split: Split, stage: float) -> Item:
    """Return a drill whose facts lie in `split`.

    Args:
        rng: Source of all chance.
        split: Side of the split the key must lie on.
        stage: How far the drills have come, 0 to 1, or more: see the order above.
    """
    is_early = stage < 0.31
    is_short = stage < 0.15 or 0.31 <= stage < 0.85
    passage = plain(rng, split, rng.randint(2, 3 if is_short else 5))
    notes, again = (0.5, 0.75) if is_early else (0.05, 0.15)
    place, first = rng.random(), passage.passage
    if place < notes:
        first = _note(rng, passage)
        turns = [(pick(rng, RETELL_ASKS), _note(rng, passage)) for _ in range(3)]
    elif place < again:
        turns = [(pick(rng, RETELL_ASKS), retold(rng, passage)) for _ in range(2)]
    else:
        checked, why = (0.1, 0.0) if is_early else (0.7, 0.65)
        turns = list(follow_ups(rng, passage, 5, checked, why))
    (question, answer), *more = turns
    return Item(
        world="passages",
        kind="1",
        key=passage.key,
        question=f"{first} {question}",
        answer=answer,
        group="drill",
        more=tuple(more),
        focus=tuple(sought(answer) for _, answer in turns),
    )


def plain(rng: random.Random, split: Split, length: int) -> Passage:
    """Return a passage of `length` facts of one relation, nothing denied or changed."""
    while True:
        topic, words = pick(rng, _TOPICS), Words(rng)
        relation, counted = RELATIONS[topic], pick(rng, COUNTED)
        facts = [(words.draw(relation.subject), words.draw(relation.value)) for _ in range(length)]
        key = ("1", *sorted(f"{topic}:{s}={v}" for s, v in facts))
        if split_of("passages", *key) == split:
            break
    text = " ".join(pick(rng, relation.states).format(s=s, v=v, c=counted) for s, v in facts)
    return Passage(text, "", "", "", 1, "open", key, length)


def sought(answer: str) -> tuple[Span, ...]:
    """Return where in an answer the words stand that had to be found: the last of each sentence.

    >>> sought("Anna has two nuts. No.")
    ((9, 12), (19, 21))
    """
    spans: list[Span] = []
    at = 0
    for sentence in answer.removesuffix(".").split(". "):
        words = sentence.split(" ")
        skip = len(words[-1]) + 1 if words[-1] in COUNTED else 0
        end = at + len(sentence) - skip
        spans.append((end - len(words[-2 if skip else -1]), end))
        at += len(sentence) + 2
    return tuple(spans)


def _note(rng: random.Random, passage: Passage) -> str:
    """Return what holds as bare notes: the value follows its subject at once."""
    facts = [(s, v) for found in _standing(passage).values() for s, (v, _) in found.items()]
    rng.shuffle(facts)
    return " ".join(f"{s} {v}." for s, v in facts)


def retold(rng: random.Random, passage: Passage) -> str:
    """Return what holds at the end of a passage, in another order and in other words."""
    counted = _counted_word(passage)
    facts = [(t, s, v) for t, found in _standing(passage).items() for s, (v, _) in found.items()]
    rng.shuffle(facts)
    return " ".join(pick(rng, RELATIONS[t].states).format(s=s, v=v, c=counted) for t, s, v in facts)


def follow_ups(
    rng: random.Random, passage: Passage, number: int, checked: float = 0.4, why: float = 0.0
) -> tuple[Turn, ...]:
    """Return up to `number` further questions about a passage, with their answers.

    Yes and no are equally often right; a wrong value stands elsewhere in the passage.

    Args:
        rng: Source of all chance.
        passage: The passage.
        number: The most questions.
        checked: Share of yes/no questions, where there is something to deny.
        why: Share of these that ask why (`WHY`).
    """
    standing = _standing(passage)
    counted = _counted_word(passage)
    places = [(topic, s) for topic, subjects in standing.items() for s in subjects]
    rng.shuffle(places)
    asked: list[Turn] = []
    for topic, s in (places * 2)[:number]:
        value, before = standing[topic][s]
        values = Counter(v for v, _ in standing[topic].values())
        others = sorted({*values, before} - {value, ""})
        wrong = pick(rng, tuple(others)) if others and rng.random() < 0.5 else ""
        form: Form = "yes_no" if others and rng.random() < checked else "open"
        is_only = values[value] == 1 and not any(
            value == old for _, old in standing[topic].values()
        )
        turn = ask_about(rng, topic, s, value, counted, form, wrong, is_only)
        if form == "yes_no" and why and rng.random() < why:
            fact = pick(rng, RELATIONS[topic].states).format(s=s, v=value, c=counted)
            turn = (turn[0] + WHY, f"{fact} {turn[1]}")
        if turn not in asked and turn[0] != passage.question:
            asked.append(turn)
    return tuple(asked)


def _counted_word(passage: Passage) -> str:
    return next((word for word in COUNTED if word in passage.passage), COUNTED[0])


def _standing(passage: Passage) -> dict[str, dict[str, tuple[str, str]]]:
    """Return what holds at the end: by relation and subject the value and the value before."""
    found: dict[str, dict[str, tuple[str, str]]] = {topic: {} for topic in RELATIONS}
    codes = [code.split(":", 1) for code in passage.key[1:]]
    codes = [(topic, rest) for topic, rest in codes if topic in RELATIONS]
    for topic, rest in codes:
        if "=" in rest:
            subject, value = rest.split("=")
            found[topic][subject] = (value, "")
    for topic, rest in codes:
        if ">" in rest:
            subject, change = rest.split(":")
            before, value = change.split(">")
            found[topic][subject] = (value, before)
    return found
