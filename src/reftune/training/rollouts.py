"""Rollouts: questions are answered by the model as it is, and the answers are scored.

The noise of an answer depends on seed, step, question and sample alone: neither the batch it is
written in nor the number of processes changes it (up to rounding in the model).

Left out on purpose: stop texts in generation. The policy learns to end by EOS; a stop text only
ends what is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reftune.errors import RecipeError
from reftune.objectives.online import Actions
from reftune.tasks.base import ahead
from reftune.training.collate import Collator, prepare
from reftune.training.encode import IGNORE, Encoded

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from reftune.inference.prompts import Row
    from reftune.model.run import Prepared
    from reftune.objectives.online import OnlineConfig
    from reftune.tasks.base import Example, Task
    from reftune.training.encode import Rows


@dataclass(frozen=True)
class Score:
    """What an answer is worth.

    Attributes:
        value: 1 if right, the partial score if extracted but wrong, 0 if nothing was extracted. On
            tasks with graded metrics the metric, where it is more.
        right: Whether the main metric is 1.
        answered: Whether an answer was extracted.
    """

    value: float
    right: bool
    answered: bool


@dataclass(frozen=True)
class Rollout:
    """One answer of the model.

    Attributes:
        row: Prompt and answer in tokens; the answer is labelled, up to and with its end token.
        gold: The annotated row of the same question.
        text: The answer as text.
        score: What it is worth.
        ended: Whether it ended by itself.
    """

    row: Encoded
    gold: Encoded
    text: str
    score: Score
    ended: bool


def score(task: Task, text: str, example: Example, partial: float) -> Score:
    """Score a text as evaluation does, with a share for a wrong answer.

    Args:
        task: Extracts and compares; which published quirks count is an option of the task.
        text: The answer.
        example: The question.
        partial: Score of an answer that was extracted but is wrong.
    """
    scores = task.score(text, example)
    answered = task.extract(text, example) is not None
    value = max(float(scores[task.metric]), partial if answered else 0.0)
    return Score(value, task.is_right(scores), answered)


class Sampler:
    """Answers questions by number.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        task: What scores the answers.
        rows: The training rows, encoded.
        examples: The examples they were made from; found by id.
        config: Settings of the objective.
        max_len: Longest prompt and answer together, in tokens. Prompts are cut from the left.
        seed: Seed of the noise.

    Raises:
        RecipeError: If no prompt fits beside the longest answer.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        rows: Rows,
        examples: Sequence[Example],
        config: OnlineConfig,
        max_len: int,
        seed: int,
    ) -> None:
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.config, self.seed, self.rows = config, seed, rows
        known = {example.id: example for example in examples}
        self.examples = [known[row.id] for row in rows.rows]
        self.max_new_tokens = config.max_new_tokens or task.max_new_tokens
        self.prompts = self._prompts(max_len)

    def _prompts(self, max_len: int) -> list[Row]:
        """Encode the questions as evaluation does."""
        from reftune.inference import prompts as rows_of
        from reftune.inference.predictions import prompt_of

        room = min(max_len, rows_of.context_len(self.model) or max_len) - self.max_new_tokens
        if room < 1:
            raise RecipeError(
                f"max_new_tokens {self.max_new_tokens} leaves no room for a prompt within max_len "
                f"{max_len} (and the model's context).",
                "Set a smaller max_new_tokens under objective:, or a larger max_len.",
            )
        prompts = [prompt_of(example) for example in self.examples]
        told = ([e.meta.get(name) for e in self.examples] for name in ("subject", "mask"))
        rows = rows_of.encode_prompts(self.tokenizer, prompts, False, *told)
        return [row.fitted(room) for row in rows]

    def __call__(self, questions: Sequence[int], step: int) -> list[Rollout]:
        """Answer some of the training questions.

        Args:
            questions: Numbers of training rows.
            step: Number of the rollout; each has noise of its own.
        """
        from reftune.inference import prompts as rows_of
        from reftune.inference.decoding import Decoding
        from reftune.inference.running import Job, batches

        own = self.config
        jobs = []
        for question in questions:
            row, example = self.prompts[question], self.examples[question]
            subspace = None if example.subspace is None else tuple(example.subspace)
            told = (row.ids, self.max_new_tokens, None, row.subject, subspace, row.mask)
            jobs += [Job(question, sample, *told) for sample in range(own.samples)]
        decoding = Decoding(
            self.max_new_tokens, temperature=own.temperature, seed=(self.seed << 32) + step
        )
        answers: dict[tuple[int, int], list[int]] = {}
        with rows_of.evaluating(self.model):
            writing = batches(self.model, self.tokenizer, jobs, decoding, own.generation_batch)
            for batch, tokens in writing:
                for job, ids in zip(batch, tokens.tolist(), strict=True):
                    answers[job.row, job.sample] = ids
        written = [self._written(answers[job.row, job.sample]) for job in jobs]
        asked = [self.examples[job.row] for job in jobs]
        texts = ahead(self.task, [text for text, *_ in written], asked)
        return [
            self._rollout(job.row, text, *told)
            for job, (text, _), (_, *told) in zip(jobs, texts, written, strict=True)
        ]

    def _written(self, tokens: list[int]) -> tuple[str, list[int], bool]:
        """Return an answer as text, its actions, and whether it ended by itself."""
        from reftune.inference.decoding import cut_ids, cut_text, decode, stop_ids

        written = cut_ids(tokens, stop_ids(self.model, self.tokenizer))
        ended = len(written) < len(tokens)
        text = cut_text(decode(self.tokenizer, written), tuple(getattr(self.task, "stop", ())))
        return text, tokens[: len(written) + ended], ended

    def _rollout(self, question: int, text: str, actions: list[int], ended: bool) -> Rollout:
        """Put an answer behind its prompt and score it."""
        prompt, example = self.prompts[question], self.examples[question]
        mask = prompt.mask
        row = Encoded(
            input_ids=[*prompt.ids, *actions],
            labels=[IGNORE] * len(prompt.ids) + actions,
            prompt_len=len(prompt.ids),
            id=example.id,
            select=example.subspace,
            intervention_mask=None if mask is None else [*mask, *[False] * len(actions)],
            subject=prompt.subject,
            cut=prompt.cut,
        )
        found = score(self.task, text, example, self.config.partial)
        return Rollout(row, self.rows[question], text, found, ended)


def collate(
    rollouts: Sequence[Rollout],
    collator: Collator,
    device: torch.device | str = "cpu",
    gold: bool = False,
) -> Actions:
    """Return answers as one micro-batch.

    Args:
        rollouts: The answers.
        collator: Pads them, on the right.
        device: Where they are run.
        gold: Add the annotated answers.
    """
    own = prepared([rollout.row for rollout in rollouts], collator, device)
    annotated = prepared([rollout.gold for rollout in rollouts], collator, device) if gold else None
    scores = [rollout.score for rollout in rollouts]
    return Actions(
        **vars(own),
        scores=torch.tensor([found.value for found in scores], device=device),
        right=torch.tensor([found.right for found in scores], device=device),
        answered=torch.tensor([found.answered for found in scores], device=device),
        ended=torch.tensor([rollout.ended for rollout in rollouts], device=device),
        gold=None if annotated is None else Actions(**vars(annotated)),
    )


def prepared(
    rows: Sequence[Encoded], collator: Collator, device: torch.device | str = "cpu"
) -> Prepared:
    """Return rows as one batch on a device."""
    batch = collator(rows)
    return prepare({k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()})
