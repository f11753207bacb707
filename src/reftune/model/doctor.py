"""Self-checks: of a user's model before anyone trains on it, and of a method of your own.

    from reftune.model.doctor import check_method

    reftune.register("steer", Steer)
    assert all(check.passed for check in check_method("steer"))

Left out: whether a method computes its equation (only its author knows that), what it learns, and
generation, which sites do alike for every method.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reftune.errors import AdapterError, ReftuneError
from reftune.interventions import get as get_method
from reftune.interventions.base import InterventionConfig
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


def check_method(name: str, **settings: Any) -> list[Check]:
    """Check a registered method on tiny random models: Llama (three dtypes), GPT-2, BERT and T5.

    >>> [check.name for check in check_method("loreft") if not check.passed]
    []

    Args:
        name: The method's registered name.
        **settings: Settings of its config.

    Returns:
        Whether it edits each token by itself, and what `self_check` returns for each model, under
        `model: check`.

    Raises:
        RecipeError: If there is no such method.
        AdapterError: If it has no such setting.
    """
    found = [_tokens(name, settings)]
    for kind, model in _tiny_models():
        checks = self_check(model, method=name, **settings)
        found += [Check(f"{kind}: {c.name}", c.passed, c.detail) for c in checks]
    return found


def _tokens(method: str, settings: dict[str, Any]) -> Check:
    """Compare the edit of a token among others with the edit of the token alone."""
    cls = get_method(method)
    module = cls(cls.config_from(settings), 32).eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module.reset()
        _disturb([module])
        h = torch.randn(6, 32)
        try:
            gap = _difference(module(h).delta[2:3], module(h[2:3]).delta)
        except (RuntimeError, IndexError) as error:
            return Check("tokens", False, f"{type(error).__name__}: {error}")
    text = f"the edit of a token alone and among others differs by {gap:.1e} of its size"
    return Check("tokens", gap < 1e-4, text)


def _tiny_models() -> Iterator[tuple[str, nn.Module]]:
    import transformers as hf

    sizes = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    block = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    block |= {"intermediate_size": 64, "max_position_embeddings": 64}
    gpt2 = hf.GPT2Config(**sizes, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    t5 = hf.T5Config(
        **sizes, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            name = "llama" if dtype == torch.float32 else f"llama {str(dtype)[6:]}"
            yield name, hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **block)).to(dtype)
        yield "gpt2", hf.GPT2LMHeadModel(gpt2)
        yield "bert", hf.BertForSequenceClassification(hf.BertConfig(**sizes, **block))
        yield "t5", hf.T5ForConditionalGeneration(t5)


def self_check(
    model: nn.Module, placement: Placement | None = None, method: str = "loreft", **settings: Any
) -> list[Check]:
    """Attach a method to a model, try what training and serving rely on, and detach.

    Args:
        model: Any transformers model. It is left as it was.
        placement: Where to attach; default all blocks, `f1+l1`.
        method: The method's registered name.
        **settings: Settings of its config; the default rank is 2.

    Returns:
        One check per property; a failed one says what was seen.
    """
    placement = placement or Placement(positions="f1+l1")
    training = model.training
    grads = [p.requires_grad for p in model.parameters()]
    model.eval()
    checks: list[Check] = []
    known = {item.name for item in fields(get_method(method).Config)}
    settings = {**({"rank": 2} if "rank" in known else {}), **settings}
    try:
        _run(model, placement, method, settings, checks)
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


def _run(
    model: nn.Module,
    placement: Placement,
    method: str,
    settings: dict[str, Any],
    checks: list[Check],
) -> None:
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
    config, refusal = _start(method, settings)
    attach(model, config, method=method, name=NAME, placement=placement)
    if refusal:
        checks.append(Check("identity", True, f"not offered: {refusal}"))
    else:
        same = _difference(_forward(model, ids), before)
        text = f"identity init changes outputs by {same:.1e} of their size"
        checks.append(Check("identity", same < 1e-3, text))
    checks.append(_parameters(model))
    with off(model):
        equal = torch.equal(_forward(model, ids), before)
    checks.append(
        Check(
            "off",
            equal,
            "bit-identical to the base model" if equal else "differs from the base model",
        )
    )
    _disturb([module for _, module in _modules(model, NAME)])
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
    checks.append(_save(model, placement, method, settings, ids))


def _start(method: str, settings: dict[str, Any]) -> tuple[InterventionConfig, str]:
    """Return the settings to attach with, and why they do not start at the identity."""
    cls = get_method(method)
    if "init" in settings:
        refusal = "" if settings["init"] == "identity" else "init is set otherwise"
        return cls.config_from(settings), refusal
    try:
        return cls.config_from({**settings, "init": "identity"}), ""
    except AdapterError as error:
        return cls.config_from(settings), error.what


def _modules(model: nn.Module, name: str) -> list[tuple[int, nn.Module]]:
    """Return the interventions of an adapter with their layers."""
    return [(site.layer, m) for site in sites(model) for m in site.groups(name).values()]


def _parameters(model: nn.Module) -> Check:
    """Compare what is trained with what the method says it trains."""
    modules = [module for _, module in _modules(model, NAME)]
    own = {id(p): p for module in modules for p in module.parameters()}
    others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    named = [n for module in modules for n, _ in module.named_parameters()]
    foreign = sorted({n for n in named if not n.startswith("reft_")})
    counted = sum(p.numel() for p in own.values() if p.requires_grad)
    told = sum(type(m).num_parameters(m.config, m.dim) for m in modules)
    faults = [f"{len(others)} of the base model are trained too"] if others else []
    faults += [f"names that do not begin with reft_: {', '.join(foreign)}"] if foreign else []
    faults += [f"{counted} are trained, num_parameters says {told}"] if counted != told else []
    return Check("parameters", not faults, "; ".join(faults) or f"{counted:,} trained")


@torch.no_grad()
def _disturb(modules: Iterable[nn.Module]) -> None:
    """Move all parameters, as training would."""
    generator = torch.Generator().manual_seed(0)
    for module in modules:
        for parameter in module.parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.device, parameter.dtype))


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
        f"{key} of block {layer}"
        for layer, module in _modules(model, NAME)
        for key, parameter in module.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    kind = blocking(model)
    detail = f"none for {', '.join(without)}" if without else "reach every parameter"
    if kind:
        detail = f"none passes through the quantised weights ({kind}): not for training"
    return Check("gradients", not without and kind is None, detail)


def _save(
    model: nn.Module,
    placement: Placement,
    method: str,
    settings: dict[str, Any],
    ids: Int[Tensor, "batch seq"],
) -> Check:
    """Save and load the adapter as a PEFT artefact."""
    from reftune.model.checkpoint import load_adapter, save_adapter
    from reftune.model.face import ReftConfig, get_peft_model

    config = ReftConfig(
        settings,
        method=method,
        positions=placement.positions,
        layers=placement.layers,
        task_type=None,
    )
    adapted = get_peft_model(model, config).eval()
    _disturb([module for _, module in _modules(adapted, "default")])
    wanted = _forward(adapted, ids)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapted, Path(folder) / "adapter")
        adapted.unload()
        loaded, _ = load_adapter(Path(folder) / "adapter", model=model)
        equal = torch.equal(_forward(loaded.eval(), ids), wanted)
        loaded.unload()
    return Check("save", equal, "loads back bit-equal" if equal else "differs after loading")
