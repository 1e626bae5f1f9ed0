"""Settings that a reload cannot change."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any, Final

from .settings import Settings

FIXED: Final = (
    "server.host",
    "server.port",
    "server.workers",
    "server.socket",
    "server.ops",
    "cache.backend",
    "cache.path",
    "cache.memory_size",
    "cache.max_size",
    "cache.max_entry",
    "cache.mode",
    "cache.cassette",
    "cache.stale_while_revalidate",
    "cache.stale_if_error",
    "throttle.backend",
    "redis.url",
    "redis.prefix",
    "ledger.path",
    "ledger.enabled",
)
"""Settings that hold until the next start: what they describe is open, bound or allocated."""


def with_fixed(old: Settings, new: Settings) -> tuple[Settings, list[str]]:
    """`new` with what is fixed taken from `old`; and the names of those that would have been other."""
    changed = [path for path in FIXED if attrgetter(path)(old) != attrgetter(path)(new)]
    for path in changed:
        section, name = path.split(".")
        value: Any = attrgetter(path)(old)
        new = replace(new, **{section: replace(getattr(new, section), **{name: value})})
    return new, changed
