"""The run seam: logits at label positions only, equal to those of a full forward pass."""

from __future__ import annotations

import pytest
import torch
from contracts.architectures import CAUSAL, build, pad, rows
from contracts.helpers import attached, equal, interventions, wrapped

from reftune.errors import ModelError
from reftune.model.run import Prepared, Runner

pytestmark = pytest.mark.quick
PROMPTS = (6, 5, 2)


def prepared(side="right", **extra):
    items = rows()
    ids, mask = pad(items, side)
    marked = [torch.where(torch.arange(len(r)) < n, -100, r) for r, n in zip(items, PROMPTS)]
    return Prepared(ids, mask, pad(marked, side, -100)[0], **extra)


@pytest.mark.parametrize("name", CAUSAL)
def test_label_logits_equal_those_of_a_full_pass(name):
    model = attached(build(name), "loreft", positions="f2+l1").train()
    batch = prepared()
    output = Runner(model)(batch, hidden=True)
    full = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels,
        output_hidden_states=True,
    )  # fmt: skip
    where = batch.labels[:, 1:] != -100
    assert equal(output.logits, full.logits[:, :-1][where], 1e-6)
    assert torch.equal(output.labels, batch.labels[:, 1:][where])
    assert torch.equal(output.rows, where.nonzero()[:, 0])
    assert output.num_rows == 3 and output.class_logits is None
    assert equal(output.hidden, full.hidden_states[-1][:, :-1][where], 1e-6)


def test_full_logits_exist_nowhere():
    model = attached(build("llama"), "loreft", positions="f2+l1").train()
    seen = []
    model.lm_head.register_forward_hook(lambda m, a, o: seen.append(tuple(o.shape)))
    output = Runner(model)(prepared())
    assert seen == [(1, len(output.labels), 64)]
    assert not model.lm_head._forward_pre_hooks, "the gathering hook is gone"


def test_gradients_equal_those_of_the_models_own_loss():
    batch = prepared()
    gradients = []
    for way in ("seam", "model"):
        model = attached(build("llama"), "loreft", positions="f2+l1").train()
        if way == "seam":
            output = Runner(model)(batch)
            loss = torch.nn.functional.cross_entropy(output.logits.float(), output.labels)
        else:
            loss = model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
            ).loss
        loss.backward()
        gradients.append([p.grad for m in interventions(model) for p in m.parameters()])
    for a, b in zip(*gradients):
        assert equal(a, b, 1e-6)


@pytest.mark.parametrize("site", ["block", "mlp.up_proj"])
def test_the_seam_works_through_peft_and_checkpointing(site):
    batch = prepared()
    plain = wrapped(build("llama"), "loreft", positions="f2+l1", site=site).train()
    wanted = Runner(plain)(batch).logits
    model = wrapped(build("llama"), "loreft", positions="f2+l1", site=site).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    output = Runner(model)(batch)
    assert equal(output.logits, wanted, 1e-6)
    wanted.square().sum().backward()
    output.logits.square().sum().backward()
    for a, b in zip(interventions(model), interventions(plain)):
        assert equal(a.reft_weight.grad, b.reft_weight.grad, 1e-6)


def test_left_padding_gives_the_same_with_position_ids():
    model = attached(build("llama"), "loreft", positions="f2+l1").train()
    right = Runner(model)(prepared())
    left = Runner(model)(prepared("left"))
    assert torch.equal(right.labels, left.labels)
    assert equal(left.logits, right.logits, 1e-5)


def test_prompt_lens_mask_subject_and_subspaces_reach_the_sites():
    batch = prepared()
    columns = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    columns[torch.arange(3), torch.tensor([3, 2, 1])] = True
    batch.intervention_mask, batch.subject_positions = columns, torch.tensor([3, 2, 1])
    outputs = [
        Runner(attached(build("llama"), "loreft", positions=rule).train())(batch).logits
        for rule in ("mask", "subject_last")
    ]
    assert equal(*outputs, 1e-6)
    batch.prompt_lens = torch.tensor([4, 3, 2])
    moved = Runner(attached(build("llama"), "loreft", positions="l1").train())(batch).logits
    assert equal(moved, outputs[0], 1e-6)
    model = attached(build("llama"), "loreft", positions="l1").train()
    batch.select = [(0,), (1, 2), None]
    assert not equal(Runner(model)(batch).logits, moved, 1e-4)


