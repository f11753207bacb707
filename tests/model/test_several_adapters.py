"""Several adapters on one model: added up, switched, mixed per row, scaled, selected."""

from __future__ import annotations

import pytest
import torch
from contracts.architectures import PAD, batch, build, forward, rows
from contracts.equations import EQUATIONS, tensors
from contracts.helpers import (
    attached,
    captured,
    changed,
    edited_mask,
    equal,
    interventions,
    wrapped,
)

from reftune import (
    ReftConfig,
    attach,
    detach,
    get_peft_model,
    load,
    mix,
    off,
    save,
    set_strength,
    use,
)
from reftune.errors import AdapterError
from reftune.interventions.loreft import LoreftConfig
from reftune.model.adapters import adapter_names, sites

pytestmark = pytest.mark.quick
LENGTHS = (11, 7, 4)


def two(**second):
    """Return a model with a LoReFT adapter "a" and a RED adapter "b"."""
    model = attached(build("llama"), "loreft", name="a", positions="f2+l1")
    return attached(model, "red", name="b", **{"positions": "all", **second})


@torch.no_grad()
def test_active_together_they_read_the_same_h_and_add_up():
    model = two()
    use(model, ["a", "b"])
    ids, mask = batch()
    with captured(model) as records:
        forward(model, ids, mask)
    prompt = edited_mask(LENGTHS, 2, 1)
    for a, b, record in zip(interventions(model, "a"), interventions(model, "b"), records):
        h = record["before"].double()
        delta_a = EQUATIONS["loreft"].edit(h, tensors(a)) - h
        delta_b = EQUATIONS["red"].edit(h, tensors(b)) - h
        expected = h + prompt[..., None] * delta_a + mask[..., None] * delta_b
        assert equal(record["after"], expected, 1e-6)


@torch.no_grad()
def test_order_of_use_makes_no_difference_and_switching_is_exact():
    model = two()
    ids, mask = batch()
    use(model, "a")
    only_a = forward(model, ids, mask)
    assert torch.equal(
        only_a, forward(attached(build("llama"), "loreft", positions="f2+l1"), ids, mask)
    )
    use(model, ["a", "b"])
    both = forward(model, ids, mask)
    use(model, ["b", "a"])
    assert equal(forward(model, ids, mask), both, 1e-6)
    use(model, "a")
    assert torch.equal(forward(model, ids, mask), only_a)


def test_switching_moves_training_too():
    model = two()
    use(model, "a")
    assert all(p.requires_grad for m in interventions(model, "a") for p in m.parameters())
    assert not any(p.requires_grad for m in interventions(model, "b") for p in m.parameters())
    with pytest.raises(AdapterError, match=r'no adapter "c" on this model.*Known: a, b'):
        use(model, "c")


@torch.no_grad()
def test_detaching_one_leaves_the_other():
    model = two()
    use(model, "a")
    ids, mask = batch()
    wanted = forward(model, ids, mask)
    detach(model, "b")
    assert adapter_names(model) == ["a"]
    assert torch.equal(forward(model, ids, mask), wanted)
    with pytest.raises(AdapterError, match='no adapter "b"'):
        detach(model, "b")
    detach(model, "a")
    assert sites(model) == [] and "generate" not in vars(model)


def test_names_that_would_break_saving_are_refused():
    model = build("llama")
    for name in ("", "a.b", "__base__", "reft_bias", "intervention"):
        with pytest.raises(AdapterError, match="cannot name an adapter"):
            attach(model, "loreft", name=name)
    for name in ("model", "layers", "0", "base_model"):
        with pytest.raises(AdapterError, match="also the name of a module"):
            attach(model, "loreft", name=name)
    assert sites(model) == []
    attach(model, "loreft", name="a")
    with pytest.raises(AdapterError, match='adapter "a" exists already'):
        attach(model, "loreft", name="a")
    assert adapter_names(model) == ["a"]


# Rows with their own adapters


