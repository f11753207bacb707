from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

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


@pytest.fixture
def hub(monkeypatch):
    """Replace the hub by a dict from (name, config, split) to rows; records what was asked."""
    sets: dict = {}
    asked: list = []

    def load_dataset(name, config=None, *, split, revision=None):
        asked.append((name, config, split, revision))
        if (name, config, split) not in sets:
            raise ConnectionError(f"cannot reach {name}")
        return sets[name, config, split]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return SimpleNamespace(sets=sets, asked=asked)
