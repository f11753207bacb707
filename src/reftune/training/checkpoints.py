"""Checkpoints that are whole or absent, and the best weights of a run."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from reftune.errors import TrainingError
from reftune.report.files import write_json_atomic

log = logging.getLogger(__name__)

STAGING = ".writing"
STATE_FILE = "trainer_state.json"
BEST = "best"
MANIFEST = "files.json"
"""Names and sizes of a checkpoint's files."""
KEEP = 2
"""Checkpoints that stay: the newest, and the one before in case the newest is damaged."""
_NAME = re.compile(r"^checkpoint-(\d+)$")


def list_checkpoints(folder: Path) -> list[Path]:
    """Return complete checkpoints, oldest first. Half-written and foreign folders are ignored."""
    found = []
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        match = _NAME.match(path.name)
        if match and (path / STATE_FILE).is_file():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint, or None; damaged ones are named in a warning."""
    for path in reversed(list_checkpoints(folder)):
        fault = damage(path)
        if fault is None:
            return path
        log.warning("%s is damaged: %s; going on from before it", path, fault)
    return None


def damage(checkpoint: Path) -> str | None:
    """Return which file of a checkpoint is missing or of another size than it was, or None."""
    file = checkpoint / MANIFEST
    if not file.is_file():
        return None  # written by an earlier version
    try:
        sizes = json.loads(file.read_text(encoding="utf-8"))
        for name, size in sizes.items():
            found = checkpoint / name
            if not found.is_file():
                return f"{name} is missing"
            if found.stat().st_size != size:
                return f"{name} has {found.stat().st_size} bytes of {size}"
    except (OSError, ValueError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


@contextlib.contextmanager
def staging(folder: Path, what: str, is_main: bool = True) -> Iterator[Path]:
    """Give a folder to write into; remove what was written if that fails.

    Args:
        folder: Folder the result will stand in.
        what: What is being written, for the message.
        is_main: Whether this process cleans up.

    Raises:
        TrainingError: If writing failed (no space left, no permission). Earlier files are kept.
    """
    temporary = folder / STAGING
    try:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        yield temporary
    except Exception as error:  # torch and safetensors raise their own kinds when a disk is full
        raise TrainingError(
            f"Could not write {what}: {error}.",
            "Make space or choose another folder (output:), then continue with --resume. "
            "What was saved before is untouched.",
        ) from error
    finally:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)


def publish(source: Path, target: Path) -> None:
    """Flush a folder to the disk and give it its final name; an older one is replaced."""
    files = [path for path in source.rglob("*") if path.is_file()]
    sizes = {path.relative_to(source).as_posix(): path.stat().st_size for path in files}
    write_json_atomic(source / MANIFEST, sizes)
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    old = target.with_name(f".old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(source, target)
    shutil.rmtree(old, ignore_errors=True)


def rotate(folder: Path, keep: int = KEEP) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for path in list_checkpoints(folder)[:-keep]:
        old = path.with_name(f".old-{path.name}")
        os.replace(path, old)  # a kill in between must not leave half a checkpoint under its name
        shutil.rmtree(old, ignore_errors=True)


def best_so_far(folder: Path) -> tuple[int, float] | None:
    """Return step and value (loss or metric) of the best weights kept in `folder`, or None."""
    file = folder / BEST / "best.json"
    if not file.is_file():
        return None
    value = json.loads(file.read_text(encoding="utf-8"))
    return int(value["step"]), float(value.get("value", value.get("validation_loss")))


def note_best(folder: Path, step: int, value: float, name: str) -> None:
    """Write beside the best weights when they were taken, and the value that chose them."""
    write_json_atomic(folder / "best.json", {"step": step, "value": value, "by": name})
