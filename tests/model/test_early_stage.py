"""BREP's early-stage intervention: RED on `mlp.up_proj`, trained on all tokens, run on the prompt
and the first n generated ones.

The reference shares no code with the package: a bare model, hooks on its `up_proj`, one forward
pass over the whole row for each token, and the mask written out.
"""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from contracts.architectures import COMMON, EOS, GATED, PAD, batch, build, pad, rows
from contracts.helpers import attached, equal, interventions

from reftune import attach, off
from reftune.errors import SiteError

NEW = 6
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
LOGITS = {"output_logits": True, "return_dict_in_generate": True}
SITE = {"site": "mlp.up_proj", "train_positions": "all"}


def early(n, **where):
    """Return a model with a disturbed RED that acts on the prompt and n generated tokens."""
    rule = "all" if n < 0 else f"all_prompt+generated:{n}"
    return attached(build("llama"), "red", positions=rule, **{**SITE, **where})


class Manual:
    """A bare model whose `up_proj` outputs are s * z + b where `mask` says so."""

    def __init__(self, edited):
        self.model, self.mask = build("llama"), None
        for block, module in zip(self.model.model.layers, interventions(edited), strict=True):
            s, b = module.reft_scale.detach(), module.reft_bias.detach()
            block.mlp.up_proj.register_forward_hook(self._hook(s, b))

    def _hook(self, s, b):
        return lambda module, args, z: torch.where(self.mask[..., None], s * z + b, z)

    @torch.no_grad()
    def logits(self, row, prompt_len, n):
        """Return the logits of every place of one row; n = 0 edits nothing, n = -1 all of it."""
        end = {0: 0, -1: len(row)}.get(n, prompt_len + n)
        self.mask = (torch.arange(len(row)) < end)[None]
        return self.model(row[None], use_cache=False).logits[0]

    def continuation(self, row, n, new=NEW):
        """Return the greedy continuation of a row and the logits behind each of its tokens."""
        ids, found = row, []
        for _ in range(new):
            step = self.logits(ids, len(row), n)[-1].clone()
            step[EOS] = -torch.inf
            found.append(step)
            ids = torch.cat([ids, step.argmax()[None]])
        return ids[len(row) :].tolist(), found


def reference(model, n, lengths=(11, 7, 4)):
    manual = Manual(model)
    return [manual.continuation(row, n)[0] for row in rows(lengths)]


def test_the_lengths_can_be_told_apart():
    """Else the comparisons below would show nothing."""
    found = [str(reference(early(n if n else 1), n)) for n in (-1, 0, 1, 2, 4)]
    assert len(set(found)) == len(found)


# n = 0, n = -1, the start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_it_starts_at_the_identity_bit_for_bit(dtype):
    model = build("llama").to(dtype)
    ids, mask = batch()
    base = model(ids, attention_mask=mask).logits
    attach(model, "red", positions="all_prompt+generated:8", **SITE)
    assert torch.equal(model(ids, attention_mask=mask).logits, base)
    assert torch.equal(model.train()(ids, attention_mask=mask, labels=ids).logits, base)


def test_n_0_is_the_model_switched_off():
    """The published n = 0 edits nothing, the prompt neither; a rule cannot say that, `off` can."""
    model = early(4)
    ids, mask = batch("left")
    with off(model):
        out = model.generate(ids, attention_mask=mask, **GREEDY)
    assert out[:, 11:].tolist() == reference(model, 0)


def test_n_minus_1_is_all_and_equals_merged_weights():
    from contracts.helpers import wrapped

    model = wrapped(build("llama"), "red", positions="all", site="mlp.up_proj")
    ids, mask = batch("left")
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).logits
    answers = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert answers[:, 11:].tolist() == reference(model, -1)
    plain = model.merge_and_unload()
    with torch.no_grad():
        assert equal(plain(input_ids=ids, attention_mask=mask).logits, wanted, 1e-5)
    weight = build("llama").model.layers[0].mlp.up_proj.weight
    assert plain.model.layers[0].mlp.up_proj.bias is not None
    assert not torch.equal(plain.model.layers[0].mlp.up_proj.weight, weight)


# Which tokens


