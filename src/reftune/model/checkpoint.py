"""Saving and loading what was trained: PEFT artefacts, stacks of them, and whole models.

Everything is written to a temporary folder and renamed: a half-written artefact never stands under
the final name, and an old one is replaced only by a complete new one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from reftune.errors import AdapterError, ModelError, ReftuneError
from reftune.model.levels import active_of, base_name, kind_of, levels, model_card

STACK = "stack.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def save_adapter(
    model: nn.Module, folder: str | Path, figures: dict[str, Any] | None = None
) -> Path:
    """Save what is trained on a model.

    Args:
        model: A PeftModel, nested PeftModels (saved as a stack) or a plain model (saved whole).
        folder: Final folder; replaced as a whole once everything is written.
        figures: Figures of the run for the model card.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    temporary.chmod(_folder_mode())  # mkdtemp's own shuts out everybody else
    try:
        _write(model, temporary, figures or {})
        _replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


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


def _write(model: nn.Module, folder: Path, figures: dict[str, Any]) -> None:
    parts = levels(model)
    if not parts:
        model.save_pretrained(folder)
        return
    if len(parts) == 1:
        _write_level(parts[0], folder, None)
    else:
        order = [kind_of(part) for part in parts]
        for part, kind, below in zip(parts, order, [None, *order]):
            _write_level(part, folder / kind, below)
        text = json.dumps({"order": order, "base": base_name(parts[0])}, indent=2)
        (folder / STACK).write_text(text + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(parts, figures), encoding="utf-8")


