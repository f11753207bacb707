"""One prefill for what prompts have in common: a long system prompt, few-shot examples.

Tokens before the first edit are the same under every adapter and under the base model, so their
keys and values are computed once and serve all rows, adapters, samples and beams. Exact: nothing
that an adapter could change is shared, and a batch has the columns it has without sharing.
`evaluate` does it by itself where all prompts begin alike.

Left out on purpose: encoder-decoders, recurrent models, and LoRA that differs per row (its prefix
does too).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reftune.errors import DataError, ModelError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn
    from transformers import Cache, PreTrainedTokenizerBase

    from reftune.inference.running import Job
    from reftune.model.passes import Rules
    from reftune.model.positions import PositionRule

LEAST = 32
"""Fewest common tokens for which `shared_prefix` prepares a prefix."""
LEAST_SHARE = 0.25
"""Smallest share of the mean prompt for which it does."""


@dataclass
class PrefixCache:
    """Keys and values of tokens that prompts begin with.

    Attributes:
        ids: The tokens, with the BOS if the tokenizer sets one.
        keys: By block.
        values: Likewise.
        stamp: State of the frozen model they were computed with; see `reftune.model.identity`.
    """

    ids: list[int]
    keys: list[Float[Tensor, "1 heads prefix _"]] = field(repr=False)
    values: list[Float[Tensor, "1 heads prefix _"]] = field(repr=False)
    stamp: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def cache(self, pads: Sequence[int]) -> Cache:
        """Return a cache for a batch that is padded on the left; this object stays as it is.

        Its P columns are the first P of the batch: in a row with n columns of padding, n of zeros
        and the first P - n tokens. The last n are run with what follows them.

        Args:
            pads: Columns of padding before each row.
        """
        from transformers import DynamicCache

        made = DynamicCache()
        for layer, (keys, values) in enumerate(zip(self.keys, self.values)):
            made.update(_moved(keys, pads), _moved(values, pads), layer)
        return made


def _moved(
    states: Float[Tensor, "1 heads prefix dim"], pads: Sequence[int]
) -> Float[Tensor, "batch heads prefix dim"]:
    """Repeat states for each row, moved to the right by its padding."""
    import torch

    rows = states.expand(len(pads), -1, -1, -1)
    if not any(pads):
        return rows
    shift = torch.tensor(pads, device=states.device)[:, None]
    source = torch.arange(states.shape[2], device=states.device) - shift
    index = source.clamp(min=0)[:, None, :, None].expand_as(rows)
    return rows.gather(2, index).masked_fill_((source < 0)[:, None, :, None], 0)


def prefix_cache(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str | Sequence[int]
) -> PrefixCache:
    """Compute the keys and values of a text that prompts begin with.

    Give the result to `generate(..., prefix_cache=)` or `stream`. Prompts must begin with the same
    *tokens*: let the text end where a token ends in all of them, such as behind a line break.

    Args:
        model: A causal language model, with or without adapters.
        tokenizer: Its tokenizer.
        text: The common beginning, or its token ids.

    Raises:
        DataError: If the text is empty or longer than the context.
        ModelError: If prefixes cannot be shared on this model.
    """
    from reftune.inference import prompts as rows_of
    from reftune.model.obstacles import model_obstacle

    reason = model_obstacle(model)
    if reason is not None:
        raise ModelError(f"A prefix cannot be shared: {reason}.", "Generate without prefix_cache.")
    if isinstance(text, str):
        ids = rows_of.encode_prompts(tokenizer, [text], False)[0].ids
    else:
        ids = list(text)
    if not ids:
        raise DataError("The common beginning is empty.", "Give the text all prompts begin with.")
    rows_of.check_context(model, [len(ids)], reserve=1)
    return compute(model, ids)


def compute(model: nn.Module, ids: Sequence[int]) -> PrefixCache:
    """Run the model without edits on one prefix."""
    import torch

    from reftune.inference import prompts as rows_of
    from reftune.model import causal
    from reftune.model.cutting import Prefix
    from reftune.model.identity import Identity

    tokens = torch.tensor(list(ids), device=rows_of.device_of(model))
    layers = causal.prefill(model, Prefix.alone(tokens)).layers
    states = [layer.keys for layer in layers], [layer.values for layer in layers]
    return PrefixCache(list(ids), *states, Identity(model).stamp())


# --- where it may end ----------------------------------------------------------------------------


def editable_from(rule: PositionRule, job: Job) -> int:
    """Return the first token of a prompt that a rule may edit."""
    length = len(job.ids)
    if rule.all or rule.all_prompt or rule.prefix:
        return 0
    first = length - min(rule.suffix, length)
    if rule.subject_last and job.subject is not None:
        first = min(first, job.subject)
    if rule.mask:
        marked = [place for place, chosen in enumerate(job.mask or ()) if chosen]
        first = min([first, *marked])
    return first


class _Acting:
    """Tells which adapters act on a job, and by what rules; looked up once for all jobs."""

    def __init__(self, model: nn.Module) -> None:
        from reftune.model.cutting import active
        from reftune.model.lookup import calls, placed

        self.rules = [call.rules for call in calls(model)]
        self.active = sorted({name for site in placed(model) for name in active(site)})

    def on(self, job: Job) -> Iterator[tuple[str, Rules]]:
        """Yield names and rules."""
        names = self.active if job.adapter is None else [job.adapter]
        for rules in self.rules:
            yield from ((name, rules[name]) for name in names if name in rules)


def shareable(model: nn.Module, jobs: Sequence[Job]) -> int:
    """Return how many tokens all prompts have in common and no adapter may edit.

    The last token of a prompt is never among them: the model must run on something.
    """
    acting, first = _Acting(model), jobs[0].ids
    common = len(first)
    for job in jobs:
        bounds = [editable_from(rules.inference, job) for _, rules in acting.on(job)]
        common = min([common, len(job.ids) - 1, *bounds])
        same = next((i for i, (a, b) in enumerate(zip(first, job.ids)) if a != b), common)
        common = min(common, same)
    return max(common, 0)


def _hindrance(model: nn.Module, jobs: Sequence[Job], options: Mapping[str, Any]) -> str | None:
    """Return why jobs cannot share a prefix, whatever it is, or None."""
    from reftune.model.obstacles import angle_limit
    from reftune.model.switching import foreign_layers

    if options.get("use_cache") is False or options.get("cache_implementation"):
        return "options choose another cache"
    if any(job.adapter is not None for job in jobs) and foreign_layers(model):
        return "LoRA that differs per row changes the prefix"
    limit, longest = angle_limit(model), max(len(job.ids) for job in jobs)
    if limit is not None and longest > limit:
        return f"rotary angles depend on the length of prompts of more than {limit} tokens"
    return None


def shared_prefix(
    model: nn.Module, jobs: Sequence[Job], options: Mapping[str, Any]
) -> PrefixCache | None:
    """Return a prefix for jobs whose prompts begin alike, or None where it would not pay.

    Args:
        model: The model.
        jobs: All answers to produce.
        options: Generation options.
    """
    from reftune.model.obstacles import model_obstacle

    if len(jobs) < 2 or model_obstacle(model) or _hindrance(model, jobs, options):
        return None
    common = shareable(model, jobs)
    mean = sum(len(job.ids) for job in jobs) / len(jobs)
    if common < max(LEAST, LEAST_SHARE * mean):
        return None
    return compute(model, jobs[0].ids[:common])


def check(
    model: nn.Module, cache: PrefixCache, jobs: Sequence[Job], options: Mapping[str, Any]
) -> None:
    """Check that a prefix may serve jobs.

    Raises:
        DataError: If a prompt does not begin with it, or an adapter edits inside it.
        ModelError: If the model is no longer the one it was computed with, or something else rules
            it out.
    """
    from reftune.model.identity import Identity

    reason = _hindrance(model, jobs, options)
    if reason is not None:
        raise ModelError(f"A prefix cannot be shared: {reason}.", "Generate without prefix_cache.")
    if Identity(model).stamp() != cache.stamp:
        raise ModelError(
            "prefix_cache was computed with another model, other weights, or LoRA switched "
            "otherwise.",
            "Compute it again.",
        )
    acting = _Acting(model)
    for job in jobs:
        if job.ids[: len(cache)] != cache.ids or len(job.ids) <= len(cache):
            raise DataError(
                f"Prompt {job.row} does not begin with the {len(cache)} tokens of prefix_cache, or "
                "ends with them.",
                "Compute it from the common beginning, up to where a token ends in all prompts.",
            )
        for name, rules in acting.on(job):
            first = editable_from(rules.inference, job)
            if first < len(cache):
                raise DataError(
                    f'Adapter "{name}" ({rules.inference}) edits token {first} of prompt '
                    f"{job.row}, inside the prefix of {len(cache)} tokens.",
                    f"Compute prefix_cache from at most the first {first} tokens.",
                )
