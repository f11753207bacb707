"""JSON schema of recipes, for completion and checks in editors.

It describes the forms people write (`model: nano`, options beside `method`), reads methods, tasks
and objectives from their registries, and takes descriptions from the sentence under each field.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from pydantic import TypeAdapter

from reftune.config import options as registries
from reftune.config.recipe import (
    AdapterSpec,
    EvaluationSpec,
    HeftSpec,
    ModelSpec,
    OptimiserSpec,
    Recipe,
    StageSpec,
    TaskSpec,
)
from reftune.config.types import field_docs, field_types

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict[str, Any]:
    """Return the schema of a recipe as a plain dict.

    >>> schema()["title"]
    'reftune recipe'
    """
    stage = _stage()
    top = _properties(Recipe, skip=("model", "task", "stages", "heft", "evaluation"))
    top["track"] = {"anyOf": [top["track"], {"type": "string"}]} | _described(top["track"])
    top["model"] = _short(_object(_properties(ModelSpec)), {"type": "string"}, Recipe, "model")
    top["task"] = _task()
    top["evaluation"] = _evaluation(top["task"]) | _doc(Recipe, "evaluation")
    top["heft"] = _object(_properties(HeftSpec)) | _doc(Recipe, "heft")
    top["stages"] = {
        "type": "array",
        "minItems": 1,
        "items": _object(stage),
    } | _doc(Recipe, "stages")
    return {"$schema": DRAFT, "title": "reftune recipe", **_object({**top, **stage})}


def _evaluation(task: dict[str, Any]) -> dict[str, Any]:
    also = {"type": "object", "additionalProperties": task} | _doc(EvaluationSpec, "also")
    return _object({**_properties(EvaluationSpec, skip=("also",)), "also": also})


def _stage() -> dict[str, Any]:
    stage = _properties(StageSpec, skip=("adapter", "objective", "optimiser"))
    stage["adapter"] = _adapter()
    stage["optimiser"] = _object(_properties(OptimiserSpec)) | _doc(StageSpec, "optimiser")
    names = registries.objective_names()
    objective = _with_options("name", names, registries.objective_config, {})
    stage["objective"] = _short(objective, {"enum": names}, StageSpec, "objective")
    return stage


def _adapter() -> dict[str, Any]:
    own = _properties(AdapterSpec)
    names = registries.method_names()
    own["method"] |= {"enum": names}
    own["layers"] = {"type": ["string", "integer", "number", "array"]} | _described(own["layers"])
    full = _with_options("method", names, registries.method_config, own)
    return _short(full, {"enum": names}, StageSpec, "adapter")


def _task() -> dict[str, Any]:
    own = _properties(TaskSpec)
    names = registries.task_names()
    own["name"] |= {"enum": names}
    full = _with_options("name", names, registries.task_config, own)
    return _short(full, {"enum": names}, Recipe, "task")


def _with_options(
    key: str, names: list[str], config_of: Any, own: dict[str, Any]
) -> dict[str, Any]:
    """Return a mapping whose further keys depend on the name under `key`."""
    everything = {key: {"enum": names}, **own}
    cases = []
    for name in names:
        config = config_of(name)
        options = _properties(config) if config and is_dataclass(config) else {}
        for option, value in options.items():
            everything.setdefault(option, {"description": value.get("description", "")})
        allowed = {**dict.fromkeys([key, *own], True), **options}
        cases.append(
            {
                "if": {"properties": {key: {"const": name}}, "required": [key]},
                "then": {"properties": allowed, "additionalProperties": False},
            }
        )
    return {**_object(everything), "allOf": cases}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _short(full: dict[str, Any], short: dict[str, Any], cls: type, name: str) -> dict[str, Any]:
    """Allow a bare name instead of the mapping."""
    return {"anyOf": [short, full]} | _doc(cls, name)


def _doc(cls: type, name: str) -> dict[str, Any]:
    doc = field_docs(cls).get(name)
    return {"description": " ".join(doc.split())} if doc else {}


def _described(value: dict[str, Any]) -> dict[str, Any]:
    return {key: value[key] for key in ("description", "default") if key in value}


def _properties(cls: type, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a schema for each field of a dataclass, with description and default."""
    docs, kinds = field_docs(cls), field_types(cls)
    found: dict[str, Any] = {}
    for item in fields(cls):
        if item.name in skip or item.name not in kinds:
            continue
        entry = TypeAdapter(kinds[item.name]).json_schema()
        if item.name in docs:
            entry["description"] = " ".join(docs[item.name].split())
        default = _default(item)
        if default is not MISSING:
            entry["default"] = default
        found[item.name] = entry
    return found


def _default(item: Field) -> Any:
    if item.default_factory is not MISSING:
        return item.default_factory()
    return list(item.default) if isinstance(item.default, tuple) else item.default
