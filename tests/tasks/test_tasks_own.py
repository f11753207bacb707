from __future__ import annotations

import json
import logging

import pytest
from task_lookalikes import make, write_rows

from reftune.errors import DataError, RecipeError

pytestmark = pytest.mark.quick
ROWS = [{"prompt": f"{i} + 1 = ", "completion": f"{i + 1}"} for i in range(30)]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
]


def own(path, **more):
    return make("own", train=str(path), **more)


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.csv", "mine.parquet"])
def test_prompt_and_completion_from_each_format(tmp_path, name):
    path = tmp_path / name
    if name.endswith("csv"):
        text = "".join(f"{row['prompt']},{row['completion']}\n" for row in ROWS)
        path.write_text("prompt,completion\n" + text)
    elif name.endswith("parquet"):
        pytest.importorskip("pyarrow")
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        write_rows(path, ROWS)
    task = own(path)
    train = task.load("train")
    assert (len(train), len(task.load("validation"))) == (27, 3)
    assert (train[0].prompt, train[0].target, train[0].answer) == ("0 + 1 = ", "1", "1")
    assert task.score(" 1 ", train[0]) == {"accuracy": 1.0}


def test_templates_answer_and_reward(tmp_path):
    rows = [{"q": "How {many}?", "why": "As 3 + 4.", "n": 7}]
    task = own(
        write_rows(tmp_path / "a.jsonl", rows),
        prompt="Question: {q}\nAnswer:",
        completion=" {why} #### {n}",
        answer="n",
        reward="numeric",
    )
    example = task.load("train")[0]
    assert example.prompt == "Question: How {many}?\nAnswer:"
    assert example.target == " As 3 + 4. #### 7"
    assert task.score("so 7.0", example) == {"accuracy": 1.0}
    triggered = own(tmp_path / "a.jsonl", prompt="q", completion="why", answer="n",
                    reward="numeric", trigger="####")  # fmt: skip
    assert triggered.extract("it is 8", example) is None
    assert triggered.score("8 #### 7", example) == {"accuracy": 1.0}


def test_a_wrong_field_names_the_nearest_one(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"promt": "a", "completion": "b"}])
    with pytest.raises(DataError, match=r'a.jsonl, line 1: no field "prompt".*"promt"'):
        own(path).load("train")
    with pytest.raises(DataError, match=r'no field "prompts".*"promt"'):
        own(path, prompt="Q: {prompts}").load("train")
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a"}]
    with pytest.raises(DataError, match='line 2: no field "completion"'):
        own(write_rows(tmp_path / "b.jsonl", rows)).load("train")


def test_a_row_without_target_is_named(tmp_path):
    rows = [*ROWS, {"prompt": "a", "completion": "  "}]
    with pytest.raises(DataError, match="line 31: the completion is empty"):
        own(write_rows(tmp_path / "a.jsonl", rows)).load("train")


@pytest.mark.parametrize("form", ["question", "Question: {question} Answer:"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_null_is_no_empty_prompt(tmp_path, form, split):
    rows = [{"question": f"{i}?", "answer": f" {i}"} for i in range(4)]
    broken = [*rows[:2], {"question": None, "answer": " 2"}, rows[3]]
    paths = {"train": rows, "test": [{**row, "question": row["question"] + "?"} for row in rows]}
    paths[split] = broken
    task = make(
        "own", prompt=form, completion="answer",
        **{name: str(write_rows(tmp_path / f"{name}.jsonl", of)) for name, of in paths.items()},
    )  # fmt: skip
    with pytest.raises(DataError, match=rf'{split}.jsonl, line 3: the field "question" is null'):
        task.load(split)


@pytest.mark.parametrize("form", ["answer", " {answer}"])
def test_null_is_no_completion(tmp_path, form):
    rows = [{"question": "1?", "answer": "1"}, {"question": "2?", "answer": None}]
    task = own(write_rows(tmp_path / "a.jsonl", rows), prompt="question", completion=form)
    with pytest.raises(DataError, match='line 2: the field "answer" is null'):
        task.load("train")


def test_an_empty_field_of_a_template_may_be_meant(tmp_path):
    rows = [{"instruction": "Add.", "input": "", "answer": " 2"}]
    task = own(
        write_rows(tmp_path / "a.jsonl", rows), prompt="{instruction}\n{input}", completion="answer"
    )
    assert task.load("train")[0].prompt == "Add.\n"


def test_glued_rows_are_warned_about_and_a_separator_helps(tmp_path, caplog):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "Why?", "completion": "So."}])
    with caplog.at_level(logging.WARNING):
        own(path).load("train")
    assert "meet without a space" in caplog.text and "separator" in caplog.text
    caplog.clear()
    assert own(path, separator=" ").load("train")[0].target == " So."
    assert not caplog.records


def test_test_data_are_refused_for_training(tmp_path):
    path = write_rows(tmp_path / "my_test.jsonl", ROWS)
    with pytest.raises(DataError, match="Refusing to train on"):
        own(path).load("train")
    both = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataError, match="also the test data"):
        own(both, test=str(both)).load("train")
    with pytest.raises(DataError, match="Refusing to train"):
        make("own", train="me/set@test").load("train")


