"""Attaching interventions to a model, and switching, mixing and removing them.

`inject` is the one mechanism; `attach` is the plain door, the PEFT face calls the same functions.
The model keeps its class, its forward and its parameter names.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from reftune.errors import AdapterError, PositionError, nearest
from reftune.interventions import get as get_method
from reftune.interventions import names as method_names
from reftune.interventions.base import Intervention, InterventionConfig
from reftune.interventions.checking import check_fields
from reftune.model.call import Call, bind
from reftune.model.generation import ScopedGenerate
from reftune.model.input_grads import install, uninstall
from reftune.model.lookup import (
    BLOCKS,
    CALL,
    CALLS,
    HOOKS,
    SITES,
    adapter_names,
    calls,
    check_known,
    sites,
)
from reftune.model.passes import Inputs, Rules
from reftune.model.positions import SHORT, PositionRule
from reftune.model.quantised import check_backward, settle
from reftune.model.site import (
    CHILD,
    ReplayedCall,
    Site,
    block_pre_hook,
    check_adapter_name,
    site_hook,
    site_of,
)
from reftune.model.sites import BLOCK, Blocks, Target, base_of, find_blocks, find_targets
from reftune.model.switching import mix, off, prompt_scope, set_strength, use

logger = logging.getLogger(__name__)

__all__ = [
    "Handle",
    "Placement",
    "adapter_names",
    "attach",
    "calls",
    "check_known",
    "detach",
    "discard",
    "inject",
    "mix",
    "off",
    "prepare",
    "prompt_scope",
    "resolve",
    "set_strength",
    "sites",
    "use",
]


@dataclass(frozen=True)
class Placement:
    """Where an adapter acts: layers, site and positions."""

    layers: str | Sequence[int] = "all"
    """`all`, `late`, `half`, a list, ranges `2-5`, negative numbers, fractions `0.5-1.0`."""
    site: str = BLOCK
    """`block` (block output) or the dotted name of a linear module such as `mlp.up_proj`."""
    positions: str | PositionRule = "f5+l5"
    """Position rule; see `reftune.model.positions`."""
    train_positions: str | PositionRule | None = None
    """Position rule in training, when it differs."""
    tied: bool = True
    """One parameter set for all positions; False: one for prefix terms, one for suffix terms."""
    short: str = "union"
    """Prompts shorter than the rule: `union`, `paper` or `error`."""
    stack: str = "auto"
    """`encoder`, `decoder` or `auto`: the encoder of an encoder-decoder, else the only stack."""
    blocks: str | None = None
    """Dotted name of the list of blocks, where it is not found by itself."""

    def __post_init__(self) -> None:
        check_fields(self)

    def rules(self) -> Rules:
        """Return the parsed position rules."""
        if self.short not in SHORT:
            raise PositionError(f'short is "{self.short}".', nearest(self.short, SHORT))
        inference = PositionRule.parse(self.positions)
        training = PositionRule.parse(self.train_positions or self.positions)
        return Rules(inference, training, self.short)

    def groups(self) -> tuple[str, ...]:
        """Return the parameter sets this placement needs.

        Raises:
            AdapterError: If an untied adapter has no prefix and suffix terms, or further terms.
        """
        rules = self.rules()
        if self.tied:
            return ("tied",)
        for rule in (rules.inference, rules.training):
            rest = str(PositionRule(prefix=rule.prefix, suffix=rule.suffix))
            if len(rule.groups) != 2 or rest != str(rule):
                raise AdapterError(
                    f'tied is false, but positions "{rule}" are not just a prefix and a suffix.',
                    'Use positions such as "f5+l5", or tied: true.',
                )
        return rules.inference.groups


@dataclass
class Handle:
    """An attached adapter (plain door).

    Attributes:
        model: The model it hangs on.
        name: Its name.
        targets: Names of the modules with a site.
    """

    model: nn.Module
    name: str
    targets: list[str] = field(default_factory=list)

    def parameters(self) -> list[nn.Parameter]:
        """Return the adapter's own parameters."""
        return [
            p
            for site in sites(self.model)
            for module in site.groups(self.name).values()
            for p in module.parameters()
        ]

    def detach(self) -> None:
        """Remove the adapter from the model."""
        detach(self.model, self.name)


