"""CARFT on rollouts of tiny models: vectors, rewards, both ways to add up, and c = 0."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from online_toys import LOREFT, adapted, objective_of, sampler_of
from test_reinforced_passes import measured, rolled

from reftune.errors import RecipeError
from reftune.model.run import Runner
from reftune.objectives import contrastive
from reftune.objectives.carft import Carft, CarftHead, _is_number
from reftune.objectives.reinforced import Reinforced, ReinforcedConfig
from reftune.training.rollouts import Score

OPTIONS = {"dim": 5, "c": 0.5}


def carft(**options):
    objective = objective_of("carft", **{**OPTIONS, **options})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        objective.head = objective.make_head(32)
    return objective


def marked(batches, right):
    """Say which answers are right; the others are wrong, but answered."""
    flags = iter(right)
    for batch in batches:
        batch.right = torch.tensor([next(flags) for _ in range(batch.num_rows)]).bool()
        batch.answered = torch.ones_like(batch.right)
        batch.scores = torch.where(batch.right, 1.0, 0.1).to(batch.scores)
    return batches


def prepared(objective, right=(1, 0, 1, 0, 0, 1), micro=3):
    model = adapted()
    batches = marked(rolled(model, objective, micro), right)
    tally = measured(model, objective, batches)
    return model, batches, tally


def total(model, objective, batches):
    """Return loss and gradients of a whole rollout."""
    model.zero_grad(), objective.head.zero_grad()
    items = torch.tensor(sum(batch.num_rows for batch in batches))
    loss = 0.0
    for batch in batches:
        out = objective(Runner(model), batch, items)
        out.loss.backward()
        loss += float(out.loss.detach())
    found = [*model.parameters(), *objective.head.parameters()]
    return loss, torch.cat([p.grad.flatten() for p in found if p.grad is not None])


def states_of(model, ids):
    """Return the last hidden states of one row behind each token, computed apart."""
    caught = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: caught.append(args[0])
    )
    with torch.no_grad():
        model(input_ids=ids[None])
    hook.remove()
    return caught[0][0]


def test_vectors_are_pooled_over_the_states_behind_tokens():
    objective = carft()
    model, batches, _ = prepared(objective)
    batch, head = batches[0], objective.head
    for row in range(batch.num_rows):
        for one, name in ((batch, "z2"), (batch.gold, "z1")):
            prompt, length = int(one.prompt_lens[row]), int(one.lengths[row])
            states = states_of(model, one.input_ids[row, : prompt + length])[prompt:-1]
            e = head.embed(states) if len(states) else torch.zeros(0)
            v = head(states)
            z = (v.softmax(0)[:, None] * e).sum(0)
            assert torch.allclose(batch.measured[name][row], z, atol=1e-5), (row, name)


def test_wrong_answers_earn_by_their_likeness_and_no_others_do():
    objective = carft()
    _, batches, _ = prepared(objective)
    batch = batches[0]
    batch.answered[2], batch.scores[2] = False, 0.0
    batch.right[2] = False
    scores = objective.scores(batch)
    near = contrastive.cosine(batch.measured["z1"], batch.measured["z2"])
    assert scores[0] == 1.0 and scores[2] == 0.0
    assert float(scores[1]) == pytest.approx(0.2 + 0.1 * float(near[1]))
    assert 0.1 <= float(scores[1]) <= 0.3
    constant = carft(partial_reward="constant")
    assert torch.equal(constant.scores(batch), batch.scores)


def test_the_described_term_is_a_mean_over_right_answers_of_the_rollout():
    objective, without = carft(), carft(contrastive="none")
    model, batches, _ = prepared(objective)
    z1, z2 = (torch.cat([b.measured[name] for b in batches]) for name in ("z1", "z2"))
    right = torch.cat([b.right for b in batches])
    losses = contrastive.positive(z1, z2, z2, torch.arange(6))
    wanted = float(losses[right].mean())
    with_term, _ = total(model, objective, batches)
    plain, _ = total(model, without, batches)
    assert with_term - plain == pytest.approx(0.5 * wanted, rel=1e-4)


@pytest.mark.parametrize("signal", ["positive", "negative", "both"])
def test_micro_batches_change_nothing(signal):
    """The embedding of one answer does not depend on what is trained beside it."""
    found = []
    for micro in (6, 3, 1):
        objective = carft(contrastive=signal)
        model, batches, _ = prepared(objective, micro=micro)
        found.append(total(model, objective, batches))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert torch.allclose(gradient, found[0][1], rtol=1e-3, atol=1e-6)


def test_the_reference_sums_over_all_answers_once_one_is_right():
    objective = carft(reduction="reference", partial_reward="constant")
    without = carft(contrastive="none", partial_reward="constant")
    for right, counts in (((1, 0, 0, 0, 0, 0), (1, 0)), ((0,) * 6, (0, 0))):
        model, batches, _ = prepared(objective, right)
        terms = []
        for batch, hit in zip(batches, counts):
            z1, z2 = batch.measured["z1"], batch.measured["z2"]
            losses = (contrastive.cosines(z1, z2) / 0.2).logsumexp(1)
            losses = losses - contrastive.cosine(z1, z2).clamp(max=0.9) / 0.2
            terms.append(hit * float(losses.sum()))
        with_term, _ = total(model, objective, batches)
        plain, _ = total(model, without, batches)
        assert with_term - plain == pytest.approx(0.5 * sum(terms) / 2, rel=1e-4, abs=1e-6)


class WithHead(Reinforced):
    """Reinforced fine-tuning on CARFT's head."""

    def make_head(self, dim):
        return CarftHead(dim, 5)


