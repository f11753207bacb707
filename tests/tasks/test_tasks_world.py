from __future__ import annotations

import pytest
from task_lookalikes import gold_accuracy, make

from reftune.errors import RecipeError
from reftune.tasks.guard import overlap

pytestmark = pytest.mark.quick
STYLES = ("native", "hash", "boxed", "json", "program", "prose", "prose_hash")


@pytest.mark.parametrize("style", STYLES)
def test_every_style_is_scored_in_any_and_in_its_own_format(style):
    task = make("families", style=style, test_size=40)
    examples = task.load("test")
    assert gold_accuracy(task, examples) == 1.0
    assert all(task.score(e.target, e)["format_accuracy"] == 1.0 for e in examples)
    wrong = [task.score("I do not know.", e) for e in examples]
    assert all(set(score.values()) == {0.0} for score in wrong)


def test_families_in_native_prompt_form():
    example = make("families", style="prose_hash", train_size=5).load("train")[0]
    assert example.prompt.startswith("Question: ") and example.prompt.endswith("? Answer:")
    assert example.target.startswith(" First it is ") and f"#### {example.answer}" in example.target
    assert example.meta["group"] == "new"


def test_last_number_counts_without_the_format():
    task = make("families", style="prose_hash", test_size=1)
    example = task.load("test")[0]
    score = task.score(f"The answer is {example.answer}.", example)
    assert score == {"accuracy": 1.0, "format_accuracy": 0.0}


def test_splits_never_meet_and_only_training_follows_the_seed():
    a, b = (make("families", train_size=200, test_size=100, seed=s) for s in (1, 2))
    assert a.load("test") == b.load("test")
    assert a.load("train") != b.load("train")
    assert a.load("train") == make("families", train_size=200, seed=1).load("train")
    assert overlap(a.load("train"), a.load("test")).count == 0
    assert len({e.question for e in a.load("train")}) == 200


def test_options_of_families():
    far = make("families", group="known", eval_group="far", pairs="unseen", steps=2, test_size=10)
    assert {e.meta["group"] for e in far.load("test")} == {"far"}
    assert {e.meta["steps"] for e in far.load("test")} == {2}
    with pytest.raises(RecipeError, match=r"far families .* never trained on"):
        make("families", group="far").load("train")
    with pytest.raises(RecipeError, match='No family "nothing/at_all"'):
        make("families", family="nothing/at_all").load("test")
    with pytest.raises(RecipeError, match="no new family has 9 steps"):
        make("families", steps=9).load("test")
    with pytest.raises(RecipeError, match="style"):
        make("families", style="verse")
    with pytest.raises(RecipeError, match=r"generates its rows; task\.data_dir"):
        make("families", "/anywhere")


def test_chat_form():
    example = make("families", chat=True, test_size=1).load("test")[0]
    assert [m["role"] for m in example.messages] == ["user", "assistant"]
    assert example.prompt == example.target == ""
    assert example.messages[0]["content"] == example.question


def test_passages_yes_no():
    task = make("passages", test_size=100, train_size=50)
    examples = task.load("test")
    assert task.kind == "choice"
    assert {e.meta["kind"] for e in examples} == {3, 4}
    for example in examples:
        assert example.choices == (" Yes.", " No.")
        assert example.target == example.choices[example.label]
    assert gold_accuracy(task, examples) == 1.0
    assert task.score(" No, not so.", examples[0])["accuracy"] == float(examples[0].label == 1)
    assert overlap(task.load("train"), examples).count == 0


def test_passages_open():
    task = make("passages", kind=1, form="open", test_size=30)
    examples = task.load("test")
    assert task.kind == "generation" and {e.meta["kind"] for e in examples} == {1}
    assert gold_accuracy(task, examples) == 1.0
    with pytest.raises(RecipeError, match=r"kind \[7\] is not among"):
        make("passages", kind=7)


@pytest.mark.parametrize("form", ["yes_no", "open"])
def test_passages_with_reasons(form):
    task = make("passages", form=form, why=True, test_size=100)
    examples = task.load("test")
    assert task.kind == "generation" and gold_accuracy(task, examples) == 1.0
    for example in examples:
        assert example.question.endswith(" Say why.")
        reason, _, answer = example.target.removesuffix(".").rpartition(". ")
        assert len(reason) > len(answer)
        # Only the last sentence is the answer, whatever the reason says
        assert task.score(f"{example.target} Fog.", example)["accuracy"] == 0.0
        assert task.score(f" Well. {answer}.", example)["accuracy"] == 1.0
    assert len({e.choices for e in examples}) == 1, "the majority answer needs the choices"
    with pytest.raises(RecipeError, match="why asks for sentences of the passage"):
        make("passages", why=True, passage=False)


@pytest.mark.parametrize("kind", ["recall", "one_hop", "unknown", "mix"])
def test_facts(kind):
    task = make("facts", kind=kind, test_size=60, train_size=60)
    train, test = task.load("train"), task.load("test")
    assert gold_accuracy(task, [*train, *test]) == 1.0
    assert overlap(train, test).count == 0
    assert all(e.meta["subject"] in e.prompt for e in [*train, *test])
    if kind == "unknown":
        assert {e.target for e in test} == {" I do not know."}
        assert task.score("1997.", test[0]) == {"accuracy": 0.0}


def test_facts_end_where_the_world_ends():
    assert 300 < len(make("facts", test_size=2000).load("test")) < 1360
