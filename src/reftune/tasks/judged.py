"""Judged answers: a model's own answers with the right solution and a judgment, for NLFT.

    task: {name: judged, train: judged.jsonl, scored: {name: families, group: half}}

`reftune judge` writes such files. A row has `input` (the question), `output` (the answer that a
model gave), `judgment` (what is wrong with it; null or empty if nothing is) and `answer` (the right
solution); `instruction` (a system prompt), `gold` (the short answer) and `id` may be missing.

`scored` names the task whose test rows are scored, asked in the form that is trained, with the
instruction of the first training row; without it `task.test` is a file of `input` and `answer`.

Each answer gets two guides, other prompts to ask for it behind: `standard` shows the right
solution, `judge` (wrong answers only) the judgment. The wording of the chat prompts is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from reftune import rewards
from reftune.config.recipe import TaskSpec
from reftune.errors import DataError
from reftune.rewards import Rule
from reftune.tasks import base, guard, scored, templates
from reftune.tasks.base import Example, Split
from reftune.tasks.files import Row, place, read_rows, require, text
from reftune.tasks.scored import ScoredElsewhere

EXPERT = (
    "You are an expert. Below are a question and its standard answer. Study the standard answer, "
    "then give your own answer to the question. {instruction}"
)
"""System prompt of the guide `standard`."""
WORSE = (
    "Below are a question and a judgment of a bad answer to it. Write that bad answer: one that "
    "has just the weaknesses the judgment names. {instruction}"
)
"""System prompt of the guide `judge`."""


@dataclass(frozen=True)
class Options(scored.Options):
    """Options of judged answers."""

    chat: bool = False
    """Ask through the chat template; default is plain text by the three templates."""
    base: str = "Question: {input} Answer:"
    """Plain prompt."""
    standard: str = "Question: {input} A solution: {answer} Answer:"
    """Plain prompt that shows the right solution."""
    judge: str = "Question: {input} A remark: {judgment} Answer:"
    """Plain prompt that shows a judgment."""
    separator: str = " "
    """Text between a plain prompt and the answer."""
    answers: Literal["all", "right", "wrong"] = "all"
    """Which answers are trained on."""
    learn: Literal["output", "answer"] = "output"
    """`answer` learns the right solution instead of the model's own answer: for comparisons, with
    the objective `sft`."""
    max_new_tokens: int = 512
    """Longest answer, where `scored` does not say."""
    holdout: int = 300
    """Last training rows kept back for validation, where they are used and there is no
    task.validation (at most a tenth)."""


class Judged(ScoredElsewhere):
    """A model's own answers with right solutions and judgments, written by `reftune judge`."""

    name = "judged"
    Options: ClassVar[type] = Options

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.rule: Rule = rewards.get("numeric" if spec.reward == "exact" else spec.reward)
        if self.scored is None:
            self.max_new_tokens = self.options.max_new_tokens

    @property
    def prompt_form(self) -> str | None:
        """Prompt around a question, where it is plain."""
        if self.options.chat or "{instruction}" in self.options.base:
            return None
        return self.options.base.replace("{input}", "{prompt}")

    def cut_from_training(self, split: Split) -> bool:
        """Return whether a split is a part of the training rows."""
        return split == "validation" and not self.spec.validation

    def rows_of(self, split: Split) -> Sequence[Example]:
        """Return a split; validation rows are judged answers too."""
        if split == "test":
            return self._test_rows()
        if split == "validation" and self.spec.validation:
            return self._chosen(self._examples(self.spec.validation, split))
        train = self._given("train")
        guard.refuse_same(train, self.spec.test)
        guard.refuse_test(train, self.name)
        rows = self._chosen(self._examples(train, "train"))
        if self.spec.validation or not (split == "validation" or self.hold_out):
            return rows
        return base.hold_out(rows, self.options.holdout, split)

    def _test_rows(self) -> Sequence[Example]:
        if self.scored is not None:
            instruction = ""
            if self.spec.train:
                instruction = str(read_rows(self.spec.train)[0].get("instruction") or "")
            return [self._asked(example, instruction) for example in self.scored_rows("test")]
        return self._examples(self._given("test"), "test")

    def _given(self, split: str) -> str:
        name = getattr(self.spec, split)
        if not name:
            raise DataError(
                f"task.{split} is not given.",
                f"Set task.{split} to a file that `reftune judge` wrote"
                + (", or task.scored." if split == "test" else "."),
            )
        return name

    def _chosen(self, examples: list[Example]) -> list[Example]:
        wanted = self.options.answers
        if wanted == "all":
            return examples
        return [e for e in examples if ("judge" in e.meta["guides"]) == (wanted == "wrong")]

    def _examples(self, name: str, split: Split) -> list[Example]:
        rows = read_rows(name)
        require(rows[:1], ("input", "answer"), name)
        if split != "test":
            require(rows, ("output", "judgment"), name)
        return [self._example(row, i, name, split) for i, row in enumerate(rows)]

    def _example(self, row: Row, index: int, origin: str, split: Split) -> Example:
        solution, question = text(row, "answer", origin), text(row, "input", origin)
        output = text(row, "output", origin) if split != "test" else ""
        learned = solution if self.options.learn == "answer" else output
        if not solution.strip() or (split != "test" and not learned.strip()):
            raise DataError(
                f'{place(row, origin)}: "answer" or "output" is empty.',
                "Fill it in, or take the row out.",
            )
        row_id = str(row.get("id") or f"judged-{split}-{index}")
        gold = str(row.get("gold") or "") or self.rule.extract(solution) or solution.strip()
        guides = {"standard": self._prompt("standard", row)}
        if _judgment(row):
            guides["judge"] = self._prompt("judge", row)
        meta = {"guides": guides} if split != "test" else {}
        prompt = self._prompt("base", row)
        if isinstance(prompt, str):
            target = self.options.separator + learned.strip()
            return Example(row_id, prompt, target, gold, question, meta=meta)
        messages = (*prompt, {"role": "assistant", "content": learned.strip()})
        return Example(row_id, "", "", gold, question, messages, meta=meta)

    def _asked(self, example: Example, instruction: str) -> Example:
        """Return an example of the scored task in the form that is trained."""
        question = example.question or example.prompt
        prompt = self._prompt("base", {"instruction": instruction, "input": question})
        if isinstance(prompt, str):
            return replace(example, prompt=prompt, messages=None)
        return replace(example, prompt="", target="", messages=prompt)

    def _prompt(self, form: Literal["base", "standard", "judge"], row: Row) -> Any:
        """Return one of the three prompts of a row: a text, or chat messages."""
        fields = {
            name: str(row.get(name) or "").strip()
            for name in ("instruction", "input", "answer", "judgment")
        }
        if self.options.chat:
            return _chat(form, fields)
        filled = templates.fill(getattr(self.options, form), **fields)
        is_asked = "{instruction}" in getattr(self.options, form)
        lead = f"{fields['instruction']}\n\n" if fields["instruction"] and not is_asked else ""
        return lead + filled

    def extract_own(self, text: str) -> str | None:
        """Return the answer in a generated text, by the rule `task.reward`."""
        return self.rule.extract(text)

    def score_own(self, text: str, example: Example) -> dict[str, float]:
        """Return the accuracy by the rule `task.reward`."""
        answer = self.extract_own(text)
        right = answer is not None and self.rule.matches(answer, example.answer)
        return {self.metric: float(right)}


def _judgment(row: Row) -> str:
    return str(row.get("judgment") or "").strip()


def _chat(form: str, fields: dict[str, str]) -> tuple[dict[str, str], ...]:
    """Return the messages of a prompt: an instruction, the question, and what guides."""
    forms = {
        "base": ("{instruction}", "{input}"),
        "standard": (EXPERT, "{input}\n\nStandard answer: {answer}"),
        "judge": (WORSE, "{input}\n\nJudgment: {judgment}"),
    }
    system, user = (templates.fill(part, **fields).strip() for part in forms[form])
    messages = ({"role": "system", "content": system},) if system else ()
    return (*messages, {"role": "user", "content": user})
