"""Word problems in their many forms of prompt, target and answer; the sets are in `tasks.math`.

Templates (`options.template`), `\\n` literal:

| template | prompt | target | extraction |
|---|---|---|---|
| `steps` | question + `\\nAnswer the above question. First think ...` | solution, `The final answer is:  N` | last number, 1e-3 |
| `alpaca` | Alpaca form without input | model-written solution | last number, or letter |
| `reinforced` | `Question:\\n...\\nAnswer reasoning:\\n` | solution, `Therefore, the answer is: N` | all after the trigger, 0.01 |
| `program` | the same, then `def solution():\\n` and its docstring | the rest of a program | what `solution()` returns, 0.01 |
| `native` | `Question: ... Answer:` | ` solution The answer is N.` | last number, or letter |

Options a to e keep their small letters in `reinforced` and `program`, where they are published so.
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from reftune.errors import DataError
from reftune.rewards import Rule, choice, numeric, program
from reftune.tasks import benchmark, programs, templates
from reftune.tasks.base import Example, Split
from reftune.tasks.benchmark import Benchmark
from reftune.tasks.files import Row, place
from reftune.tasks.problems import Problem, capital_options, number, to_problem, without_marks
from reftune.tasks.sources import Rows, Source

Template = Literal["steps", "alpaca", "reinforced", "program", "native"]
Compat = Literal["default", "reference"]

MATH_10K: tuple[str, ...] = ("math_10k", "math_10k_train", "math_1k", "pyreft_math_1k_train")
"""Files of the Math-10K training mix, or slices of it."""
SUPPLY = "LLM-Adapters publishes math_10k.json; a slice of it serves too."
"""What to do where it is missing."""
_NEW_TOKENS = {"steps": 256, "alpaca": 512, "reinforced": 400, "program": 400, "native": 128}
_HEAD = re.compile(
    r"^def\s+solution\s*\(\s*\)[^:\n]*:[ \t]*\n"  # its first line
    r"(?:\s*(\"\"\"|\'\'\').*?\1[ \t]*\n)?",  # its docstring, if it has one
    re.S | re.M,
)


@dataclass(frozen=True)
class Options(benchmark.Options, programs.ProgramOptions):
    """Options of word-problem tasks."""

    template: Template | None = None
    """Prompt form; default is the one the set is published with."""
    train_on: Literal["own", "math10k"] = "own"
    """Training rows: the set's own, or the Math-10K mix (published practice for LLM-Adapters)."""
    calculator: Literal["keep", "drop"] = "keep"
    """Whether GSM8K solutions keep their `<<48/2=24>>` marks (published practice)."""
    prefill: bool = True
    """Form `program`: the prompt ends in `def solution():` and a docstring with the question, in
    training and scoring alike. False: the model writes these lines too."""
    compat: Compat = "default"
    """`reference` brings back quirks of the published code: the first capital A-E anywhere, text
    with its stray spaces, a missing trigger read as the whole text, programs cut at a gap."""


