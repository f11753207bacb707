"""Sub-world C: short passages about an invented village, each with one question.

A passage has one to nine sentences about who has what, what is where, who is where, which colour a
thing has and how many things an actor has. The question is an open look-up (`Who has the key?` ->
`Anna.`) or a yes/no question (`Does Anna have the key?` -> `Yes.`).

Kinds: 1 the answer is stated; 2 it is denied or changed later; 3 two sentences must be joined;
4 sentences must be counted or numbers compared. Training shows kinds 1 and 2, kind 3 at a tenth of
their rate, kind 4 never.

Yes/no questions are balanced by construction: first the question is drawn, then the answer, then
the facts, so no question text leans to one side. The facts of the two answers mirror each other
(`s=v, t=w` against `s=w, t=v`), so the words of the passage give nothing away either.

The key of a passage is its kind with its sorted facts, whatever the wording and the question.
"""

from __future__ import annotations

import random
from dataclasses import replace

from reftune.nano.item import DENSE_FROM, DRILLS, Item, Split
from reftune.nano.item import split as split_of
from reftune.nano.passages_plans import (
    COUNT_WORDS,
    Form,
    Passage,
    Plan,
    Words,
    pick,
    plan_count,
    plan_join,
    plan_relation,
)
from reftune.nano.passages_turns import drill, follow_ups
from reftune.nano.passages_words import (
    COUNTS,
    JOINS,
    MORE_CHECKS,
    NUMBERS,
    RELATIONS,
)

Fact = tuple[str, str]
"""Code of a fact (part of the key) and the sentence that tells it."""

KINDS: tuple[int, ...] = (1, 2, 3, 4)
TRAIN_KINDS: tuple[tuple[int, float], ...] = ((1, 1.0), (2, 1.0), (3, 0.1))
"""Kinds the base model sees, with their relative rates."""
MAX_SENTENCES = 9
_RELATIONS = tuple(RELATIONS)

REPEAT = (14 / 30, 0.7)
"""Part of training that goes back to open look-ups, most of them in up to three sentences.

After 13.5 M tokens the answers to yes/no questions were still chance and only passages of one or
two sentences were looked up: the first third had been too short for this skill."""

MOST_QUESTIONS = 6
"""Questions asked about one passage from `DENSE_FROM` on, at most."""
DENSE_WEIGHT = 3.0
"""Loss weight of their answers: three tokens among sixty."""
DRILL_SHARE = 0.35
"""Share of drills among the passages after `DRILLS`; within it there is nothing else."""


def _say(
    words: Words, topic: str, s: str, v: str, c: str = "", how: str = "states", u: str = ""
) -> Fact:
    """Return one sentence of a relation; `how` is `states`, `denials` or `changes` (from `u`)."""
    template = pick(words.rng, getattr(RELATIONS[topic], how))
    if how == "states":
        code = f"{topic}:{s}={v}"
        if topic == "has":
            words.again["at"].append(v)
        elif topic == "at":
            words.again["has"].append(s)
    else:
        code = f"{topic}:{s}!{v}" if how == "denials" else f"{topic}:{s}:{u}>{v}"
    return code, template.format(s=s, v=v, u=u, c=c)


def _filler(words: Words, topic: str, c: str, again: bool = True, deny: bool = False) -> Fact:
    """Return a sentence that leaves the answer as it is, mostly of the relation asked about."""
    rng = words.rng
    if topic not in RELATIONS or rng.random() < 0.35:
        topic = pick(rng, _RELATIONS)
    if topic == "number" and words.numbers > 5:
        topic = "has"
    relation = RELATIONS[topic]
    pool = {"has": relation.value, "at": relation.subject}.get(topic)
    candidates = words.again[topic] if pool and again else []
    old = candidates.pop(0) if candidates and rng.random() < 0.5 else ""
    s = old if old and topic == "at" else words.draw(relation.subject)
    v = old if old and topic == "has" else words.draw(relation.value)
    if old:
        template = pick(rng, relation.states)
        return f"{topic}:{s}={v}", template.format(s=s, v=v, c=c)
    return _say(words, topic, s, v, c, "denials" if deny and rng.random() < 0.25 else "states")


