"""The PEFT face: `ReftConfig` and its tuner, registered as `PeftType.REFTUNE`.

Everything PEFT offers works on it unchanged: `get_peft_model`, `from_pretrained`, several adapters,
`disable_adapter`, `adapter_names=[...]`, Trainer, TRL. Besides this file only `levels.py`,
`checkpoint.py` and `build.py` import peft.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from peft.utils.peft_types import TaskType
from torch import nn

from reftune.errors import AdapterError, ReftuneError
from reftune.interventions import get as get_method
from reftune.interventions.base import Intervention, InterventionConfig
from reftune.model import adapters as core
from reftune.model.levels import amend_card
from reftune.model.merge import merge_adapter
from reftune.model.names import public_name
from reftune.model.quantised import check_backward
from reftune.model.record import (
    base_record,
    check_base,
    check_below,
    check_tensors,
    task_of,
    warn_other_base,
)
from reftune.model.site import CHILD, Site
from reftune.model.sites import base_of, find_blocks, find_targets

MEMBER = "REFTUNE"
OLDEST_PEFT = (0, 21)
"""The first PEFT that puts back the tensors of our adapters by the names they were saved under."""


def _check_peft(version: str) -> None:
    """Raise AdapterError for a PEFT that warns where a loaded adapter stays untrained."""
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_PEFT:
        oldest = ".".join(map(str, OLDEST_PEFT))
        raise AdapterError(
            f"PEFT {version} is installed, reftune needs {oldest} or newer: an older one loads "
            "adapters without their trained weights.",
            f"Run: pip install -U 'peft>={oldest}'",
        )


_check_peft(peft.__version__)


def _add_member() -> None:
    """Add the member to PEFT's enum, whose list of methods is closed."""
    if MEMBER in PeftType.__members__:
        return
    member = str.__new__(PeftType, MEMBER)
    member._name_ = member._value_ = MEMBER
    PeftType._member_names_.append(MEMBER)
    PeftType._member_map_[MEMBER] = member
    PeftType._value2member_map_[MEMBER] = member
    type.__setattr__(PeftType, MEMBER, member)


_add_member()


@dataclass(init=False)
class ReftConfig(PeftConfig):
    """PEFT config of an adapter made of interventions.

    Args:
        intervention: Settings such as `LoreftConfig(rank=4)`, or a method's name.
        method: Registered name, where several methods share a config class.
        layers, site, positions, train_positions, tied, short, stack, blocks: See `Placement`.
        stacked_on: Kind of the adapter it was trained on top of (`lora`), checked when loading.
        base_model: How the base model was loaded (name, revision, dtype, quantize, head)
            and the fingerprint of its weights.
        modules_to_save: Modules trained and saved beside it, for instance a classification head.
        task_type: As in PEFT; default CAUSAL_LM.

    Raises:
        AdapterError: If the method or one of its settings is unknown.
    """

    method: str = "loreft"
    intervention: dict[str, Any] = field(default_factory=dict)
    layers: str | list[int] = "all"
    site: str = "block"
    positions: str = "f5+l5"
    train_positions: str | None = None
    tied: bool = True
    short: str = "union"
    stack: str = "auto"
    blocks: str | None = None
    strength: float = 1.0
    base_dim: int | None = None
    base_layers: int | None = None
    target_modules: str | None = None
    exclude_modules: str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    stacked_on: str | None = None
    base_model: dict[str, Any] | None = None

    def __init__(
        self,
        intervention: InterventionConfig | dict[str, Any] | str | None = None,
        *,
        method: str | None = None,
        layers: str | Sequence[int] = "all",
        site: str = "block",
        positions: str = "f5+l5",
        train_positions: str | None = None,
        tied: bool = True,
        short: str = "union",
        stack: str = "auto",
        blocks: str | None = None,
        strength: float = 1.0,
        base_dim: int | None = None,
        base_layers: int | None = None,
        target_modules: str | None = None,
        exclude_modules: str | None = None,
        modules_to_save: list[str] | None = None,
        bias: str = "none",
        stacked_on: str | None = None,
        base_model: dict[str, Any] | None = None,
        task_type: str | None = TaskType.CAUSAL_LM,
        peft_type: str | None = None,
        auto_mapping: dict[str, Any] | None = None,
        peft_version: str | None = None,
        base_model_name_or_path: str | None = None,
        revision: str | None = None,
        inference_mode: bool = False,
    ) -> None:
        super().__init__(
            task_type=task_type, peft_type=PeftType(MEMBER), auto_mapping=auto_mapping,
            base_model_name_or_path=base_model_name_or_path, revision=revision,
            inference_mode=inference_mode,
        )  # fmt: skip
        self.peft_version = peft_version or self.peft_version
        self.method, self.intervention = _method_of(intervention, method)
        self.layers = layers if isinstance(layers, str) else list(layers)
        self.site, self.positions, self.train_positions = site, str(positions), train_positions
        self.tied, self.short, self.stack, self.blocks = tied, short, stack, blocks
        self.strength, self.base_dim, self.base_layers = strength, base_dim, base_layers
        self.target_modules, self.exclude_modules = target_modules, exclude_modules
        self.modules_to_save, self.bias, self.stacked_on = modules_to_save, bias, stacked_on
        self.base_model = base_model
        self.settings()
        self.placement().groups()

    def placement(self) -> core.Placement:
        """Return where the adapter acts."""
        return core.Placement(
            self.layers,
            self.site,
            self.positions,
            self.train_positions,
            self.tied,
            self.short,
            self.stack,
            self.blocks,
        )

    def settings(self) -> tuple[type[Intervention], InterventionConfig]:
        """Return the intervention's class and frozen config."""
        cls = get_method(self.method)
        return cls, cls.config_from(self.intervention)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the JSON file; the embedded base model is named, not located."""
        values = super().to_dict()
        values["base_model_name_or_path"] = public_name(values.get("base_model_name_or_path"))
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the JSON file; add the import that loading needs to the card PEFT wrote."""
        super().save_pretrained(save_directory, **kwargs)
        amend_card(Path(save_directory))

    def fitted(self, model: nn.Module) -> ReftConfig:
        """Note what the adapter must find again when it is loaded; returns itself.

        Raises:
            AdapterError: If it was trained on a model of another shape.
        """
        base = base_of(model)
        blocks = find_blocks(base, self.stack, self.blocks)
        check_base(self, blocks.dim, len(blocks.modules))
        self.base_dim, self.base_layers = blocks.dim, len(blocks.modules)
        targets = find_targets(blocks, self.layers, self.site)
        self.target_modules = "|".join(re.escape(t.name) for t in targets)
        stored = public_name(self.base_model_name_or_path)
        is_read = isinstance(self.base_model, dict) and self.base_model.get("name") == stored
        if not is_read or self.__dict__.get("_is_noted"):
            self.base_model = base_record(base)
            self._is_noted = True  # a config used again must not keep its first model's record
        return self


