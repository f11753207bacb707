"""Saving and loading what was trained: PEFT artefacts, stacks of them, and whole models.

Everything is written to a temporary folder and renamed: a half-written artefact never stands under
the final name, and an old one is replaced only by a complete new one.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from reftune.errors import AdapterError, ModelError, ReftuneError
from reftune.model.artefact import (
    CARD,
    CONFIG,
    SIDECAR,
    STACK,
    WEIGHTS,
    needs,
    num_labels_in,
    opened,
    read_settings,
    read_stack,
    resolve_folder,
    whole_head,
)
from reftune.model.levels import (
    Part,
    active_of,
    keep_below_active,
    kind_of,
    model_card,
    parts,
    refuse_foreign,
)
from reftune.model.places import said
from reftune.model.record import (
    base_record,
    check_below,
    check_tensors,
    spec_from,
    warn_other_base,
)
from reftune.model.sites import base_of
from reftune.report.files import write_text_atomic


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    figures: dict[str, Any] | None = None,
    *,
    name: str | None = None,
) -> Path:
    """Save what is trained on a model.

    Args:
        model: A PeftModel or a model with an attached adapter; nested ones (saved as a stack); a
            model without adapters (saved whole).
        folder: Final folder; replaced as a whole once everything is written.
        figures: Figures of the run for the model card.
        name: The adapter to save, where several are active.

    Returns:
        The folder.

    Raises:
        AdapterError: If several adapters are active and none is named, or the name is unknown.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    temporary.chmod(_folder_mode())  # mkdtemp's own shuts out everybody else
    try:
        _write(model, temporary, figures or {}, name)
        _replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def write_card(model: nn.Module, folder: str | Path, figures: dict[str, Any]) -> None:
    """Write the card of an artefact again, whole or not at all; a whole model has none.

    Args:
        model: The model the artefact was saved from, or loaded on.
        folder: The artefact's folder.
        figures: Figures of the run.
    """
    found = parts(model)
    if found:
        write_text_atomic(Path(folder) / CARD, model_card(found, figures))


def _folder_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o777 & ~mask


def _replace_folder(new: Path, final: Path) -> None:
    if not final.exists():
        os.replace(new, final)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{final.name}-old-", dir=final.parent))
    os.replace(final, old / "old")
    try:
        os.replace(new, final)
    except OSError:
        os.replace(old / "old", final)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _write(model: nn.Module, folder: Path, figures: dict[str, Any], name: str | None) -> None:
    found = parts(model, name)
    if not found:
        base_of(model).save_pretrained(folder)
        return
    record = base_record(model)
    if len(found) == 1:
        _write_part(found[0], folder, None, record)
    else:
        kinds = [part.kind for part in found]
        order = []
        for i, part in enumerate(found):
            place = numbered(part.kind, kinds[:i].count(part.kind))
            _write_part(part, folder / place, kinds[i - 1] if i else None, record)
            order.append({"folder": place, "kind": part.kind, "name": part.name})
        text = json.dumps({"order": order, "base": found[0].base_name()}, indent=2)
        (folder / STACK).write_text(text + "\n", encoding="utf-8")
    (folder / CARD).write_text(model_card(found, figures), encoding="utf-8")


def numbered(kind: str, before: int) -> str:
    """Return the folder of a stack's part: its kind, numbered from the second of a kind on.

    >>> numbered("reft", 0), numbered("reft", 1)
    ('reft', 'reft-2')
    """
    return f"{kind}-{before + 1}" if before else kind