@pytest.mark.parametrize("door", ["plain", "peft"])
@torch.no_grad()
def test_mixed_rows_equal_each_row_alone(door):
    if door == "plain":
        model = two()
        single = model
    else:
        model = wrapped(build("llama"), "loreft", name="a", positions="f2+l1")
        from reftune import RedConfig, ReftConfig

        model.add_adapter("b", ReftConfig(RedConfig(), positions="all"))
        from contracts.equations import disturb

        for i, module in enumerate(interventions(model, "b")):
            disturb(module, seed=i)
        single = model.base_model.model
    ids, mask = batch()
    names = ["b", "__base__", "a"]
    alone = []
    for name, row in zip(names, rows()):
        if name == "__base__":
            with off(single):
                alone.append(forward(single, row[None])[0])
        else:
            use(single, name)
            alone.append(forward(single, row[None])[0])
    use(single, "a")
    if door == "plain":
        with mix(model, names):
            logits = forward(model, ids, mask)
    else:
        logits = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
    for got, m, wanted in zip(logits, mask, alone):
        assert equal(got[m.bool()], wanted, 1e-5)
    with captured(single) as records:
        if door == "plain":
            with mix(model, names):
                forward(model, ids, mask)
        else:
            model(input_ids=ids, attention_mask=mask, adapter_names=names)
    assert changed(records)[1].sum() == 0, "the base row is bit-identical"
    assert torch.equal(forward(single, ids, mask)[2], forward(single, ids, mask)[2])


@pytest.mark.parametrize("beams", [1, 3])
def test_mixed_rows_in_generation_equal_each_row_alone(beams):
    model = wrapped(build("llama"), "loreft", name="a", positions="f2+l1")
    from contracts.equations import disturb

    from reftune import LoreftConfig, ReftConfig

    model.add_adapter("b", ReftConfig(LoreftConfig(rank=2), positions="l3+generated:2"))
    for i, module in enumerate(interventions(model, "b")):
        disturb(module, seed=50 + i)
    ids, mask = batch("left")
    kwargs = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams, "pad_token_id": PAD}
    names = ["b", "__base__", "a"]
    out = model.generate(
        input_ids=ids, attention_mask=mask, adapter_names=names, do_sample=False, **kwargs
    )
    for i, (name, row) in enumerate(zip(names, rows())):
        kwargs["attention_mask"] = torch.ones(1, len(row))
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(input_ids=row[None], do_sample=False, **kwargs)
        else:
            model.set_adapter(name)
            alone = model.generate(input_ids=row[None], do_sample=False, **kwargs)
        assert out[i, ids.shape[1] :].tolist() == alone[0, len(row) :].tolist()


def test_mixing_refuses_unknown_names_and_wrong_counts():
    model = two()
    ids, mask = batch()
    with pytest.raises(AdapterError, match='no adapter "x"'), mix(model, ["a", "x", "b"]):
        pass
    with mix(model, ["a", "b"]), pytest.raises(AdapterError, match=r"2 adapter names .* 3 rows"):
        forward(model, ids, mask)
    assert forward(model, ids, mask).shape[0] == 3, "the mix ended with its block"


# Strength


@torch.no_grad()
def test_strength_scales_the_change():
    model = attached(build("llama"), "loreft", positions="f2+l1", layers="0")
    ids, mask = batch()
    deltas = {}
    for value in (1.0, 0.5, -2.0, 0.0):
        set_strength(model, "default", value)
        with captured(model) as records:
            logits = forward(model, ids, mask)
        deltas[value] = records[0]["after"] - records[0]["before"]
        if value == 0.0:
            assert torch.equal(logits, forward(build("llama"), ids, mask))
    for value in (0.5, -2.0):
        assert equal(deltas[value], value * deltas[1.0], 1e-6)
    with pytest.raises(AdapterError, match='no adapter "other"'):
        set_strength(model, "other", 0.5)