def _method_of(
    intervention: InterventionConfig | dict[str, Any] | str | None, method: str | None
) -> tuple[str, dict[str, Any]]:
    if isinstance(intervention, InterventionConfig | str):
        cls, settings = core.resolve(intervention, method)
        return cls.name, settings.to_dict()
    cls = get_method(method or "loreft")
    return method or "loreft", asdict(cls.config_from(dict(intervention or {})))


class ReftLayer(Site, BaseTunerLayer):
    """A site that PEFT can list, save, switch and delete."""

    adapter_layer_names = ("reft_tied", "reft_prefix", "reft_suffix")
    other_param_names = ()

    @property
    def weight(self) -> torch.Tensor:
        """Sites wrap no layer; PEFT's default would search for one for ever."""
        raise AttributeError("a site has no base weight")

    @property
    def bias(self) -> torch.Tensor:
        """See `weight`."""
        raise AttributeError("a site has no base bias")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """Do nothing: `inject` places the weights, and meta weights must stay where they are."""

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the site. PEFT's own way would also unfreeze what a stage below had trained."""
        self._disable_adapters = not enabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter here."""
        BaseTunerLayer.delete_adapter(self, adapter_name)
        self.strength.pop(adapter_name, None)
        self._plan_cache = None


class ReftModel(BaseTuner):
    """The tuner PEFT wraps a model in."""

    prefix = "reft_"
    tuner_layer_cls = ReftLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(
        self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any
    ) -> None:
        below = model.peft_config if isinstance(model, PeftModel) else None
        if below is None:
            super().__init__(model, peft_config, adapter_name, **kwargs)
            return
        # BaseTuner would share, and then overwrite, the configs of the adapter below.
        self.__dict__["peft_config"] = {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            super().__init__(model, peft_config, adapter_name, **kwargs)
        model.peft_config = below

    def _prepare_adapter_config(self, peft_config: ReftConfig, model_config: dict) -> ReftConfig:
        base = base_of(self.model)
        blocks = find_blocks(base, peft_config.stack, peft_config.blocks)
        peft_config.fitted(base)
        check_below(peft_config.stacked_on, self.model, own=peft_config)
        warn_other_base(peft_config.base_model_name_or_path, peft_config.base_model, base)
        if not peft_config.inference_mode:
            check_backward(base)
        self._blocks = blocks
        targets = find_targets(blocks, peft_config.layers, peft_config.site)
        prefix = next(name for name, module in self.model.named_modules() if module is base)
        self._targets = {f"{prefix}.{t.name}".lstrip("."): t for t in targets}
        core.prepare(base, blocks)
        return peft_config

    def _check_target_module_exists(self, peft_config: ReftConfig, key: str) -> bool:
        return key in self._targets

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Create the sites. Targets come from the config, never from checkpoint keys."""
        kwargs["state_dict"] = None
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except ReftuneError:
            core.discard(self.model, adapter_name)
            raise

    def _create_and_replace(
        self,
        peft_config: ReftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        method, config = peft_config.settings()
        site = core.inject(
            self.model,
            self._blocks,
            self._targets[current_key],
            adapter_name,
            method,
            config,
            peft_config.placement(),
            ReftLayer,
        )
        site.strength[adapter_name] = peft_config.strength

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        with nullcontext() if names is None else core.mix(self.model, names):
            yield

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            merge_adapter(self.model, *(adapter_names or self.active_adapters))
        below = self.model
        core.detach(below)
        if "peft_config" in below.__dict__:
            del below.peft_config
        return below

    def enable_adapter_layers(self) -> None:
        """Switch all adapters on; what is frozen stays so, such as the LoRA of an earlier stage."""
        with self._as_trained():
            super().enable_adapter_layers()

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off; what is trained stays so."""
        with self._as_trained():
            super().disable_adapter_layers()

    @contextmanager
    def _as_trained(self) -> Iterator[None]:
        """Keep which parameters are trained: PEFT's LoRA layers change that when they switch."""
        before = [(p, p.requires_grad) for p in self.model.parameters()]
        try:
            yield
        finally:
            for parameter, flag in before:
                parameter.requires_grad_(flag)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Switch this level's adapters; those of levels below go on acting, trained or frozen."""
        lower = [
            name
            for tuner in self.model.modules()
            if isinstance(tuner, ReftModel)
            for name in tuner.active_adapters
        ]
        kept = [
            (p, p.requires_grad)
            for site in core.sites(self.model)
            for name in lower
            for module in site.groups(name).values()
            for p in module.parameters()
        ]
        super().set_adapter(adapter_name, inference_mode)
        for site in core.sites(self.model) if lower else ():
            site._active_adapter = [*lower, *self.active_adapters]
        for parameter, flag in kept:
            parameter.requires_grad_(flag)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; the hooks leave with the last one."""
        super().delete_adapter(adapter_name)
        core.discard(self.model, adapter_name)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Drop the adapter's name right after the group, whatever stands behind it."""
        pattern = rf"(\.{CHILD}\.reft_(?:tied|prefix|suffix))\.{re.escape(adapter_name)}(?=\.)"
        short, count = re.subn(pattern, r"\1", key)
        return short if count else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, adapter_name: str, **more: Any
    ) -> dict[str, torch.Tensor]:
        """Insert the adapter's name; PEFT would only warn of weights that are not there.

        Raises:
            AdapterError: If the tensors are not those of the adapter.
        """
        found = super()._remap_adapter_state_dict_for_load(
            model=model, adapter_name=adapter_name, **more
        )
        own = {
            f"{place}.reft_{group}.{adapter_name}.{key}"
            for place, site in model.named_modules()
            if isinstance(site, Site)
            for group, module in site.groups(adapter_name).items()
            for key in module.state_dict()
        }
        given = {_plain_key(key) for key in found if f".{CHILD}.reft_" in key}
        place = f'the artefact of "{adapter_name}"'
        check_tensors(given, {_plain_key(key) for key in own}, place)
        return found


