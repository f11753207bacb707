"""`reftune eval --rerank`: what can be known before answering, and the choice among answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reftune.cli.common import progress, run_recipe
from reftune.cli.models import check_there, load_any
from reftune.errors import RecipeError

if TYPE_CHECKING:
    from reftune.config.recipe import EvaluationSpec, Recipe, TaskSpec
    from reftune.inference.evaluate import Evaluation


def check_rerank(name: str, spec: TaskSpec, decoding: EvaluationSpec) -> None:
    """Refuse a reward model that cannot choose, before anything is answered.

    Args:
        name: The run of the reward model.
        spec: The task whose answers it is to choose among.
        decoding: How they are produced.

    Raises:
        RecipeError: If there is nothing to choose among, or the run is none of a reward model.
        AdapterError: If the run holds nothing trained.
    """
    from reftune import tasks
    from reftune.inference.rerank import reward_task

    if decoding.samples < 2:
        raise RecipeError(
            "--rerank chooses among several answers, and there is one.",
            "Add --samples 16 --temperature 1.",
        )
    if tasks.get(spec).kind == "classification":
        raise RecipeError(
            f'Task "{spec.name}" has no generated answers to rerank.', "Leave --rerank out."
        )
    reward_task(tasks.get(_recipe(name).task))
    check_there(name)


def reranked(
    results: list[Evaluation],
    name: str,
    spec: TaskSpec,
    decoding: EvaluationSpec,
    seed: int,
) -> list[Evaluation]:
    """Return evaluations with the figure `rerank@k`.

    The reward model is loaded here, when the models that answered are gone from memory.

    Args:
        results: The evaluations, of the same rows.
        name: The run of the reward model.
        spec: The task that was scored.
        decoding: Which rows, and how many a batch.
        seed: Seed of intervals.
    """
    from reftune import tasks
    from reftune.inference.rerank import OutcomeModel, rerank

    recipe = _recipe(name)
    task = tasks.get(recipe.task)
    model = load_any(name, task.num_labels)
    examples = tasks.get(spec).load(decoding.split)
    found = []
    for result in results:
        with progress(f"rerank by {name}") as report:
            told = (decoding.batch_size, recipe.stages[-1].max_len, report)
            found.append(rerank(result, examples, OutcomeModel(*model, task, *told), seed=seed))
    return found


def _recipe(name: str) -> Recipe:
    """Return the recipe of the run, which says how it reads an answer."""
    recipe = run_recipe(name)
    if recipe is None:
        raise RecipeError(
            f'"{name}" is no run folder.', "Name the run of a reward model, such as runs/reward."
        )
    return recipe