def test_strength_is_saved_in_the_config(tmp_path):
    from reftune.model.checkpoint import load_adapter, save_adapter

    model = wrapped(build("llama"), "loreft", positions="l1", strength=0.5)
    assert all(site.strength == {"default": 0.5} for site in sites(model))
    loaded, _ = load_adapter(save_adapter(model, tmp_path / "a"), model=build("llama"))
    assert all(site.strength == {"default": 0.5} for site in sites(loaded))


# Subspaces (LoReFT paper, appendix G.1)


def subspace_model(method="loreft"):
    return attached(build("llama"), method, positions="l2", layers="1", rank=4).train()


@pytest.mark.parametrize(
    "method", ["loreft", "direft", "direft_orth", "noreft", "lobireft", "consreft"]
)
@torch.no_grad()
def test_only_selected_dimensions_act(method):
    model = subspace_model(method).eval()
    ids, mask = batch()
    select = [(0, 1), None, (3,)]
    with captured(model) as records:
        model(input_ids=ids, attention_mask=mask, subspaces=select)
    (module,) = interventions(model)
    p = tensors(module)
    where = edited_mask(LENGTHS, 0, 2)
    for row, dims in enumerate([[0, 1], [0, 1, 2, 3], [3]]):
        chosen = {k: v[dims] for k, v in p.items()}
        h = records[1]["before"][row][where[row]].double()
        got = records[1]["after"][row][where[row]]
        assert equal(got, EQUATIONS[method].edit(h, chosen), 1e-6)


@pytest.mark.parametrize("method", ["loreft", "direft", "lobireft"])
def test_only_selected_dimensions_train(method):
    model = subspace_model(method)
    ids, mask = batch()
    model(
        input_ids=ids, attention_mask=mask, labels=ids, prompt_lens=torch.tensor([5, 3, 2]),
        subspaces=[(1,), (2,), (1, 2)],
    ).loss.backward()  # fmt: skip
    (module,) = interventions(model)
    for name, parameter in module.named_parameters():
        norms = parameter.grad.reshape(4, -1).norm(dim=1)
        assert (norms[[0, 3]] == 0).all(), name
        assert (norms[[1, 2]] > 0).all(), name


def test_rows_of_different_subspaces_train_as_if_apart():
    model = subspace_model()
    ids, mask = batch()
    lens, select = torch.tensor([5, 3, 2]), [(0, 1), (2, 3), (0, 1)]

    def gradients(keep):
        model.zero_grad()
        logits = model(
            input_ids=ids[keep], attention_mask=mask[keep], prompt_lens=lens[keep],
            subspaces=[select[i] for i in keep],
        ).logits  # fmt: skip
        (logits * mask[keep][..., None]).square().sum().backward()
        chosen = interventions(model)[0]
        return chosen.reft_weight.grad.clone(), chosen.reft_rotation.grad.clone()

    weight, rotation = gradients([0, 1, 2])
    first, second = gradients([0, 2]), gradients([1])
    assert equal(weight[:2], first[0][:2], 1e-5) and equal(weight[2:], second[0][2:], 1e-5)
    assert equal(rotation, first[1] + second[1], 1e-5)
    assert not first[1][2:].any() and not second[1][:2].any()
    assert first[1][:2].any() and second[1][2:].any()


SKILLS = [((0, 1), (2, 3)), ((2, 3), (0, 1)), ((1, 2), (0, 3)), ((3,), (0, 1, 2))]


def train_skill(module, dims, steps, optimiser=None, decay=0.0):
    """Train some dimensions of an intervention towards random states; return the optimiser."""
    generator = torch.Generator().manual_seed(sum(dims))
    h, wanted = torch.randn(2, 24, module.dim, generator=generator)
    optimiser = optimiser or torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=decay)
    module.train()
    for _ in range(steps):
        optimiser.zero_grad()
        (h + module(h, selected(module, dims)).delta - wanted).square().mean().backward()
        optimiser.step()
    return optimiser


