"""Rows: prompt and target, BOS, cutting, chat templates, refusals."""

from __future__ import annotations

import logging

import pytest
from tiny import tiny_tokenizer

from reftune.errors import DataError
from reftune.tasks.base import Example
from reftune.training.encode import IGNORE, blank, encode, encode_all, frame
from reftune.training.view import decode_view

TOKENIZER = tiny_tokenizer()
BOS, EOS = 1, 2


def example(prompt="ab", target=" cd", **more):
    return Example("row7", prompt, target, "", **more)


def chat(*turns):
    roles = {"u": "user", "a": "assistant", "s": "system"}
    messages = tuple({"role": roles[r], "content": c} for r, c in turns)
    return Example("chat3", "", "", "", messages=messages)


def learned(row, tokenizer=TOKENIZER):
    return tokenizer.decode([t for t in row.labels if t != IGNORE])


def test_prompt_and_target_are_tokenised_apart_and_eos_is_learned():
    row = encode(example(), TOKENIZER, 32)
    assert TOKENIZER.decode(row.input_ids) == "<bos>ab cd<eos>"
    assert learned(row) == " cd<eos>"
    assert row.prompt_len == 3 and row.cut == 0
    assert row.labels == [IGNORE] * 3 + row.input_ids[3:]


def test_no_bos_where_the_tokenizer_adds_none():
    row = encode(example(), tiny_tokenizer(bos=False), 32)
    assert row.input_ids[0] != BOS and row.prompt_len == 2


def test_eos_is_not_doubled():
    row = encode(example(target=" cd<eos>"), TOKENIZER, 32)
    assert row.input_ids.count(EOS) == 1


def test_long_prompt_is_cut_from_the_left_and_keeps_bos():
    row = encode(example(prompt="abcdefgh", target="xy"), TOKENIZER, 7)
    assert TOKENIZER.decode(row.input_ids) == "<bos>fghxy<eos>"
    assert row.cut == 5 and row.prompt_len == 4 and len(row) == 7


def test_target_is_never_cut_and_the_error_names_the_row_and_what_would_do():
    with pytest.raises(DataError, match=r'Row "row7".*target of 5 tokens.*max_len 6') as caught:
        encode(example(target="wxyz"), TOKENIZER, 6)
    needed = int(caught.value.remedy.split("at least ")[1].split(",")[0])
    assert needed == 7
    row = encode(example(target="wxyz"), TOKENIZER, needed)
    assert learned(row) == "wxyz<eos>" and row.prompt_len == 2


def test_empty_target_and_empty_prompt():
    with pytest.raises(DataError, match='"row7" has an empty target'):
        encode(example(target="  "), TOKENIZER, 32)
    with pytest.raises(DataError, match=r"empty prompt.*no BOS"):
        encode(example(prompt=""), tiny_tokenizer(bos=False), 32)
    assert encode(example(prompt=""), TOKENIZER, 32).prompt_len == 1


def test_tokenizer_without_eos():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        encode(example(), tokenizer, 32)


def test_split_errors_are_told_together(caplog):
    good = [example() for _ in range(30)]
    with pytest.raises(DataError, match=r"2 of 32 training rows.*") as caught:
        encode_all([*good, example(target="w" * 20), example(target="w" * 40)], TOKENIZER, 16)
    assert "at least 43" in caught.value.remedy
    with caplog.at_level(logging.WARNING):
        split = encode_all([*good, example(target="")], TOKENIZER, 16)
    assert split.skipped == ["row7"] and len(split) == 30 and "skipped" in caplog.text
    assert split.summary()["skipped_without_target"] == 1
    with pytest.raises(DataError, match="4 of 34 training rows have no target"):
        encode_all([*good, *[example(target="")] * 4], TOKENIZER, 16)
    with pytest.raises(DataError, match="no validation rows"):
        encode_all([], TOKENIZER, 16, what="validation")


def test_chat_target_is_what_the_full_rendering_adds():
    row = encode(
        chat(("s", "be"), ("u", "hi"), ("a", "yo"), ("u", "so"), ("a", "ok")), TOKENIZER, 99
    )
    assert learned(row) == "ok<eos>"
    prompt = TOKENIZER.decode(row.input_ids[: row.prompt_len])
    assert prompt.endswith("<user> so\n<assistant> ") and prompt.count("<bos>") == 1
    assert "yo<eos>" in prompt


def test_chat_after_the_last_answer_is_dropped():
    row = encode(chat(("u", "hi"), ("a", "yo"), ("u", "so")), TOKENIZER, 99)
    assert learned(row) == "yo<eos>"


