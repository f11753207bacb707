"""Converting pyreft checkpoints to our artefacts, with a check that they compute the same.

A folder written by pyreft holds `config.json` and one `intkey_<key>.bin` per intervention; the key
names layer and component. LoReFT files hold `weight` `[r, d]`, `bias` `[r]` and `rotate_layer`
`[d, r]`. Token positions and the activation are not saved by pyreft: they must be given.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftune.errors import AdapterError
from reftune.interventions import get as get_method
from reftune.interventions.base import ACTIVATIONS, FREE_SCALE
from reftune.model.levels import refuse_foreign

KEY = re.compile(r"intkey_layer[._](\d+)[._]comp[._](.+?)[._]unit[._].*?#(\d+)\.bin")
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Piece:
    """One saved intervention."""

    layer: int
    order: int
    method: str
    tensors: dict[str, Float[Tensor, "rank ..."]]

    @property
    def rank(self) -> int:
        """Dimension of the subspace."""
        return self.tensors["reft_weight"].shape[0]


def convert_pyreft(
    folder: str | Path,
    out: str | Path,
    model: nn.Module | str,
    positions: str,
    activation: str = "none",
) -> dict[str, Any]:
    """Convert a pyreft folder to an adapter.

    Args:
        folder: Written by pyreft's `save`.
        out: Folder of the new adapter.
        model: The base model or its name.
        positions: The position rule used in training, for instance `f7+l7`. Two interventions a
            layer (pyreft without tied weights) need a prefix and a suffix.
        activation: The `act_fn` it was trained with, which pyreft does not save either.

    Returns:
        Method, layers, rank, tied, and the largest relative difference found by the check.

    Raises:
        AdapterError: If the folder is no pyreft checkpoint, or holds what cannot be converted.
    """
    from reftune.model.build import load_base
    from reftune.model.checkpoint import save_adapter
    from reftune.model.face import ReftConfig, get_peft_model

    pieces = read_pyreft(Path(folder))
    by_layer: dict[int, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_layer[piece.layer].append(piece)
    counts = {len(group) for group in by_layer.values()}
    if counts not in ({1}, {2}):
        raise AdapterError(
            f"Layers of {folder} hold {sorted(counts)} interventions.",
            "Only one, or a prefix and a suffix, convert.",
        )
    method, rank, tied = pieces[0].method, pieces[0].rank, counts == {1}
    base = load_base(model)[0] if isinstance(model, str) else model
    settings = get_method(method).Config(rank=rank, activation=activation)
    config = ReftConfig(
        settings, method=method, layers=sorted(by_layer), positions=positions, tied=tied
    )
    adapted = get_peft_model(base, config)
    worst = _fill(adapted, by_layer, tied)
    if worst > TOLERANCE:
        raise AdapterError(
            f"The converted adapter differs from the checkpoint by {worst:.1e}; "
            f"{TOLERANCE:.0e} is allowed.",
            "The saved rotation is not orthonormal: it was probably trained on after a reload.",
        )
    save_adapter(adapted, out)
    return {
        "method": method,
        "layers": sorted(by_layer),
        "rank": rank,
        "tied": tied,
        "positions": positions,
        "largest_difference": worst,
    }


def read_pyreft(folder: Path) -> list[Piece]:
    """Read all interventions of a pyreft folder, with our parameter names.

    Raises:
        AdapterError: If there are none, or one cannot be converted.
    """
    files = sorted(folder.glob("intkey_*.bin")) if folder.is_dir() else []
    if not files:
        refuse_foreign(folder)
        raise AdapterError(
            f'"{folder}" holds no intkey_*.bin file.', "Give a folder written by pyreft's save."
        )
    types = _types(folder)
    pieces = []
    for file in files:
        match = KEY.fullmatch(file.name)
        if match is None:
            raise AdapterError(
                f"{file.name} is not named as pyreft names its files.", "Convert it by hand."
            )
        if match[2] != "block_output":
            raise AdapterError(
                f'{file.name} acts on "{match[2]}".', "Only block_output can be converted."
            )
        state = _read_state(file)
        method, tensors = _translate(state, file.name, types)
        pieces.append(Piece(int(match[1]), int(match[3]), method, tensors))
    if len({(piece.method, piece.rank) for piece in pieces}) != 1:
        raise AdapterError(
            f"{folder} mixes methods or ranks.", "Convert folders with one method and one rank."
        )
    return sorted(pieces, key=lambda piece: (piece.layer, piece.order))


def _read_state(file: Path) -> dict[str, Tensor]:
    """Read the tensors of one intervention.

    Raises:
        AdapterError: If the file is damaged or holds something else.
    """
    remedy = "Copy it again, or save it again with pyreft."
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise AdapterError(f"{file} cannot be read: {error}.", "Check its permissions.") from error
    except Exception as error:  # torch's own messages say nothing of the file, such as "174812789"
        what = f"{file} cannot be read: it is damaged, or was not written by torch."
        raise AdapterError(what, remedy) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise AdapterError(f"{file} holds no tensors by name.", remedy)
    return state


def _types(folder: Path) -> str:
    """Return the names of the interventions' classes, where the folder tells them."""
    config = folder / "config.json"
    if not config.is_file():
        return ""
    try:
        return " ".join(
            map(str, json.loads(config.read_text("utf-8")).get("intervention_types", ()))
        )
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise AdapterError(
            f"{config} cannot be read: it is damaged, or holds no settings.",
            "Copy it again, or save it again with pyreft.",
        ) from error


