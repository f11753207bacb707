"""Choices by log-probability, against the definition one row at a time."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

from reftune.errors import DataError, ModelError
from reftune.inference import choose

pytestmark = pytest.mark.quick

PROMPTS = ["2+3=", "is the sky blue? answer ", "a"]
CHOICES = [["5", "55", "6"], ["yes", "no"], ["b", "bcdef", "longest of all choices"]]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def by_definition(model, tokenizer, prompt, choice):
    head = tokenizer(prompt)["input_ids"]
    tail = tokenizer(choice, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logs = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
    return sum(float(logs[len(head) - 1 + i, token]) for i, token in enumerate(tail))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_scores_equal_the_definition(tokenizer, family, batch_size):
    if family == "llama":
        model = tiny_llama(seed=1)
    else:  # learned positions: padding must not shift them
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(vocab_size=64, n_positions=128, n_embd=32, n_layer=2, n_head=4)
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        model.eval()
    scores = choose(model, tokenizer, PROMPTS, CHOICES, batch_size=batch_size)
    for prompt, choices, row in zip(PROMPTS, CHOICES, scores, strict=True):
        expected = [by_definition(model, tokenizer, prompt, choice) for choice in choices]
        assert row == pytest.approx(expected, abs=1e-4)


def test_one_list_of_choices_for_all_and_shared_passes(tokenizer):
    model, passes = tiny_llama(seed=1), []

    def note(module, args, kwargs):
        passes.append(tuple(kwargs["input_ids"].shape))

    handle = model.model.register_forward_pre_hook(note, with_kwargs=True)
    shared = choose(model, tokenizer, PROMPTS, ["a1", "a2", "b"])
    handle.remove()
    rows = sum(shape[0] for shape in passes)
    assert rows == 6  # per prompt: one pass for "a1" and "a2", one for "b"
    assert shared == [
        pytest.approx([by_definition(model, tokenizer, p, c) for c in ("a1", "a2", "b")], abs=1e-4)
        for p in PROMPTS
    ]


def test_the_head_runs_on_answer_positions_only(tokenizer):
    model, widths = tiny_llama(seed=1), []
    model.lm_head.register_forward_hook(lambda module, args, out: widths.append(out.shape[1]))
    choose(model, tokenizer, ["a long prompt, longer than the answer"], ["yes", "no"])
    assert widths == [3]


def test_encoder_decoder(tokenizer):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    t5 = T5ForConditionalGeneration(config).eval()
    scores = choose(t5, tokenizer, PROMPTS, CHOICES)
    for prompt, choices, row in zip(PROMPTS, CHOICES, scores, strict=True):
        for choice, score in zip(choices, row, strict=True):
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            tail = torch.tensor([tokenizer(choice, add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                loss = t5(input_ids=ids, labels=tail).loss
            assert score == pytest.approx(-float(loss) * tail.shape[1], abs=1e-4)


def test_bad_choices(tokenizer):
    model = tiny_llama()
    with pytest.raises(DataError, match="Choice 1 of prompt 0 is empty"):
        choose(model, tokenizer, ["a"], [["b", ""]])
    with pytest.raises(DataError, match="1 lists of choices for 2 prompts"):
        choose(model, tokenizer, ["a", "b"], [["b", "c"]])
    with pytest.raises(DataError, match="Prompt 1 with its longest choice has 602 tokens"):
        choose(model, tokenizer, ["a", "a" * 599], ["bcd", "e"])
    with pytest.raises(ModelError, match="LlamaModel cannot generate"):
        choose(model.model, tokenizer, ["a"], ["b", "c"])
