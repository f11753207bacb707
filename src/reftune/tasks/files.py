"""Reading rows from JSONL (also gzipped), JSON arrays, CSV, TSV and parquet.

Every fault names the file, the line and what to do. Rows are plain dicts; `__line__` holds the
1-based line (JSONL, CSV) or row (JSON, parquet) a row came from, so later faults can name it too.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from reftune.errors import DataError, nearest

Row = dict[str, Any]
LINE = "__line__"
SUFFIXES: tuple[str, ...] = (
    ".jsonl",
    ".jsonl.gz",
    ".json",
    ".json.gz",
    ".csv",
    ".csv.gz",
    ".tsv",
    ".tsv.gz",
    ".parquet",
)
"""What can be read."""


def suffix_of(path: str | Path) -> str | None:
    """Return the known suffix of a file name, or None.

    >>> suffix_of("a/train.jsonl.gz"), suffix_of("train.txt")
    ('.jsonl.gz', None)
    """
    name = Path(path).name.lower()
    found = [suffix for suffix in SUFFIXES if name.endswith(suffix)]
    return max(found, key=len) if found else None


def read_rows(path: str | Path) -> list[Row]:
    """Return the rows of a file.

    Args:
        path: A `.jsonl`, `.json`, `.csv` or `.tsv` file, plain or gzipped, or a `.parquet` file.

    Raises:
        DataError: If the file is missing, empty, of another kind, or a line cannot be read.
    """
    path = Path(path)
    suffix = suffix_of(path)
    if path.is_dir():
        raise DataError(f'"{path}" is a folder.', "Give a file in it.")
    if not path.is_file():
        if path.is_symlink():
            raise DataError(f'"{path}" is a link to nothing, or to itself.', "Mend the link.")
        raise DataError(f'No file "{path}".', _siblings(path))
    if suffix is None:
        raise DataError(
            f'Cannot tell the format of "{path.name}".',
            f"Give it one of these endings: {', '.join(SUFFIXES)}.",
        )
    try:
        rows = list(_READERS[suffix.removesuffix(".gz")](path))
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, OSError) as error:
        raise DataError(
            f'"{path}" cannot be read: {error}.',
            "Check that it is complete and UTF-8 text (gzipped if it ends in .gz).",
        ) from error
    if not rows:
        raise DataError(f'"{path}" is empty.', "Give a file with at least one row.")
    return rows


def _siblings(path: Path) -> str:
    if not path.parent.is_dir():
        return f'Its folder "{path.parent}" does not exist either; check the path.'
    there = [entry.name for entry in path.parent.iterdir() if suffix_of(entry)]
    if not there:
        return f'Its folder "{path.parent}" has no data files; check the path.'
    return nearest(path.name, there[:40])


def _open(path: Path) -> Any:
    opener = gzip.open if path.name.endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def _object(value: Any, path: Path, line: int) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f"{path}, line {line}: a row must be a JSON object, this is {_short(value)}.",
            'Write each row as {"field": value, ...}.',
        )
    return {**value, LINE: line}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Unusable(ValueError):
    """JSON that Python reads and nothing else can use, or that Python refuses."""


def _loads(text: str) -> Any:
    """Read JSON.

    Raises:
        json.JSONDecodeError: If it is malformed.
        _Unusable: If it is too deep, holds a number of thousands of digits, or half a character.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise _Unusable("JSON nested too deeply") from None
    except ValueError as error:
        raise _Unusable(f"a number that cannot be read ({error})") from None
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _Unusable("half a character (a lone surrogate, \\ud800 to \\udfff)") from None
    return value


def _read_jsonl(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                value = _loads(text)
            except _Unusable as error:
                raise DataError(
                    f"{path}, line {line}: {error}.", "Mend or delete this line."
                ) from error
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {line}: malformed JSON ({error.msg}, column {error.colno}): "
                    f"{_short(text.strip())}.",
                    "Write one complete JSON object a line; mend or delete this line.",
                ) from error
            yield _object(value, path, line)