def _plain_key(key: str) -> str:
    """Return a tensor's name without what PEFT and wrappers of modules put in front of it."""
    parts = key.removeprefix("base_model.model.").split(".")
    return ".".join(part for part in parts if not part.startswith("_"))


def get_peft_model(
    model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """Put an adapter on a model, as `peft.get_peft_model` does.

    A `ReftConfig` that leaves its task type at the default gets the one of the model's class: a
    classifier's head is then trained and saved too.

    Args:
        model: A transformers model, or one with adapters.
        peft_config: A `ReftConfig`, or any other config of PEFT.
        adapter_name: The adapter's name.
        **kwargs: Further arguments of `peft.get_peft_model`.

    Raises:
        AdapterError, SiteError, PositionError: When the config does not fit the model.
    """
    if isinstance(peft_config, ReftConfig) and peft_config.task_type == TaskType.CAUSAL_LM:
        task = task_of(model)
        if task != TaskType.CAUSAL_LM:
            peft_config = copy.copy(peft_config)
            peft_config.task_type = task
    return peft.get_peft_model(model, peft_config, adapter_name, **kwargs)


if PeftType(MEMBER) not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(
        name=MEMBER.lower(), config_cls=ReftConfig, model_cls=ReftModel, prefix="reft_"
    )

__all__ = ["PeftModel", "ReftConfig", "ReftLayer", "ReftModel", "check_base", "get_peft_model"]
