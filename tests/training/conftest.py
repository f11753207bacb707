"""Tiny recipes and rows for training tests."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tiny import tiny_folder, tiny_llama, tiny_tokenizer

from reftune.config.recipe import (
    AdapterSpec,
    EvaluationSpec,
    ModelSpec,
    OptimiserSpec,
    Recipe,
    StageSpec,
    TaskSpec,
)
from reftune.tasks.base import Example


def sums(first, last):
    return [Example(str(i), f"{i}+{i}=", f" {2 * i}", str(2 * i)) for i in range(first, last)]


@pytest.fixture
def sums_of():
    """Return the function that makes rows of sums."""
    return sums


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def rows(tokenizer):
    from reftune.training.encode import encode_all

    return encode_all(sums(0, 22), tokenizer, 64)


@pytest.fixture
def adapted():
    """Return a function that makes a tiny model with a LoReFT adapter."""

    def make(dropout=0.0, method="loreft", **model):
        from reftune.model.build import apply_adapter

        spec = AdapterSpec(
            method=method, options={"rank": 2, "dropout": dropout}, positions="f2+l2"
        )
        return apply_adapter(tiny_llama(**model), spec, 0)

    return make


@pytest.fixture
def trainer_for(tokenizer, tmp_path):
    """Return a function that makes a trainer for a model, rows and changes to a stage."""

    def make(model, rows, validation=None, folder=None, objective="sft", callbacks=(), **stage):
        from reftune import objectives
        from reftune.training.arguments import arguments
        from reftune.training.collate import Collator
        from reftune.training.trainer import ReftTrainer

        lr = stage.pop("lr", 5e-3)
        decay = stage.pop("weight_decay", 0.0)
        values = {"epochs": 2, "batch_size": 8, **stage}
        spec = StageSpec(optimiser=OptimiserSpec(lr=lr, weight_decay=decay), **values)
        count = len(validation) if validation is not None else 0
        args = arguments(spec, folder or tmp_path / "ck", len(rows), seed=1, num_validation=count)
        return ReftTrainer(
            model,
            args,
            objectives.get(objective)(),
            rows,
            validation,
            Collator.of(tokenizer),
            keep_best=spec.keep == "best",
            callbacks=callbacks,
        )

    return make


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def recipe(model_folder, tmp_path):
    """A recipe on 24 sums with validation and test rows, 6 steps."""
    for split, part in (("train", (0, 24)), ("validation", (24, 30)), ("test", (30, 36))):
        lines = [{"prompt": e.prompt, "completion": e.target} for e in sums(*part)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        # a test file may not be named as training data, so the names say what they are
        (tmp_path / f"{split}.jsonl").write_text(text)
    task = TaskSpec(**{s: str(tmp_path / f"{s}.jsonl") for s in ("train", "validation", "test")})
    adapter = AdapterSpec(options={"rank": 2, "dropout": 0.1}, positions="f2+l2")
    stage = StageSpec(adapter=adapter, epochs=2, batch_size=8, optimiser=OptimiserSpec(lr=5e-3))
    return Recipe(
        model=ModelSpec(name=str(model_folder)),
        task=task,
        stages=[stage],
        evaluation=EvaluationSpec(max_new_tokens=3),
        output=str(tmp_path / "runs"),
        name="one",
        threads=1,
    )


@pytest.fixture
def with_stage():
    """Return a function that changes the only stage of a recipe."""

    def change(recipe, **values):
        return replace(recipe, stages=[replace(recipe.stages[0], **values)])

    return change


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def trained():
    """Return the function that copies the trained weights of a model."""
    return weights
