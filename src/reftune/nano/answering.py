"""Batched answers of an embedded model, for gates and probes: left padding, cache, one thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from reftune.nano.item import Item
from reftune.nano.mix import prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def prompt_ids(
    tokenizer: PreTrainedTokenizerFast, items: Sequence[Item], chat: bool = False
) -> list[list[int]]:
    """Return the token ids of each item's prompt, natively or through the chat template."""
    if not chat:
        return tokenizer([prompt_text(item) for item in items])["input_ids"]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": item.question}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for item in items
    ]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[Item],
    chat: bool = False,
    max_new: int = 64,
    temperature: float = 0.0,
    batch: int = 128,
) -> list[str]:
    """Return the model's answer to each item, without surrounding spaces.

    Args:
        model: A causal model.
        tokenizer: Its tokenizer.
        items: Questions; a plain statement has no prompt and cannot be asked.
        chat: Ask through the chat template.
        max_new: Most tokens of an answer; an answer that has not ended there is cut.
        temperature: 0 for greedy, else sampling with torch's global generator.
        batch: Prompts at once; they are sorted by length first.
    """
    prompts = prompt_ids(tokenizer, items, chat)
    order = sorted(range(len(items)), key=lambda i: len(prompts[i]))
    texts = [""] * len(items)
    # `top_k=0`: transformers would otherwise keep 50 tokens only.
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        padded = tokenizer.pad(
            {"input_ids": [prompts[i] for i in chosen]}, padding_side="left", return_tensors="pt"
        )
        out = model.generate(
            **padded,
            **(sampling or {"do_sample": False}),
            max_new_tokens=max_new,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        fresh = out[:, padded["input_ids"].shape[1] :]
        for i, text in zip(
            chosen, tokenizer.batch_decode(fresh, skip_special_tokens=True), strict=True
        ):
            texts[i] = text.strip()
    return texts
