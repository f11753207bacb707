"""One prefill for what prompts have in common: the same answers, and refusals."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from contracts.architectures import ARCHITECTURES, build
from tiny import tiny_llama, tiny_tokenizer

import reftune
from reftune.config.recipe import EvaluationSpec, TaskSpec
from reftune.errors import DataError, ModelError
from reftune.inference import evaluate, generate, prefix, stream
from reftune.inference.choose import choose, choose_rows
from reftune.inference.decoding import Decoding
from reftune.inference.prompts import encode_prompts
from reftune.inference.running import jobs_of
from reftune.model import causal, off
from reftune.tasks.base import Example, Task

HEAD = "answer in one word, and be kind to those who ask. "
PROMPTS = [HEAD + "how many birds?", HEAD + "and who?", HEAD + "is it a long way to the mill?"]
NEW = {"max_new_tokens": 5}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def adapted(model, positions="l2"):
    """Attach two adapters that do something."""
    for name, method in (("one", "loreft"), ("two", "red")):
        reftune.attach(model, method, name=name, layers="all", positions=positions)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def sensitive(**config):
    """Return a model whose answers depend on every token before them."""
    return tiny_llama(layers=3, initializer_range=0.4, **config).double()


def built(name):
    """Return a model with a context of 128 tokens, whose answers depend on all of it."""
    torch.manual_seed(0)
    model = build(name)
    model.config.max_position_embeddings, model.config.initializer_range = 128, 0.4
    if hasattr(model.config, "n_positions"):
        model.config.n_positions = 128
    return type(model)(model.config).double()


@pytest.fixture
def passes(monkeypatch):
    """Return the widths of the passes of a prefill."""
    seen, real = [], causal.prefill

    def count(model, some):
        seen.append(some.width)
        return real(model, some)

    monkeypatch.setattr(causal, "prefill", count)
    return seen


# Exact


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3", "gpt_neox", "falcon"])
def test_many_adapters_answer_from_one_prefix(tokenizer, name, passes):
    assert ARCHITECTURES[name].kind == "causal"
    model = adapted(built(name))
    names = ["one", "two", "__base__"]
    plain = generate(model, tokenizer, PROMPTS, adapter_names=names, **NEW)
    cache = prefix.prefix_cache(model, tokenizer, HEAD)
    before = [t.clone() for t in cache.keys]
    shared = generate(model, tokenizer, PROMPTS, adapter_names=names, prefix_cache=cache, **NEW)
    again = generate(model, tokenizer, PROMPTS, adapter_names=names, prefix_cache=cache, **NEW)
    assert plain == shared == again and passes == [51]
    cut = [p[9:] for p in PROMPTS]
    assert generate(model, tokenizer, cut, adapter_names=names, **NEW) != plain
    assert all(torch.equal(a, b) for a, b in zip(before, cache.keys))
    assert cache.nbytes == sum(t.numel() * t.element_size() for t in (*cache.keys, *cache.values))


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1.0, "samples": 3, "seed": 4},
        {"options": {"num_beams": 3}},
        {"options": {"repetition_penalty": 1.3}},
        {"batch_size": 2},
    ],
    ids=["samples", "beams", "penalty", "batches"],
)
def test_ways_of_decoding_do_not_matter(tokenizer, how):
    model = adapted(sensitive())
    cache = prefix.prefix_cache(model, tokenizer, HEAD)
    plain = generate(model, tokenizer, PROMPTS, **how, **NEW)
    assert generate(model, tokenizer, PROMPTS, prefix_cache=cache, **how, **NEW) == plain
    assert plain != generate(model, tokenizer, [p[9:] for p in PROMPTS], **how, **NEW)


def test_an_answer_arrives_in_pieces(tokenizer):
    model = adapted(sensitive())
    cache = prefix.prefix_cache(model, tokenizer, HEAD)
    for sampling in ({}, {"temperature": 1.0, "seed": 3}):
        pieces = list(stream(model, tokenizer, PROMPTS[2], prefix_cache=cache, **sampling, **NEW))
        assert "".join(pieces) == "".join(stream(model, tokenizer, PROMPTS[2], **sampling, **NEW))
    with pytest.raises(DataError, match="does not begin with"):
        stream(model, tokenizer, "something else", prefix_cache=cache, **NEW)


def test_logits_are_exact(tokenizer):
    model = adapted(sensitive())
    cache = prefix.prefix_cache(model, tokenizer, HEAD)
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    scope = {"prompt_lens": torch.tensor([ids.shape[1]])}
    with torch.no_grad():
        whole = model(ids, **scope).logits[:, -1]
        rest = model(
            ids[:, len(cache) :],
            attention_mask=torch.ones_like(ids),
            past_key_values=cache.cache([0]),
            **scope,
        ).logits[:, -1]
    assert torch.allclose(whole, rest, atol=1e-12)


def test_rows_are_padded_as_without_sharing():
    states = [torch.arange(1.0, 5.0).reshape(1, 1, 4, 1)]
    cache = prefix.PrefixCache([5, 6, 7, 8], states, states)
    made = cache.cache([0, 1, 6]).layers[0].keys
    assert made[:, 0, :, 0].tolist() == [[1, 2, 3, 4], [0, 1, 2, 3], [0, 0, 0, 0]]


@pytest.mark.parametrize("width", [8, 64])
def test_windows_see_what_they_see_without_sharing(tokenizer, width):
    torch.manual_seed(0)
    model = build("gemma3")
    config = model.config
    config.sliding_window, config.max_position_embeddings = width, 128
    config.layer_types, config.initializer_range = ["sliding_attention", "full_attention"], 0.4
    model = adapted(type(model)(config)).double()
    cache = prefix.prefix_cache(model, tokenizer, HEAD)
    far = [*PROMPTS, HEAD + "and " * 15 + "so?"]  # the shortest is padded by more than the window
    plain = generate(model, tokenizer, far, **NEW)
    assert generate(model, tokenizer, far, prefix_cache=cache, **NEW) == plain


@pytest.mark.parametrize("positions", ["l2", "l2+response", "mask", "subject_last"])
def test_choices_are_compared_from_one_prefix(tokenizer, passes, positions):
    model = adapted(sensitive(), positions)
    told = {}
    if positions == "mask":
        told["marks"] = [[p[len(HEAD) :]] for p in PROMPTS]
    if positions == "subject_last":
        told["subjects"] = [p.split()[-1] for p in PROMPTS]
    choices = [" yes", " no, never", " o"]
    plain = choose(model, tokenizer, PROMPTS, choices, **told)
    assert passes == []
    rows = encode_prompts(tokenizer, PROMPTS, False, told.get("subjects"), told.get("marks"))
    cache = prefix.prefix_cache(model, tokenizer, HEAD)
    shared = choose_rows(model, tokenizer, rows, [choices] * 3, shared=cache)
    for a, b in zip(plain, shared):
        assert a == pytest.approx(b, abs=1e-10)


# By itself


def jobs(model, tokenizer, prompts=PROMPTS, names=None):
    rows = encode_prompts(tokenizer, prompts, False)
    return jobs_of(model, rows, Decoding(**NEW), names)


def test_a_common_head_is_found_where_it_pays(tokenizer):
    model = adapted(tiny_llama())
    reftune.use(model, ["one", "two"])
    found = prefix.shared_prefix(model, jobs(model, tokenizer), {})
    assert len(found) == len(tokenizer(HEAD)["input_ids"])
    assert prefix.shared_prefix(model, jobs(model, tokenizer), {"use_cache": False}) is None
    assert prefix.shared_prefix(model, jobs(model, tokenizer, PROMPTS[:1]), {}) is None
    short = [p[len(HEAD) - 10 :] for p in PROMPTS]
    assert prefix.shared_prefix(model, jobs(model, tokenizer, short), {}) is None
    early = adapted(tiny_llama(), "f2+l2")
    assert prefix.shared_prefix(early, jobs(early, tokenizer), {}) is None
    wide = adapted(tiny_llama(), "l15")
    assert prefix.shareable(wide, jobs(wide, tokenizer)) == min(
        len(tokenizer(HEAD)["input_ids"]), len(tokenizer(PROMPTS[1])["input_ids"]) - 15
    )


def test_only_adapters_that_act_bound_the_head(tokenizer):
    model = adapted(tiny_llama())
    reftune.attach(model, "loreft", name="early", positions="f2")
    cache = prefix.compute(model, tokenizer(HEAD)["input_ids"])
    reftune.use(model, "one")
    assert prefix.shareable(model, jobs(model, tokenizer)) == len(cache)
    assert generate(model, tokenizer, PROMPTS, prefix_cache=cache, **NEW)
    names = ["one", "__base__", "early"]
    assert prefix.shareable(model, jobs(model, tokenizer, names=names)) == 0
    with pytest.raises(DataError, match=r'"early" .f2. edits token 0 of prompt 2'):
        generate(model, tokenizer, PROMPTS, adapter_names=names, prefix_cache=cache, **NEW)


class Shots(Task):
    """Questions behind a long common head of worked examples."""

    name, max_new_tokens = "shots", 4

    def rows_of(self, split):
        shots = "".join(f"question: {i} + {i}? answer: {2 * i}.\n" for i in range(1, 5))
        rows = []
        for i in range(1, 14):
            gold = f" {11 * i}"
            choices = (gold, " 5", f" {i} birds") if self.kind == "choice" else ()
            prompt = f"{shots}question: {i} + {10 * i}? answer:"
            rows.append(Example(str(i), prompt, gold, gold.strip(), choices=choices))
        return rows

    def extract(self, text, example):
        return text.strip()

    def score(self, text, example):
        return {"accuracy": float(self.extract(text, example) == example.answer)}


@pytest.mark.parametrize("kind", ["generation", "choice"])
@pytest.mark.parametrize("spec", [{}, {"temperature": 1.0, "samples": 2}, {"num_beams": 2}])
def test_evaluation_shares_a_head_by_itself(tokenizer, passes, monkeypatch, caplog, kind, spec):
    task = Shots(TaskSpec(name="shots"))
    task.kind = kind
    model = adapted(sensitive())
    spec = EvaluationSpec(batch_size=4, **spec)
    with caplog.at_level(logging.INFO, logger="reftune"):
        found = evaluate(model, tokenizer, task, task.load("test"), spec)
    times = 2 if kind == "choice" else 1  # answers, and choices compared
    assert len(passes) == times and passes[0] > 100
    said = [r.message for r in caplog.records if "computed once" in r.message]
    assert len(said) == times and f"same {passes[0]} tokens" in said[0]
    monkeypatch.setattr(prefix, "LEAST", 10**9)
    plain = evaluate(model, tokenizer, task, task.load("test"), spec)
    assert len(passes) == times
    assert [p.text for p in found.predictions] == [p.text for p in plain.predictions]
    assert len({p.text for p in found.predictions}) > 3
    for a, b in zip(found.predictions, plain.predictions):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-9)


# Refused


def test_what_cannot_share_is_refused(tokenizer):
    model = adapted(tiny_llama())
    cache = prefix.prefix_cache(model, tokenizer, HEAD)
    with pytest.raises(DataError, match="Prompt 1 does not begin with the 51 tokens"):
        generate(model, tokenizer, [PROMPTS[0], "something else"], prefix_cache=cache, **NEW)
    early = adapted(copy.deepcopy(tiny_llama()), "f2+l2")
    own = prefix.prefix_cache(early, tokenizer, HEAD)
    with pytest.raises(DataError, match="edits token 0 of prompt 0"):
        generate(early, tokenizer, PROMPTS, prefix_cache=own, **NEW)
    with pytest.raises(ModelError, match="options choose another cache"):
        options = {"use_cache": False}
        generate(model, tokenizer, PROMPTS, prefix_cache=cache, options=options, **NEW)
    with pytest.raises(DataError, match="is empty"):
        prefix.prefix_cache(model, tokenizer, [])
    with pytest.raises(ModelError, match="encoder-decoder"):
        prefix.prefix_cache(build("t5"), tokenizer, HEAD)


def test_a_prefix_of_other_weights_is_refused(tokenizer):
    model = adapted(tiny_llama())
    cache = prefix.prefix_cache(model, tokenizer, HEAD)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # an adapter that is trained on is no other base
                parameter.add_(0.1)
    assert generate(model, tokenizer, PROMPTS, prefix_cache=cache, **NEW)
    with pytest.raises(ModelError, match="computed with another model"):
        generate(adapted(tiny_llama()), tokenizer, PROMPTS, prefix_cache=cache, **NEW)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    with pytest.raises(ModelError, match="other weights"):
        generate(model, tokenizer, PROMPTS, prefix_cache=cache, **NEW)


def test_lora_below_is_part_of_the_prefix(tokenizer):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    reftune.attach(model.get_base_model(), "loreft", positions="l2")
    model.eval()
    cache = prefix.prefix_cache(model, tokenizer, HEAD)
    plain = generate(model, tokenizer, PROMPTS, **NEW)
    assert generate(model, tokenizer, PROMPTS, prefix_cache=cache, **NEW) == plain
    with off(model), pytest.raises(ModelError, match="LoRA switched otherwise"):
        generate(model, tokenizer, PROMPTS, prefix_cache=cache, **NEW)


def test_long_prompts_with_angles_of_their_own_are_refused(tokenizer):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = adapted(tiny_llama(max_position_embeddings=60, rope_parameters=rope))
    model.config.max_position_embeddings = 60
    cache = prefix.prefix_cache(model, tokenizer, HEAD)
    short = [HEAD + "who?", HEAD + "why?"]
    plain = generate(model, tokenizer, short, **NEW)
    assert generate(model, tokenizer, short, prefix_cache=cache, **NEW) == plain
    found = jobs(tiny_llama(), tokenizer)
    assert prefix.shared_prefix(model, found, {}) is None
    with pytest.raises(ModelError, match="more than 60 tokens"):
        prefix.check(model, cache, found, {})


def test_nothing_is_edited_while_the_prefix_is_computed(tokenizer):
    plain = tiny_llama()
    model = adapted(tiny_llama(), "l2")
    ids = tokenizer(HEAD)["input_ids"]
    a, b = (prefix.compute(m, ids) for m in (plain, model))
    assert all(torch.equal(x, y) for x, y in zip(a.keys, b.keys))
