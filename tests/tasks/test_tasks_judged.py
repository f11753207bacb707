"""The task of judged answers: three prompts a row, plain and by chat, and what is scored."""

from __future__ import annotations

import json

import pytest

from reftune import tasks
from reftune.config.recipe import TaskSpec
from reftune.errors import DataError, RecipeError

pytestmark = pytest.mark.quick

ROWS = [
    {"id": "a", "input": "1+1?", "output": "It is 2.", "judgment": None, "answer": "1+1 = 2"},
    {"input": "2+3?", "output": "6", "judgment": " One less. ", "answer": "2+3 = 5 so {5}"},
    {"input": "4?", "output": "4", "judgment": "", "answer": "4", "instruction": "Be brief."},
]


@pytest.fixture
def judged(tmp_path):
    """Return a function that writes rows and makes the task."""

    def make(rows=ROWS, split="train", **more):
        options = more.pop("options", {})
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tasks.get(TaskSpec(name="judged", options=options, **{split: str(path)}, **more))

    return make


def test_each_answer_has_its_prompts(judged):
    first, second, third = judged().load("train")
    assert (first.id, first.prompt, first.target) == ("a", "Question: 1+1? Answer:", " It is 2.")
    assert first.meta["guides"] == {"standard": "Question: 1+1? A solution: 1+1 = 2 Answer:"}
    assert (second.id, second.answer, first.answer) == ("judged-train-1", "5", "2")
    assert second.meta["guides"] == {
        "standard": "Question: 2+3? A solution: 2+3 = 5 so {5} Answer:",
        "judge": "Question: 2+3? A remark: One less. Answer:",
    }
    assert third.prompt == "Be brief.\n\nQuestion: 4? Answer:"
    assert third.meta["guides"] == {"standard": "Be brief.\n\nQuestion: 4? A solution: 4 Answer:"}


def test_chats_have_the_guide_in_both_messages(judged):
    first, second, third = judged(options={"chat": True}).load("train")
    assert first.messages[:-1] == ({"role": "user", "content": "1+1?"},)
    assert first.messages[-1] == {"role": "assistant", "content": "It is 2."}
    system, user = second.meta["guides"]["judge"]
    assert system["role"] == "system" and "bad answer" in system["content"]
    assert user["content"] == "2+3?\n\nJudgment: One less."
    system, user = third.meta["guides"]["standard"]
    assert system["content"].startswith("You are an expert.")
    assert system["content"].endswith("Be brief.")
    assert user["content"] == "4?\n\nStandard answer: 4"
    assert third.messages[0] == {"role": "system", "content": "Be brief."}


def test_templates_and_targets_can_be_chosen(judged):
    options = {
        "base": "{instruction}|{input}",
        "learn": "answer",
        "separator": "",
        "answers": "wrong",
    }
    (one,) = judged(options=options).load("train")
    assert (one.prompt, one.target) == ("|2+3?", "2+3 = 5 so {5}")
    assert len(judged(options={"answers": "right"}).load("train")) == 2


def test_gold_is_taken_from_the_row_where_it_is_there(judged):
    (one,) = judged([{**ROWS[0], "gold": "7"}]).load("train")
    assert one.answer == "7" and judged([ROWS[0]]).score("so 2", one) == {"accuracy": 0.0}


def test_a_file_is_scored_by_its_numbers(judged):
    task = judged([{"input": "1+1?", "answer": "it is 2"}], split="test")
    (row,) = task.load("test")
    assert "guides" not in row.meta and row.prompt == "Question: 1+1? Answer:"
    assert task.score("I say 2.0!", row) == {"accuracy": 1.0}
    assert task.score("I say 3", row) == {"accuracy": 0.0}


def test_another_task_is_scored_in_the_form_that_is_trained(judged):
    scored = {"name": "families", "group": "half", "style": "prose"}
    task = judged(options={"scored": scored}, test_size=5)
    rows = task.load("test")
    assert len(rows) == 5 and task.max_new_tokens == 96
    own = tasks.get(TaskSpec(name="families", options={"group": "half"}, test_size=5)).load("test")
    assert [row.prompt for row in rows] == [row.prompt for row in own]
    assert task.score(f"x {rows[0].answer}", rows[0]) == {"accuracy": 1.0, "format_accuracy": 0.0}
    told = [{**row, "instruction": "Think."} for row in ROWS]
    chat = judged(told, options={"scored": scored, "chat": True}, test_size=2).load("test")
    assert [m["role"] for m in chat[0].messages] == ["system", "user"]
    assert (
        chat[0].messages[0]["content"] == "Think." and chat[0].prompt_messages == chat[0].messages
    )


def test_validation_rows_are_judged_answers(judged, tmp_path):
    many = [{**ROWS[1], "id": str(i)} for i in range(20)]
    task = judged(many)
    assert task.cut_from_training("validation") and not task.cut_from_training("test")
    assert len(task.load("train")) == 18 and len(task.load("validation")) == 2
    assert task.load("validation")[0].meta["guides"]["judge"]
    task.hold_out = False
    assert len(task.load("train")) == 20
    apart = judged(many, validation=str(tmp_path / "train.jsonl"))
    assert len(apart.load("validation")) == len(apart.load("train")) == 20


def test_what_is_missing_is_named(judged, tmp_path):
    with pytest.raises(DataError, match=r'line 1: no field "judgment"'):
        judged([{"input": "a", "output": "b", "answer": "c"}]).load("train")
    with pytest.raises(DataError, match='"answer" or "output" is empty'):
        judged([{**ROWS[0], "output": " "}]).load("train")
    with pytest.raises(DataError, match=r"task.test is not given"):
        judged().load("test")
    with pytest.raises(RecipeError, match="has no generated answers"):
        judged(options={"scored": {"name": "sst2"}})
    (tmp_path / "my_test.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="holds test questions"):
        tasks.get(TaskSpec(name="judged", train=str(tmp_path / "my_test.jsonl"))).load("train")
