"""Generation edits the places the rule names, whatever way the tokens are produced.

The reference decodes one row at a time, without a cache, telling every forward pass where the
prompt ends.
"""

from __future__ import annotations

import pytest
import torch
from contracts.architectures import EOS, PAD, batch, build, pad, rows
from contracts.helpers import attached, captured, changed, equal, first
from torch import Tensor

from reftune import attach, prompt_scope
from reftune.errors import AdapterError, PositionError
from reftune.model.adapters import calls

NEW = 5
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
RULES = ("f2+l3", "l1+generated:2", "response", "all_prompt+generated:1", "all")


def reference(model, row: Tensor, new: int = NEW, **scope):
    """Return the greedy continuation of one row and the logits of each step."""
    ids, logits = row[None], []
    for _ in range(new):
        with prompt_scope(model, torch.tensor([len(row)]), **scope), torch.no_grad():
            step = model(input_ids=ids, use_cache=False).logits[:, -1]
        step[:, EOS] = -torch.inf
        logits.append(step)
        ids = torch.cat([ids, step.argmax(-1, keepdim=True)], 1)
    return ids[0, len(row) :], logits


def generate(model, ids, mask, **kwargs):
    return model.generate(ids, attention_mask=mask, pad_token_id=PAD, **{**GREEDY, **kwargs})


def continuations(out: Tensor, width: int) -> list[list[int]]:
    return out[:, width:].tolist()


@pytest.fixture(scope="module")
def wanted():
    """Reference continuations by architecture and rule."""
    found = {}

    def get(name, rule):
        if (name, rule) not in found:
            model = attached(build(name), "loreft", positions=rule)
            found[name, rule] = [reference(model, row)[0].tolist() for row in rows()]
        return found[name, rule]

    return get


@pytest.mark.parametrize("rule", RULES)
def test_generation_goes_on_from_a_beginning(rule, wanted):
    """A prompt with its first answer tokens, and `prompt_lens`, ends as one generation does."""
    model = attached(build("llama"), "loreft", positions=rule)
    texts = wanted("llama", rule)
    begun = [torch.cat([row, torch.tensor(text[:2])]) for row, text in zip(rows(), texts)]
    ids, mask = pad(begun, "left")
    lens = torch.tensor([len(row) for row in rows()])
    more = {"max_new_tokens": NEW - 2, "min_new_tokens": NEW - 2}
    out = generate(model, ids, mask, prompt_lens=lens, **more)
    assert continuations(out, ids.shape[1]) == [text[2:] for text in texts]
    beams = generate(
        model, ids, mask, prompt_lens=lens, num_beams=2, num_return_sequences=2, **more
    )
    alone = generate(model, begun[0][None], torch.ones_like(begun[0][None]), num_beams=2,
                     num_return_sequences=2, prompt_lens=lens[:1], **more)  # fmt: skip
    assert continuations(beams, ids.shape[1])[:2] == continuations(alone, len(begun[0]))
    with pytest.raises(PositionError, match="prompt_lens has 1 number"):
        generate(model, ids, mask, prompt_lens=lens[:1], **more)


def test_the_rules_can_be_told_apart(wanted):
    """Else the comparisons below would show nothing."""
    base = build("llama")
    plain = [generate(base, row[None], torch.ones(1, len(row)))[0, len(row) :] for row in rows()]
    all_texts = [str([p.tolist() for p in plain])] + [str(wanted("llama", rule)) for rule in RULES]
    assert len(set(all_texts)) == len(all_texts)


@pytest.mark.quick
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_left_padded_batch_equals_the_reference(name, rule, wanted):
    model = attached(build(name), "loreft", positions=rule)
    ids, mask = batch("left")
    out = generate(model, ids, mask)
    assert continuations(out, ids.shape[1]) == wanted(name, rule)


@pytest.mark.parametrize("rule", ["f2+l3", "l1+generated:2", "response"])
@pytest.mark.parametrize(
    "way",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static"},
        {"num_beams": 1, "num_return_sequences": 1, "do_sample": True, "top_k": 1},
    ],
    ids=lambda way: next(iter(way)),
)
def test_every_way_to_produce_tokens_equals_the_reference(way, rule, wanted):
    model = attached(build("llama"), "loreft", positions=rule)
    ids, mask = batch("left")
    out = generate(model, ids, mask, **way)
    assert continuations(out, ids.shape[1]) == wanted("llama", rule)


