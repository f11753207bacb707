"""Quantised base weights: asking for them, telling them apart, and what they cannot do.

`int8` (LLM.int8) and `int4` (NF4) come from bitsandbytes, `torchao_int8` (weights alone) from
torchao. Left out: torchao's four bits, which need a GPU and which transformers does not train on,
and its kinds that quantise activations too, through which no gradient passes.
"""

from __future__ import annotations

import importlib
import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from reftune.errors import AdapterError, ModelError

LIBRARIES = {"int8": "bitsandbytes", "int4": "bitsandbytes", "torchao_int8": "torchao"}
INSTALL = "pip install -U -e '.[quant]'"
REPACKS = "support_avx512bf16_for_cpu"
"""bitsandbytes' switch of a module: repack 4-bit weights at the first forward pass without grad."""
WORDY = "bitsandbytes.autograd._functions"


def quantisation_config(kind: str, dtype: torch.dtype | str) -> Any:
    """Return transformers' config of a kind of quantisation.

    Args:
        kind: A value of the recipe's `model.quantize`, not `none`.
        dtype: What the model is loaded in; bitsandbytes' four bits are computed in it too.

    Raises:
        ModelError: If the library is not there, or cannot be imported.
    """
    import transformers

    library = LIBRARIES[kind]
    try:
        importlib.import_module(library)
    except ModuleNotFoundError as error:
        raise ModelError(
            f'quantize is "{kind}" but {library} is not installed.', INSTALL
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(
            f'quantize is "{kind}" but {library} cannot be imported: {error}', INSTALL
        ) from error
    try:
        if kind == "torchao_int8":
            from torchao.quantization import Int8WeightOnlyConfig

            return transformers.TorchAoConfig(Int8WeightOnlyConfig(version=2))
        if kind == "int8":
            return transformers.BitsAndBytesConfig(load_in_8bit=True)
        compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
    except (ImportError, TypeError, ValueError) as error:  # too old for transformers
        raise ModelError(
            f'quantize is "{kind}" but {library} is too old: {error}', INSTALL
        ) from error


def kind_of(config: Any) -> str:
    """Return what a quantisation config amounts to: a value of `model.quantize`, or its method.

    >>> kind_of(None), kind_of({"quant_method": "bitsandbytes", "load_in_4bit": True})
    ('none', 'int4')
    >>> kind_of({"quant_method": "gptq", "bits": 4})
    'gptq'
    """
    if config is None:
        return "none"
    values = config if isinstance(config, dict) else config.to_dict()
    method = values.get("quant_method") or "unknown"
    method = str(getattr(method, "value", method))
    if method == "bitsandbytes" or "load_in_8bit" in values or "load_in_4bit" in values:
        return "int4" if values.get("load_in_4bit") else "int8"
    inner = values.get("quant_type") if method == "torchao" else None
    inner = inner.get("default") if isinstance(inner, dict) else None
    if isinstance(inner, dict) and inner.get("_type") == "Int8WeightOnlyConfig":
        return "torchao_int8"
    return method


def is_plain(weight: Tensor) -> bool:
    """Return whether a weight holds numbers that can be changed: floats of two bytes or more."""
    own = type(weight).__module__.startswith(("torchao", "bitsandbytes"))
    packed = own or hasattr(weight, "quant_state")
    return not packed and weight.is_floating_point() and weight.dtype.itemsize > 1


def weight_type(module: nn.Module) -> str | None:
    """Return the name of a linear module's quantised kind, or None for plain weights."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return type(module).__name__
    if is_plain(weight):
        return None
    is_torchao = type(weight).__module__.startswith("torchao")  # whose modules stay nn.Linear
    return type(weight if is_torchao else module).__name__


def settle(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking weights, and from saying one thing at every step.

    On CPUs with bf16 instructions it repacks 4-bit weights at the first evaluation: from then on
    they let no gradient through, outputs are those of bf16, and widths that are no multiple of 32
    are an error.
    """
    for module in model.modules():
        if getattr(module, REPACKS, False):
            setattr(module, REPACKS, False)
    logger = logging.getLogger(WORDY)
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Drop what LLM.int8 says of each module at each step: that it computes in float16."""
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def check_kernels(model: nn.Module) -> None:
    """Raise ModelError when the quantised weights cannot be computed with where they are."""
    _check_widths(model)
    for module in _samples(model):
        try:
            _gradient(module, _float_of(model))
        except (RuntimeError, AssertionError, ImportError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ModelError(
                f"{weight_type(module)} has no kernel that runs on {module.weight.device.type}: "
                f"{_first_line(error)}",
                "Choose another model.quantize, another device, or newer libraries: " + INSTALL,
            ) from error


def _check_widths(model: nn.Module) -> None:
    """Raise ModelError when four bits are read back wrongly, as bitsandbytes can on the CPU.

    With AVX-512 it mixes up the scales of rows that are no multiple of a block of weights.
    """
    weights = [(m, m._parameters.get("weight")) for m in model.modules()]
    states = [(m.in_features, w.quant_state) for m, w in weights if _is_odd(m, w)]
    for width, block, kind in {(n, s.blocksize, s.quant_type) for n, s in states}:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        index = torch.arange(16 * width)
        values = (0.7 * index).sin() * (1 + index // block % 7)  # a scale of its own to each block
        values = values.reshape(16, width)
        again = dequantize_4bit(*quantize_4bit(values, blocksize=block, quant_type=kind))
        if (again - values).norm() > 0.3 * values.norm():
            raise ModelError(
                f"bitsandbytes reads four-bit weights wrongly on this CPU where they are {width} "
                f"wide: no multiple of {block}.",
                "Use quantize: int8 or torchao_int8.",
            )


def _is_odd(module: nn.Module, weight: Tensor | None) -> bool:
    """Return whether a module has four-bit weights on the CPU whose rows are no whole blocks."""
    state = getattr(weight, "quant_state", None)
    if state is None or weight.device.type != "cpu" or not hasattr(module, "in_features"):
        return False
    return module.in_features % state.blocksize != 0


def blocking(model: nn.Module) -> str | None:
    """Return the kind of quantised weights that let no gradient through, or None.

    The residual stream carries one past them, so that training goes on, wrongly.
    """
    for module in _samples(model):
        try:
            gradient = _gradient(module, _float_of(model))
        except RuntimeError:
            gradient = None
        if gradient is None or not gradient.abs().sum() > 0:
            return weight_type(module)
    return None


def check_backward(model: nn.Module, strict: bool = True) -> None:
    """Raise AdapterError, or warn, when quantised weights let no gradient through."""
    kind = blocking(model)
    if kind is None:
        return
    error = AdapterError(
        f"No gradient passes through the quantised weights ({kind}): adapters below them would be "
        "trained wrongly.",
        "Use weight-only quantisation. Load 4-bit weights with reftune.load_base, or attach before "
        "the first forward pass.",
    )
    if strict:
        raise error
    warnings.warn(str(error), stacklevel=3)


def check_trainable(model: nn.Module, method: str) -> None:
    """Raise AdapterError when a recipe's method cannot be trained on quantised weights."""
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is None:
        return
    if method in ("full", "head_only"):
        raise AdapterError(
            f"{method} is not possible on quantised weights: they cannot be trained, nor a head on "
            "them without an adapter.",
            "Choose another method, or weights that are not quantised.",
        )
    if not quantiser.is_trainable:
        raise AdapterError(
            f"transformers does not train on weights quantised like these "
            f"({kind_of(quantiser.quantization_config)}).",
            f"Choose one of model.quantize: {', '.join(LIBRARIES)}.",
        )


def count(parameter: Tensor) -> int:
    """Return how many numbers a parameter holds; four-bit ones stand two or more to an element."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()


def _samples(model: nn.Module) -> Iterator[nn.Module]:
    """Return one linear module of each kind that the two libraries quantised."""
    seen = set()
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.is_meta or not hasattr(module, "in_features"):
            continue
        if not type(weight).__module__.startswith(("torchao", "bitsandbytes")):
            continue
        kind = weight_type(module)
        if kind not in seen:
            seen.add(kind)
            yield module


def _float_of(model: nn.Module) -> torch.dtype:
    """Return the type of what is not quantised, and so of hidden states."""
    return next((p.dtype for p in model.parameters() if is_plain(p)), torch.float32)


def _gradient(module: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """Send a vector through a linear module and back; None where nothing comes back."""
    with torch.enable_grad():
        x = torch.ones(1, module.in_features, device=module.weight.device, dtype=dtype)
        y = module.forward(x.requires_grad_(True))  # past the hooks, which expect a whole model
        return torch.autograd.grad(y.sum(), x, allow_unused=True)[0] if y.requires_grad else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
