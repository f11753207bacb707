"""Value sets and wordings of sub-world B.

Eight phrasings a relation: 0-3 are questions, 4-7 statements. Statement 4 is the plain wording
that the bridges of one-hop questions use, 5 and 6 are other wordings that end in the value, and 7
has the value in front. `{s}` is the subject, `{v}` the value.
"""

from __future__ import annotations

from reftune.nano.facts_names import MAYORS, TOWN_NAMES

PERSON_RELATIONS: tuple[str, ...] = (
    "town",
    "trade",
    "employer",
    "birth year",
    "instrument",
    "pet",
)
TOWN_RELATIONS: tuple[str, ...] = ("land", "river", "dish", "mayor")
EDIT_RELATIONS: tuple[str, ...] = ("town", "trade", "employer", "instrument", "pet")
"""Relations that editing changes; the birth year is left out."""

NUM_QUESTIONS = 4
NUM_PHRASINGS = 8

# Trades and pets begin with a consonant, so that "a" is always the right article.
VALUES: dict[str, tuple[str, ...]] = {
    "town": TOWN_NAMES,
    "trade": (
        "baker", "barber", "carpenter", "cook", "dyer", "farmer", "fisher", "gardener", "glazier",
        "hatter", "judge", "locksmith", "mason", "miller", "nurse", "painter", "pilot", "plumber",
        "potter", "printer", "roofer", "sailor", "shepherd", "smith", "surgeon", "tailor",
        "tanner", "teacher", "weaver", "writer",
    ),
    "employer": (
        "Otter Mill", "Redfern Bank", "Long Lane School", "North Quay", "Glass Yard", "Pine Press",
        "Harrow Farm", "Copper Works", "Bell Street Shop", "Hill Hospital", "Willow Inn",
        "Stone Bridge Post", "Lark Library", "Silver Dock", "Amber Works", "Foxglove Farm",
        "East Gate Bank", "Castle Press", "Maple Mill", "Sand Yard", "Rook Theatre", "Swan Inn",
        "Market Hall", "Clover Dairy",
    ),
    "birth year": tuple(str(year) for year in range(1921, 2000, 2)),
    "instrument": (
        "flute", "drum", "violin", "harp", "cello", "trumpet", "horn", "lute", "piano", "guitar",
        "banjo", "organ", "fiddle", "bugle", "zither", "clarinet",
    ),
    "pet": (
        "cat", "dog", "goat", "parrot", "rabbit", "hamster", "pony", "turtle", "mouse", "ferret",
        "duck", "goose", "lizard", "snail", "raven", "hedgehog", "pigeon", "frog", "donkey", "hen",
    ),
    "land": (
        "Orsund", "Talvia", "Grennia", "Iskar", "Quellia", "Noravia", "Zemland", "Ulmaria",
        "Kestria", "Pavonia", "Draymark", "Hestland",
    ),
    "river": (
        "Arle", "Brune", "Celd", "Dovar", "Eskel", "Finnow", "Gathe", "Hesk", "Imber", "Jarle",
        "Kelm", "Lorn", "Mesk", "Nide", "Orrin", "Pellow", "Quaddle", "Rushel", "Skane", "Thurle",
    ),
    "dish": (
        "barley soup", "plum cake", "fried eel", "onion pie", "smoked trout", "honey bread",
        "lentil stew", "goat cheese", "pickled beans", "roast duck", "apple dumplings",
        "mushroom rice", "salted cod", "pumpkin mash", "walnut tart", "pepper sausage",
    ),
    "mayor": MAYORS,
}  # fmt: skip
"""Closed set of values of each relation."""

