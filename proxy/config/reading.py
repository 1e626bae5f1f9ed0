"""Reads a tree of texts into values by a schema of readers, collecting every mistake on the way.

A reader returns a value or raises `Invalid` for its whole node; composite readers record the mistakes of
their parts and go on, so that one run reports everything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar, cast

from .problems import DEFAULT, Invalid, Problem, SourceLocation, looks_secret, shown, shown_name
from .secret import run_key_command
from .tree import Listing, Node, Scalar, Table
from .values import Leaf

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_VARIABLE: Final = re.compile(r"\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(:-([^}]*))?\})?")


class Reader(Protocol[T_co]):
    def read(self, node: Node, path: str, reading: Reading) -> T_co: ...

    def show(self, value: Any) -> object:
        """The value as plain text, list or dict, to be printed; secrets masked."""


@dataclass(slots=True)
class Reading:
    """One run over the settings: what it may read, and what it found out.

    `defaults`: path -> a default that the environment gives. `folder` is that of the settings file.
    `automatic`: nobody named that file, it merely lay there. `watched`: files whose
    change is a reason to read everything again.
    """

    environ: Mapping[str, str]
    folder: Path
    cwd: Path
    file: str = ""
    defaults: Mapping[str, tuple[object, SourceLocation]] = field(default_factory=dict)
    known: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    places: dict[str, SourceLocation] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    watched: list[Path] = field(default_factory=list)
    automatic: bool = False
    _printed: dict[tuple[str, ...], str] = field(default_factory=dict)

    def fail(self, where: SourceLocation, path: str, message: str) -> None:
        self.broken.add(path)
        self.problems.append(where.problem(path, message))

    def fail_at(self, path: str, message: str) -> None:
        """A mistake of a value already read: at its own place, else at that of what it stands in."""
        self.fail(self.place(path), path, message)

    def place(self, path: str) -> SourceLocation:
        while path and self.places.get(path, DEFAULT) == DEFAULT:
            path = path.rpartition(".")[0]
        return self.places.get(path, DEFAULT)

    def sound(self, *paths: str) -> bool:
        """Whether none of these, and nothing in them, was found broken."""
        return not any(bad == path or bad.startswith(path + ".") for bad in self.broken for path in paths)

    def warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)

    def text(self, node: Scalar) -> str:
        """The scalar's text, `${NAME}` and `${NAME:-default}` replaced. Raises Invalid for an unset one."""
        if node.literal or "${" not in node.text:
            return node.text
        return _VARIABLE.sub(self._variable, node.text)

    def _variable(self, match: re.Match[str]) -> str:
        name, has_default, default = match[1], match[2], match[3]
        if name is None:
            raise Invalid("expected ${NAME} or ${NAME:-default}, found ${ and something else")
        value = self.environ.get(name)
        if value or (value is not None and not has_default):
            return value
        if has_default:
            return default or ""
        raise Invalid(f"expected the environment variable {shown_name(name)}, found that it is not set")

    def resolve(self, where: SourceLocation, path: str) -> Path:
        """A path as written beside the settings file (`~` is the home directory)."""
        folder = self.folder if where.file == self.file else self.cwd
        return folder / Path(path).expanduser()

    def watch(self, where: SourceLocation, path: str) -> Path:
        """The same for a file whose change counts: it is watched from now on."""
        resolved = self.resolve(where, path)
        self.watched.append(resolved)
        return resolved

    def command(self, where: SourceLocation, argv: tuple[str, ...]) -> str:
        """The key that a command prints, run once a reading. Raises Invalid."""
        if self.automatic and where.file == self.file:
            raise Invalid(f"expected a file that runs commands to be named with --config {self.file}")
        if argv not in self._printed:
            self._printed[argv] = run_key_command(argv, self.resolve(where, "."))
        return self._printed[argv]


def kind_of(node: Node) -> str:
    """What a node is, in words that hold nothing of it."""
    if isinstance(node, Listing):
        return "a list"
    if isinstance(node, Table):
        return "a table"
    return "nothing" if node.null else "a single value"


def scalar(node: Node, leaf: Leaf[T], reading: Reading) -> T:
    """The value of a scalar. Raises Invalid."""
    if not isinstance(node, Scalar):
        raise Invalid(f"expected {leaf.expected}, found {kind_of(node)}")
    text = "" if node.null else reading.text(node)
    if leaf.empty and not text:
        return cast(T, None)
    if node.null:
        raise Invalid(f"expected {leaf.expected}, found nothing")
    try:
        return leaf.convert(text)
    except Invalid:
        raise
    except ValueError:
        # A text from the environment may be a secret put into the wrong setting: only its name is repeated.
        found = "something else (not shown)" if leaf.secret or looks_secret(text) else shown(node.text)
        raise Invalid(f"expected {leaf.expected}, found {found}") from None


class Single(Generic[T]):
    """A scalar."""

    def __init__(self, leaf: Leaf[T]) -> None:
        self.leaf = leaf

    def read(self, node: Node, path: str, reading: Reading) -> T:
        return scalar(node, self.leaf, reading)

    def show(self, value: Any) -> object:
        return self.leaf.show(value)