@pytest.mark.quick
@torch.no_grad()
def test_n_1_edits_the_prompt_and_the_first_token_by_hand():
    """y_1 is an edited input, y_2 is not; the logits of y_3 see the edits of both only by keys and
    values, computed here block by block without any of the package."""
    model = early(1)
    row = rows((7,))[0]
    made = model.generate(row[None], attention_mask=torch.ones(1, 7), **GREEDY, **LOGITS)
    answer = made.sequences[0, 7:]
    touched = []
    target = model.model.layers[1].mlp.up_proj
    target.register_forward_hook(lambda m, a, z: touched.append(z.clone()), prepend=True)
    target.register_forward_hook(lambda m, a, z: touched.append(z))
    again = model.generate(row[None], attention_mask=torch.ones(1, 7), **GREEDY)
    assert torch.equal(again, made.sequences)
    edited = [bool((a != b).any()) for a, b in zip(touched[::2], touched[1::2], strict=True)]
    assert edited == [True, True, False, False, False, False]
    assert (touched[0] != touched[1]).any(-1).all() and touched[0].shape[1] == 7

    manual = Manual(model)
    third = manual.logits(torch.cat([row, answer[:2]]), 7, 1)[-1]
    assert equal(made.logits[2][0], third, 1e-5)
    for other in (0, 2, -1):
        assert not equal(third, manual.logits(torch.cat([row, answer[:2]]), 7, other)[-1], 1e-4)


@pytest.mark.quick
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_a_left_padded_batch_equals_a_loop_without_cache(n):
    model = early(n)
    ids, mask = batch("left")
    out = model.generate(ids, attention_mask=mask, **GREEDY)
    assert out[:, ids.shape[1] :].tolist() == reference(model, n)


@pytest.mark.parametrize(
    "way",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 3},
        {"cache_implementation": "static"},
        {"do_sample": True, "top_k": 1},
    ],
    ids=lambda way: next(iter(way)),
)
def test_every_way_to_produce_tokens(way):
    model = early(2)
    ids, mask = batch("left")
    out = model.generate(ids, attention_mask=mask, **{**GREEDY, **way})
    assert out[:, ids.shape[1] :].tolist() == reference(model, 2)


@pytest.mark.parametrize("way", ["assistant_model", "prompt_lookup_num_tokens"])
def test_assisted_decoding(way):
    model = early(2)
    value = build("llama") if way == "assistant_model" else 3
    for row, wanted in zip(rows(), reference(model, 2), strict=True):
        more = {"attention_mask": torch.ones(1, len(row)), way: value}
        assert model.generate(row[None], **GREEDY, **more)[0, len(row) :].tolist() == wanted


def test_prompts_of_one_token():
    model = early(2)
    for cache in (True, False):
        for row, wanted in zip(rows((1, 1)), reference(model, 2, (1, 1)), strict=True):
            mask = torch.ones(1, 1)
            out = model.generate(row[None], attention_mask=mask, use_cache=cache, **GREEDY)
            assert out[0, 1:].tolist() == wanted
    ids, mask = pad(rows((1, 6)), "left")
    out = model.generate(ids, attention_mask=mask, **GREEDY)
    assert out[:, 6:].tolist() == reference(model, 2, (1, 6))


def test_two_generations_and_a_training_pass_between_them_leave_no_trace():
    model = early(2)
    ids, mask = batch("left")
    wanted = reference(model, 2)
    first = model.generate(ids[:1], attention_mask=mask[:1], **GREEDY)
    model.train()(ids, attention_mask=mask, labels=ids)
    again = model.generate(ids, attention_mask=mask, **{**GREEDY, "max_new_tokens": NEW})
    model.eval()
    last = model.generate(ids, attention_mask=mask, **GREEDY)
    assert [first[0, 11:].tolist()] == wanted[:1]
    assert again[:, 11:].tolist() == last[:, 11:].tolist() == wanted


@pytest.mark.parametrize("cache", [True, False])
def test_beams_of_a_batch_equal_beams_searched_by_hand(cache):
    model = early(1)
    manual, ids, mask = Manual(model), *batch("left")
    settings = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}
    out = model.generate(ids, attention_mask=mask, use_cache=cache, **GREEDY, **settings)
    for index, row in enumerate(rows()):
        beams = [(0.0, row)]
        for _ in range(NEW):
            grown = []
            for score, beam in beams:
                logits = manual.logits(beam, len(row), 1)[-1].clone()
                logits[EOS] = -torch.inf
                best = logits.log_softmax(-1).topk(6)
                grown += [
                    (score + float(v), torch.cat([beam, i[None]]))
                    for v, i in zip(best.values, best.indices, strict=True)
                ]
            beams = sorted(grown, key=lambda item: -item[0])[:3]
        got = out[2 * index : 2 * index + 2, ids.shape[1] :].tolist()
        assert got == [beam[len(row) :].tolist() for _, beam in beams[:2]]


