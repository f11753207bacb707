"""One prefill for what prompts have in common: the same answers, and refusals."""

from __future__ import annotations

import pytest
import torch
from contracts.architectures import ARCHITECTURES, build
from tiny import tiny_llama, tiny_tokenizer

import reftune
from reftune.errors import DataError, ModelError
from reftune.inference import generate, prefix
from reftune.inference.decoding import Decoding
from reftune.inference.running import jobs_of
from reftune.model import causal

HEAD = "answer in one word, and be kind to those who ask. "
PROMPTS = [HEAD + "how many birds?", HEAD + "and who?", HEAD + "is it a long way to the mill?"]
NEW = {"max_new_tokens": 5}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def adapted(model, positions="l2"):
    for name, method in (("one", "loreft"), ("two", "red")):
        reftune.attach(model, method, name=name, layers="all", positions=positions)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3", "gpt_neox", "falcon"])
def test_many_adapters_answer_from_one_prefix(tokenizer, name):
    assert ARCHITECTURES[name].kind == "causal"
    torch.manual_seed(0)
    config = build(name).config
    config.max_position_embeddings = 128
    if hasattr(config, "n_positions"):
        config.n_positions = 128
    model = adapted(type(build(name))(config))
    names = ["one", "two", "__base__"]
    plain = generate(model, tokenizer, PROMPTS, adapter_names=names, **NEW)
    cache = prefix.prefix_cache(model, tokenizer, HEAD)
    before = [t.clone() for t in cache.keys]
    shared = generate(model, tokenizer, PROMPTS, adapter_names=names, prefix_cache=cache, **NEW)
    again = generate(model, tokenizer, PROMPTS, adapter_names=names, prefix_cache=cache, **NEW)
    assert plain == shared == again
    assert all(torch.equal(a, b) for a, b in zip(before, cache.keys))
    assert cache.nbytes == sum(t.numel() * t.element_size() for t in (*cache.keys, *cache.values))


def test_logits_are_exact_and_samples_are_the_same(tokenizer):
    model = adapted(tiny_llama(layers=3)).double()
    cache = prefix.prefix_cache(model, tokenizer, HEAD)
    sampled = {"temperature": 1.0, "samples": 3, "seed": 4, **NEW}
    plain = generate(model, tokenizer, PROMPTS, **sampled)
    assert generate(model, tokenizer, PROMPTS, prefix_cache=cache, **sampled) == plain
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    scope = {"prompt_lens": torch.tensor([ids.shape[1]])}
    with torch.no_grad():
        whole = model(ids, **scope).logits[:, -1]
        rest = model(
            ids[:, len(cache) :],
            attention_mask=torch.ones_like(ids),
            past_key_values=cache.cache(1),
            **scope,
        ).logits[:, -1]
    assert torch.allclose(whole, rest, atol=1e-12)


def test_windows_of_columns_are_not_filled_with_padding(tokenizer):
    torch.manual_seed(0)
    model = build("gemma3")
    config = model.config
    config.sliding_window, config.max_position_embeddings = 8, 128
    config.layer_types = ["sliding_attention", "full_attention"]
    model = adapted(type(model)(config))
    assert prefix.has_window(model) and not prefix.has_window(tiny_llama())
    cache = prefix.prefix_cache(model, tokenizer, HEAD)
    for prompts in (PROMPTS, [PROMPTS[0], PROMPTS[0][:-1] + "!"]):
        plain = generate(model, tokenizer, prompts, **NEW)
        assert generate(model, tokenizer, prompts, prefix_cache=cache, **NEW) == plain


def jobs(model, tokenizer, prompts=PROMPTS, names=None):
    rows = prefix_rows(tokenizer, prompts)
    return jobs_of(model, rows, Decoding(**NEW), names)


def prefix_rows(tokenizer, prompts):
    from reftune.inference.prompts import encode_prompts

    return encode_prompts(tokenizer, prompts, False)


def test_evaluation_shares_a_head_by_itself(tokenizer, monkeypatch):
    model = adapted(tiny_llama())
    found = prefix.shared_prefix(model, jobs(model, tokenizer), {})
    assert len(found) == len(tokenizer(HEAD)["input_ids"])
    assert prefix.shared_prefix(model, jobs(model, tokenizer), {"num_beams": 2}) is None
    assert prefix.shared_prefix(model, jobs(model, tokenizer, PROMPTS[:1]), {}) is None
    short = [p[len(HEAD) - 10 :] for p in PROMPTS]
    assert prefix.shared_prefix(model, jobs(model, tokenizer, short), {}) is None
    early = adapted(tiny_llama(), "f2+l2")
    assert prefix.shared_prefix(early, jobs(early, tokenizer), {}) is None
    wide = adapted(tiny_llama(), "l15")
    assert prefix.shareable(wide, jobs(wide, tokenizer)) == min(
        len(tokenizer(HEAD)["input_ids"]), len(tokenizer(PROMPTS[1])["input_ids"]) - 15
    )


def test_what_cannot_share_is_refused(tokenizer):
    model = adapted(tiny_llama())
    cache = prefix.prefix_cache(model, tokenizer, HEAD)
    with pytest.raises(DataError, match="Prompt 1 does not begin with the 51 tokens"):
        generate(model, tokenizer, [PROMPTS[0], "something else"], prefix_cache=cache, **NEW)
    early = adapted(tiny_llama(), "f2+l2")
    with pytest.raises(DataError, match="edits token 0 of prompt 0"):
        generate(early, tokenizer, PROMPTS, prefix_cache=cache, **NEW)
    with pytest.raises(ModelError, match="Beams"):
        options = {"num_beams": 2}
        generate(model, tokenizer, PROMPTS, prefix_cache=cache, options=options, **NEW)
    with pytest.raises(DataError, match="is empty"):
        prefix.prefix_cache(model, tokenizer, [])
    with pytest.raises(ModelError, match="encoder-decoder"):
        prefix.prefix_cache(build("t5"), tokenizer, HEAD)


def test_nothing_is_edited_while_the_prefix_is_computed(tokenizer):
    plain = tiny_llama()
    model = adapted(tiny_llama(), "l2")
    ids = tokenizer(HEAD)["input_ids"]
    a, b = (prefix.compute(m, ids) for m in (plain, model))
    assert all(torch.equal(x, y) for x, y in zip(a.keys, b.keys))
    assert not any(site._disable_adapters for site in causal.sites(model))
