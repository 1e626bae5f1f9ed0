"""Settings that a reload cannot change."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any, Final

from .schema import leaves
from .settings import Settings

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
