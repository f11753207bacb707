"""The embedded world and its base models: everything the project measures without a download.

`reftune.nano.load()` gives the shipped model and tokenizer, `python -m reftune.nano --help` lists
what can be made again from code: tokenizer, training, release, gates, card.

Importing this package imports neither torch nor transformers; `load` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

NAMES: tuple[str, ...] = ("nano", "nano-gpt2", "nano-encoder")
"""Names of the models this package knows. Not all need be shipped: see `shipped`."""

WEIGHTS = Path(__file__).parent / "weights"

__all__ = ["NAMES", "WEIGHTS", "load", "path", "shipped"]


def shipped() -> tuple[str, ...]:
    """Return the names of the models whose weights lie in the package.

    >>> set(shipped()) <= set(NAMES)
    True
    """
    return tuple(name for name in NAMES if (WEIGHTS / name / "model.safetensors").is_file())


def path(name: str = "nano") -> Path:
    """Return the folder of a packaged model, as `from_pretrained` takes it.

    Args:
        name: One of `NAMES`.

    Raises:
        ValueError: The name is unknown, or its weights are not shipped.
    """
    if name not in NAMES:
        raise ValueError(f"No embedded model is called {name!r}. Known: {', '.join(NAMES)}.")
    folder = WEIGHTS / name
    if not (folder / "model.safetensors").is_file():
        have = ", ".join(shipped()) or "none"
        raise ValueError(
            f"The weights of {name!r} are not shipped (shipped: {have}). Make them with "
            f"`python -m reftune.nano train --model {name} --out RUN` and "
            f"`python -m reftune.nano release --run RUN`."
        )
    return folder


def load(
    name: str = "nano", dtype: torch.dtype | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load an embedded model, in evaluation mode, and its tokenizer.

    Args:
        name: One of `NAMES`.
        dtype: What the weights are cast to; None keeps the stored bf16.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    folder = path(name)
    kind = AutoModelForMaskedLM if name == "nano-encoder" else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype="auto" if dtype is None else dtype)
    return model.eval(), AutoTokenizer.from_pretrained(folder)
