"""Nano's facts: 200 invented people and 40 towns.

| kind | training rows | validation and test rows |
|---|---|---|
| `recall` | questions in shown wordings | the one wording withheld for each fact |
| `one_hop` | 120 people; the bridge is said aloud | 40 people each who were never asked about so |
| `unknown` | names of nobody: `I do not know.` | other names of nobody |
| `mix` | all three | all three |

An answer is right if it holds the gold words; an unknown name wants `I do not know`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from reftune.nano import facts
from reftune.nano.item import Item
from reftune.rewards.exact import CONTAINS
from reftune.tasks import world
from reftune.tasks.base import Example, Split
from reftune.tasks.world import World

_KINDS = {"recall": "question", "one_hop": "one hop", "unknown": "unknown"}
_SHARES = {"recall": 0.6, "one_hop": 0.2, "unknown": 0.2}


@dataclass(frozen=True)
class Options(world.Options):
    """Options of `facts`."""

    kind: Literal["recall", "one_hop", "unknown", "mix"] = "recall"
    """What is asked."""


class Facts(World):
    """Facts of nano's world."""

    name = "facts"
    max_new_tokens = 32
    Options: ClassVar[type] = Options

    @classmethod
    def gives(cls, options: dict[str, Any]) -> frozenset[str]:
        """Return what rows tell position rules: names of nobody are subjects too."""
        return frozenset({"subject"})

    def rows_of(self, split: Split) -> list[Example]:
        """Return questions; recall has at most as many test rows as facts in that split."""

        def one(rng: random.Random) -> tuple[str, Item]:
            kind = self.options.kind
            if kind == "mix":
                kind = rng.choices(tuple(_SHARES), tuple(_SHARES.values()))[0]
            return kind, facts.sample(rng, split, _KINDS[kind])

        drawn = self.draw(split, one, lambda found: found[1].question, self.options.kind)
        return [self._example(split, i, *found) for i, found in enumerate(drawn)]

    def _example(self, split: Split, index: int, kind: str, item: Item) -> Example:
        answer = item.gold or item.answer.rstrip(".")
        meta: dict[str, str] = {"kind": kind, "relation": item.kind}
        names = (item.key[1], facts.ALIASES.get(item.key[1], ""))
        subject = next((name for name in names if name and name in item.question), "")
        if subject:
            meta["subject"] = subject
        return self.row(split, index, item.question, item.answer, answer, meta=meta)

    def extract(self, text: str, example: Example) -> str | None:
        """Return the stripped text, or None if there is none."""
        return CONTAINS.extract(text)

    def score(self, text: str, example: Example) -> dict[str, float]:
        """Return whether the text holds the answer."""
        return {"accuracy": CONTAINS.reward(text, example.answer)}
