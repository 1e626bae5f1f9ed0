"""`Limits` (rpm, tpm, rpd, tpd, concurrency), and how model globs choose them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one quota and model: requests and tokens a minute and a day, concurrency. None: no limit."""

    rpm: int | None = None
    tpm: int | None = None
    rpd: int | None = None
    tpd: int | None = None
    concurrency: int | None = None


def limits_for(table: Mapping[str, Limits], *names: str) -> Limits:
    """Return the limits of the first exact name, else of the longest matching glob (the first of equals), else none.

    names: of a model, the deciding one first.
    """
    for name in names:
        if name in table:
            return table[name]
    globs = [glob for glob in table if any(fnmatchcase(name, glob) for name in names)]
    return table[max(globs, key=len)] if globs else Limits()
