"""Files that are either whole or absent.

Everything goes to a temporary name in the same folder, is flushed to the disk and then renamed, so
that a crash, a full disk or Ctrl-C never leaves a half-written file under the final name.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], suffix: str = "") -> Iterator[Path]:
    """Give a temporary path; rename it to `path` if the block succeeds, remove it if not.

    Args:
        path: Final name. Its folder is created.
        suffix: Ending of the temporary name, for writers that look at it (`.png`).

    Yields:
        A path in the same folder, so that the rename is atomic.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(_permissions(path))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def standing(path: str | os.PathLike[str]) -> Path:
    """Return a path, or the first folder above it that is there.

    >>> standing("/no-such-folder/runs/x")
    PosixPath('/')
    """
    place = Path(path).expanduser().absolute()
    return next(there for there in (place, *place.parents) if there.exists())


def write_text_atomic(path: str | os.PathLike[str], text: str) -> Path:
    """Write a UTF-8 text file, whole or not at all.

    >>> import tempfile, pathlib
    >>> target = pathlib.Path(tempfile.mkdtemp()) / "a" / "note.txt"
    >>> write_text_atomic(target, "hello").read_text()
    'hello'
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
    return Path(path)


def write_json_atomic(path: str | os.PathLike[str], value: Any, indent: int | None = 2) -> Path:
    """Write a JSON file, whole or not at all.

    Numbers that are not finite become `null`, because `NaN` is no JSON. Pydantic models, paths,
    sets and numpy or torch scalars are written as what they stand for.
    """
    return write_text_atomic(path, to_json(value, indent) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """Return strict JSON text.

    >>> to_json({"loss": float("nan"), "n": 3})
    '{"loss": null, "n": 3}'
    """
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def plain(value: Any) -> Any:
    """Reduce a value to dicts, lists, strings, numbers, booleans and None.

    Raises:
        TypeError: If a value has no such form.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "model_dump"):
        return plain(value.model_dump())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):  # one number of numpy or torch
        return plain(value.item())
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    raise TypeError(f"cannot write {type(value).__name__} as JSON: {value!r}")


def _permissions(path: Path) -> int:
    """Return the mode of the file being replaced, else what `open` would give.

    mkstemp makes files only their owner may read; a shared results folder needs the usual mode.
    """
    if path.exists():
        return path.stat().st_mode & 0o7777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