# --- facts: groups of sentences, in order within a group ----------------------------------------


def _stated(words: Words, plan: Plan, form: Form) -> list[list[Fact]]:
    """Return the facts of kind 1: `s=v`, and for a yes/no question the mirror fact of `t`."""
    relation, c = RELATIONS[plan.topic], plan.words["c"]
    s, v = plan.words["s"], plan.words["v"]
    if form == "open":
        return [[_say(words, plan.topic, s, v, c)]]
    t, w = words.draw(relation.subject), words.draw(relation.value)
    mine, other = (v, w) if plan.label else (w, v)
    return [[_say(words, plan.topic, s, mine, c)], [_say(words, plan.topic, t, other, c)]]


def _changed(words: Words, plan: Plan, length: int) -> list[list[Fact]]:
    """Return the facts of kind 2: a value denied or changed, at times with its mirror image."""
    rng, topic, c = words.rng, plan.topic, plan.words["c"]
    relation, s, v = RELATIONS[topic], plan.words["s"], plan.words["v"]
    w = words.draw(relation.value)
    true, false = (v, w) if plan.label else (w, v)
    pairs = [(s, true, false)]
    if length >= 4 and rng.random() < 0.5:
        pairs.append((words.draw(relation.subject), false, true))
    denied = rng.random() < 0.35
    groups: list[list[Fact]] = []
    for subject, now, before in pairs:
        if denied:
            groups.append([_say(words, topic, subject, now, c)])
            groups.append([_say(words, topic, subject, before, c, "denials")])
        else:
            change = _say(words, topic, subject, now, c, "changes", before)
            groups.append([_say(words, topic, subject, before, c), change])
    return groups


def _joined(words: Words, plan: Plan, form: Form, length: int) -> list[list[Fact]]:
    """Return the facts of kind 3: a chain, and a second one that holds the other ending."""
    rng, join = words.rng, JOINS[plan.topic]
    chains = [(plan.words["s"], plan.words["v"])]
    if form == "yes_no" or length >= 4:
        t, w = words.draw(join.subject), words.draw(join.value)
        chains.append((t, w))
        if not plan.label:
            chains = [(plan.words["s"], w), (t, plan.words["v"])]
    if length >= 6 and rng.random() < 0.5:
        chains.append((words.draw(join.subject), words.draw(join.value)))
    groups: list[list[Fact]] = []
    for s, v in chains:
        m = words.draw(join.middle)
        first, second = pick(rng, join.first), pick(rng, join.second)
        groups.append([(f"{plan.topic}:{s}-{m}", first.format(s=s, m=m))])
        groups.append([(f"{plan.topic}:{m}-{v}", second.format(m=m, v=v))])
    return groups


def _counted(words: Words, plan: Plan, form: Form, length: int) -> list[list[Fact]]:
    """Return the facts of kind 4, sentences about other places or colours included."""
    rng = words.rng
    c, relation = plan.words["c"], COUNTS[plan.topic][0] if plan.topic in COUNTS else "at"
    if plan.topic in MORE_CHECKS:
        low, high = sorted(rng.sample(range(len(NUMBERS)), 2))
        first_high = plan.label == (plan.topic == "more")
        pair = (high, low) if first_high else (low, high)
        words.used.update((NUMBERS[low], NUMBERS[high]))
        words.numbers += 2
        return [
            [_say(words, "number", plan.words[name], NUMBERS[place], c)]
            for name, place in zip(("s", "t"), pair, strict=True)
        ]
    if plan.topic == "crowd":
        low, high = rng.choice(((1, 2), (1, 3), (2, 3), (1, 4), (2, 4)))
        first, second = (high, low) if plan.label else (low, high)
        values = [plan.words["s"]] * first + [plan.words["t"]] * second
        others = [words.draw("place")]
    else:
        count = plan.number
        if form == "yes_no" and not plan.label:
            count += 1 if rng.random() < 0.5 else -1
        values = [plan.words["v"]] * count
        others = [words.draw(RELATIONS[relation].value) for _ in range(2)]
    while len(values) < length and rng.random() < 0.85:
        values.append(pick(rng, tuple(others)))
    subject = RELATIONS[relation].subject
    return [[_say(words, relation, words.draw(subject), value, c)] for value in values]


