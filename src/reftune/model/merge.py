"""Merging adapters into weights, only where it is exact.

An edit h' = s ⊙ h + b on *all* tokens of a linear module is the linear map diag(s) W x + (s ⊙ c + b).
A constant shift of a block's output is a bias of the block's last linear module, if that module's
output reaches the residual stream unchanged; the outputs before and after are compared.
Everything else depends on positions or on h in a way no weight can express, and is refused.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from reftune.errors import AdapterError
from reftune.model.site import Site, site_of
from reftune.model.sites import base_of

LAST_LINEAR = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "wo", "c_fc2", "dense")
KEEP = "Keep the adapter beside the model: a prompt-only adapter costs nothing while decoding."


def merge_adapter(model: nn.Module, name: str) -> None:
    """Write an adapter into the weights of the base model, in place.

    Raises:
        AdapterError: With the reason, when no weights can express the adapter exactly. The model
            is unchanged then.
    """
    base = base_of(model)
    pairs = [(m, site_of(m)) for m in base.modules() if isinstance(site_of(m), Site)]
    pairs = [(module, site) for module, site in pairs if name in site.adapters()]
    plan = [_plan(module, site, name) for module, site in pairs]
    wanted = _outputs(base, [name])
    before = [(linear, linear.weight.detach().clone(), linear.bias) for linear, _, _ in plan]
    for linear, scale, shift in plan:
        _write(linear, scale, shift)
    worst = (_outputs(base, []) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
    if worst > (1e-4 if wanted.dtype == torch.float32 and _is_fp32(base) else 3e-2):
        for linear, weight, bias in before:
            with torch.no_grad():
                linear.weight.copy_(weight)
            linear.bias = bias
        raise AdapterError(
            f'"{name}" cannot be merged exactly: the outputs would differ by {float(worst):.1e} of their size '
            "(a norm stands between the weights and the residual stream).",
            KEEP,
        )


@torch.no_grad()
def _outputs(base: nn.Module, active: list[str]) -> Tensor:
    """Return fp32 outputs of the model on fixed tokens with just the given adapters active."""
    sites = [m for m in base.modules() if isinstance(m, Site)]
    state = [(site._active_adapter, site._disable_adapters) for site in sites]
    training = base.training
    base.eval()
    for site in sites:
        site._active_adapter, site._disable_adapters = list(active), not active
    device = next(base.parameters()).device
    ids = (
        torch.arange(24, device=device).reshape(2, 12) * 7 + 5
    ) % base.config.get_text_config().vocab_size
    extra = (
        {"decoder_input_ids": ids[:, :4]}
        if getattr(base.config, "is_encoder_decoder", False)
        else {}
    )
    try:
        output = base(input_ids=ids, attention_mask=torch.ones_like(ids), **extra)
    finally:
        base.train(training)
        for site, (names, disabled) in zip(sites, state):
            site._active_adapter, site._disable_adapters = names, disabled
    return output[0].float()


def _is_fp32(base: nn.Module) -> bool:
    return all(p.dtype == torch.float32 for p in base.parameters() if p.is_floating_point())


def _plan(module: nn.Module, site: Site, name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the linear module to change with its scale and shift, or refuse."""
    rule = site.call.rules[name].inference
    (group, intervention), *more = site.groups(name).items()
    affine = intervention.as_affine()
    if more or not rule.all:
        raise AdapterError(
            f'"{name}" cannot be merged: it edits "{rule}", weights act on all tokens.', KEEP
        )
    if affine is None:
        raise AdapterError(
            f'"{name}" cannot be merged: {intervention.name} is no element-wise scale and shift.',
            KEEP,
        )
    strength = site.strength[name]
    scale, shift = 1 + strength * (affine[0] - 1), strength * affine[1]
    if not site.outer:
        _check_plain(module, name)
        return module, scale, shift
    if not torch.allclose(scale, torch.ones_like(scale)):
        raise AdapterError(
            f'"{name}" cannot be merged: it scales the residual stream, which no weight of a block can.',
            "Train it on a linear module (site: mlp.down_proj), or keep it beside the model.",
        )
    return _last_linear(module, shift, name), scale, shift


def _check_plain(linear: nn.Module, name: str) -> None:
    weight = getattr(linear, "weight", None)
    if (
        weight is None
        or not weight.is_floating_point()
        or hasattr(weight, "quant_state")
        or type(weight).__module__.startswith(("torchao", "bitsandbytes"))
    ):
        raise AdapterError(
            f'"{name}" cannot be merged: the base weights are quantised ({type(linear).__name__}).',
            "Load the base model without quantisation to merge.",
        )
    if hasattr(linear, "base_layer"):
        raise AdapterError(
            f'"{name}" cannot be merged: the module carries a LoRA.', "Merge the LoRA first."
        )


def _last_linear(block: nn.Module, shift: Tensor, name: str) -> nn.Module:
    """Return the last linear module of the block's feed-forward branch."""
    for key in LAST_LINEAR:
        found = [
            n
            for n, m in block.named_modules()
            if n.split(".")[-1] == key and _width(m) == len(shift)
        ]
        if not found:
            continue
        linear = block.get_submodule(found[-1])
        _check_plain(linear, name)
        return linear
    raise AdapterError(
        f'"{name}" cannot be merged: no linear module of {type(block).__name__} writes straight to the residual stream.',
        KEEP,
    )


def _width(module: nn.Module) -> int | None:
    return getattr(module, "out_features", getattr(module, "nf", None))


def _write(linear: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Replace W by diag(s) W and the bias c by s ⊙ c + b. GPT-2's Conv1D stores W transposed."""
    weight = linear.weight
    transposed = type(linear).__name__ == "Conv1D"
    factor = scale.to(weight.device, torch.float32)
    with torch.no_grad():
        wide = weight.float() * (factor if transposed else factor[:, None])
        weight.copy_(wide.to(weight.dtype))
        bias = linear.bias.float() if linear.bias is not None else torch.zeros_like(factor)
        value = (factor * bias + shift.to(weight.device)).to(weight.dtype)
        linear.bias = nn.Parameter(value, requires_grad=False)


def merged_copy(model: nn.Module, name: str) -> nn.Module:
    """Return a plain copy of the base model with an adapter merged; the model is unchanged."""
    from reftune.model.adapters import detach

    twin = copy.deepcopy(base_of(model))
    merge_adapter(twin, name)
    return detach(twin)
