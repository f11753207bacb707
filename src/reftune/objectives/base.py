"""What every objective is: a prepared batch and a `run` in, one scalar loss out.

An objective never calls the model. It asks `run(prepared, hidden)` for logits at label positions,
so that label slicing, causal caching and gradient checkpointing stay behind one call, and it may
ask several times (preference pairs, a reference pass).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float, Int, Real
from torch import Tensor, nn

from reftune.errors import RecipeError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reftune.config.recipe import AdapterSpec
    from reftune.model.run import Prepared, RunOutput
    from reftune.report.saliency import TokenMap
    from reftune.training.encode import Encoded

    Parts = Iterable[tuple[Sequence[Encoded], Prepared]]
    Run = Callable[..., RunOutput]


@dataclass
class Loss:
    """What an objective answers.

    Attributes:
        loss: Already divided by the items of the whole optimiser step.
        metrics: Named means over this batch, for metrics.jsonl.
    """

    loss: Float[Tensor, ""]
    metrics: dict[str, float | Real[Tensor, ""]] = field(default_factory=dict)


@dataclass(frozen=True)
class ObjectiveConfig:
    """Settings of an objective. The base class has none."""


class Objective(ABC):
    """Base class of all objectives.

    The contract that makes accumulation and data parallelism exact: `__call__` returns a *sum* over
    the items of its batch, divided by `num_items`, the items of the whole optimiser step over all
    accumulation steps and processes. What an item is says `count`.

    Everything else is optional. Before training `check` sees the adapter and `training_rows` the
    rows; `bind` hands over the trained parameters, and `after_step` may act on them after each
    optimiser step. Validation goes through `__call__` without gradients and sees all labels.

    Args:
        config: Settings, an instance of the class's `Config`; default: its defaults.
    """

    Config: ClassVar[type[ObjectiveConfig]] = ObjectiveConfig
    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    source: ClassVar[str] = ""
    loop: ClassVar[str] = "supervised"
    """Which loop trains it: `supervised`, or `online` (see `reftune.objectives.online`)."""
    rows: ClassVar[str] = "text"
    """Rows it trains on: `text` (prompt and target) or `class` (text and class label)."""
    plots: ClassVar[Mapping[str, tuple[tuple[str, ...], ...]]] = {}
    """Metrics that a run draws: name of the picture to its panels, each the metrics in it. One
    whose name ends in `_target` is drawn as what the others are held against."""

    def __init__(self, config: ObjectiveConfig | None = None) -> None:
        self.config = config if config is not None else self.Config()

    @abstractmethod
    def __call__(self, run: Run, prepared: Prepared, num_items: Real[Tensor, ""] | None) -> Loss:
        """Compute the loss.

        Args:
            run: `run(prepared, hidden=False, inference=False) -> RunOutput`, the only way to the
                model; `inference` is without gradients and dropout.
            prepared: One (micro-)batch.
            num_items: `count` summed over the whole optimiser step; None: this batch only.
        """

    def count(self, prepared: Prepared) -> Int[Tensor, ""]:
        """Return the items of this batch: here the labelled tokens.

        The first token of a causal row has nothing before it and must carry no label.
        """
        return (prepared.labels != -100).sum()

    def check(self, adapter: AdapterSpec) -> None:  # noqa: B027
        """Refuse an adapter that it cannot train. Nothing has been loaded yet.

        Raises:
            RecipeError: If the adapter does not fit.
        """

    def row_limit(self, max_len: int) -> int:
        """Return the longest row in tokens that `training_rows` takes; by default `max_len`."""
        return max_len

    def training_rows(
        self, rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, max_len: int
    ) -> list[Encoded]:
        """Return the rows to train on, by default all as they are.

        Rows may get other labels, be cut or be left out. The answer may depend on nothing but the
        arguments and the settings: each process asks for itself, and a resumed run asks again.

        Args:
            rows: Encoded training rows, all tokens of the target labelled.
            tokenizer: What they were encoded with.
            max_len: Longest row in tokens that may be trained on.
        """
        return list(rows)

    def inform(self, parts: Parts, run: Run) -> list[Encoded] | None:
        """Return the rows with what the untrained model says of them; None: as they are.

        Called once before training, on training rows and on validation rows. The answer may depend
        on nothing but the arguments and the settings, as that of `training_rows`.

        Args:
            parts: Rows in their order, some at a time, each time with the batch they make.
            run: The model with all that is trained switched off.
        """
        return None

    def maps(self, parts: Parts, run: Run, untrained: Run) -> list[TokenMap]:
        """Return what it says of single tokens of a few rows, to draw in the run folder.

        Args:
            parts: As for `inform`.
            run: The trained model.
            untrained: The model with all adapters off.
        """
        return []

    def bind(self, trained: Mapping[str, nn.Parameter], sharded: bool = False) -> None:  # noqa: B027
        """Take the parameters that are trained.

        Called before training, and again when the trainer has placed the model and loaded a
        checkpoint: the latest call counts.

        Args:
            trained: Trained parameters by their names in the model.
            sharded: Whether each process holds a part of each parameter only (FSDP).

        Raises:
            ReftuneError: If the objective has no use for them, or cannot act on parts.
        """

    def after_step(self) -> dict[str, float]:
        """Act after an optimiser step, once on every process; return metrics of the step."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what the objective has accumulated (running statistics); saved on checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take back what `state_dict` returned."""

    @classmethod
    def config_from(cls, values: dict[str, Any]) -> ObjectiveConfig:
        """Build the config from plain values.

        Raises:
            RecipeError: If a key is unknown; the message names the nearest one.
        """
        known = {f.name for f in fields(cls.Config)}
        for key in values:
            if key not in known:
                hint = nearest(key, known) if known else "It has no settings."
                raise RecipeError(f'The objective {cls.name} has no setting "{key}".', hint)
        return cls.Config(**values)


def share_of(
    total: Float[Tensor, ""], num_items: Real[Tensor, ""] | None, own: Int[Tensor, ""]
) -> Float[Tensor, ""]:
    """Divide a summed loss by the items of the step, or by the batch's own (at least one).

    Args:
        total: Sum over the items of this batch.
        num_items: Items of the whole optimiser step, or None.
        own: Items of this batch.
    """
    items = own if num_items is None else num_items
    return total / items.to(total.device, total.dtype).clamp(min=1)
