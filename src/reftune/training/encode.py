"""Examples to token rows: what is prompt, what is learned, what is cut.

Prompt and target are tokenised separately and concatenated, so that no token straddles the border
and training sees exactly the prompt tokens that inference will see.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from reftune.errors import DataError
from reftune.tasks.texts import (
    EmptyTargetError,
    Frame,
    check_kept,
    empty_target,
    fixed_len,
    frame,
    marked_tokens,
    subject_place,
    texts,
)
from reftune.training.guides import encode_guides

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftune.tasks.base import Example

log = logging.getLogger(__name__)

IGNORE = -100
EMPTY_ALLOWED = 0.05
"""Share of rows without a target that is skipped with a warning; more is an error."""

Kind = Literal["causal", "classification", "seq2seq"]


Told = tuple[int | None, list[bool] | None]
"""Place of the subject's last token, and which tokens are marked, among the prompt's tokens."""


class TooLongError(DataError):
    """A target does not fit. `needed` is the max_len that would do."""

    needed: int = 0


@dataclass
class Encoded:
    """One row of tokens.

    Attributes:
        input_ids: T token ids, no padding.
        labels: T labels, unshifted: `labels[t] == input_ids[t]` or −100.
        prompt_len: Tokens before the first target token (with BOS).
        id: Name of the row, for messages.
        class_label: Class or value of a classification row.
        decoder_labels: Target ids of an encoder-decoder row.
        select: Subspace dimensions this row trains.
        intervention_mask: Explicit places to edit, T booleans, for the position rule `mask`.
        subject: Place of the last token of the subject, for the rule `subject_last`.
        token_types: Segment of each token, for models that were trained with segments.
        guides: Tokens of other prompts before the same target, by name.
        weights: A number for each label (0 elsewhere), T of them, for objectives that weigh tokens.
        cut: Prompt tokens that were cut off, of the prompt or guide that lost the most.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_len: int
    id: str = ""
    class_label: int | float | None = None
    decoder_labels: list[int] | None = None
    select: tuple[int, ...] | None = None
    intervention_mask: list[bool] | None = None
    subject: int | None = None
    token_types: list[int] | None = None
    guides: dict[str, list[int]] | None = None
    weights: list[float] | None = None
    cut: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def learned(self) -> int:
        """Tokens with a label."""
        labels = self.labels if self.decoder_labels is None else self.decoder_labels
        return sum(label != IGNORE for label in labels)


@dataclass
class Rows:
    """Encoded rows of one split with what happened to them; indexable, with a length.

    Attributes:
        rows: The rows.
        skipped: Ids of rows that had no target.
        cut: Number of rows whose prompt was cut.
    """

    rows: list[Encoded]
    skipped: list[str] = field(default_factory=list)
    cut: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded:
        return self.rows[index]

    def digest(self) -> str:
        """Return a hash of what is trained on: tokens, labels, and where edits and dims are."""
        hashed = hashlib.blake2b(digest_size=16)
        for row in self.rows:
            hashed.update(repr((row.input_ids, row.labels, row.class_label)).encode())
            hashed.update(repr((row.decoder_labels, row.select, row.subject)).encode())
            hashed.update(repr((row.intervention_mask, row.token_types)).encode())
            hashed.update(repr(sorted(row.guides.items())).encode() if row.guides else b"")
        return hashed.hexdigest()

    def summary(self) -> dict[str, int]:
        """Return counts for the report."""
        return {
            "rows": len(self.rows),
            "skipped_without_target": len(self.skipped),
            "prompts_cut": self.cut,
            "longest": max(map(len, self.rows), default=0),
        }


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    max_len: int,
    *,
    kind: Kind = "causal",
    around: Frame | None = None,
) -> Encoded:
    """Encode one example.

    `[BOS] prompt | target EOS`; BOS only where the tokenizer adds it to a plain text. A prompt that
    is too long is cut from the left (the BOS stays), a target never.

    Args:
        example: The example. With `messages`, the chat template renders prompt and target; with
            `meta["subject"]`, the place of that text in the prompt is noted, with `meta["mask"]`
            the tokens of the marked pieces; the prompt is not cut into `meta["keep"]`.
            `meta["guides"]` holds other prompts by name, texts or chats (causal rows only).
        tokenizer: The tokenizer of the base model.
        max_len: Longest row in tokens.
        kind: `causal`, `classification` (text and class label) or `seq2seq`.
        around: `frame(tokenizer)`, if known already.

    Raises:
        DataError: If there is nothing to learn, the target does not fit, the chat template is
            missing or renders the answer differently from the prompt, or there is no EOS token.
    """
    around = around or frame(tokenizer)
    if kind == "classification":
        return _encode_class(example, tokenizer, max_len, around)
    prompt, target, lead = texts(example, tokenizer, around)
    prompt_ids = _ids(tokenizer, prompt)
    target_ids = _target_ids(tokenizer, target, example.id)
    told = _told(example, prompt, tokenizer)
    if kind == "seq2seq":
        return _encode_pair(example, prompt_ids, target_ids, max_len, around, told)
    room = max_len - len(lead) - len(target_ids)
    if room < (0 if lead and not prompt_ids else 1):
        raise _too_long(example.id, len(target_ids), max_len, len(lead) + 1)
    if not prompt_ids and not lead:
        raise _no_prompt(example.id)
    cut = max(0, len(prompt_ids) - room)
    fixed = fixed_len(tokenizer, lead, prompt_ids)
    check_kept(example, tokenizer, prompt, fixed - len(lead) + cut if cut else 0)
    head = [*lead, *prompt_ids]
    head = head[:fixed] + head[fixed + cut :]
    subject, mask = _placed(example, told, len(lead), fixed, cut)
    guides, most = encode_guides(example, tokenizer, around, max_len - len(target_ids))
    return Encoded(
        input_ids=head + target_ids,
        labels=[IGNORE] * len(head) + target_ids,
        prompt_len=len(head),
        id=example.id,
        select=example.subspace,
        subject=subject,
        intervention_mask=None if mask is None else mask + [False] * len(target_ids),
        guides=guides,
        cut=max(cut, most),
    )


