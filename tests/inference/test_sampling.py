"""Sampled answers as training data: which are kept, the file that goes on, and what reads it."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_llama, tiny_tokenizer

from reftune import tasks
from reftune.config.recipe import EvaluationSpec, TaskSpec
from reftune.errors import DataError, RecipeError
from reftune.inference.evaluate import answer
from reftune.inference.predictions import scored
from reftune.inference.sampling import Keep, answering, collect, rows_of
from reftune.tasks.base import Example
from reftune.tasks.guard import overlap

FAMILIES = {"name": "families", "group": "half", "style": "native"}


@pytest.fixture
def task():
    options = {"group": "half", "style": "native"}
    return tasks.get(TaskSpec(name="families", options=options, train_size=10))


def answers(task, example, *texts):
    return [scored(task, example, text, sample) for sample, text in enumerate(texts)]


# Which answers are kept


@pytest.mark.quick
def test_the_first_right_answers_that_differ_are_kept(task):
    (example, *_) = task.load("train")
    gold = example.answer
    told = [f" So {gold}", " So 0.5", f" so {gold}", f"So {gold} ", f" {gold}", f" It: {gold}"]
    given = answers(task, example, *told)
    rows = rows_of(task, example, given, "train", Keep(most=3))
    assert [row["completion"] for row in rows] == [told[0], told[2], told[4]]
    assert [row["id"] for row in rows] == [f"{example.id}.{i}" for i in (0, 2, 4)]
    assert rows[0] == {
        "id": f"{example.id}.0",
        "split": "train",
        "question": example.question,
        "prompt": example.prompt,
        "completion": told[0],
        "answer": gold,
        "gold": gold,
        "right": True,
    }
    assert [r["right"] for r in rows_of(task, example, given, "train", Keep("all", None))] == [
        *(True, False, True, True, True),
    ]


@pytest.mark.quick
def test_the_annotated_solution_is_added_once(task):
    (example, *_) = task.load("train")
    wrong = answers(task, example, " So 0.5", "")
    assert rows_of(task, example, wrong, "train", Keep()) == []
    (row,) = rows_of(task, example, wrong, "train", Keep(gold=True))
    assert (row["id"], row["completion"]) == (f"{example.id}.gold", example.target)
    assert row["right"] and row["answer"] == example.answer
    same = answers(task, example, example.target)
    (row,) = rows_of(task, example, same, "train", Keep(gold=True))
    assert row["id"] == f"{example.id}.0"
    assert rows_of(task, example, wrong, "train", Keep("all", None))[1]["answer"] is None
    with pytest.raises(RecipeError, match="most is 0"):
        Keep(most=0)


@pytest.mark.quick
def test_a_chat_is_kept_as_messages(task):
    messages = ({"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"})
    example = Example("a", "", "", "2", messages=messages)
    rows = rows_of(task, example, answers(task, example, "It is 2"), "train", Keep(gold=True))
    assert rows[0]["messages"] == [messages[0], {"role": "assistant", "content": "It is 2"}]
    assert rows[1]["messages"] == list(messages) and rows[0]["prompt"] == "user: 1+1?"


# Answers


def test_an_answer_depends_on_seed_question_and_sample_alone(task, tmp_path):
    model, tokenizer, examples = tiny_llama(), tiny_tokenizer(), task.load("train")[:5]

    def sampled(seed, batch_size, name):
        spec = EvaluationSpec(
            samples=4, temperature=1.0, max_new_tokens=6, batch_size=batch_size, split="none"
        )
        asked = answering(model, tokenizer, task, spec, seed)
        keep = Keep("all", None)
        return collect(tmp_path / name, task, examples, asked, spec, {"seed": seed}, keep=keep)

    rows = sampled(1, 1, "small.jsonl")  # two questions a time
    assert rows == sampled(1, 8, "large.jsonl")  # all at once
    assert rows != sampled(2, 8, "other.jsonl")
    assert len({row["completion"] for row in rows}) > 15
    spec = EvaluationSpec(samples=4, temperature=1.0, max_new_tokens=6)
    whole = answer(model, tokenizer, task, examples, spec, seed=1)
    assert whole[12:] == answer(model, tokenizer, task, examples[3:], spec, seed=1, first=3)
    assert [row["completion"] for row in rows if row["id"].startswith(f"{examples[0].id}.")] == [
        p.text for p in whole[:4]
    ]


class Answers:
    """Answers rightly and wrongly in turn; stops after some calls."""

    def __init__(self, task, stop=None):
        self.task, self.stop, self.starts = task, stop, []

    def __call__(self, examples, first):
        if self.stop is not None and len(self.starts) == self.stop:
            raise KeyboardInterrupt
        self.starts.append(first)
        texts = [(e, f" It is {e.answer}.", f" It is {e.answer}0.") for e in examples]
        return [p for e, *both in texts for p in answers(self.task, e, *both)]


def test_a_killed_call_goes_on_where_it_was(task, tmp_path):
    examples, spec = task.load("train"), EvaluationSpec(samples=2, temperature=1.0, batch_size=1)
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    rows = collect(whole, task, examples, Answers(task), spec, {"seed": 1})
    assert [json.loads(line) for line in whole.read_text().splitlines()] == rows
    assert len(rows) == 10 and all(row["right"] for row in rows)
    with pytest.raises(KeyboardInterrupt):
        collect(broken, task, examples, Answers(task, stop=2), spec, {"seed": 1})
    part = tmp_path / "broken.jsonl.part"
    assert not broken.exists()
    with part.open("a") as file:  # what a kill in the middle of a line leaves
        file.write('[{"id": "families-tr')
    with pytest.raises(DataError, match="was made by other settings"):
        collect(broken, task, examples, Answers(task), spec, {"seed": 2})
    with pytest.raises(DataError, match="was made by other settings"):
        collect(broken, task, examples, Answers(task), spec, {"seed": 1}, keep=Keep(gold=True))
    rest, seen = Answers(task), []
    collect(
        *(broken, task, examples, rest, spec, {"seed": 1}),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert rest.starts == [8] and seen == [(10, 10)]
    assert broken.read_bytes() == whole.read_bytes() and not part.exists()


# What reads the file


@pytest.fixture
def sampled(task, tmp_path):
    """A file of sampled answers, and how own data name it."""
    spec = EvaluationSpec(samples=2, temperature=1.0)
    path = tmp_path / "samples.jsonl"
    collect(path, task, task.load("train"), Answers(task), spec, {}, keep=Keep("all", None))
    return path


def own(path, **options):
    sizes = {"validation_size": 3, "test_size": 4}
    return tasks.get(TaskSpec(name="own", train=str(path), options=options, **sizes))


def test_own_data_are_scored_on_the_rows_they_were_made_for(task, sampled):
    made = own(sampled, scored=FAMILIES, question="question")
    assert not any(map(made.cut_from_training, ("validation", "test")))
    train = made.load("train")
    assert [e.prompt for e in train][::2] == [e.prompt for e in task.load("train")]
    assert train[0].target == f" It is {train[0].answer.split()[-1]}"
    for split, size in (("validation", 3), ("test", 4)):
        rows = made.load(split)
        spec = TaskSpec(name="families", options=task.spec.options, **{f"{split}_size": size})
        same = tasks.get(spec).load(split)
        assert [(e.id, e.prompt) for e in rows] == [(e.id, e.prompt) for e in same]
        text = f"{rows[0].answer} pears"
        assert made.score(text, rows[0]) == {"accuracy": 1.0, "format_accuracy": 0.0}
        assert made.extract(text, rows[0]) == rows[0].answer
    assert (made.metric, made.max_new_tokens) == ("accuracy", 96)
    assert made.prompt_form == "Question: {prompt} Answer:"
    assert made.score(train[0].answer, train[0]) == {"accuracy": 1.0}  # by the file's own rule
    assert made.score(f"{train[0].answer} pears", train[0]) == {"accuracy": 0.0}


def test_questions_shared_with_scored_rows_are_found_and_dropped(task, sampled):
    rows = [json.loads(line) for line in sampled.read_text().splitlines()]
    held = own(sampled, scored=FAMILIES).load("test")
    rows[0]["question"] = held[2].question.upper()
    sampled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = own(sampled, scored=FAMILIES, question="question")
    assert overlap(made.load("train"), made.load("test")).test_ids == (held[2].id,)
    fewer = own(sampled, scored=FAMILIES, question="question", drop_overlap=True)
    assert len(fewer.load("train")) == len(rows) - 1


@pytest.mark.quick
def test_what_does_not_go_together_is_refused(sampled, tmp_path):
    with pytest.raises(RecipeError, match="both say what is scored"):
        tasks.get(TaskSpec(name="own", train="a", test="b", options={"scored": FAMILIES}))
    with pytest.raises(RecipeError, match="makes a classification"):
        own(sampled, scored=FAMILIES, label="right")
    with pytest.raises(RecipeError, match="no generated answers"):
        own(sampled, scored={"name": "sst2"})
    text = sampled.read_text().replace('"split": "train"', '"split": "test"', 1)
    (tmp_path / "innocent.jsonl").write_text(text)
    with pytest.raises(DataError, match='row 1 has the split "test"'):
        own(tmp_path / "innocent.jsonl").load("train")
