"""Sequence classification and regression on the model's class head.

Left out on purpose: several labels at once for a row, weights of classes, label smoothing, and
losses over tokens (tagging, spans).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jaxtyping import Bool, Int, Real
from torch import Tensor
from torch.nn import functional as F

from reftune.errors import DataError, ModelError
from reftune.objectives.base import Loss, Objective, ObjectiveConfig, share_of

if TYPE_CHECKING:
    from reftune.model.run import Prepared
    from reftune.objectives.base import Run


@dataclass(frozen=True)
class ClassificationConfig(ObjectiveConfig):
    """Settings of the class-head loss."""

    problem: Literal["auto", "classes", "regression"] = "auto"
    """Cross-entropy over classes, or squared error; `auto`: by the type of the labels."""


class Classification(Objective):
    """Mean loss per row on logits z of C classes.

    Classes: L = −(1/N) Σ_i log softmax(z_i)[y_i].   Regression (C = 1): L = (1/N) Σ_i (z_i − y_i)².
    N = rows of the whole optimiser step. Metrics: `accuracy` or `squared_error`.

    Labels are integers with −100 for "no label", or floats with NaN for it.
    """

    Config = ClassificationConfig
    name = "classification"
    title = "Classification"
    source = "Wu et al. 2024, arXiv 2404.03592, section 4.4 (GLUE)"
    rows = "class"

    def __call__(self, run: Run, prepared: Prepared, num_items: Real[Tensor, ""] | None) -> Loss:
        """Return cross-entropy or squared error, summed over rows and divided by N."""
        labels = self._labels(prepared)
        logits = run(prepared).class_logits
        if logits is None:
            raise ModelError(
                "The objective classification needs a class head, this model has none.",
                "Set model.head: classification.",
            )
        logits, known = logits.float(), self._known(labels)
        if self._is_regression(labels):
            error = (logits[:, 0] - labels.float().nan_to_num()) ** 2
            total = (error * known).sum()
            metrics = {"squared_error": total.detach() / known.sum().clamp(min=1)}
        else:
            self._check_range(labels, logits.shape[1])
            total = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            right = (logits.argmax(-1) == labels) & known
            metrics = {"accuracy": right.sum() / known.sum().clamp(min=1)}
        return Loss(share_of(total, num_items, known.sum()), metrics)

    def count(self, prepared: Prepared) -> Int[Tensor, ""]:
        """Return the rows that have a label."""
        return self._known(self._labels(prepared)).sum()

    def _labels(self, prepared: Prepared) -> Real[Tensor, " batch"]:
        labels = prepared.labels
        if labels.dim() != 1:
            raise DataError(
                "The rows have no class label.",
                "Use a classification task, or the objective sft for rows with a target text.",
            )
        return labels

    def _is_regression(self, labels: Real[Tensor, " batch"]) -> bool:
        if self.config.problem == "auto":
            return labels.is_floating_point()
        return self.config.problem == "regression"

    def _known(self, labels: Real[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
        return ~labels.isnan() if labels.is_floating_point() else labels != -100

    def _check_range(self, labels: Real[Tensor, " batch"], num_classes: int) -> None:
        if labels.is_floating_point():
            raise DataError(
                "Class labels are fractional numbers.", "Use problem: regression, or whole numbers."
            )
        if labels.device.type == "cpu" and len(labels) and int(labels.max()) >= num_classes:
            raise DataError(
                f"A row has class {int(labels.max())}, the head has {num_classes} classes (0 to "
                f"{num_classes - 1}).",
                "Check the labels, or load the model with more classes.",
            )
