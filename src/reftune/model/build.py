"""From recipe to model: loading the base and applying what is to be trained."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reftune.config.options import LoraOptions
from reftune.config.recipe import AdapterSpec, ModelSpec
from reftune.errors import AdapterError, ModelError, nearest
from reftune.model import quantised
from reftune.model.hub import check_reachable
from reftune.model.names import is_embedded
from reftune.model.places import REMEDY, check_base_folder, said
from reftune.model.record import SPEC, task_of
from reftune.model.sites import base_of

QUERY_AND_VALUE = ("q_proj", "v_proj")
HEAD_NAMES = ("score", "classifier", "lm_head", "embed_out")


@dataclass(frozen=True)
class Summary:
    """How much of a model is trained."""

    trainable: int
    total: int

    @property
    def fraction(self) -> float:
        """Trained share of all parameters."""
        return self.trainable / max(1, self.total)


def load_base(
    spec: ModelSpec | str, num_labels: int | None = None, device: str | torch.device | None = None
) -> tuple[nn.Module, Any]:
    """Load a base model in evaluation mode, with its tokenizer.

    Args:
        spec: The recipe's model, or just its name.
        num_labels: Classes of a classification head.
        device: Where to put it; default is CUDA, else MPS, else the CPU. Under `accelerate launch`
            the default is the CPU: the trainer places, or shards, the model itself.

    Raises:
        ModelError: If it cannot be found or loaded; the message says where it was looked for.
    """
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    spec = ModelSpec(name=spec) if isinstance(spec, str) else spec
    place, device = locate(spec), torch.device(device or default_device())
    kwargs: dict[str, Any] = {
        "dtype": "auto" if spec.dtype == "auto" else getattr(torch, spec.dtype)
    }
    if spec.dtype == "auto" and device.type != "cuda":
        kwargs["dtype"] = torch.float32
    if spec.attention != "auto":
        kwargs["attn_implementation"] = spec.attention
    if spec.quantize != "none":
        if not _is_stored_so(spec, place):
            kwargs["quantization_config"] = quantised.quantisation_config(
                spec.quantize, kwargs["dtype"]
            )
        kwargs["device_map"] = {"": device}  # quantised weights cannot be moved later
    if num_labels is not None:
        kwargs["num_labels"] = num_labels
    remote = (
        {}
        if is_embedded(spec.name)
        else {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    )
    try:
        with _quiet(is_embedded(spec.name) or not sys.stderr.isatty()):
            tokenizer = AutoTokenizer.from_pretrained(place, **remote)
            model = _auto_class(spec, num_labels).from_pretrained(place, **kwargs, **remote)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(
            f'The model "{spec.name}" could not be loaded: {said(error)}',
            REMEDY,
        ) from error
    except ImportError as error:
        raise ModelError(
            f'The model "{spec.name}" could not be loaded: {said(error)}',
            _missing(spec),
        ) from error
    except RuntimeError as error:
        if spec.quantize == "none" or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(
            f'The model "{spec.name}" could not be quantised to {spec.quantize} on '
            f"{device.type}: {said(error)}",
            f"Choose another model.quantize or device, or newer libraries: {quantised.INSTALL}",
        ) from error
    quantised.settle(model)
    quantised.check_kernels(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    setattr(model, SPEC, spec)
    if spec.quantize == "none":
        model.to(device)
    return model.eval(), tokenizer


def _missing(spec: ModelSpec) -> str:
    """Return what to do where a package that loading needs is not installed."""
    if spec.quantize != "none":
        return f"Install what it needs; for quantised weights: {quantised.INSTALL}"
    if spec.attention not in ("auto", "sdpa", "eager"):
        return "Install it, or set model.attention: auto."
    return "Install what it needs."


def default_device() -> str:
    """Return where models go unless told otherwise: `cuda`, `mps` or `cpu`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextmanager
def _quiet(on: bool) -> Iterator[None]:
    """Hide transformers' loading bars, for models that load at once and for logs."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if on:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def locate(spec: ModelSpec) -> str:
    """Return where a base model is loaded from: a folder that holds one, or its hub name.

    Raises:
        ModelError: If it is a folder that is not there, or holds no base model, or a hub name and
            the hub cannot be reached.
    """
    if is_embedded(spec.name):
        from reftune.nano import path

        try:
            return str(path(spec.name))
        except ValueError as error:
            raise ModelError(str(error)) from error
    folder = Path(spec.name).expanduser()
    if folder.is_dir():
        check_base_folder(folder, spec.name)
        return str(folder)
    if spec.name.startswith((".", "/", "~")) or spec.name.count("/") > 1 or _among_runs(folder):
        raise ModelError(
            f'The model folder "{spec.name}" does not exist.', "Check the path, or use nano."
        )
    check_reachable(spec.name, spec.revision)
    return spec.name


def _among_runs(folder: Path) -> bool:
    """Return whether a folder would stand beside run folders: then it is no name of the hub."""
    return folder.parent != Path(".") and any(folder.parent.glob("*/recipe.yaml"))


def _auto_class(spec: ModelSpec, num_labels: int | None) -> Any:
    import transformers

    if spec.head == "classification" or num_labels is not None:
        return transformers.AutoModelForSequenceClassification
    if spec.head == "seq2seq":
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def _is_stored_so(spec: ModelSpec, place: str) -> bool:
    """Return whether weights are quantised in the checkpoint already, in the way asked for.

    Raises:
        ModelError: If they are quantised in another way: that cannot be changed.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            place, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, KeyError):
        return False  # loading says what is wrong
    stored = quantised.kind_of(getattr(config, "quantization_config", None))
    if stored not in ("none", spec.quantize):
        raise ModelError(
            f'The weights of "{spec.name}" are stored quantised ({stored}); quantize is '
            f'"{spec.quantize}".',
            "Use quantize: none: they are loaded as they are stored.",
        )
    return stored != "none"


def apply_adapter(model: nn.Module, spec: AdapterSpec, seed: int = 42) -> nn.Module:
    """Apply what a stage trains.

    Args:
        model: The base model, or one with adapters already; all of it is frozen.
        spec: The recipe's adapter.
        seed: Seed of its initialisation.

    Returns:
        A PeftModel for interventions and `lora`; the model itself for `full` and `head_only`.
    """
    torch.manual_seed(seed)
    quantised.settle(model)
    quantised.check_trainable(base_of(model), spec.method)
    model.requires_grad_(False)
    if spec.method == "lora":
        return _lora(model, spec)
    if spec.method in ("full", "head_only"):
        return _plain(model, spec)
    from reftune.model.face import ReftConfig, get_peft_model

    config = ReftConfig(
        dict(spec.options),
        method=spec.method,
        layers=spec.layers,
        site=spec.site,
        positions=spec.positions,
        train_positions=spec.train_positions,
        tied=spec.tied,
        short=spec.short,
        stack=spec.stack,
        blocks=spec.blocks,
        strength=spec.strength,
        task_type=task_of(model),
    )
    return get_peft_model(model, config, adapter_name=spec.name)


def _lora(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    from reftune.model.layers import parse_layers
    from reftune.model.levels import keep_below_active
    from reftune.model.sites import find_blocks

    if spec.strength != 1.0:
        raise AdapterError(f"lora has no strength (it is {spec.strength}).", "Change its alpha.")
    quantised.check_backward(model)
    if spec.name in getattr(model, "peft_config", {}):
        raise AdapterError(f'The adapter "{spec.name}" exists already.', "Choose another name.")
    known = {item.name for item in fields(LoraOptions)}
    for key in spec.options:
        if key not in known:
            raise AdapterError(f'lora has no setting "{key}".', nearest(key, known))
    options = LoraOptions(**spec.options)
    layers = None
    if spec.layers != "all":
        blocks = find_blocks(model, spec.stack, spec.blocks)
        layers = parse_layers(spec.layers, len(blocks.modules))
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=options.targets or _attention_targets(model),
        layers_to_transform=layers,
        task_type=task_of(model),
    )
    try:
        adapted = get_peft_model(model, config, adapter_name=spec.name)
    except ValueError as error:
        raise AdapterError(f"lora: {said(error)}", "Name the modules with targets.") from error
    keep_below_active(adapted)
    return adapted


def _attention_targets(model: nn.Module) -> list[str] | None:
    """Return query and value projections, or PEFT's own choice where they are named otherwise."""
    names = {name.split(".")[-1] for name, _ in model.named_modules()}
    return list(QUERY_AND_VALUE) if set(QUERY_AND_VALUE) <= names else None


def _plain(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    for parameter in model.parameters():
        parameter.requires_grad_(spec.method == "full")
    if spec.method == "head_only":
        heads = [m for n, m in model.named_modules() if n.split(".")[-1] in HEAD_NAMES]
        if not heads:
            raise AdapterError(
                "head_only: the model has no head of its own.",
                f"Known names: {', '.join(HEAD_NAMES)}.",
            )
        heads[0].requires_grad_(True)
    return model


def trainable_summary(model: nn.Module) -> Summary:
    """Count trained and all parameters; a shared tensor counts once."""
    seen: dict[int, nn.Parameter] = {id(p): p for p in model.parameters()}
    trained = sum(p.numel() for p in seen.values() if p.requires_grad)
    return Summary(trained, sum(quantised.count(p) for p in seen.values()))
