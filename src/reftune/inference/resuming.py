"""Rows made some at a time into a file; a killed call goes on where it was.

What is done stands in `<file>.part`: a line with the settings, then a line for each chunk of rows,
appended and flushed as it is done. The file itself appears when all is done, whole or not at all.

Left out on purpose: two calls on one file at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from reftune.errors import DataError
from reftune.report.files import to_json, write_text_atomic

T = TypeVar("T")
Row = dict[str, Any]


def rows_to_file(
    path: str | os.PathLike[str],
    items: Sequence[T],
    make: Callable[[Sequence[T], int], list[Row]],
    settings: dict[str, Any],
    chunk: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Make rows of items into a JSONL file, some items at a time; return all rows.

    Args:
        path: The `.jsonl` file to write.
        items: What rows are made of.
        make: Makes the rows of some items; the number is the place of the first of them.
        settings: What the rows depend on: unfinished rows of others are not gone on with.
        chunk: Items a time.
        progress: Called with (items done, items in all).

    Raises:
        DataError: If the unfinished rows were made by other settings.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    chunks = _unfinished(part, {"settings": {**settings, "chunk": chunk}})
    with part.open("a", encoding="utf-8", newline="\n") as file:
        for start in range(chunk * len(chunks), len(items), chunk):
            some = items[start : start + chunk]
            chunks.append(make(some, start))
            file.write(to_json(chunks[-1]) + "\n")
            file.flush()
            os.fsync(file.fileno())
            progress(start + len(some), len(items))
    rows = [row for found in chunks for row in found]
    write_text_atomic(path, "".join(to_json(row) + "\n" for row in rows))
    part.unlink(missing_ok=True)
    return rows


def _unfinished(part: Path, head: Row) -> list[list[Row]]:
    """Return the chunks an earlier call has finished; leave the file ready to be appended to."""
    lines = part.read_bytes().splitlines(keepends=True) if part.is_file() else []
    whole = [line for line in lines if line.endswith(b"\n")]  # the last may be torn by a kill
    if not whole:
        write_text_atomic(part, to_json(head) + "\n")
        return []
    first, *done = map(json.loads, whole)
    if first != json.loads(to_json(head)):
        raise DataError(
            f"{part} was made by other settings.", "Use those, delete it, or choose another --out."
        )
    os.truncate(part, sum(map(len, whole)))
    return done
