"""`generate` of a model with interventions: it opens a scope that knows the prompt."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from reftune.model.call import EXTRA_INPUTS
from reftune.model.lookup import calls
from reftune.model.passes import Inputs, Scope
from reftune.model.refusals import column


class ScopedGenerate:
    """Generate with the prompt known to every forward pass inside.

    An instance attribute, so that every caller (PEFT with or without a task type, TRL, evaluation
    harnesses) passes through it and copies of the model carry their own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does; also takes the arguments in `EXTRA_INPUTS`.

        With `prompt_lens`, what is given goes on behind the prompts: the tokens after them count as
        generated, as they would in one generation.
        """
        model = self.model
        extra = {key: kwargs.pop(key) for key in EXTRA_INPUTS if key in kwargs}
        scope = _generation_scope(model, args, kwargs, extra)
        stacks = calls(model)
        before = [(call, call.open(scope), call.said) for call in stacks]
        for call in stacks:
            call.said = _said(extra, call.is_encoder)
        try:
            return type(model).generate(model, *args, **kwargs)
        finally:
            for call, opened, said in before:
                call.scope, call.said = opened, said


def _said(extra: dict[str, Any], is_encoder: bool) -> Inputs:
    """Return what an encoder, which sees the prompt just once, or a decoder must be told."""
    if not is_encoder:
        return Inputs(subspaces=extra.get("subspaces"))
    return Inputs(
        mask=extra.get("intervention_mask"),
        subject=extra.get("subject_positions"),
        subspaces=extra.get("subspaces"),
    )


def _generation_scope(model: nn.Module, args: tuple, kwargs: dict, extra: dict) -> Scope:
    prompt = args[0] if args else None
    for key in ("inputs", "input_ids", "inputs_embeds"):
        prompt = kwargs.get(key) if prompt is None else prompt
    if not isinstance(prompt, Tensor):
        prompt = torch.zeros(1, 1, dtype=torch.long)  # generate() starts from BOS alone
    mask = kwargs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        mask = _mask_from_padding(model, prompt, kwargs)
    given = [extra.get(key) for key in ("intervention_mask", "subject_positions", "prompt_lens")]
    if given[-1] is not None:
        given[-1] = column(given[-1], len(mask), "prompt_lens")
    return Scope(mask.bool(), *given)


def _mask_from_padding(
    model: nn.Module, prompt: Shaped[Tensor, "batch prompt ..."], kwargs: dict
) -> Bool[Tensor, "batch prompt"]:
    """Return the mask generate() would derive: padding counts only where it is not also eos."""
    ones = torch.ones(prompt.shape[:2], dtype=torch.bool, device=prompt.device)
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    pad, eos = (
        kwargs.get(key, getattr(config, key, None)) for key in ("pad_token_id", "eos_token_id")
    )
    if pad is None or prompt.dim() != 2 or prompt.is_floating_point() or prompt.numel() == 1:
        return ones
    stops = eos if isinstance(eos, list | tuple) else [eos]
    return ones if pad in stops else prompt != pad
