"""Word problems in their many published forms, read as one: question, solution, answer.

Forms are told apart by their fields, so a set can be supplied in any of them:

| fields | who publishes it so |
|---|---|
| question, answer (with `####`) | GSM8K |
| item_id, question, answer_value (answer_cot) | reinforced fine-tuning |
| instruction, output, answer | LLM-Adapters, Math-10K |
| original_text, equation, ans | MAWPS |
| Body, Question, Answer (Equation) | SVAMP |
| Question, Numbers, Equation, Answer | SVAMP's MAWPS + ASDiv-A, numbers replaced by `numberN` |
| input, code, target | GSM-Hard |
| body, question, answer, formula | ASDiv |
| question, options, rationale, correct | AQuA |
| Problem, options, Rationale, correct | MathQA |
| question, chain, result | Calc-X |
| question, final_ans | MultiArith |
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal

from reftune.errors import DataError
from reftune.rewards import choice
from reftune.tasks.files import Row, fields, place

_LETTER = re.compile(r"[A-Ea-e]")
_MARKS = re.compile(r"<<[^<>]*>>")
_TAG = re.compile(r"<(gadget|output|result)\b[^>]*>|</(gadget|output|result)>")
_LABEL = re.compile(r"(?:^\[?'?|, '?)[a-e](?= \))")


@dataclass(frozen=True)
class Problem:
    """A word problem.

    Attributes:
        id: Id of the source, or empty.
        question: Text, with options where there are some.
        solution: Worked solution without the final line; empty if none is known.
        answer: Number or letter as the source writes it, commas removed.
        written: The answer to the letter, where a target repeats it.
    """

    id: str
    question: str
    solution: str
    answer: str
    written: str = ""

    @property
    def is_choice(self) -> bool:
        """Whether the answer is a letter."""
        return bool(_LETTER.fullmatch(self.answer))


def number(value: object) -> str:
    """Return a number as people write it: no commas, no trailing `.0`, no power of ten.

    >>> number("1,080"), number(203.0), number("0.5"), number("-7.00"), number(2e-05)
    ('1080', '203', '0.5', '-7', '0.00002')
    """
    text = str(value).strip().replace(",", "")
    if re.fullmatch(r"-?[0-9.]+[eE][-+]?[0-9]+", text):
        text = f"{Decimal(text):f}"
    return re.sub(r"\.0+$", "", text)


def capital_options(problem: Problem) -> Problem:
    """Return a problem whose options a to e stand as LLM-Adapters write them, with capitals.

    Other problems are returned as they are.

    >>> capital_options(Problem("", "which ?\\na ) 38 , b ) a dog", "", "b")).question
    'which ? The options: A ) 38 , B ) a dog'
    """
    if not problem.is_choice:
        return problem
    answer = problem.answer.upper()
    question, _, options = problem.question.rstrip().rpartition("\n")
    if not _LABEL.match(options):
        return replace(problem, answer=answer)
    options = _LABEL.sub(lambda found: found[0].upper(), options)
    return replace(problem, question=f"{question.rstrip()} The options: {options}", answer=answer)


def without_marks(solution: str) -> str:
    """Return a GSM8K solution without its calculator marks.

    >>> without_marks("48/2 = <<48/2=24>>24 clips")
    '48/2 = 24 clips'
    """
    return _MARKS.sub("", solution)


def from_equation(equation: str, answer: str) -> str:
    """Return an equation as one line of working.

    >>> from_equation("X=((22.0-14.0)/4.0)", "2.0")
    '(22 - 14) / 4 = 2.'
    """
    left, _, right = equation.partition("=")
    named = left.strip().isalpha() and "=" not in right
    body = (right if named else equation).strip()
    body = re.sub(r"(\d)\.0+(?!\d)", r"\1", body)
    body = re.sub(r"\s*([-+*/=])\s*", r" \1 ", body)
    # A sign directly after a bracket, an operator or the start belongs to its number.
    body = re.sub(r"(^|[(+*/=-] ?) - (?=[\d(])", r"\1-", body)
    body = re.sub(r"\s*([()])\s*", lambda found: found[1], body)
    body = re.sub(r"(?<=[\d)])([-+*/=])| *([-+*/=]) *(?=\()", r" \1\2 ", body)
    body = _unwrap(re.sub(r" +", " ", body))
    return f"{body} = {number(answer)}." if named else f"{body}, so x = {number(answer)}."


def _unwrap(text: str) -> str:
    """Remove one pair of brackets around the whole."""
    text = text.strip()
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for i, sign in enumerate(text):
        depth += {"(": 1, ")": -1}.get(sign, 0)
        if depth == 0 and i < len(text) - 1:
            return text
    return text[1:-1].strip()


def from_prefix(equation: str, numbers: str, answer: str) -> str:
    """Return a prefix equation over `numberN` as one line of working.

    >>> from_prefix("- * number0 number1 number2", "4 5.0 3", "17.0")
    '(4 * 5) - 3 = 17.'
    """
    values = [number(value) for value in numbers.split()]
    stack: list[str] = []
    for sign in reversed(equation.split()):
        if sign in "+-*/":
            left, right = stack.pop(), stack.pop()
            stack.append(f"({left} {sign} {right})")
        elif sign.startswith("number"):
            stack.append(values[int(sign.removeprefix("number"))])
        else:
            stack.append(number(sign))
    return f"{_unwrap(stack.pop())} = {number(answer)}."


def _gsm8k(row: Row) -> Problem:
    solution, mark, answer = row["answer"].rpartition("####")
    if not mark:
        solution, answer = "", row["answer"]
    answer = answer.strip()
    return Problem("", row["question"], solution.rstrip("\n"), answer.replace(",", ""), answer)


def _reinforced(row: Row) -> Problem:
    solution = row.get("answer_cot") or ""
    answer = str(row["answer_value"]).replace(",", "")
    return Problem(str(row["item_id"]), row["question"], solution, answer)


def _adapters(row: Row) -> Problem:
    question = row["instruction"]
    if (row.get("input") or "").strip():
        question = f"{question}\n{row['input']}"
    answer = str(row["answer"]).strip().replace(",", "")
    return Problem("", question, row.get("output") or "", answer)


def _mawps(row: Row) -> Problem:
    answer = str(row["ans"])
    return Problem(
        str(row.get("id", "")), row["original_text"], from_equation(row["equation"], answer), answer
    )


def _svamp(row: Row) -> Problem:
    body = row["Body"].strip()
    joint = "" if body.endswith((".", "?", "!", ",")) else "."
    answer = str(row["Answer"])
    equation = str(row.get("Equation") or "")
    return Problem(
        str(row.get("ID", "")),
        f"{body}{joint} {row['Question'].strip()}",
        from_equation(equation, answer) if equation else "",
        answer,
    )


def _asdiv_a(row: Row) -> Problem:
    question = row["Question"]
    for i, value in reversed(list(enumerate(row["Numbers"].split()))):
        question = question.replace(f"number{i}", number(value))
    answer = str(row["Answer"])
    return Problem("", question, from_prefix(row["Equation"], row["Numbers"], answer), answer)


def _gsm_hard(row: Row) -> Problem:
    return Problem("", row["input"], "", str(row["target"]))


def _asdiv(row: Row) -> Problem:
    answer = str(row["answer"]).split("(")[0].strip().replace(",", "")
    formula = str(row.get("formula") or "").partition("=")[0].strip()
    question = f"{row['body'].strip()} {row['question'].strip()}"
    return Problem("", question, f"{formula} = {answer}." if formula else "", answer)


def _aqua(row: Row) -> Problem:
    options = " ".join(row["options"]) if isinstance(row["options"], list) else row["options"]
    question = f"{row['question'].strip()} The options are: {options}"
    solution = row.get("rationale") or ""
    if solution and choice.extract(solution) != row["correct"]:
        solution = f"{solution.rstrip()}\nThe answer is {row['correct']}."
    return Problem("", question, solution, row["correct"])


def _mathqa(row: Row) -> Problem:
    options = " ".join(row["options"].split())
    solution = str(row.get("Rationale") or "").strip().strip('"').strip()
    return Problem("", f"{row['Problem'].strip()}\n{options}", solution, row["correct"])


def _calc(row: Row) -> Problem:
    answer = number(row.get("result_float", row["result"]))
    solution = _TAG.sub(" ", row["chain"] or "")
    return Problem(
        str(row.get("id", "")), row["question"], re.sub(r"\s+", " ", solution).strip(), answer
    )


def _multiarith(row: Row) -> Problem:
    return Problem("", row["question"], "", str(row["final_ans"]).replace(",", ""))


_FORMS: tuple[tuple[frozenset[str], Callable[[Row], Problem]], ...] = (
    (frozenset({"item_id", "question", "answer_value"}), _reinforced),
    (frozenset({"original_text", "equation", "ans"}), _mawps),
    (frozenset({"Question", "Numbers", "Equation", "Answer"}), _asdiv_a),
    (frozenset({"Body", "Question", "Answer"}), _svamp),
    (frozenset({"input", "target", "code"}), _gsm_hard),
    (frozenset({"body", "question", "answer"}), _asdiv),
    (frozenset({"Problem", "options", "correct"}), _mathqa),
    (frozenset({"question", "options", "correct"}), _aqua),
    (frozenset({"question", "chain", "result"}), _calc),
    (frozenset({"question", "final_ans"}), _multiarith),
    (frozenset({"instruction", "answer"}), _adapters),
    (frozenset({"question", "answer"}), _gsm8k),
)


def to_problem(row: Row, origin: str) -> Problem:
    """Return a row of any known form as a problem.

    Raises:
        DataError: If the fields fit no form, or a value is not what its form says.
    """
    names = set(fields(row))
    for wanted, read in _FORMS:
        if wanted <= names:
            try:
                problem = read(row)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"{place(row, origin)}: a value is not what fields {sorted(wanted)} promise "
                    f"({type(error).__name__}: {error}).",
                    "Mend or drop this row.",
                ) from error
            return _checked(problem, row, origin)
    forms = "; ".join(", ".join(sorted(wanted)) for wanted, _ in _FORMS)
    raise DataError(
        f"{place(row, origin)}: fields {sorted(names)} are those of no known word-problem form.",
        f"Rename them to one of these sets: {forms}.",
    )


def _checked(problem: Problem, row: Row, origin: str) -> Problem:
    for name in ("question", "answer"):
        if not str(getattr(problem, name)).strip():
            raise DataError(f"{place(row, origin)}: the {name} is empty.", "Mend or drop this row.")
    return problem