def _least(kind: int, form: Form, plan: Plan) -> int:
    """Return the least number of sentences; it depends on the question, never on the answer."""
    if kind == 1:
        return 1 if form == "open" else 2
    if kind == 2:
        return 2
    if kind == 3:
        return 2 if form == "open" else 4
    if plan.topic in COUNTS:
        return plan.number + 2
    return 3 if plan.topic in MORE_CHECKS else 6


def _tell(rng: random.Random, plan: Plan, kind: int, form: Form, length: int) -> list[Fact]:
    """Return the sentences of a passage in which `plan` holds."""
    words, c = Words(rng, plan.words), plan.words["c"]
    length = max(length, _least(kind, form, plan))
    if kind == 1:
        groups = _stated(words, plan, form)
    elif kind == 2:
        groups = _changed(words, plan, length)
    elif kind == 3:
        groups = _joined(words, plan, form, length)
    else:
        groups = _counted(words, plan, form, length)
    topic = "number" if plan.topic in MORE_CHECKS else plan.topic
    size = sum(len(group) for group in groups)
    if kind == 4 and topic != "number":
        words.again = {"has": [], "at": []}
    while size < length:
        if kind == 4 and topic != "number":
            other = "at" if topic == "things" else "colour"
            s, v = words.draw(RELATIONS[other].subject), words.draw(RELATIONS[other].value)
            groups.append([_say(words, other, s, v)])
        else:
            groups.append([_filler(words, topic, c, again=kind < 3, deny=kind == 2)])
        size += 1
    turns = [place for place, group in enumerate(groups) for _ in group]
    rng.shuffle(turns)
    heads = [iter(group) for group in groups]
    return [next(heads[turn]) for turn in turns]


def _open_share(progress: float) -> float:
    """Return the share of open look-ups among the first questions."""
    if progress < 1 / 3 or REPEAT[0] <= progress < DENSE_FROM:
        return 0.9
    return 0.7 if DENSE_FROM <= progress < REPEAT[1] else 0.5


def _reason(plan: Plan, facts: list[Fact]) -> str:
    """Return the sentences that settle a question: of a chain in its order, counted ones with a
    tally (`Anna is in the hall. One. Ben is in the hall. Two.`).
    """
    topic, s, v = plan.topic, plan.words.get("s", ""), plan.words.get("v", "")
    if topic in JOINS:
        chain = dict(code.removeprefix(f"{topic}:").split("-") for code, _ in facts if "-" in code)
        ends = (s, chain[s]), (chain[s], chain[chain[s]])
        told = dict(facts)
        return " ".join(told[f"{topic}:{a}-{b}"] for a, b in ends)
    if topic in COUNTS:
        return _tally(facts, f"{COUNTS[topic][0]}:", v)
    if topic == "crowd":
        return " ".join(_tally(facts, "at:", plan.words[place]) for place in ("s", "t"))
    if topic in MORE_CHECKS:
        compared = [f"number:{plan.words[name]}=" for name in ("s", "t")]
        return " ".join(
            told for start in compared for code, told in facts if code.startswith(start)
        )
    starts = tuple(f"{topic}:{s}{sign}" for sign in "=!:")
    return " ".join(told for code, told in facts if code.startswith(starts))


def _tally(facts: list[Fact], relation: str, value: str) -> str:
    """Return the sentences in which something has a value, each with how many there are by then."""
    found = [
        sentence
        for code, sentence in facts
        if code.startswith(relation) and code.endswith(f"={value}")
    ]
    return " ".join(f"{said} {COUNT_WORDS[i].capitalize()}." for i, said in enumerate(found, 1))


# --- the two doors ------------------------------------------------------------------------------


