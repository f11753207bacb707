"""Tiny random models of every tested architecture, built in memory from their configs.

A `Architecture` says how to build a model and what kind it is; `batch` makes padded token ids,
`forward` runs a model on them whatever its kind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

DIM, VOCAB = 32, 64
PAD, BOS, EOS = 0, 1, 2
LENGTHS = (11, 7, 4)
"""Real tokens of the rows of a batch."""

COMMON = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "hidden_size": DIM,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GATED = {**COMMON, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER = {**COMMON, **NO_DROPOUT, "intermediate_size": 64, "max_position_embeddings": 66}


@dataclass(frozen=True)
class Architecture:
    """How to build one tiny model.

    Attributes:
        build: Returns a fresh model.
        kind: `causal`, `encoder` or `seq2seq`.
        inner: Dotted name of a linear module inside each block.
        blocks: Name of the class of its blocks.
    """

    build: Callable[[], nn.Module]
    kind: str
    inner: str
    blocks: str


def llama(**values: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**GATED, "num_hidden_layers": 3, **values}))


def mistral() -> nn.Module:
    return hf.MistralForCausalLM(hf.MistralConfig(**GATED, sliding_window=None))


def qwen2() -> nn.Module:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**GATED))


def qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**GATED, head_dim=8))


def gemma2() -> nn.Module:
    config = hf.Gemma2Config(**GATED, head_dim=8, sliding_window=32, query_pre_attn_scalar=8)
    return hf.Gemma2ForCausalLM(config)


def gemma3() -> nn.Module:
    config = hf.Gemma3TextConfig(**GATED, head_dim=8, sliding_window=32, query_pre_attn_scalar=8)
    return hf.Gemma3ForCausalLM(config)


def phi3() -> nn.Module:
    return hf.Phi3ForCausalLM(hf.Phi3Config(**GATED, resid_pdrop=0.0))


def gpt2() -> nn.Module:
    values = {k: COMMON[k] for k in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(**values, **off, n_embd=DIM, n_layer=2, n_head=4, n_positions=64)
    )


def gpt_neox() -> nn.Module:
    config = hf.GPTNeoXConfig(**COMMON, intermediate_size=64, max_position_embeddings=64)
    return hf.GPTNeoXForCausalLM(config)


def opt() -> nn.Module:
    config = hf.OPTConfig(
        **COMMON, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=DIM, dropout=0.0
    )
    return hf.OPTForCausalLM(config)


def falcon() -> nn.Module:
    config = hf.FalconConfig(**COMMON, max_position_embeddings=64, alibi=False)
    return hf.FalconForCausalLM(config)


def bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**ENCODER, num_labels=3))


def roberta() -> nn.Module:
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**ENCODER, num_labels=3))


def deberta_v2() -> nn.Module:
    config = hf.DebertaV2Config(
        **ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=16
    )
    return hf.DebertaV2ForMaskedLM(config)


def modernbert() -> nn.Module:
    config = hf.ModernBertConfig(
        **COMMON, intermediate_size=64, max_position_embeddings=64, local_attention=16,
        cls_token_id=BOS, sep_token_id=EOS, num_labels=3,
    )  # fmt: skip
    return hf.ModernBertForSequenceClassification(config)


def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCAB, d_model=DIM, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
        pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(llama, "causal", "mlp.up_proj", "LlamaDecoderLayer"),
    "mistral": Architecture(mistral, "causal", "mlp.up_proj", "MistralDecoderLayer"),
    "qwen2": Architecture(qwen2, "causal", "self_attn.q_proj", "Qwen2DecoderLayer"),
    "qwen3": Architecture(qwen3, "causal", "mlp.down_proj", "Qwen3DecoderLayer"),
    "gemma2": Architecture(gemma2, "causal", "mlp.up_proj", "Gemma2DecoderLayer"),
    "gemma3": Architecture(gemma3, "causal", "mlp.up_proj", "Gemma3DecoderLayer"),
    "phi3": Architecture(phi3, "causal", "mlp.gate_up_proj", "Phi3DecoderLayer"),
    "gpt2": Architecture(gpt2, "causal", "mlp.c_fc", "GPT2Block"),
    "gpt_neox": Architecture(gpt_neox, "causal", "mlp.dense_h_to_4h", "GPTNeoXLayer"),
    "opt": Architecture(opt, "causal", "fc1", "OPTDecoderLayer"),
    "falcon": Architecture(falcon, "causal", "mlp.dense_h_to_4h", "FalconDecoderLayer"),
    "bert": Architecture(bert, "encoder", "intermediate.dense", "BertLayer"),
    "roberta": Architecture(roberta, "encoder", "intermediate.dense", "RobertaLayer"),
    "deberta_v2": Architecture(deberta_v2, "encoder", "intermediate.dense", "DebertaV2Layer"),
    "modernbert": Architecture(modernbert, "encoder", "mlp.Wi", "ModernBertEncoderLayer"),
    "t5": Architecture(t5, "seq2seq", "layer.1.DenseReluDense.wi", "T5Block"),
}
FEW = ("llama", "gpt2", "modernbert", "t5")
"""One of each family, for checks that need not run on all."""
CAUSAL = tuple(name for name, arch in ARCHITECTURES.items() if arch.kind == "causal")


@cache
def _original(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = ARCHITECTURES[name].build().eval()
        # Larger weights than the usual 0.02: an edit of a prompt token must be visible in logits.
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.mul_(4.0)
    return model


def build(name: str) -> nn.Module:
    """Return a fresh copy of a tiny model, in eval mode; always the same weights."""
    return copy.deepcopy(_original(name))


def kind_of(model: nn.Module) -> str:
    """Return `causal`, `encoder` or `seq2seq` of a built model, also inside PEFT."""
    kinds = {a.blocks: a.kind for a in ARCHITECTURES.values()}
    return next(kinds[type(m).__name__] for m in model.modules() if type(m).__name__ in kinds)


def rows(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Tensor]:
    """Return token ids of single rows, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCAB, (n,), generator=generator) for n in lengths]


def pad(items: list[Tensor], side: str = "right", value: int = PAD) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask of rows padded on one side."""
    width = max(len(item) for item in items)
    ids = torch.full((len(items), width), value)
    mask = torch.zeros(len(items), width, dtype=torch.long)
    for i, item in enumerate(items):
        where = slice(0, len(item)) if side == "right" else slice(width - len(item), width)
        ids[i, where], mask[i, where] = item, 1
    return ids, mask


def batch(side: str = "right", lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask of a padded batch."""
    return pad(rows(lengths), side)


def position_ids(mask: Tensor) -> Tensor:
    """Return positions counted over real tokens."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def forward(model: nn.Module, ids: Tensor, mask: Tensor | None = None, **extra: Any) -> Tensor:
    """Return the logits of a model of any kind; gradients as the caller has them."""
    mask = torch.ones_like(ids) if mask is None else mask
    if kind_of(model) == "seq2seq" and "labels" not in extra:
        extra.setdefault("decoder_input_ids", torch.full((ids.shape[0], 3), 5))
    return model(input_ids=ids, attention_mask=mask, **extra).logits


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a tiny model (of the encoder, for T5), without asking reftune."""
    names = {arch.blocks for arch in ARCHITECTURES.values()}
    found = [m for m in model.modules() if type(m).__name__ in names]
    return [m for m in found if not getattr(m, "is_decoder", False) or kind_of(model) == "causal"]
