"""What reinforced fine-tuning sees: re-scored answers, the frozen policy, the first update."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from online_toys import FULL, LORA, LOREFT, adapted, objective_of, sampler_of, shake
from tiny import tiny_tokenizer

from reftune.errors import RecipeError
from reftune.inference.prompts import pad
from reftune.model import off
from reftune.model.run import Runner
from reftune.objectives import policy
from reftune.objectives.online import World
from reftune.objectives.reinforced import Reinforced, ReinforcedConfig, ValueHead
from reftune.training.collate import Collator
from reftune.training.rollouts import collate
from reftune.training.snapshot import Snapshot

QUESTIONS = [0, 5, 12, 3, 21, 9]
PROMPTED = replace(LOREFT, positions="f2+l2", train_positions="all")
DRAWN = replace(LOREFT, positions="all_prompt+generated:2")


def rolled(model, objective, micro=3, questions=QUESTIONS, **tokens):
    found = sampler_of(model, objective, **tokens)(questions, 4)
    collator = Collator.of(tiny_tokenizer(**tokens))
    return [
        collate(found[start : start + micro], collator, gold=objective.gold)
        for start in range(0, len(found), micro)
    ]


def measured(model, objective, batches, snapshot=None):
    objective.head = objective.head or objective.make_head(32)
    snapshot = snapshot or Snapshot(model)
    with torch.no_grad():
        return objective.experience(Runner(model), snapshot.swapped, batches, World())


def written_log_probs(model, batch):
    """Let transformers write the same answers again, from left-padded prompts, token by token."""
    prompts = [ids[:length].tolist() for ids, length in zip(batch.input_ids, batch.prompt_lens)]
    padded, lengths = pad(prompts, 0), batch.lengths.tolist()
    answers = [
        ids[start : start + length].tolist()
        for ids, start, length in zip(batch.input_ids, batch.prompt_lens, lengths)
    ]

    def forced(row, sequence):
        place = len(sequence) - padded.input_ids.shape[1]
        return [answers[row][place]] if place < lengths[row] else [0]

    with torch.no_grad():
        out = model.generate(
            **vars(padded),
            max_new_tokens=max(lengths),
            eos_token_id=None,
            pad_token_id=0,
            do_sample=False,
            prefix_allowed_tokens_fn=forced,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logs = torch.stack(out.logits, 1).log_softmax(-1)
    found = torch.zeros(batch.mask.shape)
    for row, answer in enumerate(answers):
        for step, token in enumerate(answer):
            found[row, step] = logs[row, step, token]
    return found


@pytest.mark.parametrize("spec", [LOREFT, PROMPTED, DRAWN, LORA, FULL], ids=lambda s: s.positions)
def test_re_scored_log_probabilities_are_those_of_generation(spec):
    model, objective = adapted(spec), objective_of()
    (batch,) = rolled(model, objective, micro=6)
    snapshot = Snapshot(model)
    shake(model, 0.3)
    measured(model, objective, [batch], snapshot)
    known, mask = batch.measured, batch.mask
    assert len({*batch.lengths.tolist()}) > 1 and len({*batch.prompt_lens.tolist()}) > 1
    assert torch.allclose(known["logp"], written_log_probs(model, batch), atol=2e-5)
    with snapshot.swapped():
        frozen = written_log_probs(model, batch)
    assert torch.allclose(known["reference"], frozen, atol=2e-5)
    assert float(((known["logp"] - frozen) * mask).abs().max()) > 1e-2, "they must differ"
    if spec is FULL:
        return
    with off(model), torch.no_grad():
        base = objective.look(Runner(model), batch).logp
        assert torch.allclose(base, written_log_probs(model, batch), atol=2e-5)
    assert float((base - known["logp"]).abs().max()) > 1e-2


@pytest.mark.quick
def test_at_first_nothing_has_moved_to_the_bit():
    """KL 0 and ratio 1 exactly where the passes are the same; 1e-5 in batches of another shape."""
    model, objective = adapted(), objective_of()
    batches = rolled(model, objective)
    tally = measured(model, objective, batches)
    assert tally.means()["kl"] == 0.0
    for batch in batches:
        seen = objective.look(Runner(model), batch)
        assert seen.logp.requires_grad and torch.equal(seen.logp, batch.measured["logp"])
        assert torch.equal(seen.values, batch.measured["values"])
    (other,) = rolled(model, objective, micro=6)
    logp = objective.look(Runner(model), other).logp
    old = torch.zeros_like(logp)
    for place, batch in enumerate(batches):
        known = batch.measured["logp"]
        old[3 * place : 3 * place + 3, : known.shape[1]] = known
    assert ((logp.detach() - old).exp() - 1).abs().max() < 1e-5


@pytest.mark.quick
def test_the_first_loss_is_the_mean_advantage_and_the_error_of_the_values():
    model, objective = adapted(), objective_of(alpha=5.0)
    (batch,) = rolled(model, objective, micro=6)
    measured(model, objective, [batch])
    out = objective(Runner(model), batch, None)
    known, lengths = batch.measured, batch.lengths
    policies = -(known["advantages"].sum(1) / lengths).mean()
    errors = ((known["returns"] - known["values"]) ** 2 * batch.mask).sum(1) / lengths
    assert out.loss.item() == pytest.approx(float(policies + 5.0 * 0.5 * errors.mean()), rel=1e-5)
    assert float(out.metrics["policy_loss"]) == pytest.approx(float(policies), abs=1e-6)
    own = known["advantages"][batch.mask]
    assert abs(float(own.mean())) < 1e-6 and float(own.var()) == pytest.approx(1, abs=1e-4)
    out.loss.backward()
    head = objective.head.linear.weight.grad
    trunk = [p.grad for p in model.parameters() if p.requires_grad]
    assert head.abs().sum() > 0 and all(g.abs().sum() > 0 for g in trunk)


@pytest.mark.parametrize("spec", [LOREFT, LORA, FULL], ids=lambda s: s.method)
def test_the_frozen_policy_is_another_one_in_half_precision_too(spec):
    """Autocast keeps casts of weights for as long as it is on; they must not outlive the swap."""
    model, objective = adapted(spec), objective_of()
    (batch,) = rolled(model, objective, micro=6)
    snapshot = Snapshot(model)
    shake(model, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        measured(model, objective, [batch], snapshot)
        again = objective.look(Runner(model), batch).logp
        with snapshot.swapped(), torch.no_grad():
            frozen = objective.look(Runner(model), batch).logp
    known = batch.measured
    assert torch.equal(known["logp"], again), "the first ratio is 1"
    assert torch.equal(known["reference"], frozen)
    assert ((known["logp"] - frozen) * batch.mask).abs().max() > 1e-2
    with torch.autocast("cpu", torch.bfloat16), snapshot.swapped(), torch.no_grad():
        assert torch.equal(objective.look(Runner(model), batch).logp, frozen)


@pytest.mark.quick
def test_values_may_start_at_zero_and_leave_the_trunk_alone():
    model, objective = adapted(), objective_of(head_init="zero", trunk="detached", beta=0.0)
    (batch,) = rolled(model, objective, micro=6)
    measured(model, objective, [batch])
    assert not batch.measured["values"].any()
    batch.measured["advantages"].zero_()
    batch.measured["returns"].fill_(1.0)
    objective(Runner(model), batch, None).loss.backward()
    assert objective.head.linear.weight.grad.abs().sum() > 0
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_micro_batches_add_up():
    """Losses, whitening and gradients are those of the whole rollout, however it is cut."""
    found = []
    for micro in (6, 4, 1):
        model, objective = adapted(), objective_of()
        objective.head = ValueHead(32)
        with torch.no_grad():
            objective.head.linear.weight.fill_(0.05)
            objective.head.linear.bias.zero_()
        batches = rolled(model, objective, micro)
        measured(model, objective, batches)
        items = torch.tensor(6)
        loss = sum(objective(Runner(model), batch, items).loss for batch in batches)
        loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        found.append((loss.item(), torch.cat([*grads, objective.head.linear.weight.grad[0]])))
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5, abs=1e-6)
        assert torch.allclose(grads, found[0][1], rtol=1e-4, atol=1e-6)


@pytest.mark.quick
def test_a_pad_that_is_the_eos_masks_nothing():
    """Only the answer is scanned for its end; a scan of the padded row would find it in front."""
    model, objective = adapted(), objective_of()
    tokens = {"pad": False}
    assert tiny_tokenizer(**tokens).pad_token_id is None
    one, other = (rolled(model, objective, 6, **t)[0] for t in (tokens, {}))
    assert torch.equal(one.lengths, other.lengths) and int(one.lengths.min()) >= 1
    measured(model, objective, [one])
    assert not one.measured["advantages"][~one.mask].any()
    assert one.measured["advantages"][one.mask].abs().min() > 0


@pytest.mark.quick
def test_the_end_token_is_an_action_and_a_cut_answer_has_none():
    model = adapted()
    batches = rolled(model, objective_of(), 6, list(range(16)))
    seen = set()
    for batch in batches:
        for row, ended in enumerate(batch.ended.tolist()):
            answer = batch.labels[row][batch.labels[row] != -100].tolist()
            assert (answer[-1] == 2) == ended and 2 not in answer[:-1]
            assert ended or len(answer) == 24
            seen.add(ended)
    assert seen == {True, False}


def test_the_temperature_is_part_of_the_policy():
    model, objective = adapted(), objective_of(temperature=0.5)
    (batch,) = rolled(model, objective, 6)
    measured(model, objective, [batch])
    out = Runner(model)(batch)
    wanted = batch.spread((out.logits / 0.5).log_softmax(-1).gather(1, out.labels[:, None])[:, 0])
    assert torch.allclose(batch.measured["logp"], wanted.detach(), atol=1e-5)


def test_the_penalty_pulls_back_to_the_frozen_policy():
    """With no reward at all and a policy that has drifted, an update lowers the KL divergence."""

    def kl_after(beta):
        torch.manual_seed(0)
        model, objective = adapted(), objective_of(beta=beta, whiten="none", alpha=0.0)
        snapshot = Snapshot(model)
        shake(model, 0.15)
        batches = rolled(model, objective, 22, list(range(22)))
        for batch in batches:
            batch.scores = torch.zeros_like(batch.scores)
        objective.head = ValueHead(32)
        torch.nn.init.zeros_(objective.head.linear.weight)
        torch.nn.init.zeros_(objective.head.linear.bias)
        measured(model, objective, batches, snapshot)
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        objective(Runner(model), batches[0], None).loss.backward()
        optimiser.step()
        with torch.no_grad():
            after = objective.look(Runner(model), batches[0]).logp
        old = batches[0].measured
        return float(((after - old["logp"]) * (old["logp"] - old["reference"])).sum())

    assert kl_after(0.0) == 0.0
    assert kl_after(0.5) < 0.0, "actions the frozen policy finds unlikely became less likely"


def test_room_for_a_head_of_another_shape():
    """A subclass brings its own head, scores and a term of the loss."""

    class Two(torch.nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.down, self.out = torch.nn.Linear(dim, 8), torch.nn.Linear(8, 1)

    class Own(Reinforced):
        def make_head(self, dim):
            return Two(dim)

        def values(self, hidden):
            return self.head.out(self.head.down(hidden.float()).relu())[:, 0]

        def scores(self, batch):
            return batch.scores + 0.2

        def __call__(self, run, prepared, num_items):
            seen = self.look(run, prepared)
            loss = self.ppo(seen, prepared, num_items)
            loss.loss = loss.loss + 1e-3 * self.head.down(seen.states.float()).square().mean()
            return loss

    model, objective = adapted(), Own()
    (batch,) = rolled(model, objective, 6)
    measured(model, objective, [batch])
    objective(Runner(model), batch, None).loss.backward()
    assert objective.head.down.weight.grad.abs().sum() > 0
    last = batch.measured["returns"].gather(1, (batch.lengths - 1)[:, None])[:, 0]
    assert torch.allclose(last, batch.scores + 0.2, atol=1e-6)


def test_online_self_training_learns_right_answers_and_the_annotated_ones():
    model, objective = adapted(), objective_of("online_st")
    (batch,) = rolled(model, objective, 6)
    batch.right = torch.tensor([True, False, True, False, False, False])
    with torch.no_grad():
        objective.experience(Runner(model), contextlib.nullcontext, [batch], World())
        out = objective(Runner(model), batch, None)
        own, gold = Runner(model)(batch), Runner(model)(batch.gold)
        losses = [policy.log_probs(o.logits, o.labels) for o in (own, gold)]
    picked = losses[0][batch.right[own.rows]]
    wanted = -0.5 * picked.mean() - 0.5 * losses[1].mean()
    assert float(out.loss) == pytest.approx(float(wanted), rel=1e-5)
    batch.right = torch.zeros_like(batch.right)
    with torch.no_grad():
        out = objective(Runner(model), batch, None)
    assert float(out.loss) == pytest.approx(float(-0.5 * losses[1].mean()), rel=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("clip", 0.0), ("lam", 1.5), ("gamma", -0.1), ("beta", -1.0), ("temperature", 0.0)),
        *(("samples", 0), ("updates", 0), ("partial", 1.0), ("max_new_tokens", 0)),
    ],
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(RecipeError, match=f"{name} is {value}"):
        ReinforcedConfig(**{name: value})


@pytest.mark.quick
def test_the_defaults_are_those_of_the_published_code():
    own = ReinforcedConfig()
    assert (own.gamma, own.lam, own.clip, own.value_clip) == (1.0, 0.95, 0.2, 0.2)
    assert (own.alpha, own.updates, own.beta, own.partial) == (5.0, 2, 0.05, 0.1)
    assert (own.samples, own.temperature, own.whiten) == (1, 1.0, "global")


@pytest.mark.quick
def test_collapse_is_said_in_words_once(caplog):
    objective = objective_of()
    for entropy in (1.0, 0.5, 0.05, 0.01):
        objective.watch({"entropy": entropy, "reward": 0.3, "kl": 0.1})
    assert caplog.text.count("the entropy has collapsed: 0.05 nats a token, 1 at the start") == 1
    objective.watch({"entropy": 1.0, "reward": 0.0, "kl": 35.0})
    assert "KL divergence 35.0 nats an answer. Raise beta" in caplog.text
    assert "Warm up longer" in caplog.text
    again = objective_of()
    again.load_state_dict(objective.state_dict())
    again.watch({"entropy": 0.01, "reward": 0.0, "kl": 50.0})
    assert len(caplog.records) == 3, "a resumed run does not say it again"
