"""Switching, scaling and mixing attached adapters, and saying where prompts end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jaxtyping import Bool, Int, Real
from torch import Tensor, nn

from reftune.model.lookup import calls, check_known, sites
from reftune.model.passes import Inputs
from reftune.model.site import Site


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
    tuners = {tuner: [n for n in names if n in tuner.peft_config] for tuner in _tuners(model)}
    for tuner, own in tuners.items():
        if own or len(tuners) == 1:
            tuner.active_adapter = own
    for wrapper in model.modules():
        own = tuners.get(wrapper._modules.get("base_model"))
        if own:
            wrapper.active_adapter = own[0]


def _tuners(model: nn.Module) -> list[nn.Module]:
    """Return the PEFT tuners of our adapters, which keep their own books of names and settings."""
    return [m for m in model.modules() if getattr(type(m), "prefix", None) == "reft_"]


def set_strength(model: nn.Module, name: str, value: float) -> None:
    """Scale an adapter's edits: h' = h + value · delta. 1 as trained, 0 off. Saved with it."""
    check_known(model, [name])
    for site in sites(model):
        if name in site.strength:
            site.strength[name] = float(value)
    for tuner in _tuners(model):
        if name in tuner.peft_config:
            tuner.peft_config[name].strength = float(value)


def foreign_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of PEFT's own adapters, such as LoRA."""
    # Asked of the object and its class only: wrappers forward unknown names to what they wrap.
    return [
        m
        for m in model.modules()
        if not isinstance(m, Site)
        and ("_disable_adapters" in vars(m) or hasattr(type(m), "_disable_adapters"))
    ]


@contextmanager
def off(model: nn.Module) -> Iterator[nn.Module]:
    """Switch all adapters off, ours and PEFT's: bit-identical to the base model inside."""
    ours, foreign = sites(model), foreign_layers(model)
    before = [site._disable_adapters for site in ours]
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
    prompt_lens: Int[Tensor, " batch"] | None = None,
    *,
    labels: Real[Tensor, "batch ..."] | None = None,
    intervention_mask: Bool[Tensor, "batch seq"] | None = None,
    subject_positions: Int[Tensor, " batch"] | None = None,
    subspaces: Sequence | None = None,
) -> Iterator[nn.Module]:
    """Say where the prompts end, for plain forward passes inside.

    Args:
        model: The model with adapters; without any, this does nothing.
        prompt_lens: Real prompt tokens of each row.
        labels: Instead: the prompt is what stands before the first label other than -100. Labels
            that are not one a token (classes, a decoder's targets) say nothing.
        intervention_mask: Explicit edit columns for the rule `mask`.
        subject_positions: Place of the subject's last token for the rule `subject_last`.
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