def _write_level(level: nn.Module, folder: Path, below: str | None) -> None:
    """Write one PEFT adapter: its own tensors only, also when others hang on the same model."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    from reftune.model.site import CHILD

    folder.mkdir(parents=True, exist_ok=True)
    name = active_of(level)
    kind = kind_of(level)
    tensors = get_peft_model_state_dict(level, adapter_name=name, save_embedding_layers=False)
    tensors = {
        key: value.detach().cpu().contiguous().clone()
        for key, value in tensors.items()
        if (f".{CHILD}." in key) == (kind == "reft") or _is_head(level, key)
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = level.peft_config[name].to_dict()
    config.update(inference_mode=True, base_model_name_or_path=base_name(level))
    config["target_modules"] = _plain_targets(config.get("target_modules"))
    if kind == "reft":
        config["stacked_on"] = below
    config = {key: getattr(value, "value", value) for key, value in config.items()}
    text = json.dumps(config, indent=2, sort_keys=True, default=str)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def _is_head(level: nn.Module, key: str) -> bool:
    heads = getattr(level, "modules_to_save", None) or ()
    return any(f".{head}." in key for head in heads)


def _plain_targets(targets: Any) -> Any:
    return sorted(targets) if isinstance(targets, set | frozenset) else targets


def load_adapter(
    path: str | Path, model: nn.Module | None = None, trainable: bool = False, tokenizer: Any = None
) -> tuple[nn.Module, Any]:
    """Load an adapter, a stack or a whole model.

    Args:
        path: A folder, a run folder, or a hub name.
        model: The base model, if it is loaded already.
        trainable: Whether its parameters may be trained on.
        tokenizer: Returned as it is when `model` is given.

    Returns:
        (model, tokenizer); the tokenizer is None when only `model` was given.

    Raises:
        AdapterError: If the folder is not an adapter, is corrupted or does not fit the base model.
    """
    folder = resolve_folder(path)
    if (folder / STACK).is_file():
        base, parts = _read_stack(folder)
        model, tokenizer = _base_for(base, model, tokenizer, parts[0])
        for part in parts:
            model = _load_level(part, model, trainable)
        return model.eval(), tokenizer
    if not (folder / CONFIG).is_file():
        if (folder / "config.json").is_file() and model is None:
            from reftune.model.build import load_base

            return load_base(str(folder.resolve()))
        raise AdapterError(
            f'"{path}" is not an adapter: there is no {CONFIG}, {STACK} or config.json in it.',
            "Give a folder written by reftune or PEFT, or a run folder.",
        )
    config = _read_json(folder / CONFIG)
    model, tokenizer = _base_for(config.get("base_model_name_or_path"), model, tokenizer, folder)
    return _load_level(folder, model, trainable).eval(), tokenizer


def resolve_folder(path: str | Path) -> Path:
    """Return the artefact's folder: itself, the one inside a run folder, or a hub download."""
    folder = Path(path).expanduser()
    for inner in ("", "stack", "adapter", "model"):
        if any((folder / inner / name).is_file() for name in (CONFIG, STACK, "config.json")):
            return folder / inner
    if folder.exists():
        return folder
    if str(path).startswith((".", "/", "~")) or str(path).count("/") != 1 or folder.parent.exists():
        raise AdapterError(
            f'There is no adapter folder "{path}".', "Check the path; hub names are owner/name."
        )
    return _download(str(path))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise AdapterError(
            f'"{name}" is no local folder and could not be fetched from the hub '
            f"({type(error).__name__}).",
            "Check the name and the network.",
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(
            f"{path.name} in {path.parent} cannot be read: {error}.", "Save it again."
        ) from error
    if not isinstance(values, dict):
        raise AdapterError(f"{path.name} in {path.parent} holds no settings.", "Save it again.")
    return values


def _read_stack(folder: Path) -> tuple[str | None, list[Path]]:
    """Return the base model's name and the folders of a stack, innermost first."""
    values = _read_json(folder / STACK)
    order = values.get("order")
    if not isinstance(order, list) or not order:
        raise AdapterError(f"{STACK} in {folder} names no adapters.", "Save the stack again.")
    parts = [folder / str(part) for part in order]
    for part in parts:
        if not (part / CONFIG).is_file():
            raise AdapterError(f"The stack {folder} lacks {part.name}/.", "Save the stack again.")
    return values.get("base"), parts


def _base_for(
    name: str | None, model: nn.Module | None, tokenizer: Any, folder: Path
) -> tuple[nn.Module, Any]:
    """Return the base model the adapter in a folder needs."""
    if model is not None:
        return model, tokenizer
    if not name:
        raise AdapterError(f'"{folder}" does not say which base model it needs.', "Pass model=.")
    from reftune.config.recipe import ModelSpec
    from reftune.model.build import load_base

    task = _read_json(folder / CONFIG).get("task_type")
    head = {"SEQ_CLS": "classification", "SEQ_2_SEQ_LM": "seq2seq"}.get(task, "causal")
    num_labels = _num_labels(folder) if head == "classification" else None
    try:
        return load_base(ModelSpec(name=name, head=head), num_labels)
    except ModelError as error:
        raise AdapterError(
            f'The base model of "{folder}" is not available: {error.what}', "Pass model=."
        ) from error


def _num_labels(folder: Path) -> int | None:
    """Return the classes of the classification head saved beside an adapter, if there is one."""
    with _opened(folder) as file:
        for key in file.keys():  # noqa: SIM118  (safetensors files are no mappings)
            if re.search(r"\.(score|classifier|classifier\.out_proj)\.weight$", key):
                return file.get_slice(key).get_shape()[0]
    return None


def _opened(folder: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(folder / WEIGHTS, framework="pt")
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"The weights in {folder} cannot be read: {error}.", "Save the adapter again."
        ) from error


def _load_level(folder: Path, model: nn.Module, trainable: bool) -> nn.Module:
    from peft import PeftModel

    import reftune.model.face  # noqa: F401  (registers the PEFT type)
    from reftune.model.adapters import adapter_names, discard

    config = _read_json(folder / CONFIG)
    known = _known_peft_types()
    if config.get("peft_type") not in known:
        raise AdapterError(
            f'{folder} holds a "{config.get("peft_type")}" adapter, which this PEFT does not know.',
            f"Known: {', '.join(known)}.",
        )
    with _opened(folder) as file:
        saved = set(file.keys())
    before = adapter_names(model)
    try:
        loaded = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        _check_complete(loaded, saved, folder)
    except (RuntimeError, ValueError, TypeError, KeyError, ReftuneError) as error:
        for name in set(adapter_names(model)) - set(before):
            discard(model, name)
        if isinstance(error, ReftuneError):
            raise
        raise AdapterError(
            f"The adapter in {folder} does not fit the model: {str(error).splitlines()[0]}",
            "Load it on the model it was trained on.",
        ) from error
    return loaded


def _known_peft_types() -> list[str]:
    from peft import PeftType

    return sorted(member.value for member in PeftType)


def _check_complete(model: nn.Module, saved: set[str], folder: Path) -> None:
    from peft import get_peft_model_state_dict

    from reftune.model.site import CHILD

    present = set(
        get_peft_model_state_dict(model, adapter_name=active_of(model), save_embedding_layers=False)
    )
    ours = kind_of(model) == "reft"
    present = {key for key in present if (f".{CHILD}." in key) == ours or key in saved}
    if present != saved:
        lost, missing = sorted(saved - present), sorted(present - saved)
        raise AdapterError(
            f"The weights in {folder} do not match the adapter: {len(missing)} missing, "
            f"{len(lost)} without a place (first: {(missing or lost)[0]}).",
            "The folder is damaged, or the base model differs from the one it was trained on.",
        )


def adapter_bytes(path: str | Path) -> int:
    """Return the size of an artefact's weights in bytes."""
    return sum(file.stat().st_size for file in resolve_folder(path).rglob("*.safetensors"))


def describe(path: str | Path) -> dict[str, Any]:
    """Return what an artefact is, without loading it."""
    folder = resolve_folder(path)
    if (folder / STACK).is_file():
        order = _read_json(folder / STACK)
        return {"kind": "stack", **order, "bytes": adapter_bytes(folder)}
    if (folder / CONFIG).is_file():
        config = _read_json(folder / CONFIG)
        keys = ("method", "layers", "positions", "site", "tied", "intervention", "r")
        picked = {key: config[key] for key in keys if key in config}
        base = config.get("base_model_name_or_path")
        return {
            "kind": config.get("peft_type", "?").lower(),
            "base": base,
            **picked,
            "bytes": adapter_bytes(folder),
        }
    return {"kind": "model", "base": str(path), "bytes": adapter_bytes(folder)}
