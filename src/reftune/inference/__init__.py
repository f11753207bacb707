"""Inference: answers from models with adapters, their scores, and how sure the scores are."""

from __future__ import annotations

from reftune.inference.choose import choose
from reftune.inference.diagnose import Diagnosis, diagnose_reasoning
from reftune.inference.evaluate import Evaluation, evaluate
from reftune.inference.generate import generate
from reftune.inference.predictions import Prediction, compare, load_predictions, save_predictions
from reftune.inference.prefix import PrefixCache, prefix_cache
from reftune.inference.stats import PairedTest, mcnemar, over_seeds, wilson
from reftune.inference.stream import stream

__all__ = [
    "Diagnosis",
    "Evaluation",
    "PairedTest",
    "Prediction",
    "PrefixCache",
    "choose",
    "compare",
    "diagnose_reasoning",
    "evaluate",
    "generate",
    "load_predictions",
    "mcnemar",
    "over_seeds",
    "prefix_cache",
    "save_predictions",
    "stream",
    "wilson",
]