def resolve(
    config: InterventionConfig | str, method: str | None = None
) -> tuple[type[Intervention], InterventionConfig]:
    """Return the class and config of an intervention.

    Args:
        config: Its settings, or its registered name for the default settings.
        method: Its registered name, where several methods share the config's class.

    Raises:
        AdapterError: If the config belongs to no method, to several, or to another one.
    """
    if isinstance(config, str):
        chosen = get_method(method or config)
        return chosen, chosen.Config()
    if method is not None:
        chosen = get_method(method)
        if not isinstance(config, chosen.Config):
            raise AdapterError(
                f"{type(config).__name__} is no config of {method}.",
                f"Use {chosen.Config.__name__}.",
            )
        return chosen, config
    found = {}
    for name in method_names():
        try:
            cls = get_method(name)
        except (ImportError, AttributeError) as error:  # somebody's broken entry point
            logger.warning("The intervention %s cannot be imported: %s", name, error)
            continue
        if type(config) is cls.Config:
            found[name] = cls
    own = [name for name in found if type(config).__name__.lower() == f"{name}config"]
    if len(own or found) != 1:
        raise AdapterError(
            f"{type(config).__name__} belongs to {len(found)} interventions"
            f" ({', '.join(found) or 'none is registered'}).",
            "Name one: attach(model, config, method=...) or ReftConfig(config, method=...).",
        )
    return found[(own or list(found))[0]], config


def attach(
    model: nn.Module,
    config: InterventionConfig | str = "loreft",
    *,
    name: str = "default",
    method: str | None = None,
    placement: Placement | None = None,
    **where: Any,
) -> Handle:
    """Attach an adapter to a model without PEFT; the base model's parameters are frozen.

    Args:
        model: A transformers model.
        config: Settings of an intervention, or its registered name.
        name: Name of the adapter.
        method: Registered name, for a config that several methods share.
        placement: Where it acts; or its fields as keywords (`layers`, `positions`, ...).

    Raises:
        AdapterError, SiteError, PositionError: When the request does not fit the model, which is
            then left as it was.

    ```python
    handle = reftune.attach(model, LoreftConfig(rank=4), layers="all", positions="f5+l5")
    ```
    """
    cls, settings = resolve(config, method)
    placement = placement or Placement(**where)
    placement.groups()
    blocks = find_blocks(model, placement.stack, placement.blocks)
    targets = find_targets(blocks, placement.layers, placement.site)
    check_new_name(model, name)
    try:
        for target in targets:
            inject(model, blocks, target, name, cls, settings, placement)
    except AdapterError:
        discard(model, name)
        raise
    for p in model.parameters():
        p.requires_grad_(False)
    use(model, name)
    check_backward(model, strict=False)
    return Handle(model, name, [target.name for target in targets])


def check_new_name(model: nn.Module, name: str) -> None:
    """Raise AdapterError when an adapter of this name hangs on the model already."""
    if name in adapter_names(model):
        raise AdapterError(
            f'The adapter "{name}" exists already.', "Choose another name or detach it."
        )


