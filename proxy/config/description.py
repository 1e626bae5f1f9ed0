"""The words that describe settings: kinds of values, and `Setting` with its default and one sentence.

`settings.py` describes every setting with them. Reading, printing, the manual and the JSON Schema follow from that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Generic, TypeVar, cast

T = TypeVar("T")

TEXT_SCHEMA: Final = {"type": ["string", "number"]}
"""JSON Schema of a text: YAML reads some texts, such as a model named 5, as numbers."""


@dataclass(frozen=True, slots=True, eq=False)
class Leaf(Generic[T]):
    """A single value. `convert` raises ValueError for a text that is not one; `expected` names what is.

    `secret`: no message repeats what was found. `empty`: nothing is a value too, namely None. `schema`: JSON Schema.
    """

    expected: str
    convert: Callable[[str], T]
    show: Callable[[Any], str] = str
    secret: bool = False
    empty: bool = False
    schema: Mapping[str, Any] = field(default_factory=lambda: TEXT_SCHEMA)


def optional(leaf: Leaf[T]) -> Leaf[T | None]:
    """Return the same kind, or nothing: an absent value, `null`, or a variable that turned out empty."""
    either = cast(Leaf[T | None], leaf)
    return replace(either, show=lambda value: "" if value is None else leaf.show(value), empty=True)


@dataclass(frozen=True, slots=True, eq=False)
class ListOf:
    """A list, read into a tuple. `check` raises Invalid for values that are wrong together."""

    item: Kind
    at_least: int = 0
    check: Callable[[tuple[Any, ...]], None] | None = None

    @property
    def expected(self) -> str:
        return f"a list, each item {self.item.expected}"


@dataclass(frozen=True, slots=True, eq=False)
class MapOf:
    """A table with free names, such as models, in the order of the file. `needed`: a name that must be there."""

    name: Leaf[str]
    value: Kind
    needed: str = ""

    @property
    def expected(self) -> str:
        return f"a table of {self.name.expected}"


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """A table with known names. `make` is the class it is read into; None: a dict of what is written."""

    settings: Mapping[str, Setting]
    make: Callable[..., Any] | None = None
    expected: str = "a table of settings"


@dataclass(frozen=True, slots=True, eq=False)
class OneOf:
    """Several ways to write one setting, which a reader of its own understands."""

    kinds: tuple[Kind, ...]

    @property
    def expected(self) -> str:
        return " or ".join(dict.fromkeys(kind.expected for kind in self.kinds))


Kind = Leaf[Any] | ListOf | MapOf | Section | OneOf


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """One setting. `about`: a sentence for the manual. `fixed`: a reload cannot change it."""

    kind: Kind
    about: str
    default: Any = None
    fixed: bool = False


def setting(kind: Kind, default: T, about: str, *, fixed: bool = False) -> T:
    """Return the dataclass field of a setting, typed as the value it holds."""
    metadata = {"setting": Setting(kind, about, default, fixed)}
    if isinstance(default, dict):
        return cast(T, field(default_factory=default.copy, metadata=metadata))
    return field(default=default, metadata=metadata)


def fixed_setting(kind: Kind, default: T, about: str) -> T:
    """Return the dataclass field of a setting that a reload cannot change."""
    return setting(kind, default, about, fixed=True)


def section(cls: Callable[[], T], about: str) -> T:
    """Return the dataclass field of a section, which is a dataclass of settings itself."""
    return setting(section_of(cls), cls(), about)


def section_of(cls: Any) -> Section:
    """Return the description of a dataclass whose fields are settings."""
    return Section({item.name: item.metadata["setting"] for item in fields(cls) if item.metadata}, cls)
