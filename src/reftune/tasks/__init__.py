"""Tasks: data, prompt, extraction and metric of each benchmark, and of the user's own data.

A task of your own is a subclass of `Task` and one line: `register("mine", "my_package:Mine")`, or
an entry point in the group `reftune.tasks`.
"""

from __future__ import annotations

from reftune.config.recipe import TaskSpec
from reftune.registry import Registry
from reftune.tasks.base import Example, Task

__all__ = ["REGISTRY", "Example", "Task", "describe", "get", "names", "register", "task_class"]

_MATH, _COMMON, _GLUE = "reftune.tasks.math", "reftune.tasks.commonsense", "reftune.tasks.glue"

_TARGETS = {
    "own": "reftune.tasks.own:Own",
    "judged": "reftune.tasks.judged:Judged",
    "families": "reftune.tasks.families:Families",
    "passages": "reftune.tasks.passages:Passages",
    "facts": "reftune.tasks.facts:Facts",
    "gsm8k": f"{_MATH}:Gsm8k",
    "gsm_hard": f"{_MATH}:GsmHard",
    "svamp": f"{_MATH}:Svamp",
    "mawps": f"{_MATH}:Mawps",
    "addsub": f"{_MATH}:AddSub",
    "multiarith": f"{_MATH}:MultiArith",
    "singleeq": f"{_MATH}:SingleEq",
    "aqua": f"{_MATH}:Aqua",
    "mathqa": f"{_MATH}:MathQa",
    "mathqa_numeric": f"{_MATH}:MathQaNumeric",
    "asdiv": f"{_MATH}:AsDiv",
    "math10k": f"{_MATH}:Math10k",
    "boolq": f"{_COMMON}:BoolQ",
    "piqa": f"{_COMMON}:Piqa",
    "siqa": f"{_COMMON}:Siqa",
    "hellaswag": f"{_COMMON}:HellaSwag",
    "winogrande": f"{_COMMON}:WinoGrande",
    "arc_easy": f"{_COMMON}:ArcEasy",
    "arc_challenge": f"{_COMMON}:ArcChallenge",
    "obqa": f"{_COMMON}:Obqa",
    "commonsense": f"{_COMMON}:Commonsense170k",
    "boolq_passage": "reftune.tasks.boolq_passage:BoolQPassage",
    "cola": f"{_GLUE}:Cola",
    "sst2": f"{_GLUE}:Sst2",
    "mrpc": f"{_GLUE}:Mrpc",
    "qqp": f"{_GLUE}:Qqp",
    "stsb": f"{_GLUE}:Stsb",
    "mnli": f"{_GLUE}:Mnli",
    "qnli": f"{_GLUE}:Qnli",
    "rte": f"{_GLUE}:Rte",
    "ultrafeedback": "reftune.tasks.ultrafeedback:Ultrafeedback",
}

REGISTRY: Registry[Task] = Registry("task", _TARGETS)
"""Task name to `module:Class`. Nothing is imported before it is asked for."""

task_class, names, register = REGISTRY.get, REGISTRY.names, REGISTRY.register


def get(spec: TaskSpec) -> Task:
    """Return the task a recipe names.

    Raises:
        RecipeError: If there is no such task, or an option is wrong.

    >>> get(TaskSpec(name="families", test_size=2)).load("test")[0].id
    'families-test-0'
    """
    return task_class(spec.name)(spec)


def describe() -> list[dict[str, str]]:
    """Return name, kind, metric and first docstring line of every task, for listings."""
    rows = []
    for name in names():
        task = task_class(name)
        summary = (task.__doc__ or "").strip().splitlines()[0]
        rows.append({"name": name, "kind": task.kind, "metric": task.metric, "about": summary})
    return rows
