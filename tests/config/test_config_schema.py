"""The JSON schema, value checks, and shipped recipes."""

from __future__ import annotations

import json
from typing import Literal

import pytest

from reftune.config import shipped
from reftune.config.loader import load
from reftune.config.recipe import (
    AdapterSpec,
    EvaluationSpec,
    ModelSpec,
    OptimiserSpec,
    Recipe,
    StageSpec,
    TaskSpec,
)
from reftune.config.schema import schema
from reftune.config.types import check, describe, field_docs, hint
from reftune.errors import RecipeError
from reftune.interventions import names

pytestmark = pytest.mark.quick


def test_schema_is_plain_json_and_knows_the_registries():
    made = json.loads(json.dumps(schema()))
    adapter = made["properties"]["adapter"]["anyOf"]
    assert set(names()) <= set(adapter[0]["enum"])
    cases = {case["if"]["properties"]["method"]["const"]: case for case in adapter[1]["allOf"]}
    assert "rank" in cases["loreft"]["then"]["properties"]
    assert "rank" not in cases["red"]["then"]["properties"]
    assert "families" in made["properties"]["task"]["anyOf"][0]["enum"]
    assert made["additionalProperties"] is False


def test_schema_describes_every_key_people_write():
    made = schema()
    for key in ("name", "seed", "epochs", "batch_size", "threads", "adapter", "model", "objective"):
        assert made["properties"][key].get("description"), key
    optimiser = made["properties"]["optimiser"]["properties"]
    assert optimiser["lr"]["description"] == "Peak learning rate."
    assert optimiser["betas"]["default"] == [0.9, 0.999]


def test_every_recipe_field_has_a_sentence():
    for spec in (
        Recipe,
        ModelSpec,
        TaskSpec,
        StageSpec,
        AdapterSpec,
        OptimiserSpec,
        EvaluationSpec,
    ):
        assert set(field_docs(spec)) == set(spec.__dataclass_fields__)


@pytest.mark.parametrize(
    ("value", "kind", "wrong"),
    [
        (3, float, ""),
        (True, int, "true is not a whole number"),
        ("3", int, '"3" is not a whole number'),
        (3.5, int, "3.5 is not a whole number"),
        ([1, 2], tuple[float, float], ""),
        ([1], tuple[float, float], "[1] is not a list of 2 numbers"),
        (None, int | None, ""),
        ("c", Literal["a", "b"], '"c" is not "a" or "b"'),
        (["a"], list[int], '["a"] is not a list of whole numbers'),
        ({1: object()}, str, "is not text"),
    ],
)
def test_check(value, kind, wrong):
    assert (wrong in check(value, kind)[1]) if wrong else check(value, kind)[1] == ""


def test_words():
    assert describe(str | list[int] | None) == "text, a list of whole numbers or null"
    assert hint("rnak", ["rank", "alpha"]) == ' Did you mean "rank"? Known: alpha, rank.'
    many = [f"key{i}" for i in range(20)]
    assert hint("kei1", many) == ' Did you mean "key1"?'
    assert hint("zzz", many, listed=False) == ""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    root = tmp_path / "recipes"
    (root / "grids").mkdir(parents=True)
    (root / "nano").mkdir()
    head = "# A title\n# reftune train it\n# measured: 0.7 in 3 min,\n# one core\n# source: paper\n"
    (root / "nano" / "sums.yaml").write_text(head + "task: families\n", encoding="utf-8")
    (root / "grids" / "g.yaml").write_text("rows: []\n", encoding="utf-8")
    monkeypatch.setattr(shipped, "PLACES", (tmp_path / "none", root))
    return root


def test_shipped_recipes_are_listed_with_their_header(folder):
    (item,) = shipped.shipped()
    assert (item.name, item.title) == ("nano/sums", "A title")
    assert item.measured == "0.7 in 3 min, one core"


def test_find_takes_paths_and_names(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    file = folder / "nano" / "sums.yaml"
    assert shipped.find("nano/sums") == shipped.find("sums") == file
    assert shipped.find("recipes/nano/sums.yaml") == file  # as the repository names it
    assert shipped.find(str(file)) == file
    with pytest.raises(RecipeError, match=r'recipe "nano/sum"\. Did you mean "nano/sums"'):
        shipped.find("nano/sum")


def test_every_shipped_recipe_is_right():
    found = shipped.shipped()
    assert len(found) >= 5
    for item in found:
        load(item.path)
        assert item.title, item.name
