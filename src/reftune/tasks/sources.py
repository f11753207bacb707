"""Where rows come from: of a named task, local files or the hub; of own data, what a user names."""

from __future__ import annotations

import difflib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from reftune.errors import DataError
from reftune.tasks.files import LINE, SUFFIXES, Row, read_rows, suffix_of

log = logging.getLogger(__name__)

FOLDERS: tuple[str, ...] = ("", "math", "commonsense", "instruct", "glue")
"""Folders below `data_dir` that are looked into."""


@dataclass(frozen=True)
class Hub:
    """A data set on the Hugging Face hub.

    Attributes:
        name: `owner/name`.
        config: Configuration of the set.
        split: Its split; `a+b` joins two.
        revision: Branch, tag or commit. `refs/convert/parquet` is the hub's own conversion of
            sets that were published as a script.
    """

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        return f"{self.name}{config}@{self.split}"


@dataclass(frozen=True)
class Source:
    """Candidates for one split of a task.

    Attributes:
        files: File names without ending, best first; may hold a folder (`AddSub/test`).
        hub: Where the hub has the rows, if anywhere.
        note: What to do if they are nowhere, for the error.
    """

    files: tuple[str, ...] = ()
    hub: Hub | None = None
    note: str = ""


@dataclass(frozen=True)
class Rows:
    """Rows with the place they came from."""

    rows: list[Row]
    origin: str


def folder_of(data_dir: str | Path) -> Path:
    """Return the folder of local data; `~` and `$NAME` are filled in here, never in the recipe."""
    return Path(os.path.expandvars(data_dir)).expanduser()


def find_file(data_dir: str | Path, stems: tuple[str, ...]) -> Path | None:
    """Return the first file of these names below `data_dir`, whatever its format.

    Raises:
        DataError: If the folder does not exist.
    """
    root = folder_of(data_dir)
    if not root.is_dir():
        raise DataError(f'No folder "{root}".', "Check task.data_dir (--data-dir).")
    for stem in stems:
        for folder in FOLDERS:
            for suffix in SUFFIXES:
                path = root / folder / f"{stem}{suffix}"
                if path.is_file():
                    return path
    return None


def _describe(root: Path, stems: tuple[str, ...]) -> str:
    paths = [path for folder in FOLDERS for path in (root / folder).glob("*") if suffix_of(path)]
    files = {path.name.removesuffix(suffix_of(path) or ""): path.name for path in paths}
    close = [files[name] for stem in stems for name in difflib.get_close_matches(stem, files, n=2)]
    nearest = f"; nearest in name: {', '.join(dict.fromkeys(close))}" if close else ""
    return f"It has {len(files)} data file{'s' * (len(files) != 1)}{nearest}."


def load_source(source: Source, data_dir: str | None, task: str, split: str) -> Rows:
    """Return the rows of a source from `data_dir` if given, else from the hub.

    Raises:
        DataError: If they are in neither; the message says which file to supply.
    """
    if data_dir is not None:
        path = find_file(data_dir, source.files)
        if path is not None:
            log.info("%s %s: %s", task, split, path)
            return Rows(read_rows(path), str(path))
        wanted = ", ".join(f"{stem}.jsonl" for stem in source.files) or "(none is known)"
        raise DataError(
            f'No {split} file of task "{task}" in "{data_dir}". Looked for: {wanted}. '
            f"{_describe(folder_of(data_dir), source.files)}",
            source.note
            or "Put one of these files there (.jsonl, .jsonl.gz, .json, .csv, .parquet).",
        )
    if source.hub is None:
        names = ", ".join(f"{stem}.jsonl" for stem in source.files) or "none known"
        raise DataError(
            f'The {split} rows of task "{task}" are not on the hub.',
            f"Set task.data_dir (--data-dir) to a folder with one of: {names}. {source.note}",
        )
    return Rows(load_hub(source.hub), str(source.hub))


def load_hub(hub: Hub) -> list[Row]:
    """Return the rows of a hub data set.

    Raises:
        DataError: If the hub cannot be reached or has no such set, configuration or split.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(hub.name, hub.config, split=hub.split, revision=hub.revision)
    except Exception as error:  # the hub client raises errors of many unrelated classes
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"Cannot load {hub} from the hub: {type(error).__name__}: {reason[0][:200]}",
            "Check the name and the connection, or set task.data_dir to a folder with the files.",
        ) from error
    return [{**row, LINE: i} for i, row in enumerate(loaded, start=1)]


def required(name: str | None, split: str) -> str:
    """Return the name of the user's data for a split.

    Raises:
        DataError: If none is given.
    """
    if not name:
        raise DataError(
            f"task.{split} is not given.",
            f"Set task.{split} to a JSONL, CSV or parquet file, or a hub data set.",
        )
    return name


def read_named(name: str, split: str) -> Rows:
    """Return the rows of a file, or of a hub set `owner/name`, `owner/name:config@split`.

    Raises:
        DataError: If there are none, or they cannot be read.
    """
    if _is_file(name):
        path = Path(name).expanduser()
        return Rows(read_rows(path), str(path))
    hub = _hub(name, split)
    return Rows(load_hub(hub), str(hub))


def names_in(train: str) -> list[str]:
    """Return the names that tell whether data are meant for testing."""
    if _is_file(train):
        return [train]
    hub = _hub(train, "train")
    return [hub.split, *([hub.config] if hub.config else [])]


def _is_file(name: str) -> bool:
    return suffix_of(name) is not None or Path(name).expanduser().exists()


def _hub(name: str, split: str) -> Hub:
    base_name, _, given_split = name.partition("@")
    repository, _, config = base_name.partition(":")
    return Hub(repository, config or None, given_split or split)
