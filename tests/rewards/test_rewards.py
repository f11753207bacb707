from __future__ import annotations

import doctest
import importlib

import pytest

from reftune import rewards
from reftune.errors import RecipeError
from reftune.rewards import base, choice, exact, numeric

MODULES = (
    "reftune.rewards",
    *(f"reftune.rewards.{m}" for m in ("base", "numeric", "choice", "exact")),
)


@pytest.mark.quick
@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,080", "1080"),
        ("He has $18.", "18"),
        ("so -7", "-7"),
        ("12.50 dollars.", "12.50"),
        ("<<48+24=72>>72 clips", "72"),
        ("no digits", None),
        ("", None),
        ("3 4\n5 ", "5"),
    ],
)
def test_last_number(text, number):
    assert numeric.extract(text) == number


@pytest.mark.quick
@pytest.mark.parametrize(
    ("pred", "gold", "equal"),
    [
        ("18", "18.0", True),
        ("18.0009", "18", True),
        ("18.0011", "18", False),
        ("1080", "1,080", True),
        ("inf", "inf", False),
        ("nan", "nan", False),
        ("x", "1", False),
    ],
)
def test_numbers_match_within_a_thousandth(pred, gold, equal):
    assert numeric.matches(pred, gold) is equal


@pytest.mark.quick
@pytest.mark.parametrize(
    ("after", "default", "reference"),
    [
        ("18", "18", "18"),
        (" 18.0 ", "18.0", "18.0"),
        ("1,000", None, None),
        ("$18", None, None),
        ("18 dollars", None, None),
        ("<203>", None, None),
        ("nan", None, "nan"),
        ("inf", None, "inf"),
    ],
)
def test_the_whole_text_after_the_trigger_must_be_a_number(after, default, reference):
    text = f"2 + 2 = 4.\nTherefore, the answer is: {after}"
    assert numeric.extract_after(text) == default
    assert numeric.extract_after(text, compat="reference") == reference


@pytest.mark.quick
def test_trigger_rules_of_reinforced_fine_tuning():
    trigger = "Therefore, the answer is: "
    # The last trigger counts: the solutions of SVAMP end in a line of their own that is like it.
    assert numeric.extract_after(f"{trigger}5\n{trigger}6") == "6"
    assert numeric.extract_after("7") is None
    assert numeric.extract_after("7", compat="reference") == "7"
    rule, quirk = numeric.WHOLE_NUMBER, numeric.WHOLE_NUMBER_REFERENCE
    assert rule.reward(f"{trigger}18.009", "18", 0.1) == 1.0
    assert rule.reward(f"{trigger}18.02", "18", 0.1) == 0.1
    assert rule.reward(f"{trigger}eighteen", "18", 0.1) == 0.0
    assert quirk.reward(f"{trigger}nan", "18", 0.1) == 0.1
    assert rule.reward(f"{trigger}1080", "1,080") == 1.0


@pytest.mark.quick
def test_label_after_the_trigger():
    trigger = "Therefore, the answer is: "
    assert choice.AFTER_TRIGGER.reward(f"{trigger}'B'", "b") == 1.0
    assert choice.AFTER_TRIGGER.reward("b", "b", 0.1) == 0.0
    # Without a trigger the published code compares the whole text, which is never "none".
    assert choice.AFTER_TRIGGER_REFERENCE.reward("I think a", "b", 0.1) == 0.1
    assert choice.AFTER_TRIGGER_REFERENCE.reward("", "b", 0.1) == 0.1


@pytest.mark.quick
def test_only_the_reasoning_after_its_last_marker_counts():
    went_on = "Therefore, the answer is: {}\nQuestion:\nx\nAnswer reasoning:\n{}"
    # The answer to the question that was asked stands before the marker and is not seen.
    number, label = went_on.format(5, 7), went_on.format("b", "c")
    assert numeric.WHOLE_NUMBER.extract(number) is None
    assert numeric.WHOLE_NUMBER_REFERENCE.extract(number) == "7"
    assert choice.AFTER_TRIGGER.extract(label) is None
    assert choice.AFTER_TRIGGER_REFERENCE.extract(label) == "c"
    echoed = "Question:\nx\nAnswer reasoning:\nTherefore, the answer is: 5"
    assert numeric.WHOLE_NUMBER.extract(echoed) == "5"
    assert numeric.WHOLE_NUMBER_REFERENCE.extract("Answer reasoning: 5") == "5"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "default", "reference"),
    [
        ("Answer: the sum is 7, so C.", "C", "A"),
        ("Because of that, B) 5.", "B", "B"),
        ("The answer is (D).", "D", "D"),
        ("the correct option is C)125. A cube is a solid.", "C", "C"),
        ("A train goes. Therefore, the answer is option E) 41/58.", "E", "A"),
        ("**Answer: B**", "B", "A"),
        ("It is 7.", None, None),
        ("Dogs and cats", None, "D"),
        ("F", None, None),
        ("option a is wrong, D", "D", "D"),
    ],
)
def test_letters(text, default, reference):
    assert choice.extract(text) == default
    assert choice.extract(text, compat="reference") == reference


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "truth"),
    [
        (" True", "true"),
        ("yes, he does", "true"),
        ("No.", "false"),
        ("FALSE", "false"),
        ("untrue", None),
        ("true or false?", None),
        ("It is true", None),
        ("", None),
        ("Nothing", None),
    ],
)
def test_boolean_reads_the_leading_word_only(text, truth):
    assert choice.boolean(text) == truth


@pytest.mark.quick
def test_commonsense_needs_its_trigger_and_the_exact_label():
    rule = exact.COMMONSENSE
    assert rule.reward("the correct answer is answer3", "answer3") == 1.0
    assert rule.reward("the correct answer is  answer3\n", "answer3") == 1.0
    assert rule.reward("the correct answer is answer3.", "answer3") == 0.0
    assert rule.reward("answer3", "answer3") == 0.0
    assert rule.extract("the correct answer is ") is None


@pytest.mark.quick
def test_commonsense_takes_all_that_follows_the_first_trigger():
    rule = exact.COMMONSENSE
    twice = "the correct answer is true\nthe correct answer is false"
    assert rule.extract(twice) == "true\nthe correct answer is false"
    assert (rule.reward(twice, "false"), rule.reward(twice, "true")) == (0.0, 0.0)
    assert base.after(twice, "the correct answer is ") == "false"


@pytest.mark.quick
def test_contains_wants_whole_words():
    assert exact.CONTAINS.reward("In the Kitchen.", "kitchen") == 1.0
    assert exact.CONTAINS.reward("untrue", "true") == 0.0
    assert exact.CONTAINS.reward("anything", "") == 0.0
    assert exact.CONTAINS.reward("", "a") == 0.0


@pytest.mark.quick
def test_every_registered_rule_rewards_and_unknown_names_are_refused():
    for name in rewards.names():
        rule = rewards.get(name)
        assert rule.name == name
        assert rule.reward("", "7") in (0.0, 1.0)
        assert rule.matches("b", "c") is False
    known = rewards.names()
    assert {"numeric_trigger_reference", "choice_trigger_reference"} <= set(known)
    with pytest.raises(RecipeError, match=r'no reward "numerik".*Did you mean "numeric"'):
        rewards.get("numerik")


@pytest.mark.quick
def test_module_rewards_are_the_main_rules():
    assert numeric.reward("so 7", "7") == 1.0
    assert choice.reward("so B", "B") == 1.0
    assert exact.reward(" yes", "yes") == 1.0
    assert exact.reward("no", "yes", partial=0.1) == 0.1
