"""Position rules: which tokens of a row are edited.

Places are counted among the real tokens of each row's own prompt, so padding side, cached prefixes
and the number of forward passes make no difference.

Grammar: terms joined by `+`.

| term | edits |
|---|---|
| `fP` | the first P prompt tokens (the beginning-of-sequence token counts) |
| `lS`, `last` | the last S prompt tokens; `last` is `l1` |
| `all_prompt` | every prompt token |
| `generated:K` | the first K tokens after the prompt |
| `response` | every token after the prompt |
| `subject_last` | the last token of the subject, given per row |
| `all` | every token |
| `mask` | an explicit boolean column |
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from reftune.errors import PositionError, nearest

TERMS = ("fP", "lS", "last", "all_prompt", "generated:K", "response", "subject_last", "all", "mask")
PREFIX, SUFFIX, TIED = "prefix", "suffix", "tied"
SHORT = ("union", "paper", "error")
_NAMES = {
    "prefix": "the first prompt tokens",
    "suffix": "the last prompt tokens",
    "generated": "the first generated tokens",
}
"""What a kind of term is to a reader, where its field has another name."""
MOST = 10**6
"""Largest count of a term; larger ones overflow in tensors and fit no prompt."""


@dataclass
class Tokens:
    """The new tokens of one forward pass, described in each row's own coordinates.

    Attributes:
        place: Rank of each column among the row's real tokens, cached ones counted.
        valid: True at real tokens.
        prompt_len: Real prompt tokens of the row, or of each column's segment when packed.
        mask: Explicit edit columns, or None.
        subject: Place of the subject's last token, or None.
        segments: The most packed documents in a row; a rule's bound holds for each of them.
    """

    place: Int[Tensor, "batch new_tokens"]
    valid: Bool[Tensor, "batch new_tokens"]
    prompt_len: Int[Tensor, " batch #new_tokens"]
    mask: Bool[Tensor, "batch new_tokens"] | None = None
    subject: Int[Tensor, "batch 1"] | None = None
    segments: int = 1


@dataclass(frozen=True)
class PositionRule:
    """A parsed position rule.

    >>> str(PositionRule.parse("l5+f5"))
    'f5+l5'
    >>> PositionRule.parse("last").suffix
    1
    """

    prefix: int = 0
    suffix: int = 0
    generated: int = 0
    all_prompt: bool = False
    response: bool = False
    subject_last: bool = False
    all: bool = False
    mask: bool = False

    @classmethod
    def parse(cls, text: str | PositionRule) -> PositionRule:
        """Parse a rule.

        Raises:
            PositionError: If a term is unknown, repeated or counts nothing.
        """
        if isinstance(text, PositionRule):
            return text
        values: dict[str, int | bool] = {}
        terms = [term.strip() for term in str(text).split("+")]
        for term in terms:
            key, value = _parse_term(term, str(text))
            if key in values:
                alike = [term for term in terms if _parse_term(term, str(text))[0] == key]
                what = f'"{text}" names {_NAMES.get(key, key)} twice.'
                raise PositionError(what, f"Keep one of: {', '.join(alike)}.")
            values[key] = value
        return cls(**values)

    def __str__(self) -> str:
        terms = []
        for name, letter in (("prefix", "f"), ("suffix", "l")):
            if getattr(self, name):
                terms.append(f"{letter}{getattr(self, name)}")
        for name in ("all_prompt", "response", "subject_last", "all", "mask"):
            if getattr(self, name):
                terms.append(name)
        if self.generated:
            terms.append(f"generated:{self.generated}")
        return "+".join(terms)

    @property
    def bound(self) -> int | None:
        """The most places a row can have, or None when it grows with the row."""
        if self.all or self.all_prompt or self.response or self.mask:
            return None
        return self.prefix + self.suffix + self.generated + int(self.subject_last)

    @property
    def needs_prompt_end(self) -> bool:
        """Whether the rule depends on where the prompt ends."""
        return bool(self.suffix or self.generated or self.all_prompt or self.response)

    @property
    def prompt_only(self) -> bool:
        """Whether no generated token is ever edited: decoding then costs nothing."""
        return not (self.generated or self.response or self.all or self.mask)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the parameter sets of an untied adapter under this rule."""
        return (PREFIX, SUFFIX) if self.prefix and self.suffix else (TIED,)

    def select(
        self, tokens: Tokens, group: str = TIED, short: str = "union"
    ) -> Bool[Tensor, "batch new_tokens"]:
        """Return True at the columns that are edited.

        Args:
            tokens: The columns of this forward pass.
            group: `tied` for all terms, `prefix` or `suffix` for one side of an untied adapter.
                A place both sides claim belongs to the prefix.
            short: For short prompts: `union` edits each place once; `paper` clips the prefix to
                floor(n/2) and the suffix to ceil(n/2), each also alone; `error` raises.

        Raises:
            PositionError: On a short prompt with `short="error"`, or a missing mask or subject.
        """
        place, n = tokens.place, tokens.prompt_len
        prefix, suffix = self.prefix, self.suffix
        if short == "paper":
            prefix = torch.clamp(n // 2, max=prefix)
            suffix = torch.clamp((n + 1) // 2, max=suffix)
        elif short == "error":
            self._check_short(n)
        in_prompt = place < n
        first = (place < prefix) & in_prompt
        last = (place >= n - suffix) & in_prompt
        if group == PREFIX:
            return first & tokens.valid
        if group == SUFFIX:
            return last & ~first & tokens.valid
        chosen = first | last
        if self.all_prompt:
            chosen = chosen | in_prompt
        if self.generated:
            chosen = chosen | (~in_prompt & (place < n + self.generated))
        if self.response:
            chosen = chosen | ~in_prompt
        if self.all:
            chosen = torch.ones_like(tokens.valid)
        return (self._explicit(chosen, tokens)) & tokens.valid

    def _explicit(
        self, chosen: Bool[Tensor, "batch new_tokens"], tokens: Tokens
    ) -> Bool[Tensor, "batch new_tokens"]:
        if self.subject_last:
            if tokens.subject is None:
                raise PositionError(
                    'The rule "subject_last" needs the place of the subject in every row.',
                    "Pass subject_positions=, a tensor [batch] counted in real tokens.",
                )
            chosen = chosen | (tokens.place == tokens.subject)
        if self.mask:
            if tokens.mask is None:
                raise PositionError(
                    'The rule "mask" needs an explicit column.',
                    "Pass intervention_mask=, a boolean tensor shaped like input_ids.",
                )
            chosen = chosen | tokens.mask
        return chosen

    def _check_short(self, prompt_len: Int[Tensor, " batch #new_tokens"]) -> None:
        need = self.prefix + self.suffix
        short = (prompt_len < need).flatten()
        if bool(short.any()):
            row = int(short.nonzero()[0])
            have = int(prompt_len.flatten()[row])
            raise PositionError(
                f'"{self}" asks for {need} prompt tokens but row {row} has {have}.',
                f'Use fewer positions, or set short: "union" to edit all {have} of them.',
            )


def _parse_term(term: str, text: str) -> tuple[str, int | bool]:
    """Return the field and value of one term."""
    if term == "last":
        return "suffix", 1
    if term in ("all_prompt", "response", "subject_last", "all", "mask"):
        return term, True
    match = re.fullmatch(r"(f|l|generated:)(\d+)", term)
    if match is None:
        raise PositionError(
            f'"{term}" in the position rule "{text}" is not a term.', nearest(term, TERMS)
        )
    count = int(match[2])
    if count > MOST:
        raise PositionError(
            f'"{term}" in "{text}" counts more tokens than any prompt has.', "Use all."
        )
    if count < 1:
        raise PositionError(f'"{term}" in "{text}" counts no token.', "Use a count of at least 1.")
    return {"f": "prefix", "l": "suffix", "generated:": "generated"}[match[1]], count


def row_index(
    mask: Bool[Tensor, "batch new_tokens"], bound: int | None
) -> Int[Tensor, "batch {bound}"] | None:
    """Return up to `bound` distinct columns per row, edited ones first, or None for "use all".

    The shape does not depend on the values, so nothing waits for the device and graphs compile.
    Rows with fewer edited columns are filled with unedited ones, never with repetitions: writing
    back an unchanged value there is harmless and deterministic.
    """
    width = mask.shape[1]
    if bound is None or bound * 2 >= width:
        return None
    return torch.argsort(mask.to(torch.uint8), dim=1, descending=True, stable=True)[:, :bound]
