"""Word problems: GSM8K, SVAMP, the LLM-Adapters sets, MathQA, ASDiv, GSM-Hard, Math-10K.

Templates (`options.template`), `\\n` literal:

| template | prompt | target | extraction |
|---|---|---|---|
| `steps` | question + `\\nAnswer the above question. First think ...` | solution, `The final answer is:  N` | last number, 1e-3 |
| `alpaca` | Alpaca form without input | model-written solution | last number, or letter |
| `reinforced` | `Question:\\n...\\nAnswer reasoning:\\n` | solution, `Therefore, the answer is: N` | all after the trigger, 0.01 |
| `native` | `Question: ... Answer:` | ` solution The answer is N.` | last number, or letter |

Options a to e keep their small letters in `reinforced` alone, where they are published so.

Not here yet: program answers.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from reftune.errors import DataError
from reftune.rewards import Rule, choice, numeric
from reftune.tasks import benchmark, templates
from reftune.tasks.base import Example, Split
from reftune.tasks.benchmark import Benchmark
from reftune.tasks.files import Row
from reftune.tasks.problems import Problem, capital_options, number, to_problem, without_marks
from reftune.tasks.sources import Hub, Rows, Source

Template = Literal["steps", "alpaca", "reinforced", "native"]
Compat = Literal["default", "reference"]

MATH_10K: tuple[str, ...] = ("math_10k", "math_10k_train", "math_1k", "pyreft_math_1k_train")
"""Files of the Math-10K training mix, or slices of it."""
_SUPPLY = "LLM-Adapters publishes math_10k.json; a slice of it serves too."
_NEW_TOKENS = {"steps": 256, "alpaca": 512, "reinforced": 400, "native": 128}


@dataclass(frozen=True)
class Options(benchmark.Options):
    """Options of word-problem tasks."""

    template: Template | None = None
    """Prompt form; default is the one the set is published with."""
    train_on: Literal["own", "math10k"] = "own"
    """Training rows: the set's own, or the Math-10K mix (published practice for LLM-Adapters)."""
    calculator: Literal["keep", "drop"] = "keep"
    """Whether GSM8K solutions keep their `<<48/2=24>>` marks (published practice)."""
    compat: Compat = "default"
    """`reference` brings back quirks of the published code: the first capital A-E anywhere, text
    with its stray spaces, a missing trigger read as the whole text."""


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

    def source(self, split: Split) -> Source | None:
        """Return the set's own source, or Math-10K for training where asked."""
        if self.options.train_on == "math10k":
            if split == "train":
                return Source(MATH_10K, None, _SUPPLY)
            if split == "validation":
                return None
        found = super().source(split)
        first = self.preferred.get((split, self.form), ())
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
        if self.form != "reinforced":
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
        return templates.fill(others.get(self.form, templates.STEPS), question=question)

    def target(self, problem: Problem, as_is: bool) -> str:
        """Return the target of a problem; `as_is`: the solution already ends in the answer."""
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

    def score(self, text: str, example: Example) -> dict[str, float]:
        """Return the accuracy of one generated text."""
        return {"accuracy": self.rule(example).reward(text, example.answer)}


class Gsm8k(WordProblems):
    """GSM8K; validation = last 300 training rows."""

    name = "gsm8k"
    preferred: ClassVar[dict] = {("train", "reinforced"): ("mwp_reft_gsm8k_nl", "gsm8k_nl")}
    sources: ClassVar[dict[str, Source]] = {
        "train": Source(("gsm8k_train", "gsm8k/train"), Hub("openai/gsm8k", "main", "train")),
        "test": Source(
            ("gsm8k_test", "mwp_reft_gsm8k_test_set", "llm_adapters_gsm8k_test", "gsm8k/test"),
            Hub("openai/gsm8k", "main", "test"),
        ),
    }


class GsmHard(WordProblems):
    """GSM-Hard: GSM8K test questions with large numbers; trains on GSM8K."""

    name = "gsm_hard"
    sources: ClassVar[dict[str, Source]] = {
        "train": Gsm8k.sources["train"],
        "test": Source(
            ("pal_gsmhardv2", "gsmhardv2", "gsm_hard", "gsm_hard_test"),
            Hub("reasoning-machines/gsm-hard", None, "train"),
        ),
    }


