"""Merging adapters into weights, only where it is exact; LoRA also for a while.

An edit h' = s ⊙ h + b on *all* tokens of a linear module is the map diag(s) W x + (s ⊙ c + b).
A constant shift of a block's output is a bias of the block's last linear module, if that module's
output reaches the residual stream unchanged; the outputs before and after are compared.
Everything else depends on positions or on h in a way no weight can express, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reftune.errors import AdapterError
from reftune.interventions.base import Intervention
from reftune.model.quantised import weight_type
from reftune.model.site import Site, site_of
from reftune.model.sites import base_of
from reftune.model.switching import foreign_layers

LAST_LINEAR = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "wo", "c_fc2", "dense")
KEEP = "Keep the adapter beside the model: a prompt-only adapter costs nothing while decoding."


def merge_adapter(model: nn.Module, *names: str) -> None:
    """Write adapters into the weights of the base model, in place. Their edits add up.

    Raises:
        AdapterError: With the reason, when no weights can express them exactly. The model is
            unchanged then.
    """
    base = base_of(model)
    pairs = [(m, site_of(m)) for m in base.modules() if isinstance(site_of(m), Site)]
    pairs.sort(key=lambda pair: pair[1].outer)  # a module inside a block acts before the block
    plan = [
        _plan(module, site, names) for module, site in pairs if set(names) & set(site.adapters())
    ]
    wanted = _outputs(base, names)
    before = [(linear, linear.weight.detach().clone(), linear.bias) for linear, _, _ in plan]
    for linear, scale, shift in plan:
        _write(linear, scale, shift)
    worst = (_outputs(base, ()) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)
    if worst <= (3e-2 if _is_half(base) else 1e-4):
        return
    for linear, weight, bias in reversed(before):
        with torch.no_grad():
            linear.weight.copy_(weight)
        linear.bias = bias
    raise AdapterError(
        f"{_quoted(names)} cannot be merged exactly: the outputs would differ by "
        f"{float(worst):.1e} of their size (a norm stands between the weights and the residual "
        "stream).",
        KEEP,
    )


@contextmanager
def merged_lora(model: nn.Module) -> Iterator[None]:
    """Hold all LoRA of a model in the base's weights inside: W' = W + (alpha / r) B A.

    A step saves the two small products of each module. Outputs are those of the LoRA beside the
    weights up to rounding (in fp32 within 1e-4; in half precision the sum is rounded to it).
    Afterwards the weights are what they were, bit for bit: they are kept, not computed back.

    Raises:
        AdapterError: If there is no LoRA, or the weights are quantised. The model is unchanged.
    """
    layers = [layer for layer in foreign_layers(model) if hasattr(layer, "merge")]
    if not layers:
        raise AdapterError("There is no LoRA to merge.", "Leave merge_below out.")
    for layer in layers:
        kind = weight_type(layer.get_base_layer())
        if kind is not None:
            raise AdapterError(
                f"LoRA cannot be merged into quantised weights ({kind}): they hold no numbers that "
                "could be added to.",
                "Leave merge_below (merge_before_stage2) out, or load the base unquantised.",
            )
    parameters = [p for layer in layers for p in layer.get_base_layer().parameters(recurse=False)]
    before = [(p, p.detach().clone()) for p in parameters]
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer in layers:
            layer.merged_adapters.clear()
        for parameter, value in before:
            with torch.no_grad():
                parameter.copy_(value)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


@torch.no_grad()
def _outputs(base: nn.Module, active: Sequence[str]) -> Float[Tensor, "batch ..."]:
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


def _is_half(base: nn.Module) -> bool:
    return any(p.dtype in (torch.float16, torch.bfloat16) for p in base.parameters())


def _plan(
    module: nn.Module, site: Site, names: Sequence[str]
) -> tuple[nn.Module, Float[Tensor, " dim"], Float[Tensor, " dim"]]:
    """Return the linear module to change with its scale and shift, or refuse."""
    scale, shift = torch.ones(site.dim), torch.zeros(site.dim)
    for name in names:
        for _, intervention in site.groups(name).items():
            own_scale, own_shift = _affine(site, name, intervention)
            scale, shift = scale.to(own_scale.device), shift.to(own_shift.device)
            scale, shift = scale + site.strength[name] * (own_scale - 1), shift + own_shift
    if not site.outer:
        _check_plain(module, names)
        return module, scale, shift
    if not torch.allclose(scale, torch.ones_like(scale)):
        raise AdapterError(
            f"{_quoted(names)} cannot be merged: it scales the residual stream, which no weight "
            "of a block can.",
            "Train it on a linear module (site: mlp.down_proj), or keep it beside the model.",
        )
    return _last_linear(module, shift, names), scale, shift


def _affine(
    site: Site, name: str, intervention: Intervention
) -> tuple[Float[Tensor, " dim"], Float[Tensor, " dim"]]:
    """Return scale and strength times shift of one intervention, or refuse."""
    rule = site.call.rules[name].inference
    if not rule.all:
        raise AdapterError(
            f'"{name}" cannot be merged: it edits "{rule}", weights act on all tokens.', KEEP
        )
    affine = intervention.as_affine()
    if affine is None:
        raise AdapterError(
            f'"{name}" cannot be merged: {intervention.name} is no element-wise scale and shift.',
            KEEP,
        )
    return affine[0], site.strength[name] * affine[1]


def _check_plain(linear: nn.Module, names: Sequence[str]) -> None:
    kind = weight_type(linear)
    if kind is not None:
        raise AdapterError(
            f"{_quoted(names)} cannot be merged: the base weights are quantised ({kind}).",
            "Load the base model without quantisation to merge.",
        )
    if hasattr(linear, "base_layer"):
        raise AdapterError(
            f"{_quoted(names)} cannot be merged: the module carries a LoRA.",
            "Merge the LoRA first.",
        )


def _last_linear(block: nn.Module, shift: Float[Tensor, " dim"], names: Sequence[str]) -> nn.Module:
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
        _check_plain(linear, names)
        return linear
    raise AdapterError(
        f"{_quoted(names)} cannot be merged: no linear module of {type(block).__name__} writes "
        "straight to the residual stream.",
        KEEP,
    )


def _width(module: nn.Module) -> int | None:
    return getattr(module, "out_features", getattr(module, "nf", None))


def _write(linear: nn.Module, scale: Float[Tensor, " dim"], shift: Float[Tensor, " dim"]) -> None:
    """Replace W by diag(s) W and the bias c by s ⊙ c + b. GPT-2's Conv1D stores W transposed."""
    weight = linear.weight
    transposed = type(linear).__name__ == "Conv1D"
    wide = torch.promote_types(weight.dtype, torch.float32)
    factor, shift = scale.to(weight.device, wide), shift.to(weight.device, wide)
    with torch.no_grad():
        weight.copy_(weight.to(wide) * (factor if transposed else factor[:, None]))
        bias = torch.zeros_like(factor) if linear.bias is None else linear.bias.to(wide)
        value = (factor * bias + shift).to(weight.dtype)
        linear.bias = nn.Parameter(value, requires_grad=False)
