"""A lean forward pass over a Llama model's own weights, for training on one CPU thread.

It computes what transformers computes (a test compares both), about 1.6 times as fast: projections
that read the same input are one product, attention is two batched products (the fused CPU kernel is
slower than those on rows this short), the vocabulary layer runs on scored places only.
No dropout, no cache, no scaled RoPE, no attention bias: the embedded models have none of these.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from reftune.nano.packing import Batch


def logits(
    model: PreTrainedModel, batch: Batch, dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "scored vocab"]:
    """Return logits at the scored places, in `dtype`.

    Args:
        model: The model in training, fp32 weights. Llama takes the lean path, others their own.
        batch: Packed rows; documents in a row do not see each other.
        dtype: Precision of products and activations (the residual stream stays fp32).
    """
    if isinstance(model, LlamaForCausalLM):
        return _llama(model, batch, dtype)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        hidden = model.base_model(
            input_ids=batch.ids, attention_mask=batch.mask(), position_ids=batch.position_ids
        ).last_hidden_state
        # RoBERTa's head is more than its output embedding.
        head = getattr(model, "lm_head", None) or model.get_output_embeddings()
        return head(hidden.flatten(0, 1)[batch.scored])


def _norm(
    x: Float[Tensor, "*tokens dim"], module: torch.nn.Module, dtype: torch.dtype
) -> Float[Tensor, "*tokens dim"]:
    """RMS norm in fp32, result in `dtype`."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return (x * scale * module.weight).to(dtype)


def _rotate(
    x: Float[Tensor, "rows length heads dim"],
    cosine: Float[Tensor, " #rows length 1 dim"],
    sine: Float[Tensor, " #rows length 1 dim"],
) -> Float[Tensor, "rows length heads dim"]:
    left, right = x.chunk(2, -1)
    return x * cosine + torch.cat([-right, left], -1) * sine


def _llama(
    model: LlamaForCausalLM, batch: Batch, dtype: torch.dtype
) -> Float[Tensor, "scored vocab"]:
    config = model.config
    rows, length = batch.ids.shape
    heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    embedding = model.model.embed_tokens.weight
    x = F.embedding(batch.ids, embedding)
    cosine, sine = model.model.rotary_emb(x, batch.position_ids)
    cosine, sine = cosine.to(dtype)[:, :, None], sine.to(dtype)[:, :, None]
    bias = torch.zeros(rows, 1, 1, length, length, dtype=dtype)
    bias.masked_fill_(~batch.mask()[:, None], float("-inf"))
    for layer in model.model.layers:
        a, mlp = layer.self_attn, layer.mlp
        h = _norm(x, layer.input_layernorm, dtype)
        weight = torch.cat([a.q_proj.weight * dim**-0.5, a.k_proj.weight, a.v_proj.weight])
        qkv = F.linear(h, weight.to(dtype)).view(rows, length, heads + 2 * groups, dim)
        qk = _rotate(qkv[:, :, : heads + groups], cosine, sine)
        # Query heads of one group become extra rows of its product: keys are never repeated.
        q = qk[:, :, :heads].reshape(rows, length, groups, heads // groups, dim)
        q = q.permute(0, 2, 3, 1, 4).reshape(rows, groups, -1, dim)
        k = qk[:, :, heads:].permute(0, 2, 3, 1)
        v = qkv[:, :, heads + groups :].transpose(1, 2)
        scores = (q @ k).view(rows, groups, heads // groups, length, length) + bias
        mixed = scores.softmax(-1).view(rows, groups, -1, length) @ v
        mixed = mixed.view(rows, heads, length, dim).transpose(1, 2).reshape(rows, length, -1)
        x = x + F.linear(mixed, a.o_proj.weight.to(dtype))
        h = _norm(x, layer.post_attention_layernorm, dtype)
        both = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).to(dtype)
        gate, up = F.linear(h, both).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, mlp.down_proj.weight.to(dtype))
    x = x.flatten(0, 1)[batch.scored]
    return F.linear(_norm(x, model.model.norm, dtype), embedding.to(dtype))
