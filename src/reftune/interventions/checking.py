"""Checking the fields of a settings dataclass against their annotations."""

from __future__ import annotations

import math
import types
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from reftune.errors import AdapterError, nearest

_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def check_fields(settings: Any) -> None:
    """Check every field whose type is a choice, a number, a text, or one of several of these.

    Raises:
        AdapterError: Names the first field that does not fit, its value and what is allowed.

    >>> from reftune.interventions.loreft import LoreftConfig
    >>> LoreftConfig(init="idendity")
    Traceback (most recent call last):
    ...
    reftune.errors.AdapterError: init is "idendity". Did you mean "identity"? ...
    """
    try:
        hints = get_type_hints(type(settings))
    except NameError:  # a class made inside a function may name types nobody else can find
        return
    for item in fields(settings):
        value, kind = getattr(settings, item.name), hints[item.name]
        if not fits(value, kind):
            raise AdapterError(f"{item.name} is {_show(value)}.", _remedy(value, kind))


def fits(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type; types that are not plain ones accept everything.

    >>> fits(True, int), fits(3, float), fits("3", int | None), fits(None, int | None)
    (False, True, False, True)
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in arguments)
    if origin is Literal:
        return any(value == item and type(value) is type(item) for item in arguments)
    if kind is type(None):
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and not math.isnan(value)
    return isinstance(value, str) if kind is str else True


def _show(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _remedy(value: Any, kind: Any) -> str:
    if get_origin(kind) is Literal:
        return nearest(str(value), map(str, get_args(kind)))
    return f"Use {_describe(kind)}."


def _describe(kind: Any) -> str:
    if kind is type(None):
        return "None"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_describe(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return " or ".join(_show(item) for item in get_args(kind))
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))
