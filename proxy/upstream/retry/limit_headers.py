"""The headers in which upstreams tell what is left of their limits, in the spellings of several providers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final, NamedTuple

from ...protocol.durations import parse_composite
from .error_body import Dimension

MAX_WAIT: Final = 3600.0
"""No upstream header makes a key or a request wait longer than this at once (seconds)."""

DIMENSIONS: Final[tuple[Dimension, ...]] = ("requests", "tokens")

_TIMESTAMP: Final = 1e9
"""A reset from this number on is a Unix time, in seconds or milliseconds, not a number of seconds."""
_LAST_TIMESTAMP: Final = 1e13


class LimitHeaders(NamedTuple):
    """What a response says of one limit, as numbers; reset: seconds."""

    remaining: float | None
    limit: float | None
    reset: float | None


# (remaining, limit, reset) of OpenAI, Azure and Groq; Cerebras; Mistral; Anthropic; Together and OpenRouter; the IETF.
_NAMES: Final[Mapping[Dimension, tuple[tuple[str, str, str], ...]]] = {
    "requests": (
        ("x-ratelimit-remaining-requests", "x-ratelimit-limit-requests", "x-ratelimit-reset-requests"),
        (
            "x-ratelimit-remaining-requests-minute",
            "x-ratelimit-limit-requests-minute",
            "x-ratelimit-reset-requests-minute",
        ),
        ("x-ratelimit-remaining-req-minute", "x-ratelimit-limit-req-minute", "x-ratelimit-reset-req-minute"),
        (
            "anthropic-ratelimit-requests-remaining",
            "anthropic-ratelimit-requests-limit",
            "anthropic-ratelimit-requests-reset",
        ),
        ("x-ratelimit-remaining", "x-ratelimit-limit", "x-ratelimit-reset"),
        ("ratelimit-remaining", "ratelimit-limit", "ratelimit-reset"),
    ),
    "tokens": (
        ("x-ratelimit-remaining-tokens", "x-ratelimit-limit-tokens", "x-ratelimit-reset-tokens"),
        ("x-ratelimit-remaining-tokens-minute", "x-ratelimit-limit-tokens-minute", "x-ratelimit-reset-tokens-minute"),
        ("x-ratelimitbysize-remaining-minute", "x-ratelimitbysize-limit-minute", "ratelimitbysize-reset"),
        (
            "anthropic-ratelimit-tokens-remaining",
            "anthropic-ratelimit-tokens-limit",
            "anthropic-ratelimit-tokens-reset",
        ),
        ("x-tokenlimit-remaining", "x-tokenlimit-limit", "x-ratelimit-reset"),
    ),
}


def limit_headers(headers: Mapping[str, str], dimension: Dimension) -> LimitHeaders:
    """Return what a response says of one limit, in the first spelling that it uses."""
    for remaining, limit, reset in _NAMES[dimension]:
        left, until = headers.get(remaining), headers.get(reset)
        if left is not None or until is not None:
            return LimitHeaders(
                read_number(left), read_number(headers.get(limit)), read_reset(until, headers.get("date"))
            )
    return LimitHeaders(None, None, None)


def read_reset(text: str | None, date: str | None = None) -> float | None:
    """Return the seconds of a reset, at most `MAX_WAIT`: `6m0s`, a number, or a time, as Unix time or by RFC 3339.

    It is None for nonsense and for 0, which says nothing. date: the `Date` of the response, from which a time counts.
    """
    if text is None:
        return None
    seconds = parse_composite(text)
    if seconds is None:
        seconds = read_number(text)
    moment = _time_of(text) if seconds is None else seconds if _TIMESTAMP <= seconds < _LAST_TIMESTAMP else None
    if moment is not None:
        sent = _date_of(date)
        if sent is None:
            return None
        seconds = max(0.0, (moment / 1000 if moment >= 1000 * _TIMESTAMP else moment) - sent)
    return min(seconds, MAX_WAIT) if seconds else None


def read_number(text: str | None) -> float | None:
    """Return a finite number of at least 0; None for anything else."""
    if text is None or len(text) > 32 or not text.isascii() or "_" in text:
        return None
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _time_of(text: str) -> float | None:
    if len(text) > 40 or "T" not in text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


def _date_of(text: str | None) -> float | None:
    try:
        return None if text is None else parsedate_to_datetime(text).replace(tzinfo=UTC).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
