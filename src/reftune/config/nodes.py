"""YAML as nodes that remember where they were written.

Faults in a recipe are reported with the line of the key (or the `--set` that brought it), so the
document is kept as `Node`s until it is known to be right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from reftune.config.types import hint
from reftune.errors import RecipeError


@dataclass(frozen=True)
class Fault:
    """One fault: where it is, at which key, what it is and what to do."""

    where: str
    """`line 3`, `--set adapter.rank=x`, or empty for a recipe made in Python."""
    key: str
    """Dotted key, empty for the whole recipe."""
    text: str
    """What is wrong and the remedy."""
    order: int = 0
    """Line number, for sorting."""

    def __str__(self) -> str:
        place = ", ".join(part for part in (self.where, self.key) if part)
        return f"{place}: {self.text}" if place else self.text


@dataclass
class Node:
    """A value with the place it came from. `value` is a scalar, `dict[str, Node]` or a list."""

    value: Any
    line: int = 0
    origin: str = ""
    short: bool = False
    """Set on `stages` when the only stage was written at the top level."""

    @property
    def where(self) -> str:
        """Place for messages."""
        return self.origin or (f"line {self.line}" if self.line else "")

    def plain(self) -> Any:
        """Return the value without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def like(self, value: Any) -> Node:
        """Return another value from the same place."""
        return Node(value, self.line, self.origin)


@dataclass
class Faults:
    """Collects faults, to report all at once."""

    found: list[Fault] = field(default_factory=list)

    def add(self, node: Node, key: str, text: str) -> None:
        """Note a fault at a node."""
        order = node.line if not node.origin else 10**9
        self.found.append(Fault(node.where, key, text, order))

    def check(self, source: str) -> None:
        """Raise one error with all faults, if there are any.

        Raises:
            RecipeError: Its `faults` holds the list.
        """
        if not self.found:
            return
        faults = sorted(self.found, key=lambda fault: fault.order)
        many = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        lines = "\n".join(f"  {fault}" for fault in faults)
        error = RecipeError(f"{source} has {many}:\n{lines}\n")
        error.faults = faults
        raise error


class _Loader(yaml.SafeLoader):
    """YAML with numbers and booleans as people mean them.

    YAML 1.1 reads `1e-3` as text and `no`, `on`, `off`, `12:30` as something else than written.
    """


def _resolvers() -> dict[str, list[tuple[str, Any]]]:
    """Return implicit resolvers with JSON-like booleans and floats, and without dates."""
    dropped = {"bool", "float", "int", "timestamp"}
    kept = {}
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items():
        kept[first] = [pair for pair in pairs if pair[0].rsplit(":", 1)[1] not in dropped]
    return kept


def _install() -> None:
    _Loader.yaml_implicit_resolvers = _resolvers()
    boolean = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
    integer = re.compile(r"^[-+]?[0-9][0-9_]*$")
    number = re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    )
    _Loader.add_implicit_resolver("tag:yaml.org,2002:bool", boolean, list("tTfF"))
    _Loader.add_implicit_resolver("tag:yaml.org,2002:int", integer, list("-+0123456789"))
    _Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    _Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """Read `007` as seven: people do not mean octal."""
    return int(loader.construct_scalar(node).replace("_", ""))


_install()


def parse(text: str, source: str, faults: Faults) -> Node:
    """Read YAML text into nodes. Repeated keys and foreign tags become faults.

    Raises:
        RecipeError: If the text is no YAML at all.
    """
    loader = _Loader(text)
    try:
        tree = loader.get_single_node()
        return Node({}, 1) if tree is None else _convert(loader, tree, "", faults)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "the file"
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(
            f"{source} is no valid YAML: {place}: {problem}.",
            "Check indentation, quotes and colons there.",
        ) from error
    except RecursionError as error:
        raise RecipeError(
            f"{source} holds itself: an alias (*name) stands inside its own anchor (&name).",
            "Write the value out.",
        ) from error
    finally:
        loader.dispose()


