"""Reads a tree of texts into values as the description says, and collects every mistake on the way.

Reading a node returns a value, or raises `Invalid` for the whole node. Mistakes within it are recorded and reading goes
on, so that one run reports everything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from .description import Kind, Leaf, ListOf, MapOf, Section
from .key_sources import run_key_command
from .problems import DEFAULT, Invalid, Problem, SourceLocation, looks_secret, shown, shown_name
from .schema import KNOWN
from .tree import Listing, Node, Scalar, Table

_VARIABLE: Final = re.compile(r"\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(:-([^}]*))?\})?")


@dataclass(slots=True)
class Reading:
    """One run over the settings: what it may read, and what it found.

    `readers`: the kinds of settings that need more than `read`. `defaults`: path -> a default that the environment
    gives. `folder`: that of the settings file. `automatic`: the file was found, not named. `watched`: files whose
    change is a reason to read everything again.
    """

    environ: Mapping[str, str]
    folder: Path
    cwd: Path
    readers: Mapping[Kind, Callable[[Node, str, Reading], Any]]
    file: str = ""
    defaults: Mapping[str, tuple[object, SourceLocation]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    places: dict[str, SourceLocation] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    watched: list[Path] = field(default_factory=list)
    automatic: bool = False
    _printed: dict[tuple[str, ...], str] = field(default_factory=dict)

    def fail(self, where: SourceLocation, path: str, message: str) -> None:
        """Record a mistake, and that the setting has no usable value."""
        self.broken.add(path)
        self.problems.append(where.problem(path, message))

    def fail_at(self, path: str, message: str) -> None:
        """Record a mistake of a value already read, at its own place, else at that of what it stands in."""
        self.fail(self.place(path), path, message)

    @contextmanager
    def recording(self, where: SourceLocation, path: str) -> Iterator[None]:
        """Record an `Invalid` raised within, and go on."""
        try:
            yield
        except Invalid as error:
            self.fail(where, path, str(error))

    def place(self, path: str) -> SourceLocation:
        """Return where a setting was written, or what it stands in."""
        while path and self.places.get(path, DEFAULT) == DEFAULT:
            path = path.rpartition(".")[0]
        return self.places.get(path, DEFAULT)

    def sound(self, *paths: str) -> bool:
        """Return whether none of these settings, and nothing in them, has a mistake."""
        return not any(bad == path or bad.startswith(path + ".") for bad in self.broken for path in paths)

    def warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)

    def text(self, node: Scalar) -> str:
        """Return a text with `${NAME}` and `${NAME:-default}` replaced. Raises Invalid for a variable that is unset."""
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
        """Return a path as written beside the settings file (`~` is the home directory)."""
        folder = self.folder if where.file == self.file else self.cwd
        return folder / Path(path).expanduser()

    def watch(self, where: SourceLocation, path: str) -> Path:
        """Resolve the path of a file, which is watched from then on."""
        resolved = self.resolve(where, path)
        self.watched.append(resolved)
        return resolved

    def command(self, where: SourceLocation, argv: tuple[str, ...]) -> str:
        """Return the key that a command prints; it runs once in a reading. Raises Invalid."""
        if self.automatic and where.file == self.file:
            raise Invalid(f"expected a file that runs commands to be named with --config {self.file}")
        if argv not in self._printed:
            self._printed[argv] = run_key_command(argv, self.resolve(where, "."))
        return self._printed[argv]


def read(kind: Kind, node: Node, path: str, reading: Reading) -> Any:
    """Return the value of a node. Raises Invalid if it has none."""
    if kind in reading.readers:
        return reading.readers[kind](node, path, reading)
    if isinstance(kind, Leaf):
        return scalar(node, kind, reading)
    if isinstance(kind, ListOf):
        return _read_list(kind, node, path, reading)
    if isinstance(kind, MapOf):
        return _read_map(kind, node, path, reading)
    assert isinstance(kind, Section)
    return read_section(kind, (node,), path, reading)


def scalar(node: Node, leaf: Leaf[Any], reading: Reading) -> Any:
    """Return the value of a single text. Raises Invalid."""
    if not isinstance(node, Scalar):
        raise Invalid(f"expected {leaf.expected}, found {kind_of(node)}")
    text = "" if node.null else reading.text(node)
    if leaf.empty and not text:
        return None
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


def read_items(
    items: Iterable[Node], path: str, reading: Reading, read_item: Callable[[Node, str], Iterable[Any]]
) -> tuple[Any, ...]:
    """Return what each item is read into, together; an item with a mistake gives nothing."""
    values: list[Any] = []
    for i, item in enumerate(items):
        inner = f"{path}.{i}"
        reading.places[inner] = item.where
        with reading.recording(item.where, inner):
            values += read_item(item, inner)
    return tuple(values)


def _read_list(kind: ListOf, node: Node, path: str, reading: Reading) -> tuple[Any, ...]:
    items = items_of(node, kind.expected)
    values = read_items(items, path, reading, lambda item, inner: [read(kind.item, item, inner, reading)])
    if len(values) < kind.at_least and reading.sound(path):
        raise Invalid(f"expected at least {kind.at_least} of {kind.item.expected}, found none")
    if kind.check is not None:
        kind.check(values)
    return values


def _read_map(kind: MapOf, node: Node, path: str, reading: Reading) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, child in entries_of(node, kind.expected):
        inner = f"{path}.{shown_name(name)}"
        with reading.recording(child.where, inner):
            try:
                kind.name.convert(name)
            except ValueError:
                raise Invalid(f"expected {kind.name.expected}, found {shown(name)}") from None
            values[name] = read(kind.value, child, inner, reading)
    if kind.needed and kind.needed not in values and reading.sound(path):
        raise Invalid(f"expected at least an {kind.needed} price, found none")
    return values


def read_section(section: Section, layers: Sequence[Node], path: str, reading: Reading) -> Any:
    """Return the section of several layers, the weakest first. Values that a stronger layer hides are checked too."""
    tables: list[dict[str, Node]] = []
    for layer in layers:
        with reading.recording(layer.where, path):
            tables.append(dict(entries_of(layer, section.expected)))
    for name, node in (entry for table in tables for entry in table.items()):
        if name not in section.settings:
            reading.fail(node.where, f"{path}.{shown_name(name)}".lstrip("."), unknown(name, section.settings))
    values = {}
    for name, setting in section.settings.items():
        inner = f"{path}.{name}".lstrip(".")
        nodes = [table[name] for table in tables if name in table]
        if isinstance(setting.kind, Section) and (section.make or nodes):
            values[name] = read_section(setting.kind, nodes, inner, reading)
            continue
        value, where = reading.defaults.get(inner, (setting.default, DEFAULT))
        given = section.make is not None
        for node in nodes:
            where = node.where
            with reading.recording(where, inner):
                value, given = read(setting.kind, node, inner, reading), True
        reading.places[inner] = where
        if given:
            values[name] = value
    return values if section.make is None else section.make(**values)


def unknown(name: str, names: Iterable[str]) -> str:
    """Return what to say of a name that is no setting here: the nearest name, or the section it belongs to."""
    close = get_close_matches(name.lower().replace("-", "_"), names, n=1, cutoff=0.6)
    guess = close[0] if close else " or ".join(KNOWN.get(name, ()))
    message = "expected a setting of this section, found an unknown name"
    return f"{message}; did you mean {guess}?" if guess else message


def kind_of(node: Node) -> str:
    """Return what a node is, in words that hold nothing of it."""
    if isinstance(node, Listing):
        return "a list"
    if isinstance(node, Table):
        return "a table"
    return "nothing" if node.null else "a single value"


def items_of(node: Node, expected: str) -> tuple[Node, ...]:
    """Return the items of a list; none for nothing. Raises Invalid for anything else."""
    if isinstance(node, Listing):
        return node.items
    if isinstance(node, Scalar) and node.null:
        return ()
    raise Invalid(f"expected {expected}, found {kind_of(node)}")


def entries_of(node: Node, expected: str) -> tuple[tuple[str, Node], ...]:
    """Return the entries of a table; none for nothing. Raises Invalid for anything else."""
    if isinstance(node, Table):
        return node.entries
    if isinstance(node, Scalar) and node.null:
        return ()
    raise Invalid(f"expected {expected}, found {kind_of(node)}")
