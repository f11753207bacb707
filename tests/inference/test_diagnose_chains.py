"""Steps after right and after wrong ones: what is shown, what is read, what counts as what."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from diagnose_toys import shaken, study, talking
from tiny import tiny_tokenizer

from reftune.inference.chains import error_accumulation
from reftune.inference.continuing import Written, go_on, writing
from reftune.inference.study import Study
from reftune.tasks.base import Example

pytestmark = pytest.mark.quick

GOLD = " 47 + 38 = 85. 85 - 12 = 73. the answer is 73."
QUESTION = "what are 47 and 38 without 12?"


@dataclass(frozen=True)
class Scripted(Study):
    """Nobody is asked: what base and adapter write is told by a function of what is shown."""

    script: object = field(default=None, repr=False)

    def write(self, who, starts, title):
        found = []
        for start in starts:
            shown = self.tokenizer.decode(start.given)
            said, ended = self.script(who, shown)
            ids = self.tokenizer(said, add_special_tokens=False)["input_ids"]
            found.append(Written(tuple(ids[: start.budget]), ended and len(ids) <= start.budget))
        return found


def rows(count=4, target=GOLD, **more):
    return [
        Example(str(i), f"q: {QUESTION} a:", target, "73", QUESTION, **more) for i in range(count)
    ]


def diagnosed(script, examples=None, model=None):
    plain = study(model or shaken(), examples or rows())
    return error_accumulation(Scripted(**{**vars(plain), "script": script}))


def well(who, shown):
    """A model that always goes on from the number it sees."""
    if not shown:
        return " 47 + 38 = 85. 85 - 12 = 73.", True
    last = int(shown.rpartition("= ")[2].strip(" ."))
    return f" {last} - 12 = {last - 12}. the answer is {last - 12}.", True


def shares(figures):
    return {who: figure.mean for who, figure in figures.items()}


def test_a_model_that_follows_what_it_sees_is_right_and_consistent():
    found = diagnosed(well)
    assert (found.rows, found.without, found.too_long) == (4, 0, 0)
    first, second = found.steps
    assert (first.step, first.rows, first.wrong_rows, first.wrong_test) == (1, 4, 0, None)
    assert (second.step, second.rows, second.wrong_rows) == (2, 4, 4)
    for step in found.steps:
        assert shares(step.right) == shares(step.true_equation) == {"base": 1.0, "adapter": 1.0}
    assert shares(second.wrong["consistent"]) == {"base": 1.0, "adapter": 1.0}
    assert (
        shares(second.wrong["recovered"])
        == shares(second.wrong["lost"])
        == {
            "base": 0.0,
            "adapter": 0.0,
        }
    )
    assert second.right["base"].low < 1.0 == second.right["base"].high
    assert first.wrong["consistent"]["base"].mean is None


@pytest.mark.parametrize(
    ("said", "outcome", "is_right", "is_true"),
    [
        (" 85 - 12 = 73.", "recovered", True, True),
        (" 85 - 12 = 60.", "lost", False, False),
        (" 85 + 12 = 97.", "lost", False, True),  # computed well, planned otherwise
        (" the answer is 73.", "lost", False, False),
        ("", "lost", False, False),
        (" 47 + 38 = 85. 85 - 12 = 73.", "recovered", True, True),  # it says the step again
        (" 38 + 47 = 85. 85 - 12 = 73.", "recovered", True, True),
    ],
)
def test_what_an_equation_counts_as(said, outcome, is_right, is_true):
    def script(who, shown):
        return (said, True) if who == "adapter" and shown else well(who, shown)

    found = diagnosed(script)
    step = found.steps[1]
    assert step.right["adapter"].mean == float(is_right)
    assert step.true_equation["adapter"].mean == float(is_true)
    assert {kind: step.wrong[kind]["adapter"].mean for kind in step.wrong} == {
        kind: float(kind == outcome) for kind in ("consistent", "recovered", "lost")
    }
    assert shares(step.right)["base"] == shares(step.wrong["consistent"])["base"] == 1.0
    assert step.test.difference == float(is_right) - 1.0
    assert step.wrong_test.difference == -1.0 and step.wrong_test.only_b == 4
    told = [a for a in found.answers if a["writer"] == "adapter" and a["step"] == 2]
    assert {a["outcome"] for a in told if a["followed"]} == {outcome}
    assert {a["outcome"] for a in told if not a["followed"]} == {"right" if is_right else "wrong"}


def test_a_number_that_may_go_on_is_not_read():
    def cut(who, shown):
        return (" 85 - 12 = 73", False) if shown else well(who, shown)

    assert diagnosed(cut).steps[1].right["base"].mean == 0.0

    def whole(who, shown):
        return (" 85 - 12 = 73", True) if shown else well(who, shown)

    assert diagnosed(whole).steps[1].right["base"].mean == 1.0


def test_what_is_shown_is_the_solution_up_to_the_sentence_in_tokens_of_the_whole():
    seen = []

    def script(who, shown):
        seen.append(shown)
        return well(who, shown)

    diagnosed(script, rows(1))
    plain, wrong = [text for text in seen[: len(seen) // 2] if text]
    assert plain == " 47 + 38 = 85."
    assert wrong.startswith(" 47 + 38 = ") and wrong != plain and len(wrong) == len(plain)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]  # the same for base and adapter


def test_a_token_that_is_cut_is_shown_whole_and_read_with_what_follows():
    plain = study(shaken(), rows(1, GOLD.replace(". 85", ".\n85")))
    plain.tokenizer.add_tokens([".\n"])  # ends the first line and begins the second
    seen = []

    def script(who, shown):
        seen.append(shown)
        return ("85 - 12 = 73.", True) if shown else well(who, shown)

    found = error_accumulation(Scripted(**{**vars(plain), "script": script}))
    assert seen[1] == " 47 + 38 = 85.\n" and found.steps[1].right["base"].mean == 1.0
    told = [a for a in found.answers if a["step"] == 2 and a["followed"] is None]
    assert [(a["shown"], a["text"]) for a in told] == [(" 47 + 38 = 85.", "\n85 - 12 = 73.")] * 2


def test_the_prompt_and_its_end_are_those_of_the_task():
    made = study(shaken(), rows(2))
    asked = []
    scripted = Scripted(**{**vars(made), "script": lambda who, shown: well(who, shown)})

    class Spy(Scripted):
        def write(self, who, starts, title):
            asked.extend(starts)
            return super().write(who, starts, title)

    error_accumulation(Spy(**vars(scripted)))
    assert {tuple(s.prompt.ids) for s in asked} == {tuple(s.prompt.ids) for s in made.starts}
    assert all(s.ids == [*s.prompt.ids, *s.given] for s in asked)


def test_a_chat_is_shown_as_it_was_learned():
    messages = (
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": GOLD.strip()},
    )
    examples = [Example(str(i), "", "", "73", QUESTION, messages) for i in range(2)]
    seen = []

    def script(who, shown):
        seen.append(shown)
        return well(who, shown)

    found = diagnosed(script, examples)
    assert "47 + 38 = 85." in seen and found.steps[1].right["adapter"].mean == 1.0


def test_rows_differ_in_their_number_of_steps():
    long = " 2 + 4 = 6. 6 * 3 = 18. 18 - 7 = 11."
    question = "2, 4, 3 and 7?"
    examples = [*rows(2), Example("l", f"q: {question} a:", long, "11", question)]
    examples += [Example("n", "q: who? a:", " nobody.", "", "who?")]

    def script(who, shown):
        return (" 6 * 3 = 18.", True) if "2 + 4" in shown else well(who, shown)

    found = diagnosed(script, examples)
    assert (found.rows, found.without) == (3, 1)
    assert [step.rows for step in found.steps] == [3, 3, 1]
    assert found.steps[2].right["base"].mean == 0.0
    assert found.steps[1].right["base"].mean == 1.0


@pytest.mark.parametrize(
    ("target", "text"),
    [("", "no worked solutions; those of another split may"), (" 73.", "has steps that can be")],
)
def test_what_has_no_steps_says_why(target, text):
    found = diagnosed(well, rows(3, target))
    assert isinstance(found, str) and text in found


def test_steps_that_do_not_fit_are_counted():
    small = shaken(max_position_embeddings=48)
    found = diagnosed(well, rows(2), small)
    assert found.too_long == 4 and [step.step for step in found.steps] == [1]


def test_a_real_model_writes_the_steps():
    """Base and adapter differ, and what each writes is what it goes on with from what is shown."""
    model = shaken("all")
    made = study(model, rows(2))
    found = error_accumulation(made)
    told = {(a["writer"], a["id"], a["step"], a["shown"]): a["text"] for a in found.answers}
    assert len(told) == 2 * 2 * 3
    start = replace(
        made.starts[0],
        given=tuple(tiny_tokenizer()(" 47 + 38 = 85.", add_special_tokens=False)["input_ids"]),
        budget=64,
    )
    for who, other in (("base", talking()), ("adapter", model)):
        with writing(other, "adapter"):
            (alone,) = go_on(other, made.tokenizer, [start], made.decoding)
        text = told[who, "0", 2, " 47 + 38 = 85."]
        assert text == made.tokenizer.decode(alone.ids)[: len(text)] and text
    assert told["base", "0", 1, ""] != told["adapter", "0", 1, ""]
