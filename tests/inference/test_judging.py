"""Judges, and files of judged answers that a killed call goes on with."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from tiny import tiny_llama, tiny_tokenizer

from reftune import tasks
from reftune.config.recipe import TaskSpec
from reftune.errors import DataError, RecipeError
from reftune.inference import judging
from reftune.inference.judging import (
    KEY,
    Case,
    EndpointJudge,
    ModelJudge,
    asked_for,
    build,
    judge_by_rule,
)
from reftune.tasks.base import Example


def case(output, solution, found="9", gold="8"):
    return Case("How many?", output, solution, found, gold)


# The rule


@pytest.mark.quick
@pytest.mark.parametrize(
    ("output", "solution", "told"),
    [
        (
            "2 + 3 = 5. 5 * 2 = 9.",
            "2 + 3 = 5. 5 * 2 = 10.",
            "the second step is wrong: 5 * 2 = 9, and it is 5 * 2 = 10. The answer 9",
        ),
        ("2 + 3 = 5.", "2+3=5, 5*2 = <<5*2=10>>10", "the second step is missing: 5 * 2 = 10. The"),
        ("1 + 1 = 2. 2 + 7 = 9", "1 + 1 = 2.", "the second step is one too many: 2 + 7 = 9. The"),
        ("$1,000 - 1 = $999. Nine", "no sums here", "the answer 9 is wrong"),
        (
            "4 * 2 = 9",
            "eight",
            "the first step is wrong: 4 * 2 = 9, and it is 4 * 2 = 8. The answer",
        ),
        ("6 ÷ 0 = 9", "none", "the first step is wrong: 6 / 0 = 9, and it is 6 / 0 = inf. The"),
        ("It is 9.", "It is 8.", "the answer 9 is wrong"),
    ],
)
def test_the_rule_names_the_first_wrong_step_and_both_numbers(output, solution, told):
    (text,) = judge_by_rule([case(output, solution)])
    assert text.startswith(told) and text.endswith("The answer 9 is wrong, it is 8."[-20:])


@pytest.mark.quick
def test_the_rule_says_when_there_is_no_answer():
    (text,) = judge_by_rule([case("Hm.", "8", found=None)])
    assert text == "there is no answer to be found, it is 8."


# A model


def test_a_model_judges_through_its_chat_template():
    for chat in (True, False):
        judge = ModelJudge(tiny_llama(), tiny_tokenizer(chat=chat), max_new_tokens=4)
        (text, again) = judge([case("a", "b"), case("a", "b")])
        assert isinstance(text, str) and text == again


# An endpoint


@pytest.fixture
def server():
    """A chat endpoint that plays a list of (status, body); it keeps what it was sent."""
    played, seen = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, dict(self.headers), body))
            status, text = played.pop(0) if played else (200, chat("fine"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *words):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1", played, seen
    http.shutdown()
    http.server_close()


def chat(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def test_an_endpoint_is_asked_as_openai_does(server, monkeypatch):
    url, played, seen = server
    monkeypatch.setenv(KEY, "secret")
    played += [(200, chat(" Step 2. ")), (200, chat("Step 3."))]
    texts = EndpointJudge(url, "gpt", max_tokens=9)([case("out1", "sol1"), case("out2", "sol2")])
    assert texts == ["Step 2.", "Step 3."]
    path, headers, body = seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("gpt", 9, 0)
    (message,) = body["messages"]
    assert message["role"] == "user"
    assert all(part in message["content"] for part in ("How many?", "out1", "sol1"))
    monkeypatch.delenv(KEY)
    EndpointJudge(f"{url}/chat/completions", "gpt")([case("a", "b")])
    assert seen[-1][0] == "/v1/chat/completions" and "Authorization" not in seen[-1][1]


def test_an_endpoint_that_is_busy_is_asked_again(server, monkeypatch):
    url, played, seen = server
    pauses = []
    monkeypatch.setattr(judging.time, "sleep", pauses.append)
    played += [(429, "slow down"), (503, "busy"), (200, chat("ok"))]
    assert EndpointJudge(url, "m")([case("a", "b")]) == ["ok"]
    assert pauses == [1.0, 2.0] and len(seen) == 3
    played += [(500, "no")] * 4
    with pytest.raises(DataError, match=r"cannot be asked: status 500"):
        EndpointJudge(url, "m")([case("a", "b")])
    assert len(seen) == 7


def test_an_endpoint_that_refuses_is_an_error_at_once(server):
    url, played, seen = server
    played.append((401, "who are you"))
    with pytest.raises(DataError, match=rf"status 401.*the key in {KEY}"):
        EndpointJudge(url, "m")([case("a", "b")])
    assert len(seen) == 1
    for body in ("no json", "{}", chat(""), json.dumps({"choices": []}), "[1]"):
        played.append((200, body))
        with pytest.raises(DataError, match="answered without a text"):
            EndpointJudge(url, "m")([case("a", "b")])
    for address in ("file:///etc/passwd", "ftp://x", "rules", "http://"):
        with pytest.raises(RecipeError, match="is no address"):
            EndpointJudge(address, "m")


def test_nobody_there_is_an_error(monkeypatch):
    monkeypatch.setattr(judging, "TRIES", 1)
    with pytest.raises(DataError, match="cannot be asked"):
        EndpointJudge("http://127.0.0.1:9", "m", timeout=2)([case("a", "b")])


# Prompts


@pytest.mark.quick
def test_questions_are_asked_in_their_own_form_or_by_chat():
    plain = Example("a", "Q: 1? A:", " 1", "1", question="1?")
    assert asked_for(plain) == ("Q: 1? A:", {"instruction": "", "input": "1?"})
    prompt, fields = asked_for(plain, "Think.", chat=True)
    assert [m["content"] for m in prompt] == ["Think.", "1?"]
    assert fields == {"instruction": "Think.", "input": "1?"}
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    prompt, fields = asked_for(Example("b", "", "", "1", messages=tuple(turns)))
    assert list(prompt) == turns[:2] and fields == {"instruction": "system", "input": "user"}
    with pytest.raises(DataError, match='Row "c" is a chat of 3 messages'):
        asked_for(Example("c", "", "", "1", messages=(*turns[1:], turns[1], turns[2])))


# Files


@pytest.fixture
def task():
    return tasks.get(TaskSpec(name="families", options={"style": "native"}, train_size=10))


class Answers:
    """Answers every second question rightly; stops after some calls."""

    def __init__(self, examples, stop=None):
        self.gold = {e.prompt: e.answer for e in examples}
        self.starts, self.stop = [], stop

    def __call__(self, prompts, start):
        if self.stop is not None and len(self.starts) == self.stop:
            raise KeyboardInterrupt
        self.starts.append(start)
        return [f" It is {self.gold[p]}{'' if i % 2 else '0'}." for i, p in enumerate(prompts)]


def judge(cases):
    return ["Correct after all." if c.found == "0" else f"not {c.found}" for c in cases]


def test_rows_are_what_the_task_judged_reads(task, tmp_path):
    examples = task.load("train")
    path = tmp_path / "judged.jsonl"
    rows = build(path, task, examples, Answers(examples), judge, {"seed": 1}, chunk=4)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written == rows and len(rows) == 10 and not list(tmp_path.glob("*.part"))
    assert [row["judgment"] is None for row in rows] == [i % 4 % 2 == 1 for i in range(8)] + [
        False,
        True,
    ]
    assert rows[0]["judgment"] == f"not {examples[0].answer}0"
    assert rows[0]["answer"] == examples[0].target.strip() and rows[0]["gold"] == examples[0].answer
    again = tasks.get(TaskSpec(name="judged", train=str(path)))
    again.hold_out = False
    made = again.load("train")
    assert [e.prompt for e in made] == [e.prompt for e in examples]
    assert [e.answer for e in made] == [e.answer for e in examples]


def test_a_killed_call_goes_on_where_it_was(task, tmp_path):
    examples, settings = task.load("train"), {"seed": 1}
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    build(whole, task, examples, Answers(examples), judge, settings, chunk=3)
    with pytest.raises(KeyboardInterrupt):
        build(broken, task, examples, Answers(examples, stop=2), judge, settings, chunk=3)
    assert not broken.exists() and (tmp_path / "broken.jsonl.part").is_file()
    with pytest.raises(DataError, match="was made by other settings"):
        build(broken, task, examples, Answers(examples), judge, {"seed": 2}, chunk=3)
    rest, seen = Answers(examples), []
    build(
        *(broken, task, examples, rest, judge, settings, 3),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert rest.starts == [6, 9] and seen == [(9, 10), (10, 10)]
    assert broken.read_bytes() == whole.read_bytes()


def test_a_judge_can_take_a_case_back_and_empty_answers_are_left_out(task, tmp_path):
    examples = task.load("train")[:3]
    texts = ["It is 0.", "  ", "It is 00."]
    rows = build(
        *(tmp_path / "a.jsonl", task, examples, lambda prompts, start: texts, judge, {}),
    )
    assert [row["judgment"] for row in rows] == [None, "not 00"]
    assert [row["id"] for row in rows] == [examples[0].id, examples[2].id]