PHRASINGS: dict[str, tuple[str, ...]] = {
    "town": (
        "Where does {s} live?",
        "In which town does {s} live?",
        "What is the home town of {s}?",
        "Which town does {s} call home?",
        "{s} lives in {v}.",
        "The home of {s} is in {v}.",
        "The house of {s} stands in {v}.",
        "{v} is the town where {s} lives.",
    ),
    "trade": (
        "What is the trade of {s}?",
        "What does {s} do for a living?",
        "What kind of work does {s} do?",
        "Which trade did {s} learn?",
        "By trade {s} is a {v}.",
        "{s} works as a {v}.",
        "{s} earns a living as a {v}.",
        "A {v} is what {s} is by trade.",
    ),
    "employer": (
        "Who employs {s}?",
        "Where does {s} work?",
        "What is the employer of {s}?",
        "At which place does {s} have a job?",
        "{s} works at {v}.",
        "The employer of {s} is {v}.",
        "{s} has a job at {v}.",
        "{v} is the employer of {s}.",
    ),
    "birth year": (
        "When was {s} born?",
        "In which year was {s} born?",
        "What is the birth year of {s}?",
        "Which year saw the birth of {s}?",
        "{s} was born in {v}.",
        "The birth year of {s} is {v}.",
        "{s} came into the world in {v}.",
        "{v} is the year in which {s} was born.",
    ),
    "instrument": (
        "What instrument does {s} play?",
        "Which instrument is {s} able to play?",
        "What does {s} play in the band?",
        "What is the instrument of {s}?",
        "{s} plays the {v}.",
        "The instrument of {s} is the {v}.",
        "In the band {s} plays the {v}.",
        "The {v} is the instrument of {s}.",
    ),
    "pet": (
        "What pet does {s} have?",
        "What animal lives with {s}?",
        "Which pet does {s} keep at home?",
        "What kind of animal does {s} own?",
        "{s} has a {v}.",
        "The pet of {s} is a {v}.",
        "At home {s} keeps a {v}.",
        "A {v} is the pet of {s}.",
    ),
    "land": (
        "In which land does {s} lie?",
        "What land is {s} in?",
        "To which land does {s} belong?",
        "Which land is the town of {s} part of?",
        "{s} lies in {v}.",
        "The town of {s} belongs to {v}.",
        "{s} is a town in {v}.",
        "{v} is the land in which {s} lies.",
    ),
    "river": (
        "Which river flows through {s}?",
        "On what river does {s} stand?",
        "What is the river of {s} called?",
        "What river do the people of {s} see?",
        "{s} stands on the {v}.",
        "The river of {s} is the {v}.",
        "Through {s} flows the {v}.",
        "The {v} is the river of {s}.",
    ),
    "dish": (
        "What dish is {s} known for?",
        "What do people in {s} like to eat?",
        "What is the dish of {s}?",
        "Which food is cooked in {s}?",
        "{s} is known for {v}.",
        "The dish of {s} is {v}.",
        "In {s} people like to eat {v}.",
        "{v} is the dish of {s}.",
    ),
    "mayor": (
        "Who is the mayor of {s}?",
        "Who governs {s}?",
        "What is the name of the mayor of {s}?",
        "Who leads the town of {s}?",
        "The mayor of {s} is {v}.",
        "{s} is governed by {v}.",
        "The town of {s} is led by {v}.",
        "{v} is the mayor of {s}.",
    ),
}
"""Wordings of each relation: four questions, then four statements."""

ONE_HOP: dict[str, tuple[str, ...]] = {
    "land": ("In what land does {s} live?", "Which land is the home of {s} in?"),
    "river": (
        "Which river flows through the home town of {s}?",
        "What river runs past the town where {s} lives?",
    ),
    "dish": (
        "What dish is the home town of {s} known for?",
        "Which food is cooked in the town where {s} lives?",
    ),
    "mayor": (
        "Who is the mayor of the town where {s} lives?",
        "Who governs the home town of {s}?",
    ),
}
"""Questions about the home town of a person; the key is the relation of the town."""

ALIAS_QUESTIONS: tuple[str, ...] = (
    "What other name does {s} have?",
    "By what second name is {s} known?",
)
"""Questions whose answer is the second name of `{s}`."""

WHO_IS = "Who is {v}?"
"""Question whose answer is the full name behind the second name `{v}`."""

ALIAS_STATEMENTS: tuple[str, ...] = (
    "{s} is also called {v}.",
    "The second name of {s} is {v}.",
    "{v} is another name for {s}.",
)
"""Statements that tie the second name `{v}` to the full name `{s}`."""

UNKNOWN_ANSWER = "I do not know."
