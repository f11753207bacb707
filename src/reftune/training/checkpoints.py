"""Checkpoints that are whole or absent, and the best weights of a run."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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
    damaged = 0
    for path in reversed(list_checkpoints(folder)):
        fault = damage(path)
        if fault is None:
            return path
        log.warning("%s is damaged: %s", path, fault)
        damaged += 1
    if damaged:
        log.warning("no checkpoint in %s is whole: training starts anew", folder)
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


def restore_best(folder: Path) -> None:
    """Put back the best weights that a kill caught while `publish` was replacing them.

    Those that were to come are lost; a resumed run makes them again.
    """
    old = folder / f".old-{BEST}"
    if old.is_dir() and not (folder / BEST).exists():
        os.replace(old, folder / BEST)


def best_of(folder: Path, history: Iterable[dict[str, Any]]) -> tuple[int, float] | None:
    """Return step and value of the best weights of a run that keeps them, or None.

    Args:
        folder: Folder of its checkpoints.
        history: Its log lines.

    Raises:
        TrainingError: If validation rows were scored and the weights are missing or damaged.
    """
    best = best_so_far(folder)
    if best is None and any("eval_loss" in line for line in history):
        raise _no_best(folder / BEST, "the folder is missing")
    return best


def best_so_far(folder: Path) -> tuple[int, float] | None:
    """Return step and value (loss or metric) of the best weights kept in `folder`, or None.

    Raises:
        TrainingError: If they are damaged.
    """
    place = folder / BEST
    if not place.is_dir():
        return None
    fault = damage(place)
    if fault is not None:
        raise _no_best(place, fault)
    try:
        found = json.loads((place / "best.json").read_text(encoding="utf-8"))
        return int(found["step"]), float(found.get("value", found.get("validation_loss")))
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise _no_best(place, f"best.json cannot be read ({error})") from error


def _no_best(place: Path, fault: str) -> TrainingError:
    return TrainingError(
        f"The best weights so far, {place}, are damaged: {fault}.",
        "Put the folder back from a copy, or start the run again with --overwrite: later weights "
        "would pass for the best.",
    )


def note_best(folder: Path, step: int, value: float, name: str) -> None:
    """Write beside the best weights when they were taken, and the value that chose them."""
    write_json_atomic(folder / "best.json", {"step": step, "value": value, "by": name})
