"""Answers and what they are worth: noise with keys of its own, prompts, scores, the frozen copy."""

from __future__ import annotations

import pytest
import torch
from online_toys import FULL, LOREFT, Toy, adapted, equal, objective_of, sampler_of, shake, weights

from reftune.config.recipe import TaskSpec
from reftune.errors import RecipeError, TrainingError
from reftune.tasks.own import Own
from reftune.training.encode import IGNORE
from reftune.training.rollouts import Sampler, score
from reftune.training.snapshot import Snapshot, restore

pytestmark = pytest.mark.quick


def texts(found):
    return [rollout.row.input_ids for rollout in found]


def test_noise_belongs_to_seed_step_question_and_sample():
    model, objective = adapted(), objective_of(samples=2)
    sampler = sampler_of(model, objective)
    whole = texts(sampler([3, 8, 0], 7))
    assert len(whole) == 6 and whole[0] != whole[1], "samples of a question differ"
    assert texts(sampler([0], 7)) == whole[4:], "whoever else is in the batch"
    small = sampler_of(model, objective_of(samples=2, generation_batch=1))
    assert texts(small([8, 3], 7)) == whole[2:4] + whole[:2]
    assert texts(sampler([3, 8, 0], 8)) != whole
    sampler.seed += 1
    assert texts(sampler([3, 8, 0], 7)) != whole


def test_an_answer_is_the_prompt_of_evaluation_and_what_was_written():
    sampler = sampler_of(adapted(), objective_of())
    for question, rollout in zip([4, 9], sampler([4, 9], 0), strict=True):
        gold, row = sampler.rows[question], rollout.row
        assert row.input_ids[: row.prompt_len] == gold.input_ids[: gold.prompt_len]
        assert row.labels[: row.prompt_len] == [IGNORE] * row.prompt_len
        assert row.labels[row.prompt_len :] == row.input_ids[row.prompt_len :]
        assert rollout.gold is gold and row.id == gold.id == f"train-{question}"


def test_answers_do_not_touch_torch_s_random_numbers():
    before = torch.get_rng_state()
    sampler_of(adapted(), objective_of())([1, 2], 0)
    assert torch.equal(before, torch.get_rng_state())


def test_prompts_leave_room_for_the_answer():
    model, objective = adapted(), objective_of(max_new_tokens=60)
    sampler = sampler_of(model, objective)
    assert max(len(row.ids) for row in sampler.prompts) == 4
    assert all(row.ids[0] == 1 for row in sampler.prompts), "the BOS is never cut"
    told = (sampler.task, sampler.rows, sampler.examples, objective_of(max_new_tokens=64).config)
    with pytest.raises(RecipeError, match=r"max_new_tokens 64 leaves no room .* max_len 64"):
        Sampler(model, sampler.tokenizer, *told, 64, 1)


# The rewards of Luong et al. 2024, on natural-language reasoning

TRIGGER = "Therefore, the answer is: "
NUMBERS = [
    (f"3 * 6 = 18.\n{TRIGGER}18", 1.0, 1.0),
    (f"{TRIGGER}18.005", 1.0, 1.0),
    (f"{TRIGGER}18.02", 0.1, 0.1),
    (f"{TRIGGER}17\n{TRIGGER}18", 1.0, 1.0),
    (f"{TRIGGER}1,000", 0.0, 0.0),
    (f"{TRIGGER}$18", 0.0, 0.0),
    (f"{TRIGGER}18 dollars", 0.0, 0.0),
    ("Well, eighteen.", 0.0, 0.0),
    ("18", 0.0, 1.0),  # no trigger: the published code reads the whole text
    (f"{TRIGGER}nan", 0.0, 0.1),
]
CHOICES = [(f"{TRIGGER}c", 1.0), (f"{TRIGGER}b", 0.1), (f"{TRIGGER}nonsense", 0.1)]


def own(reward):
    return Own(TaskSpec(train="x.jsonl", reward=reward))


def example(answer):
    from reftune.tasks.base import Example

    return Example("1", "?", answer, answer)


@pytest.mark.parametrize(("text", "value", "published"), NUMBERS)
def test_the_table_of_rewards(text, value, published):
    found = score(own("numeric_trigger"), text, example("18"), 0.1)
    assert found.value == value and found.right == (value == 1.0)
    assert found.answered == (value > 0)
    assert score(own("numeric_trigger_reference"), text, example("18"), 0.1).value == published
    without = score(own("numeric_trigger"), text, example("18"), 0.0)
    assert without.value == float(found.right)


@pytest.mark.parametrize(("text", "published"), CHOICES)
def test_the_quirks_of_letters_are_a_rule_of_the_task(text, published):
    found = score(own("choice_trigger_reference"), text, example("c"), 0.1)
    assert found.value == published


def test_a_graded_metric_is_its_own_score_where_it_is_more():
    class Graded(Toy):
        def score(self, text, example):
            return {"accuracy": 0.4}

    assert score(Graded(), "7", example("8"), 0.1).value == 0.4
    assert score(Graded(), "7", example("8"), 0.5).value == 0.5
    assert not score(Graded(), "7", example("8"), 0.5).right


# The frozen copy


@pytest.mark.parametrize("spec", [LOREFT, FULL])
def test_a_snapshot_stands_in_exactly_and_leaves_no_trace(spec):
    model, ids = adapted(spec), torch.arange(3, 12)[None]
    at_start, snapshot = weights(model), Snapshot(model)
    with torch.no_grad():
        first = model(ids).logits
        shake(model, 0.3)
        moved, second = weights(model), model(ids).logits
        assert not torch.equal(first, second)
        for _ in range(2):
            with snapshot.swapped():
                assert equal(weights(model), at_start) and torch.equal(model(ids).logits, first)
            assert equal(weights(model), moved) and torch.equal(model(ids).logits, second)
        with pytest.raises(KeyError), snapshot.swapped():
            raise KeyError
    assert equal(weights(model), moved)


def test_a_snapshot_of_other_parameters_is_refused():
    model = adapted()
    snapshot = Snapshot(model)
    state = snapshot.state_dict()
    name = next(iter(state))
    with pytest.raises(TrainingError, match="holds other parameters than are trained"):
        snapshot.load_state_dict({k: v for k, v in state.items() if k != name})
    with pytest.raises(TrainingError, match=name):
        restore(snapshot.held, {**state, name: state[name][:1]})
