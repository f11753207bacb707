"""Prompts to token rows, rows to padded batches, and the checks that come before a forward pass."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from reftune.errors import DataError, ModelError

if TYPE_CHECKING:
    import torch
    from jaxtyping import Int
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or chat messages with `role` and `content`."""

Marks = Sequence[str | Sequence[int]]
"""Pieces of a prompt for the position rule `mask`: texts, or (start, end) places of characters."""


@dataclass(frozen=True)
class Row:
    """A prompt in tokens.

    Attributes:
        ids: Token ids with special tokens.
        subject: Place of the last token of its subject, or None.
        mask: Which tokens are marked for the rule `mask`, or None.
        fixed: Tokens at its beginning that are never cut.
        cut: Tokens that were cut off behind those.
    """

    ids: list[int]
    subject: int | None = None
    mask: tuple[bool, ...] | None = None
    fixed: int = 0
    cut: int = 0

    def fitted(self, room: int) -> Row:
        """Return the row cut from the left to `room` tokens, as in training.

        A subject that is cut off moves to the first token that is left.
        """
        cut = len(self.ids) - max(room, self.fixed + 1)
        if cut <= 0:
            return self
        end = self.fixed + cut
        subject, mask = self.subject, self.mask
        if subject is not None and subject >= self.fixed:
            subject = max(self.fixed, subject - cut)
        if mask is not None:
            mask = mask[: self.fixed] + mask[end:]
        return replace(
            self,
            ids=self.ids[: self.fixed] + self.ids[end:],
            subject=subject,
            mask=mask,
            cut=self.cut + cut,
        )


@dataclass(frozen=True)
class Batch:
    """Rows padded to one width.

    Attributes:
        input_ids: Token ids.
        attention_mask: 1 for tokens, 0 for padding.
    """

    input_ids: Int[Tensor, "rows width"]
    attention_mask: Int[Tensor, "rows width"]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    seq2seq: bool = False,
    subjects: Sequence[str | None] | None = None,
    marks: Sequence[Marks | None] | None = None,
) -> list[Row]:
    """Return the tokens of each prompt, with the special tokens training put before it.

    Texts get the tokenizer's leading special tokens (BOS); an encoder-decoder's also the trailing
    ones. Chats are rendered by the chat template with its generation prompt; a closing assistant
    message is left open, so that the model continues it.

    Args:
        tokenizer: The tokenizer of the base model.
        prompts: Texts or chats.
        seq2seq: Whether the prompts go to an encoder.
        subjects: Text of each prompt's subject, for the position rule `subject_last`.
        marks: Marked pieces of each prompt, for the position rule `mask`.

    Raises:
        DataError: If a prompt is empty, a chat cannot be rendered, a subject or marked piece is not
            there, or the columns differ in length.
    """
    from reftune.tasks.texts import fixed_len, frame, marked_tokens, subject_place

    check_lengths(len(prompts), subjects=subjects, marks=marks)
    around, rows = frame(tokenizer), []
    tail = around.tail if seq2seq else ()
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            lead, text = around.lead, prompt
        else:
            lead, text = (), _render(tokenizer, prompt, index)
        _check_text(text, index)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
        name, place, mask = f"Prompt {index}", None, None
        if subjects is not None and subjects[index] is not None:
            place = len(lead) + subject_place(tokenizer, text, subjects[index], name)
        if marks is not None and marks[index] is not None:
            own = marked_tokens(tokenizer, text, marks[index], name)
            mask = (*[False] * len(lead), *own, *[False] * len(tail))
        fixed = fixed_len(tokenizer, lead, ids)
        rows.append(Row([*lead, *ids, *tail], place, mask, fixed))
        if not rows[-1].ids:
            raise DataError(
                f"Prompt {index} is empty and the tokenizer adds no BOS token.",
                "Give the model at least one token to start from.",
            )
    return rows


def _check_text(text: str, index: int) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        bad = text[error.start].encode("unicode_escape").decode()
        raise DataError(
            f"Prompt {index} is no UTF-8 text: character {error.start + 1} is {bad}.",
            "Save it as UTF-8, or take that character out.",
        ) from None


def check_lengths(num_prompts: int, **columns: Sequence[Any] | None) -> None:
    """Check that every column given has one entry a prompt.

    Raises:
        DataError: If one has not.
    """
    for name, values in columns.items():
        if values is not None and len(values) != num_prompts:
            raise DataError(
                f"{name} has {len(values)} entries for {num_prompts} prompts.",
                "Give one a prompt; None where there is nothing to say.",
            )


