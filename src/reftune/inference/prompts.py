"""Prompts to token rows, rows to padded batches, and the checks that come before a forward pass."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reftune.errors import AdapterError, DataError, ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or chat messages with `role` and `content`."""

BASE = "__base__"
"""Adapter name of a row that runs on the base model alone."""


@dataclass(frozen=True)
class Row:
    """A prompt in tokens.

    Attributes:
        ids: Token ids with special tokens.
        subject: Place of the last token of its subject, or None.
    """

    ids: list[int]
    subject: int | None = None


@dataclass(frozen=True)
class Batch:
    """Rows padded to one width.

    Attributes:
        input_ids: Token ids `[rows, width]`.
        attention_mask: 1 for tokens, 0 for padding, `[rows, width]`.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    seq2seq: bool = False,
    subjects: Sequence[str | None] | None = None,
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

    Raises:
        DataError: If a prompt is empty, a chat cannot be rendered, or a subject is not there.
    """
    from reftune.tasks.texts import frame

    around, rows = frame(tokenizer), []
    tail = around.tail if seq2seq else ()
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            lead, text = around.lead, prompt
        else:
            lead, text = (), _render(tokenizer, prompt, index)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
        subject = subjects[index] if subjects is not None else None
        place = None
        if subject is not None:
            place = len(lead) + subject_place(tokenizer, text, subject, index)
        rows.append(Row([*lead, *ids, *tail], place))
        if not rows[-1].ids:
            raise DataError(
                f"Prompt {index} is empty and the tokenizer adds no BOS token.",
                "Give the model at least one token to start from.",
            )
    return rows


def subject_place(
    tokenizer: PreTrainedTokenizerBase, text: str, subject: str, index: int = 0
) -> int:
    """Return the place of the token that ends the last mention of a subject in a text.

    Raises:
        DataError: If the text does not mention it.
    """
    end = text.rfind(subject) + len(subject)
    if not subject or end < len(subject):
        raise DataError(
            f'Prompt {index}: its subject "{subject}" is not in the text.', "Mend the subject."
        )
    # The token that covers the last character; tokenising up to it could split differently.
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    covering = [place for place, (start, stop) in enumerate(spans) if start < end <= stop]
    if not covering:
        raise DataError(f'Prompt {index}: no token ends the subject "{subject}".', "Change it.")
    return covering[0]


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


def context_len(model: nn.Module) -> int | None:
    """Return how many tokens the model can see, or None if it sets no limit (T5, Bloom, Mamba)."""
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


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


def adapters_of(model: nn.Module) -> list[str]:
    """Return the names of all adapters on a model, ours and PEFT's."""
    from reftune.model import adapter_names

    return sorted({*(getattr(model, "peft_config", None) or {}), *adapter_names(model)})


def check_adapters(
    model: nn.Module, names: Sequence[str] | None, num_prompts: int
) -> list[str] | None:
    """Return the adapter of each row, or None where all rows use the active ones.

    Raises:
        AdapterError: If the model has no such adapter or there is not one name a prompt.
    """
    if names is None:
        return None
    if isinstance(names, str) or len(names) != num_prompts:
        given = f'"{names}"' if isinstance(names, str) else f"{len(names)} names"
        raise AdapterError(
            f"adapter_names has {given} for {num_prompts} prompts.",
            f'Give one name a prompt; "{BASE}" is the base model.',
        )
    known = adapters_of(model)
    missing = sorted(set(names) - set(known) - {BASE})
    if missing:
        raise AdapterError(
            f"The model has no adapter {', '.join(map(repr, missing))}.",
            f"Attached: {', '.join(known) or 'none'}; the base model is {BASE!r}.",
        )
    if not known:
        return None  # a plain model is the base for every row
    return list(names)


@contextlib.contextmanager
def row_adapters(model: nn.Module, names: Sequence[str | None]) -> Iterator[dict[str, Any]]:
    """Give each row of a call its adapter; yields the keyword arguments the call must pass."""
    if not names or names[0] is None:
        yield {}
    elif hasattr(model, "get_base_model"):
        yield {"adapter_names": list(names)}
    else:
        from reftune.model import mix

        with mix(model, [str(name) for name in names]):
            yield {}


def row_edits(
    model: nn.Module,
    subjects: Sequence[int | None],
    subspaces: Sequence[Sequence[int] | None],
) -> dict[str, Any]:
    """Return what each row tells its interventions, as keyword arguments of a model call.

    Empty for models without interventions, which would not understand them.

    Raises:
        DataError: If some rows have a subject and others none.
    """
    import torch

    from reftune.model import adapter_names

    extra: dict[str, Any] = {}
    if any(place is not None for place in subjects):
        if any(place is None for place in subjects):
            raise DataError("Some prompts have a subject, others none.", "Give all a subject.")
        extra["subject_positions"] = torch.tensor(subjects, device=device_of(model))
    if any(dims is not None for dims in subspaces):
        extra["subspaces"] = [None if dims is None else tuple(dims) for dims in subspaces]
    return extra if adapter_names(model) else {}


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