def test_packed_rows_pass_their_position_ids():
    model = attached(build("llama"), "loreft", positions="f1+l1").train()
    apart = Runner(model)(prepared())
    items = rows()
    labels = [torch.where(torch.arange(len(r)) < n, -100, r) for r, n in zip(items, PROMPTS)]
    positions = torch.cat([torch.arange(len(r)) for r in items])[None]
    ids, labels = torch.cat(items)[None], torch.cat(labels)[None]
    batch = Prepared(ids, torch.ones_like(ids), labels, extra={"position_ids": positions})
    together = Runner(model)(batch)
    assert torch.equal(together.labels, apart.labels)
    assert equal(together.logits, apart.logits, 1e-5)


def test_encoder_decoder():
    model = attached(build("t5"), "loreft", positions="f2+l1").train()
    ids, mask = pad(rows())
    labels = torch.tensor([[5, 6, 2], [7, 2, -100], [8, 9, 2]])
    output = Runner(model)(Prepared(ids, mask, labels), hidden=True)
    full = model(input_ids=ids, attention_mask=mask, labels=labels)
    where = labels != -100
    assert equal(output.logits, full.logits[where], 1e-6)
    assert output.labels.tolist() == [5, 6, 2, 7, 2, 8, 9, 2]
    assert output.hidden.shape == (8, 32)
    labels.fill_(-100)
    with pytest.raises(ModelError, match="No row of the batch has a label"):
        Runner(model)(Prepared(ids, mask, labels))


def bart():
    import transformers as hf

    config = hf.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, dropout=0.0,
        max_position_embeddings=64, pad_token_id=0, decoder_start_token_id=2,
    )  # fmt: skip
    return hf.BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("make", [lambda: build("t5"), bart])
@pytest.mark.parametrize("through_peft", [False, True])
def test_full_logits_of_an_encoder_decoder_exist_nowhere(make, through_peft):
    from reftune import LoreftConfig, ReftConfig, get_peft_model

    model = make()
    if through_peft:
        model = get_peft_model(model, ReftConfig(LoreftConfig(rank=2), positions="f2+l1")).train()
    ids, mask = pad(rows())
    labels = torch.tensor([[5, 6, 2], [7, 2, -100], [8, 9, 2]])
    seen = []
    full = model(input_ids=ids, attention_mask=mask, labels=labels)
    model.get_output_embeddings().register_forward_hook(lambda m, a, o: seen.append(o.shape))
    output = Runner(model)(Prepared(ids, mask, labels))
    assert seen == [(1, 8, 64)]
    assert equal(output.logits, full.logits[labels != -100], 1e-6)


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_sequence_classification(name):
    model = attached(build(name), "loreft", positions="f1").train()
    ids, mask = pad(rows())
    output = Runner(model)(Prepared(ids, mask, torch.tensor([0, 2, 1])))
    assert output.class_logits.shape == (3, 3) and output.logits is None
    assert output.labels.tolist() == [0, 2, 1] and output.num_rows == 3


def test_rows_without_labels_are_refused():
    model = attached(build("llama"), "loreft")
    batch = prepared()
    batch.labels = torch.full_like(batch.labels, -100)
    with pytest.raises(ModelError, match="No row of the batch has a label"):
        Runner(model)(batch)
    batch.labels[0, 5] = 7
    with pytest.raises(ModelError, match="no language-model head"):
        Runner(attached(build("llama").model, "loreft"))(batch)


def test_it_runs_inside_ddp_like_wrappers():
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    model = attached(build("llama"), "loreft", positions="l1").train()
    wanted = Runner(model)(prepared()).logits
    assert torch.equal(Runner(Wrapper(model))(prepared()).logits, wanted)
