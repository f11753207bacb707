"""The online loop: what it trains and what not, accumulation, resume, the best weights."""

from __future__ import annotations

import itertools

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

from reftune.errors import TrainingError
from reftune.model.build import apply_adapter
from reftune.training import checkpoints


def logged(trainer):
    """Return what was logged; tokens are counted from a resume on, and added up when written."""
    found = trainer.state.log_history
    return [{k: v for k, v in line.items() if k != "tokens"} for line in found]


def head_of(trainer):
    return {n: p.detach().clone() for n, p in trainer.objective.head.named_parameters()}


@pytest.mark.quick
@pytest.mark.parametrize("spec", [LOREFT, LORA])
def test_only_the_adapter_and_the_head_move(spec, tmp_path):
    model = adapted(spec)
    names = set(weights(model))
    base = {n: t.clone() for n, t in model.state_dict().items() if n not in names}
    before = weights(model)
    trainer = trainer_of(model, tmp_path, max_steps=2)
    trainer.train()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in base.items())
    assert all(not torch.equal(before[n], value) for n, value in weights(model).items())
    fresh = trainer._head()
    assert not torch.equal(fresh.linear.weight, trainer.objective.head.linear.weight)
    assert not model.training and trainer.state.global_step == 2


def test_full_fine_tuning_moves_everything(tmp_path):
    model = adapted(FULL)
    before = weights(model)
    trainer_of(model, tmp_path, max_steps=2, lr=1e-3).train()
    assert all(not torch.equal(before[n], value) for n, value in weights(model).items())


@pytest.mark.quick
def test_a_step_is_logged_with_all_that_is_watched(tmp_path):
    trainer = trainer_of(adapted(), tmp_path, max_steps=3)
    trainer.train()
    steps = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    wanted = {"reward", "accuracy", "answered", "ended", "length", "kl", "entropy", "advantage"}
    wanted |= {"advantage_std", "explained_variance", "policy_loss", "value_loss", "clip_fraction"}
    assert all(line.keys() >= wanted for line in steps)
    assert steps[0]["kl"] == 0.0 != steps[1]["kl"]
    assert steps[0]["tokens"] < steps[1]["tokens"] < steps[2]["tokens"]
    drawn = {name for row in trainer.objective.plots["rollouts"] for name in row}
    assert drawn <= steps[0].keys()


@pytest.mark.quick
def test_every_question_is_asked_once_an_epoch(tmp_path):
    trainer = trainer_of(adapted(), tmp_path, max_steps=6)
    asked, sampler = [], trainer.sampler

    def noting(questions, step):
        asked.append(questions)
        return sampler(questions, step)

    trainer.sampler = noting
    trainer.train()
    assert [len(questions) for questions in asked] == [8, 8, 6, 8, 8, 6]
    for epoch in (asked[:3], asked[3:]):
        assert sorted(itertools.chain(*epoch)) == list(range(22))
    assert asked[:3] != asked[3:]


@pytest.mark.parametrize(
    ("name", "crash"), [("reinforced", 1), ("reinforced", 4), ("online_st", 3)]
)
def test_resume_is_bit_equal(tmp_path, name, crash):
    def make(folder, **more):
        stage = {"checkpoint_every": 2, "micro_batch_size": 4, "evaluate_every": 2, **more}
        model = adapted()
        return trainer_of(model, folder, objective_of(name), Toy("7"), True, **stage)

    whole = make(tmp_path / "a")
    whole.train()
    broken = make(tmp_path / "b", callbacks=[StopAt(crash)])
    with pytest.raises(RuntimeError, match="crash"):
        broken.train()
    assert (checkpoints.last_checkpoint(tmp_path / "b") is None) == (crash < 2)
    torch.manual_seed(99)
    resumed = make(tmp_path / "b")
    if crash >= 2:  # the frozen policy is the one on disk, whatever the model has become
        shake(resumed.model, 0.1)
    resumed.train(True)
    assert equal(weights(whole.model), weights(resumed.model))
    assert logged(resumed) == logged(whole)
    assert len(whole.state.log_history) == 6 + 4
    if name == "reinforced":
        assert equal(head_of(whole), head_of(resumed))
    for one, two in zip(whole.optimizer.state.values(), resumed.optimizer.state.values()):
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_finished_stage_resumes_to_its_end(tmp_path):
    trainer = trainer_of(adapted(), tmp_path, max_steps=2)
    trainer.train()
    again = trainer_of(adapted(), tmp_path, max_steps=2)
    assert again.train(True).global_step == 2
    assert equal(weights(trainer.model), weights(again.model))


