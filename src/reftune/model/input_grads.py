"""No gradients into the embeddings where nothing needs them.

PEFT, TRL and transformers make the embeddings' output require grad as soon as checkpointing is on.
Only the reentrant kind needs it; with the other kind the backward pass then runs through all blocks
below the lowest site, for nothing.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

METHOD = "enable_input_require_grads"
MARK = "_reftune_input_grads"


class InputGrads:
    """`enable_input_require_grads` of a model with interventions.

    An instance attribute, so that all callers pass through it and copies carry their own. It does
    what the model's own method does, and then looks at each forward pass whether it was needed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> None:
        """Let the embeddings' output require grad, but only where checkpointing needs it."""
        if getattr(self.model, "_require_grads_hooks", None):
            self.model.disable_input_require_grads()  # else the hooks of the first call never leave
        before = {module: len(module._forward_hooks) for module in self.model.modules()}
        getattr(type(self.model), METHOD)(self.model)
        for module, count in before.items():
            if len(module._forward_hooks) > count:
                remove(module)
                handle = module.register_forward_hook(DropGrad(self.model))
                module.__dict__[MARK] = handle


class DropGrad:
    """Forward hook of the embeddings, after the one that makes their output require grad."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Return the output without grad if only that other hook asked for it and none needs it."""
        forced = isinstance(output, Tensor) and output.requires_grad and output.is_leaf
        if forced and is_replayed_without_input_grads(self.model):
            return output.detach()
        return None


def install(base: nn.Module) -> None:
    """Put the method on a model; what was enabled before counts as asked for now."""
    if not hasattr(type(base), METHOD) or METHOD in base.__dict__:
        return
    base.__dict__[METHOD] = InputGrads(base)
    if getattr(base, "_require_grads_hooks", None):
        getattr(base, METHOD)()


def uninstall(base: nn.Module) -> None:
    """Give a model its own method back; input gradients that were asked for stay on."""
    if isinstance(base.__dict__.get(METHOD), InputGrads):
        del base.__dict__[METHOD]
    for module in base.modules():
        remove(module)


def remove(module: nn.Module) -> None:
    """Take our hook off an embedding."""
    handle = module.__dict__.pop(MARK, None)
    if handle is not None:
        handle.remove()


def is_replayed_without_input_grads(model: nn.Module) -> bool:
    """Whether blocks are checkpointed, as far as one can see, and none in the reentrant way.

    Checkpointing nobody can see from here (a function wrapped by hand) keeps the gradients.
    """
    seen = False
    for module in model.modules():
        if getattr(module, "checkpoint_impl", None) is not None:  # torch's wrapper around a block
            return False
        if not getattr(module, "gradient_checkpointing", False):
            continue
        function = getattr(module, "_gradient_checkpointing_func", None)
        function = getattr(function, "function", function)  # inside ReplayedCall
        if getattr(function, "keywords", {}).get("use_reentrant", True):
            return False
        seen = True
    return seen