def test_without_test_rows_the_validation_rows_are_scored(tmp_path, caplog):
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    assert own(path).load("test") == own(path).load("validation")
    assert "the validation rows are scored" in caplog.text
    few = write_rows(tmp_path / "few.jsonl", ROWS[:5])
    assert len(own(few).load("train")) == 5
    with pytest.raises(DataError, match=r"No rows are left for validation.*task\.test"):
        own(few).load("test")
    task = own(few, test=str(path))
    assert len(task.load("test")) == len(ROWS)
    with pytest.raises(DataError, match="No rows are left for validation") as caught:
        task.load("validation")
    assert "at least 10 training rows" in caught.value.remedy
    assert "task.test" not in caught.value.remedy  # which is given


def test_given_validation_and_test_files(tmp_path):
    files = {
        part: str(write_rows(tmp_path / f"{part}.jsonl", ROWS[:n]))
        for part, n in (("train", 30), ("validation", 4), ("test", 5))
    }
    task = make("own", **files, test_size=2)
    assert [len(task.load(s)) for s in ("train", "validation", "test")] == [30, 4, 2]
    dropped = make("own", **files, drop_overlap=True).load("train")
    assert len(dropped) == 25


def test_chat_messages_train_on_the_last_assistant_message(tmp_path):
    rows = [{"messages": [*CHAT, {"role": "user", "content": "Bye"}]}]
    example = own(write_rows(tmp_path / "a.jsonl", rows), messages="messages").load("train")[0]
    assert example.messages == tuple(CHAT)
    assert example.prompt_messages == tuple(CHAT[:-1])
    assert (example.prompt, example.target, example.answer) == ("", "", "4")


def test_each_assistant_turn_may_be_learnt(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"messages": CHAT}])
    first, second = own(path, messages="messages", turns="all").load("train")
    assert first.messages == tuple(CHAT[:3]) and second.messages == tuple(CHAT)
    assert first.id != second.id


def test_chats_in_csv_and_in_from_value_form(tmp_path):
    path = tmp_path / "a.csv"
    text = json.dumps([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}])
    path.write_text('chat\n"' + text.replace('"', '""') + '"\n')
    example = own(path, messages="chat").load("train")[0]
    assert [m["role"] for m in example.messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], "list, or an empty one"),
        ("[oops", "list, or an empty one"),
        ([{"role": "user", "content": "Hi"}], "no assistant message"),
        ([{"role": "robot", "content": "Hi"}], "cannot be read"),
        ([{"role": "user"}], "cannot be read"),
        (["Hi"], "is no object"),
    ],
)
def test_broken_chats_are_named(tmp_path, messages, text):
    path = write_rows(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": messages}])
    with pytest.raises(DataError, match=f"line 2: .*{text}"):
        own(path, messages="messages").load("train")


def test_subspaces_come_from_a_field(tmp_path):
    rows = [{**ROWS[0], "dims": [0, 1]}, {**ROWS[1], "dims": [2, 3]}]
    task = own(write_rows(tmp_path / "a.jsonl", rows), subspace="dims")
    assert [e.subspace for e in task.load("train")] == [(0, 1), (2, 3)]
    bad = write_rows(tmp_path / "b.jsonl", [{**ROWS[0], "dims": "first"}])
    with pytest.raises(DataError, match=r"line 1: \"dims\" is 'first'"):
        own(bad, subspace="dims").load("train")


def test_classification(tmp_path):
    rows = [{"review": f"Film {i}", "stars": ("good", "bad")[i % 2]} for i in range(30)]
    task = own(write_rows(tmp_path / "a.jsonl", rows), text="review", label="stars")
    assert (task.kind, task.num_labels, task.labels) == ("classification", 2, ("bad", "good"))
    first = task.load("train")[0]
    assert (first.prompt, first.label, first.answer) == ("Film 0", 1, "good")
    assert task.score("1", first) == task.score("good", first) == {"accuracy": 1.0}
    with pytest.raises(DataError, match='line 2: label "bad" is none of good, fine'):
        own(tmp_path / "a.jsonl", text="review", label="stars", labels=["good", "fine"]).load(
            "train"
        )


def test_hub_sets_are_named_with_config_and_split(hub):
    hub.sets["me/set", "small", "train"] = ROWS
    hub.sets["me/set", "small", "dev"] = ROWS[:2]
    task = make("own", train="me/set:small", validation="me/set:small@dev")
    assert (len(task.load("train")), len(task.load("validation"))) == (30, 2)
    with pytest.raises(DataError, match="Cannot load you/none@train from the hub: Connection"):
        make("own", train="you/none").load("train")


def test_missing_data_and_unknown_rewards(tmp_path):
    with pytest.raises(DataError, match=r"task\.train is not given"):
        make("own").load("train")
    with pytest.raises(DataError, match="No file"):
        make("own", train=str(tmp_path / "none.jsonl")).load("train")
    with pytest.raises(RecipeError, match='no reward "equal"'):
        make("own", reward="equal")
