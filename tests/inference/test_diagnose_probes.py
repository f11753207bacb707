"""Probes: the closed form against another solution, known encodings, places found by offsets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diagnose_toys import pushed, rows, shaken, study, talking
from tiny import tiny_tokenizer

from reftune.config.recipe import TaskSpec
from reftune.errors import DataError
from reftune.inference import probes
from reftune.inference.continuing import writing
from reftune.inference.probes import additions, number_encoding, probe_prompts, read_states
from reftune.inference.ridge import fit, fit_chosen, r_squared
from reftune.tasks.base import Example
from reftune.tasks.families import Families

pytestmark = pytest.mark.quick


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("count", "dim"), [(40, 6), (12, 30)])
def test_the_closed_form_is_the_least_penalised_error(count, dim):
    """The same line from least squares on rows √λ·I added below, by another library."""
    x, y = noise(count, dim) * 3 + 5, noise(count, seed=1)
    for line in fit(x, y, (1e-6, 0.1, 10.0)):
        centred = (x - x.mean(0)).numpy()
        stacked = np.vstack([centred, math.sqrt(line.penalty) * np.eye(dim)])
        wanted = np.concatenate([(y - y.mean()).numpy(), np.zeros(dim)])
        weight = np.linalg.lstsq(stacked, wanted, rcond=None)[0]
        np.testing.assert_allclose(line.weight.numpy(), weight, rtol=1e-6, atol=1e-9)
        predicted = centred @ weight + float(y.mean())
        np.testing.assert_allclose(line.predict(x).numpy(), predicted, rtol=1e-6, atol=1e-9)


def test_without_a_penalty_it_is_least_squares_also_where_directions_repeat():
    x, y = noise(30, 4), noise(30, seed=1)
    (line,) = fit(x, y, [0.0])
    exact = np.linalg.lstsq(np.c_[x.numpy(), np.ones(30)], y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(line.weight.numpy(), exact[:4], rtol=1e-9)
    (twice,) = fit(torch.cat([x, x], 1), y, [0.0])  # what stands there twice is shared
    np.testing.assert_allclose(twice.weight.numpy(), np.tile(exact[:4], 2) / 2, rtol=1e-6)
    (flat,) = fit(torch.ones(5, 3), torch.ones(5), [0.0])
    assert flat.weight.abs().max() == 0 and flat.predict(torch.zeros(2, 3)).tolist() == [1, 1]


def test_a_shift_or_a_scale_of_the_states_changes_nothing():
    x, y, kept = noise(60, 5), noise(60, seed=1), torch.arange(12)
    wanted = fit_chosen(x, y, kept).predict(x)
    torch.testing.assert_close(fit_chosen(x + 7, y, kept).predict(x + 7), wanted)
    torch.testing.assert_close(fit_chosen(x * 100, y, kept).predict(x * 100), wanted)


def test_the_penalty_is_chosen_on_rows_kept_back():
    x = noise(60, 40)
    weak, strong = 1e-8, 1e2
    clean, pure = x[:, 0], noise(60, seed=9)
    kept = torch.arange(20)
    assert fit_chosen(x, clean, kept, (weak, strong)).penalty < 1e-3
    assert fit_chosen(x, pure, kept, (weak, strong)).penalty > 1
    chosen, (whole,) = fit_chosen(x, clean, kept, (weak, strong)), fit(x, clean, [weak])
    assert torch.equal(chosen.weight, whole.weight)  # fitted on the rows kept back too


def test_r_squared_by_hand():
    y = np.array([1.0, 2.0, 4.0, 5.0])
    assert r_squared(y, y) == 1.0 and r_squared(y, np.full(4, 3.0)) == 0.0
    assert r_squared(y, y + 1) == pytest.approx(1 - 4 / 10)
    assert math.isnan(r_squared(np.ones(3), np.zeros(3)))


def encoded(prompts, seed=0, mean=0.0):
    """States of one layer in which both operands stand linearly as log2, among other things."""
    values = torch.tensor([[math.log2(v) for v in p.values] for p in prompts]).double()
    directions = noise(2, 12, seed=seed)
    return (values @ directions + mean)[None, None].expand(1, 3, -1, -1)


def test_states_that_hold_log2_are_read_exactly_and_others_not_at_all(monkeypatch):
    model = shaken()
    made = {"base": encoded, "adapter": lambda p: noise(1, 3, len(p), 12, seed=5)}
    monkeypatch.setattr(probes, "_states_of", lambda study, who, prompts: made[who](prompts))
    found = number_encoding(study(model, rows()), rows=120)
    assert (found.fitted, found.held_out, found.layers) == (80, 40, 1)
    assert len(found.probes) == 4
    for probe in found.probes:
        assert probe.r2["base"].mean == pytest.approx(1.0, abs=1e-6)
        assert probe.error["base"].mean < 1e-3 and probe.r2["base"].n == 40
        assert probe.r2["adapter"].mean < 0.3 and probe.r2["base_on_adapter"].mean < 0.3
        for name in ("adapter", "base_on_adapter"):
            test = probe.tests[name]
            error = probe.error[name].mean - probe.error["base"].mean
            assert test.difference == pytest.approx(error) and test.low > 0.1
            assert test.p_value < 0.01 and test.n == 40
        for figure in (*probe.r2.values(), *probe.error.values()):
            assert figure.low <= figure.mean <= figure.high


def test_an_offset_is_no_loss_but_another_direction_is(monkeypatch):
    """The adapter's own probe reads both; the base's probe reads what was only shifted."""
    model = shaken()

    def found(adapter):
        made = {"base": encoded, "adapter": adapter}
        monkeypatch.setattr(probes, "_states_of", lambda study, who, prompts: made[who](prompts))
        return number_encoding(study(model, rows()), rows=120).probes[0].r2

    shifted = found(lambda p: encoded(p, mean=50.0))
    assert shifted["base_on_adapter"].mean == pytest.approx(1.0, abs=1e-6)
    turned = found(lambda p: encoded(p, seed=4))
    assert turned["adapter"].mean == pytest.approx(1.0, abs=1e-6)
    assert turned["base_on_adapter"].mean < 0.9


def caught(model, ids, place):
    """What leaves each block at one place of a row that stands alone, by hooks of our own."""
    states, handles = [], []
    for block in model.model.layers:
        hook = lambda m, a, out: states.append((out[0] if isinstance(out, tuple) else out)[0])  # noqa: E731
        handles.append(block.register_forward_hook(hook))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.stack([state[place] for state in states])


def test_states_are_those_of_each_row_alone_with_the_edits_in_them():
    model = shaken("f2+l2")
    made = study(model, rows())
    prompts = probe_prompts(made, "additions", 30)
    assert len({len(p.start.ids) for p in prompts}) > 1  # padded
    before = [len(block._forward_hooks) for block in model.model.layers]
    for who in ("base", "adapter"):
        with writing(model, who):
            states = read_states(model, made.tokenizer, prompts, batch_size=7)
            assert states.shape == (2, 3, 30, 32) and states.dtype == torch.float32
            for row in (0, 11, 29):
                for column, place in enumerate(prompts[row].places):
                    alone = caught(model, prompts[row].start.ids, place)
                    torch.testing.assert_close(states[:, column, row], alone)
    assert [len(block._forward_hooks) for block in model.model.layers] == before


def test_an_edit_of_the_last_prompt_token_shows_there_and_nowhere_else():
    model = pushed("last", [1])
    made = study(model, rows())
    prompts = probe_prompts(made, "additions", 24)
    states = {}
    for who in ("base", "adapter"):
        with writing(model, who):
            states[who] = read_states(model, made.tokenizer, prompts)
    change = states["adapter"] - states["base"]
    bias = next(p for n, p in model.named_parameters() if n.endswith("reft_bias"))
    torch.testing.assert_close(change[1, 2], bias.detach().expand(24, -1), atol=1e-4, rtol=1e-4)
    assert change[0].abs().max() == 0 and change[1, :2].abs().max() == 0


def test_additions_are_different_and_the_same_each_time():
    asked = additions(200, 7)
    assert asked == additions(200, 7) != additions(200, 8)
    assert len({pair for _, pair in asked}) == 200
    assert all(
        text == f"What is {a} + {b}?" and 2 <= min(a, b) <= max(a, b) <= 99
        for text, (a, b) in asked
    )
    assert len(additions(10**6, 0, 2, 4)) == 9


def ends(prompt, tokenizer):
    """The text up to the end of each place."""
    return [tokenizer.decode(prompt.start.ids[: place + 1]) for place in prompt.places]


def test_operands_are_found_by_offsets_in_every_prompt_form():
    tokenizer = tiny_tokenizer()
    model = shaken()
    for options in ({}, {"chat": True}):
        task = Families(TaskSpec(name="families", options=options, test_size=30))
        made = study(model, task.load("test"), task)
        for source in ("additions", "task"):
            for prompt in probe_prompts(made, source, 30)[:10]:
                shown = [text.replace("<bos>", "") for text in ends(prompt, tokenizer)]
                for text, value in zip(shown, prompt.values):
                    assert text.endswith(f" {value:.0f}"), (text, value)
                whole = tokenizer.decode(prompt.start.ids).replace("<bos>", "")
                assert shown[2] == whole
                assert whole.endswith("<assistant> " if options else "answer:")
    plain = study(model, rows())  # a task without a form is asked bare
    assert ends(probe_prompts(plain, "additions", 24)[0], tokenizer)[2].startswith("<bos>what is ")


def test_the_first_two_numbers_of_the_question_count_not_those_of_the_form():
    prompt = "give 1 answer to 7 questions: 7 pears and 40 more, then 3? answer in 5 words:"
    question = "7 pears and 40 more, then 3?"
    many = [Example(str(i), prompt, "", "", question) for i in range(24)]
    found = probe_prompts(study(shaken(), many), "task")[0]
    assert found.values == (7.0, 40.0)
    texts = [text.removeprefix("<bos>") for text in ends(found, tiny_tokenizer())]
    assert texts[:2] == [prompt[: prompt.rindex("7") + 1], prompt[: prompt.index("40") + 2]]


def test_a_task_without_numbers_says_so():
    made = study(shaken(), rows(["who has the key?"] * 30))
    with pytest.raises(DataError, match="Only 0 of 30 prompts hold two numbers above 0"):
        number_encoding(made, "task")
    zero = study(shaken(), rows([f"0 and {i + 1}" for i in range(30)]))
    with pytest.raises(DataError, match="Only 0 of 30"):
        number_encoding(zero, "task")


def test_lora_has_no_position_rules_and_is_read_all_the_same():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(talking(), LoraConfig(target_modules=["q_proj"], r=2))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.5)
    made = study(model.eval(), rows())
    found = number_encoding(made, rows=24)
    assert found.layers == 2 and len(found.probes) == 8
    assert any(p.error["adapter"].mean != p.error["base"].mean for p in found.probes)
