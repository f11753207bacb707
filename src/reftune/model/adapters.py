"""Attaching interventions to a model, and switching, mixing and removing them.

`inject` is the one mechanism; `attach` is the plain door, the PEFT face calls the same functions.
The model keeps its class, its forward and its parameter names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reftune.errors import AdapterError, nearest
from reftune.interventions import get as get_method
from reftune.interventions import names as method_names
from reftune.interventions.base import Intervention, InterventionConfig
from reftune.model.call import EXTRA_INPUTS, Call, Inputs, Rules, Scope, bind
from reftune.model.positions import PositionRule
from reftune.model.site import BASE, CHILD, Site, replay_hook, site_hook, site_of
from reftune.model.sites import BLOCK, Blocks, Target, base_of, find_blocks, find_targets

CALL = "_reftune_call"
HOOKS = "_reftune_hooks"


@dataclass(frozen=True)
class Placement:
    """Where an adapter acts: layers, site and positions."""

    layers: str | Sequence[int] = "all"
    """`all`, `late`, `half`, a list, ranges `2-5`, negative numbers, fractions `0.5-1.0`."""
    site: str = BLOCK
    """`block` (block output) or the dotted name of a linear module such as `mlp.up_proj`."""
    positions: str = "f5+l5"
    """Position rule; see `reftune.model.positions`."""
    train_positions: str | None = None
    """Position rule in training, when it differs."""
    tied: bool = True
    """One parameter set for all positions; False: one for prefix terms, one for suffix terms."""
    short: str = "union"
    """Prompts shorter than the rule: `union`, `paper` or `error`."""
    stack: str = "auto"
    """`encoder`, `decoder` or `auto`: the encoder of an encoder-decoder, else the only stack."""
    blocks: str | None = None
    """Dotted name of the list of blocks, where it is not found by itself."""

    def rules(self) -> Rules:
        """Return the parsed position rules."""
        if self.short not in ("union", "paper", "error"):
            from reftune.errors import PositionError

            raise PositionError(
                f'short is "{self.short}".', nearest(self.short, ("union", "paper", "error"))
            )
        inference = PositionRule.parse(self.positions)
        training = PositionRule.parse(self.train_positions or self.positions)
        return Rules(inference, training, self.short)

    def groups(self) -> tuple[str, ...]:
        """Return the parameter sets this placement needs.

        Raises:
            AdapterError: If an untied adapter has no prefix and suffix terms, or further terms.
        """
        if self.tied:
            return ("tied",)
        rules = self.rules()
        for rule in (rules.inference, rules.training):
            rest = str(PositionRule(prefix=rule.prefix, suffix=rule.suffix))
            if len(rule.groups) != 2 or rest != str(rule):
                raise AdapterError(
                    f'tied is false, but the positions "{rule}" are not just a prefix and a suffix.',
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
    config: InterventionConfig | str | Intervention,
) -> tuple[type[Intervention], InterventionConfig]:
    """Return the class and config of an intervention given by name or by its config."""
    if isinstance(config, str):
        method = get_method(config)
        return method, method.Config()
    exact, compatible = [], []
    for name in method_names():
        method = get_method(name)
        if type(config) is method.Config:
            (exact if method.Config.__name__.lower() == f"{name}config" else compatible).append(
                method
            )
    found = exact or compatible
    if len(found) != 1:
        raise AdapterError(
            f"{type(config).__name__} belongs to {len(found)} interventions.",
            'Name the method, as in reftune.attach(model, "lobireft") or ReftConfig(method="lobireft").',
        )
    return found[0], config


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
        AdapterError, SiteError, PositionError: When the request does not fit the model.

    >>> # handle = reftune.attach(model, LoreftConfig(rank=4), layers="all", positions="f5+l5")
    """
    cls, settings = (get_method(method), config) if method else resolve(config)
    placement = placement or Placement(**where)
    placement.rules()
    blocks = find_blocks(model, placement.stack, placement.blocks)
    targets = find_targets(blocks, placement.layers, placement.site)
    check_new_name(model, name)
    for p in model.parameters():
        p.requires_grad_(False)
    for target in targets:
        inject(model, blocks, target, name, cls, settings, placement)
    use(model, name)
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
    call = prepare(model, blocks)
    site = site_of(target.module)
    if site is None:
        outer = any(target.module is block for block in blocks.modules)
        site = site_class(target.dim, call, target.layer, outer)
        target.module.add_module(CHILD, site)
        handle = target.module.register_forward_hook(site_hook, prepend=True)
        _keep(target.module, handle)
        if not outer:
            _keep_once(blocks.modules[target.layer], replay_hook)
    site.add(name, method, config, placement.groups())
    weight = next((p for p in target.module.parameters(recurse=True) if not p.is_meta), None)
    if weight is not None:
        for module in site.groups(name).values():
            if not any(p.is_meta for p in module.parameters()):
                module.to(weight.device)
    site.train(target.module.training)
    call.rules[name] = placement.rules()
    return site


