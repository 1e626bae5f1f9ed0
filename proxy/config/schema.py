"""Every setting by its path, the variable that sets it, and which settings a reload cannot change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter
from typing import Any, Final

from .description import Section, Setting, section_of
from .settings import Settings

SETTINGS: Final = section_of(Settings)
PREFIX: Final = "PROXY__"


def leaves(section: Section = SETTINGS, prefix: str = "") -> Iterator[tuple[str, Setting]]:
    """Yield every setting that is not a section itself: its dotted path and its description."""
    for name, setting in section.settings.items():
        if isinstance(setting.kind, Section):
            yield from leaves(setting.kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", setting


def variable(path: str) -> str:
    """Return the name of the environment variable that sets a path."""
    return PREFIX + path.upper().replace(".", "__")


def _paths_by_name() -> dict[str, tuple[str, ...]]:
    paths: dict[str, tuple[str, ...]] = {}
    for path, _ in leaves():
        name = path.rpartition(".")[2]
        paths[name] = (*paths.get(name, ()), path)
    return paths


KNOWN: Final = _paths_by_name()
"""A setting's name -> its paths, to help whoever wrote it into the wrong section."""

FIXED: Final = tuple(path for path, setting in leaves() if setting.fixed)
"""Settings that hold until the next start: what they describe is open, bound or allocated."""


def with_fixed(old: Settings, new: Settings) -> tuple[Settings, list[str]]:
    """Return `new` with what is fixed taken from `old`, and the paths whose values differed."""
    changed = [path for path in FIXED if attrgetter(path)(old) != attrgetter(path)(new)]
    for path in changed:
        section, name = path.split(".")
        value: Any = attrgetter(path)(old)
        new = replace(new, **{section: replace(getattr(new, section), **{name: value})})
    return new, changed
