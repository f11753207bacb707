"""The PEFT wrappers of a model, one a level of a stack, and the model card of an artefact."""

from __future__ import annotations

from typing import Any

from torch import nn

from reftune.model.names import public_name


def levels(model: nn.Module) -> list[nn.Module]:
    """Return the PEFT wrappers of a model, innermost (nearest to the base) first."""
    from peft import PeftModel

    found = []
    while isinstance(model, PeftModel):
        found.append(model)
        model = model.base_model.model if hasattr(model.base_model, "model") else model.base_model
    return found[::-1]


def kind_of(level: nn.Module) -> str:
    """Return `reft`, `lora` or another PEFT type in lower case."""
    kind = str(level.peft_config[active_of(level)].peft_type.value).lower()
    return "reft" if kind == "reftune" else kind


def active_of(level: nn.Module) -> str:
    """Return the name of the (first) active adapter of a level."""
    active = level.active_adapter
    return active if isinstance(active, str) else active[0]


def base_name(level: nn.Module) -> str | None:
    """Return the public name of the base model under a level."""
    config = level.peft_config[active_of(level)]
    name = config.base_model_name_or_path
    if not name:
        name = getattr(getattr(level.get_base_model(), "config", None), "_name_or_path", None)
    return public_name(name)


def model_card(parts: list[nn.Module], figures: dict[str, Any]) -> str:
    """Return the model card of an artefact."""
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {base_name(parts[0])}",
        "tags: [reftune]",
        "---",
        "",
    ]
    title = " + ".join(_describe(part) for part in parts)
    lines += [f"# {title}", "", "```python", "import reftune", ""]
    lines += ['model, tokenizer = reftune.load("PATH OR HUB NAME OF THIS FOLDER")', "```", ""]
    if figures:
        lines += ["| figure | value |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in figures.items()]
        lines.append("")
    lines.append(
        "Trained with [reftune](https://pypi.org/project/reftune/). "
        "With plain PEFT, `import reftune.peft` first."
    )
    return "\n".join(lines) + "\n"


def _describe(level: nn.Module) -> str:
    config = level.peft_config[active_of(level)]
    if kind_of(level) != "reft":
        return str(config.peft_type.value)
    return f"{config.method} on layers {config.layers}, positions {config.positions}"
