"""The token mix: which sub-world comes next, how an item becomes tokens with loss weights.

Shares are of *tokens*, not of items: a scheduler always draws from the sub-world that lags most
behind its share, so the mix is exact at any moment and needs no table of lengths.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reftune.nano.item import DRILLS, Item, Span, Split
from reftune.nano.tokenizer import ASSISTANT_ID, BOS_ID, EOS_ID, USER_ID

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SHARES: dict[str, float] = {
    "sums": 0.45, "facts": 0.20, "passages": 0.16, "guided": 0.06, "logs": 0.05, "stories": 0.08,
}  # fmt: skip
"""Share of training tokens per sub-world (A to F)."""

LATE_SHARES: dict[str, float] = {
    "sums": 0.25, "facts": 0.15, "passages": 0.36, "guided": 0.10, "logs": 0.04, "stories": 0.10,
}  # fmt: skip
"""Shares after the drills: sums and facts are known by then, look-ups are fresh."""

Phases = tuple[tuple[float, dict[str, float]], ...]
"""Shares of tokens, each from a place in the curriculum on."""

PHASES: Phases = ((0.0, SHARES), (DRILLS[0], {"passages": 1.0}), (DRILLS[1], LATE_SHARES))

ENCODER_PHASES: Phases = ((0.0, {"logs": 0.6, "stories": 0.4}),)
"""Token mix of `nano-encoder`, the masked model for the log studies."""

WORLDS: tuple[str, ...] = tuple(SHARES)
CURRICULUM = frozenset({"sums", "facts", "passages", "guided", "stories"})
"""Sub-worlds whose `sample` takes `progress`: tokens seen as a fraction of those planned."""

NO_CHAT = frozenset({"logs"})
CHAT_SHARE = 0.3
PROMPT_WEIGHT = 0.1
"""Loss weight of question tokens: their random parts cannot be predicted, only answers count."""


def draw(world: str, rng: random.Random, split: Split = "train", progress: float = 1.0) -> Item:
    """Draw one item of a sub-world from its training distribution.

    Args:
        world: One of `WORLDS`.
        rng: Source of all randomness.
        split: Only items of this split can come out.
        progress: Place in the curriculum, 0 to 1 and on; only `CURRICULUM` worlds look at it.
    """
    module = importlib.import_module(f"reftune.nano.{world}")
    if world in CURRICULUM:
        return module.sample(rng, split, progress=progress)
    return module.sample(rng, split)


def prompt_text(item: Item) -> str:
    """Return the native prompt of a question; empty for a plain statement.

    >>> prompt_text(Item("sums", "", (), "What is 2 + 2?", "4"))
    'Question: What is 2 + 2? Answer:'
    """
    return native_prompt(item.question) if item.question else ""


def native_prompt(question: str) -> str:
    """Return the native form of a question."""
    return f"Question: {question} Answer:"


@dataclass(frozen=True)
class Document:
    """Token ids of one item with the loss weight of each (as a target) and its sub-world."""

    ids: list[int]
    weights: list[float]
    world: str


def render(item: Item, tokenizer: Any, chat: bool = False) -> tuple[list[int], list[float]]:
    """Return `(ids, weights)` of one item: prompt and completion are tokenised apart.

    Args:
        item: What to render.
        tokenizer: The transformers tokenizer, or its `backend_tokenizer`.
        chat: Through the chat template instead of `Question: ... Answer: ...`.
    """
    core = getattr(tokenizer, "backend_tokenizer", tokenizer)
    document = render_batch([item], [chat], core)[0]
    return document.ids, document.weights


def render_batch(items: Sequence[Item], chats: Sequence[bool], core: Tokenizer) -> list[Document]:
    """Render many items at once; `core` is the `backend_tokenizer`. Statements ignore `chats`.

    Only the first turn of an item with several carries a bos, as in the chat template.
    """
    texts: list[str] = []
    for item, chat in zip(items, chats, strict=True):
        for question, answer in ((item.question, item.answer), *item.more):
            if question:
                texts += [f" {question}" if chat else native_prompt(question), f" {answer}"]
            else:
                texts += ["", answer]
    encoded = iter(core.encode_batch(texts, add_special_tokens=False))
    documents = []
    for item, chat in zip(items, chats, strict=True):
        ids, weights = [BOS_ID], [PROMPT_WEIGHT]
        for turn in range(1 + len(item.more)):
            prompt, spoken = next(encoded).ids, next(encoded)
            answer = [*spoken.ids, EOS_ID]
            if item.question and chat:
                prompt = [USER_ID, *prompt, ASSISTANT_ID]
            ids += prompt + answer
            if item.focus:
                weights += [0.0] * len(prompt)
                weights += [item.weight * on for on in _focused(spoken.offsets, item.focus[turn])]
                weights.append(0.0)
            else:
                weights += [PROMPT_WEIGHT] * len(prompt) + [item.weight] * len(answer)
        documents.append(Document(ids, weights, item.world))
    return documents


def _focused(offsets: Sequence[Span], focus: Sequence[Span]) -> list[bool]:
    """Say which tokens of ` answer` touch a part in focus; `offsets` count the space before it."""
    return [any(a < stop + 1 and start + 1 < b for start, stop in focus) for a, b in offsets]


@dataclass
class Mix:
    """Endless stream of documents in the given token shares, exactly resumable.

    Attributes:
        core: The `backend_tokenizer`.
        seed: Seed of the stream; two processes with different seeds see different items.
        phases: Share of tokens per sub-world; the first phase names them all.
        counts: Tokens drawn so far per sub-world.
        items: Items drawn so far per sub-world (for the mean length).
    """

    core: Tokenizer
    seed: int = 0
    phases: Phases = PHASES
    counts: dict[str, int] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"mix-{self.seed}")
        self.phase, self.before = 0, dict(self.counts)
        for world in self.phases[0][1]:
            self.counts.setdefault(world, 0)
            self.items.setdefault(world, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed stream needs."""
        return {
            "rng": self.rng.getstate(),
            "counts": dict(self.counts),
            "items": dict(self.items),
            "phase": self.phase,
            "before": dict(self.before),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the stream exactly where `state_dict` was taken."""
        self.rng.setstate(state["rng"])
        self.counts, self.items = dict(state["counts"]), dict(state["items"])
        self.phase, self.before = state.get("phase", 0), dict(state.get("before") or {})

    def _schedule(self, number: int, progress: float) -> list[str]:
        """Choose the next sub-worlds by largest deficit, with the mean lengths seen so far."""
        phase = max(i for i, (start, _) in enumerate(self.phases) if progress >= start)
        if phase != self.phase:
            # New shares hold from here on; what was drawn before is no deficit.
            self.phase, self.before = phase, dict(self.counts)
        shares = self.phases[phase][1]
        mean = {w: self.counts[w] / self.items[w] if self.items[w] else 60.0 for w in shares}
        planned: dict[str, float] = {w: self.counts[w] - self.before.get(w, 0) for w in shares}
        order = []
        for _ in range(number):
            total = sum(planned.values())
            world = max(shares, key=lambda w: shares[w] * total - planned[w])
            planned[world] += mean[world]
            order.append(world)
        return order

    def documents(self, number: int, progress: float) -> list[Document]:
        """Draw and render the next `number` items of the mix."""
        drawn = [
            draw(world, self.rng, progress=progress) for world in self._schedule(number, progress)
        ]
        chats = [item.world not in NO_CHAT and self.rng.random() < CHAT_SHARE for item in drawn]
        documents = render_batch(drawn, chats, self.core)
        for document in documents:
            self.counts[document.world] += len(document.ids)
            self.items[document.world] += 1
        return documents

    def step(self, tokens: int, progress: float) -> list[Document]:
        """Draw documents until they hold at least `tokens` tokens."""
        documents: list[Document] = []
        size = 0
        while size < tokens:
            # The number drawn at once only bounds the overshoot; a tokeniser call is batched.
            fresh = self.documents(max(1, min(64, (tokens - size) // 64)), progress)
            documents += fresh
            size += sum(len(document.ids) for document in fresh)
        return documents

    def conversation(self, tokens: int, progress: float) -> Document:
        """Join items to one document of at most `tokens`: later items may look at earlier ones.

        Used for the last tenth of training, which teaches the full context: a chat of many turns
        (its later turns carry no bos of their own), or native documents one after another.
        """
        chat = self.rng.random() < 0.5
        ids: list[int] = []
        weights: list[float] = []
        while True:
            world = self._schedule(1, progress)[0]
            item = draw(world, self.rng, progress=progress)
            as_chat = chat and world not in NO_CHAT
            document = render_batch([item], [as_chat], self.core)[0]
            if len(ids) + len(document.ids) > tokens:
                return Document(ids, weights, "long")
            skip = 1 if ids and as_chat and item.question else 0
            ids += document.ids[skip:]
            weights += document.weights[skip:]
            self.counts[world] += len(document.ids)
            self.items[world] += 1
