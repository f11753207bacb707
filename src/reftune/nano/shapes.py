"""Shapes of the embedded models: configuration classes of transformers, no code of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reftune.nano.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCABULARY

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CONTEXT = 1024


def build_config(name: str = "nano") -> PretrainedConfig:
    """Return the configuration of an embedded model.

    Args:
        name: `nano` (Llama, 3.7 M parameters), `nano-gpt2` (GPT-2, 4.4 M: learnt positions, biases,
            no grouped heads) or `nano-encoder` (RoBERTa, 1.5 M, for the log studies).
    """
    from transformers import GPT2Config, LlamaConfig, RobertaConfig

    tokens = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    if name == "nano":
        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=512,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            **tokens,
        )
    if name == "nano-gpt2":
        return GPT2Config(
            vocab_size=VOCABULARY, n_embd=192, n_layer=8, n_head=6, n_positions=CONTEXT,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **tokens,
        )  # fmt: skip
    if name == "nano-encoder":
        # Two positions more: RoBERTa counts positions from pad_token_id + 1.
        return RobertaConfig(
            vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=5, num_attention_heads=4,
            intermediate_size=512, max_position_embeddings=256 + 2, type_vocab_size=1,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **tokens,
        )  # fmt: skip
    raise ValueError(f"No shape is called {name!r}. Known: nano, nano-gpt2, nano-encoder.")


def build_model(name: str = "nano", seed: int = 0) -> PreTrainedModel:
    """Return a freshly initialised model (standard deviation 0.02, fp32).

    Args:
        name: See `build_config`.
        seed: Seed of the initial weights; the global generator is left as it was.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    kind = AutoModelForMaskedLM if name == "nano-encoder" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind.from_config(build_config(name), dtype=torch.float32)
    return model
