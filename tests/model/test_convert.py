"""Conversion of pyreft folders, on look-alikes written the way pyreft writes them."""

import json

import pytest
import torch

import reftune
from reftune.errors import AdapterError
from reftune.model.adapters import sites
from reftune.model.convert import convert_pyreft, read_pyreft
from tests.tiny import tiny_llama

DIM, RANK = 32, 3


def loreft_state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    columns = torch.linalg.qr(torch.randn(DIM, RANK, generator=generator))[0]
    return {
        "weight": torch.randn(RANK, DIM, generator=generator),
        "bias": torch.randn(RANK, generator=generator),
        "rotate_layer": columns,
    }


def write(
    folder, states, key="layer_{}_comp_block_output_unit_pos_nunit_1#{}", kind="LoreftIntervention"
):
    folder.mkdir(exist_ok=True)
    for (layer, order), state in states.items():
        torch.save(state, folder / f"intkey_{key.format(layer, order)}.bin")
    config = {"intervention_types": [f"<class 'pyreft.interventions.{kind}'>"] * len(states)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def reference(h, state):
    h, state = h.double(), {key: value.double() for key, value in state.items()}
    rotate = state["rotate_layer"]
    return h + (h @ state["weight"].T + state["bias"] - h @ rotate) @ rotate.T


@pytest.mark.quick
def test_loreft_folder_computes_the_published_equation(tmp_path):
    states = {(0, 0): loreft_state(0), (1, 0): loreft_state(1)}
    folder = write(tmp_path / "pyreft", states)
    out = convert_pyreft(folder, tmp_path / "adapter", tiny_llama(dim=DIM), positions="f2+l2")
    assert (out["method"], out["rank"], out["tied"]) == ("loreft", RANK, True)
    assert out["largest_difference"] < 1e-5
    loaded, _ = reftune.load(tmp_path / "adapter", model=tiny_llama(dim=DIM))
    h = torch.randn(5, DIM)
    for site in sites(loaded):
        got = h + site.groups("default")["tied"].eval()(h).delta
        torch.testing.assert_close(
            got.double(), reference(h, states[site.layer, 0]), rtol=1e-5, atol=1e-5
        )


def test_two_interventions_a_layer_are_prefix_and_suffix(tmp_path):
    states = {(0, 0): loreft_state(0), (0, 1): loreft_state(1)}
    folder = write(
        tmp_path / "pyreft", states, key="layer.{}.comp.block_output.unit.pos.nunit.1#{}"
    )
    out = convert_pyreft(folder, tmp_path / "adapter", tiny_llama(dim=DIM), positions="f2+l2")
    assert out["tied"] is False
    loaded, _ = reftune.load(tmp_path / "adapter", model=tiny_llama(dim=DIM))
    groups = sites(loaded)[0].groups("default")
    torch.testing.assert_close(groups["prefix"].reft_weight, states[0, 0]["weight"])
    torch.testing.assert_close(groups["suffix"].reft_weight, states[0, 1]["weight"])


@pytest.mark.parametrize(
    ("kind", "method"), [("NodireftIntervention", "direft"), ("NoreftIntervention", "noreft")]
)
def test_free_rows_convert_to_the_papers_names(tmp_path, kind, method):
    state = {
        "proj_layer.weight": torch.randn(RANK, DIM),
        "learned_source.weight": torch.randn(RANK, DIM),
        "learned_source.bias": torch.randn(RANK),
    }
    folder = write(tmp_path / "pyreft", {(1, 0): state}, kind=kind)
    out = convert_pyreft(folder, tmp_path / "adapter", tiny_llama(dim=DIM), positions="last")
    assert (out["method"], out["layers"]) == (method, [1])


def test_a_rotation_that_lost_its_orthonormality_is_refused(tmp_path):
    state = loreft_state(0)
    state["rotate_layer"] = state["rotate_layer"] + 0.3
    folder = write(tmp_path / "pyreft", {(0, 0): state})
    with pytest.raises(AdapterError, match="not orthonormal"):
        convert_pyreft(folder, tmp_path / "adapter", tiny_llama(dim=DIM), positions="last")
    assert not (tmp_path / "adapter").exists()


def test_what_cannot_be_converted_is_named(tmp_path):
    raw = {"rotate_layer.parametrizations.weight.0.base": torch.eye(DIM)}
    with pytest.raises(AdapterError, match=r"parametrizations.*cannot be converted"):
        read_pyreft(write(tmp_path / "direft", {(0, 0): raw}, kind="DireftIntervention"))
    key = "layer_{}_comp_mlp_activation_unit_pos_nunit_1#{}"
    with pytest.raises(AdapterError, match="Only block_output"):
        read_pyreft(write(tmp_path / "mlp", {(0, 0): loreft_state(0)}, key=key))
    with pytest.raises(AdapterError, match="holds no intkey"):
        read_pyreft(tmp_path / "nowhere")
    broken = write(tmp_path / "broken", {(0, 0): loreft_state(0)})
    next(broken.glob("*.bin")).write_bytes(b"not a checkpoint")
    with pytest.raises(AdapterError, match="cannot be read"):
        read_pyreft(broken)


def test_another_width_is_refused(tmp_path):
    folder = write(tmp_path / "pyreft", {(0, 0): loreft_state(0)})
    with pytest.raises(AdapterError, match="width 32, the model 16"):
        convert_pyreft(folder, tmp_path / "adapter", tiny_llama(dim=16), positions="last")


def test_the_activation_it_was_trained_with_is_given(tmp_path):
    state = loreft_state(0)
    folder = write(tmp_path / "pyreft", {(0, 0): state})
    convert_pyreft(
        folder, tmp_path / "adapter", tiny_llama(dim=DIM), positions="last", activation="relu"
    )
    loaded, _ = reftune.load(tmp_path / "adapter", model=tiny_llama(dim=DIM))
    module = next(m for m in loaded.modules() if isinstance(m, reftune.Intervention)).eval()
    h = torch.randn(5, DIM)
    rotation = state["rotate_layer"]
    source = torch.relu(h @ state["weight"].T + state["bias"])
    wanted = (source - h @ rotation) @ rotation.T
    assert torch.allclose(module(h).delta, wanted, atol=1e-5)