def selected(module, dims):
    rank = module.config.rank
    return torch.tensor([dim in dims for dim in range(rank)]).expand(24, rank)


@torch.no_grad()
def edit_of(module, dims):
    h = torch.randn(24, module.dim, generator=torch.Generator().manual_seed(9))
    return module.eval()(h, selected(module, dims)).delta


@pytest.mark.parametrize("method", ["loreft", "direft", "direft_orth", "lobireft", "consreft"])
@pytest.mark.parametrize(("dims", "others"), SKILLS)
def test_training_dimensions_leaves_the_edit_of_the_others(method, dims, others):
    (module,) = interventions(subspace_model(method))
    kept, learned = edit_of(module, others), edit_of(module, dims)
    train_skill(module, dims, steps=50)
    assert equal(edit_of(module, others), kept, 1e-5)
    assert not equal(edit_of(module, dims), learned, 0.1)
    whole = kept + edit_of(module, dims)
    assert equal(edit_of(module, range(4)), whole, 1e-5), "both skills together"


def test_training_dimensions_keeps_the_rotation_of_the_others_under_weight_decay():
    (module,) = interventions(subspace_model())
    before = module.eval().rotation().detach().clone()
    train_skill(module, (0, 1), steps=20, decay=0.5)
    after = module.eval().rotation().detach()
    assert equal(after[2:], before[2:], 1e-5)
    assert not equal(after[:2], before[:2], 0.1)


def test_skills_stay_apart_after_training_together_and_in_a_loaded_adapter(tmp_path):
    """First rows of both skills in a batch, as in the paper; then one of them, in a new process."""
    from reftune.model.checkpoint import load_adapter, save_adapter

    model = wrapped(build("llama"), "loreft", positions="l2", layers="1", rank=4).train()
    ids, mask = batch()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(20):
        optimiser.zero_grad()
        model(
            input_ids=ids, attention_mask=mask, labels=ids, prompt_lens=torch.tensor([5, 3, 2]),
            subspaces=[(0, 1), (2, 3), (0, 1)],
        ).loss.backward()  # fmt: skip
        optimiser.step()
    (trained,) = interventions(model)
    skill = edit_of(trained, (2, 3))
    folder = save_adapter(model, tmp_path / "adapter")
    (module,) = interventions(load_adapter(folder, model=build("llama"), trainable=True)[0])
    assert equal(edit_of(module, (2, 3)), skill, 1e-5)
    train_skill(module, (0, 1), steps=50)
    assert equal(edit_of(module, (2, 3)), skill, 1e-5)


def test_training_dimensions_goes_on_with_the_same_bits():
    (whole,) = interventions(subspace_model())
    (first,) = interventions(subspace_model())
    train_skill(whole, (0, 2), steps=12)
    optimiser = train_skill(first, (0, 2), steps=7)
    (second,) = interventions(subspace_model())
    second.load_state_dict(first.state_dict())
    again = torch.optim.AdamW(second.parameters())
    again.load_state_dict(optimiser.state_dict())
    train_skill(second, (0, 2), steps=5, optimiser=again)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


def test_without_selection_the_free_matrix_is_the_optimisers_alone():
    """What a plain LoReFT trains to is not touched, also where another one trains skills."""
    from reftune.interventions.base import orthonormal_rows

    (skilled,) = interventions(subspace_model())
    train_skill(skilled, (0, 1), steps=1)
    (plain,) = interventions(subspace_model("consreft"))
    free, bias = (p.detach().clone().requires_grad_() for p in plain.parameters())
    h, wanted = torch.randn(2, 24, plain.dim, generator=torch.Generator().manual_seed(3))
    optimisers = [torch.optim.AdamW(ps, lr=0.02) for ps in (plain.parameters(), (free, bias))]
    for _ in range(5):
        rotation = orthonormal_rows(free)
        for optimiser, delta in zip(
            optimisers, (plain(h).delta, (bias - h @ rotation.T) @ rotation), strict=True
        ):
            optimiser.zero_grad()
            (h + delta - wanted).square().mean().backward()
            optimiser.step()
    assert {tuple(p.shape) for p in plain.parameters()} == {tuple(free.shape), tuple(bias.shape)}
    assert torch.equal(plain.reft_rotation, free)
    assert torch.equal(plain.reft_bias, bias)