def test_accumulation_gives_the_same_trajectory(tmp_path):
    found = []
    fixed = Fixed(sampler_of(adapted(), objective_of(), Toy("7")))
    for micro in (8, 2):
        trainer = trainer_of(
            adapted(), tmp_path / str(micro), task=Toy("7"), micro_batch_size=micro
        )
        trainer.sampler = fixed
        trainer.train()
        found.append((weights(trainer.model), head_of(trainer), trainer.state.log_history))
    for a, b in zip(found[0][:2], found[1][:2], strict=True):
        for name, value in a.items():
            assert torch.allclose(value, b[name], atol=2e-5), name
    for one, other in zip(found[0][2], found[1][2], strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.quick
def test_the_rotation_is_never_decayed(tmp_path):
    trainer = trainer_of(adapted(), tmp_path, max_steps=1, weight_decay=0.1)
    trainer.train()
    decayed = {
        id(p) for g in trainer.optimizer.param_groups if g["weight_decay"] for p in g["params"]
    }
    names = {name.rpartition(".")[2] for name, p in trainer.parameters.items() if id(p) in decayed}
    assert names == {"reft_weight", "weight"}, "the source's matrix, and the value head's"


@pytest.mark.parametrize("values", [[0.1, 0.5, 0.9, 0.2], [0.9, 0.5, 0.9, 0.2]])
def test_the_best_weights_are_kept_the_start_is_one_of_them(tmp_path, values):
    seen, model = [], adapted()

    def score():
        seen.append(weights(model))
        return values[len(seen) - 1]

    stage = {"keep": "best", "evaluate_every": 1, "max_steps": 3}
    trainer = trainer_of(model, tmp_path, validation=True, score=("accuracy", score), **stage)
    trainer.train()
    assert len(seen) == 4 and equal(weights(model), seen[values.index(0.9)])
    assert not equal(seen[0], seen[2])
    found = [line["eval_accuracy"] for line in trainer.state.log_history if "eval_loss" in line]
    assert found == values


def test_best_weights_that_are_gone_stop_a_resume_and_those_aside_are_taken(tmp_path):
    values = iter([0.9, 0.5, 0.4])
    stage = {"keep": "best", "evaluate_every": 1, "max_steps": 2}

    def make(model):
        score = ("accuracy", lambda: next(values))
        return trainer_of(model, tmp_path, validation=True, score=score, **stage)

    model, again = adapted(), adapted()
    make(model).train()
    best = tmp_path / checkpoints.BEST
    best.rename(tmp_path / "elsewhere")
    with pytest.raises(TrainingError, match="the folder is missing"):
        make(adapted()).train(True)
    (tmp_path / "elsewhere").rename(tmp_path / ".old-best")
    make(again).train(True)
    assert equal(weights(again), weights(model)) and best.is_dir()


def test_evaluating_leaves_the_trajectory_alone(tmp_path):
    one, two = adapted(), adapted()
    trainer_of(one, tmp_path / "a", max_steps=3).train()
    noisy = ("accuracy", lambda: float(torch.rand(())))
    trainer_of(two, tmp_path / "b", None, None, True, noisy, max_steps=3, evaluate_every=1).train()
    assert equal(weights(one), weights(two))


@pytest.mark.quick
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = adapted()
    trainer = trainer_of(model, tmp_path, max_steps=2)
    real = trainer.objective.ppo

    def broken(*args):
        out = real(*args)
        out.loss = out.loss * float("nan")
        return out

    trainer.objective.ppo = broken
    with pytest.raises(TrainingError, match="The loss is nan at step 1"):
        trainer.train()
    assert checkpoints.last_checkpoint(tmp_path) is None


@pytest.mark.quick
def test_what_cannot_be_trained_is_refused(tmp_path, monkeypatch):
    frozen = adapted()
    frozen.requires_grad_(False)
    with pytest.raises(TrainingError, match="no trainable parameters"):
        trainer_of(frozen, tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TrainingError, match='"reinforced" trains on whole models only'):
        trainer_of(adapted(), tmp_path)


@pytest.mark.slow
def test_it_learns_to_emit_a_digit(tmp_path):
    """From hardly any reward to more than 0.9, full weights from scratch, without a warm-up."""
    from tiny import tiny_llama

    model = apply_adapter(tiny_llama(), FULL, 0)
    objective = objective_of(beta=0.01, max_new_tokens=2)
    stage = {"batch_size": 22, "max_steps": 150, "lr": 3e-3}
    trainer = trainer_of(model, tmp_path, objective, Toy("7"), **stage)
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert sum(rewards[:5]) / 5 < 0.1 and sum(rewards[-10:]) / 10 > 0.9


@pytest.mark.slow
def test_more_penalty_means_less_drift(tmp_path):
    ends = []
    for beta in (0.0, 0.5):
        objective = objective_of(beta=beta, max_new_tokens=2)
        stage = {"batch_size": 22, "max_steps": 40, "lr": 1e-3}
        model = adapted(FULL)
        trainer = trainer_of(model, tmp_path / str(beta), objective, Toy("7"), **stage)
        trainer.train()
        ends.append(trainer.state.log_history[-1]["kl"])
    assert ends[0] > 2 * abs(ends[1])
