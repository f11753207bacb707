"""HEFT runs: LoRA, then ReFT on top of it, in one budget of epochs; other orders; resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_folder

from reftune.config.loader import change, load
from reftune.config.recipe import (
    AdapterSpec,
    EvaluationSpec,
    HeftSpec,
    ModelSpec,
    OptimiserSpec,
    StageSpec,
    TaskSpec,
)
from reftune.errors import AdapterError, RecipeError, TrainingError
from reftune.model import quantised
from reftune.model.lookup import sites
from reftune.model.merge import merged_lora
from reftune.training.callbacks import read_metrics
from reftune.training.stages import plans, train
from reftune.training.trainer import ReftTrainer

QUIET = {"progress": False}
LORA, REFT = 3e-2, 2e-2


@pytest.fixture
def heft(recipe):
    """Return a function that makes a recipe: 24 rows, 3 steps an epoch, 3 epochs."""

    def make(name="one", stage=(), lora=(), reft=(), **settings):
        coarse = AdapterSpec("lora", options={"rank": 2, "dropout": 0.2, **dict(lora)})
        fine = AdapterSpec("loreft", positions="f2+l2", options={"rank": 2, **dict(reft)})
        parts = [(coarse, LORA, "cosine"), (fine, REFT, "linear")]
        stages = [
            StageSpec(adapter, optimiser=OptimiserSpec(lr, schedule=schedule), batch_size=8,
                      **dict(stage))
            for adapter, lr, schedule in parts
        ]  # fmt: skip
        made = replace(
            recipe,
            heft=HeftSpec(**settings),
            stages=stages,
            name=name,
            evaluation=EvaluationSpec(split="none"),
        )
        return change(made, ["seed=1"])

    return make


def folder_of(recipe):
    return Path(recipe.output) / recipe.name


def part(recipe, place):
    return load_file(folder_of(recipe) / place / "adapter_model.safetensors")


def files(recipe):
    found = sorted((folder_of(recipe) / "stack").rglob("*.safetensors"))
    assert len(found) == 2
    return [file.read_bytes() for file in found]


@pytest.fixture
def seen(monkeypatch):
    """Note, for each stage that trains: the model before and after, gradients, optimiser."""
    found = []
    real_train, real_step = ReftTrainer.train, ReftTrainer.training_step

    def spied(self, *args, **kwargs):
        before = {k: v.clone() for k, v in self.model.state_dict().items()}
        notes = {"trainer": self, "before": before, "grads": set(), "losses": []}
        found.append(notes)
        result = real_train(self, *args, **kwargs)
        notes["after"] = {k: v.clone() for k, v in self.model.state_dict().items()}
        return result

    def step(self, model, inputs, *args, **kwargs):
        notes = found[-1]
        if not notes["losses"]:
            notes["groups"] = [(len(g["params"]), g["lr"]) for g in self.optimizer.param_groups]
            notes["state"] = len(self.optimizer.state)
            notes["losses"] = _losses(self, model, inputs)
        loss = real_step(self, model, inputs, *args, **kwargs)
        notes["grads"] |= {n for n, p in model.named_parameters() if p.grad is not None}
        return loss

    monkeypatch.setattr(ReftTrainer, "train", spied)
    monkeypatch.setattr(ReftTrainer, "training_step", step)
    return found


def _losses(trainer, model, inputs):
    """Return losses of a batch in training mode, twice, and without our edits."""
    model.train()
    losses = []
    with torch.no_grad(), torch.random.fork_rng():
        for off in (False, False, True):
            for site in sites(model):
                site._disable_adapters = off
            losses.append(float(trainer.compute_loss(model, inputs)))
    for site in sites(model):
        site._disable_adapters = False
    trainer._sums.clear()
    return losses


def changed(notes):
    return {k for k, v in notes["after"].items() if not torch.equal(v, notes["before"][k])}


def test_stage_two_trains_the_reft_tensors_and_nothing_else(heft, seen):
    recipe = heft()
    report = train(recipe, **QUIET)
    assert [stage["steps"] for stage in report.model_extra["stages"]] == [6, 3]
    first, second = seen
    assert first["grads"] == changed(first) == {k for k in first["before"] if "lora_" in k}
    reft = {k for k in second["before"] if ".reft_" in k}
    assert second["grads"] == changed(second) == reft and reft
    one = folder_of(recipe) / "stages/1/adapter/adapter_model.safetensors"
    assert one.read_bytes() == (folder_of(recipe) / "stack/lora" / one.name).read_bytes()
    held = [*part(recipe, "stack/lora").values(), *part(recipe, "stack/reft").values()]
    assert report.trainable_parameters == sum(tensor.numel() for tensor in held)


def test_the_second_stage_begins_where_the_first_ended(heft, seen):
    train(heft(), **QUIET)
    with_reft, again, without = seen[1]["losses"]
    assert abs(with_reft - without) <= 1e-4
    assert with_reft == again, "frozen LoRA does not drop out"
    train(heft("paper", reft={"init": "paper"}), **QUIET)
    assert abs(seen[3]["losses"][0] - seen[3]["losses"][2]) > 1e-3


def test_the_second_stage_has_an_optimiser_and_schedule_of_its_own(heft, seen):
    recipe = heft()
    train(recipe, **QUIET)
    assert seen[1]["trainer"].optimizer is not seen[0]["trainer"].optimizer
    assert [notes["state"] for notes in seen] == [0, 0]
    rates = {1: [], 2: []}
    for line in read_metrics(folder_of(recipe) / "metrics.jsonl"):
        rates[line["stage"]].append(line["lr"])
    assert rates[2][0] == pytest.approx(REFT) and rates[1][-1] < 0.1 * LORA
    assert rates[2] == pytest.approx([REFT, REFT * 2 / 3, REFT / 3])
    warm = load(folder_of(recipe) / "recipe.yaml", ["stages.1.optimiser.warmup=0.5", "name=warm"])
    train(warm, **QUIET)
    lines = read_metrics(folder_of(warm) / "metrics.jsonl")
    own = [line["lr"] for line in lines if line["stage"] == 2]
    assert own[0] < own[1], "the warm-up is that of the stage"


def test_orders_give_other_adapters(heft, seen):
    found = {}
    for order in ("lora_first", "reft_first", "joint"):
        recipe = heft(order, order=order)
        report = train(recipe, **QUIET)
        assert report.trainable_parameters == 2 * 2 * (32 + 32) + 2 * 2 * (32 + 16) + 2 * 130
        found[order] = (part(recipe, "stack/lora"), part(recipe, "stack/reft"), report)
    for a, b in (("lora_first", "reft_first"), ("lora_first", "joint"), ("reft_first", "joint")):
        for one, other in zip(found[a][:2], found[b][:2]):
            assert all(not torch.equal(x, y) for x, y in zip(one.values(), other.values()))
    assert found["reft_first"][2].methods == ["loreft", "lora"]
    swapped = seen[3]
    assert swapped["grads"] == changed(swapped) == {k for k in swapped["before"] if "lora_" in k}
    joint = seen[4]
    assert [stage["steps"] for stage in found["joint"][2].model_extra["stages"]] == [0, 9]
    assert (
        joint["grads"]
        == changed(joint)
        == {k for k in joint["before"] if "lora_" in k or ".reft_" in k}
    )
    assert {lr for count, lr in joint["groups"] if count} == {LORA, REFT}


def test_lora_may_go_on_more_slowly(heft, seen):
    recipe = heft(stage2_train="reft+lora")
    train(recipe, **QUIET)
    second = seen[1]
    assert sorted({lr for count, lr in second["groups"] if count}) == pytest.approx(
        [0.1 * LORA, REFT]
    )
    assert second["grads"] == {k for k in second["before"] if "lora_" in k or ".reft_" in k}
    before, after = part(recipe, "stages/1/adapter"), part(recipe, "stack/lora")
    moved = [float((after[k] - before[k]).abs().max()) for k in before]
    assert 0 < max(moved) < 0.3 * 3 * LORA  # three steps of Adam at a tenth of its rate


def test_merging_changes_nothing_but_the_pace(heft, seen):
    plain, merged = heft("plain"), heft("merged", merge_before_stage2=True)
    for recipe in (plain, merged):
        train(recipe, **QUIET)
    one, other = part(plain, "stack/reft"), part(merged, "stack/reft")
    assert all(torch.allclose(one[k], other[k], atol=1e-4) for k in one)
    assert (folder_of(merged) / "stack/stack.json").is_file()
    assert part(plain, "stack/lora").keys() == part(merged, "stack/lora").keys()
    assert files(plain)[0] == files(merged)[0], "LoRA, byte for byte"
    inside = seen[3]
    bases = [k for k in inside["before"] if k.endswith("base_layer.weight")]
    assert bases and not any(torch.equal(inside["before"][k], seen[1]["before"][k]) for k in bases)
    model = inside["trainer"].model
    assert all(torch.equal(model.state_dict()[k], seen[1]["before"][k]) for k in bases), "put back"


def die_at(monkeypatch, number):
    """Let the run die at the forward pass of this number; return the list of steps done."""
    real, steps = ReftTrainer.training_step, []

    def step(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == number:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ReftTrainer, "training_step", step)
    return steps


@pytest.mark.parametrize(
    ("settings", "dies", "steps"),
    [
        ({}, 5, 9),  # step 5 of 6 in the first stage
        ({}, 8, 9),  # step 2 of 3 in the second
        ({"order": "reft_first"}, 6, 9),
        ({"order": "joint"}, 5, 9),
        ({"stage2_train": "reft+lora"}, 9, 9),
        ({"merge_before_stage2": True}, 8, 9),
    ],
)
def test_a_run_resumes_inside_either_stage(heft, monkeypatch, settings, dies, steps):
    stage = {"checkpoint_every": 1}
    straight = heft("straight", stage, **settings)
    report = train(straight, **QUIET)
    broken = replace(straight, name="broken")
    with monkeypatch.context() as patch:
        done = die_at(patch, dies)
        with pytest.raises(KeyboardInterrupt):
            train(broken, **QUIET)
        assert len(done) == dies and not (folder_of(broken) / "stack").exists()
        patch.undo()
    done = die_at(monkeypatch, 100)
    resumed = train(broken, resume=True, **QUIET)
    assert len(done) == steps - dies + 1, "nothing is done twice"
    assert files(broken) == files(straight)
    taken = [[stage["steps"] for stage in r.model_extra["stages"]] for r in (report, resumed)]
    assert taken[0] == taken[1], "the split of the epochs"
    assert load(folder_of(broken) / "recipe.yaml").heft == straight.heft


def test_the_best_weights_of_a_joint_stage_are_those_of_both(heft, monkeypatch):
    stage = {"evaluate_every": 1, "keep": "best", "checkpoint_every": 1}
    recipe = heft(stage=stage, order="joint")
    losses = iter([3.0, 1.0, *[2.0] * 20])
    real, kept = ReftTrainer.save_best, []

    def save_best(self, name, value, is_better):
        before = len(kept)
        real(self, name, next(losses), is_better)
        state = {k: p.detach().clone() for k, p in self.model.named_parameters() if p.requires_grad}
        kept.append(state)
        assert before + 1 == len(kept)

    monkeypatch.setattr(ReftTrainer, "save_best", save_best)
    train(recipe, **QUIET)
    held = {**part(recipe, "stack/lora"), **part(recipe, "stack/reft")}
    best = {k.replace(".default", ""): v for k, v in kept[1].items()}
    assert len(held) == len(best) == len(kept[0])
    for key, value in held.items():
        match = [v for k, v in best.items() if k.endswith(key.partition("layers.")[2])]
        assert any(torch.equal(value, v) for v in match), key


def test_one_method_alone_leaves_an_adapter(heft):
    recipe = heft(coarse_fraction=1.0)
    report = train(recipe, **QUIET)
    assert report.methods == ["lora"] and report.steps == 9
    assert (folder_of(recipe) / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_heft_ends_no_worse_than_lora_in_the_same_steps(heft):
    """A sanity check on sums, where both fit; no claim about methods."""
    ends = {}
    for name, fraction in (("heft", 2 / 3), ("lora", 1.0)):
        recipe = heft(name, epochs_total=30, coarse_fraction=fraction, reft={"rank": 8})
        assert train(recipe, **QUIET).steps == 90
        lines = read_metrics(folder_of(recipe) / "metrics.jsonl")
        ends[name] = sum(line["loss"] for line in lines[-6:]) / 6
    assert ends["heft"] <= ends["lora"]


def test_plans_see_the_stages_as_they_are_trained(heft):
    recipe = heft(reft={"init": "identity"})
    recipe = change(recipe, ["stages.1.adapter.positions=l1"])
    first, second = plans(recipe)
    assert "no intervention" in first.why
    assert "drops out" not in second.why and "trained too" not in second.why
    joint = change(recipe, ["heft.order=joint"])
    assert "trained too" in plans(joint)[1].why


def test_training_those_below_needs_some(adapted, trainer_for, rows):
    from reftune.training import stacked

    with pytest.raises(TrainingError, match="no adapter below"):
        stacked.StackTrainer(adapted(), trainer_for(adapted(), rows).args, None, rows)


def test_two_answers_are_scored_both_ways_beside_the_majority(heft, tmp_path):
    rows = [
        {"question": f"is {i} even", "passage": f"{i} is a number.", "answer": i % 3 > 0}
        for i in range(24)
    ]
    for split in ("train", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"boolq_passage_{split}.jsonl").write_text(text)
    task = TaskSpec("boolq_passage", data_dir=str(tmp_path))
    recipe = replace(heft(epochs_total=1), task=task, evaluation=EvaluationSpec(max_new_tokens=5))
    report = train(recipe, **QUIET)
    names = ("accuracy", "choice_accuracy", "auroc")
    for owner in ("adapter", "base"):
        found = [report.figures[f"{owner}_{name}"] for name in names]
        assert all(f.n == 24 and f.low <= f.mean <= f.high for f in found)
        assert found[2].error > 0
    assert report.figures["majority_accuracy"].mean == pytest.approx(16 / 24)
    assert report.figures["majority_choice_accuracy"] == report.figures["majority_accuracy"]
    assert "| majority of one | majority |" in (folder_of(recipe) / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(quantised.LIBRARIES))
def test_a_quantised_base_trains_lora_then_reft(heft, seen, kind, tmp_path):
    library = quantised.LIBRARIES[kind]
    pytest.importorskip(library, reason=f"{library} is not installed")
    base = ModelSpec(str(tiny_folder(tmp_path / "base", dim=64)), quantize=kind)
    recipe = replace(heft(), model=base)
    train(recipe, **QUIET)
    first, second = seen
    assert first["grads"] == {k for k in first["before"] if "lora_" in k}
    assert second["grads"] == {k for k in second["before"] if ".reft_" in k}
    one = folder_of(recipe) / "stages/1/adapter/adapter_model.safetensors"
    assert one.read_bytes() == (folder_of(recipe) / "stack/lora" / one.name).read_bytes()
    with pytest.raises(RecipeError, match="LoRA cannot be merged into quantised weights"):
        change(recipe, ["heft.merge_before_stage2=true"])
    with pytest.raises(AdapterError, match="merged into quantised weights"):
        merged_lora(second["trainer"].model).__enter__()


def test_accumulation_does_not_change_a_joint_stage(heft):
    whole = heft("whole", order="joint", lora={"dropout": 0.0})
    parts = heft("parts", {"micro_batch_size": 2}, order="joint", lora={"dropout": 0.0})
    for recipe in (whole, parts):
        train(recipe, **QUIET)
    for place in ("stack/lora", "stack/reft"):
        one, other = part(whole, place), part(parts, place)
        assert all(torch.allclose(one[key], other[key], atol=1e-5) for key in one)
