"""Durations as text, in settings, headers and upstream responses."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?\Z", re.ASCII)
_PARTS: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_COMPOSITE: Final = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+\Z", re.ASCII)


def parse_duration(text: str) -> float:
    """Return the seconds of `250ms`, `30s`, `5m`, `24h`, `7d`, or of plain seconds. Raises ValueError for others."""
    match = _DURATION.match(text.strip()) if len(text) <= 32 else None
    if match is None:
        raise ValueError("a duration such as 250ms, 30s, 5m, 24h or 7d, or plain seconds")
    return float(match[1]) * _UNITS[match[2] or "s"]


def parse_composite(text: str) -> float | None:
    """Return the seconds of a sum such as `6m0s`, the form of OpenAI's `x-ratelimit-reset-*`; None for other texts."""
    text = text.strip()
    return _parse_parts(text) if len(text) <= 64 else None


@lru_cache(1024)
def _parse_parts(text: str) -> float | None:
    """Cached, since each response has two of them, mostly the same ones."""
    if not _COMPOSITE.match(text):
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in _PARTS.findall(text))
