"""The short ways to write a recipe, brought into one form.

After `canonical` every document looks alike: `model`, `task` and `objective` are mappings with a
`name`, `adapter` is a mapping with a `method`, stages are a list, and options of methods, tasks and
objectives stand beside that name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from reftune.config.nodes import Faults, Node
from reftune.config.recipe import Recipe, StageSpec

STAGE_KEYS = tuple(item.name for item in fields(StageSpec))
RECIPE_KEYS = tuple(item.name for item in fields(Recipe))


def canonical(root: Node, faults: Faults) -> Node:
    """Rewrite all shorthands in place and return the document.

    Both `stages` and stage keys at the top level is a fault: it would be unclear who wins.
    """
    if not isinstance(root.value, dict):
        faults.add(
            root, "", "a recipe is a mapping such as `model: nano`. Write `key: value` lines."
        )
        return root.like({})
    top = root.value
    short = {key: top.pop(key) for key in [key for key in top if key in STAGE_KEYS]}
    if "stages" not in top:
        top["stages"] = root.like([root.like(short)])
        top["stages"].short = True
    elif short:
        for key, node in short.items():
            faults.add(node, key, f"stands beside `stages`. Move `{key}` into each stage.")
    _named(top, "model", "name")
    _named(top, "task", "name")
    _hoist(top.get("task"), "options")
    _also(top.get("evaluation"))
    if isinstance(top["stages"].value, list):
        for stage in top["stages"].value:
            _stage(stage)
    if "track" in top and isinstance(top["track"].value, str):
        top["track"] = top["track"].like([top["track"]])
    return root


def _also(evaluation: Node | None) -> None:
    """Write the tasks under `evaluation.also` as `task` is written."""
    values = evaluation.value if evaluation is not None else None
    also = values.get("also") if isinstance(values, dict) else None
    if also is None or not isinstance(also.value, dict):
        return
    for name in list(also.value):
        _named(also.value, name, "name")
        _hoist(also.value.get(name), "options")


def _stage(stage: Node) -> None:
    if not isinstance(stage.value, dict):
        return
    _named(stage.value, "adapter", "method")
    _named(stage.value, "objective", "name")
    adapter = stage.value.get("adapter")
    _hoist(adapter, "options")
    if adapter is not None and isinstance(adapter.value, dict):
        _layers(adapter.value)
    options = stage.value.pop("objective_options", None)
    if options is not None:
        objective = stage.value.setdefault("objective", options.like({}))
        if isinstance(objective.value, dict):
            objective.value["objective_options"] = options
            _hoist(objective, "objective_options")


def _named(entries: dict[str, Node], key: str, name: str) -> None:
    """Turn `key: text` into `key: {name: text}` and drop `key: null`."""
    node = entries.get(key)
    if node is None:
        return
    if node.value is None:
        del entries[key]
    elif isinstance(node.value, str):
        entries[key] = node.like({name: node})


def _hoist(node: Node | None, options: str) -> None:
    """Move the entries of `options:` beside the name, where they are usually written."""
    if node is None or not isinstance(node.value, dict):
        return
    held = node.value.get(options)
    if held is None or not isinstance(held.value, dict | None):
        return
    del node.value[options]
    for key, item in (held.value or {}).items():
        node.value.setdefault(key, item)


def _layers(adapter: dict[str, Node]) -> None:
    """Accept `layers: 5`, and lists that mix numbers with ranges."""
    node = adapter.get("layers")
    if node is None or isinstance(node.value, bool):
        return
    if isinstance(node.value, int):
        adapter["layers"] = node.like([node])
    elif isinstance(node.value, float):
        adapter["layers"] = node.like(str(node.value))
    elif isinstance(node.value, list):
        items = [item.value for item in node.value]
        if any(isinstance(item, str) for item in items):
            adapter["layers"] = node.like(",".join(str(item) for item in items))


def route(path: list[str], root: Node) -> list[str]:
    """Turn a shorthand override path into its place in the canonical document.

    Raises:
        LookupError: If `adapter.rank` could mean several stages.
    """
    if path[0] in STAGE_KEYS:
        stages = root.value["stages"].value
        count = len(stages) if isinstance(stages, list) else 0
        if count != 1:
            text = ".".join(path)
            raise LookupError(f"the recipe has {count} stages. Write stages.0.{text} or another.")
        path = ["stages", "0", *path]
    if path[0] == "stages" and path[2:3] == ["objective_options"]:
        path = [*path[:2], "objective", *path[3:]]
    parent = path[-3:-2] if len(path) >= 3 else []
    if path[-2:-1] == ["options"] and parent[0:1] in (["adapter"], ["task"]):
        path = [*path[:-2], path[-1]]
    return path


def known_keys(path: list[str]) -> Iterable[str]:
    """Name the keys that may follow `path`; nothing where any key may."""
    if not path:
        return (*RECIPE_KEYS, *STAGE_KEYS)
    if path[0] == "stages" and len(path) == 2:
        return STAGE_KEYS
    return ()