def test_subspaces_in_generation_reach_beams():
    model = subspace_model().eval()
    ids, mask = batch("left")
    kwargs = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": PAD, "num_beams": 2}
    select = [(0, 1), (2,), None]
    out = model.generate(ids, attention_mask=mask, subspaces=select, **kwargs)
    for i, row in enumerate(rows()):
        alone = model.generate(
            row[None], attention_mask=torch.ones(1, len(row)), subspaces=select[i : i + 1], **kwargs
        )
        assert out[i, ids.shape[1] :].tolist() == alone[0, len(row) :].tolist()


# Tied and untied


@torch.no_grad()
def test_untied_means_two_parameter_sets_not_one_per_position():
    model = attached(build("llama"), "loreft", positions="f2+l3", tied=False)
    for site in sites(model):
        assert list(site.groups("default")) == ["prefix", "suffix"]
    ids, mask = batch()
    with captured(model) as records:
        forward(model, ids, mask)
    prefix = edited_mask(LENGTHS, 2, 0)
    suffix = edited_mask(LENGTHS, 2, 3) & ~prefix
    for site, record in zip(sites(model), records):
        h, out = record["before"], record["after"]
        for group, where in (("prefix", prefix), ("suffix", suffix)):
            module = site.groups("default")[group]
            expected = EQUATIONS["loreft"].edit(h[where].double(), tensors(module))
            assert equal(out[where], expected, 1e-6)
        rest = ~(prefix | suffix)
        assert torch.equal(out[rest], h[rest])


def test_untied_sets_start_differently():
    model = attach(build("llama"), LoreftConfig(rank=2), positions="f1+l1", tied=False).model
    groups = sites(model)[0].groups("default")
    assert not torch.equal(groups["prefix"].reft_weight, groups["suffix"].reft_weight)


# Dropout


def test_dropout_on_the_delta_and_on_the_output():
    model = build("llama")
    h = torch.ones(400, 32)
    for where in ("delta", "output"):
        handle = attach(model, LoreftConfig(rank=2, dropout=0.5, dropout_on=where), name=where)
        (module, *_) = interventions(handle.model, where)
        module.train()
        delta = module(h).delta
        clean = module.eval()(h).delta
        zeroed = delta == 0 if where == "delta" else (h + delta) == 0
        assert 0.4 < zeroed.float().mean() < 0.6
        kept = 2 * clean if where == "delta" else 2 * (h + clean) - h
        assert torch.allclose(delta[~zeroed], kept[~zeroed], atol=1e-5)
    with pytest.raises(AdapterError, match=r"dropout is 1.0"):
        LoreftConfig(dropout=1.0)
    with pytest.raises(AdapterError, match="rank is 0"):
        LoreftConfig(rank=0)


def test_use_and_strength_keep_pefts_books(tmp_path):
    adapted = get_peft_model(build("llama").eval(), ReftConfig("loreft", positions="last"))
    adapted.add_adapter("second", ReftConfig("red", positions="last"))
    use(adapted, ["default", "second"])
    assert adapted.active_adapters == ["default", "second"]
    use(adapted, "default")
    assert adapted.active_adapters == ["default"]
    set_strength(adapted, "default", 0.5)
    ids = torch.randint(3, 60, (1, 6))
    wanted = adapted(input_ids=ids).logits
    save(adapted, tmp_path / "half")
    loaded, _ = load(tmp_path / "half", model=build("llama"))
    assert torch.equal(loaded(input_ids=ids).logits, wanted)
