"""NLFT on tiny models: who is asked what, the loss of rows and batches, the published mistakes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from tiny import CHARACTERS, tiny_llama, tiny_tokenizer
from torch.nn import functional as F

from reftune.config.recipe import AdapterSpec
from reftune.errors import DataError, PositionError, RecipeError, TrainingError
from reftune.model.below import untrained
from reftune.model.build import apply_adapter
from reftune.model.run import Runner, as_used
from reftune.objectives.nlft import Nlft, NlftConfig
from reftune.objectives.saliency import Constants, cluster
from reftune.tasks.base import Example
from reftune.training.collate import Collator, prepare
from reftune.training.encode import IGNORE, blank, encode, encode_all

LOREFT = AdapterSpec(options={"rank": 2, "dropout": 0.3}, positions="f2+l2")
LORA = AdapterSpec(method="lora", options={"rank": 2, "dropout": 0.3})
EASY = {"ratio": 1.01, "least": 0.0, "most_wrong": 1.0, "sure": 0.02, "threshold": 1.0}
"""Constants under which a random model has both sets."""


def example(i, wrong=False, longer=0):
    guides = {"standard": f"{i}+{i}= it is {2 * i}:" + "x" * longer}
    if wrong:
        guides["judge"] = f"{i}+{i}= {2 * i + 1} is wrong, the sum:"
    return Example(f"r{i}", f"{i}+{i}=", f" {i} and {i + wrong}", "", meta={"guides": guides})


def rows(*kinds):
    """Encode a row for each letter: r right, w wrong."""
    examples = [example(i + 3, kind == "w", 3 * i) for i, kind in enumerate(kinds)]
    return encode_all(examples, tiny_tokenizer(), 96).rows


def batch(*encoded):
    return prepare(Collator()(encoded))


def base():
    """A random model that is sure enough of some tokens."""
    return tiny_llama(initializer_range=0.2)


def model(spec=LOREFT):
    return apply_adapter(base(), spec, 0).train()


class Asked:
    """A runner that notes how it was asked."""

    def __init__(self, model):
        self.run, self.calls = Runner(model), []

    def __call__(self, prepared, **how):
        out = self.run(prepared, **how)
        self.calls.append((prepared.num_rows, out.logits.requires_grad))
        return out


def probabilities(model, row, guide=None):
    """Return p of each token of an answer behind a prompt, by a plain forward pass, and states."""
    prompt = row.input_ids[: row.prompt_len] if guide is None else row.guides[guide]
    answer = row.input_ids[row.prompt_len :]
    ids = torch.tensor([prompt + answer])
    with as_used(model) as bare:
        from reftune.model import prompt_scope

        with prompt_scope(bare, torch.tensor([len(prompt)])):
            out = bare(input_ids=ids, output_hidden_states=True)
    at = slice(len(prompt) - 1, ids.shape[1] - 1)
    logs = out.logits[0, at].log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
    return logs.exp(), out.hidden_states[-1][0, at]


def by_hand(model, row, c):
    """Return the loss of a row by the equations, one token after the other."""
    p_b, hidden = probabilities(model, row)
    p_s, _ = probabilities(model, row, "standard")
    one = torch.zeros(len(p_b), dtype=torch.long)
    if "judge" not in row.guides:
        chosen = p_s > c.sure
        near = cluster(chosen, hidden, one)
        total = 0.0
        for t, (b, s) in enumerate(zip(p_b.tolist(), p_s.tolist())):
            power = c.near_power if near[t] else c.far_power
            boosted = 1 + ((s - c.sure) / (1 - c.sure)) ** 5
            w = boosted if chosen[t] else (s / c.sure) ** power
            total -= (w + 1) * torch.tensor(b).log()
        return total / len(p_b)
    p_j, _ = probabilities(model, row, "judge")
    chosen = (p_j / p_b > c.ratio) & (p_j / p_s > c.ratio) & (p_j > c.least)
    near, total = cluster(chosen, hidden, one), 0.0
    for t, (b, s, j) in enumerate(zip(p_b.tolist(), p_s.tolist(), p_j.tolist())):
        if chosen[t]:
            w = 2 * torch.tensor(j / b - c.threshold).sigmoid()
            total -= w * torch.log1p(torch.tensor(-b))
        elif not near[t] and chosen.float().mean() <= c.most_wrong:
            total -= s**0.5 * torch.tensor(b).log()
    return total / len(p_b)


@pytest.mark.parametrize("spec", [LOREFT, LORA], ids=["loreft", "lora"])
def test_the_loss_is_that_of_the_equations(spec):
    trained = model(replace(spec, options={"rank": 2}))
    with torch.no_grad():
        for p in trained.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    objective = Nlft(NlftConfig(**EASY, scale=2.0))
    encoded = rows(*"rwrw")
    wanted = [by_hand(trained, row, Constants(**EASY)) for row in encoded]
    for row, one in zip(encoded, wanted):
        out = objective(Runner(trained), batch(row), None)
        torch.testing.assert_close(out.loss.detach(), 2 * one, rtol=1e-4, atol=1e-5)
        assert (float(out.metrics["unlike_tokens"]) > 0) == ("judge" in row.guides)
    whole = objective(Runner(trained), batch(*encoded), None)
    torch.testing.assert_close(whole.loss.detach(), 2 * sum(wanted) / 4, rtol=1e-4, atol=1e-5)
    for name in ("salient_tokens", "near_tokens", "unlike_tokens"):
        assert 0 < float(whole.metrics[name]) < 1, name
    assert float(whole.metrics["wrong_answers"]) == 0.5


def test_a_batch_is_the_mean_of_its_rows_and_their_gradients():
    trained = model(replace(LOREFT, options={"rank": 2}))
    objective, encoded = Nlft(NlftConfig(**EASY)), rows(*"rwwr")
    params = [p for p in trained.parameters() if p.requires_grad]

    def gradient(*groups):
        items = torch.tensor(len(encoded))
        for group in groups:
            objective(Runner(trained), batch(*group), items).loss.backward()
        found = [p.grad.clone() for p in params]
        trained.zero_grad()
        return found

    whole = gradient(encoded)
    for parts in ([[r] for r in encoded], [encoded[:1], encoded[1:]], [encoded[2:], encoded[:2]]):
        for a, b in zip(whole, gradient(*parts), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_guides_are_asked_without_gradients_and_only_where_they_are():
    for kinds, wanted in (
        ("r", [(1, True), (1, False)]),
        ("rr", [(2, True), (2, False)]),
        ("rwr", [(3, True), (3, False), (1, False)]),
    ):
        asked = Asked(model())
        Nlft()(asked, batch(*rows(*kinds)), None).loss.backward()
        assert asked.calls == wanted


def test_guides_are_asked_without_dropout_and_the_mode_comes_back():
    trained, encoded = model(), rows("r", "w")
    prepared = batch(*encoded)
    modes = [m.training for m in trained.modules()]
    run = Runner(trained)
    for name in ("standard", "judge"):
        first, again = (run(prepared.guides[name], inference=True).logits for _ in range(2))
        assert torch.equal(first, again)
    noisy = [run(prepared.guides["standard"]).logits for _ in range(2)]
    assert not torch.equal(*noisy), "dropout is there otherwise"
    assert modes == [m.training for m in trained.modules()] and all(modes)
    with pytest.raises(RuntimeError, match="broken"), as_used(trained):
        raise RuntimeError("broken")
    assert modes == [m.training for m in trained.modules()]


def test_no_gradient_comes_through_the_weights():
    trained = model(replace(LOREFT, options={"rank": 2}))
    params = [p for p in trained.parameters() if p.requires_grad]
    objective, prepared = Nlft(NlftConfig(**EASY)), batch(*rows(*"rw"))
    objective(Runner(trained), prepared, None).loss.backward()
    found = [p.grad.clone() for p in params]
    trained.zero_grad()
    # The same factors as plain numbers.
    parts = [(rows(*"rw"), prepared)]
    given = Nlft(NlftConfig(**EASY, guidance="frozen")).inform(parts, Runner(trained))
    objective(Runner(trained), batch(*given), None).loss.backward()
    for a, p in zip(found, params, strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-5, atol=1e-7)
    assert any(float(p.grad.abs().max()) > 1e-4 for p in params)


# Frozen guidance


@pytest.mark.parametrize("spec", [LOREFT, LORA], ids=["loreft", "lora"])
def test_frozen_weights_are_those_of_the_untrained_model(spec):
    trained, encoded = model(spec), rows(*"rwr")
    with torch.no_grad():
        for p in trained.parameters():
            if p.requires_grad:
                p.normal_(generator=torch.Generator().manual_seed(0))
    frozen = Nlft(NlftConfig(**EASY, guidance="frozen"))
    with untrained(trained):
        informed = frozen.inform([(encoded, batch(*encoded))], Runner(trained))
    another = Nlft(NlftConfig(**EASY, guidance="frozen"))
    wanted = another.inform([(encoded, batch(*encoded))], Runner(base()))
    assert [row.weights for row in informed] == [row.weights for row in wanted]
    assert all(row.guides is None and len(row.weights) == len(row) for row in informed)
    assert min(informed[1].weights) < 0 < max(informed[1].weights)
    assert min(informed[0].weights) == 0, "prompts weigh nothing"
    other = another.inform([(encoded, batch(*encoded))], Runner(trained))
    assert [row.weights for row in other] != [row.weights for row in wanted]


def test_frozen_guidance_costs_one_pass_a_step():
    trained, encoded = model(), rows(*"rw")
    objective = Nlft(NlftConfig(guidance="frozen"))
    parts = [(encoded, batch(*encoded))]
    informed = objective.inform(parts, Runner(trained))
    asked = Asked(trained)
    out = objective(asked, batch(*informed), None)
    assert asked.calls == [(2, True)] and out.loss.requires_grad
    assert objective.inform([(informed, batch(*informed))], Runner(trained)) is None, "asked before"
    assert Nlft().inform(parts, asked) is None and len(asked.calls) == 1


def test_untrained_leaves_what_is_frozen_below():
    below = apply_adapter(tiny_llama(), replace(LORA, name="below"), 0)
    from reftune.model.below import set_below

    with torch.no_grad():
        for name, p in below.named_parameters():
            if "lora_" in name:
                p.normal_(generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        wanted = below.eval()(input_ids=ids).logits
        both = apply_adapter(below, replace(LOREFT, positions="all"), 0).eval()
        set_below(both)
        assert not torch.equal(both(input_ids=ids).logits, wanted)
        with untrained(both):
            assert torch.equal(both(input_ids=ids).logits, wanted)
        assert not torch.equal(both(input_ids=ids).logits, wanted)


# Rows


@pytest.mark.parametrize("seed", range(30))
def test_answers_are_the_same_tokens_behind_every_prompt(seed):
    rng = random.Random(seed)

    def text(least=1):
        return "".join(rng.choices(CHARACTERS, k=rng.randint(least, 20))) + "a"

    guides = {"standard": text(), "judge": [{"role": "user", "content": text()}]}
    row = encode(
        Example("x", text(), text(), "", meta={"guides": guides}),
        tiny_tokenizer(bos=rng.random() < 0.5, pad=rng.random() < 0.5),
        max_len=rng.randint(30, 60),
    )
    answer = row.input_ids[row.prompt_len :]
    assert answer.count(2) == 1 and answer[-1] == 2, "one EOS"
    prepared = batch(row, replace(row, id="y"))
    for name in guides:
        guide = prepared.guides[name]
        assert guide.rows.tolist() == [0, 1]
        for found in (guide.labels, prepared.labels):
            assert found[0][found[0] != IGNORE].tolist() == answer
        start = int(guide.prompt_lens[0])
        assert guide.input_ids[0, start : start + len(answer)].tolist() == answer
        assert int(guide.attention_mask[0].sum()) == start + len(answer)


def test_long_guides_are_cut_from_the_left_and_counted(caplog):
    long = example(3, wrong=True, longer=50)
    row = encode(long, tiny_tokenizer(), 40)
    assert len(row.guides["standard"]) + len(row) - row.prompt_len == 40 and row.cut > 20
    assert row.guides["standard"][0] == 1 and row.guides["standard"][1:] == [
        tiny_tokenizer().convert_tokens_to_ids("x")
    ] * (len(row.guides["standard"]) - 1)
    assert encode_all([long], tiny_tokenizer(), 40).cut == 1
    Nlft()(Runner(model()), batch(row), None).loss.backward()


def test_answers_that_end_in_eos_keep_it_where_padding_is_eos():
    encoded = [encode(example(i), tiny_tokenizer(pad=False), 96) for i in (3, 1234567)]
    prepared = prepare(Collator.of(tiny_tokenizer(pad=False))(encoded))
    assert prepared.input_ids[0, -1] == 2 and prepared.attention_mask[0, -1] == 0
    for found in (prepared, prepared.guides["standard"]):
        lengths = [len(row) - row.prompt_len for row in encoded]
        assert (found.labels != IGNORE).sum(1).tolist() == lengths


def test_blank_rows_ask_for_nothing():
    encoded = rows("r", "w")
    prepared = batch(encoded[0], blank(encoded[1]))
    assert set(prepared.guides) == {"standard"}
    objective, trained = Nlft(), model(replace(LOREFT, options={"rank": 2}))
    assert int(objective.count(prepared)) == 1
    alone = objective(Runner(trained), batch(encoded[0]), None).loss
    torch.testing.assert_close(objective(Runner(trained), prepared, None).loss, alone)


def test_rows_change_their_digest_with_their_guides():
    whole = encode_all([example(3)], tiny_tokenizer(), 96)
    other = encode_all([example(3, longer=1)], tiny_tokenizer(), 96)
    plain = replace(whole, rows=[replace(row, guides=None) for row in whole.rows])
    assert len({whole.digest(), other.digest(), plain.digest()}) == 3


# Refusals


def test_rows_without_a_guide_are_refused():
    row = replace(rows("r")[0], guides=None)
    with pytest.raises(DataError, match='Row "r3" does not show its right solution'):
        Nlft().training_rows([row], tiny_tokenizer(), 64)
    with pytest.raises(DataError, match="has an empty guide"):
        encode(Example("x", "a", "b", "", meta={"guides": {"judge": ""}}), tiny_tokenizer(), 64)


def test_other_answers_behind_a_guide_are_refused():
    prepared = batch(*rows("r", "r"))
    guide = prepared.guides["standard"]
    guide.labels[1, guide.prompt_lens[1]] += 1
    with pytest.raises(DataError, match="are not those behind the question"):
        Nlft()(Runner(model()), prepared, None)


def test_what_cannot_be_trained_is_refused():
    for positions in ("mask", "f1+subject_last"):
        with pytest.raises(RecipeError, match="guides have none"):
            Nlft().check(replace(LOREFT, positions=positions))
        Nlft(NlftConfig(guidance="frozen")).check(replace(LOREFT, positions=positions))
    Nlft().check(LORA)
    with pytest.raises(TrainingError, match="FSDP"):
        Nlft().bind({}, sharded=True)
    Nlft(NlftConfig(guidance="frozen")).bind({}, sharded=True)
    with pytest.raises(RecipeError, match="wrong_nll: reference"):
        NlftConfig(guidance="frozen", wrong_nll="reference")
    with pytest.raises(RecipeError, match="scale is 0"):
        NlftConfig(scale=0)


def test_frozen_guidance_needs_no_marks_in_guides():
    (row,) = rows("r")
    marked = replace(row, subject=1, intervention_mask=[True] * len(row))
    trained = model(replace(LOREFT, positions="mask+subject_last"))
    frozen = Nlft(NlftConfig(guidance="frozen"))
    with untrained(trained):
        (informed,) = frozen.inform([([marked], batch(marked))], Runner(trained))
    assert informed.subject == 1 and informed.weights
    frozen(Runner(trained), batch(informed), None).loss.backward()
    with pytest.raises(PositionError):
        Nlft()(Runner(trained), batch(marked), None)


# The published likelihood of wrong answers


def test_wrong_answers_get_no_further_likelihood():
    trained, (row,) = model(replace(LOREFT, options={"rank": 2})), rows("w")
    plain, quirk = (
        Nlft(NlftConfig(**EASY, scale=1.0, wrong_nll=kind))(Runner(trained), batch(row), None).loss
        for kind in ("none", "reference")
    )
    guide = batch(row).guides["judge"]
    answer, start = row.input_ids[row.prompt_len :], row.prompt_len
    assert guide.input_ids[0, start : start + len(answer)].tolist() != answer, (
        "not the answer's place"
    )
    from reftune.model import prompt_scope

    with torch.no_grad(), prompt_scope(trained, guide.prompt_lens):
        logits = trained(input_ids=guide.input_ids, attention_mask=guide.attention_mask).logits
    at = logits[0, start - 1 : start - 1 + len(answer)]
    misplaced = F.cross_entropy(at, torch.tensor(answer))
    torch.testing.assert_close(quirk - plain, misplaced, rtol=1e-4, atol=1e-5)
    (right,) = rows("r")
    same = [
        Nlft(NlftConfig(wrong_nll=kind))(Runner(trained), batch(right), None).loss
        for kind in ("none", "reference")
    ]
    assert torch.equal(*same)
