"""Passages: right answers, fair yes/no questions, clean splits."""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict

import pytest

from reftune.nano import mix, passages, passages_turns
from reftune.nano.item import split as split_of
from reftune.nano.passages_words import COLOURS, JOINS, NUMBERS, POOLS, RELATIONS
from reftune.nano.tokenizer import load_tokenizer

COUNT = {word: place for place, word in enumerate(("zero", "one", *NUMBERS))}


def _draw(count, seed=0, **options):
    rng = random.Random(seed)
    return [passages.sample_passage(rng, **options) for _ in range(count)]


def _match(template, text, **pools):
    """Return the words that fill `template` to give `text`, or None."""
    pattern = re.escape(template)
    for slot, pool in {**pools, "c": None}.items():
        words = "|".join(POOLS[pool]) if pool else "[a-z]+"
        pattern = pattern.replace(re.escape(f"{{{slot}}}"), f"(?P<{slot}>{words})", 1)
    found = re.fullmatch(pattern, text)
    return found and found.groupdict()


def _read(text):
    """Follow a passage sentence by sentence and return the final state of each relation."""
    state = {topic: {} for topic in RELATIONS}
    for sentence in re.findall(r"[^.]+\.", text):
        sentence = sentence.strip()
        known = False
        for topic, relation in RELATIONS.items():
            pools = {"s": relation.subject, "v": relation.value, "u": relation.value}
            for template in (*relation.states, *relation.changes):
                if found := _match(template, sentence, **pools):
                    state[topic][found["s"]] = found["v"]
                    known = True
            known |= any(_match(template, sentence, **pools) for template in relation.denials)
        assert known, sentence
    return state


def _answers(state, question):
    """Return every answer that `state` gives to a question."""
    answers = set()
    for topic, relation in RELATIONS.items():
        pools = {"s": relation.subject, "v": relation.value}
        for check in relation.checks:
            if found := _match(check, question, **pools):
                answers.add("yes" if state[topic].get(found["s"]) == found["v"] else "no")
        for ask in relation.asks:
            if found := _match(ask, question, **pools):
                answers.add(state[topic].get(found["s"]))
        if found := _match(relation.reverse, question, **pools):
            answers |= {s for s, v in state[topic].items() if v == found["v"]}
    return answers


@pytest.mark.parametrize("kind", [1, 2])
def test_answers_follow_from_the_sentences(kind):
    for item in _draw(250, kind=kind, progress=1.0):
        answers = _answers(_read(item.passage), item.question)
        assert item.gold in answers
        assert len(answers - {None, "no"}) <= 1, (item, answers)
        assert item.gold.lower() in item.answer.lower()


@pytest.mark.parametrize("kind", [1, 2])
def test_follow_ups_have_one_right_answer(kind):
    rng, counts = random.Random(kind), Counter()
    for _ in range(250):
        passage = passages.sample_passage(rng, kind=kind, progress=1.0)
        state = _read(passage.passage)
        turns = passages_turns.follow_ups(rng, passage, 5)
        assert len(turns) <= 5 and passage.question not in dict(turns)
        for question, answer in turns:
            answers = _answers(state, question)
            assert len(answers) == 1 and None not in answers, (passage, question, answers)
            assert answers.pop().lower() in answer.lower(), (passage, question, answer)
            counts[answer] += 1
    assert 0.8 < counts["Yes."] / counts["No."] < 1.25


def test_a_reason_says_what_is_the_case_before_yes_or_no():
    rng, told = random.Random(3), Counter()
    for _ in range(200):
        passage = passages.sample_passage(rng, kind=rng.choice((1, 2)), progress=1.0)
        state = _read(passage.passage)
        for question, answer in passages_turns.follow_ups(rng, passage, 5, checked=0.7, why=1.0):
            if not question.endswith(passages_turns.WHY):
                assert answer not in ("Yes.", "No.")
                continue
            reason, last = answer.rsplit(" ", 1)
            answers = _answers(state, question.removesuffix(passages_turns.WHY))
            assert answers == {last.lower().rstrip(".")}, (passage, question, answer)
            for topic, facts in _read(reason).items():
                for subject, value in facts.items():
                    assert state[topic][subject] == value, (passage, question, answer)
            told[last] += 1
    assert told.total() > 100 and 0.8 < told["Yes."] / told["No."] < 1.25


