"""Hand-overs: exact wherever the right answer can be told by hand, and refused where it cannot."""

from __future__ import annotations

import pytest
import torch
from diagnose_toys import PROMPTS, Echo, pushed, rows, shaken, study, talking
from tiny import tiny_llama, tiny_tokenizer

import reftune
from reftune import RedConfig, attach, generate, off, prompt_scope
from reftune.config.recipe import TaskSpec
from reftune.errors import AdapterError, ModelError, RecipeError
from reftune.inference.continuing import Start, check_model, go_on, writing
from reftune.inference.decoding import Decoding
from reftune.inference.handover import check_tokens, prefix_quality
from reftune.inference.prompts import encode_prompts

pytestmark = pytest.mark.quick

STEPS = 8
RULES = ("f2+l2+generated:2", "l1", "all", "response", "all_prompt+generated:3", "f1")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def lora():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM")
    model = get_peft_model(talking(), config)
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(model.named_parameters())):
            if "lora_B" in name:
                p.add_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return model.eval()


def stacked():
    """LoReFT on a model with LoRA, as a stack is loaded; its base has neither."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        config = reftune.ReftConfig(reftune.LoreftConfig(rank=2), positions="f2+l1")
        model = reftune.get_peft_model(lora(), config)
        for name, p in model.named_parameters():
            if ".reft_" in name:
                p.add_(0.7 * torch.randn(p.shape))
    return model.eval()


def by_hand(model, prompt, given, steps):
    """The definition: no cache, no padding, the whole row anew for each token, arg max."""
    new = []
    for _ in range(steps):
        ids = torch.tensor([[*prompt, *given, *new]])
        with torch.no_grad(), prompt_scope(model, torch.tensor([len(prompt)])):
            token = int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
        if token == 2:
            break
        new.append(token)
    return tuple(new)


def written(model, tokenizer, who, given=None, steps=STEPS, stop=()):
    starts = [
        Start(row, tuple(given[i]) if given else (), steps)
        for i, row in enumerate(encode_prompts(tokenizer, PROMPTS))
    ]
    with writing(model, who):
        return go_on(model, tokenizer, starts, Decoding(steps, stop=stop), batch_size=3)


@pytest.mark.parametrize("rule", RULES)
def test_going_on_is_a_fresh_pass_with_the_real_end_of_the_prompt(tokenizer, rule):
    model = shaken(rule)
    prompts = [row.ids for row in encode_prompts(tokenizer, PROMPTS)]
    base = written(model, tokenizer, "base")
    for count in (1, 3):
        given = [w.ids[:count] for w in base]
        found = written(model, tokenizer, "adapter", given)
        assert [w.ids for w in found] == [
            by_hand(model, prompt, ids, STEPS) for prompt, ids in zip(prompts, given)
        ]
        with off(model):
            plain = [by_hand(model, p, ids, STEPS) for p, ids in zip(prompts, given)]
        assert [w.ids for w in written(model, tokenizer, "base", given)] == plain


def test_the_end_of_the_prompt_matters(tokenizer):
    """Would the first tokens count as prompt, `l1` would edit the last of them."""
    model = shaken("l1")
    (start,) = encode_prompts(tokenizer, PROMPTS[1:2])
    given = written(model, tokenizer, "base")[1].ids[:4]
    right = by_hand(model, start.ids, given, STEPS)
    assert right != by_hand(model, [*start.ids, *given], (), STEPS)
    assert written(model, tokenizer, "adapter", [given] * 4)[1].ids == right


@pytest.mark.parametrize("make", [shaken, lora, stacked])
def test_with_nothing_given_it_is_generate(tokenizer, make):
    model = make()
    for who in ("base", "adapter"):
        found = written(model, tokenizer, who)
        with writing(model, who):
            texts = generate(model, tokenizer, PROMPTS, max_new_tokens=STEPS)
        assert [tokenizer.decode(w.ids) for w in found] == [text for (text,) in texts]
    base, adapter = (written(model, tokenizer, who) for who in ("base", "adapter"))
    assert [w.ids for w in base] != [w.ids for w in adapter]
    assert base == written(talking(), tokenizer, "adapter")  # the model that has nothing on it


@pytest.mark.parametrize("make", [shaken, lora, stacked])
def test_nobody_notices_a_hand_over_to_oneself(tokenizer, make):
    model = make()
    for who in ("base", "adapter"):
        alone = written(model, tokenizer, who)
        for count in (1, 5):
            rest = written(model, tokenizer, who, [w.ids[:count] for w in alone], STEPS - count)
            joined = [(*a.ids[:count], *b.ids) for a, b in zip(alone, rest)]
            assert joined == [w.ids for w in alone]


def quality(model, tokens, examples=None, task=None):
    examples = examples or rows()
    found = study(model, examples, task)
    with writing(model, "base"):
        base = generate(model, found.tokenizer, PROMPTS, max_new_tokens=STEPS)
    gold = [type(e)(e.id, e.prompt, "", text) for e, (text,) in zip(examples, base)]
    return prefix_quality(study(model, gold, task), tokens)


def texts(found, first, count):
    """The answers of a point, from what is written down to be read."""
    return [
        answer["text"]
        for answer in found.answers
        if (answer["first"], answer["tokens"]) == (first, count)
    ]


def test_the_ends_of_the_axis_are_the_models_alone():
    found = quality(shaken(), (0, 2, STEPS, 100))
    assert texts(found, "adapter", 0) == texts(found, "base", 100)  # the base alone
    assert texts(found, "base", 0) == texts(found, "adapter", 100)  # the adapter alone
    assert texts(found, "base", STEPS) == texts(found, "base", 100)
    assert texts(found, "adapter", 0) != texts(found, "adapter", 100)
    assert found.alone["base"].mean == 1.0 and found.at("adapter", 0).figure.mean == 1.0
    assert found.at("adapter", 0).test.p_value == 1.0
    assert found.at("base", 100).ended == found.at("adapter", 100).ended == len(PROMPTS)
    assert found.at("base", 0).ended == 0
    assert found.test.difference == found.alone["adapter"].mean - 1.0
    for first, second in (("adapter", "base"), ("base", "adapter")):
        for count in (0, 2, 100):
            point = found.at(first, count)
            change = point.figure.mean - found.alone[second].mean
            assert point.test.difference == pytest.approx(change)
            assert point.figure.low <= point.figure.mean <= point.figure.high


def test_an_adapter_that_spoils_the_first_token_alone_is_found_out():
    """At the last prompt token of the last block nothing but the first token can change."""
    model = pushed("last", [1], size=30.0)
    found = quality(model, (0, 1, 4))
    assert found.alone["base"].mean == 1.0 and found.alone["adapter"].mean == 0.0
    for count in (1, 4):
        assert found.at("base", count).figure.mean == 1.0  # a good beginning heals the adapter
        assert found.at("adapter", count).figure.mean == 0.0  # and its own spoils the base
    assert found.at("base", 1).test.only_a == len(PROMPTS)
    assert found.at("adapter", 1).test.only_b == len(PROMPTS)


class Stopping(Echo):
    stop = ()


def test_answers_that_ended_stay_as_they_are(tokenizer):
    model = shaken()
    first = written(model, tokenizer, "adapter")
    text = tokenizer.decode(first[0].ids)
    task = Stopping(TaskSpec(name="echo"))
    task.stop = (text[2:4],)  # two characters, two tokens: complete with the fourth
    found = quality(model, (3, 4, 6), task=task)
    alone = texts(found, "adapter", 6)[0]
    assert alone == text[: text.index(task.stop[0])] and len(alone) < 4
    assert found.at("adapter", 4).ended >= 1 and found.at("adapter", 6).ended >= 1
    assert texts(found, "adapter", 4)[0] == alone
    ending = shaken()
    ending.generation_config.eos_token_id = [2, first[0].ids[3]]
    (kept, *_) = written(ending, tokenizer, "adapter")
    assert kept.ids == first[0].ids[: len(kept.ids)] and kept.ended and len(kept.ids) <= 3
    over = quality(ending, (3, 4, 5))
    assert (
        texts(over, "adapter", 4)[0] == texts(over, "adapter", 5)[0] == tokenizer.decode(kept.ids)
    )


def test_a_stop_text_that_two_models_write_together_ends_the_answer(tokenizer):
    model = shaken()
    ids = written(model, tokenizer, "adapter")[0].ids
    text = tokenizer.decode(ids)
    (row, *_) = encode_prompts(tokenizer, PROMPTS)
    decoding = Decoding(STEPS, stop=(text[1:3],))
    with writing(model, "adapter"):
        (rest,) = go_on(model, tokenizer, [Start(row, ids[:2], 6)], decoding)
    assert rest.ended  # one character of the stop text was given, the other is its own


def test_short_contexts_shorten_answers_and_nothing_fails():
    model = shaken(max_position_embeddings=40)
    found = study(model, rows())
    assert [s.budget for s in found.starts] == [STEPS] * 4
    long = study(model, rows(["a" * 100, "2+3="]))
    assert len(long.starts[0].prompt.ids) == 40 - STEPS and long.starts[0].prompt.cut
    assert prefix_quality(long, (0, 4)).points


def test_what_cannot_be_handed_over_is_refused(tokenizer):
    with pytest.raises(AdapterError, match="no adapter to compare with its base"):
        check_model(tiny_llama())
    model = tiny_llama()
    attach(model, RedConfig(), positions="mask")
    with pytest.raises(AdapterError, match='"default" \\(mask\\) edits marked tokens'):
        check_model(model)
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="encoder-decoder"):
        check_model(T5ForConditionalGeneration(config))
    for wrong in ([], [-1, 4]):
        with pytest.raises(RecipeError, match="First tokens to hand over"):
            check_tokens(wrong)


def test_a_model_in_training_mode_is_as_it_was(tokenizer):
    model = shaken().train()
    found = written(model, tokenizer, "adapter")
    assert model.training and all(module.training for module in model.modules())
    assert [w.ids for w in found] == [w.ids for w in written(shaken(), tokenizer, "adapter")]
