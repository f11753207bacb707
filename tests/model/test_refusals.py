"""Calls whose positions cannot be told are refused, never guessed."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from contracts.architectures import VOCAB, batch, build
from contracts.helpers import attached
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import reftune
from reftune.errors import AdapterError, PositionError
from reftune.model.call import MAX_PASSES

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("name", ["mamba", "mamba2", "rwkv"])
def test_a_recurrent_state_is_not_taken_for_a_prompt(name):
    common = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
    if name == "mamba":
        model = hf.MambaForCausalLM(hf.MambaConfig(**common))
    elif name == "mamba2":
        config = hf.Mamba2Config(**common, num_heads=8, head_dim=8, expand=2, n_groups=1)
        model = hf.Mamba2ForCausalLM(config)
    else:
        model = hf.RwkvForCausalLM(hf.RwkvConfig(**common, attention_hidden_size=32))
    reftune.attach(model.eval(), "loreft", positions="f2+l2")
    ids, settings = torch.randint(4, VOCAB, (2, 6)), {"max_new_tokens": 3, "pad_token_id": 0}
    with pytest.raises(PositionError, match="use_cache=False"):
        model.generate(ids, **settings, use_cache=True)
    assert model.generate(ids, **settings, use_cache=False).shape[1] <= 9


def test_a_square_mask_does_not_say_what_is_real():
    model = attached(build("llama"), "loreft", positions="f2+l1").eval()
    ids, mask = batch("left")
    square = mask[:, None, None, :].bool().expand(-1, 1, ids.shape[1], -1)
    with pytest.raises(PositionError, match="does not say which tokens are real"):
        model(input_ids=ids, attention_mask=square)
    everywhere = attached(build("llama"), "loreft", positions="all").eval()
    everywhere(input_ids=ids, attention_mask=square)


def packed():
    ids = torch.randint(4, VOCAB, (1, 12))
    return ids, torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]])


def test_one_number_a_row_does_not_fit_packed_rows():
    model = attached(build("llama"), "loreft", positions="f2+l1").eval()
    ids, places = packed()
    with pytest.raises(PositionError, match="rows hold several sequences"):
        model(input_ids=ids, position_ids=places, prompt_lens=torch.tensor([3]))


def test_a_mask_beside_packed_positions_is_refused():
    model = attached(build("llama"), "loreft", positions="f2+l1").eval()
    ids, places = packed()
    with pytest.raises(PositionError, match="Leave attention_mask out"):
        model(input_ids=ids, position_ids=places, attention_mask=torch.ones_like(ids))
    ids, mask = batch("left")  # positions of padding are no second sequence
    for fill in (0, 1):
        places = (mask.cumsum(1) - 1).masked_fill(mask == 0, fill)
        model(input_ids=ids, position_ids=places, attention_mask=mask)


def test_names_of_rows_repeat_in_generation_only():
    model = attached(build("llama"), "loreft", positions="l1").eval()
    ids, mask = batch("left")
    ids, mask = ids.repeat(2, 1)[:4], mask.repeat(2, 1)[:4]
    with reftune.mix(model, ["default", "__base__"]):
        with pytest.raises(AdapterError, match="2 adapter names were given for 4 rows"):
            model(input_ids=ids, attention_mask=mask)
        model.generate(ids[:2], attention_mask=mask[:2], num_beams=2, max_new_tokens=2)


@pytest.mark.parametrize("what", ["prompt_lens", "subject"])
def test_numbers_for_other_rows_are_refused(what):
    positions = "l1" if what == "prompt_lens" else "subject_last"
    model = attached(build("llama"), "loreft", positions=positions).eval()
    ids, mask = batch()
    key = "prompt_lens" if what == "prompt_lens" else "subject_positions"
    with pytest.raises(PositionError, match=f"{what} has 2 numbers for 3 rows"):
        model(input_ids=ids, attention_mask=mask, **{key: torch.tensor([1, 2])})


@pytest.mark.parametrize("passes", [MAX_PASSES, MAX_PASSES + 1])
def test_recomputing_a_forgotten_pass_is_an_error(passes):
    """Beyond the passes whose description is kept, edits would be those of another pass."""
    model = attached(build("llama"), "loreft", positions="l1").train()
    layers = model.model.layers
    for place, block in enumerate(layers):
        layers[place] = checkpoint_wrapper(block)
    ids, mask = batch()
    total = 0.0
    for number in range(passes):
        lens = torch.tensor([2 + number % 2] * 3)
        inputs = {"attention_mask": mask, "prompt_lens": lens, "use_cache": False}
        total = total + model(input_ids=ids, **inputs).logits.sum()
    if passes > MAX_PASSES:
        with pytest.raises(AdapterError, match="forward passes ago"):
            total.backward()
    else:
        total.backward()
