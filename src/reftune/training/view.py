"""What a row looks like before anyone trains: which tokens are edited, which are learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reftune.training.encode import IGNORE, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenView:
    """One token as `reftune inspect` shows it.

    Attributes:
        text: The token's text.
        edited: Whether the position rule edits it.
        labelled: Whether it is learned.
    """

    text: str
    edited: bool
    labelled: bool


def decode_view(
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    rule: str | Callable[[Encoded], Iterable[bool]],
    short: str = "union",
) -> list[TokenView]:
    """Show one encoded row token by token.

    Args:
        encoded: The row.
        tokenizer: The tokenizer it was made with.
        rule: A position rule such as `f5+l5`, or a function from the row to T booleans.
        short: What the rule does with short prompts.

    Raises:
        PositionError: If the rule is malformed or does not fit the row.
    """
    edited = list(rule(encoded) if callable(rule) else edited_tokens(encoded, rule, short))
    return [
        TokenView(tokenizer.decode([token]), bool(edit), label != IGNORE)
        for token, edit, label in zip(encoded.input_ids, edited, encoded.labels, strict=True)
    ]


def edited_tokens(encoded: Encoded, rule: str, short: str = "union") -> list[bool]:
    """Return for each of the T tokens whether a position rule edits it in training."""
    import torch

    from reftune.model.positions import PositionRule, Tokens

    mask, subject = encoded.intervention_mask, encoded.subject
    tokens = Tokens(
        place=torch.arange(len(encoded))[None],
        valid=torch.ones(1, len(encoded), dtype=torch.bool),
        prompt_len=torch.tensor([[encoded.prompt_len]]),
        mask=None if mask is None else torch.tensor([mask]),
        subject=None if subject is None else torch.tensor([[subject]]),
    )
    return PositionRule.parse(rule).select(tokens, short=short)[0].tolist()