def _write_part(part: Part, folder: Path, below: str | None, record: dict[str, Any]) -> None:
    """Write one adapter: its own tensors only, also when others hang on the same model."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        key: value.detach().cpu().contiguous().clone() for key, value in part.tensors().items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = part.config.to_dict()
    config.update(inference_mode=True, base_model_name_or_path=part.base_name())
    config["target_modules"] = _plain_targets(config.get("target_modules"))
    if part.kind == "reft":
        noted = config.get("base_model") or {}
        if record["fingerprint"] is None:  # the weights were still whole when it was attached
            record = {**record, "fingerprint": noted.get("fingerprint")}
        config.update(stacked_on=below, base_model=record)
    else:
        _write_json(folder / SIDECAR, {"base_model": record, "stacked_on": below})
    _write_json(folder / CONFIG, {k: getattr(v, "value", v) for k, v in config.items()})


def _write_json(file: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2, sort_keys=True, default=str)
    file.write_text(text + "\n", encoding="utf-8")


def _plain_targets(targets: Any) -> Any:
    return sorted(targets) if isinstance(targets, set | frozenset) else targets


def load_adapter(
    path: str | Path,
    model: nn.Module | None = None,
    trainable: bool = False,
    tokenizer: Any = None,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any]:
    """Load an adapter, a stack or a whole model.

    Args:
        path: A folder, a run folder, or a hub name: `owner/name` or `owner/name@revision`.
        model: The base model, if it is loaded already.
        trainable: Whether its parameters may be trained on.
        tokenizer: Returned as it is when `model` is given.
        device: Where to put a base model loaded here; see `load_base`.
        trust_remote_code: Run code that comes with the base model. Never taken from the artefact.

    Returns:
        (model, tokenizer); the tokenizer is None when only `model` was given.

    Raises:
        AdapterError: If the folder is not an adapter, is corrupted or does not fit the base model.
    """
    folder = resolve_folder(path)
    refuse_foreign(folder)
    how = {"device": device, "trust_remote_code": trust_remote_code}
    if (folder / STACK).is_file():
        base, layers = read_stack(folder)
        check_below(needs(layers[0][0]).get("stacked_on"), model, folder=layers[0][0])
        model, tokenizer = _base_for(base, model, tokenizer, layers[0][0], how)
        for part, name in layers:
            model = _load_level(part, model, trainable, name)
        return model.eval(), tokenizer
    if not (folder / CONFIG).is_file():
        if (folder / "config.json").is_file() and model is None:
            return _load_whole(folder, how)
        raise AdapterError(
            f'"{path}" is not an adapter: there is no {CONFIG}, {STACK} or config.json in it.',
            "Give a folder written by reftune or PEFT, or a run folder.",
        )
    config = read_settings(folder / CONFIG)
    check_below(needs(folder).get("stacked_on"), model, folder=folder)
    base = config.get("base_model_name_or_path")
    model, tokenizer = _base_for(base, model, tokenizer, folder, how)
    name = _free_name(config, model)
    return _load_level(folder, model, trainable, name).eval(), tokenizer


def _free_name(config: dict[str, Any], model: nn.Module) -> str:
    """Return the name for an adapter that brings none.

    A LoRA on top of one of ours needs another: PEFT's wrapper of the upper one would overwrite the
    settings of the lower, and act by them.
    """
    from reftune.model.face import MEMBER
    from reftune.model.lookup import adapter_names

    names = adapter_names(model)
    if config.get("peft_type") == MEMBER or "default" not in names:
        return "default"
    return next(name for n in range(2, len(names) + 3) if (name := f"default{n}") not in names)


def _load_whole(folder: Path, how: dict[str, Any]) -> tuple[nn.Module, Any]:
    """Load a whole model, with the head it was saved with."""
    from reftune.config.recipe import ModelSpec
    from reftune.model.build import load_base

    head, trust = whole_head(folder) or "causal", how["trust_remote_code"]
    spec = ModelSpec(str(folder.resolve()), head=head, trust_remote_code=trust)
    return load_base(spec, device=how["device"])


def _base_for(
    name: str | None, model: nn.Module | None, tokenizer: Any, folder: Path, how: dict[str, Any]
) -> tuple[nn.Module, Any]:
    """Return the base model the adapter in a folder needs."""
    if model is not None:
        return model, tokenizer
    if not name:
        raise AdapterError(f'"{folder}" does not say which base model it needs.', "Pass model=.")
    from reftune.model.build import load_base

    config, beside = read_settings(folder / CONFIG), needs(folder)
    spec = spec_from(name, beside.get("base_model"), config, how["trust_remote_code"])
    num_labels = num_labels_in(folder) if spec.head == "classification" else None
    try:
        return load_base(spec, num_labels, device=how["device"])
    except ModelError as error:
        raise AdapterError(
            f'The base model of "{folder}" is not available: {error.what}', "Pass model=."
        ) from error


def _load_level(
    folder: Path, model: nn.Module, trainable: bool, name: str = "default"
) -> nn.Module:
    from peft import PeftModel

    from reftune.model.adapters import adapter_names, discard
    from reftune.model.face import MEMBER  # importing it registers the PEFT type

    config = read_settings(folder / CONFIG)
    known = _known_peft_types()
    if config.get("peft_type") not in known:
        raise AdapterError(
            f'{folder} holds a "{config.get("peft_type")}" adapter, which this PEFT does not know.',
            f"Known: {', '.join(known)}.",
        )
    with opened(folder) as file:
        saved = set(file.keys())
    before = adapter_names(model)
    if config["peft_type"] != MEMBER:  # ours warns by itself, also when PEFT loads it
        noted = needs(folder).get("base_model")
        warn_other_base(config.get("base_model_name_or_path"), noted, model)
    try:
        loaded = PeftModel.from_pretrained(
            model, str(folder), adapter_name=name, is_trainable=trainable
        )
        _check_complete(loaded, saved, folder)
        keep_below_active(loaded)
    except (RuntimeError, ValueError, TypeError, KeyError, ReftuneError) as error:
        for name in set(adapter_names(model)) - set(before):
            discard(model, name)
        if isinstance(error, ReftuneError):
            raise
        raise AdapterError(
            f"The adapter in {folder} does not fit the model: {said(error)}",
            "Load it on the model it was trained on.",
        ) from error
    return loaded


def _known_peft_types() -> list[str]:
    from peft import PeftType

    return sorted(member.value for member in PeftType)


def _check_complete(model: nn.Module, saved: set[str], folder: Path) -> None:
    name = active_of(model)
    level = Part(model, name, kind_of(model), model.peft_config[name], is_level=True)
    check_tensors(saved, set(level.tensors()), folder)
