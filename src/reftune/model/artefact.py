"""An artefact on disk: where it is, what it holds and what it needs, without loading it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from reftune.errors import AdapterError
from reftune.model.hub import download
from reftune.model.levels import refuse_foreign
from reftune.model.record import HEADS

STACK = "stack.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
KINDS = {"CAUSAL_LM": "causal", **HEADS}
"""PEFT's task types, and the heads they are trained with."""
SIDECAR = "reftune.json"
"""Beside adapters of other kinds: what our own config says of base model and adapter below."""


def resolve_folder(path: str | Path) -> Path:
    """Return the artefact's folder: itself, the one inside a run folder, or a hub download."""
    folder = Path(path).expanduser()
    found = _artefact_in(folder)
    if found is not None:
        return found
    if folder.exists():
        return folder
    if str(path).startswith((".", "/", "~")) or not _is_hub_path(str(path)):
        raise AdapterError(
            f'There is no adapter folder "{path}".',
            "Check the path; hub names are owner/name or owner/name@revision.",
        )
    folder = download(str(path))
    return _artefact_in(folder) or folder


def _artefact_in(folder: Path) -> Path | None:
    for inner in ("", "stack", "adapter", "model"):
        if any((folder / inner / name).is_file() for name in (CONFIG, STACK, "config.json")):
            return folder / inner
    return None


def _is_hub_path(path: str) -> bool:
    name = path.partition("@")[0]
    return name.count("/") == 1 and not Path(name).parent.exists()


def describe(path: str | Path) -> dict[str, Any]:
    """Return what an artefact is, without loading it."""
    folder = resolve_folder(path)
    refuse_foreign(folder)
    if (folder / STACK).is_file():
        base, found = read_stack(folder)
        order = [place.name for place, _ in found]
        return {"kind": "stack", "order": order, "base": base, "bytes": adapter_bytes(folder)}
    if (folder / CONFIG).is_file():
        config = read_settings(folder / CONFIG)
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


def adapter_bytes(path: str | Path) -> int:
    """Return the size of an artefact's weights in bytes."""
    return sum(file.stat().st_size for file in resolve_folder(path).rglob("*.safetensors"))


def trained_head(path: str | Path) -> str | None:
    """Return the head an artefact was trained with: causal, classification, seq2seq.

    Args:
        path: An adapter, a stack, a whole model, or a run folder.

    Returns:
        The head, or None where the artefact does not say.
    """
    folder = resolve_folder(path)
    if (folder / STACK).is_file():
        folder = read_stack(folder)[1][-1][0]
    if not (folder / CONFIG).is_file():
        return whole_head(folder) if (folder / "config.json").is_file() else None
    task = read_settings(folder / CONFIG).get("task_type")
    if task in KINDS:
        return KINDS[task]
    record = needs(folder).get("base_model") if task is None else None
    head = record.get("head") if isinstance(record, dict) else None
    return head if head in KINDS.values() else None


def whole_head(folder: Path) -> str | None:
    """Return the head that a whole model was saved with; None if its config names no class."""
    classes = read_settings(folder / "config.json").get("architectures") or [""]
    ends = {
        "ForSequenceClassification": "classification",
        "ForConditionalGeneration": "seq2seq",
        "": "causal" if classes[0] else None,
    }
    return next(head for end, head in ends.items() if str(classes[0]).endswith(end))


def stack_kinds(path: str | Path) -> dict[str, str]:
    """Return names and kinds of the adapters of a stack, as far as it notes them.

    Args:
        path: An artefact, or the folder of a run; what is no stack holds none.

    Raises:
        AdapterError: If its `stack.json` cannot be read.
    """
    folder = resolve_folder(path)
    noted = _read_order(folder)[1] if (folder / STACK).is_file() else []
    return {str(e["name"]): str(e["kind"]) for e in noted if {"name", "kind"} <= e.keys()}


def read_stack(folder: Path) -> tuple[str | None, list[tuple[Path, str]]]:
    """Return the base model's name, and folder and adapter name of a stack's parts from below."""
    base, entries = _read_order(folder)
    found = [(str(e.get("folder", "")), str(e.get("name", "default"))) for e in entries]
    for place, _ in found:
        if not re.fullmatch(r"[\w-]+", place) or not (folder / place / CONFIG).is_file():
            raise AdapterError(f"The stack {folder} lacks {place}/.", "Save the stack again.")
    return base, [(folder / place, name) for place, name in found]


def _read_order(folder: Path) -> tuple[str | None, list[dict[str, Any]]]:
    """Return the base model's name, and what a stack notes of its parts, from below."""
    values = read_settings(folder / STACK)
    order = values.get("order")
    if not isinstance(order, list) or not order:
        raise AdapterError(f"{STACK} in {folder} names no adapters.", "Save the stack again.")
    # Stacks written before a kind could stand in one twice list the folders alone.
    noted = [entry if isinstance(entry, dict) else {"folder": entry} for entry in order]
    return values.get("base"), noted


def needs(folder: Path) -> dict[str, Any]:
    """Return what an adapter says it needs: `base_model`, and `stacked_on` or nothing."""
    return read_settings(folder / (SIDECAR if (folder / SIDECAR).is_file() else CONFIG))


def num_labels_in(folder: Path) -> int | None:
    """Return the classes of the classification head saved beside an adapter, if there is one."""
    with opened(folder) as file:
        for key in file.keys():  # noqa: SIM118  (safetensors files are no mappings)
            if re.search(r"\.(score|classifier|classifier\.out_proj)\.weight$", key):
                return file.get_slice(key).get_shape()[0]
    return None


def read_settings(path: Path) -> dict[str, Any]:
    """Return what a JSON file of an artefact says.

    Raises:
        AdapterError: If it cannot be read, or holds something else than named values.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(
            f"{path.name} in {path.parent} cannot be read: {error}.", "Save it again."
        ) from error
    if not isinstance(values, dict):
        raise AdapterError(f"{path.name} in {path.parent} holds no settings.", "Save it again.")
    return values


def opened(folder: Path) -> Any:
    """Return the opened weights of an adapter.

    Raises:
        AdapterError: If they cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(folder / WEIGHTS, framework="pt")
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"The weights in {folder} cannot be read: {error}.", "Save the adapter again."
        ) from error
