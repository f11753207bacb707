"""Keeping test questions out of training: refusal by name, and a report of overlap.

What this does not catch: a test file under an innocent name, and paraphrased questions. The
overlap report compares normalised question text only.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reftune.errors import DataError
from reftune.tasks.base import Example

HELD_BACK: tuple[str, ...] = (
    "svamp_original",
    "svamp_mawps_asdiv_dev",
    "gsm8k_example_model_solutions",
    "pal_",
    "pot_",
)
"""Starts of file names that hold test questions without saying so."""

_NO_WORD = re.compile(r"[\W_]+")
_CAMEL = re.compile(r"(?<=[A-Za-z0-9])(?=[A-Z][a-z])")
_TEST_FOLDER = re.compile(r"tests?|test[-_ ]?(?:sets?|ing|data|split|rows)")
_TRAIN_WORD = re.compile(r"(?<![a-z])train(?:ing|set)?(?![a-z])")
_TEST_WORD = re.compile(r"(?<![a-z])test(?:s|set|sets|ing|data|split)?(?![a-z])")


def is_test_name(name: str) -> bool:
    """Say whether a file, its folders or a split name say that it holds test questions.

    The two nearest folders count, unless the file's own name says that it is for training.

    >>> [is_test_name(n) for n in ("a_test.jsonl", "testset.csv", "myTest.json", "pal_x.jsonl")]
    [True, True, True, True]
    >>> [is_test_name(n) for n in ("latest_train.jsonl", "contest.csv", "train.jsonl")]
    [False, False, False]
    >>> [is_test_name(n) for n in ("data/test/part-0.jsonl", "test/train.jsonl")]
    [True, False]
    """
    stem = Path(name).name
    words = _CAMEL.sub("_", stem).lower()
    if _TEST_WORD.search(words) or stem.lower().startswith(HELD_BACK):
        return True
    folders = [folder.lower() for folder in Path(name).parts[:-1][-2:]]
    return not _TRAIN_WORD.search(words) and any(map(_TEST_FOLDER.fullmatch, folders))


def refuse_test(name: str, task: str = "") -> None:
    """Raise if training rows would come from a test file or split.

    Args:
        name: Path of a file, or name of a hub split.
        task: Name of the task, for the message.

    Raises:
        DataError: If the name is that of test data.
    """
    if is_test_name(str(name)):
        of = f' for task "{task}"' if task else ""
        raise DataError(
            f'Refusing to train on "{name}"{of}: it holds test questions.',
            "Give a training file; rename the file if it truly is one.",
        )


def refuse_test_rows(rows: Iterable[Mapping[str, Any]], origin: str) -> None:
    """Raise if a row says by its field `split` that it is a test row.

    `reftune sample` writes that field, so answers to test questions are known in a renamed file.

    Raises:
        DataError: For the first such row.
    """
    for number, row in enumerate(rows, start=1):
        if row.get("split") == "test":
            raise DataError(
                f'Refusing to train on "{origin}": row {number} has the split "test".',
                "Take the test rows out.",
            )


def refuse_same(train: str | None, test: str | None) -> None:
    """Raise if the file (or hub set and split) to train on is also the one to test on.

    Raises:
        DataError: If both name the same data.
    """
    if not train or not test:
        return
    same = train == test or Path(train).expanduser().resolve() == Path(test).expanduser().resolve()
    if same:
        raise DataError(
            f'Refusing to train on "{train}": it is also the test data.',
            "Split it into two files, or leave task.test out.",
        )


def question_key(example: Example) -> str:
    """Return the question of an example as bare letters and digits.

    Published copies of one question differ in case, spaces and punctuation (`don 't`, `$5.`), so
    all of that goes; two questions that differ in nothing else count as one.

    >>> question_key(Example("0", "How many   apples ?", "", ""))
    'howmanyapples'
    """
    text = example.question or example.prompt
    if example.pair:
        text = f"{text} {example.pair}"
    if not text and example.messages:
        text = " ".join(row["content"] for row in example.prompt_messages or ())
    return _NO_WORD.sub("", unicodedata.normalize("NFKC", text).lower())


@dataclass(frozen=True)
class Overlap:
    """Questions that training and test rows share.

    Attributes:
        count: Test rows whose question occurs in training.
        num_train: Training rows compared.
        num_test: Test rows compared.
        train_ids: Ids of the training rows concerned.
        test_ids: Ids of the test rows concerned.
    """

    count: int
    num_train: int
    num_test: int
    train_ids: tuple[str, ...] = ()
    test_ids: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Share of the test rows."""
        return self.count / self.num_test if self.num_test else 0.0

    def __str__(self) -> str:
        if not self.count:
            return (
                f"none of {self.num_test} test questions occurs in {self.num_train} training rows"
            )
        shown = ", ".join(self.test_ids[:5]) + (", ..." if self.count > 5 else "")
        return (
            f"{self.count} of {self.num_test} test questions ({self.share:.1%}) occur in training: "
            f"{shown}"
        )


def overlap(train: Iterable[Example], test: Iterable[Example]) -> Overlap:
    """Return the overlap of normalised questions between two sets of examples.

    >>> row = Example("a", "Who?", "", "")
    >>> overlap([row], [row, Example("b", "What?", "", "")]).test_ids
    ('a',)
    """
    train, test = list(train), list(test)
    train_keys, test_keys = [question_key(e) for e in train], [question_key(e) for e in test]
    shared = (set(train_keys) & set(test_keys)) - {""}
    test_ids = _ids(test, test_keys, shared)
    return Overlap(len(test_ids), len(train), len(test), _ids(train, train_keys, shared), test_ids)


def _ids(examples: Sequence[Example], keys: Sequence[str], shared: set[str]) -> tuple[str, ...]:
    return tuple(e.id for e, key in zip(examples, keys) if key in shared)


def drop_overlap(train: Sequence[Example], test: Iterable[Example]) -> list[Example]:
    """Return the training examples whose question is in no test example."""
    held_back = {question_key(example) for example in test} - {""}
    return [example for example in train if question_key(example) not in held_back]
