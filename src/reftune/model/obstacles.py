"""What rules out causal caching, by name: kinds of models, and states of training."""

from __future__ import annotations

from typing import Any

from torch import nn

from reftune.model.causal import WITH_CACHE, is_checkpointed
from reftune.model.lookup import sites
from reftune.model.sites import base_of, find_blocks

RECURRENT = ("linear", "mamba", "recurrent", "rwkv", "conv", "ssm")


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
    if find_blocks(base).is_encoder:
        return "attention is bidirectional: every token sees the edited ones"
    kinds = [str(kind) for kind in getattr(config, "layer_types", None) or ()]
    recurrent = sorted({kind for kind in kinds if any(word in kind for word in RECURRENT)})
    if recurrent or getattr(base, "_is_stateful", False):
        return f"the model keeps a recurrent state ({', '.join(recurrent) or type(base).__name__})"
    if any(getattr(c, "is_prompt_learning", False) for c in _peft_configs(model)):
        return "learned prompt tokens stand before the edits"
    return None


def _training_obstacle(model: nn.Module, base: nn.Module) -> str | None:
    own = {id(p) for site in sites(model) for p in site.parameters()}
    if not own:
        return "the model has no intervention"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            return f"{name} is trained too, and what stands before the edits depends on it"
    dropout = _dropout(model)
    if dropout:
        return f"the base model drops out in training ({dropout})"
    if "FullyShardedDataParallel" in type(model).__name__ or any(
        type(module).__name__.startswith("FSDP") for module in model.modules()
    ):
        return "the model is sharded by FSDP, whose blocks cannot be run apart"
    blocks = find_blocks(base).modules
    if is_checkpointed(blocks) and not hasattr(type(blocks[0]), WITH_CACHE):
        return "gradient checkpointing of this transformers version drops every cache"
    return None


def _peft_configs(model: nn.Module) -> list[Any]:
    configs = getattr(model, "peft_config", None)
    return list(configs.values()) if isinstance(configs, dict) else []


def _dropout(model: nn.Module) -> str:
    """Return the name of a module outside interventions that drops out in training mode."""
    inside = {id(m) for site in sites(model) for m in site.modules()}
    for name, module in model.named_modules():
        if id(module) in inside or not module.training:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"{name}, p = {module.p}"
        for key in ("attention_dropout", "dropout"):
            rate = getattr(module, key, None)
            if isinstance(rate, float) and rate > 0:
                return f"{name}.{key} = {rate}"
    return ""


def start_obstacle(model: nn.Module) -> str | None:
    """Return why forward passes may not start at a later block, or None."""
    config = base_of(model).config.get_text_config()
    if getattr(config, "num_kv_shared_layers", 0):
        return "upper blocks read keys and values of lower ones"
    return None
