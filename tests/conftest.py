"""Settings shared by all tests: no network, one thread, helpers importable from `tests/`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).parent
for folder in (HERE.parent, HERE):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import pytest  # noqa: E402
import shape_checks  # noqa: E402

shape_checks.install()


@pytest.fixture(autouse=True)
def _unchecked_where_compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave tests of compiled models, which say so in their name, without checks."""
    if "compiled" not in request.node.name:
        yield
        return
    with shape_checks.suspended():
        yield
