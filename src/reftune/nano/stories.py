"""Sub-world F: small stories, greetings, and questions that get `I do not know.`

A story is an opening, one of sixteen plots told in five or six steps, and an ending. Hero, friend,
thing, animal, place and food are drawn once and kept, so a story stays about the same things. It
comes as a plain statement or as the answer to `Tell me a story about ...`. Chat lines are a small
closed set of groups plus lines with a name. The third kind asks what nobody in the world can know.

Splits. Stories are split by (hero, friend, plot), named chat lines by (line, name), questions
without an answer by their text. The closed chat lines are for training only.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

from reftune.nano import pages
from reftune.nano import stories_parts as parts
from reftune.nano.item import Item, Split
from reftune.nano.item import split as split_of
from reftune.nano.names import ACTORS

Kind = Literal["story", "chat", "unknown"]
MIXTURE: dict[Kind, float] = {"story": 0.45, "chat": 0.27, "unknown": 0.28}
"""Share of the items, beside `pages`. Stories are about three quarters of the tokens."""

UNKNOWN_ANSWER = "I do not know."

_PLOTS = tuple(parts.PLOTS)


def _until(draw: Callable[[], Item], split: Split) -> Item:
    """Draw until an item belongs to `split`."""
    while True:
        item = draw()
        if split_of(*item.key) == split:
            return item


def _tell(rng: random.Random, plot: str, hero: str, friend: str) -> str:
    """Return the text of a story."""
    noun = rng.choice(parts.TOYS)
    slots = {
        "h": hero,
        "f": friend,
        "n": noun,
        "t": f"{rng.choice(parts.COLOURS)} {noun}",
        "a": rng.choice(parts.ANIMALS),
        "p": rng.choice(parts.PLACES),
        "k": rng.choice(parts.FOODS),
        "T": rng.choice(parts.TIMES),
    }
    # A story about being alone cannot begin with two friends.
    openings = [text for text in parts.OPENINGS if plot != "alone" or "{f}" not in text]
    rows = (openings, *parts.PLOTS[plot], parts.ENDINGS)
    chosen = (rng.choice(row) for row in rows)
    return " ".join(sentence.format(**slots) for sentence in chosen if sentence)


def story(rng: random.Random, split: Split = "train", asked: bool | None = None) -> Item:
    """Draw a story of six to eight sentences.

    Args:
        rng: Source of chance.
        split: Split of the (hero, friend, plot) to draw from.
        asked: Whether it answers a question; drawn evenly if not given.
    """

    def draw() -> Item:
        hero, friend = rng.sample(ACTORS, 2)
        plot = rng.choice(_PLOTS)
        return Item("stories", plot, ("story", hero, friend, plot), "", "", hero, "story")

    plan = _until(draw, split)
    _, hero, friend, plot = plan.key
    question = ""
    if rng.random() < 0.5 if asked is None else asked:
        question = rng.choice(parts.STORY_QUESTIONS).format(h=hero, f=friend)
    text = _tell(rng, plot, hero, friend)
    return Item("stories", plot, plan.key, question, text, hero, "story")


def chat(rng: random.Random, split: Split = "train") -> Item:
    """Draw a greeting or another line of small talk with its reply.

    Half of the training lines, and all lines of the other splits, carry a name.
    """
    if split == "train" and rng.random() < 0.5:
        asks, replies = rng.choice(parts.CHAT)
        ask, reply = rng.choice(asks), rng.choice(replies)
        return Item("stories", "chat", ("chat", ask), ask, reply, reply, "chat")

    def draw() -> Item:
        ask, reply = rng.choice(parts.NAMED_CHAT)
        name = rng.choice(ACTORS)
        answer = reply.format(h=name)
        key = ("chat", ask, name)
        return Item("stories", "chat", key, ask.format(h=name), answer, answer, "chat")

    return _until(draw, split)


def unknown(rng: random.Random, split: Split = "train") -> Item:
    """Draw a question that has no answer in the world; the reply is `I do not know.`"""

    def draw() -> Item:
        frame, fillers = rng.choice(parts.UNANSWERABLE)
        question = frame.format(*(rng.choice(words) for words in fillers))
        key = ("unanswerable", question)
        return Item("stories", "unknown", key, question, UNKNOWN_ANSWER, "", "unknown")

    return _until(draw, split)


_DRAWS: dict[Kind, Callable[[random.Random, Split], Item]] = {
    "story": story,
    "chat": chat,
    "unknown": unknown,
}


def sample(
    rng: random.Random, split: Split = "train", kind: Kind | None = None, progress: float = 1.0
) -> Item:
    """Draw an item of sub-world F.

    Args:
        rng: Source of chance.
        split: Split the item must belong to.
        kind: Draw only this kind instead of the mixture.
        progress: Place in the curriculum; pages and echoes come in after a third of it.
    """
    if kind is None and progress >= pages.START and rng.random() < pages.SHARE:
        return pages.sample(rng, split)
    if kind is None:
        kind = rng.choices(tuple(MIXTURE), tuple(MIXTURE.values()))[0]
    return _DRAWS[kind](rng, split)
