"""Finding the places to intervene: the blocks of a model and modules inside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from reftune.errors import SiteError, nearest
from reftune.model.layers import parse_layers

BLOCK = "block"


@dataclass
class Blocks:
    """The transformer blocks of one stack of a model.

    Attributes:
        stack: The module whose forward receives input ids and attention mask (a backbone).
        modules: The blocks, in order.
        names: Their dotted names from the base model.
        dim: Width of the residual stream.
        is_encoder: Whether every real token of the stack's input belongs to the prompt.
    """

    stack: nn.Module
    modules: list[nn.Module]
    names: list[str]
    dim: int
    is_encoder: bool


@dataclass
class Target:
    """One module that gets a site."""

    name: str
    module: nn.Module
    dim: int
    layer: int


def base_of(model: nn.Module) -> nn.Module:
    """Return the transformers model inside PEFT wrappers (also nested ones)."""
    while True:
        inner = getattr(model, "model", None)
        if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            model = model.base_model  # get_base_model() fails once all adapters are deleted
        elif hasattr(model, "targeted_module_names") and isinstance(inner, nn.Module):
            model = inner
        else:
            return model


def find_blocks(model: nn.Module, stack: str = "auto", blocks: str | None = None) -> Blocks:
    """Find the transformer blocks.

    Args:
        model: A transformers model, also inside PEFT.
        stack: `encoder`, `decoder` or `auto`: the encoder of an encoder-decoder (the prompt lives
            there), else the only stack.
        blocks: Dotted name of the list of blocks, for models where the search fails.

    Raises:
        SiteError: If nothing is found; the message shows how to name the blocks by hand.
    """
    base = base_of(model)
    config = getattr(base, "config", None)
    backbone, is_encoder = _stack(base, stack)
    names = {id(module): name for name, module in base.named_modules()}
    modules = _search(base, backbone) if blocks is None else _named_list(base, blocks)
    dim = _width(config, modules)
    return Blocks(backbone, modules, [names[id(m)] for m in modules], dim, is_encoder)


def _stack(base: nn.Module, stack: str) -> tuple[nn.Module, bool]:
    """Return the backbone to hook and whether it is an encoder."""
    config = getattr(base, "config", None)
    if stack not in ("auto", "encoder", "decoder"):
        raise SiteError(
            f'There is no stack "{stack}".', nearest(stack, ("auto", "encoder", "decoder"))
        )
    if getattr(config, "is_encoder_decoder", False):
        side = "decoder" if stack == "decoder" else "encoder"
        return getattr(base, f"get_{side}")(), side == "encoder"
    backbone = base.get_decoder() if hasattr(base, "get_decoder") else None
    if not isinstance(backbone, nn.Module):
        backbone = getattr(base, getattr(base, "base_model_prefix", ""), base)
    bidirectional = not getattr(config, "is_decoder", False) and not _is_causal(base)
    return backbone, bidirectional


def _is_causal(base: nn.Module) -> bool:
    """Say whether attention is causal, judged by the attention modules themselves."""
    flags = [m.is_causal for m in base.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    if flags:
        return any(flags)
    return "CausalLM" in type(base).__name__ or hasattr(base, "prepare_inputs_for_generation")


def _search(base: nn.Module, backbone: nn.Module) -> list[nn.Module]:
    config = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    counts = {getattr(text, key, None) for key in ("num_hidden_layers", "n_layer", "num_layers")}
    counts |= {getattr(text, "num_decoder_layers", None), getattr(text, "encoder_layers", None)}
    lists = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    uniform = [m for m in lists if len({type(block) for block in m}) == 1]
    for wanted in (
        [m for m in uniform if len(m) in counts and isinstance(m[0], GradientCheckpointingLayer)],
        [m for m in uniform if isinstance(m[0], GradientCheckpointingLayer)],
        [m for m in uniform if len(m) in counts],
    ):
        if wanted:
            return list(wanted[0])
    found = [name for name, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    raise SiteError(
        f"The transformer blocks of {type(base).__name__} were not found.",
        'Name them by hand, as in blocks="model.layers". Lists of modules in this model: '
        f"{', '.join(found) or 'none'}.",
    )


def _named_list(base: nn.Module, name: str) -> list[nn.Module]:
    lists = {n: m for n, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if name not in lists:
        raise SiteError(f'The model has no list of blocks "{name}".', nearest(name, lists))
    return list(lists[name])


def _width(config: object, modules: list[nn.Module]) -> int:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for key in ("hidden_size", "d_model", "n_embd"):
        if isinstance(getattr(text, key, None), int):
            return getattr(text, key)
    sizes = [m.weight.shape[-1] for m in modules[0].modules() if "norm" in type(m).__name__.lower()]
    if not sizes:
        raise SiteError(
            "The width of the hidden states is not in the model's config.",
            "Set config.hidden_size.",
        )
    return int(sizes[0])


def find_targets(blocks: Blocks, layers: str | Sequence[int], site: str = BLOCK) -> list[Target]:
    """Return the modules that get a site.

    Args:
        blocks: From `find_blocks`.
        layers: See `parse_layers`.
        site: `block` for the block output, or the dotted name of a module inside each block.

    Raises:
        SiteError: If the named module does not exist; the message lists those that do.
    """
    targets = []
    for layer in parse_layers(layers, len(blocks.modules)):
        block, name = blocks.modules[layer], blocks.names[layer]
        if site == BLOCK:
            targets.append(Target(name, block, blocks.dim, layer))
            continue
        module = dict(block.named_modules()).get(site)
        if module is None:
            have = [i for i, b in enumerate(blocks.modules) if site in dict(b.named_modules())]
            where = f" Layers that have it: {', '.join(map(str, have))}." if have else ""
            raise SiteError(
                f'Block {name} has no module "{site}".',
                f"Linear modules in it: {', '.join(linear_names(block)) or 'none'}.{where}",
            )
        targets.append(Target(f"{name}.{site}", module, _out_dim(module, name, site), layer))
    return targets


def linear_names(block: nn.Module) -> list[str]:
    """Return the names of the modules in a block whose output width is known, outermost first."""
    names: list[str] = []
    for name, module in block.named_modules():
        if _out_features(module) and not any(name.startswith(f"{n}.") for n in names):
            names.append(name)
    return names


def _out_features(module: nn.Module) -> int | None:
    for key in ("out_features", "nf"):
        if isinstance(getattr(module, key, None), int):
            return getattr(module, key)
    return None


def _out_dim(module: nn.Module, block: str, site: str) -> int:
    dim = _out_features(module)
    if dim is None:
        raise SiteError(
            f'"{site}" in {block} is a {type(module).__name__}; its output width is unknown.',
            "Name a linear module, or use site: block.",
        )
    return dim
