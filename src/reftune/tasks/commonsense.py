"""The eight commonsense sets in the form of Commonsense-170K (LLM-Adapters).

Prompt: the instruction (question, options, `Answer format: a/b`) and a line break. Target:
`the correct answer is ` and the label. Greedy text is right if all that follows the first
trigger equals the label; a missing trigger is wrong. BoolQ comes without its passage here; see
`boolq_passage`.

Rows of the original sets (from the hub) are brought into this form.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from reftune.errors import DataError
from reftune.rewards.exact import COMMONSENSE, TRIGGER
from reftune.tasks import benchmark
from reftune.tasks.base import Example, Split
from reftune.tasks.benchmark import Benchmark
from reftune.tasks.files import Row, place, text
from reftune.tasks.math import by_set
from reftune.tasks.sources import Hub, Rows, Source

log = logging.getLogger(__name__)

_FORMAT = "Answer format: "


def _choose(question: str, options: Sequence[str], word: str = "answer") -> str:
    labels = [f"{word}{i}" for i in range(1, len(options) + 1)]
    listed = " ".join(f"{label.capitalize()}: {option}" for label, option in zip(labels, options))
    return f"{question}\n\n{listed}\n\n{_FORMAT}{'/'.join(labels)}"


def _boolq(row: Row) -> tuple[str, str]:
    question = row["question"].rstrip("?")
    instruction = (
        f"Please answer the following question with true or false, question: {question}?\n\n"
        f"{_FORMAT}true/false"
    )
    return instruction, str(row["answer"]).lower()


def _piqa(row: Row) -> tuple[str, str]:
    instruction = (
        f"Please choose the correct solution to the question: {row['goal']}\n\n"
        f"Solution1: {row['sol1']}\n\nSolution2: {row['sol2']}\n\n{_FORMAT}solution1/solution2"
    )
    return instruction, f"solution{int(row['label']) + 1}"


def _siqa(row: Row) -> tuple[str, str]:
    question = f"Please choose the correct answer to the question: {row['context']} "
    options = [row["answerA"], row["answerB"], row["answerC"]]
    return _choose(question + row["question"], options), f"answer{int(row['label'])}"


def _hellaswag(row: Row) -> tuple[str, str]:
    start = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b']}".rstrip()
    question = f"Please choose the correct ending to complete the given sentence: {start}"
    return _choose(question, row["endings"], "ending"), f"ending{int(row['label']) + 1}"


def _winogrande(row: Row) -> tuple[str, str]:
    instruction = (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{row['sentence']}\n\nOption1: {row['option1']} Option2: {row['option2']} "
        f"{_FORMAT}option1/option2"
    )
    return instruction, f"option{int(row['answer'])}"


def _science(row: Row) -> tuple[str, str]:
    """ARC and OpenBookQA: lettered or numbered options under `choices`."""
    stem = row.get("question") or row["question_stem"]
    options, labels = row["choices"]["text"], list(row["choices"]["label"])
    right = labels.index(row["answerKey"]) + 1
    question = f"Please choose the correct answer to the question: {stem}"
    return _choose(question, options), f"answer{right}"


class Commonsense(Benchmark):
    """One set in Commonsense-170K form."""

    kind = "choice"
    max_new_tokens = 32
    build: ClassVar[Callable[[Row], tuple[str, str]]]

    def example(self, row: Row, index: int, rows: Rows, split: Split) -> Example:
        """Return a row, in LLM-Adapters form or that of the original set."""
        instruction, answer = self._read(row, rows.origin)
        labels = tuple(instruction.rpartition(_FORMAT)[2].strip().split("/"))
        if answer not in labels:
            raise DataError(
                f'{place(row, rows.origin)}: the answer "{answer}" is none of {", ".join(labels)}.',
                "Mend or drop this row.",
            )
        return Example(
            id=f"{self.name}-{split}-{index}",
            prompt=f"{instruction}\n",
            target=f"{TRIGGER}{answer}",
            answer=answer,
            question=instruction,
            choices=tuple(f"{TRIGGER}{label}" for label in labels),
            label=labels.index(answer),
            meta={"set": self.name},
        )

    def _read(self, row: Row, origin: str) -> tuple[str, str]:
        if "instruction" in row:
            return text(row, "instruction", origin), text(row, "answer", origin).strip()
        try:
            return type(self).build(row)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f'{place(row, origin)}: not a row of "{self.name}" '
                f"({type(error).__name__}: {error}).",
                "Rows have instruction and answer, or the fields of the original set.",
            ) from error

    def extract(self, text: str, example: Example) -> str | None:
        """Return the text after the first `the correct answer is `, or None."""
        return COMMONSENSE.extract(text)

    def score(self, text: str, example: Example) -> dict[str, float]:
        """Return the accuracy of one generated text."""
        return {"accuracy": COMMONSENSE.reward(text, example.answer)}


def _sources(
    name: str, folder: str, train: Hub, test: Hub, extra: tuple[str, ...] = ()
) -> dict[str, Source]:
    note = f"LLM-Adapters publishes dataset/{folder}/train.json and test.json."
    return {
        "train": Source((f"{name}_train", *extra, f"{folder}/train"), train, note),
        "test": Source((f"{name}_test", f"{folder}/test"), test, note),
    }


class BoolQ(Commonsense):
    """BoolQ without passage: yes/no questions from memory (9,427 / 3,270)."""

    name = "boolq"
    build = staticmethod(_boolq)
    sources: ClassVar[dict[str, Source]] = _sources(
        "boolq", "boolq", Hub("google/boolq"), Hub("google/boolq", None, "validation")
    )


class Piqa(Commonsense):
    """PIQA: everyday physics, two solutions (16,113 / 1,838)."""

    name = "piqa"
    build = staticmethod(_piqa)
    sources: ClassVar[dict[str, Source]] = _sources(
        "piqa", "piqa", Hub("baber/piqa"), Hub("baber/piqa", None, "validation")
    )


_PARQUET = "refs/convert/parquet"


class Siqa(Commonsense):
    """Social IQa: three answers about people (33,410 / 1,954)."""

    name = "siqa"
    build = staticmethod(_siqa)
    sources: ClassVar[dict[str, Source]] = _sources(
        "social_i_qa",
        "social_i_qa",
        Hub("allenai/social_i_qa", None, "train", _PARQUET),
        Hub("allenai/social_i_qa", None, "validation", _PARQUET),
        ("siqa_train",),
    )


class HellaSwag(Commonsense):
    """HellaSwag: four endings (39,905 / 10,042)."""

    name = "hellaswag"
    build = staticmethod(_hellaswag)
    sources: ClassVar[dict[str, Source]] = _sources(
        "hellaswag",
        "hellaswag",
        Hub("Rowan/hellaswag"),
        Hub("Rowan/hellaswag", None, "validation"),
        ("hellaswag_4k_train",),
    )


class WinoGrande(Commonsense):
    """WinoGrande XL: which name fills the blank (40,398 / 1,267)."""

    name = "winogrande"
    build = staticmethod(_winogrande)
    sources: ClassVar[dict[str, Source]] = _sources(
        "winogrande",
        "winogrande",
        Hub("allenai/winogrande", "winogrande_xl"),
        Hub("allenai/winogrande", "winogrande_xl", "validation"),
    )


class ArcEasy(Commonsense):
    """ARC-Easy: school science (2,251 / 2,376)."""

    name = "arc_easy"
    build = staticmethod(_science)
    sources: ClassVar[dict[str, Source]] = _sources(
        "arc_easy",
        "ARC-Easy",
        Hub("allenai/ai2_arc", "ARC-Easy"),
        Hub("allenai/ai2_arc", "ARC-Easy", "test"),
    )


class ArcChallenge(Commonsense):
    """ARC-Challenge: harder school science (1,119 / 1,172)."""

    name = "arc_challenge"
    build = staticmethod(_science)
    sources: ClassVar[dict[str, Source]] = _sources(
        "arc_challenge",
        "ARC-Challenge",
        Hub("allenai/ai2_arc", "ARC-Challenge"),
        Hub("allenai/ai2_arc", "ARC-Challenge", "test"),
    )


class Obqa(Commonsense):
    """OpenBookQA: elementary science, four answers (4,957 / 500)."""

    name = "obqa"
    build = staticmethod(_science)
    sources: ClassVar[dict[str, Source]] = _sources(
        "openbookqa",
        "openbookqa",
        Hub("allenai/openbookqa", "main"),
        Hub("allenai/openbookqa", "main", "test"),
        ("obqa_train",),
    )


MEMBERS: dict[str, type[Commonsense]] = {
    task.name: task
    for task in (BoolQ, Piqa, Siqa, HellaSwag, WinoGrande, ArcEasy, ArcChallenge, Obqa)
}
"""The eight sets, in the order of published tables."""


@dataclass(frozen=True)
class MixOptions(benchmark.Options):
    """Options of the mix of all eight sets."""

    sets: tuple[str, ...] = tuple(MEMBERS)
    """Sets to train and test on."""


class Commonsense170k(Commonsense):
    """All eight sets: trains on commonsense_170k (or the training files at hand), macro average.

    A file `commonsense_170k` below `data_dir` is taken whole, whatever `options.sets` says.
    """

    name = "commonsense"
    Options: ClassVar[type] = MixOptions
    file = Source(("commonsense_170k", "commonsense_170k_train", "commonsense_15k"))

    def examples(self, split: Split) -> list[Example]:
        """Return the rows of all sets; training skips sets without a file, testing refuses."""
        unknown = [name for name in self.options.sets if name not in MEMBERS]
        if unknown:
            raise DataError(
                f"options.sets: no set {', '.join(unknown)}.", f"Known: {', '.join(MEMBERS)}."
            )
        if split == "train":
            return self._train()
        rows: list[Example] = []
        for name in self.options.sets:
            try:
                rows += self._member(name).examples(split)
            except DataError as error:
                raise DataError(
                    error.what, f"{error.remedy} Or leave {name} out of options.sets."
                ) from error
        return rows

    def _train(self) -> list[Example]:
        from reftune.tasks.files import read_rows
        from reftune.tasks.sources import find_file

        path = find_file(self.spec.data_dir, self.file.files) if self.spec.data_dir else None
        if path is not None:
            rows = Rows(read_rows(path), str(path))
            return [self.example(row, i, rows, "train") for i, row in enumerate(rows.rows)]
        examples: list[Example] = []
        for name in self.options.sets:
            try:
                examples += self._member(name).examples("train")
            except DataError as error:
                log.warning("commonsense: no training rows of %s: %s", name, error.what)
        if not examples:
            raise DataError(
                "None of the commonsense sets has training rows.",
                "Put commonsense_170k.json of LLM-Adapters into task.data_dir.",
            )
        return examples

    def _cut(self, examples: list[Example], split: Split) -> list[Example]:
        # The sets follow one another: every k-th row is kept back, so that all sets take part.
        kept_back = min(self.options.holdout, len(examples) // 10)
        every = len(examples) // kept_back if kept_back else len(examples) + 1
        held = set(range(every - 1, len(examples), every)[:kept_back])
        wanted = (i for i in range(len(examples)) if (i in held) == (split == "validation"))
        return [examples[i] for i in wanted]

    def _member(self, name: str) -> Commonsense:
        return MEMBERS[name](replace(self.spec, options={}))

    def aggregate(
        self,
        scores: Sequence[dict[str, float]],
        examples: Sequence[Example],
        predictions: Sequence[Any],
    ) -> dict[str, float]:
        """Return the accuracy of each set and their unweighted mean."""
        return by_set(scores, examples)