@pytest.mark.parametrize("rule", ["f2+l3", "l1+generated:2"])
@pytest.mark.parametrize("way", ["assistant_model", "prompt_lookup_num_tokens"])
def test_assisted_decoding_equals_the_reference(way, rule, wanted):
    model = attached(build("llama"), "loreft", positions=rule)
    value = build("llama") if way == "assistant_model" else 3
    for row, expected in zip(rows(), wanted("llama", rule)):
        out = generate(model, row[None], torch.ones(1, len(row)), **{way: value})
        assert continuations(out, len(row)) == [expected]


@pytest.mark.quick
@pytest.mark.parametrize("rule", ["f2+l3", "l1+generated:2"])
def test_beams_of_a_batch_equal_the_beams_of_each_row(rule):
    model = attached(build("llama"), "loreft", positions=rule)
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    beams["return_dict_in_generate"] = True
    ids, mask = batch("left")
    together = generate(model, ids, mask, **beams)
    for i, row in enumerate(rows()):
        alone = generate(model, row[None], torch.ones(1, len(row)), **beams)
        got = together.sequences[2 * i : 2 * i + 2, ids.shape[1] :]
        assert torch.equal(got, alone.sequences[:, len(row) :])
        assert equal(together.sequences_scores[2 * i : 2 * i + 2], alone.sequences_scores)


def test_beams_without_cache_equal_beams_with_cache():
    model = attached(build("llama"), "loreft", positions="f2+l3")
    ids, mask = batch("left")
    on = generate(model, ids, mask, num_beams=3)
    assert torch.equal(on, generate(model, ids, mask, num_beams=3, use_cache=False))


def test_several_samples_of_a_prompt_start_from_the_same_logits(wanted):
    model = attached(build("llama"), "loreft", positions="f2+l3")
    ids, mask = batch("left")
    out = generate(
        model, ids, mask, do_sample=True, num_return_sequences=3, output_logits=True,
        return_dict_in_generate=True, max_new_tokens=1, min_new_tokens=1,
    )  # fmt: skip
    first_logits = out.logits[0].reshape(3, 3, -1)
    assert equal(first_logits, first_logits[:, :1].expand_as(first_logits))
    for i, expected in enumerate(wanted("llama", "f2+l3")):
        allowed = first_logits[i, 0].clone()
        allowed[EOS] = -torch.inf
        assert allowed.argmax() == expected[0]


def test_a_mask_is_derived_from_padding_as_generate_does(wanted):
    model = attached(build("llama"), "loreft", positions="f2+l3")
    ids, _ = batch("left")
    out = model.generate(ids, pad_token_id=PAD, **GREEDY)
    assert continuations(out, ids.shape[1]) == wanted("llama", "f2+l3")


def test_embeddings_as_prompt(wanted):
    model = attached(build("llama"), "loreft", positions="f2+l3")
    row = rows()[0]
    embeds = model.get_input_embeddings()(row[None])
    out = model.generate(inputs_embeds=embeds, attention_mask=torch.ones(1, len(row)), **GREEDY)
    assert out.tolist() == [wanted("llama", "f2+l3")[0]]


def test_generation_from_nothing_has_one_prompt_token():
    model = attached(build("llama"), "loreft", positions="l3")
    assert model.generate(**GREEDY).shape == (1, 1 + NEW)


def test_a_continued_cache_equals_a_fresh_start(wanted):
    """A conversation: the cache of the first tokens is passed to generate."""
    from transformers import DynamicCache

    model = attached(build("llama"), "loreft", positions="f2+l3")
    row = rows()[0]
    cache = DynamicCache(config=model.config)
    with prompt_scope(model, torch.tensor([len(row)])), torch.no_grad():
        model(input_ids=row[None, :6], past_key_values=cache, use_cache=True)
    out = generate(model, row[None], torch.ones(1, len(row)), past_key_values=cache)
    assert continuations(out, len(row)) == [wanted("llama", "f2+l3")[0]]


