"""In training the prompt is what stands before the first label; packing and traps."""

from __future__ import annotations

import pytest
import torch
from contracts.architectures import batch, build, forward, pad, rows
from contracts.helpers import attached, captured, changed, edited_mask, equal, interventions

from reftune import off, prompt_scope, use
from reftune.errors import PositionError

PROMPTS, WIDTHS = (6, 5, 2), (11, 7, 4)


def labelled(side="right", prompts=PROMPTS):
    """Return ids, mask and labels of rows whose prompts have these lengths."""
    items = rows(WIDTHS)
    ids, mask = pad(items, side)
    marked = [torch.where(torch.arange(len(r)) < n, -100, r) for r, n in zip(items, prompts)]
    labels, _ = pad(marked, side, -100)
    return ids, mask, labels


def expected(prompts, prefix, suffix, side="right"):
    """Return the places of a rule in prompts followed by answers."""
    width = max(WIDTHS)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, (n, total) in enumerate(zip(prompts, WIDTHS)):
        start = width - total if side == "left" else 0
        mask[row, start : start + n] = edited_mask((n,), prefix, suffix)[0]
    return mask


@pytest.mark.quick
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_labels_mark_the_end_of_the_prompt(side, training):
    model = attached(build("llama"), "loreft", positions="f2+l1").train(training)
    ids, mask, labels = labelled(side)
    with captured(model) as records:
        model(input_ids=ids, attention_mask=mask, labels=labels)
    assert torch.equal(changed(records), expected(PROMPTS, 2, 1, side))


@pytest.mark.quick
@pytest.mark.parametrize("way", ["argument", "scope"])
def test_prompt_lens_do_the_same(way):
    model = attached(build("llama"), "loreft", positions="f2+l1").train()
    ids, mask, _ = labelled()
    lens = torch.tensor(PROMPTS)
    with captured(model) as records:
        if way == "argument":
            model(input_ids=ids, attention_mask=mask, prompt_lens=lens)
        else:
            with prompt_scope(model, lens):
                model(input_ids=ids, attention_mask=mask)
    assert torch.equal(changed(records), expected(PROMPTS, 2, 1))


def test_the_backbone_called_directly_hears_the_scope():
    """TRL and others call the inner model and apply the head themselves."""
    model = attached(build("llama"), "loreft", positions="f2+l1").train()
    ids, mask, labels = labelled()
    with captured(model) as records, prompt_scope(model, labels=labels):
        model.model(input_ids=ids, attention_mask=mask)
    assert torch.equal(changed(records), expected(PROMPTS, 2, 1))
    with pytest.raises(PositionError, match="training step without labels"):
        model.model(input_ids=ids, attention_mask=mask)


