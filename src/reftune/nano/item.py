"""One item of the embedded world, its rendering, and the splits that keep evaluation clean."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

Span = tuple[int, int]
"""First and one past the last character of a part of a text."""

DENSE_FROM = 0.5
"""Progress from which short answers are asked for more densely.

At 15 M tokens three skills stood still whose answers are a few tokens among many: look-ups in
passages, flawed steps, bridges for people not shown in them. From here on several questions follow
a passage, facts are also told in full sentences, and remarks also meet problems of one step."""

DRILLS = (25 / 30, 31.5 / 30)
"""Part of training that is nothing but drills of look-up. The rest of the world comes back after it
(`mix.PHASES`)."""

SEED = 20_26
"""Seed of the released world. Another seed is another world with other people, pairs and splits."""


@dataclass(frozen=True)
class Item:
    """A question with its answer, or a plain statement.

    Attributes:
        world: Sub-world, one of `sums facts passages guided logs stories`.
        kind: Family, relation, passage kind or system within the sub-world.
        key: What `split` hashes; two items with equal key never stand on two sides of a split.
        question: Text after `Question:`. Empty for a plain statement.
        answer: Native completion, or the whole text of a plain statement. No surrounding spaces.
        gold: The short value an evaluation compares with (`85`, `yes`, a town). May be empty.
        group: Part of the sub-world an experiment selects (`known`, `half`, `new`, `far`, ...).
        more: Further questions with their answers that follow in the same document.
        weight: Loss weight of the answers' tokens; for answers that are few among many tokens.
        focus: Parts of each answer that alone carry loss, one tuple a turn; empty: all of it, and
            the questions a little.
    """

    world: str
    kind: str
    key: tuple[str, ...]
    question: str
    answer: str
    gold: str = ""
    group: str = ""
    more: tuple[tuple[str, str], ...] = ()
    weight: float = 1.0
    focus: tuple[tuple[Span, ...], ...] = ()


def fraction(*key: object, seed: int = SEED) -> float:
    """Return a keyed hash of `key` as a number in [0, 1).

    >>> fraction("sums", 3, 4) == fraction("sums", 3, 4)
    True
    """
    text = "\x1f".join(str(part) for part in (seed, *key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64


def split(*key: object) -> Split:
    """Return the split of a key: train 80 %, validation 8 %, test 12 %."""
    place = fraction("split", *key)
    if place < 0.80:
        return "train"
    return "validation" if place < 0.88 else "test"


def is_held_out_pair(operator: str, left: int, right: int) -> bool:
    """Say whether `left operator right` occurs in no training text (10 % of `+` and `-` pairs).

    `+` pairs are unordered. `*` and `/` are tables to be learnt whole: never held out.
    """
    if operator == "+":
        left, right = sorted((left, right))
    elif operator != "-":
        return False
    return fraction("pair", operator, left, right) < 0.10
