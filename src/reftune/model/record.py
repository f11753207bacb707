"""What an artefact remembers of its base model: name, how it was loaded, a few of its weights."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import nn

from reftune.config.recipe import ModelSpec
from reftune.errors import AdapterError, nearest
from reftune.model.names import is_embedded, public_name
from reftune.model.quantised import LIBRARIES, kind_of
from reftune.model.sites import base_of

logger = logging.getLogger(__name__)

SPEC = "_reftune_spec"
"""Attribute of a base model that says how `load_base` was asked to load it."""
HEADS = {"SEQ_CLS": "classification", "SEQ_2_SEQ_LM": "seq2seq"}
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def task_of(model: nn.Module) -> str | None:
    """Return PEFT's task type for a model's class, or None for one without a head it knows."""
    base = base_of(model)
    for ending, task in TASKS.items():
        if type(base).__name__.endswith(ending):
            return task
    if not hasattr(base, "prepare_inputs_for_generation"):
        return None
    is_pair = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    return "SEQ_2_SEQ_LM" if is_pair else "CAUSAL_LM"


def kind_name(config: Any) -> str:
    """Return the kind of an adapter by its PEFT config."""
    kind = str(config.peft_type.value).lower()
    return "reft" if kind == "reftune" else kind


def name_of(model: nn.Module) -> str | None:
    """Return the public name of the base model under a model, or None."""
    return public_name(getattr(getattr(base_of(model), "config", None), "_name_or_path", None))


def base_record(model: nn.Module) -> dict[str, Any]:
    """Return the name of the base model under a model, how it was loaded and its fingerprint.

    Code that came with a checkpoint is never recorded as trusted: whoever loads must say so again.
    """
    base = base_of(model)
    spec = base.__dict__.get(SPEC) or ModelSpec(
        quantize=_quantisation_of(base), head=HEADS.get(task_of(base) or "", "causal")
    )
    keys = ("revision", "dtype", "quantize", "head")
    loaded = {key: getattr(spec, key) for key in keys}
    return {"name": name_of(base), **loaded, "fingerprint": fingerprint(base)}


def fingerprint(model: nn.Module) -> list[float] | None:
    """Return 16 weights of the input embedding, by which one base model is told from another.

    Rows 0, 8, ... 120 (closer together in a smaller vocabulary), a column each: adding tokens to
    a vocabulary does not change them, and quantisation leaves embeddings alone.

    Returns:
        The weights, or None for a model whose embedding cannot be read here: on the meta device,
        say, or sharded over processes.
    """
    base = base_of(model)
    weight = getattr(_embedding_of(base), "weight", None)
    if type(weight) not in (nn.Parameter, torch.Tensor) or weight.is_meta:
        return None
    if weight.dim() != 2 or not weight.numel():
        return None
    at = torch.arange(16, device=weight.device)
    rows = at * max(1, min(len(weight), 128) // 16) % len(weight)
    values = weight.detach()[rows, at * 7 % weight.shape[1]].float().tolist()
    return [float(f"{value:.6g}") for value in values]


def _embedding_of(base: nn.Module) -> nn.Module | None:
    try:
        return base.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _same_weights(stored: Any, model: nn.Module) -> bool | None:
    """Whether a stored fingerprint is a model's, up to precision; None if that cannot be told."""
    have = fingerprint(model)
    if not isinstance(stored, list) or have is None or len(stored) != len(have):
        return None
    if not all(isinstance(value, int | float) for value in stored):
        return None
    return all(abs(a - b) <= 1e-4 + 0.02 * abs(a) for a, b in zip(stored, have, strict=True))


def _quantisation_of(base: nn.Module) -> str:
    kind = kind_of(getattr(getattr(base, "config", None), "quantization_config", None))
    return kind if kind in LIBRARIES else "none"


def spec_from(
    name: str, record: dict[str, Any] | None, config: dict[str, Any], trust_remote_code: bool
) -> ModelSpec:
    """Return how to load the base model of an artefact.

    Args:
        name: Name of the base model.
        record: What `base_record` returned when the artefact was written, if it says.
        config: The artefact's PEFT config.
        trust_remote_code: Whether the caller trusts code that comes with the base model.

    Raises:
        AdapterError: If the record holds a value this version does not know.
    """
    record = record if isinstance(record, dict) else {}
    hints = get_type_hints(ModelSpec)
    values = {}
    for key in ("dtype", "quantize", "head"):
        known = get_args(hints[key])
        if key in record and record[key] not in known:
            raise AdapterError(
                f'The artefact asks for a base model with {key} "{record[key]}".',
                f"{nearest(str(record[key]), known)} Or pass model=.",
            )
        if key in record:
            values[key] = record[key]
    task = config.get("task_type")
    if task is not None or "head" not in values:
        values["head"] = HEADS.get(task, "causal")
    same = record.get("name") in (None, name)
    revision = (record.get("revision") if same else None) or config.get("revision")
    if revision is not None and not isinstance(revision, str):
        raise AdapterError(f"The base model's revision is {revision!r}.", "Pass model=.")
    return ModelSpec(name, revision=revision, trust_remote_code=trust_remote_code, **values)


