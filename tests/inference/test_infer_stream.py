"""Streaming: the same text as generate, errors of the thread, early stops."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
from tiny import tiny_llama, tiny_tokenizer

from reftune.errors import DataError, RecipeError
from reftune.inference import generate, stream
from reftune.inference.stream import _decoded, _until

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def streams() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "reftune-stream"]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 4, "top_k": 9}])
def test_pieces_join_to_the_answer_of_generate(model, tokenizer, settings):
    prompt = "what is 7 times 8? "
    pieces = list(stream(model, tokenizer, prompt, max_new_tokens=12, **settings))
    whole = generate(model, tokenizer, [prompt], max_new_tokens=12, **settings)[0][0]
    assert "".join(pieces) == whole and len(pieces) > 3
    stop = whole[4:6]
    pieces = stream(model, tokenizer, prompt, max_new_tokens=12, stop=[stop], **settings)
    assert "".join(pieces) == whole[: whole.find(stop)]
    assert not streams()


def test_chat_prompts(model, tokenizer):
    chat = [{"role": "user", "content": "2+3?"}]
    pieces = stream(model, tokenizer, chat, max_new_tokens=8)
    assert "".join(pieces) == generate(model, tokenizer, [chat], max_new_tokens=8)[0][0]


def test_errors_in_the_thread_reach_the_reader(tokenizer):
    broken, calls = tiny_llama(seed=3), []

    def fail_at_the_third_token(module, args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the third token broke")

    broken.model.norm.register_forward_pre_hook(fail_at_the_third_token)
    pieces = stream(broken, tokenizer, "2+3=", max_new_tokens=8)
    got = []
    with pytest.raises(RuntimeError, match="the third token broke"):
        for piece in pieces:
            got.append(piece)
    assert len(got) == 2 and not streams()


def test_a_reader_that_stops_ends_the_thread(model, tokenizer):
    with closing(stream(model, tokenizer, "a", max_new_tokens=400)) as pieces:
        next(pieces)
        assert streams()
    assert not streams()
    with closing(stream(model, tokenizer, "a", max_new_tokens=400, stop=["~~"])) as pieces:
        next(pieces)
    assert not streams()


def test_arguments_are_checked_before_the_first_piece(model, tokenizer):
    with pytest.raises(RecipeError, match="temperature is -1"):
        stream(model, tokenizer, "a", max_new_tokens=4, temperature=-1)
    with pytest.raises(RecipeError, match="Beams cannot be streamed"):
        stream(model, tokenizer, "a", max_new_tokens=4, options={"num_beams": 2})
    with pytest.raises(DataError, match="context is 512 tokens"):
        stream(model, tokenizer, "a" * 600, max_new_tokens=4)
    assert not streams()


def test_unfinished_characters_wait_for_their_last_byte():
    class Bytes:
        def decode(self, ids, **_):
            return bytes(ids).decode("utf-8", errors="replace")

    text = "naïve — 北京 🙂."
    pieces = list(_decoded(Bytes(), iter([*text.encode(), 0, 65]), stops=[0]))
    assert "".join(pieces) == text
    assert "�" not in "".join(pieces) and "北" in pieces
    cut = list(_decoded(Bytes(), iter("🙂".encode()[:2]), stops=[]))
    assert "".join(cut) == "�"  # what generate shows for a character that was never finished


def test_stop_texts_are_held_back_across_pieces():
    def pieces(*texts):
        yield from texts

    assert list(_until(pieces("so 4.", "\n", "Q", ": more"), ["\nQ:"])) == ["so 4."]
    assert "".join(_until(pieces("so 4.", "\n", "Quite"), ["\nQ:"])) == "so 4.\nQuite"
    assert list(_until(pieces("ab", "c"), [])) == ["ab", "c"]
