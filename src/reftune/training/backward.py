"""What the backward pass runs through: input gradients off, checkpointing of the right kind."""

from __future__ import annotations

from torch import nn


def disable_input_grads(model: nn.Module) -> None:
    """Stop the embeddings' output from requiring grad.

    PEFT and gradient checkpointing switch that on; the backward pass then runs through all layers
    below the lowest trained one, for nothing.
    """
    if hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()


def set_checkpointing(model: nn.Module, on: bool) -> None:
    """Switch gradient checkpointing, always the kind that needs no input gradients."""
    new = hasattr(
        model, "activation_checkpointing_enable"
    )  # the name since transformers 5.20 or so
    if not on:
        (model.activation_checkpointing_disable if new else model.gradient_checkpointing_disable)()
    elif new:
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    disable_input_grads(model)
