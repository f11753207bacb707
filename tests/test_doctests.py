"""The examples in docstrings do what they say, in every module that has some."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
PROMPT = ">>> "


def modules() -> list[str]:
    """Return the modules with examples, found in the files: nothing is left out by a list."""
    files = sorted(SOURCE.rglob("*.py"))
    with_some = [file for file in files if PROMPT in file.read_text(encoding="utf-8")]
    dotted = (".".join(file.relative_to(SOURCE).with_suffix("").parts) for file in with_some)
    return [name.removesuffix(".__init__") for name in dotted]


MODULES = modules()


@pytest.mark.quick
@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert found.failed == 0
    assert found.attempted > 0, "the examples stand where doctest does not look"


@pytest.mark.quick
def test_every_package_shows_examples():
    packages = {name.split(".")[1] for name in MODULES}
    wanted = "cli config inference interventions model nano report rewards tasks training"
    assert packages >= set(wanted.split())