class WordProblems(Benchmark):
    """A set of word problems with a number or a letter as answer."""

    Options: ClassVar[type] = Options
    template: ClassVar[Template] = "steps"
    preferred: ClassVar[dict[tuple[Split, Template], tuple[str, ...]]] = {}
    """Files to look for first in a form: those that are published in it."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.form: Template = self.options.template or type(self).template
        self.max_new_tokens = _NEW_TOKENS[self.form]
        numbers, letters = program.NUMBER, program.CHOICE
        if self.options.compat == "reference":
            numbers, letters = program.NUMBER_REFERENCE, program.CHOICE_REFERENCE
        self._programs = self.options.limited(numbers), self.options.limited(letters)

    def source(self, split: Split) -> Source | None:
        """Return the set's own source, or Math-10K for training where asked."""
        if self.options.train_on == "math10k":
            if split == "train":
                return Source(MATH_10K, None, SUPPLY)
            if split == "validation":
                return None
        found = super().source(split)
        first = self.preferred.get((split, self.form), ())
        if first and split == "train" and self.form == "program":  # no other has programs
            note = "Supply one of these files, or use another template than program."
            return replace(found, files=first, hub=None, note=note)
        return replace(found, files=(*first, *found.files)) if first else found

    def example(self, row: Row, index: int, rows: Rows, split: Split) -> Example:
        """Return a row as prompt, target and short answer."""
        problem = to_problem(row, rows.origin)
        # Solutions beside test questions are written by models and partly wrong: never shown.
        solution = "" if split == "test" else problem.solution
        if self.options.calculator == "drop":
            solution = without_marks(solution)
        if self.options.compat == "default":
            solution = solution.strip()
            problem = replace(problem, question=problem.question.strip())
        problem = replace(problem, solution=solution)
        if self.form == "program":
            problem = self._programmed(problem, row, rows.origin)
        elif self.form != "reinforced":
            problem = capital_options(problem)
        as_is = split != "test" and "instruction" in row and bool(solution)
        return Example(
            id=problem.id or f"{self.name}-{split}-{index}",
            prompt=self.prompt(problem),
            target=self.target(problem, as_is),
            answer=problem.answer,
            question=problem.question.strip(),
            meta={"set": self.name},
        )

    def _programmed(self, problem: Problem, row: Row, origin: str) -> Problem:
        """Return a problem with the program to learn: without its head where that is given."""
        solution = problem.solution
        if not solution:
            return problem
        head = _HEAD.search(solution)
        if head is None:
            raise DataError(
                f"{place(row, origin)}: the solution has no program (`def solution():`).",
                "Supply a file whose solutions are programs, or use another template.",
            )
        if not self.options.prefill:
            return problem
        if solution[: head.start()].strip():
            raise DataError(
                f"{place(row, origin)}: something stands before the program's `def solution():`.",
                "Move it inside, or set prefill: false.",
            )
        return replace(problem, solution=solution[head.end() :].rstrip())

    @property
    def prompt_form(self) -> str | None:
        """Prompt around a question."""
        return self._prompt("{prompt}")

    def prompt(self, problem: Problem) -> str:
        """Return the prompt of a problem in the chosen form."""
        return self._prompt(problem.question)

    def _prompt(self, question: str) -> str:
        if self.form == "alpaca":
            return templates.alpaca(question)
        others = {"reinforced": templates.REASONING, "native": templates.NATIVE}
        others["program"] = templates.PROGRAM if self.options.prefill else templates.REASONING
        return templates.fill(others.get(self.form, templates.STEPS), question=question)

    def target(self, problem: Problem, as_is: bool) -> str:
        """Return the target of a problem; `as_is`: the solution already ends in the answer."""
        if self.form == "program":
            return problem.solution
        lead = f"{problem.solution}\n" if problem.solution else ""
        if self.form == "reinforced":
            return f"{lead}{numeric.TRIGGER}{problem.answer}"
        written = problem.written or number(problem.answer)
        if self.form == "steps":
            # Two spaces: the published code replaces "####" in "#### N" and keeps the space.
            return f"{lead}{templates.STEPS_ANSWER} {written}"
        if self.form == "native":
            text = f"{' '.join(without_marks(problem.solution).split())} ".lstrip()
            return f" {text}" if as_is else f" {text}The answer is {written}."
        return problem.solution if as_is else f"{lead}The answer is {written}."

    def rule(self, example: Example) -> Rule:
        """Return how the answer of an example is found and compared."""
        if self.form == "program":
            return self._programs[example.answer.isalpha()]
        as_reference = self.options.compat == "reference"
        if self.form == "reinforced":
            if example.answer.isalpha():
                plain, quirk = choice.AFTER_TRIGGER, choice.AFTER_TRIGGER_REFERENCE
            else:
                plain, quirk = numeric.WHOLE_NUMBER, numeric.WHOLE_NUMBER_REFERENCE
        elif example.answer.isalpha():
            plain, quirk = choice.LETTER, choice.LETTER_REFERENCE
        else:
            plain = quirk = numeric.LAST_NUMBER
        return quirk if as_reference else plain

    def extract(self, text: str, example: Example) -> str | None:
        """Return the number or letter in a generated text, or None."""
        return self.rule(example).extract(text)

    def look_ahead(self, texts: Sequence[str], examples: Sequence[Example]) -> None:
        """Run programs of several answers at once."""
        programs.look_ahead([self.rule(example) for example in examples], texts)

    def score(self, text: str, example: Example) -> dict[str, float]:
        """Return the accuracy of one generated text."""
        return {"accuracy": self.rule(example).reward(text, example.answer)}