class Svamp(WordProblems):
    """SVAMP: trains on MAWPS + ASDiv-A with model-written solutions, tests on 1,000 challenges."""

    name = "svamp"
    # Reinforced fine-tuning's file is in lower case with split punctuation.
    preferred: ClassVar[dict] = {("test", "alpaca"): ("llm_adapters_svamp_test", "SVAMP/test")}
    sources: ClassVar[dict[str, Source]] = {
        "train": Source(
            ("mwp_reft_svamp_nl", "svamp_nl", "svamp_train", "svamp_mawps_asdiv_train"),
            None,
            "Hub copies of SVAMP split the 1,000 test problems, so their train part is refused.",
        ),
        "test": Source(
            (
                "mwp_reft_svamp_test_set",
                "svamp_test_set",
                "svamp_test",
                "svamp_original",
                "llm_adapters_svamp_test",
                "SVAMP/test",
            ),
            Hub("ChilleD/SVAMP", None, "train+test"),
        ),
    }


class Mawps(WordProblems):
    """MAWPS in the split of LLM-Adapters; its training rows give equations as solutions."""

    name = "mawps"
    template = "alpaca"
    sources: ClassVar[dict[str, Source]] = {
        "train": Source(
            ("mawps_trainset", "mawps/trainset", "mawps_train"), Hub("MU-NLPC/Calc-mawps")
        ),
        "validation": Source(
            ("mawps_validset", "mawps/validset", "mawps_validation"),
            Hub("MU-NLPC/Calc-mawps", None, "validation"),
        ),
        "test": Source(
            ("llm_adapters_mawps_test", "mawps_testset", "mawps/test", "mawps_test"),
            Hub("MU-NLPC/Calc-mawps", None, "test"),
        ),
    }


def _adapters_sources(
    name: str, folder: str, hub: Hub | None = None, train: tuple[str, ...] = ()
) -> dict[str, Source]:
    """Return the sources of a set that has a test file only and trains on Math-10K."""
    return {
        "train": Source((*train, *MATH_10K), None, _SUPPLY),
        "test": Source((f"llm_adapters_{name}_test", f"{folder}/test", f"{name}_test"), hub),
    }


class AddSub(WordProblems):
    """AddSub (395); trains on Math-10K."""

    name = "addsub"
    template = "alpaca"
    sources: ClassVar[dict[str, Source]] = _adapters_sources("addsub", "AddSub")


class MultiArith(WordProblems):
    """MultiArith (600); trains on Math-10K."""

    name = "multiarith"
    template = "alpaca"
    sources: ClassVar[dict[str, Source]] = _adapters_sources(
        "multiarith", "MultiArith", Hub("ChilleD/MultiArith", None, "train+test")
    )


class SingleEq(WordProblems):
    """SingleEq (508); trains on Math-10K."""

    name = "singleeq"
    template = "alpaca"
    sources: ClassVar[dict[str, Source]] = _adapters_sources("singleeq", "SingleEq")


class Aqua(WordProblems):
    """AQuA (254, letters A to E); trains on Math-10K, or on its own rationales from the hub."""

    name = "aqua"
    template = "alpaca"
    sources: ClassVar[dict[str, Source]] = {
        "train": Source(("aqua_train", *MATH_10K), Hub("deepmind/aqua_rat", "raw"), _SUPPLY),
        "test": Source(
            ("llm_adapters_aqua_test", "AQuA/test", "aqua_test"),
            Hub("deepmind/aqua_rat", "raw", "test"),
        ),
    }


class MathQa(WordProblems):
    """MathQA with options: LLM-Adapters' test (2,985, A-E) or, `reinforced`, 1,605 with a-e."""

    name = "mathqa"
    template = "alpaca"
    preferred: ClassVar[dict] = {
        ("test", "reinforced"): ("mwp_reft_mathqa_test_set", "mathqa_test_set")
    }
    sources: ClassVar[dict[str, Source]] = {
        "train": Source(
            ("mwp_reft_mathqa_nl", "mathqa_nl", "mathqa_train", *MATH_10K),
            Hub("swiss-ai/math_qa"),
            _SUPPLY,
        ),
        "test": Source(
            ("llm_adapters_mathqa_test", "mathqa/test", "mwp_reft_mathqa_test_set", "mathqa_test"),
            Hub("swiss-ai/math_qa", None, "test"),
        ),
    }


