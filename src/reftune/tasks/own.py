"""Your own data: a file or hub data set with prompt and completion, chat messages, or labels.

    task: {name: own, train: my.jsonl}                             # fields prompt, completion
    task: {name: own, train: my.csv, prompt: "Q: {question} A:", completion: " {reply}"}
    task: {name: own, train: chats.jsonl, messages: messages}      # chat template
    task: {name: own, train: reviews.csv, options: {text: review, label: stars}}
    task: {name: own, train: samples.jsonl, scored: {name: gsm8k}}  # of `reftune sample`

Hub sets are written `owner/name`, `owner/name:config` or `owner/name:config@split`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from reftune import rewards
from reftune.config.recipe import TaskSpec
from reftune.errors import DataError, RecipeError
from reftune.rewards import Rule
from reftune.rewards.base import after
from reftune.tasks import base, guard, programs, scored, templates
from reftune.tasks.base import Example, Kind, Split
from reftune.tasks.chats import chat_messages
from reftune.tasks.files import Row, from_json, place, require, text, value
from reftune.tasks.scored import ScoredElsewhere
from reftune.tasks.sources import Rows, names_in, read_named, required

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options(scored.Options, programs.ProgramOptions):
    """Options of your own data."""

    holdout: int = 300
    """Last training rows kept back for validation when there is no task.validation (at most a
    tenth); only where they are used."""
    drop_overlap: bool = False
    """Drop training rows whose question is also a test question."""
    drop_longer: int | None = None
    """Drop training and validation rows with more characters to learn than this."""
    separator: str = ""
    """Text between prompt and completion, such as a space or a line break."""
    trigger: str = ""
    """Generated text counts from the last of these, such as `Answer:`."""
    max_new_tokens: int = 128
    """Longest answer."""
    turns: Literal["last", "all"] = "last"
    """Chat: learn the last assistant message, or each one in turn."""
    question: str | None = None
    """Field with the bare question, by which training and scored rows are compared; default is the
    prompt."""
    subspace: str | None = None
    """Field with the edit dimensions a row trains, such as [0, 1, 2, 3]."""
    subject: str | None = None
    """Field with a text in the prompt, whose last token the position rule `subject_last` edits."""
    mask: str | None = None
    """Field with what the position rule `mask` edits: a list of texts in the prompt or of
    [start, end] character places of it."""
    text: str | None = None
    """Classification: field with the text (or a template)."""
    pair: str | None = None
    """Classification: field with the second text."""
    label: str | None = None
    """Classification: field with the class. Setting it makes the task a classification."""
    labels: tuple[str, ...] = ()
    """Classification: names of the classes in order; default is all found in training, sorted."""


class Own(ScoredElsewhere):
    """Data of the user's own."""

    name = "own"
    Options: ClassVar[type] = Options

    def __init__(self, spec: TaskSpec) -> None:
        self.kind = self.kind_of(spec.options)
        super().__init__(spec)
        if self.scored is None:
            self.max_new_tokens = self.options.max_new_tokens
        elif self.kind == "classification":
            raise RecipeError(
                "task.scored is for generated answers, and task.label makes a classification.",
                "Leave one of them out.",
            )
        self.rule: Rule = self.options.limited(rewards.get(spec.reward))
        self._labels = self.options.labels

    @classmethod
    def kind_of(cls, options: dict[str, Any]) -> Kind:
        """Return the kind: the option `label` makes it a classification."""
        return cls.kind if options.get("label") is None else "classification"

    @classmethod
    def gives(cls, options: dict[str, Any]) -> frozenset[str]:
        """Return what rows tell position rules; a class head's rows tell nothing."""
        if options.get("label") is not None:
            return frozenset()
        return frozenset(name for name in ("subject", "mask") if options.get(name))

    @property
    def prompt_form(self) -> str | None:
        """Prompt around a question: the template if it has one field, else the bare text."""
        if self.spec.messages is not None or self.kind == "classification":
            return None
        if self.scored is not None:
            return self.scored.prompt_form
        names = templates.field_names(self.spec.prompt)
        if not names:
            return "{prompt}"
        return (
            templates.fill(self.spec.prompt, **{names[0]: "{prompt}"}) if len(names) == 1 else None
        )

    def cut_from_training(self, split: Split) -> bool:
        """Return whether a split is a part of the training rows."""
        if self.scored is not None or (split == "test" and self.spec.test):
            return False
        return split in ("validation", "test") and not self.spec.validation

    @property
    def num_labels(self) -> int | None:
        """Number of classes, or None if nothing is classified or the classes are not known.

        Without `options.labels` the training data are read once to find them.
        """
        is_known = bool(self._labels or self.spec.train)
        return len(self.labels) if self.kind == "classification" and is_known else None

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes."""
        if not self._labels and self.kind == "classification":
            rows = read_named(required(self.spec.train, "train"), "train")
            found = {text(row, self.options.label, rows.origin) for row in rows.rows}
            self._labels = tuple(sorted(found))
        return self._labels

    def rows_of(self, split: Split) -> Sequence[Example]:
        """Return a split: without task.validation, rows of the scored task or training rows."""
        if split == "test":
            return self._test_rows()
        if split == "validation" and self.spec.validation:
            return self._examples(self.spec.validation, split)
        if split == "validation" and self.scored is not None:
            return self.scored_rows(split)
        train = required(self.spec.train, "train")
        guard.refuse_same(train, self.spec.test)
        guard.refuse_same(train, self.spec.validation)
        for name in names_in(train):
            guard.refuse_test(name)
        examples = self._examples(train, "train")
        if self.cut_from_training("validation") and (split != "train" or self.hold_out):
            examples = self._cut(examples, split)
        if split == "train" and self.options.drop_overlap and (self.spec.test or self.scored):
            examples = guard.drop_overlap(examples, self._test_rows())
        return examples

    def _test_rows(self) -> Sequence[Example]:
        if self.scored is not None:
            return self.scored_rows("test")
        if self.spec.test:
            return self._examples(self.spec.test, "test")
        log.warning("No task.test is given: the validation rows are scored instead.")
        return self.rows_of("validation")

    def _cut(self, examples: list[Example], split: Split) -> list[Example]:
        kept = base.hold_out(examples, self.options.holdout, split)
        if not kept:
            raise DataError(
                f"No rows are left for validation: {len(examples)} training rows, holdout "
                f"{self.options.holdout}.",
                "Give task.validation, at least 10 training rows, or a holdout above 0."
                if self.spec.test
                else "Give task.validation or task.test, or set evaluation.split: none.",
            )
        return kept

    def _examples(self, name: str, split: Split) -> list[Example]:
        rows = read_named(name, split)
        if split == "train":
            guard.refuse_test_rows(rows.rows, rows.origin)
        if self.spec.messages is None and self.kind != "classification":
            self._check_fields(rows)
        examples: list[Example] = []
        for index, row in enumerate(rows.rows):
            examples += self._of_row(row, index, rows.origin, split)
        if split != "test":
            examples = self._without_long(examples, split)
        if split == "train" and not self.spec.messages and self.kind != "classification":
            _warn_if_glued(examples)
        return examples

    def _without_long(self, examples: list[Example], split: Split) -> list[Example]:
        limit = self.options.drop_longer
        if limit is None or self.kind == "classification":
            return examples
        kept = [example for example in examples if characters_to_learn(example) <= limit]
        if len(kept) < len(examples):
            log.warning(
                "%d of %d %s rows have more than %d characters to learn: left out (drop_longer)",
                *(len(examples) - len(kept), len(examples), split, limit),
            )
        return kept

    def _check_fields(self, rows: Rows) -> None:
        wanted: list[str] = []
        for form in (self.spec.prompt, self.spec.completion, self.spec.answer):
            if form is not None:
                wanted += templates.field_names(form) or [form]
        require(rows.rows[:1], wanted, rows.origin)

    def _of_row(self, row: Row, index: int, origin: str, split: Split) -> list[Example]:
        row_id = f"own-{split}-{index}"
        if self.kind == "classification":
            return [self._classified(row, row_id, origin)]
        if self.spec.messages is not None:
            return self._chats(row, row_id, origin)
        prompt = _form(self.spec.prompt, row, origin)
        completion = _form(self.spec.completion, row, origin)
        if split == "train" and not completion.strip():
            raise DataError(
                f"{place(row, origin)}: the completion is empty, there is nothing to learn.",
                f'Fill in "{self.spec.completion}", or take the row out of the data.',
            )
        answer = _form(self.spec.answer, row, origin) if self.spec.answer else completion.strip()
        target = self.options.separator + completion
        question = self._question(row, origin) or prompt
        example = Example(row_id, prompt, target, answer, question)
        return [self._marked(self._with_subspace(example, row, origin), row, origin)]

    def _question(self, row: Row, origin: str) -> str:
        return text(row, self.options.question, origin) if self.options.question else ""

    def _with_subspace(self, example: Example, row: Row, origin: str) -> Example:
        if self.options.subspace is None:
            return example
        given = value(row, self.options.subspace, origin)
        dims = from_json(given)
        if not isinstance(dims, list) or not all(isinstance(d, int) and d >= 0 for d in dims):
            raise DataError(
                f'{place(row, origin)}: "{self.options.subspace}" is {given!r}.',
                "Give a list of dimensions such as [0, 1, 2, 3].",
            )
        return replace(example, subspace=tuple(dims))

    def _marked(self, example: Example, row: Row, origin: str) -> Example:
        """Note what position rules need: the subject, and texts or character places to edit."""
        meta = dict(example.meta)
        if self.options.subject is not None:
            meta["subject"] = text(row, self.options.subject, origin)
        if self.options.mask is not None:
            meta["mask"] = _marks(value(row, self.options.mask, origin), row, origin)
        return replace(example, meta=meta)

    def _classified(self, row: Row, row_id: str, origin: str) -> Example:
        options = self.options
        name = text(row, options.label, origin)
        if name not in self.labels:
            raise DataError(
                f'{place(row, origin)}: label "{name}" is none of {", ".join(self.labels)}.',
                "List all classes in task.options.labels.",
            )
        shown, pair = self.shown(row, origin)
        label = self.labels.index(name)
        return Example(row_id, shown, "", name, shown, label=label, pair=pair)

    def shown(self, row: Row, origin: str) -> tuple[str, str | None]:
        """Return the text, or the two texts, of a row to classify.

        Args:
            row: The row.
            origin: Where it is from, for messages.
        """
        options = self.options
        pair = text(row, options.pair, origin) if options.pair else None
        return _form(options.text or self.spec.prompt, row, origin), pair

    def _chats(self, row: Row, row_id: str, origin: str) -> list[Example]:
        messages = chat_messages(value(row, self.spec.messages, origin), place(row, origin))
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise DataError(
                f"{place(row, origin)}: no assistant message, there is nothing to learn.",
                "Add the answer as a message with role assistant, or take the row out of the data.",
            )
        chosen = turns if self.options.turns == "all" else turns[-1:]
        examples = []
        for turn in chosen:
            learned = messages[turn]["content"]
            answer = _form(self.spec.answer, row, origin) if self.spec.answer else learned
            name = f"{row_id}.{turn}" if len(chosen) > 1 else row_id
            asked = self._question(row, origin)
            seen = tuple(messages[: turn + 1])
            example = Example(name, "", "", answer.strip(), asked, seen)
            examples.append(self._marked(self._with_subspace(example, row, origin), row, origin))
        return examples

    def extract_own(self, text: str) -> str | None:
        """Return the answer in a generated text by the rule of `task.reward`."""
        if self.kind == "classification":
            return self._class_name(text)
        found = self._counted(text)
        return None if found is None else self.rule.extract(found)

    def look_ahead_own(self, texts: Sequence[str]) -> None:
        """Tell the rule of `task.reward` of texts that it will be asked of."""
        if self.rule.ahead is not None and self.kind != "classification":
            self.rule.ahead([found for text in texts if (found := self._counted(text))])

    def _counted(self, text: str) -> str | None:
        """Return the part of a text that counts."""
        return after(text, self.options.trigger) if self.options.trigger else text

    def _class_name(self, text: str) -> str:
        text = text.strip()
        is_index = text.isdigit() and text not in self.labels and int(text) < len(self.labels)
        return self.labels[int(text)] if is_index else text

    def score_own(self, text: str, example: Example) -> dict[str, float]:
        """Return the accuracy of one generated text, or of one predicted class."""
        answer = self.extract_own(text)
        if self.kind == "classification":
            return {self.metric: float(answer == example.answer)}
        right = answer is not None and self.rule.matches(answer, example.answer)
        return {self.metric: float(right)}


def characters_to_learn(example: Example) -> int:
    """Return the length of the text a row teaches, in characters."""
    return len(example.solution)


def _marks(given: Any, row: Row, origin: str) -> tuple[str | tuple[int, int], ...]:
    """Return the texts and character places of a mask field."""
    marks = from_json(given)
    marks = marks if isinstance(marks, list) else [marks]
    found: list[str | tuple[int, int]] = []
    for mark in marks:
        is_pair = isinstance(mark, list) and len(mark) == 2 and all(type(i) is int for i in mark)
        if not is_pair and not (isinstance(mark, str) and mark):
            raise DataError(
                f"{place(row, origin)}: the mask {mark!r} is neither a text nor [start, end].",
                'Give a list such as ["Paris"] or [[0, 5]], counted in characters of the prompt.',
            )
        found.append(tuple(mark) if is_pair else mark)
    return tuple(found)


def _form(form: str, row: Row, origin: str) -> str:
    """Return a field of a row, or a template filled from it."""
    if templates.field_names(form):
        return templates.fill_row(form, row, place(row, origin))
    return text(row, form, origin)


def _warn_if_glued(examples: Sequence[Example]) -> None:
    for example in examples:
        last, first = example.prompt[-1:], example.target[:1]
        if last and first and not last.isspace() and not first.isspace():
            log.warning(
                "Prompt and completion meet without a space in row %s (...%s|%s...). If that is "
                'not meant, set task.options.separator: " ".',
                example.id,
                example.prompt[-10:],
                example.target[:10],
            )
            return
