"""Recipes: short forms, resolved form, overrides, and all faults at once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reftune.config.loader import change, dump, from_dict, load, loads, to_dict
from reftune.config.recipe import AdapterSpec, Recipe, StageSpec, TaskSpec
from reftune.errors import RecipeError

pytestmark = pytest.mark.quick

SHORT = """\
model: nano
task: families
adapter:
  method: loreft
  rank: 8
  layers: [0, 4-7]
  positions: f2+l2
optimiser: {lr: 1e-3}
epochs: 3
"""


def faults_of(text, overrides=()):
    with pytest.raises(RecipeError) as caught:
        loads(text, overrides)
    return [str(fault) for fault in caught.value.faults]


def test_short_form_is_one_stage():
    recipe = loads(SHORT)
    assert recipe.model.name == "nano"
    assert recipe.task == TaskSpec(name="families")
    (stage,) = recipe.stages
    assert stage.adapter.options == {"rank": 8}
    assert stage.adapter.layers == "0,4-7"
    assert stage.optimiser.lr == 1e-3
    assert stage.epochs == 3.0 and isinstance(stage.epochs, float)


def test_long_form_says_the_same():
    long = """
model: {name: nano}
task: {name: families}
stages:
  - adapter: {method: loreft, layers: "0,4-7", positions: f2+l2, options: {rank: 8}}
    objective: {name: sft}
    optimiser: {lr: 0.001}
    epochs: 3.0
"""
    assert loads(long) == loads(SHORT)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("5", [5]), ("[0, -1]", [0, -1]), ('"0.5-1.0"', "0.5-1.0"), ("late", "late"), ("4-7", "4-7")],
)
def test_layers_in_every_form(layers, expected):
    recipe = loads(f"task: families\nadapter: {{layers: {layers}}}")
    assert recipe.stages[0].adapter.layers == expected


def test_yaml_reads_what_people_mean():
    recipe = loads("task: {name: own, train: no, prompt: on}\noptimiser: {lr: 3e-4}\nseed: 007")
    assert (recipe.task.train, recipe.task.prompt) == ("no", "on")
    assert recipe.stages[0].optimiser.lr == 3e-4
    assert recipe.seed == 7


def test_dump_is_complete_and_reads_back_equal():
    recipe = loads(SHORT, ["track=trackio", "task.style=prose", "optimiser.betas=[0.8, 0.99]"])
    text = dump(recipe)
    assert loads(text) == recipe
    assert "weight_decay: 0.0" in text  # defaults are written out
    assert to_dict(recipe)["stages"][0]["adapter"]["rank"] == 8


def test_dump_keeps_several_stages_and_objective_options():
    recipe = Recipe(
        task=TaskSpec(name="families"),
        stages=[
            StageSpec(AdapterSpec(method="lora", options={"rank": 4, "alpha": 8.0})),
            StageSpec(AdapterSpec(method="direft", tied=False)),
        ],
    )
    assert loads(dump(recipe)) == recipe


def test_load_names_the_run_after_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("task: families\n", encoding="utf-8")
    assert load(path).name == "mine"
    path.write_text("task: families\nname: other\n", encoding="utf-8")
    assert load(path).name == "other"
    assert load(path, ["name=third"]).name == "third"


def test_load_says_what_is_wrong_with_the_file(tmp_path):
    (tmp_path / "recipe.yaml").write_text("task: families", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"There is no recipe .*recipes\.yaml.*recipe\.yaml"):
        load(tmp_path / "recipes.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        load(tmp_path)
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        load(tmp_path / "bad.yaml")


def test_broken_yaml_names_line_and_column():
    with pytest.raises(RecipeError, match=r"no valid YAML: line 2, column 14: expected ',' or ']'"):
        loads("task: families\nepochs: [1, 2")


def test_all_faults_at_once_each_with_its_line():
    found = faults_of(
        """\
modle: nano
task: {name: familie}
adapter:
  method: loreft
  rnak: 8
  dropout: 1.5
  layers: 4..x
  positions: f2+k2