def inject(
    model: nn.Module,
    blocks: Blocks,
    target: Target,
    name: str,
    method: type[Intervention],
    config: InterventionConfig,
    placement: Placement,
    site_class: type[Site] = Site,
) -> Site:
    """Put one intervention of an adapter on one module, with everything its hooks need."""
    check_adapter_name(name)
    if name in (*target.name.split("."), "base_model", "model"):
        raise AdapterError(
            f'The adapter name "{name}" is also the name of a module of this model.',
            "Choose another name.",
        )
    call = prepare(model, blocks)
    site = site_of(target.module)
    if site is None:
        outer = any(target.module is block for block in blocks.modules)
        site = site_class(target.dim, call, target.layer, outer)
        target.module.add_module(CHILD, site)
        base_of(model).__dict__.setdefault(SITES, []).append(site)
        handle = target.module.register_forward_hook(site_hook, prepend=True)
        _keep(target.module, handle)
        if not outer:
            _keep_once(blocks.modules[target.layer], block_pre_hook)
    site.add(name, method, config, placement.groups())
    weight = next((p for p in target.module.parameters(recurse=True) if not p.is_meta), None)
    if weight is not None:
        for module in site.groups(name).values():
            if not any(p.is_meta for p in module.parameters()):
                module.to(weight.device)
    site.train(target.module.training)
    call.rules[name], call.placements[name] = placement.rules(), placement
    return site


def prepare(model: nn.Module, blocks: Blocks) -> Call:
    """Install the hooks of a stack and the generation scope, once; return its call state."""
    base = base_of(model)
    call = getattr(blocks.stack, CALL, None)
    if call is not None:
        return call
    paired = bool(getattr(base.config, "is_encoder_decoder", False))
    has_head = getattr(base, "get_output_embeddings", lambda: None)() is not None
    call = Call(blocks.is_encoder, has_head and not blocks.is_encoder, paired)
    settle(base)
    setattr(blocks.stack, CALL, call)
    base.__dict__.setdefault(CALLS, []).append(call)
    base.__dict__.setdefault(BLOCKS, []).append(blocks)
    _keep(blocks.stack, blocks.stack.register_forward_pre_hook(_stack_pre_hook, with_kwargs=True))
    if not any(hook is _model_pre_hook for hook in base._forward_pre_hooks.values()):
        hook = base.register_forward_pre_hook(_model_pre_hook, with_kwargs=True, prepend=True)
        _keep(base, hook)
    if hasattr(base, "generate") and "generate" not in base.__dict__:
        base.generate = ScopedGenerate(base)
    install(base)
    return call


def _keep(module: nn.Module, handle: Any) -> None:
    module.__dict__.setdefault(HOOKS, []).append(handle)


def _keep_once(block: nn.Module, hook: Any) -> None:
    if not any(h is hook for h in block._forward_pre_hooks.values()):
        _keep(block, block.register_forward_pre_hook(hook))


def _model_pre_hook(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """Read what the caller knows about the prompt; take our own arguments away."""
    inputs = Inputs(
        labels=kwargs.get("labels"),
        prompt_lens=kwargs.pop("prompt_lens", None),
        mask=kwargs.pop("intervention_mask", None),
        subject=kwargs.pop("subject_positions", None),
        subspaces=kwargs.pop("subspaces", None),
    )
    for call in calls(model):
        call.inputs = inputs
    return args, kwargs


def _stack_pre_hook(stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    getattr(stack, CALL).begin(stack, bind(stack, args, kwargs))


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Remove one adapter, or all with every hook; returns the model.

    Raises:
        AdapterError: If there is no such adapter.
    """
    if name is not None:
        check_known(model, [name])
        discard(model, name)
    else:
        _clean(model)
    return model


def discard(model: nn.Module, name: str) -> None:
    """Remove what there is of an adapter; the hooks leave with the last one."""
    for site in sites(model):
        site.remove(name)
    for call in calls(model):
        call.rules.pop(name, None)
        call.placements.pop(name, None)
    if not adapter_names(model):
        _clean(model)


def _clean(model: nn.Module) -> None:
    """Remove every site, hook and attribute of ours."""
    base = base_of(model)
    for module in list(base.modules()):
        for handle in module.__dict__.pop(HOOKS, []):
            handle.remove()
        module._modules.pop(CHILD, None)
        for key in (CALL, CALLS, BLOCKS, SITES):
            module.__dict__.pop(key, None)
        wrapped = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(wrapped, ReplayedCall):
            module._gradient_checkpointing_func = wrapped.function
    if isinstance(base.__dict__.get("generate"), ScopedGenerate):
        del base.generate
    uninstall(base)
