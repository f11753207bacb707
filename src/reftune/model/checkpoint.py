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

from reftune.errors import AdapterError, ModelError
from reftune.model.names import public_name

STACK = "stack.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def levels(model: nn.Module) -> list[nn.Module]:
    """Return the PEFT wrappers of a model, innermost (nearest to the base) first."""
    from peft import PeftModel

    found = []
    while isinstance(model, PeftModel):
        found.append(model)
        model = model.base_model.model if hasattr(model.base_model, "model") else model.base_model
    return found[::-1]


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
    try:
        _write(model, temporary, figures or {})
        _replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


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
    shutil.rmtree(old, ignore_errors=True)


def _write(model: nn.Module, folder: Path, figures: dict[str, Any]) -> None:
    parts = levels(model)
    if not parts:
        model.save_pretrained(folder)
        return
    if len(parts) == 1:
        _write_level(parts[0], folder, None)
    else:
        order = [_kind(part) for part in parts]
        for part, kind, below in zip(parts, order, [None, *order]):
            _write_level(part, folder / kind, below)
        text = json.dumps({"order": order, "base": _base_name(parts[0])}, indent=2)
        (folder / STACK).write_text(text + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(parts, figures), encoding="utf-8")


def _kind(level: nn.Module) -> str:
    kind = str(level.peft_config[_active(level)].peft_type.value).lower()
    return "reft" if kind == "reftune" else kind


def _active(level: nn.Module) -> str:
    active = level.active_adapter
    return active if isinstance(active, str) else active[0]


def _base_name(level: nn.Module) -> str | None:
    config = level.peft_config[_active(level)]
    name = config.base_model_name_or_path
    if not name:
        name = getattr(getattr(level.get_base_model(), "config", None), "_name_or_path", None)
    return public_name(name)


def _write_level(level: nn.Module, folder: Path, below: str | None) -> None:
    """Write one PEFT adapter: its own tensors only, also when others hang on the same model."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    from reftune.model.site import CHILD

    folder.mkdir(parents=True, exist_ok=True)
    name = _active(level)
    kind = _kind(level)
    tensors = get_peft_model_state_dict(level, adapter_name=name, save_embedding_layers=False)
    tensors = {
        key: value.detach().cpu().contiguous().clone()
        for key, value in tensors.items()
        if (f".{CHILD}." in key) == (kind == "reft") or _is_head(level, key)
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = level.peft_config[name].to_dict()
    config.update(inference_mode=True, base_model_name_or_path=_base_name(level))
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


def _card(parts: list[nn.Module], figures: dict[str, Any]) -> str:
    """Return the model card of an artefact."""
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {_base_name(parts[0])}",
        "tags: [reftune]",
        "---",
        "",
    ]
    title = " + ".join(_describe_level(part) for part in parts)
    lines += [f"# {title}", "", "```python", "import reftune", ""]
    lines += ['model, tokenizer = reftune.load("PATH OR HUB NAME OF THIS FOLDER")', "```", ""]
    if figures:
        lines += ["| figure | value |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in figures.items()]
        lines.append("")
    lines.append(
        "Trained with [reftune](https://pypi.org/project/reftune/). With plain PEFT, `import reftune.peft` first."
    )
    return "\n".join(lines) + "\n"


def _describe_level(level: nn.Module) -> str:
    config = level.peft_config[_active(level)]
    if _kind(level) != "reft":
        return str(config.peft_type.value)
    return f"{config.method} on layers {config.layers}, positions {config.positions}"


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
        order = _read_json(folder / STACK)
        model, tokenizer = _base_for(order.get("base"), model, tokenizer, path)
        for part in order["order"]:
            model = _load_level(folder / part, model, trainable)
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
    model, tokenizer = _base_for(
        config.get("base_model_name_or_path"), model, tokenizer, path, config
    )
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
            f'"{name}" is no local folder and could not be fetched from the hub ({type(error).__name__}).',
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


def _base_for(
    name: str | None,
    model: nn.Module | None,
    tokenizer: Any,
    path: Any,
    config: dict[str, Any] | None = None,
) -> tuple[nn.Module, Any]:
    """Return the base model an artefact needs."""
    if model is not None:
        return model, tokenizer
    if not name:
        raise AdapterError(f'"{path}" does not say which base model it belongs to.', "Pass model=.")
    from reftune.config.recipe import ModelSpec
    from reftune.model.build import load_base

    head = {"SEQ_CLS": "classification", "SEQ_2_SEQ_LM": "seq2seq"}.get(
        (config or {}).get("task_type"), "causal"
    )
    try:
        return load_base(ModelSpec(name=name, head=head))
    except ModelError as error:
        raise AdapterError(
            f'The base model of "{path}" is not available: {error.what}', "Pass model=."
        ) from error


def _load_level(folder: Path, model: nn.Module, trainable: bool) -> nn.Module:
    from peft import PeftModel
    from safetensors import SafetensorError, safe_open

    import reftune.model.face  # noqa: F401  (registers the PEFT type)

    config = _read_json(folder / CONFIG)
    known = _known_peft_types()
    if config.get("peft_type") not in known:
        raise AdapterError(
            f'{folder} holds a "{config.get("peft_type")}" adapter, which this PEFT does not know.',
            f"Known: {', '.join(known)}.",
        )
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            saved = set(file.keys())
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"The weights in {folder} cannot be read: {error}.", "Save the adapter again."
        ) from error
    try:
        loaded = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise AdapterError(
            f"The adapter in {folder} does not fit the model: {str(error).splitlines()[0]}",
            "Load it on the model it was trained on.",
        ) from error
    _check_complete(loaded, saved, folder)
    return loaded


def _known_peft_types() -> list[str]:
    from peft import PeftType

    return sorted(member.value for member in PeftType)


def _check_complete(model: nn.Module, saved: set[str], folder: Path) -> None:
    from peft import get_peft_model_state_dict

    from reftune.model.site import CHILD

    present = set(
        get_peft_model_state_dict(model, adapter_name=_active(model), save_embedding_layers=False)
    )
    ours = _kind(model) == "reft"
    present = {key for key in present if (f".{CHILD}." in key) == ours or key in saved}
    if present != saved:
        lost, missing = sorted(saved - present), sorted(present - saved)
        raise AdapterError(
            f"The weights in {folder} do not match the adapter: {len(missing)} missing, {len(lost)} without a place"
            f" (first: {(missing or lost)[0]}).",
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
