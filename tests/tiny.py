"""Tiny models and tokenizers made in memory, for all tests. No network, no files.

>>> model, tokenizer = tiny_llama(), tiny_tokenizer()
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz \n.,?!:=+-*/()'#$\"_%;<>|"
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]
VOCAB = len(SPECIALS) + len(CHARACTERS)  # 64

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<' + m['role'] + '> ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def tiny_tokenizer(bos: bool = True, pad: bool = True, chat: bool = True) -> Any:
    """Return a character tokenizer of 64 ids (lower case): pad 0, bos 1, eos 2, unk 3.

    Args:
        bos: Whether a plain text gets a BOS in front.
        pad: Whether there is a pad token; without it `pad_token_id` is None.
        chat: Whether there is a chat template (`<role> content`, assistant turns end with EOS).
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([*SPECIALS, *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    if bos:
        core.post_processor = TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>" if pad else None,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama(
    dim: int = 32, layers: int = 2, vocab: int = VOCAB, seed: int = 0, **config: Any
) -> Any:
    """Return a random `LlamaForCausalLM` in fp32, in eval mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    values: dict[str, Any] = {
        "hidden_size": dim,
        "intermediate_size": 2 * dim,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**values, **config})).eval()


def tiny_folder(path: Path, **model: Any) -> Path:
    """Save a tiny Llama and its tokenizer as a model folder, for recipes that name a path."""
    tiny_llama(**model).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
