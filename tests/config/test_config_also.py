"""`evaluation.also`: further rows to score, written as what differs from the run's task."""

from __future__ import annotations

import pytest

from reftune.config.loader import checked, dump, loads
from reftune.config.recipe import TaskSpec
from reftune.config.schema import schema
from reftune.errors import RecipeError

pytestmark = pytest.mark.quick
TASK = "task: {name: families, group: known, style: prose, test_size: 50}\n"


def also(text, overrides=()):
    return loads(f"{TASK}evaluation: {{also: {text}}}", overrides).evaluation.also


def test_what_is_not_said_is_taken_from_the_task():
    found = also("{new: {group: new}, small: {options: {style: native}, test_size: 9}}")
    options = {"group": "known", "style": "prose"}
    assert found == {
        "new": TaskSpec("families", test_size=50, options={**options, "group": "new"}),
        "small": TaskSpec("families", test_size=9, options={**options, "style": "native"}),
    }


def test_another_task_takes_nothing_over():
    found = also("{facts: facts, sums: {name: svamp, template: native}}")
    assert found == {
        "facts": TaskSpec("facts"),
        "sums": TaskSpec("svamp", options={"template": "native"}),
    }


def test_a_recipe_with_further_rows_is_written_and_read_back():
    recipe = loads(f"{TASK}evaluation: {{also: {{new: {{group: new}}, facts: facts}}}}")
    assert loads(dump(recipe)) == recipe == checked(recipe)
    assert checked(loads(TASK)).evaluation.also == {}


def test_it_can_be_changed_from_the_command_line():
    assert also("{}", ["evaluation.also.far.group=far"])["far"].options["group"] == "far"
    assert also("{new: {group: new}}", ["evaluation.also={}"]) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[new]", r"evaluation\.also: .*is no mapping\. Write names and what differs"),
        ("{New set: {group: new}}", r'"New set" names a figure and a file\. Use a-z, 0-9 and _'),
        (
            "{new: {grupp: new}}",
            r'evaluation\.also\.new\.grupp: unknown key .*Did you mean "group"',
        ),
        ("{new: {group: old}}", r'evaluation\.also\.new\.group: "old" is not "known"'),
        ("{new: {name: nope}}", r'evaluation\.also\.new\.name: there is no task "nope"'),
        ("{new: {test_size: 0}}", r"evaluation\.also\.new\.test_size: 0 is not above 0"),
        ("{new: sst2}", r"evaluation\.also\.new\.name: .*sst2. is of kind classification"),
        ("{new: [1]}", r"evaluation\.also\.new: \[1\] is no mapping"),
    ],
)
def test_faults_name_the_place(text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        also(text)
    assert len(caught.value.faults) == 1


def test_a_fault_of_the_task_is_told_once():
    with pytest.raises(RecipeError) as caught:
        loads("task: {name: families, test_size: -1}\nevaluation: {also: {new: {group: new}}}")
    assert len(caught.value.faults) == 1


def test_the_schema_knows_it():
    task = schema()["properties"]["evaluation"]["properties"]["also"]["additionalProperties"]
    assert task == schema()["properties"]["task"]


def test_an_objective_that_is_taken_for_a_method_is_told_apart():
    with pytest.raises(
        RecipeError, match=r'"brep" is an objective, no method\. Write `objective: brep`'
    ):
        loads("task: families\nadapter: brep")