@pytest.mark.quick
def test_the_prompt_is_edited_once_and_answers_are_not():
    """Count edited states over a whole generation, block by block."""
    model = attached(build("llama"), "loreft", positions="f2+l3")
    before, seen = [], []
    block = model.model.layers[0]
    block.register_forward_hook(lambda m, a, o: before.append(first(o).clone()), prepend=True)
    block.register_forward_hook(lambda m, a, o: seen.append((first(o) != before[-1]).any(-1)))
    generate(model, *batch("left"))
    seen = [int(mask.sum()) for mask in seen]
    assert seen == [5 + 5 + 4, 0, 0, 0, 0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_subject_last_and_mask_in_generation(side):
    subject = torch.tensor([4, 2, 0])
    model = attached(build("llama"), "loreft", positions="subject_last")
    ids, mask = batch("left")
    out = generate(model, ids, mask, subject_positions=subject)
    expected = [
        reference(model, row, subject_positions=subject[i : i + 1])[0].tolist()
        for i, row in enumerate(rows())
    ]
    assert continuations(out, ids.shape[1]) == expected
    columns = torch.zeros_like(mask, dtype=torch.bool)
    for i, row in enumerate(rows()):
        columns[i, ids.shape[1] - len(row) + subject[i]] = True
    masked = attached(build("llama"), "loreft", positions="mask")
    beams = 2 if side == "left" else 1
    if beams == 1:
        by_mask = generate(masked, ids, mask, intervention_mask=columns)
        assert continuations(by_mask, ids.shape[1]) == expected
    else:
        by_mask = generate(masked, ids, mask, intervention_mask=columns, num_beams=2)
        by_place = generate(model, ids, mask, subject_positions=subject, num_beams=2)
        assert torch.equal(by_mask, by_place)


def test_missing_columns_are_refused_in_generation():
    ids, mask = batch("left")
    with pytest.raises(PositionError, match="Pass subject_positions="):
        generate(attached(build("llama"), "loreft", positions="subject_last"), ids, mask)
    with pytest.raises(PositionError, match="Pass intervention_mask="):
        generate(attached(build("llama"), "loreft", positions="mask"), ids, mask)


def test_short_error_is_refused_in_generation():
    model = attached(build("llama"), "loreft", positions="f3+l3", short="error")
    with pytest.raises(PositionError, match=r'"f3\+l3" asks for 6 prompt tokens but row 2 has 4'):
        generate(model, *batch("left"))


@pytest.mark.quick
def test_a_decode_loop_of_ones_own_must_say_where_the_prompt_ends():
    model = attached(build("llama"), "loreft", positions="f2+l3")
    row = rows()[0][None]
    with torch.no_grad():
        cache = model(input_ids=row, use_cache=True).past_key_values
        with pytest.raises(PositionError, match=r"cached tokens the end .*reftune.prompt_scope"):
            model(input_ids=row[:, :1], past_key_values=cache)


def test_a_decode_loop_with_a_prompt_scope_equals_the_reference(wanted):
    for rule in ("f2+l3", "l1+generated:2", "response"):
        model = attached(build("llama"), "loreft", positions=rule)
        row = rows()[0]
        ids, cache, produced = row[None], None, []
        with prompt_scope(model, torch.tensor([len(row)])), torch.no_grad():
            for _ in range(NEW):
                output = model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits = output.logits[:, -1]
                logits[:, EOS] = -torch.inf
                ids = logits.argmax(-1, keepdim=True)
                produced.append(int(ids))
        assert produced == wanted("llama", rule)[0]


def test_prefix_rules_need_no_scope_once_the_prefix_has_passed():
    model = attached(build("llama"), "loreft", positions="f2")
    row = rows()[0][None]
    with torch.no_grad():
        whole = model(input_ids=row).logits
        cache = model(input_ids=row[:, :5], use_cache=True).past_key_values
        rest = model(input_ids=row[:, 5:], past_key_values=cache).logits
        assert equal(rest, whole[:, 5:])
        cache = model(input_ids=row[:, :1], use_cache=True).past_key_values
        with pytest.raises(PositionError, match="cached tokens"):
            model(input_ids=row[:, 1:], past_key_values=cache)


def test_the_scope_closes_after_an_error():
    model = attached(build("llama"), "loreft", positions="subject_last")
    ids, mask = batch("left")
    with pytest.raises(PositionError):
        generate(model, ids, mask)
    (call,) = calls(model)
    assert call.scope is None and call.said is None


def test_continuous_batching_is_refused():
    model = attached(build("llama"), "loreft", positions="f2+l3")
    with pytest.raises(PositionError, match="Continuous batching packs several requests"):
        model(input_ids=rows()[0][None], cu_seq_lens_q=torch.tensor([0, 5, 11]))


def test_generation_uses_the_inference_rule_also_in_training_mode():
    """Rollouts of reinforced training are generated by a model in training mode."""
    model = attached(build("llama"), "loreft", positions="l2", train_positions="all")
    ids, mask = batch("left")
    wanted = generate(model, ids, mask)
    assert torch.equal(generate(model.train(), ids, mask), wanted)


# Encoder-decoder


def t5_reference(model, row, new=4, **scope):
    ids = torch.tensor([[PAD]])
    for _ in range(new):
        with prompt_scope(model, **scope), torch.no_grad():
            logits = model(input_ids=row[None], decoder_input_ids=ids, use_cache=False).logits
        logits[..., EOS] = -torch.inf
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0].tolist()


