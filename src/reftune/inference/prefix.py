"""One prefill for what prompts have in common: a long system prompt, few-shot examples.

Tokens before the first edit are the same under every adapter and under the base model, so their
keys and values are computed once and serve all rows, adapters and samples. Exact: nothing that an
adapter could change is shared. `evaluate` does it by itself where all prompts begin alike.

Left out on purpose: encoder-decoders, recurrent models, beams, and LoRA that differs per row (its
prefix does too).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reftune.errors import DataError, ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import Cache, PreTrainedTokenizerBase

    from reftune.inference.running import Job
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
        keys: By block `[1, heads, P, dim]`.
        values: Likewise.
    """

    ids: list[int]
    keys: list[Tensor] = field(repr=False)
    values: list[Tensor] = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def cache(self, rows: int) -> Cache:
        """Return a cache for a batch that begins with the prefix; this object stays as it is."""
        from transformers import DynamicCache

        made = DynamicCache()
        for layer, (keys, values) in enumerate(zip(self.keys, self.values)):
            made.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return made


def prefix_cache(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str | Sequence[int]
) -> PrefixCache:
    """Compute the keys and values of a text that prompts begin with.

    Give the result to `generate(..., prefix_cache=)`. Prompts must begin with the same *tokens*:
    let the text end where a token ends in all of them, such as before a line break or a blank.

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

    tokens = torch.tensor([list(ids)], device=rows_of.device_of(model))
    rows = torch.zeros(1, dtype=torch.long, device=tokens.device)
    found = causal.prefill(model, causal.Prefix(tokens, rows + len(ids), rows))
    layers = found.layers
    return PrefixCache(list(ids), [x.keys for x in layers], [x.values for x in layers])


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


def shareable(model: nn.Module, jobs: Sequence[Job]) -> int:
    """Return how many tokens all prompts have in common and no adapter may edit.

    The last token of a prompt is never among them: the model must run on something.
    """
    from reftune.model.lookup import calls

    rules = [rules.inference for call in calls(model) for rules in call.rules.values()]
    first = jobs[0].ids
    common = len(first)
    for job in jobs:
        bounds = [editable_from(rule, job) for rule in rules]
        common = min([common, len(job.ids) - 1, *bounds])
        same = next((i for i, (a, b) in enumerate(zip(first, job.ids)) if a != b), common)
        common = min(common, same)
    return max(common, 0)


def shared_prefix(
    model: nn.Module, jobs: Sequence[Job], options: Mapping[str, Any]
) -> PrefixCache | None:
    """Return a prefix for jobs whose prompts begin alike, or None where it would not pay.

    Args:
        model: The model.
        jobs: All answers to produce.
        options: Generation options; beams rule it out.
    """
    from reftune.model.obstacles import model_obstacle
    from reftune.model.switching import foreign_layers

    if len(jobs) < 2 or options.get("num_beams", 1) > 1 or model_obstacle(model) is not None:
        return None
    if any(job.adapter is not None for job in jobs) and foreign_layers(model):
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
        ModelError: If beams or adapters per row rule it out.
    """
    from reftune.model.lookup import calls
    from reftune.model.switching import foreign_layers

    if options.get("num_beams", 1) > 1:
        raise ModelError("Beams cannot share a prefix.", "Generate without prefix_cache.")
    if any(job.adapter is not None for job in jobs) and foreign_layers(model):
        raise ModelError(
            "LoRA that differs per row cannot share a prefix.", "Generate without prefix_cache."
        )
    for job in jobs:
        if job.ids[: len(cache)] != cache.ids or len(job.ids) <= len(cache):
            raise DataError(
                f"Prompt {job.row} does not begin with the {len(cache)} tokens of prefix_cache, or "
                "ends with them.",
                "Compute it from the common beginning, up to where a token ends in all prompts.",
            )
        for call in calls(model):
            for name, rules in call.rules.items():
                first = editable_from(rules.inference, job)
                if first < len(cache):
                    raise DataError(
                        f'Adapter "{name}" ({rules.inference}) edits token {first} of prompt '
                        f"{job.row}, inside the prefix of {len(cache)} tokens.",
                        f"Compute prefix_cache from at most the first {first} tokens.",
                    )


def pad_behind(rows: Sequence[Sequence[int]], cache: PrefixCache, pad_id: int, device: Any) -> Any:
    """Pad prompts between the common prefix and the rest `[rows, width]`.

    >>> row = PrefixCache([1, 2], [], [])
    >>> pad_behind([[1, 2, 5, 6], [1, 2, 7]], row, 0, "cpu").input_ids.tolist()
    [[1, 2, 5, 6], [1, 2, 0, 7]]
    """
    import torch

    from reftune.inference import prompts as rows_of

    head = len(cache)
    rest = rows_of.pad([row[head:] for row in rows], pad_id)
    ids = torch.tensor([cache.ids] * len(rows))
    mask = torch.ones_like(ids)
    return rows_of.Batch(
        torch.cat([ids, rest.input_ids], 1).to(device),
        torch.cat([mask, rest.attention_mask], 1).to(device),
    )


def has_window(model: nn.Module) -> bool:
    """Say whether some blocks see a window of columns only; padding inside rows would fill it."""
    from reftune.model.sites import base_of

    config = base_of(model).config.get_text_config()
    kinds = [str(kind) for kind in getattr(config, "layer_types", None) or ()]
    if kinds:
        return any("sliding" in kind or "chunked" in kind for kind in kinds)
    return bool(getattr(config, "sliding_window", None))
