"""The catalogue: nine published systems, and everything the registries hold.

A system is an intervention, an objective or a recipe. Whether it is available is not written here
but looked up: its registry entry or its recipe is there or not.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from reftune.config import options
from reftune.config.shipped import shipped

Kind = Literal["intervention", "objective", "recipe", "baseline"]


@dataclass(frozen=True)
class Method:
    """One line of the catalogue."""

    name: str
    kind: Kind
    title: str
    about: str
    file: str
    """Where it is written, `interventions/loreft.py`; empty while it is coming."""
    recipe: str
    """A recipe that shows it; empty if there is none."""
    source: str
    """The paper."""
    status: Literal["available", "coming"]
    system: bool = False
    """Whether it is one of the nine published systems."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


_SYSTEMS: tuple[tuple[str, Kind, str, str, str], ...] = (
    (
        "loreft",
        "intervention",
        "LoReFT",
        "low-rank linear edits of hidden states at a few prompt tokens",
        "Wu, Arora et al. 2024, arXiv 2404.03592",
    ),
    (
        "brep",
        "objective",
        "BREP",
        "scale and bias on reasoning prefixes, with a restrained bias: mathematics",
        "Liang et al. 2025, arXiv 2511.10707",
    ),
    (
        "baft",
        "intervention",
        "BaFT",
        "one input-dependent weight per basis vector: knowledge editing",
        "Liu et al. 2025, arXiv 2503.00306",
    ),
    (
        "grun",
        "intervention",
        "GRUN",
        "a gate that recognises and an edit that suppresses: unlearning",
        "Ren et al. 2025, arXiv 2502.17823",
    ),
    (
        "reinforced",
        "objective",
        "ReFT (reinforced)",
        "warm-up, then PPO on answer rewards",
        "Luong et al. 2024, arXiv 2401.08967",
    ),
    (
        "carft",
        "objective",
        "CARFT",
        "contrastive learning with annotated reasoning on top of PPO",
        "Zhu et al. 2025, arXiv 2508.15868",
    ),
    (
        "nlft",
        "objective",
        "NLFT",
        "token weights from probabilities under natural-language guidance",
        "Liu et al. 2024, arXiv 2412.20382",
    ),
    (
        "heft",
        "recipe",
        "HEFT",
        "LoRA first, then LoReFT on top: coarse to fine",
        "Hill 2025, arXiv 2509.09801",
    ),
    (
        "logad",
        "recipe",
        "LogAD-ReFT",
        "LoRA or ReFT for the detection of anomalies in logs",
        "Lim, Zhu and Pang 2025, arXiv 2503.08045",
    ),
)

_RECIPES: tuple[tuple[str, Kind, str, str, str], ...] = (
    (
        "offline_st",
        "recipe",
        "Offline self-training",
        "right answers of a warm-up as training data of the base",
        "Luong et al. 2024, arXiv 2401.08967",
    ),
)
"""Further methods that are recipes: no registry lists them."""


def catalogue() -> list[Method]:
    """Return the nine systems, then every other registered method, objective and recipe.

    >>> [method.name for method in catalogue() if method.system][:3]
    ['loreft', 'brep', 'baft']
    """
    targets = {kind: _targets(kind) for kind in ("intervention", "objective")}
    found = [_system(entry, targets) for entry in _SYSTEMS]
    listed = {(method.kind, method.name) for method in found}
    for kind, known in targets.items():
        for name, target in known.items():
            if (kind, name) not in listed:
                found.append(_registered(kind, name, target))
    found += [replace(_system(entry, targets), system=False) for entry in _RECIPES]
    for name, (about, _) in options.OTHER_METHODS.items():
        title = {"lora": "LoRA", "full": "Full fine-tuning", "head_only": "Head only"}.get(
            name, name
        )
        source = "Hu et al. 2021, arXiv 2106.09685" if name == "lora" else ""
        file = "model/build.py"
        found.append(
            Method(name, "baseline", title, about, file, _recipe(name), source, "available")
        )
    return found


def tasks() -> list[dict[str, str]]:
    """Return name, kind, metric and first sentence of every registered task."""
    rows = []
    for name in options.task_names():
        cls = options.task_class(name)
        doc = (getattr(cls, "__doc__", "") or "").strip()
        rows.append(
            {
                "name": name,
                "kind": str(getattr(cls, "kind", "")),
                "metric": str(getattr(cls, "metric", "")),
                "about": " ".join(doc.split("\n\n")[0].split()).rstrip("."),
            }
        )
    return rows


def _system(entry: tuple[str, Kind, str, str, str], targets: dict[str, dict[str, str]]) -> Method:
    name, kind, title, about, source = entry
    target = targets.get(kind, {}).get(name, "")
    recipe = _recipe(name)
    there = bool(target) if kind != "recipe" else bool(recipe)
    file = _file(target) if kind != "recipe" else (f"recipes/{recipe}.yaml" if recipe else "")
    status = "available" if there else "coming"
    return Method(name, kind, title, about, file, recipe, source, status, system=True)


def _registered(kind: str, name: str, target: str) -> Method:
    facts = _facts(target)
    return Method(
        name=name,
        kind=kind,
        title=facts.get("title") or name,
        about=facts.get("about", ""),
        file=_file(target),
        recipe=_recipe(name),
        source=facts.get("source", ""),
        status="available",
    )


def _targets(kind: str) -> dict[str, str]:
    """Return name to `module:Class` without importing the classes: listing must not load torch."""
    registry = importlib.import_module(f"reftune.{kind}s").REGISTRY
    return {name: registry.target(name) for name in registry.names()}


def _file(target: str) -> str:
    module = target.partition(":")[0]
    if not module:
        return ""
    return module.removeprefix("reftune.").replace(".", "/") + ".py"


@cache
def _measured() -> dict[str, str]:
    """Return the first recipe that was run here for each method, without loading the methods."""
    found: dict[str, str] = {}
    for item in shipped():
        values = yaml.safe_load(item.path.read_text(encoding="utf-8"))
        if "stages" in values or item.measured.startswith("not run here"):
            continue  # several stages show how methods go together, none of them by itself
        adapter = values.get("adapter") or {}
        method = adapter if isinstance(adapter, str) else adapter.get("method", "")
        found.setdefault(method, item.name)
    return found


def _recipe(name: str) -> str:
    """Return the shipped recipe that shows a method: run here with it, called or beginning so."""
    if name in _measured():
        return _measured()[name]
    names = [item.name for item in shipped()]
    parts = {recipe: recipe.rpartition("/")[2] for recipe in names}
    exact = [recipe for recipe, last in parts.items() if last == name]
    begins = [recipe for recipe, last in parts.items() if last.startswith((f"{name}_", f"{name}-"))]
    inside = [recipe for recipe in names if recipe.startswith(f"{name}/")]
    return next(iter([*exact, *begins, *inside]), "")


@cache
def _facts(target: str) -> dict[str, str]:
    """Read title, source and first sentence of a class from its file, without importing it."""
    module, _, name = target.partition(":")
    try:
        spec = importlib.util.find_spec(module)
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except (ImportError, AttributeError, OSError, SyntaxError, TypeError, ValueError):
        return {}
    classes: Iterable[ast.ClassDef] = (
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name
    )
    for node in classes:
        facts = {"about": _sentence(ast.get_docstring(node) or ast.get_docstring(tree) or "")}
        for line in node.body:
            if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant):
                facts.update({str(goal.id): str(line.value.value) for goal in line.targets})
        return facts
    return {}


def _sentence(doc: str) -> str:
    return " ".join(doc.split("\n\n")[0].split()).rstrip(".")