def warn_other_base(stored: str | None, record: Any, model: nn.Module) -> None:
    """Warn when an adapter is loaded on another base model than it was trained on.

    What tells is the fingerprint, and the name where an artefact has none. It is no error: a
    fine-tuned copy of the base differs too.

    Args:
        stored: Name of the base model it was trained on.
        record: What `base_record` returned when the artefact was written, if it says.
        model: The model it is loaded on.
    """
    stored, have = public_name(stored), name_of(model)
    is_named = bool(stored and have) and not _same(stored, have)
    same = _same_weights(record.get("fingerprint") if isinstance(record, dict) else None, model)
    if same or (same is None and not is_named):
        return
    if is_named:
        text = f'The adapter was trained on "{stored}" and is loaded on "{have}".'
    else:
        text = f'The weights of "{have or stored}" are not those that the adapter was trained on.'
    text += " Unless one is a copy of the other, its edits mean nothing there."
    logger.warning("%s", text)
    warnings.warn(text, stacklevel=2)


def _same(a: str, b: str) -> bool:
    """Whether two names may mean one model: equal, one folder, or a hub name and its download."""
    if a == b or Path(a).expanduser().resolve() == Path(b).expanduser().resolve():
        return True
    for hub, folder in ((a, b), (b, a)):
        if is_hub_name(hub) and not is_hub_name(folder):
            cached = f"models--{hub.replace('/', '--')}"
            return Path(folder).name == hub.split("/")[-1] or cached in Path(folder).parts
    return False


def is_hub_name(name: str | None) -> bool:
    """Return whether a name looks like one of a model on the hub, and is no folder here.

    >>> is_hub_name("Qwen/Qwen3-0.6B"), is_hub_name("./models/mine"), is_hub_name("nano")
    (True, False, False)
    """
    if not name or is_embedded(name) or Path(name).exists():
        return False
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None


def check_base(config: Any, dim: int, num_layers: int) -> None:
    """Raise AdapterError when an adapter was trained on a model of another shape."""
    differs = []
    if config.base_dim not in (None, dim):
        differs.append(f"width {config.base_dim} (this model has {dim})")
    if config.base_layers not in (None, num_layers):
        differs.append(f"{config.base_layers} blocks (this model has {num_layers})")
    if differs:
        raise AdapterError(
            f"The adapter was trained on {config.base_model_name_or_path or 'a model'} with "
            f"{' and '.join(differs)}.",
            "Load it on the model it was trained on.",
        )


def check_tensors(given: set[str], own: set[str], place: str | Path) -> None:
    """Raise AdapterError when the tensors given for an adapter are not the ones it has.

    Args:
        given: Names of the tensors to load.
        own: Names of the adapter's tensors.
        place: Where they come from.
    """
    if given == own:
        return
    lost, missing = sorted(given - own), sorted(own - given)
    raise AdapterError(
        f"The weights in {place} do not match the adapter: {len(missing)} missing, "
        f"{len(lost)} without a place (first: {(missing or lost)[0]}).",
        "The folder is damaged, or the base model differs from the one it was trained on.",
    )


def check_below(
    stacked_on: str | None, model: nn.Module, own: Any = None, folder: Path | None = None
) -> None:
    """Raise AdapterError when the adapter that another was trained on top of is missing.

    Args:
        stacked_on: Kind of the adapter below, as the artefact says; None if there is none.
        model: The model it is loaded on.
        own: Its own config, where that hangs on the model already.
        folder: Where it is loaded from, if that is known.
    """
    below = getattr(model, "peft_config", None) or {}
    kinds = {kind_name(c) for c in below.values() if c is not own}
    if not stacked_on or stacked_on in kinds:
        return
    place = "the folder beside this one"
    if folder is not None:
        beside = folder.resolve().parent / stacked_on
        place = f"{beside} ({'it is there' if beside.is_dir() else 'nothing is there'})"
    raise AdapterError(
        f'This adapter was trained on top of a "{stacked_on}" adapter, which is not on the model. '
        f"Its place in the stack is {place}.",
        "Load the whole stack (the folder with stack.json), or apply that adapter first.",
    )
