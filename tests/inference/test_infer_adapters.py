"""Generation, choice and streaming with adapters: one, several, mixed in a batch."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

import reftune
from reftune.errors import AdapterError, DataError
from reftune.inference import choose, generate, stream

pytestmark = pytest.mark.quick

PROMPTS = ["2+3=", "what is 7 times 8? ", "a", "12 apples and 3 pears, how many fruits? answer: "]
NAMES = ["default", "second", "__base__", "default"]
CHOICES = ["yes", "no", "56", "5"]


def scramble(model, seed=0):
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "reft_" in name or "lora_" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def base():
    return tiny_llama(seed=3)


@pytest.fixture
def model():
    config = reftune.ReftConfig(reftune.LoreftConfig(rank=4), positions="f2+l2")
    model = reftune.get_peft_model(tiny_llama(seed=3), config)
    model.add_adapter("second", reftune.ReftConfig(reftune.LoreftConfig(rank=2), positions="l1"))
    model.set_adapter("default")
    return scramble(model)


def test_rows_of_a_batch_answer_with_their_own_adapter(model, base, tokenizer):
    mixed = generate(model, tokenizer, PROMPTS, max_new_tokens=10, adapter_names=NAMES)
    plain = generate(base, tokenizer, PROMPTS, max_new_tokens=10)
    for prompt, name, answer, without in zip(PROMPTS, NAMES, mixed, plain, strict=True):
        if name == "__base__":
            assert answer == without
            continue
        model.set_adapter(name)
        assert answer == generate(model, tokenizer, [prompt], max_new_tokens=10)[0] != without


def test_mixed_rows_on_the_plain_door(base, tokenizer):
    model = tiny_llama(seed=3)
    reftune.attach(model, reftune.LoreftConfig(rank=4), name="one", positions="f2+l2")
    scramble(model)
    adapted = generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    names = ["one", "__base__", "one", "__base__"]
    mixed = generate(model, tokenizer, PROMPTS, max_new_tokens=8, adapter_names=names)
    plain = generate(base, tokenizer, PROMPTS, max_new_tokens=8)
    assert mixed == [adapted[0], plain[1], adapted[2], plain[3]]
    assert adapted != plain
    streamed = "".join(stream(model, tokenizer, PROMPTS[1], max_new_tokens=8, adapter_name="one"))
    assert streamed == adapted[1][0]


def test_mixed_rows_with_lora(base, tokenizer):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = scramble(get_peft_model(tiny_llama(seed=3), config))
    names = ["default", "__base__", "default", "__base__"]
    mixed = generate(model, tokenizer, PROMPTS, max_new_tokens=8, adapter_names=names)
    adapted = generate(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=1)
    plain = generate(base, tokenizer, PROMPTS, max_new_tokens=8)
    assert mixed == [adapted[0], plain[1], adapted[2], plain[3]]
    assert adapted[0] != plain[0]


def test_several_samples_of_mixed_rows(model, tokenizer):
    settings = {"max_new_tokens": 6, "temperature": 1.0, "samples": 2, "adapter_names": NAMES}
    first = generate(model, tokenizer, PROMPTS, batch_size=8, **settings)
    assert generate(model, tokenizer, PROMPTS, batch_size=3, **settings) == first


def test_choices_know_where_the_prompt_ends(model, base, tokenizer):
    """Against one unpadded forward pass a choice, whose labels say where the prompt ends."""
    scores = choose(model, tokenizer, PROMPTS, CHOICES, adapter_names=NAMES, batch_size=5)
    for prompt, name, row in zip(PROMPTS, NAMES, scores, strict=True):
        if name != "__base__":
            model.set_adapter(name)
        for choice, score in zip(CHOICES, row, strict=True):
            head = tokenizer(prompt)["input_ids"]
            tail = tokenizer(choice, add_special_tokens=False)["input_ids"]
            labels = torch.tensor([[-100] * len(head) + tail])
            with torch.no_grad():
                run = base if name == "__base__" else model
                logits = run(torch.tensor([head + tail]), labels=labels).logits[0]
            expected = logits.log_softmax(-1)[len(head) - 1 : -1].gather(
                1, torch.tensor(tail)[:, None]
            )
            assert score == pytest.approx(float(expected.sum()), abs=1e-4)


def test_subspaces_and_subjects_reach_the_edit(tokenizer, base):
    config = reftune.ReftConfig(reftune.LoreftConfig(rank=4), positions="subject_last")
    model = scramble(reftune.get_peft_model(tiny_llama(seed=3), config))
    prompt, settings = "the red cat and the red dog ", {"max_new_tokens": 10}
    ids = tokenizer(prompt)["input_ids"]
    place = 1 + prompt.rfind("red") + 2  # BOS, then one token a character; last mention
    by_hand = model.generate(
        input_ids=torch.tensor([ids]), subject_positions=torch.tensor([place]),
        max_new_tokens=10, do_sample=False,
    )[0, len(ids) :]  # fmt: skip
    answer = generate(model, tokenizer, [prompt], subjects=["red"], **settings)[0][0]
    assert answer == tokenizer.decode(by_hand, skip_special_tokens=True)
    red, cat = choose(model, tokenizer, [prompt] * 2, CHOICES, subjects=["red", "cat"])
    assert max(abs(a - b) for a, b in zip(red, cat)) > 1e-3
    assert answer == "".join(stream(model, tokenizer, prompt, subject="red", **settings))

    def scored(dims):
        return choose(model, tokenizer, [prompt] * 2, CHOICES, subjects=["red"] * 2, subspaces=dims)

    none, some, every = scored([(), ()])[0], scored([(0, 1), None])[0], scored([None, ()])[0]
    assert scored([(), (0, 1)]) == [pytest.approx(none), pytest.approx(some)]
    assert none == pytest.approx(choose(base, tokenizer, [prompt], CHOICES)[0], abs=1e-4)
    assert max(abs(a - b) for a, b in zip(some, every)) > 1e-3
    with pytest.raises(DataError, match='subject "cow" is not in the prompt'):
        generate(model, tokenizer, [prompt], subjects=["cow"], **settings)
    with pytest.raises(DataError, match="Some prompts have a subject, others none"):
        choose(model, tokenizer, [prompt] * 2, CHOICES, subjects=["red", None])


def test_a_plain_model_ignores_what_only_edits_read(base, tokenizer):
    extra = {"subjects": ["2"], "subspaces": [(0,)]}
    assert generate(base, tokenizer, PROMPTS[:1], max_new_tokens=5, **extra) == generate(
        base, tokenizer, PROMPTS[:1], max_new_tokens=5
    )


def test_unknown_adapters_are_named(model, tokenizer):
    with pytest.raises(AdapterError, match=r"no adapter 'third'\. Attached: default, second"):
        generate(model, tokenizer, ["a"], max_new_tokens=4, adapter_names=["third"])
    with pytest.raises(AdapterError, match="no adapter 'third'"):
        stream(model, tokenizer, "a", max_new_tokens=4, adapter_name="third")
    with pytest.raises(AdapterError, match="no adapter 'third'"):
        choose(model, tokenizer, ["a"], CHOICES, adapter_names=["third"])
