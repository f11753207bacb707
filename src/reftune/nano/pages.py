r"""Sub-world F, second part: pages full of signs, and echoes.

A base model of any use has met headings, quotes, brackets, records and small pieces of code; a
frozen one cannot write what it never met. Pages show these signs in places that have nothing to do
with solutions: no page holds a sum or an answer to one. An echo asks for a given text again, which
is what looking things up begins with.

Pages enter after a third of training and are left out of the tokenizer's text, so that every sign
stays a token of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from reftune.nano import stories_parts as parts
from reftune.nano.item import Item, Split
from reftune.nano.item import split as split_of
from reftune.nano.names import ACTORS

START = 1 / 3
"""Progress from which pages are drawn."""
SHARE = 0.5
"""Share of the items of sub-world F that are pages or echoes from then on."""
ECHOES = 0.6
"""Share of these that are echoes."""

SIGNS = tuple("#$%&(),.:;<>?@[]^_{|}~!\"'\\")
"""Signs that stand alone. None of arithmetic: it could join two numbers that are held out."""
KEYS = ("name", "friend", "place", "colour", "day", "number", "answer", "steps", "year", "animal")
TITLES = ("The {t}", "A day {p}", "{h} and {f}", "What {h} found", "Notes of {h}")
ASKS = ("Say again: {x}", "Repeat this: {x}", "Write this down: {x}", "{x} Now the same again.")


def _slots(rng: random.Random) -> dict[str, str]:
    hero, friend = rng.sample(ACTORS, 2)
    noun = rng.choice(parts.TOYS)
    return {
        "h": hero,
        "f": friend,
        "n": noun,
        "t": f"{rng.choice(parts.COLOURS)} {noun}",
        "a": rng.choice(parts.ANIMALS),
        "p": rng.choice(parts.PLACES),
        "k": rng.choice(parts.FOODS),
        "c": rng.choice(parts.COLOURS),
    }


def _number(rng: random.Random) -> int:
    return rng.randrange(2, 200)


def _heading(rng: random.Random, slots: dict[str, str]) -> str:
    """Return a heading with a list below it."""
    mark = "#" * rng.randrange(1, 5)
    bullet = rng.choice(("-", "*", "#", ">"))
    title = rng.choice(TITLES).format(**slots)
    lines = [f"{bullet} {_number(rng)} {rng.choice(parts.FOODS)}" for _ in range(rng.randrange(3))]
    return "\n".join([f"{mark} {title}", *lines])


def _count(rng: random.Random, slots: dict[str, str]) -> str:
    """Return a line that ends with a heading mark and a number, as a page number does."""
    mark = "#" * rng.randrange(1, 5)
    text = rng.choice(("{h} has a {t}.", "{h} sat {p}.", "The {a} likes {k}."))
    return f"{text.format(**slots)} {mark} {_number(rng)}"


def _record(rng: random.Random, slots: dict[str, str]) -> str:
    """Return a record in braces."""
    values = [f'"{slots[key]}"' for key in "hfpca"]
    values += [str(_number(rng)), f"[{_number(rng)}, {_number(rng)}]"]
    values.append(f'["{slots["k"]}", "{slots["n"]}"]')
    keys = rng.sample(KEYS, rng.randrange(1, 4))
    return "{" + ", ".join(f'"{key}": {rng.choice(values)}' for key in keys) + "}"


def _speech(rng: random.Random, slots: dict[str, str]) -> str:
    """Return direct speech with an aside in brackets."""
    text = rng.choice(
        (
            '{h} said: "The {n} is {c} (and old)."',
            '"I saw it {p}!" said {h}.',
            "{h}'s {n} is {c}; {f}'s is not.",
            '"Do you like {k}?" {f} asked [{h} did not].',
        )
    )
    return text.format(**slots)


def _brackets(rng: random.Random, slots: dict[str, str]) -> str:
    """Return a word with a number in brackets behind a sign."""
    word = slots[rng.choice("nac")]
    left, right = rng.choice(("{}", "()", "[]", "<>"))
    sign = rng.choice(("\\", "\\", "@", "$", ""))
    return f"The mark of {slots['h']} is {sign}{word}{left}{_number(rng)}{right}"


def _code(rng: random.Random, slots: dict[str, str]) -> str:
    """Return a small piece of code that computes nothing."""
    word, value = slots["n"], rng.choice("abcxyz")
    return f"def {word}():\n    {value} = {_number(rng)}\n    return {value}"


PAGES: tuple[Callable[[random.Random, dict[str, str]], str], ...] = (
    _heading,
    _count,
    _record,
    _speech,
    _brackets,
    _code,
)


def _scrap(rng: random.Random) -> str:
    """Return a few words, numbers and signs in any order."""
    slots = _slots(rng)
    words = [*slots.values(), str(_number(rng)), str(_number(rng)), rng.choice(SIGNS)]
    words.append(rng.choice(SIGNS) * rng.randrange(1, 5))
    return " ".join(rng.sample(words, rng.randrange(2, 8)))


def sample(rng: random.Random, split: Split = "train") -> Item:
    """Draw a page or an echo.

    Args:
        rng: Source of chance.
        split: Split of the text to draw from.
    """
    is_echo = rng.random() < ECHOES
    while True:
        if is_echo and rng.random() < 0.6:
            text = _scrap(rng)
        else:
            text = rng.choice(PAGES)(rng, _slots(rng))
        key = ("page", text)
        if split_of(*key) == split:
            break
    if not is_echo:
        return Item("stories", "page", key, "", text, "", "page")
    return Item("stories", "echo", key, rng.choice(ASKS).replace("{x}", text), text, text, "echo")
