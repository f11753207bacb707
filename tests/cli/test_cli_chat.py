"""The chat: commands, memory, and the switch between base and adapter."""

from __future__ import annotations

from pathlib import Path

import pytest

from reftune.cli.chat import Session, command, loop
from reftune.errors import DataError, RecipeError
from reftune.model.site import BASE

pytestmark = pytest.mark.quick


@pytest.fixture
def session():
    """A session whose answers repeat what was asked and by whom; `seen` holds the prompts."""
    seen = []

    def answer(prompt, name, temperature):
        seen.append((prompt, name, temperature))
        yield f"<{name}> "
        yield "done"

    made = Session(answer=answer, adapters=["default", "other"], name="default")
    made.seen = seen
    return made


def talk(session, *lines):
    """Feed lines; return the prompts shown to the user."""
    waiting, shown = list(lines), []

    def read(prompt):
        shown.append(prompt)
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    loop(session, read)
    return shown


def test_a_conversation_is_remembered(session, capsys):
    talk(session, "hello", "again")
    assert "<default> done" in capsys.readouterr().out
    roles = [message["role"] for message in session.seen[1][0]]
    assert roles == ["user", "assistant", "user"]
    assert session.seen[1][0][1]["content"] == "<default> done"


def test_base_and_adapter_switch(session):
    shown = talk(session, "/base", "a", "/adapter", "b", "/adapter other", "c")
    assert [name for _, name, _ in session.seen] == [BASE, "default", "other"]
    assert shown == [
        "default> ",
        "base> ",
        "base> ",
        "default> ",
        "default> ",
        "other> ",
        "other> ",
    ]


def test_compare_asks_all_and_remembers_nothing(session, capsys):
    talk(session, "/compare 1+1")
    assert [name for _, name, _ in session.seen] == [BASE, "default", "other"]
    assert session.history == []
    out = capsys.readouterr().out
    assert "base: <__base__> done" in out and "other: <other> done" in out


def test_settings_and_reset(session):
    talk(session, "a", "/temperature 0.7", "/system Be short.", "b", "/reset", "c")
    prompt, _, temperature = session.seen[1]
    assert temperature == 0.7
    assert [message["role"] for message in prompt] == ["system", "user"]


def test_raw_text_has_a_template_and_no_memory(session):
    session.raw, session.template = True, "Question: {prompt} Answer:"
    talk(session, "1+1?", "2+2?")
    assert [prompt for prompt, _, _ in session.seen] == [
        "Question: 1+1? Answer:",
        "Question: 2+2? Answer:",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/bsae", 'no command "/bsae". Did you mean "/base"'),
        ("/adapter othr", 'no adapter "othr". Did you mean "other"'),
        ("/temperature hot", '"hot" is no temperature'),
        ("/compare", "nothing to compare"),
    ],
)
def test_bad_commands_say_so(session, line, message):
    with pytest.raises(RecipeError, match=message):
        command(session, line)


def test_base_of_a_base_model(session):
    session.adapters, session.name = [], None
    with pytest.raises(RecipeError, match="the base model already"):
        command(session, "/base")


def test_an_error_does_not_end_the_conversation(session, capsys):
    def failing(prompt, name, temperature):
        raise DataError("The prompt is longer than the context.")
        yield

    session.answer = failing
    shown = talk(session, "a", "/help", "/quit", "never read")
    assert len(shown) == 3
    seen = capsys.readouterr()
    assert "longer than the context" in seen.err and "/compare TEXT" in seen.out


def test_ctrl_c_stops_an_answer_only(session, capsys):
    closed = []

    class Stream:
        def __iter__(self):
            yield "half"
            raise KeyboardInterrupt

        def close(self):
            closed.append(True)

    session.answer = lambda *_: Stream()
    talk(session, "a", "/quit")
    assert "half ..." in capsys.readouterr().out
    assert session.history[-1]["content"] == "half" and closed == [True]


def test_chat_with_a_trained_adapter(cli, recipe_file, monkeypatch):
    assert (
        cli("train", recipe_file, "--set", "evaluation.split=none", "--set", "max_steps=1")[0] == 0
    )
    lines = iter(["1+1=", "/base", "1+1=", "/adapter second", "1+1=", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    words = ("--raw", "--max-new-tokens", 2, "--adapter", "second=runs/sums")
    code, out, err = cli("chat", "runs/sums", *words)
    assert code == 0, err
    assert "with default, second" in err
    assert len(out.splitlines()) == 3
    assert Path("runs/sums/adapter").is_dir()
    code, _, err = cli("chat", "runs/sums", "--adapter", "runs/sums")
    assert code == 2 and "Write --adapter NAME=PATH" in err
