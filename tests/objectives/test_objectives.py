"""Objectives: equations, the sum contract, registry, refusals."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from reftune import objectives
from reftune.errors import DataError, ModelError, RecipeError
from reftune.model.run import Prepared, RunOutput
from reftune.objectives.base import Loss, Objective
from reftune.objectives.classification import Classification, ClassificationConfig
from reftune.objectives.sft import Sft

V = 7


def prepared(labels):
    labels = torch.as_tensor(labels)
    ids = torch.ones(len(labels), 6, dtype=torch.long)
    return Prepared(ids, torch.ones_like(ids), labels)


def token_batch(rows=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (rows, 6), generator=generator)
    labels[:, :2] = -100
    labels[-1, 4:] = -100
    return prepared(labels), torch.randn(rows, 6, V, generator=generator, requires_grad=True)


def runner(full):
    def run(batch, hidden=False):
        where = batch.labels != -100
        rows = where.nonzero(as_tuple=True)[0]
        return RunOutput(full[where], batch.labels[where], rows, num_rows=len(batch.labels))

    return run


def rows_of(batch, chosen):
    return Prepared(batch.input_ids[chosen], batch.attention_mask[chosen], batch.labels[chosen])


def test_sft_is_mean_cross_entropy_over_label_tokens():
    batch, full = token_batch()
    out = Sft()(runner(full), batch, None)
    want = F.cross_entropy(full.reshape(-1, V), batch.labels.reshape(-1), ignore_index=-100)
    assert torch.allclose(out.loss, want)
    assert 0 <= float(out.metrics["token_accuracy"]) <= 1


def test_sft_parts_of_a_step_add_up_to_the_whole():
    batch, full = token_batch()
    objective = Sft()
    items = objective.count(batch)
    whole = objective(runner(full), batch, items).loss
    parts = [
        objective(runner(full[part]), rows_of(batch, part), items).loss
        for part in (slice(0, 1), slice(1, 4))
    ]
    assert torch.allclose(sum(parts), whole)
    assert int(items) == int((batch.labels != -100).sum())


def test_sft_computes_in_fp32_on_half_logits():
    batch, full = token_batch()
    loss = Sft()(runner(full.to(torch.bfloat16)), batch, None).loss
    assert loss.dtype == torch.float32


def test_sft_without_labels_is_zero_with_a_graph():
    batch, full = token_batch(1)
    batch.labels[:] = -100
    loss = Sft()(runner(full), batch, None).loss
    loss.backward()
    assert float(loss.detach()) == 0 and float(full.grad.abs().sum()) == 0


def class_run(logits):
    return lambda batch, hidden=False: RunOutput(
        None, batch.labels, None, class_logits=logits, num_rows=len(batch.labels)
    )


def test_classification_equals_cross_entropy_and_ignores_unlabelled_rows():
    logits = torch.randn(4, 3)
    batch = prepared([0, 2, -100, 1])
    objective = Classification()
    out = objective(class_run(logits), batch, None)
    known = [0, 1, 3]
    assert torch.allclose(out.loss, F.cross_entropy(logits[known], batch.labels[known]))
    assert int(objective.count(batch)) == 3
    want = (logits[known].argmax(-1) == batch.labels[known]).float().mean()
    assert torch.allclose(out.metrics["accuracy"], want)


def test_regression_is_squared_error_with_nan_as_no_label():
    logits = torch.tensor([[1.0], [2.0], [5.0]], requires_grad=True)
    out = Classification()(class_run(logits), prepared([0.5, float("nan"), 4.0]), None)
    assert float(out.loss.detach()) == pytest.approx((0.25 + 1.0) / 2)
    out.loss.backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[1] == 0


def test_regression_on_whole_numbers_when_asked():
    objective = Classification(ClassificationConfig(problem="regression"))
    out = objective(class_run(torch.zeros(2, 1)), prepared([1, 3]), None)
    assert float(out.loss) == pytest.approx(5.0)


def test_classification_refuses_what_does_not_fit():
    with pytest.raises(ModelError, match="needs a class head"):
        Classification()(class_run(None), prepared([0]), None)
    with pytest.raises(DataError, match="no class label"):
        Classification()(class_run(torch.zeros(2, 3)), prepared([[0, 1], [1, 1]]), None)
    with pytest.raises(DataError, match="class 3, the head has 3 classes"):
        Classification()(class_run(torch.zeros(2, 3)), prepared([0, 3]), None)
    with pytest.raises(DataError, match="fractional"):
        wrong = Classification(ClassificationConfig(problem="classes"))
        wrong(class_run(torch.zeros(1, 3)), prepared([0.5]), None)


def test_registry_lists_gets_and_registers():
    assert {"sft", "classification"} <= set(objectives.names())
    assert objectives.get("sft") is Sft

    class Mine(Objective):
        name = "mine"

        def __call__(self, run, prepared, num_items):
            return Loss(torch.zeros(()))

    objectives.register("mine_for_a_test", Mine)
    assert objectives.get("mine_for_a_test") is Mine
    with pytest.raises(RecipeError, match='Did you mean "sft"'):
        objectives.get("sfd")


def test_unknown_settings_are_named():
    with pytest.raises(RecipeError, match=r'sft has no setting "label_smoothing".*no settings'):
        Sft.config_from({"label_smoothing": 0.1})
    with pytest.raises(RecipeError, match='Did you mean "problem"'):
        Classification.config_from({"problm": "auto"})


@pytest.mark.parametrize("name", ["sft", "classification"])
def test_every_objective_says_what_it_is(name):
    cls = objectives.get(name)
    assert cls.name == name and cls.title and cls.source and cls.__doc__
    assert cls().state_dict() == {}