def test_samples_of_a_prompt_are_edited_alike():
    model = early(3)
    ids, mask = batch("left")
    settings = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    out = model.generate(ids, attention_mask=mask, **{**GREEDY, **settings})
    wanted = [row for row in reference(model, 3) for _ in range(2)]
    assert out[:, ids.shape[1] :].tolist() == wanted


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_validation_uses_the_rule_of_inference_and_training_all(side):
    """In evaluation mode a loss is that of the early stage, on either side of padding."""
    model = early(1)
    manual = Manual(model)
    items, prompts = rows((9, 6)), (5, 2)
    ids, mask = pad(items, side)
    marked = [torch.where(torch.arange(len(r)) < p, -100, r) for r, p in zip(items, prompts)]
    labels, _ = pad(marked, side, -100)
    given = {"attention_mask": mask, "labels": labels}
    for training, n in ((False, 1), (True, -1), (False, 1)):
        logits = model.train(training)(ids, **given).logits
        for got, keep, item, prompt in zip(logits, mask.bool(), items, prompts, strict=True):
            wanted = manual.logits(item, prompt, n)
            assert equal(got[keep], wanted, 1e-5)


# Sites


@torch.no_grad()
def test_a_bf16_model_keeps_fp32_vectors_and_is_not_promoted():
    model = attached(build("llama").bfloat16(), "red", positions="all", site="mlp.up_proj")
    assert all(p.dtype == torch.float32 for m in interventions(model) for p in m.parameters())
    seen, mlp = [], model.model.layers[1].mlp
    mlp.up_proj.register_forward_hook(lambda m, a, z: seen.append(z), prepend=True)
    mlp.up_proj.register_forward_hook(lambda m, a, z: seen.append(z))
    mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    ids, mask = batch()
    logits = model(ids, attention_mask=mask).logits
    assert [tensor.dtype for tensor in (*seen, logits)] == [torch.bfloat16] * 4
    before, after, _ = seen
    module, real = interventions(model)[1], mask.bool()
    wanted = (module.reft_scale * before.float() + module.reft_bias).bfloat16()
    assert equal(after[real], wanted[real], 1e-2) and not torch.equal(after, before)
    assert torch.equal(after[~real], before[~real])


@pytest.mark.parametrize(
    ("site", "dim"),
    [
        ("self_attn.q_proj", 32),
        ("self_attn.k_proj", 16),
        ("self_attn.v_proj", 16),
        ("mlp.up_proj", 64),
    ],
)
def test_vectors_are_as_wide_as_the_module_puts_out(site, dim):
    """Grouped queries: keys and values are narrower than queries."""
    model = attached(build("llama"), "red", positions="all", site=site)
    assert {m.reft_bias.numel() for m in interventions(model)} == {dim}
    model(*batch()[:1])


def mixtral(config=hf.MixtralConfig, model=hf.MixtralForCausalLM, **more):
    return model(config(**GATED, **more))


@pytest.mark.parametrize(
    ("make", "known"),
    [
        (lambda: build("phi3"), r"mlp\.gate_up_proj, mlp\.down_proj\."),
        (lambda: build("gpt_neox"), r"mlp\.dense_h_to_4h, mlp\.dense_4h_to_h\."),
        (lambda: build("gpt2"), r"mlp\.c_fc, mlp\.c_proj\."),
        (lambda: mixtral(num_local_experts=4), r"self_attn\.q_proj, .*self_attn\.o_proj\."),
    ],
    ids=["phi3", "gpt_neox", "gpt2", "mixtral"],
)
def test_a_fused_or_missing_module_names_those_there_are(make, known):
    model = make()
    before = set(model.state_dict())
    with pytest.raises(SiteError, match=rf'has no module "mlp\.up_proj"\. Linear .*{known}'):
        attach(model, "red", site="mlp.up_proj", positions="all")
    assert set(model.state_dict()) == before and "generate" not in model.__dict__


def test_a_module_that_only_some_layers_have_says_which():
    values = {**COMMON, "intermediate_size": 64, "num_key_value_heads": 4, "head_dim": 8}
    config = hf.Qwen3MoeConfig(
        **values, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        decoder_sparse_step=2, max_position_embeddings=64,
    )  # fmt: skip
    model = hf.Qwen3MoeForCausalLM(config)
    with pytest.raises(SiteError, match=r'has no module "mlp\.up_proj".*Layers that have it: 0\.'):
        attach(model, "red", site="mlp.up_proj", positions="all")
    attach(model, "red", site="mlp.up_proj", positions="all", layers=[0])