def test_without_weight_it_is_reinforced_to_the_bit():
    found = []
    for objective in (
        carft(c=0.0, partial_reward="constant"),
        WithHead(ReinforcedConfig()),
    ):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            objective.head = objective.make_head(32)
        model, batches, tally = prepared(objective)
        found.append((*total(model, objective, batches), tally.means()))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


@pytest.mark.parametrize(("trunk", "updating"), [("shared", 1), ("detached", 2)])
def test_the_first_layer_is_computed_once_a_pass(trunk, updating):
    """Twice only where V must not train the trunk and the vectors must."""
    objective = carft(trunk=trunk)
    model, batches, _ = prepared(objective)
    calls = []
    objective.head.reduce.register_forward_hook(lambda *given: calls.append(given))
    with torch.no_grad():
        objective.measure(Runner(model), batches[0])
    assert len(calls) == 2, "of the sampled chains, and of the annotated ones"
    calls.clear()
    objective(Runner(model), batches[0], None)
    assert len(calls) == updating


def test_values_of_a_detached_trunk_leave_it_to_the_vectors():
    found = []
    for trunk in ("shared", "detached"):
        objective = carft(trunk=trunk, contrastive="none", partial_reward="constant")
        model, batches, _ = prepared(objective)
        for batch in batches:
            batch.measured["advantages"].zero_()
        total(model, objective, batches)
        own = [p.grad for p in model.parameters() if p.requires_grad]
        found.append(any(grad.any() for grad in own if grad is not None))
    assert found == [True, False]


def test_wrong_answers_are_split_at_their_common_tokens():
    objective = carft(contrastive="negative")
    _, batches, _ = prepared(objective)
    for batch in batches:
        known, gold = batch.measured, batch.gold
        assert not known["fits"][batch.right].any() and not known["shared"][batch.right].any()
        for row in (~batch.right).nonzero()[:, 0].tolist():
            ours = gold.labels[row][gold.labels[row] != -100][:-1].tolist()
            theirs = batch.labels[row][batch.labels[row] != -100][:-1].tolist()
            left, right = contrastive.common(ours, theirs)
            assert known["shared"][row][: len(right)].tolist() == right
            assert bool(known["fits"][row]) == any(left)


def test_numbers_alone_may_be_pooled():
    assert [_is_number(text) for text in ("▁12", "1,0", "x1", "+", "")] == [1, 1, 0, 0, 0]
    objective = carft(tokens="number")
    from tiny import tiny_tokenizer

    objective.training_rows([], tiny_tokenizer(), 64)
    batch = rolled(adapted(), objective)[0]
    with torch.no_grad():
        chains = objective._chains(batch, objective.look(Runner(adapted()), batch))
    assert chains.mask.sum() < batch.mask.sum()
    assert (objective.numbers[chains.tokens] | ~chains.mask).all()


def test_a_rollout_of_one_answer_is_told(caplog):
    objective = carft()
    model = adapted()
    batches = marked(rolled(model, objective, questions=[4]), [1])
    with caplog.at_level(logging.WARNING):
        measured(model, objective, batches)
    assert "nothing to contrast it with" in caplog.text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"c": -1.0}, "c is -1.0"),
        ({"tau": 0.0}, "tau is 0.0"),
        ({"clamp": 2.0}, "clamp is 2.0"),
        ({"dim": 0}, "dim is 0"),
        ({"reduction": "reference", "contrastive": "both"}, "reduction is reference"),
    ],
)
@pytest.mark.quick
def test_settings_that_mean_nothing_are_refused(options, named):
    with pytest.raises(RecipeError, match=named):
        objective_of("carft", **options)


def test_it_trains_and_says_what_it_sees(tmp_path):
    from online_toys import Fixed, trainer_of

    model, objective = adapted(replace(LOREFT)), carft(contrastive="both")
    trainer = trainer_of(model, tmp_path, objective, epochs=1)
    trainer.sampler = Fixed(sampler_of(model, objective), steps=3)
    for place, rollout in enumerate(r for step in trainer.sampler.known for r in step):
        value = Score(1.0, True, True) if place % 3 == 0 else Score(0.1, False, True)
        object.__setattr__(rollout, "score", value)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "contrastive" in line]
    assert len(lines) == 3
    assert all(-1 <= line["cosine"] <= 1 and line["weights"] >= 0 for line in lines)
    assert isinstance(objective, Carft) and objective.right > 0
