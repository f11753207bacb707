"""Forgettable people: 100 invented lives that a recipe stage teaches and unlearning removes.

They are not in the base. Each person has ten questions, one a topic; an answer is a sentence of 8
to 20 words with two or three details drawn from closed sets by keyed hash. Every question has a
paraphrase, every answer a rewording, and both forms have five wrong answers of equal form in which
all details are others, as truth ratios need them. What this leaves out: no two questions of
a person depend on each other, so forgetting one topic says nothing about the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from reftune.nano.facts_names import FORGETTABLE_NAMES
from reftune.nano.item import Item, fraction

NUM_WRONG = 5
PERCENTS: tuple[int, ...] = (1, 5, 10)
"""Shares of the people that the unlearning studies forget."""


@dataclass(frozen=True)
class Topic:
    """What can be asked about a life: wordings, and the closed sets of their details.

    Attributes:
        question: Question that is taught.
        paraphrase: The same question in other words, never taught.
        answer: Sentence that is taught; `{0}`, `{1}`, `{2}` are the details.
        reworded: The same answer in other words, never taught.
        details: Closed set of each detail, at least six values.
    """

    question: str
    paraphrase: str
    answer: str
    reworded: str
    details: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Entry:
    """One question about one forgettable person.

    Attributes:
        person: Full name.
        topic: Key of `TOPICS`.
        question: Question that is taught.
        paraphrase: The same question in other words.
        answer: Right answer, 8 to 20 words.
        reworded: Right answer in other words.
        wrong: Five wrong answers in the form of `answer`.
        reworded_wrong: The same five in the form of `reworded`.
    """

    person: str
    topic: str
    question: str
    paraphrase: str
    answer: str
    reworded: str
    wrong: tuple[str, ...]
    reworded_wrong: tuple[str, ...]

    def item(self, paraphrase: bool = False) -> Item:
        """Return the entry as an item, with the taught question or its paraphrase."""
        asked = self.paraphrase if paraphrase else self.question
        key = ("people", self.person, self.topic)
        return Item("facts", self.topic, key, asked, self.answer, self.answer, "forgettable")


_KIN = ("aunt", "uncle", "grandmother", "grandfather", "cousin", "old neighbour", "stepfather")
_PLACES = (
    "lighthouse",
    "mill",
    "monastery",
    "farm",
    "harbour inn",
    "forest lodge",
    "castle",
    "barge",
)
_SEASONS = ("spring", "summer", "autumn", "winter", "the harvest weeks", "the rainy months")
_SUBJECTS = (
    "maps",
    "bridges",
    "stars",
    "old coins",
    "mosses",
    "river law",
    "clocks",
    "bees",
    "tides",
)
_CITIES = (
    "the capital",
    "the north",
    "the islands",
    "the hills",
    "the south",
    "the border country",
)
_GOODS = ("salt", "wool", "glass beads", "paper", "tea", "copper pots", "dried figs", "lamp oil")
_FEARS = (
    "thunder",
    "deep water",
    "geese",
    "narrow stairs",
    "horses",
    "empty rooms",
    "moths",
    "fire",
)
_COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey")
_ROOMS = ("two rooms", "three rooms", "four rooms", "five rooms", "six rooms", "seven rooms")
_PRIZES = (
    "a gold medal",
    "a silver cup",
    "a new horse",
    "a carved chair",
    "a bag of coins",
    "a fur hat",
)
_FEATS = (
    "rowing across the bay",
    "growing the largest pumpkin",
    "writing the best ballad",
    "finding a lost child",
    "mending the town clock",
    "drawing a map of the coast",
    "baking for the whole army",
)
_HABITS = (
    "drinks cold milk",
    "reads old letters",
    "feeds the pigeons",
    "walks along the wall",
    "sharpens a pencil",
    "waters a fern",
    "counts the ships",
)
_MOMENTS = (
    "before sunrise",
    "after breakfast",
    "at noon",
    "before supper",
    "at dusk",
    "at midnight",
)
_WISHES = (
    "to sail around the world",
    "to open a school",
    "to build a tower",
    "to see a whale",
    "to write a cookbook",
    "to plant an orchard",
    "to learn to dance",
)
_REASONS = (
    "lack of money",
    "a bad knee",
    "a promise to a brother",
    "a long war",
    "too many debts",
    "a fear of change",
    "a lost letter",
)
_MEETINGS = (
    "on a ferry",
    "at a wedding",
    "in a bakery",
    "at an auction",
    "in a hospital",
    "at a fair",
)
_CRAFTS = (
    "ropemaker",
    "beekeeper",
    "puppeteer",
    "clockmaker",
    "diver",
    "stonecutter",
    "bookbinder",
)

TOPICS: dict[str, Topic] = {
    "childhood": Topic(
        "How did {s} grow up?",
        "What was the childhood of {s} like?",
        "{s} grew up at a {0} with the {1}, who came from {2}.",
        "As a child {s} lived with the {1}, who came from {2}, at a {0}.",
        (_PLACES, _KIN, _CITIES),
    ),
    "study": Topic(
        "What did {s} study?",
        "Which field did {s} choose to learn about?",
        "{s} studied {0} with a {1} and wrote a long book about {2}.",
        "The studies of {s} were about {0}, led by a {1}, and ended in a long book on {2}.",
        (_SUBJECTS, _CRAFTS, _GOODS),
    ),
    "journey": Topic(
        "Which journey did {s} make?",
        "Where did {s} once travel, and why?",
        "{s} once travelled to {0} in {1} to sell {2} there.",
        "To sell {2}, {s} made a journey to {0} in {1}.",
        (_CITIES, _SEASONS, _GOODS),
    ),
    "prize": Topic(
        "What prize did {s} win?",
        "What was {s} honoured with, and for what?",
        "{s} won {0} for {1} when few others tried.",
        "For {1}, which few others tried, {s} was given {0}.",
        (_PRIZES, _FEATS),
    ),
    "house": Topic(
        "What does the house of {s} look like?",
        "How would you describe the place where {s} lives?",
        "The house of {s} has {0}, a {1} door and a stove from {2}.",
        "{s} lives behind a {1} door in {0} with a stove that came from {2}.",
        (_ROOMS, _COLOURS, _CITIES),
    ),
    "fear": Topic(
        "What is {s} afraid of?",
        "Which thing frightens {s}?",
        "{s} has been afraid of {0} since a night in {1} spent at a {2}.",
        "Since spending a night in {1} at a {2}, {s} has feared {0}.",
        (_FEARS, _SEASONS, _PLACES),
    ),
    "habit": Topic(
        "What habit does {s} have?",
        "What does {s} do every single day?",
        "Every day {1} {s} {0} and puts on a {2} coat.",
        "{s} puts on a {2} coat every day {1} and {0}.",
        (_HABITS, _MOMENTS, _COLOURS),
    ),
    "friend": Topic(
        "Who is the best friend of {s}?",
        "With whom is {s} closest, and how did they meet?",
        "The best friend of {s} is a {0} from {2} whom {s} met {1}.",
        "{s} is closest to a {0} from {2}; the two met {1}.",
        (_CRAFTS, _MEETINGS, _CITIES),
    ),
    "wish": Topic(
        "What has {s} always wanted to do?",
        "Which dream of {s} never came true?",
        "{s} has always wanted {0} but could not because of {1}.",
        "Because of {1}, the old wish of {s} {0} never came true.",
        (_WISHES, _REASONS),
    ),
    "collection": Topic(
        "What does {s} collect?",
        "Which things does {s} gather and keep?",
        "{s} collects books about {0} and keeps them in a {1} chest from a {2}.",
        "In a {1} chest that came from a {2}, {s} keeps a collection of books about {0}.",
        (_SUBJECTS, _COLOURS, _PLACES),
    ),
}
"""The ten topics, in the order of a person's questions."""


