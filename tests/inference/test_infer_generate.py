"""Batched generation: same answers as row by row, right endings, clear errors."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

from reftune.errors import AdapterError, DataError, ModelError, RecipeError
from reftune.inference import generate
from reftune.inference.decoding import Decoding, SeededSampler, cut_ids, uniforms
from reftune.inference.prompts import evaluating

pytestmark = pytest.mark.quick

PROMPTS = ["2+3=", "what is 7 times 8? ", "a", "12 apples and 3 pears, how many fruits? answer: "]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def greedy_by_hand(model, ids, steps):
    """The definition: no cache, no padding, arg max, stop at EOS (2)."""
    new = []
    for _ in range(steps):
        token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token == 2:
            break
        new.append(token)
    return new


def test_greedy_batches_equal_the_definition_row_by_row(model, tokenizer):
    expected = [
        tokenizer.decode(greedy_by_hand(model, tokenizer(p)["input_ids"], 10)) for p in PROMPTS
    ]
    for batch_size in (1, 3, 32):
        answers = generate(model, tokenizer, PROMPTS, max_new_tokens=10, batch_size=batch_size)
        assert [row[0] for row in answers] == expected
    assert len(set(expected)) == len(PROMPTS)


def test_a_tokenizer_without_pad_token_and_a_model_in_training_mode(model, tokenizer):
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    training = tiny_llama(seed=3, attention_dropout=0.5).train()
    assert generate(training, tiny_tokenizer(pad=False), PROMPTS, max_new_tokens=6) == expected
    assert training.training and all(module.training for module in training.modules())


def test_samples_depend_on_seed_row_and_sample_only(model, tokenizer):
    def sample(batch_size, seed=5):
        return generate(
            *(model, tokenizer, PROMPTS),
            max_new_tokens=8, batch_size=batch_size, temperature=1.0, samples=3, seed=seed,
        )  # fmt: skip

    torch.manual_seed(0)
    first = sample(2)
    torch.manual_seed(1)
    assert sample(12) == first
    assert sample(2, seed=6) != first
    assert all(len(set(row)) > 1 for row in first)


def test_sampling_draws_from_the_model_distribution():
    """Frequencies of 20,000 draws against softmax(logits / T), with top-k and top-p cut off."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]])
    many = 20_000
    numbers = uniforms(0, [(row, 0) for row in range(many)], 1)

    def frequencies(**settings):
        sampler = SeededSampler(numbers, 3, Decoding(1, **settings))
        picked = sampler(torch.zeros(many, 3, dtype=torch.long), logits.repeat(many, 1))
        assert (picked > -torch.inf).sum() == many  # one token a row
        return torch.bincount(picked.argmax(-1), minlength=5) / many

    expected = torch.softmax(logits[0] / 0.7, -1)
    assert torch.allclose(frequencies(temperature=0.7), expected, atol=0.012)
    top2 = torch.softmax(logits[0, :2] / 0.7, -1)
    assert torch.allclose(frequencies(temperature=0.7, top_k=2)[:2], top2, atol=0.012)
    assert frequencies(temperature=0.7, top_k=2)[2:].sum() == 0
    assert frequencies(temperature=1.0, top_p=0.5)[1:].sum() == 0  # P(first) = 0.56


def test_sampling_never_picks_an_impossible_token():
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).repeat(2, 1)
    edges = torch.tensor([[0.0], [1.0 - 2**-53]], dtype=torch.float64)
    picked = SeededSampler(edges, 1, Decoding(1, temperature=1.0))(
        torch.zeros(2, 1, dtype=torch.long), scores
    )
    assert picked.argmax(-1).tolist() == [1, 1]


def test_answers_end_at_eos_without_it_and_at_stop_texts(model, tokenizer):
    text = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=12)[0][0]
    stop = text[3:5]
    stopped = generate(model, tokenizer, PROMPTS, max_new_tokens=12, stop=[stop])
    assert stopped[0][0] == text[: text.find(stop)]
    assert all(stop not in row[0] for row in stopped)
    assert cut_ids([7, 8, 2, 2, 9], [2]) == [7, 8]

    ending = tiny_llama(seed=3)
    first = greedy_by_hand(ending, tokenizer(PROMPTS[0])["input_ids"], 1)[0]
    ending.generation_config.eos_token_id = [first, 2]  # a checkpoint's own end-of-turn token
    assert generate(ending, tokenizer, PROMPTS[:1], max_new_tokens=5) == [[""]]


def test_generation_settings_of_the_checkpoint_do_not_leak_in(tokenizer):
    expected = generate(tiny_llama(seed=3), tokenizer, PROMPTS, max_new_tokens=10)
    opinionated = tiny_llama(seed=3)
    config = opinionated.generation_config
    config.do_sample, config.temperature, config.top_k = True, 0.1, 3
    config.repetition_penalty, config.min_length, config.no_repeat_ngram_size = 5.0, 40, 1
    assert generate(opinionated, tokenizer, PROMPTS, max_new_tokens=10) == expected
    asked = generate(
        opinionated, tokenizer, PROMPTS, max_new_tokens=10, options={"no_repeat_ngram_size": 1}
    )
    assert all(len(set(row[0])) == len(row[0]) for row in asked)


