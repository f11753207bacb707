"""Values that must fit each other: adapters of stages, task and head, positions and rows."""

from __future__ import annotations

import pytest

from reftune.config.loader import checked, loads, task_of
from reftune.config.recipe import AdapterSpec, Recipe, StageSpec, TaskSpec
from reftune.errors import RecipeError

pytestmark = pytest.mark.quick
RED, LOREFT = "{adapter: red}", "{adapter: loreft}"


def names_of(text):
    return [stage.adapter.name for stage in loads(f"task: families\n{text}").stages]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("stages: [{adapter: loreft}, {adapter: red}]", ["default", "stage2"]),
        (f"stages: [{RED}, {LOREFT}, {LOREFT}]", ["default", "stage2", "stage2"]),
        (f"stages: [{RED}, {LOREFT}, {RED}]", ["default", "stage2", "stage3"]),
        ("stages: [{adapter: loreft}, {adapter: lora}]", ["default", "stage2"]),
        ("stages: [{adapter: lora}, {adapter: loreft}]", ["default", "default"]),
        ("stages: [{adapter: loreft}, {adapter: loreft}]", ["default", "default"]),
        ("model: {adapter: runs/x}", ["stage1"]),
    ],
)  # fmt: skip
def test_adapters_that_are_on_the_model_together_have_names_of_their_own(text, names):
    assert names_of(text) == names
    again = loads(f"task: families\n{text}")
    assert checked(again) == again


def test_a_name_given_twice_is_a_fault():
    text = "task: families\nstages: [{adapter: {name: a}}, {adapter: {method: red, name: a}}]"
    with pytest.raises(RecipeError, match=r'stages\.1\.adapter\.name: .*another adapter named "a"'):
        loads(text)
    with pytest.raises(RecipeError, match="full changes the model itself"):
        loads("task: families\nmodel: {adapter: x}\nadapter: full")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: sst2", "model.head: .*sst2. is of kind classification, model.head is causal"),
        (
            "task: {train: a.csv, label: y}",
            "model.head: .*own. is of kind classification, model.head is causal",
        ),
        (
            "task: families\nmodel: {head: classification}\nobjective: classification",
            "model.head: .*families. is of kind generation, model.head is classification",
        ),
        ("task: families\nadapter: {positions: mask}", 'adapter.positions: "mask" needs a mask'),
        (
            "task: families\nadapter: {positions: l1, train_positions: f1+subject_last}",
            'adapter.train_positions: "f1.subject_last" needs a subject .* Use task facts',
        ),
        ("task: {train: a.csv, label: y, subject: s}\nadapter: {positions: subject_last}\n"
         "model: {head: classification}\nobjective: classification", "needs a subject"),
        ("task: families\nevaluation: {num_beams: 0}", "evaluation.num_beams: 0 is not above 0"),
        ("task: families\nevaluation: {top_k: -1}", "evaluation.top_k: -1 is below 0"),
        (
            "task: families\nevaluation: {num_beams: 4, temperature: 1}",
            "evaluation.num_beams: 4 beams cannot be sampled from",
        ),
        ("task: families\nkeep_by: metric", "keep_by: has no effect without `keep: best`"),
        ("task: families\nmax_len: 1", "max_len: 1 leaves no room"),
        ("task: families\nadapter: lora\ncausal: store",
         "causal: lora is no edit of chosen tokens"),
        ("task: sst2\nmodel: {head: classification}\nobjective: classification\n"
         "causal: recompute", "causal: needs a decoder .* model.head is classification"),
        ("task: families\nadapter: {layers: null}",
         "adapter.layers: null is not .* Write a value, or leave the key out"),
        ("task: families\nadapter: {strength: .nan}", "adapter.strength: NaN is not finite"),
        ("task: families\nadapter: {strength: nan}",
         'adapter.strength: "nan" is not a number\\. ->'),
    ],
)  # fmt: skip
def test_what_does_not_fit(text, message):
    with pytest.raises(RecipeError, match=message):
        loads(text)


def test_what_fits():
    loads("task: sst2\nmodel: {head: classification}\nobjective: classification")
    loads("task: facts\nadapter: {positions: subject_last}")
    loads("task: {train: a.csv, subject: s, mask: m}\nadapter: {positions: subject_last+mask}")
    spec = loads("task: families\nevaluation: {num_beams: 4, repetition_penalty: 1.1}").evaluation
    assert (spec.num_beams, spec.repetition_penalty, spec.top_k) == (4, 1.1, 0)


def test_a_recipe_made_in_python_is_checked_by_the_same_rules():
    recipe = Recipe(task=TaskSpec(name="families"), stages=[StageSpec(AdapterSpec("red"))])
    assert checked(recipe) == recipe
    with pytest.raises(RecipeError, match=r"stages\.0\.batch_size: 0 is not above 0"):
        checked(Recipe(task=TaskSpec(name="families"), stages=[StageSpec(batch_size=0)]))


def test_a_task_by_itself_needs_no_training_rows():
    assert task_of({"name": "own", "test": "a.csv"}).train is None
    assert task_of({"name": "sst2"}, ["task.test_size=3"]).test_size == 3
    with pytest.raises(RecipeError, match=r"task\.test_size: 0 is not above 0"):
        task_of({"name": "sst2", "test_size": 0})
    with pytest.raises(RecipeError, match="unknown key"):
        task_of({"name": "families"}, ["task.stlye=prose"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("seed=99999999999999999999", "is above 4.29497e"),
        ("optimiser.lr=1e38", "is above 100"),
        ("threads=100000", "is above"),
        ("adapter.positions=f99999999999999999999", "more tokens than any prompt"),
        ("adapter.positions=generated:99999999999999999999", "more tokens than any prompt"),
    ],
)
def test_numbers_no_run_can_mean_are_refused(change, says):
    with pytest.raises(RecipeError) as caught:
        loads("model: nano\ntask: families\nadapter: {method: loreft}", [change])
    assert any(says in str(fault) for fault in caught.value.faults), caught.value.faults


def test_a_recipe_that_holds_itself_is_refused():
    with pytest.raises(RecipeError, match="holds itself"):
        loads("a: &a [*a]")