def _drills(count, stage):
    rng = random.Random(5)
    return [passages_turns.drill(rng, "train", stage) for _ in range(count)]


def _turns(item):
    return [(item.question, item.answer), *item.more]


def test_notes_say_what_holds_and_nothing_else():
    notes = [i for i in _drills(200, 0.0) if {len(p.split()) for p in i.answer.split(". ")} == {2}]
    notes = [item for item in notes if item.answer.count(".") > 1]
    assert len(notes) > 80
    for item in notes:
        facts = Counter(code.split(":")[1].replace("=", " ") + "." for code in item.key[1:])
        first = item.question.rsplit(". ", 1)[0] + "."
        for text in (first, *(answer for _, answer in _turns(item))):
            assert Counter(part + "." for part in text.rstrip(".").split(". ")) == facts, item


@pytest.mark.parametrize("stage", [0.0, 0.3, 0.7, 2.0])
def test_drills_say_what_is_true_and_weigh_what_was_found(stage):
    for item in _drills(200, stage):
        facts = dict(code.split(":")[1].split("=") for code in item.key[1:])
        topic = item.key[1].split(":")[0]
        assert split_of("passages", *item.key) == "train" and len(item.focus) == len(item.more) + 1
        for (question, answer), focus in zip(_turns(item), item.focus):
            words = [answer[start:stop] for start, stop in focus]
            assert len(words) == answer.count(".")
            for word in words:
                known = {*facts, *facts.values()}
                assert word in ("Yes", "No") or word in known or word.lower() in known, item
            asked = question.rsplit(". ", 1)[-1].removesuffix(passages_turns.WHY)
            if answer in ("Yes.", "No."):
                assert _answers({**_read(""), topic: facts}, asked) == {answer[:-1].lower()}, item


def test_drills_get_harder_and_make_way():
    early, late = _drills(400, 0.1), _drills(400, 0.9)
    assert max(len(item.key) for item in early) == 4 and max(len(i.key) for i in late) == 6
    reasons = [sum(passages_turns.WHY in str(_turns(i)) for i in items) for items in (early, late)]
    assert reasons[0] == 0 and reasons[1] > 200
    rng = random.Random(1)
    for progress, share in ((0.8, 0.0), (0.9, 1.0), (1.1, passages.DRILL_SHARE)):
        items = [passages.sample(rng, "train", progress=progress) for _ in range(400)]
        assert abs(sum(i.group == "drill" for i in items) / 400 - share) < 0.08


def test_only_tokens_in_focus_carry_loss():
    tokenizer = load_tokenizer()
    for item, chat in zip(_drills(60, 0.5), [False, True] * 30):
        ids, weights = mix.render(item, tokenizer, chat)
        found = tokenizer.decode([i for i, weight in zip(ids, weights) if weight == item.weight])
        texts = [a[x:y] for (_, a), part in zip(_turns(item), item.focus) for x, y in part]
        assert found.split() == " ".join(texts).split(), item
        assert set(weights[1:]) <= {0.0, item.weight}


def test_further_questions_belong_to_training_text_alone():
    rng = random.Random(0)
    late = [passages.sample(rng, "train", progress=0.5) for _ in range(50)]
    assert any(item.more for item in late) and {item.weight for item in late} == {3.0}
    for split, progress in (("train", 0.49), ("train", None), ("test", 0.9)):
        item = passages.sample(rng, split, progress=progress)
        assert not item.more and item.weight == 1.0


