"""Durations as people write them, in settings, headers and upstream answers."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_ONE: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?\Z", re.ASCII)
_PARTS: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SUM: Final = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+\Z", re.ASCII)


def parse_duration(text: str) -> float:
    """Seconds of `250ms`, `30s`, `5m`, `24h`, `7d`, or plain seconds. Raises ValueError otherwise."""
    match = _ONE.match(text.strip()) if len(text) <= 32 else None
    if match is None:
        raise ValueError("a duration such as 250ms, 30s, 5m, 24h or 7d, or plain seconds")
    return float(match[1]) * _UNITS[match[2] or "s"]


def parse_composite(text: str) -> float | None:
    """Seconds of a sum such as `6m0s` or `1h30m`, the form of OpenAI's `x-ratelimit-reset-*`; None if it is not one."""
    text = text.strip()
    return _sum_of(text) if len(text) <= 64 else None


@lru_cache(1024)
def _sum_of(text: str) -> float | None:
    """Every answer tells two, mostly the same again."""
    if not _SUM.match(text):
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in _PARTS.findall(text))
