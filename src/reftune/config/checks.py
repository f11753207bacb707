"""What no single value can tell: ranges, grammars and values that must fit each other."""

from __future__ import annotations

import importlib
import math
import os
import re
from typing import Any

from reftune.config import options as registries
from reftune.config.heft import arranged
from reftune.config.naming import doubled, named
from reftune.config.reading import Reader, join, stage_key
from reftune.config.recipe import AdapterSpec, Recipe, StageSpec, TaskSpec
from reftune.config.stacking import check_heft, check_stages
from reftune.config.types import show
from reftune.errors import PositionError, ReftuneError, nearest

ABOVE_ZERO = {
    "": ["threads"],
    "task": ["train_size", "validation_size", "test_size"],
    "stage": ["max_steps", "batch_size", "micro_batch_size", "causal_budget"],
    "optimiser": ["lr", "below_lr", "eps"],
    "heft": ["epochs_total", "stage2_lora_lr"],
    "evaluation": ["batch_size", "max_new_tokens", "samples", "num_beams", "repetition_penalty"],
}
NOT_BELOW_ZERO = {
    "": ["seed"],
    "stage": ["checkpoint_every", "evaluate_every"],
    "optimiser": ["weight_decay", "clip"],
    "evaluation": ["temperature", "top_k", "no_repeat_ngram_size"],
}
LARGEST = {
    "": {"seed": 2**32 - 1, "threads": 16 * (os.cpu_count() or 1)},
    "optimiser": {"lr": 100.0},
}
"""Values above which a library fails far from the cause, or no run could mean it."""
TRACKERS = ("trackio", "wandb", "tensorboard")
LAYER_REMEDY = (
    'Write "all", "late", "half", a list [0, 5], ranges "4-7", negative numbers "-1" '
    'or fractions "0.5-1.0".'
)
GIVERS = {
    "subject": "Use task facts, or own data with the option `subject` (a field of the rows).",
    "mask": "Use own data with the option `mask` (a field of the rows).",
}
"""What position rules may need of each row, and who has it."""


def check_recipe(recipe: Recipe, reader: Reader) -> None:
    """Note all faults that show only when values are seen together."""
    checker = Checker(reader)
    checker.ranges(recipe, "", "")
    checker.ranges(recipe.evaluation, "evaluation", "evaluation")
    _names(recipe, checker)
    check_task(recipe.task, reader)
    if not any(key.startswith("task") for key in reader.bad):  # they take over what it says
        for name, task in recipe.evaluation.also.items():
            check_task(task, reader, f"evaluation.also.{name}")
    if recipe.task.name == "own" and recipe.task.train is None:
        text = "own data need `train:`, a JSONL, CSV or parquet file or a hub data set name."
        checker.fault("task.train", text, ("task.name", "task"))
    _evaluation(recipe, checker)
    stages = reader.places["stages"]
    keys = [stage_key(stages, i) if stages.value else "" for i in range(len(recipe.stages))]
    for stage, key in zip(recipe.stages, keys, strict=True):
        _stage(stage, key, recipe, checker)
    check_heft(recipe, keys, checker)
    check_stages(recipe, keys, checker)
    _head(recipe, checker)
    _together(recipe, checker)


def check_task(task: TaskSpec, reader: Reader, key: str = "task") -> None:
    """Note the faults of a task by itself; `key` is where it stands in the recipe."""
    checker = Checker(reader)
    checker.ranges(task, "task", key)
    longest = task.options.get("max_new_tokens")
    if isinstance(longest, int) and longest < 1:
        checker.fault(join(key, "max_new_tokens"), f"{longest} is not above 0.")
    if task.reward not in registries.reward_names():
        known = nearest(task.reward, registries.reward_names())
        checker.fault(join(key, "reward"), f"there is no reward {show(task.reward)}. {known}")
    seen: dict[str, str] = {}
    for split in ("train", "validation", "test"):
        source = getattr(task, split)
        if source is None:
            continue
        if source in seen:
            text = (
                f"{show(source)} is the {seen[source]} data too. Scores on rows that were trained "
                f"or chosen on mean nothing. Give other rows, or leave `{split}` out."
            )
            checker.fault(join(key, split), text, (join(key, seen[source]),))
        seen.setdefault(source, split)