def check_context(
    model: nn.Module, lengths: Sequence[int], reserve: int = 1, what: str = "Prompt {index}"
) -> int | None:
    """Return the length of the model's context after checking that every row fits.

    Args:
        model: The model.
        lengths: Tokens of each prompt.
        reserve: Tokens that must still fit behind a prompt.
        what: How a message calls row `{index}`.

    Raises:
        DataError: If a prompt leaves no room for `reserve` tokens.
    """
    limit = context_len(model)
    if limit is None:
        return None
    index = max(range(len(lengths)), key=lengths.__getitem__, default=None)
    if index is not None and lengths[index] + reserve > limit:
        more = f" and the answer needs at least {reserve}" if reserve else ""
        raise DataError(
            f"{what.format(index=index)} has {lengths[index]} tokens; the model's context is "
            f"{limit} tokens{more}.",
            "Shorten the prompt, or use a model with a longer context.",
        )
    return limit


def fit(
    model: nn.Module, rows: Sequence[Row], max_new_tokens: int, what: str = "prompts"
) -> list[Row]:
    """Return rows that leave room for an answer, long ones cut from the left as in training.

    Args:
        model: The model.
        rows: Prompts in tokens.
        max_new_tokens: Longest answer; at most half of the context is kept free for it.
        what: What a warning calls the rows.
    """
    limit = context_len(model)
    if limit is None:
        return list(rows)
    reserve = 0 if is_seq2seq(model) else min(max_new_tokens, limit // 2)
    fitted = [row.fitted(limit - reserve) for row in rows]
    count = sum(row.cut > 0 for row in fitted)
    if count:
        log.warning(
            "%d of %d %s are longer than %d tokens (context %d, %d for the answer): cut from the "
            "left",
            *(count, len(rows), what, limit - reserve, limit, reserve),
        )
    return fitted


def context_len(model: nn.Module) -> int | None:
    """Return how many tokens the model can see, or None if it sets no limit (T5, Bloom, Mamba)."""
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    # RoBERTa and its kin count positions from behind the id of the padding.
    shifted = "roberta" in str(getattr(config, "model_type", ""))
    return limit - (config.pad_token_id or 0) - 1 if shifted else limit


def pad(
    rows: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device | str | None = None,
    side: str = "left",
) -> Batch:
    """Pad rows to one width, on the left for generation.

    >>> pad([[5, 6], [7]], 0).input_ids.tolist()
    [[5, 6], [0, 7]]
    """
    import torch

    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place] = torch.tensor(row, dtype=torch.long)
        mask[index, place] = 1
    return Batch(ids.to(device), mask.to(device))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id to pad with; masked everywhere, so that any id will do."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def device_of(model: nn.Module) -> torch.device:
    """Return the device the model expects token ids on."""
    try:
        return model.get_input_embeddings().weight.device
    except (AttributeError, NotImplementedError):
        return next(model.parameters()).device


def is_seq2seq(model: nn.Module) -> bool:
    """Return whether the model has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def require_generation(model: nn.Module) -> None:
    """Check that the model can produce text.

    Raises:
        ModelError: If it has no language-model head.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    can = base.can_generate() if hasattr(base, "can_generate") else hasattr(base, "generate")
    if not can:
        raise ModelError(
            f"{type(base).__name__} cannot generate text.",
            "Load the model with its language-model head (model.head: causal or seq2seq).",
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch a model to evaluation without gradients; afterwards every module is as it was.

    `no_grad`, not `inference_mode`: what an adapter caches here may later meet autograd.
    """
    import torch

    modes = [(module, module.training) for module in model.modules()]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if any(mode for _, mode in modes):
            model.train(was_training)
            for module, mode in modes:
                module.training = mode


def accepts(model: nn.Module, argument: str) -> bool:
    """Return whether the base model's forward has an argument of this name."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in inspect.signature(base.forward).parameters


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], index: int) -> str:
    """Render a chat up to the point where the model goes on."""
    from reftune.tasks.texts import render

    chat = [dict(message) for message in messages]
    faulty = [m for m in chat if "role" not in m or "content" not in m]
    if not chat or faulty:
        raise DataError(
            f"Prompt {index} is no chat: {faulty[0] if faulty else 'it has no messages'}.",
            'Each message needs "role" and "content".',
        )
    if chat[-1]["role"] != "assistant" or not tokenizer.chat_template:
        return render(tokenizer, chat, str(index), True)
    return tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=True)
