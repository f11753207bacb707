"""Nodes into recipe dataclasses, noting every fault on the way."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from reftune.config import options as registries
from reftune.config.nodes import Faults, Node
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
from reftune.config.types import check, describe, field_types, hint, literals, show
from reftune.errors import ReftuneError

_NESTED = {"model", "task", "stages", "evaluation", "optimiser", "objective", "options"}
_NESTED |= {"objective_options", "heft", "also"}
"""Fields that are read by their own function."""
_HOMES = {
    **{item.name: "under `heft:`" for item in fields(HeftSpec)},
    **{item.name: "under `task:`" for item in fields(TaskSpec)},
    **{item.name: "under `evaluation:`" for item in fields(EvaluationSpec)},
    **{item.name: "under `optimiser:`" for item in fields(OptimiserSpec)},
    **{item.name: "under `adapter:`" for item in fields(AdapterSpec)},
    **dict.fromkeys(["rank", "dropout", "init", "alpha"], "under `adapter:`"),
    **{item.name: "beside `adapter:`" for item in fields(StageSpec)},
    **{item.name: "at the top level" for item in fields(Recipe)},
    "name": "",
}
"""Where a key belongs that was written somewhere else; later lines win."""
_OWN_WORDS = {"optimizer": "optimiser", "learning_rate": "lr", "eval": "evaluation", "data": "task"}


@dataclass
class Reader:
    """Reads nodes and remembers where each key stands and which keys are bad."""

    faults: Faults
    places: dict[str, Node] = field(default_factory=dict)
    bad: set[str] = field(default_factory=set)

    def fault(self, key: str, text: str, node: Node | None = None) -> None:
        """Note a fault at a dotted key; without a node, at the nearest written key above it."""
        self.bad.add(key)
        self.faults.add(node or self.place(key), key, text)

    def place(self, key: str) -> Node:
        """Return the node of a key, or of the nearest key above it that was written."""
        while key and key not in self.places:
            key = key.rpartition(".")[0]
        return self.places.get(key, Node(None))

    def section(self, cls: type, node: Node, key: str) -> dict[str, Any]:
        """Read the keys of a dataclass; keys it does not know are left in the node.

        Returns:
            Keyword arguments for the class, without the faulty ones.
        """
        self.places[key] = node
        if node.value is None:
            return {}
        if not isinstance(node.value, dict):
            known = ", ".join(field_types(cls))
            self.fault(key, f"{show(node.plain())} is no mapping. It may hold: {known}.", node)
            return {}
        found = {}
        for name, kind in field_types(cls).items():
            entry = node.value.get(name)
            below = join(key, name)
            if entry is None or name in _NESTED or is_dataclass(kind):
                continue
            self.places[below] = entry
            value, wrong = check(entry.plain(), kind)
            if wrong:
                self.fault(below, f"{wrong}.{_hint(value, kind)}", entry)
            else:
                found[name] = value
        return found

    def unknown(self, node: Node, key: str, known: Iterable[str]) -> None:
        """Note every key of a mapping that is not known."""
        if not isinstance(node.value, dict):
            return
        known = list(known)
        for name, entry in node.value.items():
            if name not in known:
                self.fault(join(key, name), _unknown(name, known, key), entry)

    def options(
        self, node: Node, key: str, own: Iterable[str], config: type | None, owner: str
    ) -> dict[str, Any]:
        """Read the keys that are not `own` as options of a method, task or objective.

        Args:
            node: The mapping they stand in.
            key: Its dotted key.
            own: Keys that belong to the mapping itself.
            config: Dataclass of the options; None accepts anything.
            owner: Who has the options, for messages.
        """
        if not isinstance(node.value, dict):
            return {}
        own = list(own)
        extra = {name: entry for name, entry in node.value.items() if name not in own}
        for name, entry in extra.items():
            self.places[join(key, name)] = entry
        if config is None:
            return {name: entry.plain() for name, entry in extra.items()}
        kinds = field_types(config) if is_dataclass(config) else {}
        found: dict[str, Any] = {}
        for name, entry in extra.items():
            below = join(key, name)
            if name not in kinds:
                text = _unknown(name, [*own, *kinds], key, listed=False)
                mine = f"Options of {owner}: {', '.join(kinds) or 'none'}."
                self.fault(below, f"{text} {mine}", entry)
                continue
            value, wrong = check(entry.plain(), kinds[name])
            if wrong:
                self.fault(below, f"{wrong}.{_hint(value, kinds[name])}", entry)
            else:
                found[name] = value
        self._construct(config, found, key)
        return found

    def _construct(self, config: type, found: dict[str, Any], key: str) -> None:
        """Let the config check its own values; blame the option its message starts with."""
        try:
            config(**found)
        except (ReftuneError, ValueError, TypeError) as error:
            text = f"{error.what} {error.remedy}" if isinstance(error, ReftuneError) else str(error)
            first = text.split()[0].strip("\"'`:,") if text.split() else ""
            self.fault(join(key, first) if first in found else key, text.strip())


def join(*parts: str) -> str:
    """Join dotted keys, leaving out empty ones."""
    return ".".join(part for part in parts if part)


def _hint(value: Any, kind: Any) -> str:
    """Name the nearest choice, or mend the commonest slips."""
    choices = literals(kind)
    if value is None:
        return " Write a value, or leave the key out."
    if choices and isinstance(value, str):
        return hint(value, choices, listed=False)
    if "text" in describe(kind) and isinstance(value, int | float | bool):
        return f' Put it in quotes: "{value}".'
    if isinstance(value, dict) and "text" in describe(kind):
        return " Put a template in quotes."
    if isinstance(value, str) and "number" in describe(kind) and _is_number(value):
        return f" Remove the quotes: {value}."
    return ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _unknown(name: str, known: list[str], key: str, listed: bool = True) -> str:
    """Say that a key is unknown: where it belongs, or the nearest one."""
    word = _OWN_WORDS.get(name, name)
    if name != word and word in known:
        return f'unknown key "{name}". Write "{word}".'
    home = _HOMES.get(word)
    if home and word not in known:
        return f'unknown key "{name}". "{word}" belongs {home}.'
    return f'unknown key "{name}".{hint(name, known, listed)}'


def read_recipe(root: Node, faults: Faults) -> tuple[Recipe, Reader]:
    """Read a canonical document.

    Returns:
        The recipe (with defaults where a value was faulty) and the reader, for further checks.
    """
    reader = Reader(faults)
    top = reader.section(Recipe, root, "")
    reader.unknown(root, "", [*field_types(Recipe), *field_types(StageSpec)])
    entries = root.value
    top["model"] = _plain_section(reader, ModelSpec, entries.get("model"), "model")
    top["evaluation"] = _plain_section(
        reader, EvaluationSpec, entries.get("evaluation"), "evaluation"
    )
    top["task"] = _task(reader, entries.get("task"))
    also = _also(reader, entries.get("evaluation"), top["task"])
    top["evaluation"] = replace(top["evaluation"], also=also)
    if entries.get("heft") is not None and entries["heft"].value is not None:
        top["heft"] = _plain_section(reader, HeftSpec, entries["heft"], "heft")
    top["stages"] = _stages(reader, entries["stages"])
    return Recipe(**top), reader


def _plain_section(reader: Reader, cls: type, node: Node | None, key: str) -> Any:
    if node is None:
        return cls()
    found = reader.section(cls, node, key)
    reader.unknown(node, key, field_types(cls))
    return cls(**found)


def _named(reader: Reader, names: Callable[[], list[str]], name: str, key: str, what: str) -> bool:
    """Note a fault if there is no such method, task or objective."""
    if key in reader.bad:
        return False
    known = names()
    if name in known:
        return True
    if name in registries.coming():
        text = f'the {what} "{name}" is coming; this version has not got it.{hint(name, known)}'
        reader.fault(key, text)
        return False
    text = f'there is no {what} "{name}".{hint(name, known)}'
    if what == "method" and name in registries.objective_names():
        text = f'"{name}" is an objective, no method. Write `objective: {name}` beside `adapter:`.'
    reader.fault(key, text)
    return False


def _task(
    reader: Reader, node: Node | None, key: str = "task", start: TaskSpec | None = None
) -> TaskSpec:
    """Read a task; what it leaves open is taken from `start`, if that is the same task."""
    start = start or TaskSpec()
    if node is None:
        return start
    found = reader.section(TaskSpec, node, key)
    name = found.get("name", start.name)
    if name != start.name:
        start = TaskSpec(name=name)
    known = _named(reader, registries.task_names, name, join(key, "name"), "task")
    config = registries.task_config(name) if known else None
    options = reader.options(node, key, field_types(TaskSpec), config, f"task {name}")
    return replace(start, **found, options={**start.options, **options})


def _also(reader: Reader, node: Node | None, task: TaskSpec) -> dict[str, TaskSpec]:
    """Read the further tasks that are scored."""
    values = node.value if node is not None else None
    entry = values.get("also") if isinstance(values, dict) else None
    if entry is None or entry.value is None:
        return {}
    key = "evaluation.also"
    reader.places[key] = entry
    if not isinstance(entry.value, dict):
        text = "is no mapping. Write names and what differs: `also: {new: {group: new}}`."
        reader.fault(key, f"{show(entry.plain())} {text}", entry)
        return {}
    for name, item in entry.value.items():
        if not re.fullmatch(r"[a-z0-9_]+", name):
            text = f"{show(name)} names a figure and a file. Use a-z, 0-9 and _."
            reader.fault(join(key, name), text, item)
    return {name: _task(reader, item, join(key, name), task) for name, item in entry.value.items()}


def _stages(reader: Reader, node: Node) -> list[StageSpec]:
    reader.places["stages"] = node
    if not isinstance(node.value, list) or not node.value:
        reader.fault(
            "stages", "is no list of stages. Write `stages:` and one `- ` per stage.", node
        )
        return [StageSpec()]
    return [_stage(reader, item, stage_key(node, i)) for i, item in enumerate(node.value)]


def stage_key(stages: Node, index: int) -> str:
    """Return the dotted key of a stage as the user wrote it: nothing for the short form."""
    return "" if stages.short else f"stages.{index}"


def _stage(reader: Reader, node: Node, key: str) -> StageSpec:
    found = reader.section(StageSpec, node, key)
    if not isinstance(node.value, dict):
        return StageSpec()
    if key:
        reader.unknown(node, key, field_types(StageSpec))
    if "adapter" in node.value:
        found["adapter"] = _adapter(reader, node.value["adapter"], join(key, "adapter"))
    if "objective" in node.value:
        found.update(_objective(reader, node.value["objective"], join(key, "objective")))
    optimiser = node.value.get("optimiser")
    found["optimiser"] = _plain_section(reader, OptimiserSpec, optimiser, join(key, "optimiser"))
    return StageSpec(**found)


def _adapter(reader: Reader, node: Node, key: str) -> AdapterSpec:
    found = reader.section(AdapterSpec, node, key)
    method = found.get("method", AdapterSpec.method)
    known = _named(reader, registries.method_names, method, join(key, "method"), "method")
    config = registries.method_config(method) if known else None
    own = field_types(AdapterSpec)
    return AdapterSpec(**found, options=reader.options(node, key, own, config, method))


def _objective(reader: Reader, node: Node, key: str) -> dict[str, Any]:
    reader.places[key] = node
    if not isinstance(node.value, dict):
        reader.fault(key, f"{show(node.plain())} is no objective. Write `objective: sft`.", node)
        return {}
    entry = node.value.get("name", node.like(StageSpec.objective))
    reader.places[join(key, "name")] = entry
    name = str(entry.plain())
    known = _named(reader, registries.objective_names, name, join(key, "name"), "objective")
    config = registries.objective_config(name) if known else None
    options = reader.options(node, key, ["name"], config, f"objective {name}")
    return {"objective": name, "objective_options": options}
