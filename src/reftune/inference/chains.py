"""Error accumulation: is a step right when the steps before it are right, and when one is wrong?

    right:  P(step j right | gold steps 1 ... j−1 shown)
    wrong:  the number that step j goes on from is replaced by a near wrong one, and what comes from
            it is computed anew; the next equation of the model is then
            consistent  if its result follows from the wrong number,
            recovered   if it is the true one nevertheless,
            lost        otherwise, or if there is no equation.

BREP (Liang et al. 2025) holds that perturbed numbers add up along the chain. A model can fail a
step because it computes wrongly or because it plans another step: `true_equation` counts equations
that hold in themselves, whatever they are about. What is shown is the reference solution of the
row, in tokens as in training; the model writes on greedily, and the first of its equations is read
that does not repeat one that is shown.

Left out on purpose: other orders of the steps (a right one counts as wrong at the step where it
differs), several wrong numbers, and steps whose result is no whole number as the wrong one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from reftune.inference.continuing import WRITERS, Start, Writer, Written
from reftune.inference.stats import PairedTest, mcnemar
from reftune.inference.steps import Step, shown_until, steps_of, wrong_chain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftune.inference.study import Study
    from reftune.report.model import Figure
    from reftune.tasks.base import Example

Outcome = Literal["consistent", "recovered", "lost"]
OUTCOMES: tuple[Outcome, ...] = ("consistent", "recovered", "lost")
_MORE, _SPARE, _ROUND = 2, 16, 32
"""A step may take this many times the tokens of the gold one and as many more, rounded up so that
rows share batches."""


@dataclass(frozen=True)
class StepFigures:
    """One step of the chain, over all rows that have it.

    Attributes:
        step: Its number, from 1.
        rows: Rows with this step.
        right: Share that is right after right steps, by writer.
        true_equation: Share whose equation holds in itself.
        test: Adapter minus base, right after right steps.
        wrong_rows: Rows in which the number it goes on from could be made wrong.
        wrong: Share of each outcome after a wrong number, by writer.
        wrong_test: Adapter minus base, consistent after a wrong number; None without such rows.
    """

    step: int
    rows: int
    right: dict[Writer, Figure]
    true_equation: dict[Writer, Figure]
    test: PairedTest
    wrong_rows: int
    wrong: dict[Outcome, dict[Writer, Figure]]
    wrong_test: PairedTest | None


@dataclass(frozen=True)
class ErrorAccumulation:
    """How right and wrong steps follow from one another.

    Attributes:
        rows: Rows whose solution has steps.
        without: Rows whose solution has none.
        too_long: Steps that did not fit into the context behind what is shown.
        steps: One entry a step.
        answers: What was shown and written, to be read.
    """

    rows: int
    without: int
    too_long: int
    steps: list[StepFigures]
    answers: list[dict[str, Any]] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Trial:
    """One step to be written.

    Attributes:
        example: Id of the row.
        step: Number of the step, from 1.
        start: Prompt and shown solution in tokens.
        shown: Shown solution; its last characters that belong to a token of what follows excluded.
        begun: What the last shown token holds of what follows.
        right: Result of the gold step.
        followed: Result that follows from the wrong number; None where all that is shown is right.
    """

    example: str
    step: int
    start: Start
    shown: str
    begun: str
    right: Fraction
    followed: Fraction | None = None


def error_accumulation(study: Study) -> ErrorAccumulation | str:
    """Let base and adapter write each step of the solutions, after right and after wrong ones.

    Args:
        study: Model, task and rows.

    Returns:
        The figures, or in words why there are none.
    """
    solutions = [_solution(study, example) for example in study.examples]
    if not any(solutions):
        return "These rows bring no worked solutions; those of another split may."
    told = [steps_of(solution) for solution in solutions]
    if not any(told):
        return (
            "No solution of these rows has steps that can be read, equations such as "
            "`47 + 38 = 85`; those of another split may."
        )
    trials = [
        trial
        for example, start, solution, steps in zip(
            study.examples, study.starts, solutions, told, strict=True
        )
        for trial in _trials(study, example, start, solution, steps)
    ]
    fitting = [trial for trial in trials if trial.start.budget > 0]
    if not fitting:
        return "No step fits into the model's context behind its prompt."
    read = {
        who: [
            _read(study, trial, written)
            for trial, written in zip(
                fitting,
                study.write(who, [t.start for t in fitting], f"steps of the {who}"),
                strict=True,
            )
        ]
        for who in WRITERS
    }
    numbers = sorted({trial.step for trial in fitting if trial.followed is None})
    return ErrorAccumulation(
        rows=sum(map(bool, told)),
        without=sum(not steps for steps in told),
        too_long=len(trials) - len(fitting),
        steps=[_figures(study, number, fitting, read) for number in numbers],
        answers=[_to_read(who, *pair) for who in WRITERS for pair in zip(fitting, read[who])],
    )


def _solution(study: Study, example: Example) -> str:
    """Return the text to learn of a row, as training sees it; empty if there is none."""
    from reftune.tasks.texts import EmptyTargetError, frame, texts

    try:
        return texts(example, study.tokenizer, frame(study.tokenizer))[1]
    except EmptyTargetError:
        return ""


def _trials(
    study: Study, example: Example, start: Start, solution: str, steps: Sequence[Step]
) -> list[Trial]:
    """Return what is asked of one row: each step after right ones, and after a wrong number."""
    found = []
    for place, step in enumerate(steps):
        cut = shown_until(solution, steps, place)
        length = step.end - cut
        right = step.result.value
        at = (example.id, place + 1)
        found.append(Trial(*at, *_shown(study, start, solution, cut, length), right))
        seed = (study.seed, *at)
        chain = wrong_chain(solution, example.question or example.prompt, place, seed)
        if chain is not None:
            parts = _shown(study, start, chain.text, chain.cut, length)
            found.append(Trial(*at, *parts, right, chain.followed))
    return found


def _shown(study: Study, start: Start, text: str, cut: int, length: int) -> tuple[Start, str, str]:
    """Return the start for a solution shown up to `cut`, with room for a step of `length`.

    The text is split into tokens as a whole, and shown to the end of the token in which it is cut.
    """
    from reftune.inference.prompts import context_len
    from reftune.tasks.texts import marked_tokens

    ids = study.tokenizer(text, add_special_tokens=False)["input_ids"]
    count = sum(marked_tokens(study.tokenizer, text, [(0, cut)], "A solution")) if cut else 0
    upto = sum(marked_tokens(study.tokenizer, text, [(0, min(cut + length, len(text)))], "A step"))
    budget = math.ceil((_MORE * (upto - count) + _SPARE) / _ROUND) * _ROUND
    limit = context_len(study.model)
    if limit is not None:
        budget = min(budget, limit - len(start.prompt.ids) - count)
    begun = _behind(study.tokenizer, text, cut, count)
    return replace(start, given=tuple(ids[:count]), budget=budget), text[:cut], begun


def _behind(tokenizer: PreTrainedTokenizerBase, text: str, cut: int, count: int) -> str:
    """Return what the first `count` tokens of a text hold behind character `cut`."""
    if not count:
        return ""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return text[cut : offsets["offset_mapping"][count - 1][1]]


@dataclass(frozen=True)
class Reading:
    """What a model wrote for a step.

    Attributes:
        text: Its text.
        step: The first equation in it that was not shown, or None.
        outcome: After a wrong number, else None.
        is_right: Whether the result is that of the gold step.
    """

    text: str
    step: Step | None
    outcome: Outcome | None
    is_right: bool


def _read(study: Study, trial: Trial, written: Written) -> Reading:
    from reftune.inference.decoding import decode

    text = trial.begun + decode(study.tokenizer, written.ids)
    known = [step.left for step in steps_of(trial.shown)]
    step = next((step for step in steps_of(text) if step.left not in known), None)
    if step is not None and step.end == len(text) and not written.ended:
        step = None  # its last number may go on
    result = None if step is None else step.result.value
    outcome: Outcome | None = None
    if trial.followed is not None:
        named: dict[Fraction | None, Outcome] = {
            trial.right: "recovered",
            trial.followed: "consistent",
        }
        outcome = named.get(result, "lost")
    return Reading(text, step, outcome, result == trial.right)


def _figures(
    study: Study, number: int, trials: Sequence[Trial], read: dict[Writer, list[Reading]]
) -> StepFigures:
    """Return the figures of one step."""
    here = [i for i, t in enumerate(trials) if t.step == number]
    plain = [i for i in here if trials[i].followed is None]
    wrong = [i for i in here if trials[i].followed is not None]
    right = {who: [read[who][i].is_right for i in plain] for who in WRITERS}
    true = {who: [_is_true(read[who][i]) for i in plain] for who in WRITERS}
    outcomes = {who: [read[who][i].outcome for i in wrong] for who in WRITERS}
    follows = {who: [outcome == "consistent" for outcome in outcomes[who]] for who in WRITERS}
    return StepFigures(
        step=number,
        rows=len(plain),
        right={who: study.share(right[who]) for who in WRITERS},
        true_equation={who: study.share(true[who]) for who in WRITERS},
        test=mcnemar(right["adapter"], right["base"], study.level),
        wrong_rows=len(wrong),
        wrong={
            kind: {who: study.share([o == kind for o in outcomes[who]]) for who in WRITERS}
            for kind in OUTCOMES
        },
        wrong_test=mcnemar(follows["adapter"], follows["base"], study.level) if wrong else None,
    )


def _is_true(reading: Reading) -> bool:
    return reading.step is not None and reading.step.is_true


def _to_read(who: Writer, trial: Trial, reading: Reading) -> dict[str, Any]:
    return {
        "part": "errors",
        "writer": who,
        "id": trial.example,
        "step": trial.step,
        "shown": trial.shown,
        "text": reading.text,
        "result": None if reading.step is None else str(reading.step.result.value),
        "right": str(trial.right),
        "followed": None if trial.followed is None else str(trial.followed),
        "outcome": reading.outcome or ("right" if reading.is_right else "wrong"),
    }