def prepare(model: nn.Module, blocks: Blocks) -> Call:
    """Install the hooks of a stack and the generation scope, once; return its call state."""
    base = base_of(model)
    call = getattr(blocks.stack, CALL, None)
    if call is not None:
        return call
    has_head = getattr(base, "get_output_embeddings", lambda: None)() is not None
    call = Call(blocks.is_encoder, needs_labels=has_head and not blocks.is_encoder)
    setattr(blocks.stack, CALL, call)
    _keep(blocks.stack, blocks.stack.register_forward_pre_hook(_stack_pre_hook, with_kwargs=True))
    _keep(base, base.register_forward_pre_hook(_model_pre_hook, with_kwargs=True, prepend=True))
    if hasattr(base, "generate") and "generate" not in base.__dict__:
        base.generate = ScopedGenerate(base)
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
        call.inputs = inputs if call.said is None else _merged(call.said, inputs)
    return args, kwargs


def _merged(said: Inputs, inputs: Inputs) -> Inputs:
    """Fill what the call itself does not say with what an open `prompt_scope` says."""
    values = {
        key: getattr(said, key) if getattr(inputs, key) is None else getattr(inputs, key)
        for key in said.__dataclass_fields__
    }
    return Inputs(**values)


def _stack_pre_hook(stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    getattr(stack, CALL).begin(stack, bind(stack, args, kwargs))


def calls(model: nn.Module) -> list[Call]:
    """Return the call states of all hooked stacks of a model."""
    found = [m.__dict__[CALL] for m in base_of(model).modules() if CALL in m.__dict__]
    return list(dict.fromkeys(found))


def sites(model: nn.Module) -> list[Site]:
    """Return all sites of a model."""
    return [m for m in model.modules() if isinstance(m, Site)]


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of all our adapters on a model."""
    return sorted({name for site in sites(model) for name in site.adapters()})


class ScopedGenerate:
    """`generate` of a model with interventions: opens a scope that knows the prompt.

    An instance attribute, so that every caller (PEFT with or without a task type, TRL, evaluation
    harnesses) passes through it and copies of the model carry their own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does; also takes the arguments in `EXTRA_INPUTS`."""
        model = self.model
        extra = {key: kwargs.pop(key) for key in EXTRA_INPUTS if key in kwargs}
        scope = _generation_scope(model, args, kwargs, extra)
        stacks = calls(model)
        before = [(call, call.open(scope), call.said) for call in stacks]
        for call in stacks:
            call.said = Inputs(subspaces=extra.get("subspaces"))
        try:
            return type(model).generate(model, *args, **kwargs)
        finally:
            for call, scope, said in before:
                call.scope, call.said = scope, said


def _generation_scope(model: nn.Module, args: tuple, kwargs: dict, extra: dict) -> Scope | None:
    prompt = args[0] if args else None
    for key in ("inputs", "input_ids", "inputs_embeds"):
        prompt = kwargs.get(key) if prompt is None else prompt
    if not isinstance(prompt, Tensor):
        return None
    mask = kwargs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        mask = _mask_from_padding(model, prompt, kwargs)
    return Scope(mask.bool(), extra.get("intervention_mask"), extra.get("subject_positions"))


def _mask_from_padding(model: nn.Module, prompt: Tensor, kwargs: dict) -> Tensor:
    """Return the mask generate() would derive: padding counts only where it is not also eos."""
    ones = torch.ones(prompt.shape[:2], dtype=torch.bool, device=prompt.device)
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    pad, eos = (
        kwargs.get(key, getattr(config, key, None)) for key in ("pad_token_id", "eos_token_id")
    )
    if pad is None or prompt.dim() != 2 or prompt.is_floating_point():
        return ones
    stops = eos if isinstance(eos, list | tuple) else [eos]
    return ones if pad in stops else prompt != pad


# Switching


def use(model: nn.Module, names: str | Sequence[str]) -> None:
    """Make one or several adapters active; their edits add up.

    Raises:
        AdapterError: If a name is unknown.
    """
    names = [names] if isinstance(names, str) else list(names)
    check_known(model, names)
    for site in sites(model):
        site._active_adapter = list(names)
        for name in site.adapters():
            for module in site.groups(name).values():
                module.requires_grad_(name in names)


def check_known(model: nn.Module, names: Sequence[str]) -> None:
    """Raise AdapterError for names no adapter has; `__base__` is allowed."""
    known = adapter_names(model)
    for name in names:
        if name not in known and name != BASE:
            raise AdapterError(f'There is no adapter "{name}" on this model.', nearest(name, known))


def set_strength(model: nn.Module, name: str, value: float) -> None:
    """Scale an adapter's edits: h' = h + value · delta. 1 as trained, 0 off."""
    check_known(model, [name])
    for site in sites(model):
        if name in site.strength:
            site.strength[name] = float(value)


@contextmanager
def off(model: nn.Module) -> Iterator[nn.Module]:
    """Switch all adapters off, ours and PEFT's: bit-identical to the base model inside."""
    ours = sites(model)
    before = [site._disable_adapters for site in ours]
    foreign = [
        m for m in model.modules() if hasattr(m, "_disable_adapters") and not isinstance(m, Site)
    ]
    states = [m._disable_adapters for m in foreign]
    for module in (*ours, *foreign):
        module._disable_adapters = True
    try:
        yield model
    finally:
        for module, state in zip((*ours, *foreign), (*before, *states)):
            module._disable_adapters = state


@contextmanager
def mix(model: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
    """Give each row of the batches inside its own adapter; `__base__` means none."""
    check_known(model, names)
    stacks = calls(model)
    before = [call.rows for call in stacks]
    for call in stacks:
        call.rows = tuple(names)
    try:
        yield model
    finally:
        for call, rows in zip(stacks, before):
            call.rows = rows


@contextmanager
def prompt_scope(
    model: nn.Module,
    prompt_lens: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    intervention_mask: Tensor | None = None,
    subject_positions: Tensor | None = None,
    subspaces: Sequence | None = None,
) -> Iterator[nn.Module]:
    """Say where the prompts end, for plain forward passes inside.

    Args:
        model: The model with adapters; without any, this does nothing.
        prompt_lens: Real prompt tokens of each row `[B]`.
        labels: Instead: the prompt is what stands before the first label other than -100 `[B, T]`.
        intervention_mask: Explicit edit columns `[B, T]` for the rule `mask`.
        subject_positions: Place of the subject's last token `[B]` for the rule `subject_last`.
        subspaces: Subspace dimensions per row.
    """
    stacks = calls(model)
    before = [call.said for call in stacks]
    for call in stacks:
        call.said = Inputs(labels, prompt_lens, intervention_mask, subject_positions, subspaces)
    try:
        yield model
    finally:
        for call, said in zip(stacks, before):
            call.said = said


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Remove one adapter, or all with every hook; returns the model.

    Raises:
        AdapterError: If there is no such adapter.
    """
    if name is not None:
        check_known(model, [name])
        for site in sites(model):
            site.remove(name)
        for call in calls(model):
            call.rules.pop(name, None)
        if adapter_names(model):
            return model
    base = base_of(model)
    for module in list(base.modules()):
        for handle in module.__dict__.pop(HOOKS, []):
            handle.remove()
        module._modules.pop(CHILD, None)
        module.__dict__.pop(CALL, None)
        wrapped = module.__dict__.get("_gradient_checkpointing_func")
        if type(wrapped).__name__ == "ReplayedCall":
            module._gradient_checkpointing_func = wrapped.function
    if isinstance(base.__dict__.get("generate"), ScopedGenerate):
        del base.generate
    return model
