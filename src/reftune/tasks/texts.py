"""Prompt and target text of an example, the special tokens around them, and places in a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reftune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftune.tasks.base import Example


class EmptyTargetError(DataError):
    """A row has nothing to learn."""


@dataclass(frozen=True)
class Frame:
    """Special tokens a tokenizer puts around a plain text."""

    lead: tuple[int, ...]
    tail: tuple[int, ...]


def frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """Learn from the tokenizer itself which special tokens surround a plain text.

    Llama: lead (bos,), tail (); GPT-2 and Qwen: neither; BERT: (cls,), (sep,); T5: (), (eos,).
    """
    whole = list(tokenizer("a")["input_ids"])
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return Frame(tuple(whole[:start]), tuple(whole[start + len(plain) :]))
    return Frame((), ())


def texts(
    example: Example, tokenizer: PreTrainedTokenizerBase, around: Frame
) -> tuple[str, str, tuple[int, ...]]:
    """Return prompt text, target text and the leading special tokens still to be added.

    Chat rows: the prompt is the template's rendering of all messages before the last assistant
    message, with its generation prompt; the target is what the full rendering adds to that.
    """
    if example.messages is None:
        if not example.target.strip():
            raise empty_target(example.id, "an empty target")
        return example.prompt, example.target, around.lead
    messages = [dict(message) for message in example.messages]
    last = max((i for i, m in enumerate(messages) if m.get("role") == "assistant"), default=None)
    if last is None or not str(messages[last].get("content") or "").strip():
        raise empty_target(example.id, "no assistant message with content")
    prompt = render(tokenizer, messages[:last], example.id, True)
    full = render(tokenizer, messages[: last + 1], example.id, False)
    if not full.startswith(prompt):
        raise DataError(
            f'Row "{example.id}": the chat template renders the conversation with its answer '
            f"differently from the prompt alone ({_first_difference(prompt, full)}), so that "
            "prompt and target cannot be told apart.",
            "Use another chat template, or render prompt and completion fields yourself.",
        )
    target = full[len(prompt) :]
    eos = tokenizer.eos_token
    if eos and target.rstrip().endswith(eos):
        target = (
            target.rstrip()
        )  # what a template writes after the end of a turn is never asked for
    return prompt, target, ()


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    row: str,
    ask: bool,
) -> str:
    """Render messages with the tokenizer's chat template.

    Args:
        tokenizer: The tokenizer.
        messages: Role and content of each message.
        row: Id of the row, for messages.
        ask: Whether to append the generation prompt.

    Raises:
        DataError: If there is no template, or it refuses the messages.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f'Row "{row}" has chat messages but the tokenizer has no chat template.',
            "Use an instruction-tuned model, set tokenizer.chat_template (a Jinja file "
            "chat_template.jinja in the model folder), or give prompt and completion fields.",
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # templates raise what they like
        raise DataError(
            f'Row "{row}": the chat template refuses the messages ({error}).',
            "Check roles and their order.",
        ) from error


def fixed_len(tokenizer: PreTrainedTokenizerBase, lead: Sequence[int], ids: Sequence[int]) -> int:
    """Return how many tokens at the beginning of a row are never cut: the lead, or a chat's BOS.

    Args:
        tokenizer: The tokenizer.
        lead: Special tokens that stand before the text.
        ids: The tokens of the text.
    """
    bos = tokenizer.bos_token_id
    return len(lead) or int(bos is not None and list(ids[:1]) == [bos])


def subject_place(tokenizer: PreTrainedTokenizerBase, text: str, subject: str, row: str) -> int:
    """Return the place of the token that ends the last mention of a subject in a text.

    Args:
        tokenizer: The tokenizer.
        text: A prompt.
        subject: The text of its subject.
        row: What a message calls the prompt.

    Raises:
        DataError: If the text does not mention it.
    """
    end = text.rfind(subject) + len(subject)
    if not subject or end < len(subject):
        raise DataError(
            f'{row}: its subject "{subject}" is not in the prompt.', "Mend the subject field."
        )
    # The token that covers the last character; tokenising up to it could split differently.
    covering = [i for i, (a, b) in enumerate(_offsets(tokenizer, text)) if a < end <= b]
    if not covering:
        raise DataError(f'{row}: no token ends the subject "{subject}".', "Change it.")
    return covering[0]


def check_kept(example: Example, tokenizer: PreTrainedTokenizerBase, text: str, cut: int) -> None:
    """Check that cutting a prompt from the left leaves the text `meta["keep"]` and what follows.

    Args:
        example: The row; without `keep` in its `meta` all may be cut.
        tokenizer: The tokenizer.
        text: Its prompt.
        cut: Tokens up to which the text is cut.

    Raises:
        DataError: If it would be cut into.
    """
    keep = example.meta.get("keep")
    start = text.rfind(keep) if keep and cut else -1
    if start < 0:
        return
    ends = [end for _, end in _offsets(tokenizer, text)[:cut]]
    if ends and max(ends) > start:
        raise DataError(
            f'Row "{example.id}" is cut to {len(_offsets(tokenizer, text)) - cut} prompt tokens, '
            f'which would cut into "{keep[:60]}", not only into what stands before it.',
            "Set a larger max_len.",
        )


def marked_tokens(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    marks: Sequence[str | Sequence[int]],
    row: str,
) -> list[bool]:
    """Return for each token of a text whether it touches one of the marked pieces.

    Args:
        tokenizer: The tokenizer.
        text: A prompt.
        marks: Texts, marked wherever they occur, and (start, end) character places.
        row: What a message calls the prompt.

    Raises:
        DataError: If a marked text does not occur, or a place is outside the text.
    """
    spans: list[tuple[int, int]] = []
    for mark in marks:
        spans += _mentions(text, mark, row) if isinstance(mark, str) else [_span(text, mark, row)]
    offsets = _offsets(tokenizer, text)
    return [any(a < end and start < b for start, end in spans) for a, b in offsets]


def _mentions(text: str, mark: str, row: str) -> list[tuple[int, int]]:
    starts = [i for i in range(len(text)) if mark and text.startswith(mark, i)]
    if not starts:
        raise DataError(f'{row}: the marked text "{mark}" is not in the prompt.', "Mend its mask.")
    return [(start, start + len(mark)) for start in starts]


def _span(text: str, mark: Sequence[int], row: str) -> tuple[int, int]:
    start, end = mark
    if not 0 <= start < end <= len(text):
        raise DataError(
            f"{row}: the mask [{start}, {end}] is no piece of a prompt of {len(text)} characters.",
            "Count characters from 0; the end is not included.",
        )
    return start, end


def _offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return made["offset_mapping"]


def empty_target(row: str, has: str) -> EmptyTargetError:
    """Return the error for a row with nothing to learn; `has` says what was found instead."""
    return EmptyTargetError(f'Row "{row}" has {has}.', "Fill it in or drop the row.")


def _first_difference(prompt: str, full: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, full)) if a != b), len(full))
    return f"from character {at}: {prompt[at : at + 20]!r} against {full[at : at + 20]!r}"