def _read_json(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        text = file.read()
    if not text.strip():
        return
    try:
        value = _loads(text)
    except _Unusable as error:
        raise DataError(f"{path}: {error}.", "Mend the file.") from error
    except json.JSONDecodeError as error:
        hint = " It looks like JSON lines: name it .jsonl." if error.msg == "Extra data" else ""
        raise DataError(
            f"{path}, line {error.lineno}: malformed JSON ({error.msg}, column {error.colno}).",
            f"A .json file holds one array of objects.{hint}",
        ) from error
    if isinstance(value, dict):
        lists = [rows for rows in value.values() if isinstance(rows, list)]
        value = lists[0] if len(lists) == 1 else [value]
    for row, entry in enumerate(value, start=1):
        yield _object(entry, path, row)


def _read_csv(path: Path) -> Iterator[Row]:
    # A field may be longer than csv's default limit of 128 KiB (passages, chats).
    csv.field_size_limit(2**31 - 1)
    with _open(path) as file:
        is_tabbed = ".tsv" in (suffix_of(path) or "")
        reader = csv.DictReader(file, strict=True, delimiter="\t" if is_tabbed else ",")
        try:
            _refuse_doubled(reader.fieldnames or [], path)
            for row in reader:
                yield _csv_row(row, path, reader.line_num)
        except csv.Error as error:
            raise DataError(
                f"{path}, line {reader.line_num}: malformed CSV ({error}).",
                'Quote fields with commas, line breaks or quotes; double the inner quotes ("").',
            ) from error


def _refuse_doubled(names: Sequence[str], path: Path) -> None:
    doubled = sorted({name for name in names if list(names).count(name) > 1})
    if doubled:
        raise DataError(
            f"{path}, line 1: the column {', '.join(map(repr, doubled))} stands there twice.",
            "Give each column its own name.",
        )


def _csv_row(row: Row, path: Path, line: int) -> Row:
    if None in row or None in row.values():
        raise DataError(
            f"{path}, line {line}: this row has {'more' if None in row else 'fewer'} fields than "
            "the header.",
            "Quote fields that hold commas or line breaks.",
        )
    return {**row, LINE: line}


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(
            f'"{path}" is no parquet file: {error}.', "Write it again, or use .jsonl."
        ) from error
    for line, row in enumerate(rows, start=1):
        yield {**row, LINE: line}


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def place(row: Row, origin: str) -> str:
    """Return where a row stands, for messages.

    >>> place({"__line__": 3}, "train.jsonl")
    'train.jsonl, line 3'
    """
    return f"{origin}, line {row[LINE]}" if LINE in row else origin


def fields(row: Row) -> list[str]:
    """Return the field names of a row."""
    return [name for name in row if name != LINE]


def value(row: Row, field: str, origin: str) -> Any:
    """Return a field of a row.

    Raises:
        DataError: If the row lacks the field; the message names the nearest one it has.
    """
    if field not in row:
        raise DataError(f'{place(row, origin)}: no field "{field}".', nearest(field, fields(row)))
    return row[field]


def text(row: Row, field: str, origin: str) -> str:
    """Return a field as text; numbers and other values are written out.

    Raises:
        DataError: If the row lacks the field, or has null there.
    """
    return written(value(row, field, origin), field, place(row, origin))


def written(value: object, name: str, where: str) -> str:
    """Return the value of a field as text.

    Raises:
        DataError: If it is null: a text that is not there would be trained as an empty one.
    """
    if value is None:
        raise DataError(
            f'{where}: the field "{name}" is null.',
            'Fill it in, write "" where an empty text is meant, or take the row out of the data.',
        )
    return str(value)


def require(rows: Iterable[Row], names: Iterable[str], origin: str) -> None:
    """Check that every row has the named fields.

    Raises:
        DataError: For the first row that lacks one.
    """
    wanted = tuple(names)
    for row in rows:
        for name in wanted:
            value(row, name, origin)


def from_json(given: Any) -> Any:
    """Return what a text field holds as JSON, or the field itself: CSV knows text only.

    >>> from_json("[1, 2]"), from_json("one"), from_json(3)
    ([1, 2], 'one', 3)
    """
    try:
        return json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError:
        return given