def test_joins_follow_from_two_sentences():
    for item in _draw(200, kind=3, form="yes_no", progress=1.0):
        answers = set()
        for topic, join in JOINS.items():
            found = _match(join.check, item.question, s=join.subject, v=join.value)
            if not found:
                continue
            sentences = [part.strip() for part in re.findall(r"[^.]+\.", item.passage)]
            firsts = [
                _match(t, x, s=join.subject, m=join.middle) for x in sentences for t in join.first
            ]
            seconds = [
                _match(t, x, m=join.middle, v=join.value) for x in sentences for t in join.second
            ]
            middles = {hit["m"] for hit in firsts if hit and hit["s"] == found["s"]}
            ends = {hit["v"] for hit in seconds if hit and hit["m"] in middles}
            if ends:
                answers.add((topic, "yes" if found["v"] in ends else "no"))
        assert {answer for _, answer in answers} == {item.gold}, item


@pytest.mark.parametrize("form", ["open", "yes_no"])
def test_a_reason_alone_settles_the_question(form):
    """Everything that was asked of the passage follows from the quoted sentences."""
    for kind in (1, 2):
        for found in _draw(150, kind=kind, form=form, split="test"):
            assert found.reason and _answers(_read(found.reason), found.question) == {found.gold}
    for found in _draw(300, kind=3, form=form, split="test"):
        first, second = re.findall(r"[^.]+\.", found.reason)
        assert first.strip() in found.passage and second.strip() in found.passage
        words = found.question.rstrip("?").split()
        if form == "open":
            assert found.gold in second
        else:
            colour = "something" in words
            asked, start = (words[1], words[-1]) if colour else (words[-1], words[-4])
            assert start in first
            assert (asked in second) == (found.gold == "yes")
    for found in _draw(400, kind=4, form=form, split="test"):
        said = [text.strip() for text in re.findall(r"[^.]+\.", found.reason)]
        quoted = [text for text in said if text.rstrip(".").lower() not in COUNT]
        assert len(set(quoted)) == len(quoted) and all(text in found.passage for text in quoted)
        if len(said) == len(quoted):
            assert len(quoted) == 2 and re.search("more|fewer", found.question)
            continue
        asked = re.findall(r"\w+", found.question)
        for value in {text.rstrip(".").split()[-1] for text in quoted}:
            there = [t for t in re.findall(r"[^.]+\.", found.passage) if t.endswith(f" {value}.")]
            last = max(place for place, text in enumerate(said) if text.endswith(f" {value}."))
            assert value in asked and COUNT[said[last + 1].rstrip(".").lower()] == len(there)


def test_counts_and_comparisons_are_right():
    for item in _draw(300, kind=4, progress=1.0):
        state = _read(item.passage)
        at, colour = Counter(state["at"].values()), Counter(state["colour"].values())
        question = item.question
        if found := re.match(r"(How many|Are exactly (\w+)) (people|things)", question):
            key = next(w for w in reversed(re.findall(r"\w+", question)))
            number = (at if found[3] == "people" else colour)[key]
            if found[2]:
                assert item.gold == ("yes" if COUNT[found[2]] == number else "no")
            else:
                assert COUNT[item.gold] == number
        elif "people" in question:
            first, second = re.findall(r"in the (\w+)", question)
            more = at[first] > at[second]
            assert at[first] != at[second]
            wanted = ("yes", "no") if item.form == "yes_no" else (first, second)
            assert item.gold == wanted[0 if more else 1]
        else:
            first, second = re.findall(r"[A-Z][a-z]+", question)[1:]
            gap = COUNT[state["number"][first]] - COUNT[state["number"][second]]
            holds = gap > 0 if "more" in question else gap < 0
            wanted = ("yes", "no") if item.form == "yes_no" else (first, second)
            assert gap and item.gold == wanted[0 if holds else 1]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_only_keys_of_the_split(split):
    for item in _draw(150, split=split):
        assert split_of("passages", *item.key) == split
        assert item.key[0] == str(item.kind)


