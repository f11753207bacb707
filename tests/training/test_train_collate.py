"""Batches and row order."""

from __future__ import annotations

import pytest
import torch

from reftune.errors import DataError
from reftune.training.collate import Collator, Order, Padded, count_tokens, prepare
from reftune.training.encode import Encoded


def row(length, prompt=2, **more):
    labels = [-100] * prompt + [5] * (length - prompt)
    return Encoded([5] * length, labels, prompt, "r", **more)


def test_right_padding_with_explicit_mask_even_if_pad_is_a_real_token():
    batch = Collator(pad_id=5)([row(3), row(9)])
    assert batch["input_ids"].shape == (2, 16)  # rounded up to a multiple of 8
    assert batch["attention_mask"].sum(1).tolist() == [3, 9]
    assert batch["attention_mask"][0, :3].all() and not batch["attention_mask"][0, 3:].any()
    assert (batch["labels"][0] != -100).nonzero().flatten().tolist() == [2]
    assert batch["prompt_lens"].tolist() == [2, 2]
    assert "select" not in batch and "intervention_mask" not in batch


def test_pad_token_falls_back_to_eos(tokenizer):
    from tiny import tiny_tokenizer

    assert Collator.of(tokenizer).pad_id == 0
    assert Collator.of(tiny_tokenizer(pad=False)).pad_id == 2


def test_optional_columns_are_carried():
    mask = [True, False, False]
    batch = Collator()(
        [row(3, select=(0, 2), intervention_mask=mask, subject=1), row(4, subject=0)]
    )
    assert batch["select"] == [(0, 2), None]
    assert batch["intervention_mask"][0, :3].tolist() == mask
    assert not batch["intervention_mask"][1].any()
    ready = prepare(batch)
    assert ready.subject_positions.tolist() == [1, 0] and ready.select == [(0, 2), None]
    assert ready.extra == {}


def test_class_labels_decoder_labels_and_segments():
    batch = Collator()([row(3, class_label=1, token_types=[0, 0, 1]), row(4, class_label=0)])
    assert batch["labels"].tolist() == [1, 0] and batch["labels"].dtype == torch.long
    assert prepare(batch).extra["token_type_ids"][0, :3].tolist() == [0, 0, 1]
    assert Collator()([row(3, class_label=0.5)])["labels"].dtype == torch.float32
    batch = Collator()([row(3, decoder_labels=[4, 2]), row(3, decoder_labels=[7])])
    assert batch["labels"].shape == (2, 8) and batch["labels"][1, :2].tolist() == [7, -100]


def test_half_filled_columns_are_refused():
    with pytest.raises(DataError, match='Row "r" has no class label, others have'):
        Collator()([row(3, class_label=1), row(3)])
    with pytest.raises(DataError, match="no subject"):
        Collator()([row(3, subject=1), row(3)])
    with pytest.raises(DataError, match="no rows"):
        Collator()([])


def test_order_is_a_permutation_by_seed_and_epoch():
    one = Order(10, seed=3)
    first, again = list(one), list(Order(10, seed=3))
    one.epoch = lambda: 1
    assert sorted(first) == list(range(10)) and first == again and list(one) != first
    assert list(Order(10, seed=4)) != first
    assert list(Order(4)) == [0, 1, 2, 3]


def test_order_fills_up_at_the_end_only():
    alone, shared = Order(10, seed=3), Order(10, multiple_of=8, seed=3)
    assert list(shared)[:10] == list(alone) and list(shared)[10:] == list(range(10, 16))
    padded = Padded([row(5)] * 10)
    assert len(padded) == 10 and 5 in padded[9].labels and set(padded[12].labels) == {-100}


def test_tokens_of_blank_rows_do_not_count():
    rows = Padded([row(5)])
    assert int(count_tokens(Collator()([rows[0], rows[1]]))) == 5
    rows = Padded([row(5, class_label=0.5)])
    assert int(count_tokens(Collator()([rows[0], rows[1]]))) == 5
