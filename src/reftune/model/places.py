"""What lies in a folder that was given as a base model, before any library looks at it."""

from __future__ import annotations

import json
from pathlib import Path

from reftune.errors import ModelError

ARTEFACTS = {
    "adapter": ("adapter_config.json",),
    "stack": ("stack.json",),
    "model": ("config.json",),
}
"""Folders of a run that hold what was trained, and the file that says so."""
REMEDY = "Give nano, a folder with config.json and weights, or a hub name (needs the network)."


def check_base_folder(folder: Path, name: str) -> None:
    """Refuse a folder that holds no base model, and say what it is.

    Args:
        folder: A folder that is there.
        name: What the user called it.

    Raises:
        ModelError: If there is no `config.json` in it.
    """
    if (folder / "config.json").is_file():
        return
    entries = {item.name for item in folder.iterdir()}
    if "state.json" in entries or "recipe.yaml" in entries:
        raise _no_base(folder, name)
    if "sweep.json" in entries:
        raise ModelError(f'"{name}" is a sweep.', f"Give one of its cells: {name}/CELL.")
    if "adapter_config.json" in entries:
        raise ModelError(
            f'"{name}" is an adapter, no base model.',
            f"Name the base model and write `adapter: {name}` beside it, under `model:`.",
        )
    if entries & {"adapter_model.safetensors", "adapter_model.bin"}:
        raise ModelError(
            f'"{name}" holds the weights of an adapter, but no adapter_config.json.',
            "Copy the whole folder.",
        )
    parts = sorted(entry for entry in entries if (folder / entry / "adapter_config.json").is_file())
    if parts:
        raise ModelError(
            f'"{name}" holds adapters ({", ".join(parts)}), but no stack.json.',
            f"Copy the whole stack, or give one adapter: {name}/{parts[0]}.",
        )
    what = "there is no config.json in it" if entries else "the folder is empty"
    raise ModelError(f'The model "{name}" could not be loaded: {what}.', REMEDY)


def _no_base(folder: Path, name: str) -> ModelError:
    """Return why a run folder cannot be a base model."""
    for place, (file,) in ARTEFACTS.items():
        if not (folder / place / file).is_file():
            continue
        if place == "model":
            return ModelError(f'"{name}" is a run.', f"Give the model in it: {name}/model.")
        return ModelError(
            f'"{name}" is a run with an adapter, no base model.',
            f"Write `model: {{name: BASE, adapter: {name}}}` with the base model of that run.",
        )
    if _status(folder) == "finished":
        return ModelError(
            f'"{name}" is a run without adapter/, stack/ or model/.',
            "Copy the whole run folder, or train it again.",
        )
    again = f"reftune train {folder / 'recipe.yaml'} --resume"
    return ModelError(
        f'"{name}" is an unfinished run: it holds no adapter yet.', f"Go on with: {again}"
    )


def _status(folder: Path) -> str:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return str(state.get("status", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def said(error: BaseException) -> str:
    """Return what an error says in one line: the first, and more if that ends in a colon.

    >>> said(ValueError("It needs one of:\\n (1) a file\\n (2) a name"))
    'It needs one of: (1) a file (2) a name'
    >>> said(ValueError("Wrong.\\nSee there."))
    'Wrong.'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines)[:400] if lines[0].endswith(":") else lines[0]