def _convert(loader: _Loader, tree: yaml.Node, key: str, faults: Faults) -> Node:
    line = tree.start_mark.line + 1
    if isinstance(tree, yaml.ScalarNode):
        return Node(_scalar(loader, tree, key, faults), line)
    if isinstance(tree, yaml.SequenceNode):
        items = enumerate(tree.value)
        return Node([_convert(loader, item, f"{key}.{i}", faults) for i, item in items], line)
    _repeated(tree, key, faults)
    loader.flatten_mapping(tree)
    entries: dict[str, Node] = {}
    for name_node, value_node in tree.value:
        name = str(name_node.value)
        below = f"{key}.{name}".strip(".")
        entry = _convert(loader, value_node, below, faults)
        entry.line = name_node.start_mark.line + 1
        entries[name] = entry
    return Node(entries, line)


def _scalar(loader: _Loader, tree: yaml.ScalarNode, key: str, faults: Faults) -> Any:
    try:
        return loader.construct_object(tree)
    except yaml.constructor.ConstructorError:
        place = Node(None, tree.start_mark.line + 1)
        faults.add(place, key, f'the tag "{tree.tag}" is not allowed. Write a plain value.')
        return None


def _repeated(tree: yaml.MappingNode, key: str, faults: Faults) -> None:
    seen: dict[str, int] = {}
    for name_node, _ in tree.value:
        name, line = str(name_node.value), name_node.start_mark.line + 1
        if name in seen and name != "<<":
            below = f"{key}.{name}".strip(".")
            text = f"was given in line {seen[name]} already. Keep one."
            faults.add(Node(None, line), below, text)
        seen[name] = line


def from_plain(value: Any, origin: str = "") -> Node:
    """Make nodes of plain values."""
    if isinstance(value, dict):
        entries = {str(key): from_plain(item, origin) for key, item in value.items()}
        return Node(entries, origin=origin)
    if isinstance(value, list | tuple):
        return Node([from_plain(item, origin) for item in value], origin=origin)
    return Node(value, origin=origin)


def override(
    root: Node,
    text: str,
    faults: Faults,
    route: Callable[[list[str], Node], list[str]],
    known: Callable[[list[str]], Iterable[str]],
) -> None:
    """Apply one `a.b=c` to the document, in place.

    Args:
        root: The normalised document.
        text: The override; the value is read as YAML.
        faults: Where to note faults.
        route: Turns a shorthand path into a full one, given the document.
        known: Names the keys that may follow a path, for the hint.
    """
    origin = f"--set {text}"
    path_text, sign, value_text = text.partition("=")
    path = [part for part in path_text.strip().split(".") if part]
    if not sign or not path:
        faults.add(Node(None, origin=origin), "", "is no KEY=VALUE. Write for instance epochs=3.")
        return
    value = from_plain(_override_value(value_text), origin)
    try:
        path = route(path, root)
        _assign(root, path, value, known)
    except LookupError as error:
        faults.add(Node(None, origin=origin), "", str(error.args[0]))


def _override_value(text: str) -> Any:
    """Read the value of an override: YAML, or the text itself where that is no YAML.

    Templates such as `{question}` or `Question: {question}` need no quotes on the command line: a
    mapping is meant only by `{key: value}`.
    """
    try:
        value = parse(text, "", Faults()).plain() if text.strip() else None
    except RecipeError:
        return text.strip()
    if not isinstance(value, dict) or not value:
        return value
    is_flow = text.strip().startswith("{") and any(item is not None for item in value.values())
    return value if is_flow else text.strip()


def _assign(
    root: Node, path: list[str], value: Node, known: Callable[[list[str]], Iterable[str]]
) -> None:
    node = root
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(node.value, list):
            if not part.isdigit() or int(part) >= len(node.value):
                size, name = len(node.value), ".".join(path[:depth])
                raise LookupError(f'{name} has entries 0 to {size - 1}; "{part}" is none of them.')
            if last:
                node.value[int(part)] = value
            else:
                node = node.value[int(part)]
            continue
        if not isinstance(node.value, dict):
            node.value = {}
        if last:
            node.value[part] = value
            return
        keys = list(known(path[:depth]))
        if part not in node.value and keys and part not in keys:
            raise LookupError(f'unknown key "{part}".{hint(part, keys)}')
        node = node.value.setdefault(part, Node({}, origin=value.origin))
