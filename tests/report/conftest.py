"""Logging as it was: commands configure it for a stream that a test's capture closes."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def logging_as_it_was():
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
