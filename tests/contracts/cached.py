"""What tests of causal caching need: models with four blocks, batches, both paths.

A mode is `recompute`, `store`, or `start`: stored, and the blocks up to l0 left out.
"""

from __future__ import annotations

import torch
import transformers as hf
from contracts.architectures import GATED, VOCAB, build
from torch.nn import functional as F

import reftune
from reftune.model import causal
from reftune.model.run import Prepared, Runner
from reftune.training.causal import difference
from reftune.training.constants import Store
from reftune.training.stored import Stored

FOUR = {**GATED, "num_hidden_layers": 4, "head_dim": 8}
WINDOW = 8
"""Sliding window, shorter than the prompts."""


def qwen3_sliding():
    return hf.Qwen3ForCausalLM(
        hf.Qwen3Config(**FOUR, sliding_window=WINDOW, use_sliding_window=True, max_window_layers=2)
    )


def gemma4():
    """Return a model whose upper two blocks read keys and values of lower ones."""
    config = hf.Gemma4TextConfig(
        **{**FOUR, "max_position_embeddings": 128},
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        global_head_dim=8,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=VOCAB,
    )
    return hf.Gemma4ForCausalLM(config)


def gemma3_sliding():
    config = hf.Gemma3TextConfig(
        **FOUR,
        sliding_window=WINDOW,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return hf.Gemma3ForCausalLM(config)


def mixtral():
    """Return a model with experts: a token is sent to two of four."""
    model = hf.MixtralForCausalLM(
        hf.MixtralConfig(**FOUR, num_local_experts=4, num_experts_per_tok=2)
    )
    model.set_experts_implementation("eager")  # the grouped product knows no double precision
    return model


def bloom():
    config = hf.BloomConfig(
        vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return hf.BloomForCausalLM(config)


def llama_of(layers: int = 4, **values):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**FOUR, "num_hidden_layers": layers, **values}))


EXTRA = {
    "qwen3_sliding": qwen3_sliding,
    "gemma3_sliding": gemma3_sliding,
    "mixtral": mixtral,
    "bloom": bloom,
}
"""Architectures beside those of the matrix; gemma4 cannot start at a later block."""
MODES = ("recompute", "store", "start")


def model_of(name: str, positions: str = "l4", layers: object = "all", attention: str = ""):
    torch.manual_seed(3)
    made = {**EXTRA, "gemma4": gemma4}[name]() if name in (*EXTRA, "gemma4") else build(name)
    if attention:
        made.set_attn_implementation(attention)
    reftune.attach(made, reftune.LoreftConfig(rank=2), layers=layers, positions=positions)
    return made.double().train()


def batch(prompts=(20, 17, 14), answers: int = 4, seed: int = 0, side: str = "right") -> Prepared:
    generator = torch.Generator().manual_seed(seed)
    width = max(prompts) + answers
    ids = torch.randint(4, VOCAB, (len(prompts), width), generator=generator)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, prompt in enumerate(prompts):
        end = prompt + answers
        place = slice(0, end) if side == "right" else slice(width - end, width)
        mask[row, place] = 1
        labels[row, place] = torch.where(torch.arange(end) < prompt, -100, ids[row, place])
    return Prepared(ids * mask, mask, labels, prompt_lens=torch.tensor(prompts))


def loss(model, source=None, prepared=None):
    def compute():
        out = Runner(model, source)(batch() if prepared is None else prepared)
        return F.cross_entropy(out.logits, out.labels, reduction="sum")

    return compute


def source_of(model, mode: str):
    if mode == "recompute":
        return causal.Recompute(model)
    return Stored(model, Store(1e9), start=mode == "start")


def worst(model, mode: str, prepared=None) -> float:
    """Return the largest relative difference of both paths; a store answers from what it kept."""
    source = source_of(model, mode)
    if mode != "recompute":
        loss(model, source, prepared)()
        source.store.misses = 0
    found = difference(model, loss(model, None, prepared), loss(model, source, prepared))
    assert mode == "recompute" or not source.store.misses
    return found


def backward(model, source, prepared):
    model.zero_grad()
    loss(model, source, prepared)().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
