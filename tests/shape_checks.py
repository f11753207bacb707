"""Run-time checks of the shapes in signatures, switched on for all tests.

jaxtyping's import hook wraps functions and dataclasses of every module that annotates shapes. Only
what says a shape is checked: wrong settings must still reach the library, which has words for them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from inspect import isclass, isfunction
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import jaxtyping
from beartype import beartype

SOURCE = Path(find_spec("reftune").origin).parent
CHECKED: set[str] = set()
"""Full names of the functions whose shapes are checked; it grows with the imports."""


def annotated() -> dict[str, bool]:
    """Return the modules that annotate shapes, and whether they import torch only when called."""
    found = {}
    for file in SOURCE.rglob("*.py"):
        line = re.search(r"^( *)from jaxtyping import", file.read_text(encoding="utf-8"), re.M)
        if line:
            parts = file.relative_to(SOURCE.parent).with_suffix("").parts
            found[".".join(parts)] = bool(line[1])
    return found


def says_shape(kind: Any) -> bool:
    """Say whether a type is, or holds, a tensor of some shape."""
    is_shape = isinstance(kind, type(jaxtyping.AbstractArray))
    return is_shape or any(says_shape(part) for part in get_args(kind))


def shapes_only(function: Callable) -> Callable:
    """Check the arguments and the answer of a function as far as they say a shape."""
    kinds = {name: kind for name, kind in function.__annotations__.items() if says_shape(kind)}
    if not kinds:
        return function
    CHECKED.add(f"{function.__module__}.{function.__qualname__}")
    function.__annotations__ = kinds
    return beartype(function)


class Finder(MetaPathFinder):
    """Loads modules through jaxtyping's hook, but faster, and with names it could not resolve.

    The hook's loader compiles anew all that a module imports, transformers included; here just the
    module is. Some modules import the names of their annotations for type checkers alone: they are
    lent them while they are loaded, so that a missing import inside a function is still an error.
    """

    def __init__(self, hook: MetaPathFinder, modules: dict[str, bool]) -> None:
        self.hook, self.modules = hook, modules

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Find a module that annotates shapes."""
        if fullname not in self.modules:
            return None
        spec = self.hook.find_spec(fullname, path, target)
        spec.loader.exec_module = partial(self.load, spec.loader)
        return spec

    def load(self, loader: Any, module: Any) -> None:
        """Run a module's code."""
        names = lent() if self.modules[module.__name__] else {}
        vars(module).update(names)
        file = loader.get_filename()
        exec(loader.source_to_code(loader.get_data(file), file), vars(module))
        for name in names:
            del vars(module)[name]
        for place, name, wrapper in list(wrapped([module])):
            if f"{wrapper.__module__}.{wrapper.__qualname__}" not in CHECKED:
                setattr(place, name, wrapper.__wrapped__)  # nothing to check: do not pay for it


def lent() -> dict[str, Any]:
    """Return the names in annotations of shapes."""
    from torch import Tensor

    kinds = ("Bool", "Float", "Int", "Real", "Shaped")
    return {"Tensor": Tensor, **{kind: getattr(jaxtyping, kind) for kind in kinds}}


def install() -> None:
    """Check the shapes of all modules that are imported from now on."""
    modules = annotated()
    jaxtyping.install_import_hook(list(modules), f"{__name__}.{shapes_only.__name__}")
    sys.meta_path.insert(0, Finder(sys.meta_path[0], modules))


def wrapped(modules: list[Any]) -> Iterator[tuple[Any, str, Any]]:
    """Yield what the hook has wrapped in modules: the module or class, the name, the wrapper."""
    classes = {kind for module in modules for kind in vars(module).values() if isclass(kind)}
    for place in (*modules, *classes):
        for name, member in vars(place).items():
            if isfunction(member) and member.__globals__["__name__"].startswith("jaxtyping."):
                yield place, name, member


@contextmanager
def suspended() -> Iterator[None]:
    """Check nothing inside: torch.compile cannot look into the checks."""
    modules = [sys.modules[name] for name in annotated() if name in sys.modules]
    with patch.object(jaxtyping.config, "jaxtyping_disable", True), ExitStack() as patches:
        for place, name, wrapper in list(wrapped(modules)):
            patches.enter_context(patch.object(place, name, wrapper.__wrapped__))
        yield
