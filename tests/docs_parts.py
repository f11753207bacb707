"""The documentation in pieces: fenced blocks, commands, links, headings; texts of the code."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = {ROOT / "docs" / "results.md", ROOT / "docs" / "results.json"}
"""Written by commands of the project; links to them are right before they are there."""
NEEDS = re.compile(r"<!--\s*(needs|extra):\s*(\w+)\s*-->")
FENCE = re.compile(r"^\s*```(\w*)\s*$")
ENDS = ("|", "||", "&", "&&", ";")
REDIRECTIONS = (">", ">>", "<", "2>")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: The file.
        line: Line of its first line of text, from 1.
        language: What stands behind the fence.
        text: Its text.
        needs: What a comment before it says it needs; then it is only parsed.
        extra: A package that a comment before it names; it runs where that is installed.
    """

    page: Path
    line: int
    language: str
    text: str
    needs: str = ""
    extra: str = ""

    @property
    def runs(self) -> bool:
        """Whether it can run here."""
        return not self.needs and (not self.extra or find_spec(self.extra) is not None)

    @property
    def place(self) -> str:
        """Name for the test's id."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a shell block, without pipes and redirections.

    Attributes:
        place: Page and line.
        words: The command.
        runs: Whether the tests run it; on pages that commands write they only read it.
    """

    place: str
    words: tuple[str, ...]
    runs: bool = True

    def __str__(self) -> str:
        return f"{self.place} {shlex.join(self.words)}"


@cache
def blocks(language: str) -> tuple[Block, ...]:
    """Return all blocks of a language."""
    return tuple(block for page in PAGES for block in _read(page) if block.language == language)


def _read(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    opened, last = 0, ""
    language, marks = "", {}
    for number, line in enumerate(lines, 1):
        fence = FENCE.match(line)
        if fence and not opened:
            found = NEEDS.search(last)
            opened, language = number + 1, fence[1]
            marks = {found[1]: found[2]} if found else {}
        elif fence:
            text = "\n".join(lines[opened - 1 : number - 1])
            yield Block(page, opened, language, text + "\n", **marks)
            opened = 0
        last = line or last
    assert not opened, f"{page}: the block that begins before line {opened} is not closed"


@cache
def commands() -> tuple[Command, ...]:
    """Return every command of the shell blocks."""
    found = []
    for block in blocks("bash"):
        text = block.text.replace("\\\n", "  ")
        for offset, line in enumerate(text.splitlines()):
            place = f"{block.page.relative_to(ROOT)}:{block.line + offset}"
            runs = block.runs and block.page not in GENERATED
            found += [Command(place, words, runs) for words in _commands(line)]
    return tuple(found)


def _commands(line: str) -> Iterator[tuple[str, ...]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    skipped = False
    for word in [*lexer, ";"]:
        if word in ENDS:
            if words:
                yield tuple(words)
            words = []
        elif word in REDIRECTIONS or skipped:
            skipped = not skipped
        elif words or not re.fullmatch(r"[A-Z_]+=.*", word):
            words.append(word.removeprefix(".venv/bin/"))


def prose(page: Path) -> str:
    """Return the text of a page without its blocks."""
    return re.sub(r"^\s*```.*?^\s*```", "", page.read_text("utf-8"), flags=re.M | re.S)


def links(page: Path) -> list[str]:
    """Return the targets of links to files and sections."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


@cache
def anchors(page: Path) -> frozenset[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ +(.+)$", prose(page), re.M)
    plain = (re.sub(r"[^\w\- ]", "", head.strip()).lower() for head in heads)
    return frozenset(head.replace(" ", "-") for head in plain)


@cache
def messages() -> tuple[str, ...]:
    """Return all texts in the package, with … for values."""
    found = []
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant | ast.JoinedStr):
                found.append(_text(node))
    return tuple(text for text in found if len(text) > 4)


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return "".join(str(part) for part in parts)


def is_message(line: str) -> bool:
    """Return whether a line of the errors page is a text in the package."""
    parts = [part for part in line.split("…") if part]
    return any(_in_order(parts, text) for text in messages())


def _in_order(parts: list[str], text: str) -> bool:
    """Return whether the parts stand in the text one after the other."""
    start = 0
    for part in parts:
        found = text.find(part, start)
        if found < 0:
            return False
        start = found + len(part)
    return True
