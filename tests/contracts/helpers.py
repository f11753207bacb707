"""What several contract tests need: adapters in one line, captured states, expected places."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from contracts.architectures import blocks_of, kind_of
from contracts.equations import EQUATIONS, disturb
from torch import Tensor, nn

from reftune import attach
from reftune.interventions import get
from reftune.model.face import ReftConfig, get_peft_model

TASKS = {"causal": "CAUSAL_LM", "encoder": "FEATURE_EXTRACTION", "seq2seq": "SEQ_2_SEQ_LM"}


def settings(method: str, **values: Any) -> Any:
    """Return a method's config with the matrix's settings."""
    known = EQUATIONS[method].settings if method in EQUATIONS else {}
    return get(method).Config(**{**known, **values})


def attached(model: nn.Module, method: str, name: str = "default", **where: Any) -> nn.Module:
    """Attach a disturbed adapter by the plain door; `init`, `rank` ... go to its config."""
    fields = get(method).Config.__dataclass_fields__
    own = {key: where.pop(key) for key in list(where) if key in fields}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        handle = attach(model, settings(method, **own), method=method, name=name, **where)
    if own.get("init") != "identity":
        for i, module in enumerate(interventions(model, handle.name)):
            disturb(module, seed=i)
    return model


def wrapped(model: nn.Module, method: str, name: str = "default", **where: Any) -> nn.Module:
    """Attach a disturbed adapter through PEFT; returns the PeftModel in eval mode."""
    fields = get(method).Config.__dataclass_fields__
    own = {key: where.pop(key) for key in list(where) if key in fields}
    where.setdefault("task_type", TASKS[kind_of(model)])
    config = ReftConfig(settings(method, **own), method=method, **where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        peft = get_peft_model(model, config, adapter_name=name).eval()
    for i, module in enumerate(interventions(peft, name)):
        disturb(module, seed=i)
    return peft


def interventions(model: nn.Module, name: str = "default") -> list[nn.Module]:
    """Return all intervention modules of an adapter, in the order of the blocks."""
    from reftune.model.site import Site

    found = [m for m in model.modules() if isinstance(m, Site)]
    return [module for site in found for module in site.groups(name).values()]


def first(output: Any) -> Tensor:
    """Return the hidden states of a block's output."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def captured(model: nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """Record what each block computed (`before`) and what the next one received (`after`)."""
    blocks = blocks_of(model)
    records: list[dict[str, Tensor]] = [{} for _ in blocks]
    handles = []
    for block, record in zip(blocks, records):

        def before(module: nn.Module, args: Any, output: Any, record: Any = record) -> None:
            record["before"] = first(output).detach().clone()

        def after(module: nn.Module, args: Any, output: Any, record: Any = record) -> None:
            record["after"] = first(output).detach().clone()

        handles.append(block.register_forward_hook(before, prepend=True))
        handles.append(block.register_forward_hook(after))
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def edited_mask(lengths: tuple[int, ...], prefix: int, suffix: int, side: str = "right") -> Tensor:
    """Return where prompts of these lengths are edited by `f<prefix>+l<suffix>`, by counting."""
    width = max(lengths)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, n in enumerate(lengths):
        places = set(range(min(prefix, n))) | set(range(max(0, n - suffix), n))
        for place in places:
            mask[row, place + (width - n if side == "left" else 0)] = True
    return mask


def changed(records: list[dict[str, Tensor]]) -> Tensor:
    """Return which tokens every block's site changed, `[B, T]`; all sites must agree."""
    masks = [(r["after"] != r["before"]).any(-1) for r in records]
    assert all(torch.equal(m, masks[0]) for m in masks)
    return masks[0]


def equal(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two tensors agree relative to the larger one's size."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1.0)