def test_training_rates():
    early, late = _draw(3000), _draw(3000, progress=0.9)
    kinds = Counter(item.kind for item in late)
    assert set(kinds) == {1, 2, 3}
    assert 0.03 < kinds[3] / 3000 < 0.065
    assert abs(kinds[1] - kinds[2]) < 250
    assert sum(item.form == "open" for item in early) > 2500
    assert abs(sum(item.form == "open" for item in late) - 1500) < 150
    assert max(item.length for item in early) <= 5 < max(item.length for item in late) == 9


def _normalise(question):
    """Replace every name by its pool, so that questions with one template fall together."""
    for pool in ("actor", "object", "place", "colour"):
        question = re.sub(rf"\b({'|'.join(POOLS[pool])})\b", pool.upper(), question)
    return question


@pytest.mark.parametrize("kind", passages.KINDS)
def test_yes_as_often_as_no_for_each_question(kind):
    table = defaultdict(Counter)
    for item in _draw(2000, kind=kind, form="yes_no", progress=1.0):
        table[_normalise(item.question)][item.gold] += 1
        table["all"][item.gold] += 1
    for counts in table.values():
        total = sum(counts.values())
        assert abs(counts["yes"] - total / 2) <= 4 * math.sqrt(total) / 2 + 1


def test_rejected_facts_do_not_redraw_question_and_answer(monkeypatch):
    """Else the answers of a question text would lean with the split of its few short passages."""
    calls = []
    plan = passages.plan_relation
    monkeypatch.setattr(passages, "plan_relation", lambda *args: calls.append(args) or plan(*args))
    _draw(50, split="test", kind=1, form="yes_no", progress=0.0)
    assert len(calls) == 50
    _draw(50, split="test", kind=1, form="open", progress=0.0)
    assert len(calls) > 150


def _naive_bayes(train, test):
    """Return the accuracy of naive Bayes on (words, label) pairs."""
    counts = {"yes": Counter(), "no": Counter()}
    labels = Counter(label for _, label in train)
    for words, label in train:
        counts[label].update(set(words))
    right = 0
    for words, label in test:
        score = {
            name: math.log(labels[name] / len(train))
            + sum(math.log((counts[name][word] + 1) / (labels[name] + 2)) for word in set(words))
            for name in ("yes", "no")
        }
        right += max(score, key=score.get) == label
    return right / len(test)


@pytest.mark.parametrize("kinds", [(None,), (3, 4)], ids=["as trained", "joins and counts"])
def test_question_alone_says_nothing(kinds):
    def rows(count, seed, split):
        each = count // len(kinds)
        items = [
            item
            for kind in kinds
            for item in _draw(each, seed, split=split, kind=kind, form="yes_no", progress=1.0)
        ]
        return [(re.findall(r"\w+", item.question), item.gold) for item in items]

    assert _naive_bayes(rows(4000, 1, "train"), rows(2000, 2, "test")) < 0.55


def test_naive_bayes_can_find_a_leak():
    """The check above can fail: a planted word is found."""
    rows = [
        (["is", "x" if place % 2 else "y"], "yes" if place % 2 else "no") for place in range(99)
    ]
    assert _naive_bayes(rows, rows) == 1.0


def test_item_and_determinism():
    one, two = (passages.sample(random.Random(7), "test", kind=4, form="yes_no") for _ in "ab")
    assert one == two
    passage = _draw(1, 7, split="test", kind=4, form="yes_no")[0]
    assert one == passages.passage_item(passage)
    assert one.question == f"{passage.passage} {passage.question}"
    assert (one.world, one.kind, one.group) == ("passages", "4", "yes_no")
    with pytest.raises(ValueError, match="one of"):
        passages.sample(random.Random(0), kind=5)


def test_pools_do_not_overlap():
    words = [w for pool in ("actor", "object", "place", "colour", "number") for w in POOLS[pool]]
    assert len(words) == len(set(words))
    assert len(COLOURS) >= passages.MAX_SENTENCES