@pytest.mark.quick
@pytest.mark.parametrize("rule", ["l1", "f1+l2", "all_prompt", "generated:3", "response"])
def test_training_without_labels_is_refused(rule):
    model = attached(build("llama"), "loreft", positions=rule).train()
    ids, mask, _ = labelled()
    with pytest.raises(PositionError, match=r"label smoothing drops them.*Pass labels= or prompt"):
        model(input_ids=ids, attention_mask=mask)
    with off(model):
        model(input_ids=ids, attention_mask=mask)  # a reference pass needs no positions
    model.eval()(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("rule", ["f2", "all", "mask"])
def test_rules_that_do_not_need_the_end_train_without_labels(rule):
    model = attached(build("llama"), "loreft", positions=rule).train()
    ids, mask, _ = labelled()
    extra = {"intervention_mask": mask.bool()} if rule == "mask" else {}
    with captured(model) as records:
        model(input_ids=ids, attention_mask=mask, **extra)
    places = edited_mask(WIDTHS, 2, 0) if rule == "f2" else mask.bool()
    assert torch.equal(changed(records), places)


def test_only_active_rules_refuse():
    model = attached(build("llama"), "loreft", name="ends", positions="l1")
    attached(model, "loreft", name="starts", positions="f1").train()
    ids, mask, _ = labelled()
    forward(model, ids, mask)
    use(model, ["starts", "ends"])
    with pytest.raises(PositionError, match='"l1" depends on it'):
        forward(model, ids, mask)


def test_train_positions_differ_from_positions():
    model = attached(build("llama"), "loreft", positions="l1", train_positions="response")
    ids, mask, labels = labelled()
    with captured(model) as records:
        model.train()(input_ids=ids, attention_mask=mask, labels=labels)
    answers = mask.bool() & (labels != -100)
    assert torch.equal(changed(records), answers)
    with captured(model) as records:
        model.eval()(input_ids=ids, attention_mask=mask, labels=labels)
    assert torch.equal(changed(records), expected(PROMPTS, 0, 1))


def test_multi_turn_rows_edit_the_first_prompt_only():
    model = attached(build("llama"), "loreft", positions="l2").train()
    row = rows((10,))[0][None]
    labels = row.clone()
    labels[:, :4] = -100
    labels[:, 6:8] = -100
    with captured(model) as records:
        model(input_ids=row, labels=labels)
    assert changed(records)[0].nonzero().flatten().tolist() == [2, 3]


def test_labels_of_classes_and_tokens_are_no_prompt():
    from transformers import LlamaConfig, LlamaForSequenceClassification
    from transformers import LlamaForTokenClassification as Tokens

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    ids, mask, labels = labelled()
    for model, given in (
        (LlamaForSequenceClassification(config), torch.tensor([0, 1, 2])),
        (Tokens(config), labels.clamp(max=2)),
    ):
        attached(model, "loreft", positions="l1").train()
        with captured(model) as records:
            model(input_ids=ids, attention_mask=mask, labels=given)
        assert torch.equal(changed(records), edited_mask(WIDTHS, 0, 1))


# Packing


def packed(prompts=(4, 3, 2), totals=(7, 5, 6)):
    """Return one row holding several documents, as TRL's packing makes it."""
    items = rows(totals, seed=5)
    ids = torch.cat(items)[None]
    positions = torch.cat([torch.arange(n) for n in totals])[None]
    labels = torch.cat(
        [torch.where(torch.arange(len(r)) < n, -100, r) for r, n in zip(items, prompts)]
    )[None]
    return items, ids, positions, labels


@pytest.mark.quick
@pytest.mark.parametrize("training", [True, False])
def test_packed_documents_equal_the_documents_alone(training):
    model = attached(build("llama"), "loreft", positions="f1+l2").train(training)
    prompts = (4, 3, 2)
    items, ids, positions, labels = packed(prompts)
    with captured(model) as records, torch.no_grad():
        output = model(input_ids=ids, position_ids=positions, labels=labels, use_cache=False)
        logits = output.logits[0]
    places, start = [], 0
    for item, n in zip(items, prompts):
        places += [start + i for i in range(n) if i < 1 or i >= n - 2]
        with torch.no_grad():
            alone = model(input_ids=item[None], prompt_lens=torch.tensor([n])).logits[0]
        assert equal(logits[start : start + len(item)], alone, 1e-5)
        start += len(item)
    assert changed(records)[0].nonzero().flatten().tolist() == places


@pytest.mark.parametrize("rule", ["all_prompt", "generated:2", "response", "f1"])
def test_packing_with_other_rules(rule):
    model = attached(build("llama"), "loreft", positions=rule).train()
    prompts = (4, 3, 2)
    items, ids, positions, labels = packed(prompts)
    with captured(model) as records:
        model(input_ids=ids, position_ids=positions, labels=labels)
    got = changed(records)[0].split([len(item) for item in items])
    for mask, n, item in zip(got, prompts, items):
        total = len(item)
        wanted = {
            "all_prompt": range(n),
            "generated:2": range(n, n + 2),
            "response": range(n, total),
            "f1": range(1),
        }[rule]
        assert mask.nonzero().flatten().tolist() == list(wanted)


def test_packing_without_labels():
    model = attached(build("llama"), "loreft", positions="l1")
    _, ids, positions, _ = packed()
    with captured(model) as records:
        model(input_ids=ids, position_ids=positions)
    assert changed(records)[0].nonzero().flatten().tolist() == [6, 11, 17]
    with pytest.raises(PositionError, match="In a packed row without labels"):
        model.train()(input_ids=ids, position_ids=positions)


def test_an_unlabelled_document_in_a_pack_is_all_prompt():
    model = attached(build("llama"), "loreft", positions="l1").train()
    _, ids, positions, labels = packed()
    labels[0, 7:12] = -100
    with captured(model) as records:
        model(input_ids=ids, position_ids=positions, labels=labels)
    assert changed(records)[0].nonzero().flatten().tolist() == [3, 11, 13]


# Gradients reach what they should


def test_gradients_equal_those_of_rows_alone():
    model = attached(build("llama"), "loreft", positions="f2+l2").train()
    ids, mask, labels = labelled()
    logits = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    (logits.float() * mask[..., None]).square().sum().backward()
    together = [p.grad.clone() for m in interventions(model) for p in m.parameters()]
    model.zero_grad()
    for item, n in zip(rows(WIDTHS), PROMPTS):
        alone = model(input_ids=item[None], prompt_lens=torch.tensor([n])).logits
        alone.float().square().sum().backward()
    apart = [p.grad for m in interventions(model) for p in m.parameters()]
    for a, b in zip(together, apart):
        assert equal(a, b, 1e-5)


def test_an_index_and_a_mask_give_the_same():
    """Long rows gather the edited columns, short ones compute all: same result and gradients."""
    from reftune.model import call

    results = []
    for bound in (None, "given"):
        model = attached(build("llama"), "loreft", positions="f2+l1").train()
        original = call.row_index
        if bound is None:
            call.row_index = lambda mask, bound: None
        try:
            items = rows((30, 22))
            ids, mask = pad(items)
            lens = torch.tensor([20, 2])
            logits = model(input_ids=ids, attention_mask=mask, prompt_lens=lens).logits
            logits.square().sum().backward()
        finally:
            call.row_index = original
        results.append([logits, *(p.grad for m in interventions(model) for p in m.parameters())])
    for a, b in zip(*results):
        assert equal(a, b, 1e-6)


def test_without_adapters_in_use_batches_pass_untouched():
    model = attached(build("llama"), "loreft", positions="l1").train()
    use(model, [])
    ids, mask = batch()
    assert torch.equal(forward(model, ids, mask), forward(build("llama").train(), ids, mask))
