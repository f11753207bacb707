"""What is saved of a model: the adapter of each PEFT level, those of the plain door, the card."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from reftune.errors import AdapterError, nearest
from reftune.model.lookup import adapter_names, calls, sites
from reftune.model.names import public_name
from reftune.model.record import is_hub_name, kind_name, name_of, task_of
from reftune.model.site import CHILD, Site

HEADS = ("classifier", "score")
"""Modules PEFT saves beside the adapter of a classifier."""
PLACE = "PATH OR HUB NAME OF THIS FOLDER"
"""Stands in a model card until it is known where the artefact goes."""


@dataclass
class Part:
    """One adapter of an artefact.

    Attributes:
        model: The PEFT wrapper it belongs to, or the model for an adapter of the plain door.
        name: The adapter's name.
        kind: `reft`, `lora` or another PEFT type in lower case.
        config: Its PEFT config.
        is_level: Whether `model` is its PEFT wrapper.
    """

    model: nn.Module
    name: str
    kind: str
    config: Any
    is_level: bool

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors under the names PEFT gives them."""
        return _level_tensors(self) if self.is_level else _plain_tensors(self)

    def base_name(self) -> str | None:
        """Return the public name of the base model."""
        return public_name(self.config.base_model_name_or_path) or name_of(self.model)

    def title(self) -> str:
        """Describe the adapter in a line."""
        if self.kind != "reft":
            return str(self.config.peft_type.value)
        config = self.config
        return f"{config.method} on layers {config.layers}, positions {config.positions}"


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder of the adapters library, which calls its config as PEFT does.

    Raises:
        AdapterError: If the folder is one.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # whoever reads it says what is wrong
    if not isinstance(config, dict) or "peft_type" in config:
        return
    version = str(config.get("version", ""))
    if version.startswith("adapters.") or {"config", "model_class"} <= config.keys():
        name = f' "{config["name"]}"' if config.get("name") else ""
        raise AdapterError(
            f"{folder} holds the adapter{name} of the adapters library, which cannot be converted.",
            "Train it again: docs/moving.md says what its settings are called here.",
        )


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
    return kind_name(level.peft_config[active_of(level)])


def active_of(level: nn.Module) -> str:
    """Return the name of the (first) active adapter of a level."""
    active = level.active_adapter
    return active if isinstance(active, str) else active[0]


def own_active(nested: Sequence[nn.Module]) -> list[list[str]]:
    """Return the active adapters of each level, innermost first.

    PEFT's levels of one kind share their books: there a name belongs to the lowest that has it.
    """
    found: list[list[str]] = []
    for i, level in enumerate(nested):
        active = getattr(level.base_model, "active_adapters", None) or level.active_adapter
        active = [active] if isinstance(active, str) else list(active)
        below = [n for k in range(i) if _alike(nested[k], level) for n in found[k]]
        fresh = [n for n in active if n in level.peft_config and n not in below]
        found.append(fresh or [active_of(level)])
    return found


def parts(model: nn.Module, name: str | None = None) -> list[Part]:
    """Return the adapters an artefact of a model holds, innermost first.

    Args:
        model: A PeftModel, nested ones, or a model with adapters of the plain door.
        name: Which adapter to take of the uppermost level that has it; else the active one.

    Raises:
        AdapterError: If there is no adapter of this name, or several could be meant.
    """
    nested = [level for level in levels(model) if level.peft_config]
    known = [list(level.peft_config) for level in nested]
    ours = {n for level, names in zip(nested, known) for n in names if kind_of(level) == "reft"}
    plain = [n for n in adapter_names(model) if n not in ours]
    everything = sorted({n for names in known for n in names} | set(plain))
    if name is not None and name not in everything:
        raise AdapterError(
            f'There is no adapter "{name}" on this model.', nearest(name, everything)
        )
    found: list[Part] = []
    if plain:
        active = [n for n in plain if any(n in site._active_names() for site in sites(model))]
        chosen, name = _one(plain, active, name)
        found.append(Part(model, chosen, "reft", plain_config(model, chosen), False))
    for level, names, active in reversed(list(zip(nested, known, own_active(nested)))):
        chosen, name = _one(names, active, name)
        config = level.peft_config[chosen]
        found.append(Part(level, chosen, kind_name(config), config, True))
    return found[::-1]


def _one(names: list[str], active: list[str], wanted: str | None) -> tuple[str, str | None]:
    """Return the adapter of a level to save, and the name the levels below shall look for."""
    if wanted in names:
        return str(wanted), None
    choice = active or names
    if len(choice) == 1:
        return choice[0], wanted
    quoted = ", ".join(f'"{name}"' for name in choice)
    what = f"The adapters {quoted} are active together; an artefact holds one."
    if not active:
        what = f"None of the adapters {quoted} is active; an artefact holds one."
    raise AdapterError(
        what,
        f'Say which: reftune.save(model, folder, name="{choice[0]}").',
    )


def keep_below_active(level: nn.Module) -> None:
    """Let adapters of the same kind below act too; PEFT activates the newest one alone."""
    nested = levels(level)
    active = own_active(nested)
    below = [n for part, names in zip(nested[:-1], active) if _alike(part, level) for n in names]
    if kind_of(level) == "reft" or not below:
        return  # our tuner does it itself
    before = [(p, p.requires_grad) for p in level.parameters()]
    level.base_model.set_adapter([*below, *active[-1]])
    for parameter, flag in before:
        parameter.requires_grad_(flag)