class MathQaNumeric(WordProblems):
    """MathQA without options, numbers as answers (1,605)."""

    name = "mathqa_numeric"
    sources: ClassVar[dict[str, Source]] = {
        "train": Source(
            ("mwp_reft_mathqa-numeric_nl", "mathqa-numeric_nl", "mathqa_numeric_train", *MATH_10K),
            None,
            _SUPPLY,
        ),
        "test": Source(
            (
                "mwp_reft_mathqa-numeric_test_set",
                "mathqa-numeric_test_set",
                "mathqa_numeric_test",
            ),
        ),
    }


class AsDiv(WordProblems):
    """ASDiv; trains on Math-10K."""

    name = "asdiv"
    sources: ClassVar[dict[str, Source]] = {
        "train": Source(("asdiv_train", *MATH_10K), None, _SUPPLY),
        "test": Source(
            ("asdiv_test", "asdiv", "ASDiv"), Hub("EleutherAI/asdiv", None, "validation")
        ),
    }


@dataclass(frozen=True)
class MixOptions(Options):
    """Options of a mix of sets."""

    sets: tuple[str, ...] = ("aqua", "gsm8k", "mawps", "svamp")
    """Sets to test on; the defaults are those whose test questions are not in Math-10K."""


class Math10k(WordProblems):
    """Math-10K: trains on the mix, tests on AQuA, GSM8K, MAWPS and SVAMP; macro average too."""

    name = "math10k"
    template = "alpaca"
    Options: ClassVar[type] = MixOptions
    sources: ClassVar[dict[str, Source]] = {"train": Source(MATH_10K, None, _SUPPLY)}

    def rows_of(self, split: Split) -> Sequence[Example]:
        """Return the mix, or the test rows of all sets one after the other."""
        if split != "test":
            return super().rows_of(split)
        unknown = [name for name in self.options.sets if name not in _MEMBERS]
        if unknown:
            raise DataError(
                f"options.sets: no set {', '.join(unknown)}.", f"Known: {', '.join(_MEMBERS)}."
            )
        rows: list[Example] = []
        for name in self.options.sets:
            rows += self._member(name).rows_of("test")
        return rows

    def examples(self, split: Split) -> list[Example]:
        """Return a split as it is; test rows are those of all sets."""
        return list(self.rows_of("test")) if split == "test" else super().examples(split)

    def _member(self, name: str) -> WordProblems:
        shared = {"template": self.form, "compat": self.options.compat}
        return _MEMBERS[name](replace(self.spec, options=shared))

    def aggregate(
        self,
        scores: Sequence[dict[str, float]],
        examples: Sequence[Example],
        predictions: Sequence[object],
    ) -> dict[str, float]:
        """Return the accuracy of each set and their unweighted mean."""
        return by_set(scores, examples)


_MEMBERS: dict[str, type[WordProblems]] = {
    task.name: task for task in (Aqua, Gsm8k, Mawps, Svamp, AddSub, MultiArith, SingleEq, MathQa)
}


def by_set(scores: Sequence[dict[str, float]], examples: Sequence[Example]) -> dict[str, float]:
    """Return the accuracy of each set (`meta["set"]`) and their mean, `macro_accuracy`.

    >>> rows = [Example(s, "", "", "", meta={"set": s[0]}) for s in ("a1", "a2", "b1")]
    >>> by_set([{"accuracy": 1.0}, {"accuracy": 0.0}, {"accuracy": 1.0}], rows)
    {'accuracy_a': 0.5, 'accuracy_b': 1.0, 'macro_accuracy': 0.75}
    """
    groups: dict[str, list[float]] = {}
    for score, example in zip(scores, examples):
        groups.setdefault(example.meta["set"], []).append(score["accuracy"])
    means = {f"accuracy_{name}": sum(values) / len(values) for name, values in groups.items()}
    if means:
        means["macro_accuracy"] = sum(means.values()) / len(means)
    return means
