"""Look-alike files and small checks for the tests of tasks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from reftune import tasks
from reftune.config.recipe import TaskSpec


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write rows as JSON lines, gzipped if the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def make(name: str, data_dir: Path | None = None, **more):
    """Return a task with options; keys of TaskSpec go where they belong."""
    own = {key: more.pop(key) for key in list(more) if key in TaskSpec.__dataclass_fields__}
    folder = str(data_dir) if data_dir is not None else None
    return tasks.get(TaskSpec(name=name, data_dir=folder, options=more, **own))


def gold_accuracy(task, examples) -> float:
    """Return the mean main metric of the examples' own targets."""
    return sum(task.score(e.target, e)[task.metric] for e in examples) / len(examples)