def sample_passage(
    rng: random.Random,
    split: Split = "train",
    progress: float | None = None,
    kind: int | None = None,
    form: Form | None = None,
) -> Passage:
    """Draw a passage whose key lies in `split`.

    Args:
        rng: Source of all chance.
        split: Side of the split the key must lie on.
        progress: How far training has come, 0 to 1: passages grow from at most 4 sentences to 9,
            and from one third on every second question is a yes/no question, but for `REPEAT`.
            Default: 0 in the training split, 1 (the final distribution) in the others.
        kind: 1 to 4; default is drawn at the rates of training, which never include 4.
        form: `open` or `yes_no`; default is drawn.

    >>> sample_passage(random.Random(0), "test", kind=4, form="yes_no").kind
    4
    """
    if progress is None:
        progress = 0.0 if split == "train" else 1.0
    if kind is None:
        kind = rng.choices([k for k, _ in TRAIN_KINDS], [rate for _, rate in TRAIN_KINDS])[0]
    elif kind not in KINDS:
        raise ValueError(f"A passage kind is one of {KINDS}, not {kind!r}.")
    is_repeat = REPEAT[0] <= progress < REPEAT[1]
    if form is None:
        form = "open" if rng.random() < _open_share(progress) else "yes_no"
    longest = min(MAX_SENTENCES, 4 + int(6 * progress))
    short = 0.0
    if is_repeat:
        short = 0.7 if progress < DENSE_FROM else 0.4
    elif split == "train" and progress >= DRILLS[0]:
        short = 0.4
    length = rng.randint(1, 3 if short and rng.random() < short else longest)
    plan: Plan | None = None
    attempts = 0
    while True:
        # A yes/no question keeps its question and answer while facts are rejected, so the split
        # cannot tilt the answers of a question text; an open one may need another answer.
        if plan is None or form == "open":
            if kind < 3:
                plan = plan_relation(rng, kind, form)
            else:
                plan = plan_join(rng, form) if kind == 3 else plan_count(rng, form)
        facts = _tell(rng, plan, kind, form, length)
        key = (str(kind), *sorted(code for code, _ in facts))
        if split_of("passages", *key) == split:
            break
        attempts += 1
        # Two sentences about one question may have no key on this side at all.
        length += attempts % 20 == 0 and length < MAX_SENTENCES
    text = " ".join(sentence for _, sentence in facts)
    reason = _reason(plan, facts)
    return Passage(text, plan.question, plan.answer, plan.gold, kind, form, key, len(facts), reason)


def passage_item(passage: Passage) -> Item:
    """Return a passage as an item: its question is passage and question, its group the form."""
    return Item(
        world="passages",
        kind=str(passage.kind),
        key=passage.key,
        question=f"{passage.passage} {passage.question}",
        answer=passage.answer,
        gold=passage.gold,
        group=passage.form,
    )


def sample(
    rng: random.Random,
    split: Split = "train",
    progress: float | None = None,
    kind: int | None = None,
    form: Form | None = None,
) -> Item:
    """Draw one item of `split`; see `sample_passage` for the options.

    In training text from `DENSE_FROM` on, further questions about the passage follow; drills stand
    in their place from `DRILLS` on (see `passages_turns.drill`).
    """
    passage = sample_passage(rng, split, progress, kind, form)
    item = passage_item(passage)
    if split != "train" or progress is None or progress < DENSE_FROM:
        return item
    # A drill takes the place of a passage already drawn: the released weights saw this order
    stage = (progress - DRILLS[0]) / (DRILLS[1] - DRILLS[0])
    if 0 <= stage < 1 or (stage >= 1 and rng.random() < DRILL_SHARE):
        return replace(drill(rng, split, stage), weight=DENSE_WEIGHT)
    number = rng.randint(3, MOST_QUESTIONS)
    checked, why = (0.4, 0.0) if stage < 0 else (0.5, 0.4)
    more = follow_ups(rng, passage, number - 1, checked, why)
    return replace(item, more=more, weight=DENSE_WEIGHT)
