"""`heft:` arranges two stages by one budget of epochs; what stages may ask of those below them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reftune.config.heft import split_epochs
from reftune.config.loader import change, checked, dump, loads
from reftune.config.schema import schema
from reftune.errors import RecipeError

pytestmark = pytest.mark.quick

TEXT = """\
task: families
heft: {epochs_total: 3}
stages:
  - adapter: {method: lora, dropout: 0.05}
    optimiser: {lr: 2.0e-4}
  - adapter: {method: loreft, rank: 4}
    optimiser: {lr: 9.0e-4}
"""


def arranged(*changes):
    """Return method, epochs, below and rate below of each stage."""
    recipe = loads(TEXT, changes)
    assert loads(dump(recipe)) == checked(recipe) == recipe, "reading again changes nothing"
    assert change(loads(TEXT), changes) == recipe, "a resolved recipe can be changed"
    return [(s.adapter.method, s.epochs, s.below, s.optimiser.below_lr) for s in recipe.stages]


def test_lora_comes_first_and_gets_its_share():
    assert arranged() == [("lora", 2.0, "frozen", None), ("loreft", 1.0, "frozen", None)]
    assert arranged("heft.epochs_total=20", "heft.coarse_fraction=0.25") == [
        ("lora", 5.0, "frozen", None),
        ("loreft", 15.0, "frozen", None),
    ]


def test_other_orders():
    assert arranged("heft.order=reft_first") == [
        ("loreft", 1.0, "frozen", None),
        ("lora", 2.0, "frozen", None),
    ]
    assert arranged("heft.order=joint") == [
        ("lora", 0.0, "frozen", None),
        ("loreft", 3.0, "trained", 2e-4),
    ]
    assert arranged("heft.stage2_train=reft+lora")[1] == ("loreft", 1.0, "trained", 0.1 * 2e-4)
    own_rate = arranged("heft.stage2_train=reft+lora", "heft.stage2_lora_lr=1e-5")
    assert own_rate[1] == ("loreft", 1.0, "trained", 1e-5)


def test_the_whole_budget_may_go_to_one_method():
    assert arranged("heft.coarse_fraction=1") == [("lora", 3.0, "frozen", None)]
    assert arranged("heft.coarse_fraction=0") == [("loreft", 3.0, "frozen", None)]


def test_stages_may_stand_in_any_order():
    swapped = loads(TEXT.replace("lora, dropout: 0.05", "red").replace("loreft, rank: 4", "lora"))
    assert [stage.adapter.method for stage in swapped.stages] == ["lora", "red"]


def test_the_reft_stage_starts_at_the_identity_unless_it_says_otherwise():
    assert loads(TEXT).stages[1].adapter.options == {"rank": 4, "init": "identity"}
    assert loads(TEXT, ["stages.1.adapter.init=paper"]).stages[1].adapter.options["init"] == "paper"


@pytest.mark.parametrize("total", [1, 2, 3, 5, 10, 20])
@pytest.mark.parametrize("steps", [3, 18, 21, 63, 300])
def test_the_parts_of_a_budget_have_the_steps_of_the_whole(total, steps):
    from math import ceil

    coarse, fine = split_epochs(total, 2 / 3)
    assert ceil(coarse * steps) + ceil(fine * steps) == total * steps
    odd = split_epochs(total, 0.55)
    assert 0 <= sum(ceil(part * steps) for part in odd) - total * steps <= 1


def test_a_recipe_made_in_python_is_arranged_too():
    recipe = loads(TEXT)
    other = replace(recipe, heft=replace(recipe.heft, order="reft_first"))
    assert [stage.adapter.method for stage in checked(other).stages] == ["loreft", "lora"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["heft.ordr=joint"], r'heft\.ordr: unknown key "ordr"\. Did you mean "order"'),
        (["heft.order=jiont"], r'heft\.order: "jiont" is not "lora_first", .*Did you mean'),
        (["heft.coarse_fraction=1.5"], r"heft\.coarse_fraction: 1\.5 is no share"),
        (["heft.epochs_total=0"], r"heft\.epochs_total: 0\.0 is not above 0"),
        (["stages.0.epochs=3"], r"stages\.0\.epochs: follows from `heft`"),
        (["stages.1.below=trained"], r"stages\.1\.below: follows from `heft`"),
        (["stages.1.optimiser.below_lr=1"], r"optimiser\.below_lr: follows from `heft`"),
        (["stages.1.adapter=lora"], "needs two stages, .*there are: lora, lora"),
        (["stages.1.adapter.method=consreft"], "consreft cannot start at the identity"),
        (["heft.stage2_lora_lr=1e-4"], r"heft\.stage2_lora_lr: has no effect without"),
        (["heft.stage2_train=reft+lora", "heft.order=joint"], "is for `order: lora_first`"),
        (["heft.merge_before_stage2=true", "heft.order=joint"], "needs `order: lora_first`"),
        (
            ["heft.merge_before_stage2=true", "heft.stage2_train=reft+lora"],
            "what is merged cannot be trained",
        ),
        (
            ["heft.merge_before_stage2=true", "model.quantize=int4"],
            r"merge_before_stage2: LoRA cannot be merged into quantised weights: they hold no",
        ),
        (["model.adapter=runs/x"], r"model\.adapter: HEFT starts from the base model"),
        (["epochs_total=3"], '"epochs_total" belongs under `heft:`'),
    ],
)  # fmt: skip
def test_what_heft_refuses(changes, message):
    with pytest.raises(RecipeError, match=message):
        loads(TEXT, changes)


def test_faults_have_their_lines():
    text = TEXT.replace("epochs_total: 3", "coarse_fraction: 2, order: lora")
    with pytest.raises(RecipeError) as caught:
        loads(text + "    epochs: 4\n")
    assert [(fault.where, fault.key) for fault in caught.value.faults] == [
        ("line 2", "heft.order"),
        ("line 2", "heft.coarse_fraction"),
        ("line 8", "stages.1.epochs"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("below: trained", "below: there is no adapter below"),
        ("merge_below: true", "merge_below: there is no LoRA below"),
        ("optimiser: {below_lr: 1.0e-3}", "below_lr: has no effect without `below: trained`"),
        ("epochs: 0", r"epochs: 0\.0 is not above 0\.$"),
        (
            "stages: [{adapter: lora, epochs: 0}, {adapter: loreft}]",
            r"stages\.0\.epochs: 0\.0 is not above 0\. 0 is for an adapter that a later stage",
        ),
        (
            "stages: [{adapter: loreft}, {adapter: red, merge_below: true}]",
            "loreft cannot be merged: only LoRA is a change of weights",
        ),
        (
            "stages: [{adapter: lora}, {adapter: red, merge_below: true, below: trained}]",
            "what is merged cannot be trained",
        ),
        (
            "model: {quantize: int8}\n"
            "stages: [{adapter: lora}, {adapter: red, merge_below: true}]",
            "merge_below: LoRA cannot be merged into quantised weights",
        ),
    ],
)  # fmt: skip
def test_what_a_stage_may_not_ask_of_those_below(text, message):
    with pytest.raises(RecipeError) as caught:
        loads(f"task: families\n{text}")
    import re

    assert any(re.search(message, str(fault)) for fault in caught.value.faults), caught.value.faults


def test_plain_stages_may_be_trained_together():
    recipe = loads(
        "task: families\nstages: [{adapter: lora, epochs: 0}, {adapter: red, below: trained}]"
    )
    assert [stage.epochs for stage in recipe.stages] == [0.0, 3.0]


def test_the_schema_knows_heft():
    entry = schema()["properties"]["heft"]
    assert entry["properties"]["order"]["enum"] == ["lora_first", "reft_first", "joint"]
    assert all(item.get("description") for item in entry["properties"].values())
    assert entry["additionalProperties"] is False and "budget" in entry["description"]
