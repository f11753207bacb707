"""A value model of its own: what it is, what it learns, what becomes of it."""

from __future__ import annotations

import copy

import pytest
import torch
from crashes import StopAt
from online_toys import (
    FULL,
    LORA,
    LOREFT,
    Fixed,
    Toy,
    adapted,
    equal,
    objective_of,
    sampler_of,
    shake,
    trainer_of,
    weights,
)
from tiny import tiny_tokenizer

from reftune.errors import RecipeError
from reftune.interventions.base import Orthonormal
from reftune.model.checkpoint import save_adapter
from reftune.model.run import Runner
from reftune.objectives.online import World
from reftune.training.collate import Collator
from reftune.training.rollouts import collate
from reftune.training.snapshot import Second, Snapshot

KINDS = pytest.mark.parametrize("spec", [LOREFT, LORA, FULL], ids=lambda s: s.method)


def separate(**options):
    return objective_of(trunk="separate", **options)


def second_of(trainer):
    found = trainer.parameters.items()
    return {n.removeprefix("second."): p.detach().clone() for n, p in found if "second." in n}


def rolled(model, objective):
    """Return a measured rollout of six answers, the second model, and the frozen policy."""
    found = sampler_of(model, objective)([0, 5, 12, 3, 21, 9], 4)
    batch = collate(found, Collator.of(tiny_tokenizer()))
    second, snapshot = Second(model), Snapshot(model)
    objective.head, objective.second = objective.make_head(32), second.swapped
    with torch.no_grad():
        objective.experience(Runner(model), snapshot.swapped, [batch], World())
    return batch, second


def given(grad, parameter):
    return torch.zeros_like(parameter) if grad is None else grad


@KINDS
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_values_train_the_second_model_as_if_it_were_another_model(spec, bf16):
    """Its gradients are those of a copy of the model, made and run apart; the policy's are none."""
    torch.manual_seed(0)
    model, objective = adapted(spec), separate(alpha=1.0)
    batch, second = rolled(model, objective)
    with torch.no_grad():
        for p in second.parameters.values():
            p += 0.1
    alone = copy.deepcopy(model)
    for name, p in alone.named_parameters():
        if name in second.parameters:
            p.data.copy_(second.parameters[name])
    batch.measured["advantages"].zero_()
    batch.measured["returns"].fill_(1.0)
    batch.measured["values"].fill_(0.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        seen = objective.look(Runner(model), batch)
        objective(Runner(model), batch, None).loss.backward()
        other = objective_of(alpha=1.0)
        other.head = copy.deepcopy(objective.head)
        other.head.zero_grad()
        far = other.look(Runner(alone), batch)
        other(Runner(alone), batch, None).loss.backward()
    assert torch.equal(seen.values, far.values) and not torch.equal(seen.logp, far.logp)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters() if p.requires_grad)
    wanted = {n: p.grad for n, p in alone.named_parameters() if p.requires_grad}
    assert wanted.keys() == second.parameters.keys()
    assert any(grad is not None and grad.any() for grad in wanted.values())
    for name, own in second.parameters.items():
        assert torch.equal(given(own.grad, own), given(wanted[name], own)), name


@KINDS
def test_it_starts_as_the_policy_and_stands_in_without_a_trace(spec):
    model, objective = adapted(spec), separate()
    before, batch = weights(model), rolled(model, objective)[0]
    first = objective_of()
    first.head = objective.head
    with torch.no_grad():
        shared = first.look(Runner(model), batch)
    assert torch.equal(batch.measured["values"], shared.values)
    seen = objective.look(Runner(model), batch)
    assert torch.equal(seen.logp, batch.measured["logp"]), "the first ratio is 1"
    assert equal(weights(model), before)
    shake(model, 0.2)
    with torch.no_grad():
        assert torch.equal(objective.look(Runner(model), batch).values, shared.values)


def test_a_tied_weight_has_one_copy_in_all_its_places():
    model = adapted(FULL, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    second = Second(model)
    with second.swapped():
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight is second.parameters["model.embed_tokens.weight"]
    assert model.lm_head.weight is not second.parameters["model.embed_tokens.weight"]


@KINDS
def test_both_are_trained_and_the_artefact_holds_the_policy_alone(spec, tmp_path):
    model = adapted(spec)
    base = {n: t.clone() for n, t in model.state_dict().items() if n not in weights(model)}
    before = weights(model)
    save_adapter(model, tmp_path / "before")
    trainer = trainer_of(model, tmp_path / "run", separate(), Toy("7"), max_steps=2)
    trainer.train()
    second, after = second_of(trainer), weights(model)
    moved = [n for n in before if not torch.equal(second[n], before[n])]
    assert len(moved) >= len(before) - 1, "all but an untied output head, which has no values"
    assert all(not torch.equal(second[n], after[n]) for n in before)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in base.items())
    save_adapter(model, tmp_path / "after")
    sizes = [
        sum(f.stat().st_size for f in (tmp_path / name).rglob("*.safetensors"))
        for name in ("before", "after")
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("spec", [LOREFT, LORA], ids=lambda s: s.method)
def test_resume_is_bit_equal(tmp_path, spec):
    def make(folder, **more):
        stage = {"checkpoint_every": 2, "micro_batch_size": 4, **more}
        return trainer_of(adapted(spec), folder, separate(), Toy("7"), **stage)

    whole = make(tmp_path / "a")
    whole.train()
    broken = make(tmp_path / "b", callbacks=[StopAt(3)])
    with pytest.raises(RuntimeError, match="crash"):
        broken.train()
    resumed = make(tmp_path / "b")
    shake(resumed.model, 0.1)
    resumed.train(True)
    assert equal(weights(whole.model), weights(resumed.model))
    assert equal(second_of(whole), second_of(resumed)) and second_of(whole)


def test_accumulation_gives_the_same_trajectory(tmp_path):
    found, fixed = [], Fixed(sampler_of(adapted(), objective_of(), Toy("7")))
    for micro in (8, 2):
        folder, task = tmp_path / str(micro), Toy("7")
        trainer = trainer_of(adapted(), folder, separate(), task, micro_batch_size=micro)
        trainer.sampler = fixed
        trainer.train()
        found.append({**weights(trainer.model), **second_of(trainer)})
    assert all(torch.allclose(value, found[1][name], atol=2e-5) for name, value in found[0].items())


@pytest.mark.quick
def test_the_rotation_of_the_second_is_not_decayed_either(tmp_path):
    trainer = trainer_of(adapted(), tmp_path, separate(), max_steps=1, weight_decay=0.1)
    trainer.train()
    groups = trainer.optimizer.param_groups
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    names = {n for n, p in trainer.parameters.items() if id(p) in decayed and "second" in n}
    assert names and {name.rpartition(".")[2] for name in names} == {"reft_weight"}


@pytest.mark.quick
def test_dimensions_trained_apart_are_kept_of_the_policy_not_of_the_second():
    model = adapted()
    second = Second(model)
    module = next(m for m in model.modules() if isinstance(m, Orthonormal))
    select = torch.tensor([[True, False]])
    module.rotation(select)
    settled = module._settled
    with second.swapped():
        module.rotation(select)
        assert module._settled is not settled
    assert module._settled is settled


@pytest.mark.quick
def test_carft_has_one_trunk():
    with pytest.raises(RecipeError, match="trunk is separate: values and vectors of carft share"):
        objective_of("carft", trunk="separate")