def test_chat_prompt_equals_what_inference_is_given():
    from reftune.inference.prompts import encode_prompts

    row = encode(chat(("u", "hi"), ("a", "yo")), TOKENIZER, 99)
    given = encode_prompts(TOKENIZER, [[{"role": "user", "content": "hi"}]])[0].ids
    assert row.input_ids[: row.prompt_len] == given
    plain = encode(example(), TOKENIZER, 99)
    assert plain.input_ids[: plain.prompt_len] == encode_prompts(TOKENIZER, ["ab"])[0].ids


def test_chat_refusals():
    with pytest.raises(DataError, match=r"no chat template.*chat_template.jinja"):
        encode(chat(("u", "hi"), ("a", "yo")), tiny_tokenizer(chat=False), 99)
    with pytest.raises(DataError, match="no assistant message"):
        encode(chat(("u", "hi")), TOKENIZER, 99)
    odd = tiny_tokenizer()
    odd.chat_template = "{% if add_generation_prompt %}Q{% endif %}{{ messages|length }}"
    with pytest.raises(DataError, match=r'"chat3".*differently from the prompt alone.*character 0'):
        encode(chat(("u", "hi"), ("a", "yo")), odd, 99)
    odd.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"refuses the messages.*alternate"):
        encode(chat(("u", "hi"), ("a", "yo")), odd, 99)


def test_template_without_eos_gets_one():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    row = encode(chat(("u", "hi"), ("a", "yo")), tokenizer, 99)
    assert learned(row, tokenizer) == "yo|<eos>"


def test_classification_rows():
    row = encode(example(label=2, pair="q"), TOKENIZER, 32, kind="classification")
    assert TOKENIZER.decode(row.input_ids) == "<bos>abq" and row.class_label == 2
    assert set(row.labels) == {IGNORE}
    short = encode(example(prompt="abcdefgh", label=1), TOKENIZER, 4, kind="classification")
    assert TOKENIZER.decode(short.input_ids) == "<bos>abc" and short.cut == 5
    with pytest.raises(DataError, match="no class label"):
        encode(example(), TOKENIZER, 32, kind="classification")


def test_seq2seq_rows():
    row = encode(example(), TOKENIZER, 32, kind="seq2seq")
    assert TOKENIZER.decode(row.input_ids) == "<bos>ab"
    assert TOKENIZER.decode(row.decoder_labels) == " cd<eos>"


def test_subject_place_survives_cutting():
    row = encode(example(prompt="is paris big", meta={"subject": "paris"}), TOKENIZER, 99)
    assert TOKENIZER.decode(row.input_ids[row.subject]) == "s" and row.subject == 8
    cut = encode(example(prompt="is paris big", meta={"subject": "paris"}), TOKENIZER, 12)
    assert TOKENIZER.decode(cut.input_ids[: cut.subject + 1]).endswith("is")
    with pytest.raises(DataError, match="cut off"):
        encode(example(prompt="is paris big", meta={"subject": "paris"}), TOKENIZER, 9)
    with pytest.raises(DataError, match="not in the prompt"):
        encode(example(prompt="rome", meta={"subject": "paris"}), TOKENIZER, 99)


def test_frame_of_tokenizers():
    assert frame(TOKENIZER).lead == (BOS,) and frame(TOKENIZER).tail == ()
    assert frame(tiny_tokenizer(bos=False)).lead == ()


def test_view_shows_edited_and_learned_tokens():
    row = encode(example(prompt="abcd", target="xy"), TOKENIZER, 32)
    view = decode_view(row, TOKENIZER, "f2+l1")
    assert [v.text for v in view] == ["<bos>", "a", "b", "c", "d", "x", "y", "<eos>"]
    assert [v.edited for v in view] == [True, True, False, False, True, False, False, False]
    assert [v.labelled for v in view] == [False] * 5 + [True] * 3
    assert all(v.edited for v in decode_view(row, TOKENIZER, lambda r: [True] * len(r)))


def test_blank_row_learns_nothing():
    row = encode(example(), TOKENIZER, 32)
    empty = blank(row)
    assert set(empty.labels) == {IGNORE} and empty.input_ids == row.input_ids
    assert blank(encode(example(label=1), TOKENIZER, 32, kind="classification")).class_label == -100
    assert set(blank(encode(example(), TOKENIZER, 32, kind="seq2seq")).decoder_labels) == {IGNORE}