objective: sfft
optimiser: {lr: "1e-3", schedule: cosin}
epochs: three
lr: 3
batch_size: 12
micro_batch_size: 5
name: 12
epochs: 4
"""
    )
    text = "\n".join(found)
    for part in (
        'line 1, modle: unknown key "modle". Did you mean "model"?',
        'line 2, task.name: there is no task "familie". Did you mean "families"?',
        'line 5, adapter.rnak: unknown key "rnak". Did you mean "rank"? Options of loreft:',
        "line 6, adapter.dropout: dropout is 1.5. Use a value from 0 to below 1.",
        "line 7, adapter.layers: '4..x' in the layer choice",
        'line 8, adapter.positions: "k2" in the position rule "f2+k2" is not a term.',
        'line 9, objective.name: there is no objective "sfft". Did you mean "sft"?',
        'line 10, optimiser.lr: "1e-3" is not a number. Remove the quotes: 1e-3.',
        'line 10, optimiser.schedule: "cosin" is not "linear", "cosine" or "constant".',
        'line 12, lr: unknown key "lr". "lr" belongs under `optimiser:`.',
        "line 14, micro_batch_size: 5 does not divide batch_size 12. Use one of 1, 2, 3, 4, 6, 12.",
        'line 15, name: 12 is not text. Put it in quotes: "12".',
        "line 16, epochs: was given in line 11 already. Keep one.",
    ):
        assert part in text
    assert len(found) == 13
    lines = [int(item.split(",")[0].split()[1]) for item in found]
    assert lines == sorted(lines)


def test_a_fault_does_not_cause_another():
    # the bad batch size must not also be compared with micro_batch_size
    assert faults_of("task: families\nbatch_size: x\nmicro_batch_size: 5") == [
        'line 2, batch_size: "x" is not a whole number.'
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 0", "epochs: 0.0 is not above 0"),
        ("batch_size: -2", "batch_size: -2 is not above 0"),
        ("optimiser: {lr: .nan}", "optimiser.lr: NaN is not"),
        ("optimiser: {warmup: 1}", "optimiser.warmup: 1.0 is no share of all steps"),
        ("optimiser: {betas: [0.9, 1.0]}", "optimiser.betas: .* are not both from 0 to below 1"),
        ("optimiser: {betas: [0.9]}", "optimiser.betas: .* is not a list of 2 numbers"),
        ("name: ../x", 'name: "../x" cannot name a folder'),
        ("track: [wanb]", 'track: there is no tracker "wanb". Did you mean "wandb"'),
        ("evaluation: {samples: 3}", "evaluation.samples: 3 greedy answers are all the same"),
        ("evaluation: {top_p: 0.0}", "evaluation.top_p: 0.0 is not above 0"),
        ("evaluation: {compare_base: 1}", "evaluation.compare_base: 1 is not true or false"),
        ("objective: classification", "objective.name: .* needs `head: classification`"),
        ("model: {head: classification}", "objective.name: .*`objective: classification`"),
        ("adapter: full\nmodel: {quantize: int4}", "adapter.method: quantised weights cannot"),
        ("adapter: head_only", "adapter.method: there is no head to train"),
        ("adapter: {tied: false, positions: last}", "adapter.tied: .*not just a prefix and a suf"),
        ("adapter: {method: lora, rank: 0}", "adapter.rank: rank is 0"),
        ("adapter: 3", "adapter: 3 is no mapping"),
        ("stages: []", "stages: is no list of stages"),
        ("stages: [{epochs: 1}]\nepochs: 2", "epochs: stands beside `stages`"),
        ("seed: {a: 1}", "seed: .* is not a whole number"),
        ("optimizer: {lr: 1e-3}", 'unknown key "optimizer". Write "optimiser"'),
        ("model: {batch_size: 2}", '"batch_size" belongs beside `adapter:`'),
        ("task: {seed: x}", 'task.seed: "x" is not a whole number'),
        ("prompt: {question}", '"prompt" belongs under `task:`'),
        ("name: !!python/object:os.system x", "the tag .* is not allowed"),
    ],
)
def test_each_fault(text, message):
    task = "" if text.startswith("task") else "task: families\n"
    if text.startswith("task"):
        text = text.replace("{", "{name: families, ", 1)
    with pytest.raises(RecipeError, match=message):
        loads(task + text)


def test_task_faults():
    with pytest.raises(RecipeError, match=r"task\.test: .a\.jsonl. is the train data too"):
        loads("task: {train: a.jsonl, test: a.jsonl}")
    with pytest.raises(RecipeError, match="own data need `train:`"):
        loads("model: nano")
    with pytest.raises(RecipeError, match=r"Options of task families: .*style"):
        loads("task: {name: families, stlye: prose}")


def test_a_recipe_must_be_a_mapping():
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        loads("- a\n- b")
    with pytest.raises(RecipeError, match="own data need"):
        loads("")


def test_stage_faults_name_the_stage():
    found = faults_of(
        "task: families\nstages:\n  - adapter: loreft\n  - adapter: {method: red, rank: 2}\n"
    )
    assert len(found) == 1
    assert found[0].startswith('line 4, stages.1.adapter.rank: unknown key "rank"')
    assert "Options of red: dropout, dropout_on, init, train_scale" in found[0]


def test_overrides_reach_every_place():
    recipe = loads(
        SHORT,
        [
            "adapter.rank=2",
            "stages.0.adapter.positions=last",
            "task.options.style=json",
            "optimiser.lr=5e-5",
            "evaluation.split=none",
            "seed=3",
            "name='a b'",
            "max_steps=null",
        ],
    )
    adapter = recipe.stages[0].adapter
    assert adapter.options == {"rank": 2} and adapter.positions == "last"
    assert recipe.task.options == {"style": "json"}
    assert recipe.stages[0].optimiser.lr == 5e-5
    assert (recipe.evaluation.split, recipe.seed, recipe.name) == ("none", 3, "a b")


@pytest.mark.parametrize("template", ["{question}", "{question} Answer:", "Q: {a}", "[{a}"])
def test_templates_need_no_quotes_on_the_command_line(template):
    assert loads("task: {train: a.csv}", [f"task.prompt={template}"]).task.prompt == template
    with pytest.raises(RecipeError, match=r"line 1, task\.prompt: .* Put a template in quotes"):
        loads("task: {train: a.csv, prompt: {question}}")


def test_an_override_replaces_what_stands_there():
    recipe = loads("task: {name: families, train_size: 5}", ["task=passages"])
    assert recipe.task == TaskSpec(name="passages")


def test_override_faults_name_the_override():
    found = faults_of(SHORT, ["adapter.rnak=8", "optimzer.lr=1", "foo", "epochs=x"])
    text = "\n".join(found)
    assert '--set adapter.rnak=8, adapter.rnak: unknown key "rnak". Did you mean "rank"?' in text
    assert '--set optimzer.lr=1: unknown key "optimzer". Did you mean "optimiser"?' in text
    assert "--set foo: is no KEY=VALUE" in text
    assert '--set epochs=x, epochs: "x" is not a number.' in text


def test_override_of_one_of_two_stages_must_name_it():
    two = "task: families\nstages: [{adapter: lora}, {adapter: loreft}]"
    with pytest.raises(RecipeError, match=r"has 2 stages. Write stages\.0\.adapter\.rank"):
        loads(two, ["adapter.rank=1"])
    with pytest.raises(RecipeError, match='entries 0 to 1; "2" is none'):
        loads(two, ["stages.2.adapter.rank=1"])
    assert loads(two, ["stages.1.adapter.rank=1"]).stages[1].adapter.options == {"rank": 1}


def test_another_method_drops_options_it_lacks():
    assert loads(SHORT, ["adapter.method=red"]).stages[0].adapter.options == {}
    assert loads(SHORT, ["adapter.method=direft"]).stages[0].adapter.options == {"rank": 8}
    with pytest.raises(RecipeError, match=r"--set adapter\.rank=2.*Options of red"):
        loads(SHORT, ["adapter.method=red", "adapter.rank=2"])


def test_change_and_from_dict():
    recipe = loads(SHORT)
    changed = change(recipe, ["adapter.rank=1", "seed=9"])
    expected = replace(
        recipe.stages[0], adapter=replace(recipe.stages[0].adapter, options={"rank": 1})
    )
    assert changed == replace(recipe, seed=9, stages=[expected])
    assert change(recipe, []) is recipe
    assert from_dict({"task": "families"}) == loads("task: families")
    with pytest.raises(RecipeError, match=r"The recipe has 1 fault:\n  epochs: "):
        from_dict({"task": "families", "epochs": "x"})


def test_anchors_and_merge_keys_work():
    recipe = loads(
        "task: families\nstages:\n"
        "  - &first {adapter: lora, epochs: 1}\n  - {<<: *first, adapter: loreft}\n"
    )
    assert [stage.epochs for stage in recipe.stages] == [1.0, 1.0]
    assert recipe.stages[1].adapter.method == "loreft"


def test_own_intervention_is_known_and_checked(monkeypatch):
    from reftune import interventions
    from reftune.interventions.red import Red

    monkeypatch.setitem(interventions.REGISTRY._targets, "mine", Red)
    recipe = loads("task: families\nadapter: {method: mine, train_scale: false}")
    assert recipe.stages[0].adapter.options == {"train_scale": False}
    with pytest.raises(RecipeError, match=r"adapter\.train_scale: 3 is not true or false"):
        loads("task: families\nadapter: {method: mine, train_scale: 3}")
