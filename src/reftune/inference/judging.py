"""Judged answers for NLFT: a model answers questions, and wrong answers get a judgment.

Three judges: a rule (`judge_by_rule`), a model (`ModelJudge`, the answering one or another), and an
OpenAI-compatible chat endpoint (`EndpointJudge`). Any function of cases to texts is one too.

A judge that calls an answer right after all makes it a right answer. Left out on purpose: scores,
several judges, and asking an endpoint in parallel.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from reftune.errors import DataError, RecipeError
from reftune.inference.resuming import rows_to_file

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from reftune.inference.prompts import Prompt
    from reftune.tasks.base import Example, Task

log = logging.getLogger(__name__)

KEY = "REFTUNE_API_KEY"
"""Environment variable with the key of an endpoint, if it wants one."""
TRIES, PAUSE = 4, 1.0
"""Tries of a request that an endpoint puts off, and seconds before the second one; then doubled."""
RIGHT = "CORRECT"
"""What a judge begins with when it finds nothing wrong."""

_EQUATION = re.compile(r"(-?\d[\d,.]*)\s*([-+*/x×÷])\s*(-?\d[\d,.]*)\s*=\s*(-?\d[\d,.]*)")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
_CRITIC = (
    "A question, its right solution and an answer to judge follow. In two or three sentences say "
    "where the answer goes wrong first and what would be right there. If nothing in it is wrong, "
    f"write {RIGHT} and nothing else."
)


@dataclass(frozen=True)
class Case:
    """A wrong answer to judge.

    Attributes:
        question: The question.
        output: The answer that was given.
        solution: The right solution.
        found: The short answer in the output, or None.
        gold: The right short answer.
    """

    question: str
    output: str
    solution: str
    found: str | None
    gold: str


Judge = Callable[[Sequence[Case]], list[str]]
"""Judgments of cases, in their order; one that begins with `CORRECT` takes the case back."""
Generator = Callable[[Sequence["Prompt"], int], list[str]]
"""Answers to prompts; the number is a seed that differs from call to call."""


# Judges


def judge_by_rule(cases: Sequence[Case]) -> list[str]:
    """Name the first step that is wrong, where equations show it, and the wrong and right number.

    >>> judge_by_rule([Case("?", "6 * 7 = 43. It is 43.", "6 * 7 = 42. #### 42", "43", "42")])
    ['the first step is wrong: 6 * 7 = 43, and it is 6 * 7 = 42. The answer 43 is wrong, it is 42.']
    """
    found = []
    for case in cases:
        step = _first_wrong(case.output, case.solution)
        told = "there is no answer to be found" if case.found is None else ""
        told = told or f"the answer {case.found} is wrong"
        told = f"{step} {told[0].upper()}{told[1:]}" if step else told
        found.append(f"{told}, it is {case.gold}.")
    return found


def _first_wrong(output: str, solution: str) -> str:
    """Return a sentence on the first step of an output that is not the solution's, if any."""
    given, wanted = _steps(output), _steps(solution)
    for number, name in enumerate(_ORDINALS):
        if number >= len(given):
            return f"the {name} step is missing: {wanted[number]}." if number < len(wanted) else ""
        step = given[number]
        if wanted and number >= len(wanted):
            return f"the {name} step is one too many: {step}."
        right = wanted[number] if wanted else step.mended()
        if step != right:
            return f"the {name} step is wrong: {step}, and it is {right}."
    return ""


@dataclass(frozen=True)
class _Step:
    left: float
    operator: str
    right: float
    result: float

    def mended(self) -> _Step:
        """Return the step with the result that its operation has."""
        ways = {
            "+": lambda a, b: a + b,
            "-": lambda a, b: a - b,
            "*": lambda a, b: a * b,
            "/": lambda a, b: a / b if b else float("inf"),
        }
        right = ways[self.operator](self.left, self.right)
        return self if abs(right - self.result) < 1e-2 else replace(self, result=right)

    def __str__(self) -> str:
        return f"{self.left:g} {self.operator} {self.right:g} = {self.result:g}"


def _steps(text: str) -> list[_Step]:
    """Return the equations of a text; a repeated one counts once."""
    signs = {"x": "*", "×": "*", "÷": "/"}
    found: list[_Step] = []
    for left, operator, right, result in _EQUATION.findall(text.replace("$", "")):
        try:
            numbers = [float(part.replace(",", "").rstrip(".")) for part in (left, right, result)]
        except ValueError:  # 1.2.3
            continue
        step = _Step(numbers[0], signs.get(operator, operator), numbers[1], numbers[2])
        if step not in found:
            found.append(step)
    return found


def _asked(case: Case) -> str:
    return (
        f"{_CRITIC}\n\nQuestion: {case.question}\n\nRight solution: {case.solution}\n\n"
        f"Answer to judge: {case.output}\n\nJudgment:"
    )


