"""Sets of word problems: GSM8K, SVAMP, LLM-Adapters' sets, MathQA, ASDiv, GSM-Hard, Math-10K."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from reftune.errors import DataError
from reftune.tasks.base import Example, Split
from reftune.tasks.sources import Hub, Source
from reftune.tasks.word_problems import MATH_10K, SUPPLY, Options, WordProblems


class Gsm8k(WordProblems):
    """GSM8K; validation = last 300 training rows."""

    name = "gsm8k"
    preferred: ClassVar[dict] = {
        ("train", "reinforced"): ("mwp_reft_gsm8k_nl", "gsm8k_nl"),
        ("train", "program"): ("mwp_reft_gsm8k_python_sdp", "gsm8k_python_sdp"),
    }
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
    preferred = Gsm8k.preferred
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
    preferred: ClassVar[dict] = {
        ("test", "alpaca"): ("llm_adapters_svamp_test", "SVAMP/test"),
        ("train", "program"): ("mwp_reft_svamp_python_sdp", "svamp_python_sdp"),
    }
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
        "train": Source((*train, *MATH_10K), None, SUPPLY),
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
        "train": Source(("aqua_train", *MATH_10K), Hub("deepmind/aqua_rat", "raw"), SUPPLY),
        "test": Source(
            ("llm_adapters_aqua_test", "AQuA/test", "aqua_test"),
            Hub("deepmind/aqua_rat", "raw", "test"),
        ),
    }


class MathQa(WordProblems):
    """MathQA with options: LLM-Adapters' test (2,985, A-E); reinforced and program 1,605, a-e."""

    name = "mathqa"
    template = "alpaca"
    preferred: ClassVar[dict] = {
        ("test", "reinforced"): ("mwp_reft_mathqa_test_set", "mathqa_test_set"),
        ("test", "program"): ("mwp_reft_mathqa_test_set", "mathqa_test_set"),
        ("train", "program"): ("mwp_reft_mathqa_python_sdp", "mathqa_python_sdp"),
    }
    sources: ClassVar[dict[str, Source]] = {
        "train": Source(
            ("mwp_reft_mathqa_nl", "mathqa_nl", "mathqa_train", *MATH_10K),
            Hub("swiss-ai/math_qa"),
            SUPPLY,
        ),
        "test": Source(
            ("llm_adapters_mathqa_test", "mathqa/test", "mwp_reft_mathqa_test_set", "mathqa_test"),
            Hub("swiss-ai/math_qa", None, "test"),
        ),
    }


class MathQaNumeric(WordProblems):
    """MathQA without options, numbers as answers (1,605)."""

    name = "mathqa_numeric"
    preferred: ClassVar[dict] = {
        ("train", "program"): ("mwp_reft_mathqa-numeric_python_sdp", "mathqa-numeric_python_sdp")
    }
    sources: ClassVar[dict[str, Source]] = {
        "train": Source(
            ("mwp_reft_mathqa-numeric_nl", "mathqa-numeric_nl", "mathqa_numeric_train", *MATH_10K),
            None,
            SUPPLY,
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
        "train": Source(("asdiv_train", *MATH_10K), None, SUPPLY),
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
    sources: ClassVar[dict[str, Source]] = {"train": Source(MATH_10K, None, SUPPLY)}

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
