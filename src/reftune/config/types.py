"""Checking single values against annotated types, in words people use."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import itertools
import json
import types
import typing
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from reftune.errors import nearest

MANY = 12
"""More known names than this are not listed when one is near."""
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    type(None): "null",
}


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Return the types of the fields of a dataclass that its maker accepts.

    >>> from reftune.config.recipe import OptimiserSpec
    >>> field_types(OptimiserSpec)["lr"]
    <class 'float'>
    """
    hints = typing.get_type_hints(cls)
    return {item.name: hints[item.name] for item in fields(cls) if item.init}


def check(value: Any, kind: Any) -> tuple[Any, str]:
    """Check a plain value against a type.

    Values are taken strictly: `"3"` is no number and `1` is no truth value, but a whole number is
    a number and a list is a tuple.

    Returns:
        The value in its type and an empty text, or the value and what is wrong with it.

    >>> check("thre", float)
    ('thre', '"thre" is not a number')
    >>> check([0.9, 0.99], tuple[float, float])
    ((0.9, 0.99), '')
    """
    try:
        text = json.dumps(value)
        return _adapter(kind).validate_json(text, strict=True), ""
    except (ValidationError, TypeError, ValueError):
        return value, f"{show(value)} is not {describe(kind)}"


@functools.lru_cache(maxsize=256)
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def show(value: Any) -> str:
    """Return a value as it would be written in YAML."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def describe(kind: Any) -> str:
    """Say in words what a type accepts.

    >>> describe(int | None), describe(Literal["a", "b"])
    ('a whole number or null', '"a" or "b"')
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _either([describe(part) for part in arguments])
    if origin is Literal:
        return _either([show(item) for item in arguments])
    if origin is list:
        return f"a list of {_plural(arguments[0])}"
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list of {_plural(arguments[0])}"
        return f"a list of {len(arguments)} {_plural(arguments[0])}"
    return _WORDS.get(origin or kind, getattr(kind, "__name__", str(kind)))


def literals(kind: Any) -> list[str]:
    """Return the texts a type accepts if it is a choice, else nothing."""
    return [item for item in get_args(kind) if isinstance(item, str)] * (
        get_origin(kind) is Literal
    )


def _plural(kind: Any) -> str:
    names = {int: "whole numbers", float: "numbers", str: "texts", bool: "true or false"}
    return names.get(kind, f"values, each {describe(kind)}")


def _either(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Return the sentence written under each field of a dataclass and its bases.

    Fields without one, and classes whose source is not there, are left out.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base is object or not hasattr(base, "__dataclass_fields__"):
            continue
        try:
            body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(base))).body[0].body
        except (OSError, TypeError, SyntaxError):
            continue
        for entry, doc in itertools.pairwise(body):
            is_text = isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
            if isinstance(entry, ast.AnnAssign) and is_text:
                found[entry.target.id] = inspect.cleandoc(str(doc.value.value))
    return found


def hint(name: str, known: Iterable[str], listed: bool = True) -> str:
    """Return the nearest name and, where that is short or all there is, the known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close and (not listed or len(known) > MANY):
        return f' Did you mean "{close[0]}"?'
    return f" {nearest(name, known)}" if listed else ""