class ModelJudge:
    """A language model as judge, greedily, through its chat template where it has one.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        max_new_tokens: Longest judgment.
        batch_size: Judgments made together.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int = 512,
        batch_size: int = 32,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}

    def __call__(self, cases: Sequence[Case]) -> list[str]:
        """Return the judgments of cases."""
        from reftune.inference.generate import generate

        prompts: list[Prompt] = [_asked(case) for case in cases]
        if self.tokenizer.chat_template:
            prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = generate(self.model, self.tokenizer, prompts, **self.settings)
        return [samples[0].strip() for samples in texts]


class EndpointJudge:
    """A chat model behind an OpenAI-compatible endpoint as judge.

    Cases are sent one after the other, at temperature 0; a request that is put off (429, 5xx, no
    connection) is tried again a few times. The key is read from `REFTUNE_API_KEY`.

    Args:
        url: `http(s)://host/v1`, with or without `/chat/completions`.
        model: Name of the model there.
        max_tokens: Longest judgment.
        timeout: Seconds to wait for one.

    Raises:
        RecipeError: If the address is none.
    """

    def __init__(self, url: str, model: str, max_tokens: int = 512, timeout: float = 120.0) -> None:
        if not re.match(r"https?://[^/\s]+", url):
            raise RecipeError(
                f'The judge "{url}" is no address.', "Give rule, self, or http(s)://host/v1."
            )
        end = "/chat/completions"
        self.url = url if url.rstrip("/").endswith(end) else url.rstrip("/") + end
        self.model, self.max_tokens, self.timeout = model, max_tokens, timeout

    def __call__(self, cases: Sequence[Case]) -> list[str]:
        """Return the judgments of cases.

        Raises:
            DataError: If the endpoint cannot be reached, refuses, or gives no text.
        """
        return [self._ask(_asked(case)) for case in cases]

    def _ask(self, prompt: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
        }
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        answer = self._sent(request)
        try:
            text = json.loads(answer)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"{self.url} answered without a text: {answer[:200]!r}.",
                "Check --judge and --judge-model; what was judged so far is kept.",
            )
        return text.strip()

    def _sent(self, request: urllib.request.Request) -> str:
        """Send a request, again if it is put off; return the body of the response."""
        why = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return response.read().decode("utf-8", errors="replace")
            except urllib.error.HTTPError as error:
                why = f"status {error.code} ({error.reason})"
                if error.code != 429 and error.code < 500:
                    break
            except OSError as error:  # no connection, or no answer in time
                why = str(getattr(error, "reason", None) or error)
        raise DataError(
            f"{self.url} cannot be asked: {why}.",
            f"Check the address, --judge-model and the key in {KEY}; what was judged is kept, so "
            "the same command goes on from there.",
        )


# Rows


def asked_for(
    example: Example, instruction: str = "", chat: bool = False
) -> tuple[Prompt, dict[str, str]]:
    """Return the prompt of an example, and the fields that let `judged` ask in the same form.

    Args:
        example: A training example.
        instruction: System prompt of chats.
        chat: Ask a plain example through the chat template.

    Raises:
        DataError: If it is a chat of several turns.
    """
    question = example.question or example.prompt
    given = example.prompt_messages
    if given is None and not chat:
        return example.prompt, {"instruction": "", "input": question}
    if given is None:
        given = ({"role": "user", "content": question},)
        given = ({"role": "system", "content": instruction}, *given) if instruction else given
    roles = [message["role"] for message in given]
    if roles not in (["user"], ["system", "user"]):
        raise DataError(
            f'Row "{example.id}" is a chat of {len(given)} messages ({", ".join(roles)}).',
            "Judged answers are to one question, with or without a system prompt.",
        )
    system = given[0]["content"] if len(given) > 1 else ""
    return given, {"instruction": system, "input": given[-1]["content"]}


def judged_rows(
    task: Task,
    examples: Sequence[Example],
    outputs: Sequence[str],
    judge: Judge,
    fields: Sequence[dict[str, str]],
) -> list[dict[str, Any]]:
    """Return rows with a judgment of each wrong answer; answers without text are left out.

    Args:
        task: Tells right from wrong.
        examples: The questions.
        outputs: The answers to them.
        judge: Judges the wrong ones.
        fields: From `asked_for`.
    """
    rows, wrong = [], []
    for example, output, asked in zip(examples, outputs, fields, strict=True):
        if not output.strip():
            log.warning("%s: the model answered nothing; left out", example.id)
            continue
        solution, right = example.solution, task.is_right(task.score(output, example))
        row = {"id": example.id, **asked, "output": output.strip(), "judgment": None}
        rows.append({**row, "answer": solution.strip(), "gold": example.answer})
        if not right:
            found = task.extract(output, example)
            own = Case(asked["input"], output.strip(), solution.strip(), found, example.answer)
            wrong.append((rows[-1], own))
    judgments = judge([case for _, case in wrong]) if wrong else []
    for (row, _), judgment in zip(wrong, judgments, strict=True):
        is_right = judgment.strip().upper().startswith(RIGHT)
        row["judgment"] = None if is_right or not judgment.strip() else judgment.strip()
    return rows


def build(
    path: str | os.PathLike[str],
    task: Task,
    examples: Sequence[Example],
    generator: Generator,
    judge: Judge,
    settings: dict[str, Any],
    chunk: int = 32,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Answer and judge examples into a file, some at a time; a killed call goes on where it was.

    See `resuming.rows_to_file`.

    Args:
        path: The `.jsonl` file to write.
        task: Tells right from wrong.
        examples: The questions.
        generator: Answers them.
        judge: Judges wrong answers.
        settings: What the rows depend on: another one cannot go on with them. `instruction` and
            `chat` go to `asked_for`.
        chunk: Rows a time.
        progress: Called with (rows done, rows in all).

    Raises:
        DataError: If the unfinished rows were made by other settings.
    """
    form = (settings.get("instruction", ""), settings.get("chat", False))

    def make(some: Sequence[Example], start: int) -> list[dict[str, Any]]:
        asked = [asked_for(example, *form) for example in some]
        outputs = generator([prompt for prompt, _ in asked], start)
        return judged_rows(task, some, outputs, judge, [fields for _, fields in asked])

    settings = {**settings, "rows": [example.id for example in examples]}
    return rows_to_file(path, examples, make, settings, chunk, progress)
