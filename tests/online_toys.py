"""Toy questions, answers and trainers for everything that trains on a model's own answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_llama, tiny_tokenizer

from reftune.config.recipe import AdapterSpec, OptimiserSpec, StageSpec, TaskSpec
from reftune.rewards import numeric
from reftune.tasks.base import Example, Task

LOREFT = AdapterSpec(options={"rank": 2, "init": "identity"}, positions="all")
LORA = AdapterSpec(method="lora", options={"rank": 2})
FULL = AdapterSpec(method="full")


class Toy(Task):
    """Questions of different lengths; the last number of an answer counts."""

    name = "toy"
    max_new_tokens = 24

    def __init__(self, answer: str | None = None, count: int = 22) -> None:
        super().__init__(TaskSpec(name="toy"))
        self.answer, self.count = answer, count

    def rows_of(self, split: str) -> list[Example]:
        """Return sums, or questions that all have the same answer."""
        found = []
        for i in range(self.count):
            answer = self.answer or str(2 * i)
            found.append(Example(f"{split}-{i}", f"{i}+{i}=" + "?" * (i % 4), f" {answer}", answer))
        return found

    def extract(self, text: str, example: Example) -> str | None:
        """Return the last number."""
        return numeric.extract(text)

    def score(self, text: str, example: Example) -> dict[str, float]:
        """Compare it."""
        answer = self.extract(text, example)
        return {"accuracy": float(answer is not None and numeric.matches(answer, example.answer))}


def adapted(spec: AdapterSpec = LOREFT, seed: int = 0, **model: Any) -> Any:
    """Return a tiny model with an adapter whose edits are no longer nothing."""
    from reftune.model.build import apply_adapter

    made = apply_adapter(tiny_llama(seed=seed, **model), spec, 0)
    if spec.method != "full":
        shake(made, 0.3)
    return made.eval()


def shake(model: Any, size: float, seed: int = 5) -> None:
    """Add noise to what is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)


def objective_of(name: str = "reinforced", **options: Any) -> Any:
    """Return an objective."""
    from reftune import objectives

    cls = objectives.get(name)
    return cls(cls.config_from(options))


def sampler_of(model: Any, objective: Any, task: Task | None = None, **tokens: Any) -> Any:
    """Return a sampler of toy questions."""
    from reftune.training.encode import encode_all
    from reftune.training.rollouts import Sampler

    task, tokenizer = task or Toy(), tiny_tokenizer(**tokens)
    examples = task.load("train")
    rows = encode_all(examples, tokenizer, 64)
    return Sampler(model, tokenizer, task, rows, examples, objective.config, 64, 1)


def trainer_of(
    model: Any,
    folder: Path,
    objective: Any = None,
    task: Task | None = None,
    validation: bool = False,
    score: Any = None,
    callbacks: Any = (),
    **stage: Any,
) -> Any:
    """Return an online trainer on toy questions: 22 rows, 8 a rollout, 3 steps an epoch."""
    from reftune.training.arguments import arguments
    from reftune.training.encode import encode_all
    from reftune.training.online import OnlineTrainer

    objective = objective or objective_of()
    sampler = sampler_of(model, objective, task)
    lr, decay = stage.pop("lr", 5e-3), stage.pop("weight_decay", 0.0)
    values = {"epochs": 2, "batch_size": 8, "max_len": 64, **stage}
    optimiser = OptimiserSpec(lr=lr, weight_decay=decay, schedule="constant")
    spec = StageSpec(optimiser=optimiser, **values)
    held = encode_all(Toy().load("validation"), sampler.tokenizer, 64) if validation else None
    args = arguments(spec, folder, len(sampler.rows), seed=1, num_validation=len(held or ()))
    shared = (spec, args, objective, sampler.rows, sampler)
    return OnlineTrainer(model, sampler.tokenizer, *shared, held, score, callbacks)


class Fixed:
    """Gives the same answers to a question in each step, so that rounding cannot change them."""

    def __init__(self, sampler: Any, steps: int = 8) -> None:
        self.rows, everyone = sampler.rows, range(len(sampler.rows))
        self.known = [sampler(everyone, step) for step in range(steps)]

    def __call__(self, questions: Any, step: int) -> list[Any]:
        """Return the answers of a step."""
        return [self.known[step][question] for question in questions]


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Copy what is trained."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Say whether two sets of weights are the same to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
