from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest


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