def encode_all(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_len: int,
    *,
    kind: Kind = "causal",
    what: str = "training",
    context: int | None = None,
) -> Rows:
    """Encode a split.

    Rows without a target are skipped with a warning while they are at most 5 % of all; more than
    that is usually a wrong column name and an error. Targets that do not fit are always an error,
    reported together with the max_len that would do.

    Args:
        examples: The examples of the split.
        tokenizer: The tokenizer of the base model.
        max_len: Longest row in tokens.
        kind: See `encode`.
        what: Name of the split in messages.
        context: Tokens the model can see, if it sets a limit: no message asks for more.

    Raises:
        DataError: If there are no rows, too many without a target, or targets that do not fit.
    """
    if not examples:
        raise DataError(f"There are no {what} rows.", "Check the task, its sizes and its files.")
    around = frame(tokenizer)
    rows: list[Encoded] = []
    empty: list[EmptyTargetError] = []
    skipped: list[str] = []
    long: list[TooLongError] = []
    for example in examples:
        try:
            rows.append(encode(example, tokenizer, max_len, kind=kind, around=around))
        except EmptyTargetError as error:
            empty.append(error)
            skipped.append(example.id)
        except TooLongError as error:
            long.append(error)
    if long:
        raise _all_too_long(long, len(examples), what, context)
    if len(empty) > EMPTY_ALLOWED * len(examples):
        raise DataError(
            f"{len(empty)} of {len(examples)} {what} rows have no target. {empty[0].what}",
            "Check the field that holds the text to learn.",
        )
    if empty:
        log.warning("%d of %d %s rows have no target: skipped", len(empty), len(examples), what)
    cut = sum(row.cut > 0 for row in rows)
    if cut:
        log.warning(
            "%d of %d %s prompts are longer than max_len %d: cut from the left",
            *(cut, len(rows), what, max_len),
        )
    return Rows(rows, skipped, cut)


def blank(row: Encoded) -> Encoded:
    """Return a copy of a row without labels: it fills the last batch of a process.

    A whole copy, because position rules may refuse prompts that are too short.
    """
    class_label = None
    if row.class_label is not None:
        class_label = float("nan") if isinstance(row.class_label, float) else IGNORE
    decoder = None if row.decoder_labels is None else [IGNORE] * len(row.decoder_labels)
    labels = [IGNORE] * len(row.labels)
    return replace(row, labels=labels, class_label=class_label, decoder_labels=decoder, guides=None)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _target_ids(tokenizer: PreTrainedTokenizerBase, target: str, row: str) -> list[int]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            "The tokenizer has no EOS token, so the model could not learn where an answer ends.",
            "Set tokenizer.eos_token.",
        )
    ids = _ids(tokenizer, target)
    if not ids:
        raise empty_target(row, "a target without tokens")
    return ids if ids[-1] == eos else [*ids, eos]


