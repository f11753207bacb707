"""A site: a child module on a block or linear module that edits its output.

The child keeps the base model's keys, attributes and class names untouched. One module-level hook
finds it through its module, so copies of a model edit with their own sites.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reftune.errors import AdapterError, SiteError
from reftune.interventions.base import Intervention, InterventionConfig
from reftune.model.call import Call
from reftune.model.positions import PREFIX, SUFFIX, TIED

CHILD = "intervention"
"""Attribute of the module a site hangs on. It must not contain the prefix `reft_`."""
GROUPS = (TIED, PREFIX, SUFFIX)
BASE = "__base__"
"""Row name that means: no adapter."""


class Site(nn.Module):
    """Interventions of all adapters at one place.

    Parameters live at `reft_<group>.<adapter>.reft_*`, where group is `tied`, or `prefix` and
    `suffix` for an untied adapter.

    Args:
        dim: Width of the hidden states at this place.
        call: State of the stack the place belongs to.
        layer: Index of the block.
        outer: Whether the hooked module is a whole block (else a module inside one).
    """

    def __init__(self, dim: int, call: Call, layer: int, outer: bool) -> None:
        super().__init__()
        self.dim, self.call, self.layer, self.outer = dim, call, layer, outer
        self.reft_tied = nn.ModuleDict()
        self.reft_prefix = nn.ModuleDict()
        self.reft_suffix = nn.ModuleDict()
        self.strength: dict[str, float] = {}
        self._active_adapter: list[str] = []
        self._disable_adapters = False
        self._plan_cache: tuple[tuple, tuple] | None = None

    # Membership

    def groups(self, name: str) -> dict[str, Intervention]:
        """Return the interventions of an adapter by group."""
        found = {group: getattr(self, f"reft_{group}") for group in GROUPS}
        return {group: modules[name] for group, modules in found.items() if name in modules}

    def adapters(self) -> list[str]:
        """Return the names of all adapters at this site."""
        return sorted({name for group in GROUPS for name in getattr(self, f"reft_{group}")})

    def add(
        self,
        name: str,
        method: type[Intervention],
        config: InterventionConfig,
        groups: tuple[str, ...],
    ) -> None:
        """Create the interventions of an adapter.

        Raises:
            AdapterError: If the name is taken or would collide with a parameter's name.
        """
        check_adapter_name(name)
        if name in self.adapters():
            raise AdapterError(f'The adapter "{name}" exists already.', "Choose another name.")
        for group in groups:
            module = method(config, self.dim)
            if not any(p.is_meta for p in module.parameters()):
                module.reset()
            taken = {part for key, _ in module.named_parameters() for part in key.split(".")}
            if name in taken:
                raise AdapterError(
                    f'The adapter name "{name}" is also the name of a parameter of {method.name}.',
                    "Choose another name.",
                )
            getattr(self, f"reft_{group}")[name] = module
        self.strength[name] = 1.0
        self._plan_cache = None

    def remove(self, name: str) -> None:
        """Delete an adapter's interventions here; unknown names are ignored."""
        for group in GROUPS:
            modules = getattr(self, f"reft_{group}")
            if name in modules:
                del modules[name]
        self.strength.pop(name, None)
        self._active_adapter = [n for n in self._active_names() if n != name]
        self._plan_cache = None

    def _active_names(self) -> list[str]:
        active = self._active_adapter
        return [active] if isinstance(active, str) else list(active)

    def _plan(self) -> tuple[tuple[str, str, Intervention], ...]:
        """Return (adapter, group, intervention) of everything that may act in this pass."""
        rows = self.call.now.rows
        names = tuple(self._active_names()) if rows is None else tuple(dict.fromkeys(rows))
        if self._plan_cache is None or self._plan_cache[0] != names:
            plan = tuple(
                (name, group, module)
                for name in names
                for group, module in self.groups(name).items()
            )
            self._plan_cache = (names, plan)
        return self._plan_cache[1]

    # Editing

    def forward(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        """Return (h.float() + Σ strength · delta).to(h.dtype) at the edited tokens, else h."""
        plan = self._plan()
        if not plan:
            return h
        index, weights = self.call.place(tuple((name, group) for name, group, _ in plan))
        full = self._rows(h)
        if index is None:
            picked = full
        else:
            columns = index[..., None].expand(-1, -1, full.shape[-1])
            picked = full.gather(1, columns)
        with _no_autocast(h):
            total = self._total(picked, weights, plan).to(h.dtype)
        out = total if index is None else full.scatter(1, columns, total)
        return out if out.shape == h.shape else out.reshape(h.shape)

    def _rows(self, h: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "batch new_tokens dim"]:
        """Return h by rows; some modules work on all tokens of the batch in one row.

        Raises:
            SiteError: If the module's output does not hold one state per token of the call.
        """
        now = self.call.now
        if h.shape[:-1].numel() != now.batch * now.width or h.shape[-1] != self.dim:
            raise SiteError(
                f"A site on layer {self.layer} sees states {tuple(h.shape)}, but the call has "
                f"{now.batch} x {now.width} tokens of width {self.dim}.",
                "Choose a module that works on every token of the prompt, or site: block.",
            )
        return h.reshape(now.batch, now.width, self.dim)

    def _total(
        self,
        picked: Float[Tensor, "batch columns dim"],
        weights: dict[tuple[str, str], Bool[Tensor, "batch columns 1"]],
        plan: tuple,
    ) -> Float[Tensor, "batch columns dim"]:
        wide = picked.to(torch.promote_types(picked.dtype, torch.float32))
        rows = wide.reshape(-1, wide.shape[-1])
        total = wide
        for name, group, module in plan:
            select = self._select(module, wide)
            edit = module(rows, select)
            delta = edit.delta.reshape(wide.shape) * self.strength.get(name, 1.0)
            total = total + torch.where(weights[name, group], delta, 0.0)
        return total

    def _select(
        self, module: Intervention, wide: Float[Tensor, "batch columns dim"]
    ) -> Bool[Tensor, "batch*columns rank"] | None:
        if self.call.now.subspaces is None:
            return None
        rank = getattr(module.config, "rank", self.dim)
        mask = self.call.subspace_mask(rank, wide.shape[0], wide.device)
        return None if mask is None else mask.repeat_interleave(wide.shape[1], 0)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_plan_cache"] = None
        return state

    def extra_repr(self) -> str:
        """Describe the site in the model's printout."""
        return f"layer={self.layer}, dim={self.dim}, adapters={self.adapters()}"


class _no_autocast:
    """Switch autocast off inside a site: edits are computed in fp32."""

    def __init__(self, h: Float[Tensor, "*tokens dim"]) -> None:
        kind = h.device.type
        on = torch.is_autocast_enabled(kind)
        self.context = torch.autocast(kind, enabled=False) if on else None

    def __enter__(self) -> None:
        if self.context is not None:
            self.context.__enter__()

    def __exit__(self, *error: object) -> None:
        if self.context is not None:
            self.context.__exit__(*error)


def site_of(module: nn.Module) -> Site | None:
    """Return the site that hangs on a module, if any."""
    return module._modules.get(CHILD)


def site_hook(module: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook: edit the output of the module a site hangs on."""
    site = site_of(module)
    if site is None or site._disable_adapters:
        return None
    if site.outer:
        _trace(site.call, args)
    if site.call.now.idle:
        return None
    if isinstance(output, tuple):
        return (site(output[0]), *output[1:])
    return site(output)


def _trace(call: Call, args: tuple) -> None:
    """Note a block's input in the forward pass; find its pass again when it is recomputed."""
    if not args or not isinstance(args[0], Tensor) or torch.compiler.is_compiling():
        return  # a compiled graph recomputes with the tensors it was traced with
    if torch._C._current_graph_task_id() != -1:
        call.recall(args[0])
    elif call.now.grad:
        call.remember(args[0])


class ReplayedCall:
    """A checkpointing function that replays a block under the description it first ran with.

    Sites inside a block run again in the backward pass, possibly after other forward passes.
    """

    def __init__(self, function: Any, call: Call) -> None:
        self.function, self.call = function, call

    def __call__(self, block_forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Checkpoint `block_forward(*args)`."""
        now = self.call.now

        def replay(*inputs: Any) -> Any:
            self.call.now = now
            return block_forward(*inputs)

        return self.function(replay, *args, **kwargs)


def block_pre_hook(block: nn.Module, args: tuple) -> None:
    """Forward pre-hook of a block with sites inside: recomputation edits as the first pass did.

    transformers checkpoints a block's `forward`, inside this hook, so its function is wrapped;
    wrappers around the whole block run this hook again.
    """
    inner = next((m for m in block.modules() if isinstance(m, Site) and not m.outer), None)
    if inner is None:
        return
    _trace(inner.call, args)
    function = getattr(block, "_gradient_checkpointing_func", None)
    if function is not None and not isinstance(function, ReplayedCall):
        block._gradient_checkpointing_func = ReplayedCall(function, inner.call)


def check_adapter_name(name: str) -> None:
    """Refuse names that would break saving.

    Raises:
        AdapterError: For empty names, names with a dot, `__base__`, or the prefix `reft_`.
    """
    if not name or "." in name or name in (BASE, CHILD) or name.startswith("reft_"):
        raise AdapterError(
            f'"{name}" cannot name an adapter.',
            'Use a name without dots, not starting with "reft_".',
        )
