"""What rules out causal caching, by name: kinds of models, and states of training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from reftune.model.frozen import WITH_CACHE, is_checkpointed
from reftune.model.lookup import blocks_of, placed
from reftune.model.sites import base_of

RECURRENT = ("linear", "mamba", "recurrent", "rwkv", "conv", "ssm")
RANDOM = ("drop", "jitter")
"""Parts of the names of rates by which modules draw random numbers in training."""
STRETCHED = ("dynamic", "longrope")
"""Kinds of rotary embeddings whose angles change where a row is longer than the model's own."""
SHARDED = (
    "the model is sharded or replicated (FSDP, DeepSpeed, DataParallel), and its blocks cannot be "
    "run apart"
)
COMPILED = "the model is compiled, and its blocks cannot be run apart"


def obstacle(model: nn.Module) -> str | None:
    """Return why nothing of this model's forward pass may be held constant, or None.

    Args:
        model: The model in the state in which it will be trained.
    """
    return model_obstacle(model) or _training_obstacle(model, base_of(model))


def model_obstacle(model: nn.Module) -> str | None:
    """Return why tokens before an edit are no constants of this kind of model, or None."""
    base = base_of(model)
    config = base.config.get_text_config()
    if getattr(base.config, "is_encoder_decoder", False):
        return "the model is an encoder-decoder"
    if base.get_output_embeddings() is None:
        return "the model has no language-model head"
    if blocks_of(model).is_encoder:
        return "attention is bidirectional: every token sees the edited ones"
    kinds = [str(kind) for kind in getattr(config, "layer_types", None) or ()]
    recurrent = sorted({kind for kind in kinds if any(word in kind for word in RECURRENT)})
    if recurrent or getattr(base, "_is_stateful", False):
        return f"the model keeps a recurrent state ({', '.join(recurrent) or type(base).__name__})"
    if any(getattr(c, "is_prompt_learning", False) for c in _peft_configs(model)):
        return "learned prompt tokens stand before the edits"
    return None


def _training_obstacle(model: nn.Module, base: nn.Module) -> str | None:
    own = {id(p) for site in placed(model) for p in site.parameters()}
    if not own:
        return "the model has no intervention"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            return f"{name} is trained too, and what stands before the edits depends on it"
    noise = _noise(model)
    if noise:
        return f"the base model draws random numbers in training ({noise})"
    for module in model.modules():
        kind = type(module).__name__
        if kind.startswith(("FSDP", "FullyShardedDataParallel")) or kind == "DataParallel":
            return SHARDED
        if kind == "OptimizedModule" or module._compiled_call_impl is not None:
            return COMPILED
        if hasattr(module, "checkpoint_impl"):
            return "a block is inside torch's checkpoint wrapper, which drops every cache"
    blocks = blocks_of(model).modules
    if is_checkpointed(blocks) and not hasattr(type(blocks[0]), WITH_CACHE):
        return "gradient checkpointing of this transformers version drops every cache"
    return None


def _peft_configs(model: nn.Module) -> list[Any]:
    configs = getattr(model, "peft_config", None)
    return list(configs.values()) if isinstance(configs, dict) else []


def _noise(model: nn.Module) -> str:
    """Return the name of a module outside interventions that is random in training mode."""
    inside = {id(m) for site in placed(model) for m in site.modules()}
    for name, module in model.named_modules():
        if id(module) in inside or not module.training:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"{name}, p = {module.p}"
        for key, rate in vars(module).items():
            if isinstance(rate, float) and rate > 0 and any(word in key for word in RANDOM):
                return f"{name}.{key} = {rate}"
    return ""


def start_obstacle(model: nn.Module) -> str | None:
    """Return why forward passes may not start at a later block, or None."""
    config = base_of(model).config.get_text_config()
    if getattr(config, "num_kv_shared_layers", 0):
        return "upper blocks read keys and values of lower ones"
    blocks = blocks_of(model).modules
    if is_checkpointed(blocks) and _replays_hooks(type(blocks[0])):
        return "gradient checkpointing of this transformers version replays the hooks of a block"
    return None


def _replays_hooks(block: type[nn.Module]) -> bool:
    """Say whether a block's checkpoint holds its hooks: replayed after `start_at` has ended."""
    own = block.__mro__[: block.__mro__.index(nn.Module)]
    return any("__call__" in vars(kind) for kind in own)


def angle_limit(model: nn.Module) -> int | None:
    """Return the longest row whose rotary angles do not depend on its length; None: any.

    Beyond it the angles of a prefix computed alone are not those it has inside its row.
    """
    config = base_of(model).config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    limits = []
    for one in _dicts(rope):
        if one.get("rope_type", one.get("type")) in STRETCHED:
            own = one.get("original_max_position_embeddings")
            limits.append(own or config.max_position_embeddings)
    return min(limits, default=None)


def _dicts(rope: Any) -> Iterable[dict[str, Any]]:
    """Yield rotary settings: one set, or one a kind of layer."""
    if isinstance(rope, dict):
        yield rope
        yield from (one for one in rope.values() if isinstance(one, dict))