def _alike(a: nn.Module, b: nn.Module) -> bool:
    return kind_of(a) == kind_of(b)


def _level_tensors(part: Part) -> dict[str, Tensor]:
    """Return an adapter's own tensors only, also when others hang on the same model."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(
        part.model, adapter_name=part.name, save_embedding_layers=False
    )
    ours = part.kind == "reft"
    others = set(adapter_names(part.model)) - {part.name}

    def is_own(key: str) -> bool:
        _, found, inside = key.partition(f".{CHILD}.")
        after_group = inside.partition(".")[2].partition(".")[0]  # only others keep their name
        return bool(found) == ours and after_group not in others

    return {k: v for k, v in tensors.items() if is_own(k) or _is_head(part.model, k)}


def _is_head(level: nn.Module, key: str) -> bool:
    heads = getattr(level, "modules_to_save", None) or ()
    return any(f".{head}." in key for head in heads)


def _site_tensors(model: nn.Module, name: str) -> Iterable[tuple[str, Tensor]]:
    """Return (name, tensor) of an adapter's parameters, without the adapter's name."""
    for place, site in model.named_modules():
        if not isinstance(site, Site):
            continue
        for group, module in site.groups(name).items():
            for key, value in module.state_dict().items():
                yield f"{place}.reft_{group}.{key}", value


def _plain_tensors(part: Part) -> dict[str, Tensor]:
    """Return the adapter's tensors, with the head of a classifier: its adapter is useless alone."""
    tensors = dict(_site_tensors(part.model, part.name))
    for key, value in part.model.state_dict().items():
        if part.config.modules_to_save and set(HEADS) & set(key.split(".")):
            tensors[key] = value
    return {f"base_model.model.{key}": value for key, value in tensors.items()}


def plain_config(model: nn.Module, name: str) -> Any:
    """Return the PEFT config that makes an adapter of the plain door again.

    Raises:
        AdapterError: If parameters besides it are trained, which its artefact could not hold.
    """
    from reftune.model.face import ReftConfig

    task = task_of(model)
    heads = list(HEADS) if task in ("SEQ_CLS", "TOKEN_CLS") else None
    others = [
        key
        for key, p in model.named_parameters()
        if p.requires_grad
        and f".{CHILD}." not in key
        and not set(heads or ()) & set(key.split("."))
    ]
    if others:
        raise AdapterError(
            f'"{name}" cannot be saved alone: {others[0]} and {len(others) - 1} more parameters of '
            "the base model are trained too.",
            "Freeze them, or use get_peft_model with modules_to_save.",
        )
    placement = next(c.placements[name] for c in calls(model) if name in c.placements)
    home = next(site for site in sites(model) if site.groups(name))
    module = next(iter(home.groups(name).values()))
    layers = placement.layers
    return ReftConfig(
        module.config,
        method=module.name,
        layers=layers if isinstance(layers, str) else list(layers),
        site=placement.site,
        positions=str(placement.positions),
        train_positions=placement.train_positions and str(placement.train_positions),
        tied=placement.tied,
        short=placement.short,
        stack=placement.stack,
        blocks=placement.blocks,
        strength=home.strength[name],
        modules_to_save=heads,
        task_type=task,
        inference_mode=True,
    ).fitted(model)


# The model card


def model_card(parts: list[Part], figures: dict[str, Any], place: str = PLACE) -> str:
    """Return the model card of an artefact."""
    base = parts[0].base_name()
    lines = ["---", "library_name: peft"]
    if is_hub_name(base):  # the hub refuses cards that name anything else
        lines.append(f"base_model: {base}")
    lines += ["tags: [reftune]", "---", ""]
    title = " + ".join(part.title() for part in parts)
    lines += [f"# {title}", "", f"Base model: `{base}`.", "", "```python", "import reftune", ""]
    lines += [f'model, tokenizer = reftune.load("{place}")', "```", ""]
    if figures:
        lines += ["| figure | value |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in figures.items()]
        lines.append("")
    lines.append("Trained with reftune. With plain PEFT, `import reftune.peft` first.")
    return "\n".join(lines) + "\n"


USAGE = """## Loading it

```python
import reftune.peft  # registers adapters of type REFTUNE with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "PATH OR HUB NAME OF THIS ADAPTER")
```

or, with the base model in one call, `reftune.load("PATH OR HUB NAME OF THIS ADAPTER")`.
"""
UNFILLED = "Use the code below to get started with the model.\n\n[More Information Needed]"


def amend_card(folder: Path) -> None:
    """Add the import that loading needs to the card PEFT wrote for a folder, if there is one."""
    from huggingface_hub import ModelCard

    file = next(
        (f for f in (folder / "README.md", folder.parent / "README.md") if f.is_file()), None
    )
    if file is None:
        return
    text = file.read_text(encoding="utf-8")
    if "library_name: peft" not in text or "reftune.peft" in text:
        return
    card = ModelCard(text)
    card.data.tags = sorted({*(card.data.tags or []), "reftune"})
    card.data.base_model = public_name(card.data.base_model)
    if not is_hub_name(card.data.base_model):
        card.data.base_model = None
    body = card.text
    if UNFILLED in body:
        body = body.replace(UNFILLED, USAGE.partition("\n\n")[2].rstrip(), 1)
    else:
        body = f"{body.rstrip()}\n\n{USAGE}"
    card.text = body
    card.save(file)