class Checker:
    """Notes faults at keys, unless the key is known to be bad already."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def fault(self, key: str, text: str, also: tuple[str, ...] = ()) -> None:
        """Note a fault at `key`, unless it or a key in `also` has one already."""
        if not self.reader.bad.intersection((key, *also)):
            self.reader.fault(key, text)

    def ranges(self, spec: Any, group: str, key: str) -> None:
        """Check that sizes, counts and rates are in range."""
        for name in ABOVE_ZERO.get(group, []):
            value = getattr(spec, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                self.fault(join(key, name), f"{show(value)} is not above 0.")
        for name in NOT_BELOW_ZERO.get(group, []):
            value = getattr(spec, name)
            if not (math.isfinite(value) and value >= 0):
                self.fault(join(key, name), f"{show(value)} is below 0 or not finite.")
        for name, limit in LARGEST.get(group, {}).items():
            value = getattr(spec, name)
            if value is not None and value > limit:
                self.fault(join(key, name), f"{show(value)} is above {limit:g}.")

    def grammar(self, key: str, parse: Any, text: Any, remedy: str = "") -> None:
        """Note a fault if `parse(text)` refuses the text."""
        try:
            parse(text)
        except ReftuneError as error:
            self.fault(key, f"{error.what} {remedy or error.remedy}")


def _names(recipe: Recipe, checker: Checker) -> None:
    parts = re.split(r"[/\\]", recipe.name)
    if not recipe.name.strip() or recipe.name.startswith("/") or set(parts) & {"", ".", ".."}:
        text = f"{show(recipe.name)} cannot name a folder below `output`. Write a plain name."
        checker.fault("name", text)
    for tracker in recipe.track:
        if tracker not in TRACKERS:
            checker.fault(
                "track", f"there is no tracker {show(tracker)}. {nearest(tracker, TRACKERS)}"
            )


def _head(recipe: Recipe, checker: Checker) -> None:
    """Check that the tasks and the model's head deal with the same: classes, or text."""
    head = recipe.model.head
    also = {f"evaluation.also.{name}": task for name, task in recipe.evaluation.also.items()}
    for key, task in {"task": recipe.task, **also}.items():
        name_key = join(key, "name")
        if task.name not in registries.task_names() or name_key in checker.reader.bad:
            continue
        kind = registries.task_class(task.name).kind_of(task.options)
        if (kind == "classification") != (head == "classification"):
            text = (
                f'The task "{task.name}" is of kind {kind}, model.head is {head}. Classification '
                "tasks need `head: classification` under `model:` and `objective: "
                "classification`, others `head: causal` or `seq2seq`."
            )
            checker.fault("model.head" if key == "task" else name_key, text, ("objective.name",))


def _evaluation(recipe: Recipe, checker: Checker) -> None:
    spec = recipe.evaluation
    if not 0 < spec.top_p <= 1:
        checker.fault("evaluation.top_p", f"{show(spec.top_p)} is not above 0 and up to 1.")
    if spec.samples > 1 and spec.temperature == 0:
        text = f"{spec.samples} greedy answers are all the same. Set `temperature` above 0."
        checker.fault("evaluation.samples", text, ("evaluation.temperature",))
    if spec.num_beams > 1 and spec.temperature > 0:
        text = f"{spec.num_beams} beams cannot be sampled from. Set `temperature: 0`."
        checker.fault("evaluation.num_beams", text, ("evaluation.temperature",))


def _stage(stage: StageSpec, key: str, recipe: Recipe, checker: Checker) -> None:
    checker.ranges(stage, "stage", key)
    checker.ranges(stage.optimiser, "optimiser", join(key, "optimiser"))
    if stage.max_len < 2:
        text = f"{stage.max_len} leaves no room for a prompt and a target. Use at least 2."
        checker.fault(join(key, "max_len"), text)
    micro, batch = stage.micro_batch_size, stage.batch_size
    if micro and micro > 0 and batch > 0 and batch % micro:
        divisors = [n for n in range(1, batch + 1) if batch % n == 0]
        text = (
            f"{micro} does not divide batch_size {batch}. "
            f"Use one of {', '.join(str(n) for n in divisors)}."
        )
        checker.fault(join(key, "micro_batch_size"), text, (join(key, "batch_size"),))
    if stage.keep_by == "metric" and stage.keep != "best":
        checker.fault(join(key, "keep_by"), "has no effect without `keep: best`. Set it.")
    _causal(stage, join(key, "causal"), recipe, checker)
    _optimiser(stage, join(key, "optimiser"), checker)
    _adapter(stage, join(key, "adapter"), recipe, checker)
    _objective(stage, join(key, "objective"), recipe, checker)


def _causal(stage: StageSpec, key: str, recipe: Recipe, checker: Checker) -> None:
    """Check what rules causal caching out with any model and rows."""
    if stage.causal not in ("recompute", "store"):
        return
    remedy = "Write auto or off."
    if stage.adapter.method in registries.OTHER_METHODS:
        text = f"{stage.adapter.method} is no edit of chosen tokens: nothing is constant. {remedy}"
        checker.fault(key, text, ("adapter.method",))
    elif recipe.model.head != "causal":
        text = f"needs a decoder of text, and model.head is {recipe.model.head}. {remedy}"
        checker.fault(key, text, ("model.head",))


