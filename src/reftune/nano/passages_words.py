"""Words and sentence templates of the passages (sub-world C).

A relation ties a subject to one value: the holder of a thing, the place of a thing or an actor, the
colour of a thing, the number of things an actor has. In every template `{s}` is the subject, `{v}`
the value, `{u}` the earlier value, `{m}` the middle of a chain and `{c}` what is being counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from reftune.nano.names import ACTORS


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


OBJECTS: tuple[str, ...] = _split(
    "key lamp cup map bell rope book hat ring drum pen comb shell stone brush knife spoon plate "
    "bowl candle flute letter ball kite mirror scarf glove whistle hammer pillow clock coat net "
    "broom ladder saw vase fan shoe stick"
)
PLACES: tuple[str, ...] = _split(
    "kitchen garden barn cellar attic tower hall shed library stable mill bakery market chapel "
    "harbour workshop"
)
COLOURS: tuple[str, ...] = _split(
    "red blue green white black yellow brown grey purple orange pink silver"
)
NUMBERS: tuple[str, ...] = _split("two three four five six seven eight nine")
CONTAINERS: tuple[str, ...] = tuple(
    f"{colour} {shape}" for shape in ("box", "bag", "chest", "basket", "jar") for colour in COLOURS
)
COUNTED: tuple[str, ...] = _split("coins apples nuts beads pears eggs")
POOLS: dict[str, tuple[str, ...]] = {
    "actor": tuple(ACTORS),
    "object": OBJECTS,
    "place": PLACES,
    "colour": COLOURS,
    "number": NUMBERS,
    "container": CONTAINERS,
}


@dataclass(frozen=True)
class Relation:
    """How one relation is said, denied, changed and asked.

    Attributes:
        subject: Pool of the subjects.
        value: Pool of the values.
        states: Sentences that state it.
        denials: Sentences that deny it.
        changes: Sentences after which the value is `{v}` and no longer `{u}`.
        asks: Open questions for the value, and `answer` to them.
        answer: Answer to `asks`.
        reverse: Open question for the subject, empty where there is none.
        reverse_answer: Answer to `reverse`.
        checks: Yes/no questions.
    """

    subject: str
    value: str
    states: tuple[str, ...]
    denials: tuple[str, ...]
    changes: tuple[str, ...]
    asks: tuple[str, ...]
    answer: str
    reverse: str
    reverse_answer: str
    checks: tuple[str, ...]


RELATIONS: dict[str, Relation] = {
    "has": Relation(
        "object",
        "actor",
        ("{v} has the {s}.", "{v} holds the {s}.", "The {s} is with {v}."),
        ("{v} does not have the {s}.", "The {s} is not with {v}."),
        (
            "{u} gives the {s} to {v}.",
            "{v} takes the {s} from {u}.",
            "{u} hands the {s} to {v}.",
        ),
        ("Who has the {s}?", "Who holds the {s}?"),
        "{v}.",
        "What does {v} have?",
        "The {s}.",
        ("Does {v} have the {s}?", "Is the {s} with {v}?"),
    ),
    "in": Relation(
        "object",
        "place",
        ("The {s} is in the {v}.", "The {s} lies in the {v}.", "In the {v} is the {s}."),
        ("The {s} is not in the {v}.", "The {s} does not lie in the {v}."),
        ("The {s} is moved to the {v}.", "Someone carries the {s} from the {u} to the {v}."),
        ("Where is the {s}?", "In which place is the {s}?"),
        "In the {v}.",
        "What is in the {v}?",
        "The {s}.",
        ("Is the {s} in the {v}?", "Does the {s} lie in the {v}?"),
    ),
    "at": Relation(
        "actor",
        "place",
        ("{s} is in the {v}.", "{s} waits in the {v}.", "{s} works in the {v}."),
        ("{s} is not in the {v}.",),
        ("{s} goes to the {v}.", "{s} walks from the {u} to the {v}."),
        ("Where is {s}?", "In which place is {s}?"),
        "In the {v}.",
        "Who is in the {v}?",
        "{s}.",
        ("Is {s} in the {v}?",),
    ),
    "colour": Relation(
        "object",
        "colour",
        ("The {s} is {v}.", "The colour of the {s} is {v}."),
        ("The {s} is not {v}.", "The colour of the {s} is not {v}."),
        ("The {s} is painted {v}.", "Someone paints the {s} {v}."),
        ("What colour is the {s}?", "What is the colour of the {s}?"),
        "{V}.",
        "What is {v}?",
        "The {s}.",
        ("Is the {s} {v}?", "Is the colour of the {s} {v}?"),
    ),
    "number": Relation(
        "actor",
        "number",
        ("{s} has {v} {c}.", "{s} owns {v} {c}."),
        ("{s} does not have {v} {c}.",),
        ("Later {s} has {v} {c}.", "The next day {s} has {v} {c}."),
        ("How many {c} does {s} have?",),
        "{V}.",
        "",
        "",
        ("Does {s} have {v} {c}?",),
    ),
}


@dataclass(frozen=True)
class Join:
    """A chain subject - middle - value of two sentences, and the questions about its ends."""

    subject: str
    middle: str
    value: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    ask: str
    answer: str
    check: str


JOINS: dict[str, Join] = {
    "inside": Join(
        "object",
        "container",
        "place",
        ("The {s} is in the {m}.", "The {s} lies in the {m}."),
        ("The {m} is in the {v}.", "In the {v} is the {m}."),
        "In which place is the {s}?",
        "In the {v}.",
        "Is the {s} in the {v}?",
    ),
    "carried": Join(
        "object",
        "actor",
        "place",
        ("{m} has the {s}.", "{m} holds the {s}.", "The {s} is with {m}."),
        ("{m} is in the {v}.", "{m} waits in the {v}."),
        "In which place is the {s}?",
        "In the {v}.",
        "Is the {s} in the {v}?",
    ),
    "together": Join(
        "actor",
        "actor",
        "place",
        ("{s} is with {m}.", "{s} stays with {m}."),
        ("{m} is in the {v}.", "{m} works in the {v}."),
        "In which place is {s}?",
        "In the {v}.",
        "Is {s} in the {v}?",
    ),
    "coloured": Join(
        "colour",
        "object",
        "actor",
        ("The {m} is {s}.", "The colour of the {m} is {s}."),
        ("{v} has the {m}.", "{v} holds the {m}."),
        "Who has something {s}?",
        "{v}.",
        "Does {v} have something {s}?",
    ),
}

COUNTS: dict[str, tuple[str, str, str]] = {
    # relation of the counted sentences, yes/no question, open question
    "people": ("at", "Are exactly {n} people in the {v}?", "How many people are in the {v}?"),
    "things": ("colour", "Are exactly {n} things {v}?", "How many things are {v}?"),
}
MORE_CHECKS: dict[str, str] = {
    "more": "Does {s} have more {c} than {t}?",
    "fewer": "Does {s} have fewer {c} than {t}?",
}
MORE_ASKS: dict[str, str] = {
    "more": "Who has more {c}, {s} or {t}?",
    "fewer": "Who has fewer {c}, {s} or {t}?",
}
CROWD_CHECK = "Are there more people in the {s} than in the {t}?"
CROWD_ASK = "Where are more people, in the {s} or in the {t}?"