T5 = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("cache", [True, False])
def test_t5_generates_as_each_row_alone(stack, cache):
    rule = "f2+l1" if stack == "encoder" else "l1+generated:2"
    model = attached(build("t5"), "loreft", positions=rule, stack=stack)
    ids, mask = batch("right")
    out = model.generate(input_ids=ids, attention_mask=mask, use_cache=cache, **T5)
    assert out.tolist() == [t5_reference(model, row) for row in rows()]
    beams = model.generate(input_ids=ids, attention_mask=mask, num_beams=3, **T5)
    for i, row in enumerate(rows()):
        assert torch.equal(model.generate(input_ids=row[None], num_beams=3, **T5)[0], beams[i])


def test_t5_takes_a_mask_and_subjects_for_its_encoder():
    subject = torch.tensor([4, 2, 0])
    ids, mask = batch("right")
    by_place = attached(build("t5"), "loreft", positions="subject_last")
    by_mask = attached(build("t5"), "loreft", positions="mask")
    columns = torch.zeros_like(mask, dtype=torch.bool)
    columns[torch.arange(3), subject] = True
    a = by_place.generate(input_ids=ids, attention_mask=mask, subject_positions=subject, **T5)
    b = by_mask.generate(input_ids=ids, attention_mask=mask, intervention_mask=columns, **T5)
    assert torch.equal(a, b)


def test_t5_with_adapters_on_both_sides():
    model = attached(build("t5"), "loreft", name="left", positions="l1", stack="encoder")
    attached(model, "loreft", name="right", positions="generated:1", stack="decoder")
    from reftune import use

    use(model, ["left", "right"])
    ids, mask = batch("right")
    with captured(model) as records:
        out = model.generate(input_ids=ids, attention_mask=mask, **T5)
    assert changed(records).sum() == 3
    assert out.tolist() == [t5_reference(model, row) for row in rows()]
    alone = attached(build("t5"), "loreft", name="left", positions="l1", stack="encoder")
    assert out.tolist() != alone.generate(input_ids=ids, attention_mask=mask, **T5).tolist()


def test_wrong_shapes_are_refused():
    model = attached(build("llama"), "loreft", positions="mask")
    ids, mask = batch("right")
    with pytest.raises(PositionError, match=r"intervention_mask has shape \(3, 4\), the tokens"):
        model(input_ids=ids, attention_mask=mask, intervention_mask=torch.ones(3, 4).bool())
    with pytest.raises(AdapterError, match="2 subspace rows were given for 3 rows"):
        everywhere = attached(build("llama"), "loreft", positions="all")
        everywhere(input_ids=ids, attention_mask=mask, subspaces=[(0,), (1,)])
    with pytest.raises(PositionError, match="selects subspace dimension 9, but the rank is 3"):
        everywhere(input_ids=ids, attention_mask=mask, subspaces=[(0,), (1,), (9,)])
    red = attach(build("llama"), "red", positions="all").model
    with pytest.raises(AdapterError, match="Red has no subspace dimensions"):
        red(input_ids=ids, attention_mask=mask, subspaces=[(0,), (1,), None])