def _optimiser(stage: StageSpec, key: str, checker: Checker) -> None:
    spec = stage.optimiser
    if not 0 <= spec.warmup < 1:
        text = f"{show(spec.warmup)} is no share of all steps. Use a value from 0 to below 1."
        checker.fault(join(key, "warmup"), text)
    if not all(0 <= beta < 1 for beta in spec.betas):
        checker.fault(join(key, "betas"), f"{list(spec.betas)} are not both from 0 to below 1.")


def _adapter(stage: StageSpec, key: str, recipe: Recipe, checker: Checker) -> None:
    adapter = stage.adapter
    method_key = join(key, "method")
    if adapter.method in ("full", "head_only") and recipe.model.quantize != "none":
        text = (
            "quantised weights cannot be trained, nor a head on them without an adapter. "
            "Choose another method or `quantize: none`."
        )
        checker.fault(method_key, text, ("model.quantize",))
    if adapter.method == "head_only" and recipe.model.head != "classification":
        text = "there is no head to train. Set `head: classification` under `model:`."
        checker.fault(method_key, text, ("model.head",))
    if not math.isfinite(adapter.strength):
        text = f"{show(adapter.strength)} is not finite. Write a number; 1 is the edit as trained."
        checker.fault(join(key, "strength"), text)
    if adapter.method in registries.OTHER_METHODS:
        return
    rule = importlib.import_module("reftune.model.positions").PositionRule.parse
    layers = importlib.import_module("reftune.model.layers")
    for name in ("positions", "train_positions"):
        text = getattr(adapter, name)
        if text is not None:
            checker.grammar(join(key, name), rule, text)
            _given(join(key, name), text, recipe.task, checker)
    if not adapter.tied:
        checker.grammar(join(key, "tied"), _untied, adapter)
    deep = 1000  # no model is deeper; whether a layer exists is known only with the model
    checker.grammar(
        join(key, "layers"),
        lambda text: layers.parse_layers(text, deep),
        adapter.layers,
        LAYER_REMEDY,
    )


def _given(key: str, text: str, task: TaskSpec, checker: Checker) -> None:
    """Check that the task's rows say what a position rule asks of each of them."""
    if key in checker.reader.bad or task.name not in registries.task_names():
        return
    terms = {term.strip().removesuffix("_last") for term in text.split("+")}
    given = registries.task_class(task.name).gives(task.options)
    for need in sorted(terms & GIVERS.keys() - given):
        what = f'"{text}" needs a {need} in each row, which task "{task.name}" does not give. '
        checker.fault(key, what + GIVERS[need], ("task.name",))


def _untied(adapter: AdapterSpec) -> None:
    """Raise if prefix and suffix cannot have parameters of their own under these positions."""
    placement = importlib.import_module("reftune.model.adapters").Placement
    try:
        placement(
            positions=adapter.positions, train_positions=adapter.train_positions, tied=False
        ).groups()
    except PositionError:  # reported at its own key
        return


def _objective(stage: StageSpec, key: str, recipe: Recipe, checker: Checker) -> None:
    name_key = join(key, "name")
    if stage.objective not in registries.objective_names():
        return
    rows = getattr(registries.objective_class(stage.objective), "rows", "text")
    head = recipe.model.head
    if rows == "class" and head != "classification":
        text = f'objective "{stage.objective}" needs `head: classification` under `model:`.'
        checker.fault(name_key, text, ("model.head",))
    if rows == "text" and head == "classification":
        text = f'objective "{stage.objective}" learns text, but `model.head` is classification. '
        checker.fault(name_key, text + "Use `objective: classification`.", ("model.head",))


def _together(recipe: Recipe, checker: Checker) -> None:
    """Check that what the stages put on the model can stand and be saved together."""
    if checker.reader.bad:  # a method may be a default that stands in for a faulty one
        return
    recipe = arranged(recipe)
    adapters = [stage.adapter for stage in recipe.stages]
    plain = [adapter.method for adapter in adapters if adapter.method in registries.PLAIN]
    if plain and (recipe.model.adapter or any(adapter != adapters[0] for adapter in adapters)):
        text = (
            f"{plain[0]} changes the model itself and cannot be combined with an adapter in one "
            "run. Train it in a run of its own and give its model folder as `model.name` of the "
            "next."
        )
        checker.fault("stages", text)
        return
    index = doubled(named(recipe), {})
    if index is not None:
        text = (
            f"an earlier stage has another adapter named {show(adapters[index].name)}. Give this "
            "one a name of its own, or the same settings to train on with it."
        )
        checker.fault(f"stages.{index}.adapter.name", text)