def test_beams_through_options(model, tokenizer):
    beams = generate(model, tokenizer, PROMPTS, max_new_tokens=4, options={"num_beams": 3})
    alone = [
        generate(model, tokenizer, [p], max_new_tokens=4, options={"num_beams": 3})[0]
        for p in PROMPTS
    ]
    assert beams == alone


def test_chats_go_through_the_template(model, tokenizer):
    chat = [{"role": "user", "content": "2+3?"}]
    rendered = "<user> 2+3?\n<assistant> "  # after BOS, which the template writes itself
    by_text = generate(model, tokenizer, [rendered], max_new_tokens=8)
    assert generate(model, tokenizer, [chat], max_new_tokens=8) == by_text
    opened = [*chat, {"role": "assistant", "content": "it is"}]
    continued = generate(model, tokenizer, [opened], max_new_tokens=8)
    assert continued == generate(model, tokenizer, [rendered + "it is"], max_new_tokens=8)


def test_context_is_respected_row_by_row(tokenizer, caplog):
    small = tiny_llama(seed=3, max_position_embeddings=24)
    with pytest.raises(DataError, match="Prompt 1 has 25 tokens; the model's context is 24 tokens"):
        generate(small, tokenizer, ["a", "b" * 24], max_new_tokens=4)
    with caplog.at_level(logging.WARNING):
        answers = generate(small, tokenizer, ["a", "b" * 20], max_new_tokens=10)
    assert "1 of 2 prompts leave fewer than 10 tokens" in caplog.text
    assert len(answers[1][0]) <= 3
    assert answers[0] == generate(small, tokenizer, ["a"], max_new_tokens=10)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -2}, "top_k is -2"),
        ({"samples": 2}, "2 greedy samples would all be the same"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"options": {"max_length": 3}}, "options holds max_length"),
        ({"options": {"num_beem": 3}}, "unknown options num_beem"),
        ({"temperature": 1.0, "options": {"num_beams": 2}}, "cannot be combined with beams"),
    ],
)
def test_settings_that_make_no_sense(model, tokenizer, settings, message):
    with pytest.raises(RecipeError, match=message):
        generate(model, tokenizer, ["a"], **{"max_new_tokens": 4, **settings})


def test_prompts_that_make_no_sense(model, tokenizer):
    with pytest.raises(DataError, match="Prompt 1 is empty"):
        generate(model, tiny_tokenizer(bos=False), ["a", ""], max_new_tokens=4)
    with pytest.raises(DataError, match=r'Prompt 0 is no chat: .*Each message needs "role"'):
        generate(model, tokenizer, [[{"text": "hi"}]], max_new_tokens=4)
    with pytest.raises(DataError, match="no chat template"):
        chat = [{"role": "user", "content": "hi"}]
        generate(model, tiny_tokenizer(chat=False), [chat], max_new_tokens=4)
    with pytest.raises(DataError, match="subspaces has 1 entries for 2 prompts"):
        generate(model, tokenizer, ["a", "b"], max_new_tokens=4, subspaces=[None])
    assert generate(model, tokenizer, [], max_new_tokens=4) == []


def test_adapter_names_of_a_plain_model(model, tokenizer):
    with pytest.raises(AdapterError, match=r"has no adapter 'x'\. Attached: none"):
        generate(model, tokenizer, ["a"], max_new_tokens=4, adapter_names=["x"])
    with pytest.raises(AdapterError, match="1 names for 2 prompts"):
        generate(model, tokenizer, ["a", "b"], max_new_tokens=4, adapter_names=["__base__"])
    base = generate(model, tokenizer, ["a"], max_new_tokens=4, adapter_names=["__base__"])
    assert base == generate(model, tokenizer, ["a"], max_new_tokens=4)


def test_models_without_a_language_head(tokenizer):
    with pytest.raises(ModelError, match="LlamaModel cannot generate text"):
        generate(tiny_llama().model, tokenizer, ["a"], max_new_tokens=4)


def test_progress_reaches_the_end_and_memory_shortage_halves_the_batch(
    model, tokenizer, monkeypatch, caplog
):
    from reftune.inference import running as module

    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=5)
    whole, sizes, seen = module.run, [], []

    def short_of_memory(model, tokenizer, batch, decoding, **options):
        sizes.append(len(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return whole(model, tokenizer, batch, decoding, **options)

    monkeypatch.setattr(module, "run", short_of_memory)

    def note(done, total):
        seen.append((done, total))

    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=5, progress=note)
    assert answers == expected
    assert sizes == [4, 2, 1, 1, 2, 1, 1] and seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert "4 rows do not fit in memory, trying 2" in caplog.text


def test_evaluating_restores_every_module_after_an_error():
    mixed = tiny_llama().train()
    mixed.model.layers[0].eval()
    before = [module.training for module in mixed.modules()]
    with pytest.raises(KeyError, match="x"), evaluating(mixed):
        assert not mixed.training and not torch.is_grad_enabled()
        raise KeyError("x")
    assert [module.training for module in mixed.modules()] == before
    assert torch.is_grad_enabled()


def test_encoder_decoder_batches_equal_single_rows(tokenizer):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    t5 = T5ForConditionalGeneration(config).eval()
    alone = [generate(t5, tokenizer, [p], max_new_tokens=8)[0] for p in PROMPTS]
    assert generate(t5, tokenizer, PROMPTS, max_new_tokens=8) == alone
