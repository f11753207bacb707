"""What the tests of a diagnosis share: rows whose right answer is known, models with adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tiny import tiny_llama, tiny_tokenizer

from reftune import LoreftConfig, RedConfig, attach
from reftune.config.recipe import EvaluationSpec, TaskSpec
from reftune.inference.study import Study
from reftune.model.adapters import sites
from reftune.tasks.base import Example, Task

PROMPTS = ["2+3=", "what is 7 times 8? ", "a", "12 apples and 3 pears, how many? "]


class Echo(Task):
    """An answer is right if it is the gold text to the letter."""

    name = "echo"
    max_new_tokens = 8

    def rows_of(self, split):
        return []

    def extract(self, text, example):
        return text

    def score(self, text, example):
        return {"accuracy": float(text == example.answer)}


def rows(prompts: Sequence[str] = PROMPTS, **more) -> list[Example]:
    return [Example(str(i), prompt, "", "", **more) for i, prompt in enumerate(prompts)]


def study(model, examples, task=None, **more) -> Study:
    spec = more.pop("spec", EvaluationSpec(batch_size=3))
    return Study(
        model, tiny_tokenizer(), task or Echo(TaskSpec(name="echo")), examples, spec, **more
    )


def talking(seed=3, **model):
    """A tiny model that never says a special token: each token of its answers is a character."""
    made = tiny_llama(seed=seed, **model)
    with torch.no_grad():
        made.lm_head.weight[:4] = 0.0
    return made


def shaken(positions="f2+l2+generated:2", layers="all", seed=3, **model):
    """One with a LoReFT adapter whose edits are large enough to change what is said."""
    made = talking(seed, **model)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        attach(made, LoreftConfig(rank=2), layers=layers, positions=positions)
        for i, p in enumerate(q for q in made.parameters() if q.requires_grad):
            p.add_(0.7 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return made.eval()


def pushed(positions, layers, size=6.0, seed=3):
    """One with a RED adapter: a large constant is added at its positions."""
    made = talking(seed)
    attach(made, RedConfig(), layers=layers, positions=positions)
    with torch.no_grad():
        for site in sites(made):
            for module in site.groups("default").values():
                vector = torch.randn(site.dim, generator=torch.Generator().manual_seed(1))
                module.reft_bias.copy_(size * vector)
    return made.eval()
