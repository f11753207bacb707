"""BREP: prefix rows, the published labels, the loss, the controller and its alternatives."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer
from torch import nn
from torch.nn import functional as F

from reftune import attach, objectives
from reftune.config.recipe import AdapterSpec
from reftune.errors import AdapterError, DataError, RecipeError, TrainingError
from reftune.model.run import Prepared, Runner, RunOutput
from reftune.objectives import prefixes, restraint
from reftune.objectives.brep import Brep, BrepConfig
from reftune.objectives.restraint import Pid
from reftune.tasks.base import Example
from reftune.training.collate import Collator, prepare
from reftune.training.encode import IGNORE, encode, encode_all

BOS, EOS, V = 1, 2, 7
MAX_LEN = 64


def example(index, target):
    return Example(f"r{index}", f"what is {index}?", target, "")


def rows(count=20, bos=True, target=" it is {}, as everybody knows"):
    examples = [example(i, target.format(i)) for i in range(count)]
    return encode_all(examples, tiny_tokenizer(bos=bos), MAX_LEN).rows


def brep(**values):
    return Brep(BrepConfig(**values))


def trained_rows(given, bos=True, **values):
    return brep(**values).training_rows(given, tiny_tokenizer(bos=bos), MAX_LEN)


def learned(row):
    return [place for place, label in enumerate(row.labels) if label != IGNORE]


# The draw


def test_the_share_is_exact_and_does_not_depend_on_the_order():
    given = rows(50)
    chosen = prefixes.draw(given, 0.9, seed=3)
    assert sum(chosen) == 45 and chosen == prefixes.draw(given, 0.9, seed=3)
    by_id = dict(zip([row.id for row in given], chosen, strict=True))
    turned = prefixes.draw(given[::-1], 0.9, seed=3)
    assert {row.id: part for row, part in zip(given[::-1], turned, strict=True)} == by_id
    assert prefixes.draw(given, 0.9, seed=4) != chosen
    torch.manual_seed(0)
    assert prefixes.draw(given, 0.9, seed=3) == chosen


@pytest.mark.parametrize(
    ("count", "share", "wanted"),
    [(50, 1.0, 50), (50, 0.0, 0), (3, 0.9, 2), (1, 0.9, 0), (1, 1.0, 1), (7, 0.5, 4)],
)
def test_below_a_share_of_1_a_row_stays_whole(count, share, wanted):
    assert sum(prefixes.draw(rows(count), share, seed=0)) == wanted


def test_equal_rows_are_drawn_by_their_place():
    twins = rows(1) * 10
    assert sum(prefixes.draw(twins, 0.5, seed=0)) == 5


# Prefix rows


@pytest.mark.quick
@pytest.mark.parametrize("bos", [True, False])
def test_prefixes_begin_where_the_answer_does_and_whole_rows_end_in_eos(bos):
    given = rows(bos=bos)
    found = trained_rows(given, bos, prefix_tokens=8)
    whole = [new for new, old in zip(found, given, strict=True) if new == old]
    assert len(whole) == 2 and all(row.labels[-1] == EOS for row in whole)
    for new, old in zip(found, given, strict=True):
        if new == old:
            continue
        first = len(tiny_tokenizer(bos=bos)(f"what is {old.id[1:]}?")["input_ids"])
        assert new.prompt_len == first == old.prompt_len
        assert learned(new) == list(range(first, first + 8))
        assert tiny_tokenizer().decode(new.labels[first:]) == f" it is {old.id[1:]},"[:8]
        assert new.input_ids == old.input_ids[: first + 8]


def test_an_answer_shorter_than_k_is_learned_without_its_end():
    given = rows()
    found = trained_rows(given, prefix_tokens=500, prefix_share=1.0)
    for new, old in zip(found, given, strict=True):
        assert new.labels == old.labels[:-1] and old.labels[-1] == EOS
        assert new.input_ids == old.input_ids[:-1]


def test_a_target_of_nothing_but_eos_keeps_its_label():
    (row,) = rows(1)
    head = row.input_ids[: row.prompt_len]
    empty = replace(row, input_ids=[*head, EOS], labels=[IGNORE] * len(head) + [EOS])
    assert trained_rows([empty], prefix_share=1.0) == [empty]


def test_what_belongs_to_a_token_is_cut_with_it():
    (row,) = rows(1)
    row.intervention_mask = [place % 2 == 0 for place in range(len(row))]
    row.token_types = list(range(len(row)))
    (cut,) = trained_rows([row], prefix_tokens=3, prefix_share=1.0)
    end = row.prompt_len + 3
    assert len(cut) == end and cut.learned == 3
    assert cut.intervention_mask == row.intervention_mask[:end]
    assert cut.token_types == list(range(end))


def test_an_encoder_decoders_targets_are_cut():
    pair = encode(example(1, " it is 1"), tiny_tokenizer(), MAX_LEN, kind="seq2seq")
    (cut,) = trained_rows([pair], prefix_tokens=3, prefix_share=1.0)
    assert cut.decoder_labels == pair.decoder_labels[:3] and cut.input_ids == pair.input_ids
    (all_of_it,) = trained_rows([pair], prefix_tokens=99, prefix_share=1.0)
    assert all_of_it.decoder_labels == pair.decoder_labels[:-1]


@torch.no_grad()
def test_leaving_out_what_stands_behind_the_prefix_does_not_change_the_loss():
    model, given = tiny_llama(), rows(4)
    objective = brep(prefix_tokens=5, prefix_share=1.0)
    cut = objective.training_rows(given, tiny_tokenizer(), MAX_LEN)
    kept = [
        replace(old, labels=new.labels + [IGNORE] * (len(old) - len(new)))
        for old, new in zip(given, cut, strict=True)
    ]
    losses = [
        objective(Runner(model), prepare(Collator()(part)), None).loss for part in (cut, kept)
    ]
    assert torch.allclose(*losses, rtol=1e-6)
    assert sum(map(len, cut)) < sum(map(len, kept))


# The published labels, and that ours are not so


def published(given, **values):
    settings = {"reference_quirks": True, "prefix_tokens": 8, **values}
    return trained_rows(given, **settings)


def test_quirk_1_labels_begin_a_token_early_behind_a_bos():
    for bos, early in ((True, 1), (False, 0)):
        given = rows(bos=bos)
        found = trained_rows(given, bos, reference_quirks=True, prefix_tokens=8, prefix_share=1.0)
        for new, old in zip(found, given, strict=True):
            first = old.prompt_len - early
            assert learned(new)[:-1] == list(range(first, first + 8))
    ours = trained_rows(rows(), prefix_tokens=8, prefix_share=1.0)
    assert all(learned(row)[0] == row.prompt_len for row in ours)


def test_quirk_2_the_last_padding_is_a_label_of_every_prefix():
    found = published(rows(), prefix_share=1.0)
    assert all(len(row) == MAX_LEN and row.labels[-1] == prefixes.PAD for row in found)
    ours = trained_rows(rows(), prefix_share=1.0)
    assert not any(prefixes.PAD in row.labels or EOS in row.labels for row in ours)


def test_quirk_3_whole_rows_learn_their_padding():
    given = rows()
    for new, old in zip(published(given, prefix_share=0.0), given, strict=True):
        end = len(old) - 1  # EOS is not there
        assert learned(new) == list(range(old.prompt_len - 1, MAX_LEN))
        assert set(new.labels[end:]) == {prefixes.PAD} and EOS not in new.input_ids
    for row in trained_rows(given, prefix_share=0.0):
        batch = Collator(pad_id=0, multiple_of=MAX_LEN)([row])
        labels = batch["labels"][0]
        assert labels[: len(row)].tolist() == row.labels and (labels[len(row) :] == IGNORE).all()


def test_quirk_4_long_rows_are_cut_in_the_middle_of_a_solution():
    long = [example(0, " it is " + "very " * 20 + "long")]
    with pytest.raises(DataError, match="Targets are never cut"):
        encode_all(long, tiny_tokenizer(), brep().row_limit(MAX_LEN))
    quirky = brep(reference_quirks=True, prefix_share=0.0)
    given = encode_all(long, tiny_tokenizer(), quirky.row_limit(MAX_LEN)).rows
    assert len(given[0]) > MAX_LEN
    (row,) = quirky.training_rows(given, tiny_tokenizer(), MAX_LEN)
    assert row.input_ids == given[0].input_ids[:MAX_LEN] and row.labels[-1] != EOS
    assert tiny_tokenizer().decode(row.input_ids).endswith(" very v")


def test_quirk_5_padding_is_edited_and_attended_to():
    from reftune.training.view import edited_tokens

    given = rows(2)
    row = published(given, prefix_share=1.0)[0]
    batch = Collator()([row])
    assert batch["attention_mask"].all() and all(edited_tokens(row, "all"))
    assert row.prompt_len == given[0].prompt_len
    both = Collator()([given[0], row])
    assert both["attention_mask"][0].sum() == len(given[0])


def test_the_published_code_has_no_encoder_decoder():
    pair = encode(example(1, " it is 1"), tiny_tokenizer(), MAX_LEN, kind="seq2seq")
    with pytest.raises(RecipeError, match="reference_quirks: the published code knows no encoder"):
        published([pair])


# The loss


def batch_of(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (count, 6), generator=generator)
    labels[:, :2] = IGNORE
    labels[-1, 4:] = IGNORE
    ids = torch.ones_like(labels)
    full = torch.randn(count, 6, V, generator=generator, requires_grad=True)
    return Prepared(ids, ids, labels), full


def runner(full):
    def run(batch, hidden=False):
        where = batch.labels != IGNORE
        found = where.nonzero(as_tuple=True)[0]
        return RunOutput(full[where], batch.labels[where], found, num_rows=len(batch.labels))

    return run


def part_of(batch, chosen):
    return Prepared(batch.input_ids[chosen], batch.attention_mask[chosen], batch.labels[chosen])


def mean_of_means(full, labels):
    rows_ = [
        F.cross_entropy(logits[label != IGNORE], label[label != IGNORE])
        for logits, label in zip(full, labels, strict=True)
    ]
    return torch.stack(rows_).mean()


def test_the_loss_is_omega_times_the_mean_of_row_means():
    batch, full = batch_of()
    out = brep(weight_start=0.05)(runner(full), batch, None)
    wanted = mean_of_means(full, batch.labels)
    assert torch.allclose(out.loss, 0.05 * wanted)
    assert torch.allclose(out.metrics["cross_entropy"], wanted)
    assert 0 <= float(out.metrics["token_accuracy"]) <= 1
    flat = F.cross_entropy(full.reshape(-1, V), batch.labels.reshape(-1), ignore_index=IGNORE)
    by_token = brep(normalise="token")(runner(full), batch, None)
    assert torch.allclose(by_token.loss, 0.1 * flat) and not torch.allclose(flat, wanted)


def test_without_gradients_neither_omega_nor_the_penalty_counts():
    batch, full = batch_of()
    objective = bound(brep(restraint="hinge", target=0.1))
    with torch.no_grad():
        assert torch.allclose(
            objective(runner(full), batch, None).loss, mean_of_means(full, batch.labels)
        )


@pytest.mark.parametrize("values", [{}, {"normalise": "token"}, {"restraint": "hinge"}])
def test_parts_of_a_step_add_up_to_the_whole(values):
    batch, full = batch_of()
    objective = bound(brep(target=0.5, **values))
    items = objective.count(batch)
    assert int(items) == (14 if "normalise" in values else 4)
    whole = objective(runner(full), batch, items).loss
    parts = [
        objective(runner(full[part]), part_of(batch, part), items).loss
        for part in (slice(0, 1), slice(1, 4))
    ]
    assert torch.allclose(sum(parts), whole)


def test_rows_without_labels_do_not_count():
    batch, full = batch_of()
    batch.labels[1] = IGNORE
    objective = brep()
    known = [0, 2, 3]
    assert int(objective.count(batch)) == 3
    wanted = mean_of_means(full[known], batch.labels[known])
    assert torch.allclose(objective(runner(full), batch, None).loss, 0.1 * wanted)


def test_the_published_loss_sums_weighted_rows():
    batch, full = batch_of()
    objective = brep(reference_quirks=True)
    assert torch.allclose(
        objective(runner(full), batch, None).loss,
        0.1 * 0.1 * 4 * mean_of_means(full, batch.labels),
    )
    objective.training_rows(rows(20), tiny_tokenizer(), MAX_LEN)
    assert objective.pid.weight == objective.row_weight == 500 / 20


# The controller


def trace(pid, norms, target):
    found = []
    for norm in norms:
        acted = pid.update(target - norm)
        found.append((pid.weight, acted))
    return found


def by_hand(norms, target, weight=0.1, low=1e-5, high=0.1):
    """The published rule, written out for a correction at each given norm."""
    integral = before = 0.0
    found = []
    for norm in norms:
        error = target - norm
        integral += 1e-4 * error
        change = 0.1 * error + integral + 0.01 * (error - before)
        weight = min(max(weight * (1 + 5 * change), low), high)
        before = error
        found.append(weight)
    return found


@pytest.mark.quick
def test_omega_follows_the_published_rule_every_fourth_step():
    norms = [0.1 * step for step in range(1, 25)]
    found = trace(Pid(), norms, 0.8)
    wanted = by_hand(norms[3::4], 0.8)
    for index, (weight, acted) in enumerate(found):
        corrections = (index + 1) // 4
        assert weight == pytest.approx(([0.1, *wanted])[corrections], rel=1e-12)
        is_time = (index + 1) % 4 == 0
        assert acted == (is_time and wanted[corrections - 1] < ([0.1, *wanted])[corrections - 1])
    assert found[3] == (0.1, False), "e > 0 cannot raise what is at its largest"
    assert [index + 1 for index, (_, acted) in enumerate(found) if acted] == [8, 12, 16, 20, 24]


def test_omega_is_clipped_at_both_ends():
    high = trace(Pid(every=1, weight=0.01), [0.0] * 20, 2.0)
    assert high[-1][0] == 0.1 and not any(acted for _, acted in high)
    low = trace(Pid(every=1), [3.0] * 20, 0.5)
    assert low[-1] == (1e-5, False) and min(weight for weight, _ in low) == 1e-5


def test_the_published_code_corrects_first_at_step_3():
    objective = bound(brep(reference_quirks=True, target=0.25, limit=1.0), norm=1.0)
    acted = [objective.after_step()["restraint_acted"] for _ in range(12)]
    assert [step for step, did in enumerate(acted, 1) if did] == [3, 7, 11]
    ours = bound(brep(target=0.25, limit=1.0), norm=1.0)
    acted = [ours.after_step()["restraint_acted"] for _ in range(12)]
    assert [step for step, did in enumerate(acted, 1) if did] == [4, 8, 12]


def test_the_state_of_the_controller_comes_back():
    one, two = (bound(brep(target=0.2), norm=1.0) for _ in range(2))
    for _ in range(9):
        one.after_step()
    two.load_state_dict(one.state_dict())
    assert one.state_dict().keys() == {"weight", "integral", "error", "step", "last"}
    assert [one.after_step() for _ in range(9)] == [two.after_step() for _ in range(9)]
    assert one.state_dict() == two.state_dict() != brep().state_dict()


# Lengths, projection, hinge


def red(sizes=(3, 4), scale=True):
    """Return parameters of RED as a model names them, biases of lengths 1, 2, ..."""
    found = {}
    for index, size in enumerate(sizes, 1):
        place = f"layers.{index}.mlp.up_proj.intervention.reft_tied.default"
        vector = torch.zeros(size)
        vector[0] = index
        found[f"{place}.reft_bias"] = nn.Parameter(vector)
        if scale:
            found[f"{place}.reft_scale"] = nn.Parameter(torch.ones(size))
    return found


def bound(objective, norm=None):
    parameters = red()
    if norm is not None:
        for name, parameter in parameters.items():
            if name.endswith("bias"):
                parameter.data *= norm / parameter.data.norm()
    objective.bind(parameters)
    return objective


def test_lengths_are_per_vector_and_rounded_only_where_published():
    for quirks, wanted in ((False, 0.123456), (True, 0.12)):
        objective = bound(brep(reference_quirks=quirks), norm=0.123456)
        found = objective.after_step()
        assert found["bias_norm"] == pytest.approx(wanted, rel=1e-6)
        assert found["bias_target"] == 0.8
        assert found["bias_error"] == pytest.approx(0.8 - wanted, rel=1e-6)
    assert bound(brep()).after_step()["bias_norm"] == pytest.approx(1.5)


def test_a_projection_shortens_what_is_too_long_and_nothing_else():
    objective = bound(brep(restraint="project", target=1.875, limit=0.8))  # τ = 1.5
    short, long = objective.vectors
    found = objective.after_step()
    assert short.tolist() == [1.0, 0.0, 0.0]
    assert torch.allclose(long, torch.tensor([1.5, 0.0, 0.0, 0.0]))
    assert found["restraint_acted"] == 0.5 and found["bias_norm"] == pytest.approx(1.25)
    assert objective.after_step()["restraint_acted"] == 0.0
    assert found["omega"] == 0.1, "the weight stays where it starts"


def test_a_hinge_costs_the_square_of_the_excess():
    batch, full = batch_of()
    objective = bound(brep(restraint="hinge", target=1.875, hinge_weight=3.0))
    plain = bound(brep(restraint="none"))
    difference = objective(runner(full), batch, None).loss - plain(runner(full), batch, None).loss
    assert torch.allclose(difference, torch.tensor(3.0 * 0.5**2))
    difference.backward()
    short, long = objective.vectors
    assert short.grad is None or not short.grad.any()
    assert torch.allclose(long.grad, torch.tensor([2 * 3.0 * 0.5, 0.0, 0.0, 0.0]))
    assert objective.after_step()["restraint_acted"] == 0.5


def test_a_hinge_is_harmless_at_zero():
    objective = bound(brep(restraint="hinge"), norm=0.0)
    batch, full = batch_of()
    objective(runner(full), batch, None).loss.backward()
    assert all(vector.grad is None for vector in objective.vectors)
    assert torch.isfinite(full.grad).all()


def test_no_restraint_still_measures():
    found = bound(brep(restraint="none")).after_step()
    assert found["bias_norm"] == 1.5 and found["restraint_acted"] == 0.0
    assert found["omega"] == 0.1


# Whom it binds


@pytest.mark.parametrize("scale", [True, False])
def test_the_biases_of_red_are_found(scale):
    found = restraint.red_biases(red(scale=scale))
    assert [vector.numel() for vector in found] == [3, 4]


@pytest.mark.parametrize("tied", [True, False])
def test_the_biases_of_a_model_are_found(tied):
    model = tiny_llama()
    attach(model, "red", site="mlp.up_proj", positions="f1+l1", tied=tied)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    objective = brep()
    objective.bind(named)
    assert len(objective.vectors) == (2 if tied else 4)
    assert all(vector.shape == (64,) for vector in objective.vectors)


@pytest.mark.parametrize("method", ["loreft", "direft", "consreft", "lobireft"])
def test_other_biases_are_none_of_its_business(method):
    model = tiny_llama()
    attach(model, method, positions="f1")
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any(name.endswith("bias") for name in named)
    with pytest.raises(
        AdapterError, match=r"restraint: pid holds the bias vectors of red.*Trained: reft"
    ):
        brep().bind(named)
    free = brep(restraint="none")
    free.bind(named)
    assert free.after_step() == {}


@pytest.mark.parametrize("kind", ["pid", "project", "hinge"])
def test_shards_are_refused_by_name(kind):
    with pytest.raises(TrainingError, match=rf"restraint: {kind} needs whole bias vectors; FSDP"):
        brep(restraint=kind).bind(red(), sharded=True)
    free = brep(restraint="none")
    free.bind(red(), sharded=True)
    assert free.after_step() == {}


@pytest.mark.parametrize("method", ["loreft", "lora", "full"])
def test_a_restraint_refuses_another_method_before_anything_is_loaded(method):
    with pytest.raises(RecipeError, match=rf"restraint: pid holds .* method is {method}\."):
        brep().check(AdapterSpec(method=method))
    brep(restraint="none").check(AdapterSpec(method=method))
    brep().check(AdapterSpec(method="red"))


# Settings


@pytest.mark.parametrize(
    "values",
    [
        {"prefix_tokens": 0},
        {"prefix_share": 1.5},
        {"prefix_share": math.nan},
        {"every": 0},
        {"target": 0.0},
        {"limit": -1.0},
        {"hinge_weight": math.inf},
        {"weight_start": 0.2},
        {"weight_min": 0.5},
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(values):
    name = next(iter(values))
    with pytest.raises(RecipeError, match="weight_start" if "weight_min" in values else name):
        brep(**values)


def test_it_says_what_it_is():
    assert objectives.get("brep") is Brep and Brep.name == "brep"
    assert Brep.title and "2511.10707" in Brep.source
    assert Brep.plots.keys() == {"restraint"}
    with pytest.raises(RecipeError, match='Did you mean "prefix_tokens"'):
        Brep.config_from({"prefix_token": 3})
