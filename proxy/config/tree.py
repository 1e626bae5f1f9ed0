"""YAML as it is written: a tree of texts that know their place. Nothing is converted here.

YAML 1.1 would make `off` a bool, `2024-10-21` a date, `010` eight and `1e6` a string. What a text means is up
to the setting it is for, so only the structure is taken from YAML. Aliases are followed, with a limit on the
number of values, so that a few lines cannot grow into millions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

import yaml

from .problems import Problem, SourceLocation, shown_name

_NULLS: Final = frozenset({"", "~", "null", "Null", "NULL"})
_MOST_VALUES: Final = 10_000
_DEEPEST: Final = 20
_YAML_TAG: Final = "tag:yaml.org,2002:"
_QUOTED: Final = re.compile(r"'[\w!-]{2,}'")


@dataclass(frozen=True, slots=True)
class Scalar:
    """`text` as written. `literal`: not from YAML, so neither null nor `${NAME}` mean anything in it."""

    text: str
    where: SourceLocation
    quoted: bool = False
    literal: bool = False

    @property
    def null(self) -> bool:
        return not self.quoted and not self.literal and self.text in _NULLS


@dataclass(frozen=True, slots=True)
class Listing:
    items: tuple[Node, ...]
    where: SourceLocation


@dataclass(frozen=True, slots=True)
class Table:
    entries: tuple[tuple[str, Node], ...]
    where: SourceLocation

    def get(self, name: str) -> Node | None:
        return next((node for key, node in self.entries if key == name), None)

    def replaced(self, name: str, node: Node) -> Table:
        """Return this table with `name` set to `node`."""
        others = tuple(entry for entry in self.entries if entry[0] != name)
        return replace(self, entries=(*others, (name, node)))

    def without(self, name: str) -> Table:
        return replace(self, entries=tuple(entry for entry in self.entries if entry[0] != name))


Node = Scalar | Listing | Table


def nested(path: list[str], node: Node) -> Node:
    """Return a node as the setting at a path."""
    for name in reversed(path):
        node = Table(((name, node),), node.where)
    return node


class _TooLarge(Exception):
    pass


def parse(text: str, where: SourceLocation, problems: list[Problem], path: str = "") -> Node | None:
    """Return the tree of a YAML text; None if there is none, with the reasons added to `problems`.

    `where` is the text's own place: in a file every value then has the line it stands on. `path` is the
    setting the text is the value of; "" for a whole file.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        builder = _Builder(where, problems)
        return Scalar("", where) if root is None else builder.node(root, path, 0)
    except yaml.MarkedYAMLError as error:
        line = None if error.problem_mark is None else error.problem_mark.line
        problems.append(_at(where, line).problem(path, f"expected YAML, found a mistake: {_reason(error)}"))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        message = f"expected YAML, found the character U+{error.character:04X}"
        problems.append(_at(where, line).problem(path, message))
    except (RecursionError, _TooLarge):
        message = f"expected at most {_MOST_VALUES} values, nested at most {_DEEPEST} deep; found more"
        problems.append(where.problem(path, message))
    return None


def _at(where: SourceLocation, line: int | None) -> SourceLocation:
    """`where`, at PyYAML's line (from 0) if it is a file."""
    return where if where.via or line is None else replace(where, line=line + 1)


def _reason(error: yaml.MarkedYAMLError) -> str:
    # PyYAML quotes what it could not read, and that may be a secret: `admin_key: *hunter2`.
    problem = error.problem or "no reason given"
    if problem.startswith("but ") and error.context:
        problem = f"{error.context}, {problem}"
    reason = _QUOTED.sub("'…'", problem)
    alias = error.context == "while scanning an alias" or reason.startswith("found undefined alias")
    if alias or "cannot start any token" in reason:
        reason += " (a value that begins with * & % @ or ` needs quotes)"
    elif error.context and "flow" in error.context:
        reason += " (inside [ ] and { } a value such as ${NAME} needs quotes)"
    return reason


class _Builder:
    def __init__(self, where: SourceLocation, problems: list[Problem]) -> None:
        self._where = where
        self._problems = problems
        self._count = 0

    def node(self, node: yaml.Node, path: str, depth: int) -> Node:
        self._count += 1
        if self._count > _MOST_VALUES or depth > _DEEPEST:
            raise _TooLarge
        where = _at(self._where, node.start_mark.line)
        if not node.tag.startswith(_YAML_TAG):
            self._problems.append(where.problem(path, "expected a plain value, found a YAML tag"))
        if isinstance(node, yaml.MappingNode):
            return self._table(node, where, path, depth)
        if isinstance(node, yaml.SequenceNode):
            items = (self.node(item, f"{path}.{i}", depth + 1) for i, item in enumerate(node.value))
            return Listing(tuple(items), where)
        assert isinstance(node, yaml.ScalarNode)
        return Scalar(node.value, where, quoted=node.style is not None)

    def _table(self, node: yaml.MappingNode, where: SourceLocation, path: str, depth: int) -> Table:
        entries: dict[str, Node] = {}
        for key, value in node.value:
            place = _at(self._where, key.start_mark.line)
            if not isinstance(key, yaml.ScalarNode):
                self._problems.append(place.problem(path, "expected a name, found a list or a table"))
                continue
            name = key.value
            inner = f"{path}.{shown_name(name)}".lstrip(".")
            if name in entries:
                first = entries[name].where.line
                message = "expected each name once, found a duplicate key" + (
                    f" (first in line {first})" if first else ""
                )
                self._problems.append(place.problem(inner, message))
            child = self.node(value, inner, depth + 1)
            # A block value begins below its name; a person looks for the name.
            entries.setdefault(name, replace(child, where=place))
        return Table(tuple(entries.items()), where)
