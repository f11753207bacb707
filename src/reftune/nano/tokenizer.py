"""The tokenizer of the embedded world: byte-level BPE on the generator's own text.

Digits are always single, so a number of n digits costs n tokens and a sum can be learnt digit by
digit. All 256 bytes are in the alphabet, so no text is unknown. A beginning-of-text token stands
before every document; the tokenizer adds it (`tokenizer(prompt)` is ready for the model), and the
chat template contains it (tokenise its output with `add_special_tokens=False`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 3072
PAD, BOS, EOS, USER, ASSISTANT, MASK = "<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<mask>"
SPECIAL: tuple[str, ...] = (PAD, BOS, EOS, USER, ASSISTANT, MASK)
"""Special tokens; the place in this tuple is the id. `<mask>` serves the encoder only."""

PAD_ID, BOS_ID, EOS_ID, USER_ID, ASSISTANT_ID, MASK_ID = range(len(SPECIAL))

TRAIN_SHARES: dict[str, float] = {
    "sums": 0.30, "facts": 0.18, "passages": 0.16, "guided": 0.06, "logs": 0.20, "stories": 0.10,
}  # fmt: skip
"""Share of characters each sub-world has in the tokenizer's training text (logs: raised)."""

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}"
    "{{- '<assistant>' }}"
    "{%- generation %}{{- ' ' + (message['content'] | trim) + eos_token }}{%- endgeneration %}"
    "{%- elif message['role'] == 'user' %}"
    "{{- '<user> ' + (message['content'] | trim) }}"
    "{%- elif message['role'] == 'system' %}"
    "{{- ' ' + (message['content'] | trim) }}"
    "{%- else %}"
    "{{- raise_exception('Unknown role ' + message['role'] + ': use system, user, assistant.') }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"
)


def training_text(characters: int = 4_000_000, seed: int = 0) -> Iterator[str]:
    """Yield documents of the training split, mixed by `TRAIN_SHARES`, about `characters` in all."""
    from reftune.nano.mix import draw

    rng = random.Random(f"tokenizer-{seed}")
    for world, share in TRAIN_SHARES.items():
        left = share * characters
        while left > 0:
            progress = rng.random()
            # Pages are left out: each of their signs is to stay a token of its own.
            item = draw(world, rng, progress=0.0 if world == "stories" else progress)
            text = (
                f"Question: {item.question} Answer: {item.answer}" if item.question else item.answer
            )
            left -= len(text)
            yield text


def train_tokenizer(
    texts: Iterator[str] | None = None, vocabulary: int = VOCABULARY, max_len: int = 1024
) -> PreTrainedTokenizerFast:
    """Train the tokenizer and wrap it for transformers.

    Args:
        texts: Training documents; None takes `training_text()`.
        vocabulary: Number of tokens, special ones included.
        max_len: Longest input the model takes, stored as `model_max_length`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    core.train_from_iterator(training_text() if texts is None else texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        mask_token=MASK,
        additional_special_tokens=[USER, ASSISTANT],
        padding_side="left",
        model_max_length=max_len,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    )


def load_tokenizer(folder: Path | None = None) -> PreTrainedTokenizerFast:
    """Load the packaged tokenizer, or the one in `folder`."""
    from transformers import AutoTokenizer

    from reftune.nano import WEIGHTS

    return AutoTokenizer.from_pretrained(folder or WEIGHTS / "nano")
