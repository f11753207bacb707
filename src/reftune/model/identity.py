"""Whether a frozen model is still the one that constants were computed with.

`stamp` is cheap and says whether something changed since it was last asked: another tensor, a
weight that was written to, frozen LoRA switched or scaled, another attention kernel. `digest` is a
hash of content that is the same in another process: of every bit of every weight, the config, the
frozen adapters and the versions of torch and transformers.

Not seen by `stamp`: a weight changed through `.data` while a run holds it.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import Any

import torch
import transformers
from jaxtyping import Shaped
from torch import Tensor, nn

from reftune.model.lookup import placed
from reftune.model.sites import base_of
from reftune.model.switching import foreign_layers

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 2**22
"""Values hashed at a time."""
PROCESS = uuid.uuid4().hex
"""Stands for weights whose content cannot be read (offloaded): no other process has their hash."""
SWITCHES = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")
"""Attributes of PEFT's layers that decide what they compute, besides their weights."""
UNHEARD = ("use_cache", "transformers_version")
"""Keys of a config that say nothing about keys and values."""


class Identity:
    """The frozen part of a model: base, frozen adapters, settings; interventions left out.

    Modules are looked up once: after adapters were added or removed, make a new one.

    Args:
        model: The model with its adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.base = model, base_of(model)
        self.foreign = foreign_layers(model)
        own = {id(m) for site in placed(model) for m in site.modules()}
        self.slots = [
            (f"{path}.{name}", owner, name)
            for path, module in self.base.named_modules()
            if id(module) not in own
            for owner in (module._parameters, module._buffers)
            for name in owner
            if owner[name] is not None and name not in module._non_persistent_buffers_set
        ]
        self._known: dict[int, str] = {}

    def stamp(self) -> int:
        """Return a number that changes when the frozen part does; for this process only."""
        tensors = tuple(_place(owner[name]) for _, owner, name in self.slots)
        return hash((tensors, self._switches(), self._kernel()))

    def digest(self) -> str:
        """Return a hash of everything constants depend on but tokens and precision of the pass."""
        stamp = self.stamp()
        if stamp not in self._known:
            self._known[stamp] = self._digest()
        return self._known[stamp]

    def _digest(self) -> str:
        config = self.base.config
        settings = {k: v for k, v in config.to_dict().items() if k not in UNHEARD}
        parts: list[object] = [
            torch.__version__,
            transformers.__version__,
            getattr(config, "_commit_hash", ""),
            self._kernel(),
            json.dumps(settings, sort_keys=True, default=str),
            self._switches(),
        ]
        for path, owner, name in self.slots:
            parts += [path, tuple(owner[name].shape), owner[name].dtype, *_summary(owner[name])]
        return digest(*parts)

    def _kernel(self) -> str:
        return str(getattr(self.base.config, "_attn_implementation", ""))

    def _switches(self) -> str:
        return str([[str(vars(layer).get(key)) for key in SWITCHES] for layer in self.foreign])


def _place(tensor: Tensor) -> tuple[int, int, int]:
    """Return which tensor it is, where it lies and how often it was written to."""
    address = 0 if hasattr(tensor, "__tensor_flatten__") else tensor.data_ptr()
    return id(tensor), address, 0 if tensor.is_inference() else tensor._version


def _inner(tensor: Tensor) -> list[Tensor]:
    """Return the tensors a quantised one is made of, or that say how to read it (bitsandbytes)."""
    if hasattr(tensor, "__tensor_flatten__"):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    state = getattr(tensor, "quant_state", None)
    found = [] if state is None else list(state.as_dict(packed=True).values())
    return [t for t in (*found, getattr(tensor, "SCB", None)) if isinstance(t, Tensor)]


def _summary(tensor: Shaped[Tensor, "*shape"]) -> list[object]:
    """Return numbers that change with any bit of a tensor, and with the order of its values."""
    if tensor.numel() == 0:
        return []
    found: list[object] = [number for part in _inner(tensor) for number in _summary(part)]
    if hasattr(tensor, "__tensor_flatten__"):
        return found
    if tensor.is_meta:
        return [PROCESS]
    flat = tensor.detach().contiguous().flatten()
    bits = flat.view(BITS[flat.element_size()]) if flat.element_size() in BITS else flat
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK].to(torch.int64)
        places = torch.arange(1, part.numel() + 1, device=part.device)
        found += [int(part.sum()), int((part * places).sum())]  # both wrap around
    return found


def digest(*parts: Any) -> str:
    """Return a short hash of texts, numbers and bytes."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        hashed.update(len(data).to_bytes(8, "little") + data)
    return hashed.hexdigest()
