"""What a passage asks (sub-world C): question and answer, drawn before any fact."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from reftune.nano.passages_words import (
    COUNTED,
    COUNTS,
    CROWD_ASK,
    CROWD_CHECK,
    JOINS,
    MORE_ASKS,
    MORE_CHECKS,
    NUMBERS,
    POOLS,
    RELATIONS,
)

Form = Literal["open", "yes_no"]
COUNT_WORDS = ("zero", "one", *NUMBERS)
_RELATIONS = tuple(RELATIONS)
_JOINS = tuple(JOINS)


@dataclass(frozen=True)
class Passage:
    """A passage with its question, for tasks that build their own template.

    Attributes:
        passage: One to nine sentences.
        question: The question, with its question mark.
        answer: Native answer (`Yes.`, `Anna.`, `In the kitchen.`).
        gold: Short value (`yes`, `no`, `Anna`, `kitchen`); it occurs in the answer up to case.
        kind: 1 stated, 2 denied or changed, 3 joined, 4 counted or compared.
        form: `open` or `yes_no`.
        key: Kind and sorted facts.
        length: Number of sentences.
        reason: Sentences of the passage that settle the question; counted ones with a tally.
    """

    passage: str
    question: str
    answer: str
    gold: str
    kind: int
    form: Form
    key: tuple[str, ...]
    length: int
    reason: str = ""


@dataclass
class Plan:
    """What is asked and what the answer is; chosen before any fact."""

    topic: str
    words: dict[str, str]
    question: str = ""
    answer: str = ""
    gold: str = ""
    label: bool = True
    number: int = 0


class Words:
    """Draws words, each at most once a passage, and remembers which actors may be named again."""

    def __init__(self, rng: random.Random, used: dict[str, str] | None = None) -> None:
        self.rng = rng
        self.used = set((used or {}).values())
        self.numbers = sum(word in NUMBERS for word in self.used)
        self.again: dict[str, list[str]] = {"has": [], "at": []}

    def draw(self, pool: str) -> str:
        """Return an unused word of `pool`."""
        words = POOLS[pool]
        self.numbers += pool == "number"
        while True:
            word = words[int(self.rng.random() * len(words))]
            if word not in self.used:
                self.used.add(word)
                return word


def pick(rng: random.Random, options: tuple[str, ...]) -> str:
    """Return one of `options`; faster than `rng.choice`."""
    return options[int(rng.random() * len(options))]


def _settle(rng: random.Random, plan: Plan, check: str) -> Plan:
    """Turn `plan` into a yes/no question with a fair answer."""
    plan.question = check
    plan.label = rng.random() < 0.5
    plan.answer, plan.gold = ("Yes.", "yes") if plan.label else ("No.", "no")
    return plan


def plan_relation(rng: random.Random, kind: int, form: Form) -> Plan:
    """Plan a question of kind 1 or 2."""
    topic = pick(rng, _RELATIONS)
    relation, words = RELATIONS[topic], Words(rng)
    s, v, c = words.draw(relation.subject), words.draw(relation.value), pick(rng, COUNTED)
    plan = Plan(topic, {"s": s, "v": v, "c": c})
    if form == "yes_no":
        return _settle(rng, plan, pick(rng, relation.checks).format(s=s, v=v, c=c))
    if kind == 1 and relation.reverse and rng.random() < 0.4:
        plan.question, plan.gold = relation.reverse.format(v=v), s
        plan.answer = relation.reverse_answer.format(s=s)
        return plan
    plan.gold = v
    plan.question, plan.answer = ask_about(rng, topic, s, v, c)
    return plan


def ask_about(
    rng: random.Random,
    topic: str,
    s: str,
    v: str,
    c: str,
    form: Form = "open",
    wrong: str = "",
    is_only: bool = False,
) -> tuple[str, str]:
    """Return a question about the fact that `s` has the value `v`, and its answer.

    Args:
        rng: Source of all chance.
        topic: Name of the relation.
        s: Its subject.
        v: The value that holds.
        c: What is counted.
        form: `open` or `yes_no`.
        wrong: Value a yes/no question asks for instead; the answer is no.
        is_only: Nothing else has the value, so that it may be asked who or what does.
    """
    relation = RELATIONS[topic]
    if form == "yes_no":
        question = pick(rng, relation.checks).format(s=s, v=wrong or v, c=c)
        return question, "No." if wrong else "Yes."
    if is_only and relation.reverse and rng.random() < 0.4:
        return relation.reverse.format(v=v), relation.reverse_answer.format(s=s)
    question = pick(rng, relation.asks).format(s=s, c=c)
    return question, relation.answer.format(v=v, V=v.capitalize())


def plan_join(rng: random.Random, form: Form) -> Plan:
    """Plan a question of kind 3."""
    topic = pick(rng, _JOINS)
    join, words = JOINS[topic], Words(rng)
    s, v = words.draw(join.subject), words.draw(join.value)
    plan = Plan(topic, {"s": s, "v": v, "c": pick(rng, COUNTED)})
    if form == "yes_no":
        return _settle(rng, plan, join.check.format(s=s, v=v))
    plan.question, plan.answer, plan.gold = join.ask.format(s=s), join.answer.format(v=v), v
    return plan


def plan_count(rng: random.Random, form: Form) -> Plan:
    """Plan a question of kind 4: count, compare two numbers, or compare two counts."""
    topic = pick(rng, ("people", "things", "more", "fewer", "crowd"))
    words, c = Words(rng), pick(rng, COUNTED)
    if topic in COUNTS:
        relation, check, ask = COUNTS[topic]
        v = words.draw(RELATIONS[relation].value)
        plan = Plan(topic, {"v": v, "c": c})
        plan.number = rng.randint(2, 4) if form == "yes_no" else rng.randint(1, 4)
        word = COUNT_WORDS[plan.number]
        if form == "yes_no":
            return _settle(rng, plan, check.format(n=word, v=v))
        plan.question, plan.answer, plan.gold = ask.format(v=v), f"{word.capitalize()}.", word
        return plan
    pool = "place" if topic == "crowd" else "actor"
    s, t = words.draw(pool), words.draw(pool)
    plan = Plan(topic, {"s": s, "t": t, "c": c})
    check = CROWD_CHECK if topic == "crowd" else MORE_CHECKS[topic]
    if form == "yes_no":
        return _settle(rng, plan, check.format(s=s, t=t, c=c))
    ask = CROWD_ASK if topic == "crowd" else MORE_ASKS[topic]
    plan.question, plan.label = ask.format(s=s, t=t, c=c), rng.random() < 0.5
    plan.gold = s if plan.label else t
    plan.answer = f"In the {plan.gold}." if topic == "crowd" else f"{plan.gold}."
    return plan