def _encode_class(
    example: Example, tokenizer: PreTrainedTokenizerBase, max_len: int, around: Frame
) -> Encoded:
    """Encode a text (or pair of texts) with its class; cut from the right, longest first."""
    if example.label is None:
        raise empty_target(example.id, "no class label")
    pair = example.pair or None
    made = tokenizer(example.prompt, pair, truncation="longest_first", max_length=max_len)
    ids = list(made["input_ids"])
    whole = len(tokenizer(example.prompt, pair, verbose=False)["input_ids"])
    if len(ids) <= len(around.lead) + len(around.tail):
        raise DataError(f'Row "{example.id}" has an empty text.', "Remove the row.")
    return Encoded(
        input_ids=ids,
        labels=[IGNORE] * len(ids),
        prompt_len=len(ids),
        id=example.id,
        class_label=example.label,
        select=example.subspace,
        token_types=made.get("token_type_ids"),
        cut=whole - len(ids),
    )


def _encode_pair(
    example: Example,
    prompt: list[int],
    target: list[int],
    max_len: int,
    around: Frame,
    told: Told,
) -> Encoded:
    """Encode for an encoder-decoder: the prompt on one side, the target on the other."""
    if len(target) > max_len:
        raise _too_long(example.id, len(target), max_len, 0)
    room = max_len - len(around.lead) - len(around.tail)
    cut = max(0, len(prompt) - room)
    ids = [*around.lead, *prompt[cut:], *around.tail]
    subject, mask = _placed(example, told, len(around.lead), len(around.lead), cut)
    return Encoded(
        input_ids=ids,
        labels=[IGNORE] * len(ids),
        prompt_len=len(ids),
        id=example.id,
        decoder_labels=target,
        select=example.subspace,
        subject=subject,
        intervention_mask=None if mask is None else mask + [False] * len(around.tail),
        cut=cut,
    )


def _told(example: Example, prompt: str, tokenizer: PreTrainedTokenizerBase) -> Told:
    """Return what a row tells position rules, in places of the prompt's own tokens."""
    row, subject, marks = f'Row "{example.id}"', example.meta.get("subject"), None
    place = subject_place(tokenizer, prompt, subject, row) if subject else None
    if example.meta.get("mask") is not None:
        marks = marked_tokens(tokenizer, prompt, example.meta["mask"], row)
    return place, marks


def _placed(
    example: Example, told: Told, lead: int, fixed: int, cut: int
) -> tuple[int | None, list[bool] | None]:
    """Return subject and mask in places of the row, after `cut` tokens went behind `fixed` ones."""
    place, marks = told
    if place is not None:
        place += lead
        if fixed <= place < fixed + cut:
            raise DataError(
                f'Row "{example.id}": its subject "{example.meta["subject"]}" was cut off with the '
                "prompt.",
                "Set a larger max_len.",
            )
        place -= cut if place >= fixed else 0
    if marks is not None:
        whole = [False] * lead + marks
        marks = whole[:fixed] + whole[fixed + cut :]
    return place, marks


def _no_prompt(row: str) -> DataError:
    return DataError(
        f'Row "{row}" has an empty prompt and the tokenizer adds no BOS token, so there is no '
        "token to edit before the answer.",
        "Give the row a prompt.",
    )


def _too_long(row: str, target: int, max_len: int, around: int) -> TooLongError:
    error = TooLongError(
        f'Row "{row}" has a target of {target} tokens (with EOS), which leaves no room for a '
        f"prompt within max_len {max_len}. Targets are never cut.",
        f"Set max_len to at least {target + around}, or take the row out of the data.",
    )
    error.needed = target + around
    return error


def _all_too_long(
    errors: list[TooLongError], total: int, what: str, context: int | None
) -> TooLongError:
    needed = max(error.needed for error in errors)
    first = f"Set max_len to at least {needed} (more, if prompts shall not be cut)"
    if context is not None and needed > context:
        first = f"They need max_len {needed}; the context of this model is {context}"
    error = TooLongError(
        f"{len(errors)} of {total} {what} rows have a target that does not fit. {errors[0].what}",
        f"{first}. To leave rows out of your own data set task.drop_longer; `reftune inspect` "
        "shows them and a number that does.",
    )
    error.needed = needed
    return error
