"""Wording of the sums: six settings, the events that happen in them, and the questions.

An event has two phrasings a setting, a question three in all; a template number 0-5 fixes which
are used, so every family has six deterministic surface forms. Fields: `{A}` `{B}` actors, `{x}` the
counted things (plural), `{box}` a container, `{boxes}` its plural, `{n}` and `{m}` numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

NUM_TEMPLATES = 6


@dataclass(frozen=True)
class Story:
    """A setting of word problems.

    Attributes:
        name: Second half of a family's name.
        things: What is counted.
        boxes: (singular, plural) of two containers.
        idle: Two sentences without a number.
        events: Two phrasings of each event this setting words in its own way.
    """

    name: str
    things: tuple[str, ...]
    boxes: tuple[tuple[str, str], tuple[str, str]]
    idle: tuple[str, str]
    events: dict[str, tuple[str, str]]


STORIES: dict[str, Story] = {
    story.name: story
    for story in (
        Story(
            "market",
            ("apples", "lemons", "candles", "hats", "melons", "ribbons"),
            (("crate", "crates"), ("basket", "baskets")),
            ("The market opens early.", "The street is full of people."),
            {
                "start": ("{A} has {n} {x} on the stall.", "On the stall of {A} lie {n} {x}."),
                "gain": ("{A} buys {n} more.", "A trader brings {n} more {x}."),
                "gain2": ("Then {A} buys another {n}.", "Later another {n} {x} arrive."),
                "loss": ("{A} sells {n} of them.", "A customer buys {n} {x} from {A}."),
                "loss2": ("Then {A} sells {n}.", "In the evening {n} {x} are sold."),
                "extra": ("There are {n} stalls.", "{B} counts {n} visitors."),
            },
        ),
        Story(
            "farm",
            ("eggs", "pumpkins", "carrots", "onions", "potatoes", "turnips"),
            (("sack", "sacks"), ("cart", "carts")),
            ("The dog sleeps by the gate.", "It rained in the night."),
            {
                "start": ("{A} has {n} {x} in the barn.", "In the barn of {A} are {n} {x}."),
                "gain": ("{A} gathers {n} more.", "The harvest gives {n} more {x}."),
                "gain2": ("Then {A} gathers another {n}.", "The next day brings {n} {x}."),
                "loss": ("{A} feeds {n} to the pigs.", "The mice eat {n} {x}."),
                "loss2": ("Then {n} go bad.", "A fox takes {n} {x}."),
                "extra": ("The farm has {n} cows.", "There are {n} hens in the yard."),
            },
        ),
        Story(
            "school",
            ("pencils", "cards", "books", "stickers", "crayons", "maps"),
            (("folder", "folders"), ("drawer", "drawers")),
            ("The lesson is about rivers.", "The bell rings at noon."),
            {
                "start": ("{A} has {n} {x} in class.", "At school {A} keeps {n} {x}."),
                "gain": ("The teacher hands {A} {n} more.", "{A} is given {n} more {x}."),
                "gain2": ("A friend hands {A} another {n}.", "After class {A} is given {n} {x}."),
                "loss": ("{A} lends {n} to {B}.", "{B} borrows {n} {x} from {A}."),
                "loss2": ("{A} forgets {n} on the bus.", "Then {n} {x} are lost."),
                "extra": ("There are {n} desks.", "The class has {n} pupils."),
            },
        ),
        Story(
            "kitchen",
            ("buns", "cookies", "pies", "rolls", "muffins", "pancakes"),
            (("tray", "trays"), ("plate", "plates")),
            ("The oven is hot.", "The radio plays a song."),
            {
                "start": ("{A} has {n} {x} in the kitchen.", "On the table of {A} are {n} {x}."),
                "gain": ("{A} bakes {n} more.", "The oven yields {n} more {x}."),
                "gain2": ("Then {A} bakes another {n}.", "The next batch is {n} {x}."),
                "loss": ("{A} serves {n} of them.", "The guests eat {n} {x}."),
                "loss2": ("Then {A} burns {n}.", "After dinner {n} {x} are eaten."),
                "extra": ("There are {n} spoons.", "{B} washes {n} cups."),
            },
        ),
        Story(
            "forest",
            ("nuts", "cones", "stones", "berries", "feathers", "leaves"),
            (("bag", "bags"), ("pouch", "pouches")),
            ("An owl sits in a tree.", "The path is muddy."),
            {
                "start": ("{A} has {n} {x} from the forest.", "In the hut of {A} are {n} {x}."),
                "gain": ("{A} finds {n} more.", "Under a tree lie {n} more {x} for {A}."),
                "gain2": ("Then {A} finds another {n}.", "By the lake {A} picks up {n} {x}."),
                "loss": ("{A} drops {n} of them.", "The birds carry off {n} {x}."),
                "loss2": ("Then {A} throws away {n}.", "The wind takes {n} {x}."),
                "extra": ("{A} walks past {n} trees.", "There are {n} deer."),
            },
        ),
        Story(
            "harbour",
            ("fish", "crabs", "shells", "ropes", "nets", "anchors"),
            (("barrel", "barrels"), ("boat", "boats")),
            ("The sea is calm.", "A gull cries."),
            {
                "start": ("{A} has {n} {x} at the harbour.", "On the pier of {A} are {n} {x}."),
                "gain": ("{A} hauls in {n} more.", "A ship unloads {n} more {x}."),
                "gain2": ("Then {A} hauls in another {n}.", "At night come {n} {x}."),
                "loss": ("{A} ships {n} of them away.", "The waves wash away {n} {x}."),
                "loss2": ("Then {n} sink.", "A sailor carries off {n} {x}."),
                "extra": ("There are {n} ships.", "The pier has {n} lamps."),
            },
        ),
    )
}

EVENTS: dict[str, tuple[str, str]] = {
    "groups": (
        "{A} has {n} {boxes} with {m} {x} in each.",
        "There are {n} {boxes}, and each holds {m} {x}.",
    ),
    "groups2": (
        "{B} has {n} {boxes2} with {m} {x} in each.",
        "There are also {n} {boxes2}, and each holds {m} {x}.",
    ),
    "share": (
        "{A} puts {n} {x} into {m} {boxes}, equally many in each.",
        "There are {n} {x} in {m} equal {boxes}.",
    ),
    "share_rest": (
        "The others go into {m} {boxes}, equally many in each.",
        "All that remain fill {m} equal {boxes}.",
    ),
    "one_more": ("Then {n} more go into one {box}.", "One {box} gets {n} more {x}."),
    "some": ("{A} has some {x}.", "There are some {x}."),
    "then_now": ("Now {A} has {n} {x}.", "Now there are {n} {x}."),
    "late_start": ("At first {A} had {n} {x}.", "Before all this there were {n} {x}."),
    "other": ("{B} has {n} {x}.", "The number of {x} {B} has is {n}."),
    "price": ("Each costs {n} coins.", "The price of each is {n} coins."),
}
"""Events worded alike in every setting."""

QUESTIONS: dict[str, tuple[str, str, str]] = {
    "now": (
        "How many {x} does {A} have now?",
        "How many {x} are there now?",
        "What is the number of {x} in the end?",
    ),
    "all": (
        "How many {x} are there in all?",
        "How many {x} is that together?",
        "What is the whole number of {x}?",
    ),
    "each": (
        "How many {x} are in each {box}?",
        "How many {x} does one {box} hold?",
        "What is the number of {x} in a {box}?",
    ),
    "that": (
        "How many {x} are in that {box} now?",
        "How many {x} does that {box} hold?",
        "What is the number of {x} in that {box}?",
    ),
    "first": (
        "How many {x} did {A} have at first?",
        "How many {x} were there before?",
        "What was the number of {x} at the start?",
    ),
    "than": (
        "How many more {x} does {A} have than {B}?",
        "By how many {x} is {A} ahead of {B}?",
        "How many {x} is {B} short of {A}?",
    ),
    "coins": (
        "How many coins do all {x} cost?",
        "How many coins must one pay for all?",
        "What is the price of all {x} in coins?",
    ),
}
"""Three phrasings of each question."""


def tell(
    story: Story,
    events: tuple[tuple[str, tuple[int, ...]], ...],
    question: str,
    template: int,
    fields: dict[str, str],
) -> str:
    """Word a problem.

    Args:
        story: The setting.
        events: Event names with their numbers, in the order they are told.
        question: Key of `QUESTIONS`.
        template: Surface form, 0-5.
        fields: Values of `{A}`, `{B}` and `{x}`.
    """
    (box, boxes), (_, boxes2) = story.boxes
    words = {**fields, "box": box, "boxes": boxes, "boxes2": boxes2}
    lines = []
    for place, (event, numbers) in enumerate(events):
        phrasings = story.events.get(event) or EVENTS[event]
        words["n"], words["m"] = str(numbers[0]), str(numbers[-1])
        # The second event of a telling takes the other phrasing, so both are mixed in one text.
        lines.append(phrasings[(template + place) % 2].format_map(words))
    if template == 1:
        lines.insert(0, story.idle[0])
    elif template == 4:
        lines.append(story.idle[1])
    lines.append(QUESTIONS[question][template // 2].format_map(words))
    return " ".join(lines)
