"""A self-check of attaching on a user's model, run before anyone trains on it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reftune.errors import ReftuneError
from reftune.interventions.loreft import LoreftConfig
from reftune.model.adapters import Placement, adapter_names, attach, detach, off, sites
from reftune.model.quantised import blocking
from reftune.model.sites import base_of, find_blocks, linear_names

NAME = "doctor"


@dataclass(frozen=True)
class Check:
    """One check: what was checked, whether it passed, what was seen."""

    name: str
    passed: bool
    detail: str


def self_check(model: nn.Module, placement: Placement | None = None) -> list[Check]:
    """Attach LoReFT to a model, try what training and serving rely on, and detach.

    Args:
        model: Any transformers model. It is left as it was.
        placement: Where to attach; default all blocks, `f1+l1`.

    Returns:
        One check per property; a failed one says what was seen.
    """
    placement = placement or Placement(positions="f1+l1")
    training = model.training
    grads = [p.requires_grad for p in model.parameters()]
    model.eval()
    checks: list[Check] = []
    try:
        _run(model, placement, checks)
    except ReftuneError as error:
        checks.append(Check("attach", False, str(error)))
    except Exception as error:
        checks.append(Check("attach", False, f"{type(error).__name__}: {error}"))
    finally:
        if NAME in adapter_names(model):
            detach(model, NAME)
        model.train(training)
        for parameter, flag in zip(model.parameters(), grads):
            parameter.requires_grad_(flag)
    return checks


def _run(model: nn.Module, placement: Placement, checks: list[Check]) -> None:
    blocks = find_blocks(model, placement.stack, placement.blocks)
    inner = ", ".join(linear_names(blocks.modules[0]))
    checks.append(
        Check(
            "blocks",
            True,
            f"{len(blocks.modules)} x {type(blocks.modules[0]).__name__}, width {blocks.dim}; "
            f"{inner}",
        )
    )
    ids = _ids(model)
    before = _forward(model, ids)
    attach(model, LoreftConfig(rank=2, init="identity"), name=NAME, placement=placement)
    same = _difference(_forward(model, ids), before)
    checks.append(
        Check("identity", same < 1e-3, f"identity init changes outputs by {same:.1e} of their size")
    )
    with off(model):
        equal = torch.equal(_forward(model, ids), before)
    checks.append(
        Check(
            "off",
            equal,
            "bit-identical to the base model" if equal else "differs from the base model",
        )
    )
    with torch.no_grad():
        for site in sites(model):
            for module in site.groups(NAME).values():
                module.reft_bias.add_(1.0)
    edited = _difference(_forward(model, ids), before)
    checks.append(
        Check("edit", edited > 1e-4, f"an edit changes outputs by {edited:.1e} of their size")
    )
    checks.append(_padding(model, ids))
    checks.append(_gradients(model, ids))
    detach(model, NAME)
    equal = torch.equal(_forward(model, ids), before)
    checks.append(
        Check(
            "detach", equal, "nothing left behind" if equal else "outputs changed after detaching"
        )
    )
    checks.append(_save(model, placement, ids))


def _ids(model: nn.Module) -> Int[Tensor, "batch seq"]:
    config = base_of(model).config.get_text_config()
    device = next(model.parameters()).device
    return (torch.arange(16, device=device).reshape(2, 8) * 13 + 7) % (config.vocab_size - 3) + 3


@torch.no_grad()
def _forward(
    model: nn.Module, ids: Int[Tensor, "batch seq"], mask: Int[Tensor, "batch seq"] | None = None
) -> Float[Tensor, "batch ..."]:
    mask = torch.ones_like(ids) if mask is None else mask
    extra = (
        {"decoder_input_ids": ids[:, :2]}
        if getattr(base_of(model).config, "is_encoder_decoder", False)
        else {}
    )
    return model(input_ids=ids, attention_mask=mask, **extra)[0]


def _difference(a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"]) -> float:
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-6))


def _padding(model: nn.Module, ids: Int[Tensor, "batch seq"]) -> Check:
    """Compare a right-padded row with the row alone."""
    alone = _forward(model, ids)
    padded = torch.cat([ids, ids[:, :3]], 1)
    mask = torch.ones_like(padded)
    mask[:, -3:] = 0
    out = _forward(model, padded, mask)
    if out.dim() == 3 and not getattr(base_of(model).config, "is_encoder_decoder", False):
        out = out[:, : alone.shape[1]]
    gap = _difference(out, alone)
    limit = 1e-4 if alone.dtype == torch.float32 else 5e-2
    return Check(
        "padding", gap < limit, f"a padded row differs from the row alone by {gap:.1e} of its size"
    )


def _gradients(model: nn.Module, ids: Int[Tensor, "batch seq"]) -> Check:
    extra = (
        {"decoder_input_ids": ids[:, :2]}
        if getattr(base_of(model).config, "is_encoder_decoder", False)
        else {}
    )
    with torch.enable_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra)[
            0
        ].float().square().mean().backward()
    without = [
        site.layer
        for site in sites(model)
        for module in site.groups(NAME).values()
        if module.reft_weight.grad is None or not module.reft_weight.grad.abs().sum() > 0
    ]
    kind = blocking(model)
    detail = f"blocks without gradient: {without}" if without else "reach every block"
    if kind:
        detail = f"none passes through the quantised weights ({kind}): not for training"
    return Check("gradients", not without and kind is None, detail)


def _save(model: nn.Module, placement: Placement, ids: Int[Tensor, "batch seq"]) -> Check:
    """Save and load the adapter as a PEFT artefact."""
    from reftune.model.checkpoint import load_adapter, save_adapter
    from reftune.model.face import ReftConfig, get_peft_model

    config = ReftConfig(
        LoreftConfig(rank=2), positions=placement.positions, layers=placement.layers, task_type=None
    )
    adapted = get_peft_model(model, config).eval()
    wanted = _forward(adapted, ids)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapted, Path(folder) / "adapter")
        adapted.unload()
        loaded, _ = load_adapter(Path(folder) / "adapter", model=model)
        equal = torch.equal(_forward(loaded.eval(), ids), wanted)
        loaded.unload()
    return Check("save", equal, "loads back bit-equal" if equal else "differs after loading")
