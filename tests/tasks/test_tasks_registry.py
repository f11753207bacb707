from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import reftune.tasks as package
from reftune import rewards, tasks
from reftune.config.recipe import TaskSpec
from reftune.errors import DataError, RecipeError
from reftune.tasks.base import Example, Task, sample

pytestmark = pytest.mark.quick
DOCS = Path(__file__).parents[2] / "docs" / "tasks.md"
MODULES = [f"reftune.tasks.{module.name}" for module in pkgutil.iter_modules(package.__path__)]


@pytest.mark.parametrize("name", ["reftune.tasks", *MODULES])
def test_doctests(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_task_says_what_it_is():
    rows = tasks.describe()
    assert len(rows) >= 35
    for row in rows:
        assert row["kind"] in ("generation", "choice", "classification")
        assert row["about"].endswith(".")
        task = tasks.task_class(row["name"])
        assert task.name == row["name"]


def test_unknown_tasks_are_refused_with_the_nearest_name():
    with pytest.raises(RecipeError, match='no task "gsm8"'):
        tasks.get(TaskSpec(name="gsm8"))


class Mine(Task):
    """A task of another package."""

    name = "mine"

    def rows_of(self, split):
        return [Example("0", "a", "b" if split == "train" else "", "b")]

    def extract(self, text, example):
        return text

    def score(self, text, example):
        return {"accuracy": float(text == example.answer)}


def test_a_task_of_ones_own(monkeypatch):
    monkeypatch.setattr(tasks.REGISTRY, "_targets", dict(tasks.REGISTRY._targets))
    tasks.register("mine", f"{__name__}:Mine")
    task = tasks.get(TaskSpec(name="mine"))
    assert task.load("test")[0].answer == "b"
    assert task.aggregate([], [], []) == {}
    with pytest.raises(DataError, match='no split "dev"'):
        task.load("dev")


def test_training_rows_without_target_are_refused(monkeypatch):
    monkeypatch.setattr(Mine, "rows_of", lambda self, split: [Example("7", "a", " ", "b")])
    with pytest.raises(DataError, match=r"Row 7 of task .* has no target"):
        Mine(TaskSpec(name="mine")).load("train")
    monkeypatch.setattr(Mine, "rows_of", lambda self, split: [])
    with pytest.raises(DataError, match="has no test rows"):
        Mine(TaskSpec(name="mine")).load("test")


def test_sizes_below_one_are_refused():
    with pytest.raises(RecipeError, match="A size of 0"):
        sample([Example("0", "", "", "")], 0, 0, shuffled=True)


def test_listing_tasks_imports_nothing_heavy():
    code = (
        "import sys; from reftune import tasks; tasks.describe(); "
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.skipif(not DOCS.is_file(), reason="the docs are not beside the tests")
def test_the_docs_name_every_task_and_reward_and_their_examples_load():
    text = DOCS.read_text(encoding="utf-8")
    for name in tasks.names():
        assert f"`{name}`" in text, name
    for name in rewards.names():
        assert f"`{name}`" in text, name
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        given = yaml.safe_load(block)["task"]
        given = {"name": given} if isinstance(given, str) else given
        own = {key: given.pop(key) for key in list(given) if key in TaskSpec.__dataclass_fields__}
        tasks.get(TaskSpec(**own, options=given))
