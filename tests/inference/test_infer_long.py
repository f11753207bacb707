"""Prompts longer than the context, cuts as in training, and marked pieces of prompts."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

import reftune
from reftune import LoreftConfig, ReftConfig
from reftune.config.recipe import EvaluationSpec, TaskSpec
from reftune.errors import PositionError
from reftune.inference import choose, evaluate, generate, stream
from reftune.inference.classify import class_rows
from reftune.inference.prompts import context_len, encode_prompts, fit
from reftune.tasks.base import Example, Task
from reftune.training.encode import encode

pytestmark = pytest.mark.quick
TOKENIZER = tiny_tokenizer()


class Echo(Task):
    """Two answers to compare or to write."""

    name, kind, max_new_tokens = "echo", "choice", 6

    def rows_of(self, split):
        return []

    def extract(self, text, example):
        return text

    def score(self, text, example):
        return {"accuracy": float(text == example.answer)}


def examples(*prompts):
    return [Example(str(i), p, "yy", "yy", choices=("n", "yy")) for i, p in enumerate(prompts)]


def small(**more):
    return tiny_llama(seed=3, max_position_embeddings=24, **more)


def test_a_long_prompt_is_cut_from_the_left_as_in_training():
    model, long = small(), "abcdefghijklmnopqrstuvwxyz0123456789"
    (row,) = fit(model, encode_prompts(TOKENIZER, [long]), 6)
    trained = encode(Example("0", long, "x" * 5, ""), TOKENIZER, 24)
    assert row.ids == trained.input_ids[: trained.prompt_len] and row.cut == trained.cut == 19
    chat = [{"role": "user", "content": long}]
    (row,) = fit(model, encode_prompts(TOKENIZER, [chat]), 6)
    assert row.ids[0] == TOKENIZER.bos_token_id and len(row.ids) == 18
    messages = (*chat, {"role": "assistant", "content": "yyyyy"})
    trained = encode(Example("0", "", "", "", messages=messages), TOKENIZER, 24)
    assert trained.input_ids[: trained.prompt_len] == row.ids


def test_evaluation_cuts_and_counts_instead_of_failing(caplog):
    rows = examples("short", "a" * 60, "b" * 20)
    with caplog.at_level(logging.WARNING):
        found = evaluate(small(), TOKENIZER, Echo(TaskSpec(name="echo")), rows)
    assert found.prompts_cut == 2 and "2 of 3 prompts to score are longer than 18" in caplog.text
    assert [p.cut > 0 for p in found.predictions] == [False, True, True]
    cut = generate(small(), TOKENIZER, ["a" * 17], max_new_tokens=6)[0][0]
    assert found.predictions[1].text == cut
    alone = evaluate(small(), TOKENIZER, Echo(TaskSpec(name="echo")), rows, choice_by="probability")
    assert alone.prompts_cut == 1 and alone.predictions[1].logprobs == pytest.approx(
        choose(small(), TOKENIZER, ["a" * 21], ["n", "yy"])[0], abs=1e-4
    )


def test_a_subject_that_is_cut_off_moves_to_what_is_left():
    rows = encode_prompts(TOKENIZER, ["red " + "a" * 40], subjects=["red"])
    assert rows[0].subject == 3 and rows[0].fitted(18).subject == 1
    kept = encode_prompts(TOKENIZER, ["a" * 40 + " red!"], subjects=["red"])[0].fitted(18)
    assert TOKENIZER.decode([kept.ids[kept.subject]]) == "d"


def test_classification_is_cut_where_training_cuts():
    example = Example("0", "abcdefgh" * 4, "", "", label=1, pair="xyz" * 9)
    trained = encode(example, TOKENIZER, 12, kind="classification")
    row = class_rows(small(), TOKENIZER, [(example.prompt, example.pair)], max_len=12)[0]
    assert row.ids == trained.input_ids and row.cut == trained.cut == 48
    assert len(class_rows(small(), TOKENIZER, [example.prompt * 2])[0].ids) == 24


def test_the_context_of_roberta_is_two_shorter():
    from transformers import RobertaConfig

    model = torch.nn.Module()
    model.config = RobertaConfig(max_position_embeddings=514, pad_token_id=1)
    assert context_len(model) == 512


def adapted(positions):
    config = ReftConfig(LoreftConfig(rank=2), positions=positions)
    model = reftune.get_peft_model(tiny_llama(seed=3), config).eval()
    with torch.no_grad():
        for index, (name, p) in enumerate(sorted(model.named_parameters())):
            if "reft_" in name and "rotation" not in name:
                p.normal_(0, 0.8, generator=torch.Generator().manual_seed(index))
    return model


def test_marked_pieces_reach_the_edit():
    model, settings = adapted("mask"), {"max_new_tokens": 10}
    prompts, marks = ["the red cat ", "a red and a red dog "], [["red"], [(2, 5), (12, 15)]]
    places = [[5, 6, 7], [3, 4, 5, 13, 14, 15]]  # BOS, then one token a character
    answers = generate(model, TOKENIZER, prompts, marks=marks, **settings)
    for prompt, mark, own, (answer,) in zip(prompts, marks, places, answers):
        ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
        columns = torch.zeros_like(ids, dtype=torch.bool)
        columns[0, own] = True
        out = model.generate(
            input_ids=ids, intervention_mask=columns, max_new_tokens=10, do_sample=False
        )[0, ids.shape[1] :]
        assert answer == TOKENIZER.decode(out, skip_special_tokens=True)
        assert answer == "".join(stream(model, TOKENIZER, prompt, marks=mark, **settings))
    plain = generate(tiny_llama(seed=3), TOKENIZER, prompts, **settings)
    assert answers != plain
    both = choose(model, TOKENIZER, prompts, ["a", "bcd"], marks=marks)
    for prompt, mark, pair in zip(prompts, marks, both):
        (alone,) = choose(model, TOKENIZER, [prompt], ["a", "bcd"], marks=[mark])
        assert pair == pytest.approx(alone, abs=1e-4)
    with pytest.raises(PositionError, match="needs an explicit column"):
        generate(model, TOKENIZER, prompts, **settings)


def test_a_marked_row_is_trained_as_it_is_asked():
    row = encode(Example("0", "a red b", " cd", "", meta={"mask": ("red",)}), TOKENIZER, 32)
    assert [i for i, on in enumerate(row.intervention_mask) if on] == [3, 4, 5]
    assert len(row.intervention_mask) == len(row)
    cut = encode(Example("0", "aaaaaa red b", " cd", "", meta={"mask": ("red",)}), TOKENIZER, 12)
    marked = [token for token, on in zip(cut.input_ids, cut.intervention_mask) if on]
    assert TOKENIZER.decode(marked) == "red"


def test_decoding_of_the_recipe_reaches_the_model():
    rows = [Example("0", "letter a is ", "y", "y")]
    task = Echo(TaskSpec(name="echo"))
    task.kind = "generation"
    model = tiny_llama(seed=3)

    def text(**spec):
        found = evaluate(model, TOKENIZER, task, rows, EvaluationSpec(max_new_tokens=12, **spec))
        return found.predictions[0].text

    for options in ({"num_beams": 3}, {"repetition_penalty": 4.0}, {"no_repeat_ngram_size": 1}):
        wanted = generate(model, TOKENIZER, [rows[0].prompt], max_new_tokens=12, options=options)[
            0
        ][0]
        assert text(**options) == wanted
    drawn = {text(temperature=1.5, top_k=k) for k in (0, 1)}
    assert text() in drawn and len(drawn) == 2
