"""Invented names of sub-world B, built from syllables.

Every pool is drawn by keyed hash from a grid of syllables, so the names are the same in every
process and Python version. What the grids hold beyond the drawn names is the open stock of
*unknown* names, about which the model is taught to say `I do not know.`
"""

from __future__ import annotations

import random
from functools import cache
from itertools import product

from reftune.nano.item import Split, fraction, split

_ONSETS = ("B", "D", "F", "G", "H", "J", "K", "L", "M", "N", "P", "R", "S", "T", "V", "Z")
_WIDE = (*_ONSETS, "Br", "Dr", "Gr", "Kr", "Pr", "Sk", "St", "Tr")
_VOWELS = ("a", "e", "i", "o", "u")

# Clusters and endings are odd on purpose: no common first name or English word should come out.
_FIRST = (
    _ONSETS,
    _VOWELS,
    ("lv", "rk", "vr", "sk", "mb", "rv", "lk", "rz"),
    ("a", "el", "in", "o"),
)
_LAST = (
    _WIDE,
    _VOWELS,
    ("l", "n", "r", "s", "v", "z"),
    (
        "dane",
        "gard",
        "holt",
        "mark",
        "moor",
        "pell",
        "quin",
        "rell",
        "stow",
        "tash",
        "vane",
        "wick",
    ),
)
_NICK = (_ONSETS, _VOWELS, ("bb", "dd", "ff", "pp", "vv", "zz"), ("o", "im", "ow", "us"))
_TOWN = (
    _WIDE,
    _VOWELS,
    ("ld", "lt", "nd", "sk", "th", "v"),
    ("by", "combe", "fell", "mere", "stead", "wold"),
)
_GRIDS = {"first": _FIRST, "last": _LAST, "nick": _NICK, "town": _TOWN}
_PARTS = tuple(_GRIDS)

_AVOIDED = (
    "Kelvin Melvin Calvin Silva Selva Salvo Larva Kurva Kurka Kurvo Bambo Mambo Rambo Sambo Jumbo "
    "Gumbo Limbo Bimbo Bimba Dumbo Tumbo Mamba Samba Rumba Zumba Tomba Pumba Zombo Zambo Mumbo "
    "Disko Fisko Rusko Polka Silkin Milko Firkin Jerkin Merkin Perkin Larkin Harkin Turkin Peskin "
    "Kimbel Pisso Zippo Hippo Pizzo Muddo Zeppo Boffo Buffo Happow Meddow Deppo Daddo Dobbo "
    "Bobbo Robbo Pappo Poppo Puppo Ruffus Duffus Gaddus"
)
"""Grid words that are, or look too much like, real words or names."""
_AVOID = frozenset(_AVOIDED.split())


@cache
def words(style: str) -> tuple[str, ...]:
    """Return every word of a style (`first`, `last`, `nick`, `town`), in order of keyed hash.

    >>> len(words("first")) > 2000
    True
    """
    grid = ("".join(parts) for parts in product(*_GRIDS[style]))
    kept = (word for word in grid if word not in _AVOID)
    return tuple(sorted(kept, key=lambda word: fraction("name", style, word)))


# Places in the hashed order of each style. Forgettable people (`people.py`) are set aside here,
# so that neither the facts nor the unknown names can touch them.
_FIRST_END, _FIRST_FORGET = 100, 200
_LAST_END, _MAYOR_END, _LAST_FORGET = 200, 240, 340
_NICK_END, _TOWN_END = 60, 40

FIRST_NAMES: tuple[str, ...] = words("first")[:_FIRST_END]
LAST_NAMES: tuple[str, ...] = words("last")[:_LAST_END]
MAYORS: tuple[str, ...] = words("last")[_LAST_END:_MAYOR_END]
NICKNAMES: tuple[str, ...] = words("nick")[:_NICK_END]
TOWN_NAMES: tuple[str, ...] = words("town")[:_TOWN_END]
FORGETTABLE_NAMES: tuple[str, ...] = tuple(
    f"{first} {last}"
    for first, last in zip(
        words("first")[_FIRST_END:_FIRST_FORGET],
        words("last")[_MAYOR_END:_LAST_FORGET],
        strict=True,
    )
)
"""Names of the people that only a recipe stage teaches, never the base."""

_STARTS = {"first": _FIRST_FORGET, "last": _LAST_FORGET, "nick": _NICK_END, "town": _TOWN_END}


@cache
def unknown_words(style: str, part: Split) -> tuple[str, ...]:
    """Return the words of a style that name nobody and nothing, of one split."""
    free = words(style)[_STARTS[style] :]
    return tuple(word for word in free if split("unknown", style, word) == part)


def unknown_person(rng: random.Random, part: Split) -> tuple[str, str]:
    """Return an unknown person's name and the word that decides its split.

    One in five is a single word like the second names of known people; one in five of the others
    has a known first name, so that a known first name alone is no reason to answer.
    """
    if rng.random() < 0.2:
        nick = rng.choice(unknown_words("nick", part))
        return nick, nick
    last = rng.choice(unknown_words("last", part))
    if rng.random() < 0.2:
        return f"{rng.choice(FIRST_NAMES)} {last}", last
    return f"{rng.choice(unknown_words('first', part))} {last}", last