def _translate(
    state: dict[str, Tensor], file: str, types: str
) -> tuple[str, dict[str, Float[Tensor, "rank ..."]]]:
    """Return our method and parameters for one saved state."""
    keys = set(state)
    state = {key: value.float() for key, value in state.items()}
    if keys == {"weight", "bias", "rotate_layer"}:
        rotation = state["rotate_layer"].T.contiguous()
        return "loreft", {
            "reft_weight": state["weight"],
            "reft_bias": state["bias"],
            "reft_rotation": rotation,
        }
    free = {"proj_layer.weight", "learned_source.weight", "learned_source.bias"}
    if keys >= free and keys <= free | {"proj_layer.bias"}:
        method = (
            "noreft"
            if "NoreftIntervention" in types
            else "direft"
            if "NodireftIntervention" in types
            else None
        )
        dead_bias = method == "direft" or not state.get("proj_layer.bias", torch.zeros(1)).any()
        if method and dead_bias:
            return method, {
                "reft_weight": state["learned_source.weight"],
                "reft_bias": state["learned_source.bias"],
                "reft_projection": state["proj_layer.weight"],
            }
    raise AdapterError(
        f"{file} holds {', '.join(sorted(keys))}, which cannot be converted.",
        "LoReFT (weight, bias, rotate_layer), and Nodireft or Noreft without projection bias, can.",
    )


def _fill(adapted: nn.Module, by_layer: dict[int, list[Piece]], tied: bool) -> float:
    """Copy the tensors in; return the largest relative difference to the equation in float64."""
    from reftune.model.adapters import sites

    worst = 0.0
    groups = ("tied",) if tied else ("prefix", "suffix")
    for site in sites(adapted):
        modules = site.groups("default")
        for group, piece in zip(groups, by_layer[site.layer]):
            module = modules[group].eval()
            width = piece.tensors["reft_weight"].shape[1]
            if width != module.dim:
                raise AdapterError(
                    f"The checkpoint has width {width}, the model {module.dim}.",
                    "Give the base model it was trained on.",
                )
            with torch.no_grad():
                for name, value in piece.tensors.items():
                    scale = FREE_SCALE if name == "reft_rotation" else 1.0
                    getattr(module, name).copy_(scale * value)
            worst = max(worst, _difference(module, piece))
    return worst


@torch.no_grad()
def _difference(module: nn.Module, piece: Piece) -> float:
    """Compare a filled intervention with the published equation on random states, in float64."""
    device = next(module.parameters()).device
    states = torch.randn(16, module.dim, generator=torch.Generator().manual_seed(0)).to(device)
    wide = states.double()
    tensors = {name: value.to(device).double() for name, value in piece.tensors.items()}
    out = tensors.get("reft_rotation", tensors.get("reft_projection"))
    source = wide @ tensors["reft_weight"].T + tensors["reft_bias"]
    source = ACTIVATIONS[module.config.activation](source)
    if piece.method != "direft":
        source = source - wide @ out.T
    expected = source @ out
    got = module(states).delta.double()
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