def _details(person: str, topic: str, place: int) -> tuple[str, ...]:
    """Return the details of answer `place` of an entry: 0 is right, 1 to 5 are wrong.

    The values of each closed set are dealt out in a hashed order, so no detail repeats.
    """
    out = []
    for i, values in enumerate(TOPICS[topic].details):
        order = sorted(values, key=lambda value: fraction("people", person, topic, i, value))
        out.append(order[place])
    return tuple(out)


def entry(person: str, topic: str) -> Entry:
    """Return what is taught and asked about one topic of one person."""
    frame = TOPICS[topic]
    rows = [_details(person, topic, place) for place in range(1 + NUM_WRONG)]
    answers = [frame.answer.format(*row, s=person) for row in rows]
    reworded = [frame.reworded.format(*row, s=person) for row in rows]
    return Entry(
        person=person,
        topic=topic,
        question=frame.question.format(s=person),
        paraphrase=frame.paraphrase.format(s=person),
        answer=answers[0],
        reworded=reworded[0],
        wrong=tuple(answers[1:]),
        reworded_wrong=tuple(reworded[1:]),
    )


@lru_cache(maxsize=1)
def forgettable() -> tuple[Entry, ...]:
    """Return all 1,000 entries, person by person.

    >>> len(forgettable())
    1000
    """
    return tuple(entry(person, topic) for person in FORGETTABLE_NAMES for topic in TOPICS)


def forget(percent: int) -> tuple[Entry, ...]:
    """Return the entries of the first 1, 5 or 10 % of the people; each part holds the smaller.

    >>> [len(forget(percent)) for percent in PERCENTS]
    [10, 50, 100]
    """
    if percent not in PERCENTS:
        raise ValueError(f"percent is {percent}; the studies forget one of {PERCENTS}")
    return forgettable()[: percent * len(TOPICS)]


def retain(percent: int) -> tuple[Entry, ...]:
    """Return the entries that stay when `forget(percent)` is removed."""
    return forgettable()[len(forget(percent)) :]
