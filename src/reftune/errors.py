"""Errors a stranger can act on: what happened, the value seen, the remedy, the page.

Every error the user can cause is a `ReftuneError`. The command line prints it without a traceback
and exits with `exit_code`; the library raises it like any exception.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ReftuneError(Exception):
    """Base of all errors the user can cause.

    Args:
        what: What happened, with the value seen.
        remedy: What to do about it.
    """

    exit_code = 1
    page = "general"

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what, self.remedy = what.strip(), remedy.strip()
        text = f"{self.what} {self.remedy}".strip()
        super().__init__(f"{text} -> docs/errors.md#{self.page}")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.what, self.remedy)


class RecipeError(ReftuneError):
    """A recipe or command-line value is wrong. Found before any model loads."""

    exit_code, page = 2, "recipe"


class DataError(ReftuneError):
    """Data are missing, empty, malformed, or must not be used this way."""

    exit_code, page = 3, "data"


class SiteError(ReftuneError):
    """A place to intervene cannot be found in the model."""

    exit_code, page = 4, "site"


class PositionError(ReftuneError):
    """A position rule is malformed or cannot be applied to a row."""

    exit_code, page = 4, "position"


class AdapterError(ReftuneError):
    """An adapter cannot be built, used, merged, saved or loaded."""

    exit_code, page = 4, "adapter"


class ModelError(ReftuneError):
    """A base model cannot be loaded or does not fit the request."""

    exit_code, page = 4, "model"


class TrainingError(ReftuneError):
    """Training had to stop: a loss that is not finite, no trainable parameters, no space left."""

    exit_code, page = 5, "training"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint naming the nearest known name and all known names.

    >>> nearest("loreff", ["loreft", "red"])
    'Did you mean "loreft"? Known: loreft, red.'
    """
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    hint = f'Did you mean "{close[0]}"? ' if close else ""
    return f"{hint}Known: {', '.join(known)}."