class ListOf(Generic[T]):
    """A list of scalars, as a tuple."""

    def __init__(self, leaf: Leaf[T], at_least: int = 0) -> None:
        self._leaf = leaf
        self._at_least = at_least

    def read(self, node: Node, path: str, reading: Reading) -> tuple[T, ...]:
        values = []
        for i, item in enumerate(items_of(node, f"a list, each item {self._leaf.expected}")):
            try:
                values.append(scalar(item, self._leaf, reading))
            except Invalid as error:
                reading.fail(item.where, f"{path}.{i}", str(error))
        if len(values) < self._at_least and reading.sound(path):
            raise Invalid(f"expected at least {self._at_least} of {self._leaf.expected}, found none")
        return tuple(values)

    def show(self, value: Any) -> object:
        return [self._leaf.show(item) for item in value]


class MapByGlob(Generic[T]):
    """A table whose names are models or globs, in the order of the file."""

    def __init__(self, name: Leaf[str], value: Reader[T]) -> None:
        self._name = name
        self._value = value

    def read(self, node: Node, path: str, reading: Reading) -> dict[str, T]:
        values = {}
        for name, child in entries_of(node, f"a table of {self._name.expected}"):
            inner = f"{path}.{shown_name(name)}"
            try:
                self._name.convert(name)
            except ValueError:
                reading.fail(child.where, inner, f"expected {self._name.expected}, found {shown(name)}")
                continue
            try:
                values[name] = self._value.read(child, inner, reading)
            except Invalid as error:
                reading.fail(child.where, inner, str(error))
        return values

    def show(self, value: Any) -> object:
        return {name: self._value.show(item) for name, item in value.items()}


class Section(Generic[T]):
    """A table with known names, read into a dataclass; layers of it lie over each other, name by name."""

    def __init__(self, cls: Callable[..., T], readers: Mapping[str, Reader[Any]]) -> None:
        self.cls = cls
        self.readers = readers
        self._default = cls()

    def read(self, node: Node, path: str, reading: Reading) -> T:
        return self.read_layers((node,), path, reading)

    def read_layers(self, layers: Sequence[Node], path: str, reading: Reading) -> T:
        """`layers`, weakest first. Values that a stronger layer hides are still checked."""
        tables = []
        for layer in layers:
            try:
                tables.append(dict(entries_of(layer, "a table of settings")))
            except Invalid as error:
                reading.fail(layer.where, path, str(error))
        for table in tables:
            self._refuse_unknown(table, path, reading)
        values = {}
        for name, reader in self.readers.items():
            inner = f"{path}.{name}".lstrip(".")
            nodes = [table[name] for table in tables if name in table]
            default = getattr(self._default, name)
            if isinstance(reader, Section):
                values[name] = reader.read_layers(nodes, inner, reading)
            else:
                values[name] = _strongest(nodes, inner, reader, default, reading)
        return self.cls(**values)

    def _refuse_unknown(self, table: Mapping[str, Node], path: str, reading: Reading) -> None:
        for name, node in table.items():
            if name not in self.readers:
                inner = f"{path}.{shown_name(name)}".lstrip(".")
                reading.fail(node.where, inner, unknown(name, self.readers, reading))

    def show(self, value: Any) -> object:
        """Only what is not the default: a section inside a list is short when printed."""
        written = {name: getattr(value, name) for name in self.readers}
        return {n: self.readers[n].show(v) for n, v in written.items() if v != getattr(self._default, n)}


def _strongest(nodes: Sequence[Node], path: str, reader: Reader[T], default: T, reading: Reading) -> T:
    value, where = default, DEFAULT
    if path in reading.defaults:
        value, where = cast(tuple[T, SourceLocation], reading.defaults[path])
    for node in nodes:
        where = node.where
        try:
            value = reader.read(node, path, reading)
        except Invalid as error:
            reading.fail(where, path, str(error))
    reading.places[path] = where
    return value


def unknown(name: str, names: Iterable[str], reading: Reading) -> str:
    """What to say of a name that is no setting here."""
    close = get_close_matches(name.lower().replace("-", "_"), names, n=1, cutoff=0.6)
    elsewhere = reading.known.get(name, ())
    guess = close[0] if close else " or ".join(elsewhere)
    message = "expected a setting of this section, found an unknown name"
    return f"{message}; did you mean {guess}?" if guess else message


def items_of(node: Node, expected: str) -> tuple[Node, ...]:
    """The items of a list; none for nothing. Raises Invalid for anything else."""
    if isinstance(node, Listing):
        return node.items
    if isinstance(node, Scalar) and node.null:
        return ()
    raise Invalid(f"expected {expected}, found {kind_of(node)}")


def entries_of(node: Node, expected: str) -> tuple[tuple[str, Node], ...]:
    """The entries of a table; none for nothing. Raises Invalid for anything else."""
    if isinstance(node, Table):
        return node.entries
    if isinstance(node, Scalar) and node.null:
        return ()
    raise Invalid(f"expected {expected}, found {kind_of(node)}")
