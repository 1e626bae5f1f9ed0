"""Options of one request, by header or inside the base URL as `/_/name=value;.../v1` (`docs/headers.md`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Final
from urllib.parse import unquote

from .durations import parse_duration
from .errors import ProxyError


@dataclass(frozen=True, slots=True)
class Options:
    """The options of one request. Times are in seconds; None means not asked for."""

    no_cache: bool = False
    no_store: bool = False
    only_if_cached: bool = False
    max_age: int | None = None
    stale_if_error: int | None = None
    ttl: float | None = None
    namespace: str = ""
    sample: str = ""
    tags: tuple[str, ...] = ()
    max_wait: float | None = None
    timeout: float | None = None
    max_retries: int | None = None
    stream_cost: bool = False
    run: str = ""
    max_cost: Decimal | None = None


NO_OPTIONS: Final = Options()

_VISIBLE: Final = re.compile(r"[!-~]{1,128}\Z")
_TAG: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}:[ -~]{1,128}\Z")
_INTEGER: Final = re.compile(r"-?\d{1,18}\Z", re.ASCII)
_AMOUNT: Final = re.compile(r"\d{1,9}(\.\d{0,18})?\Z|\.\d{1,18}\Z", re.ASCII)
_RETRIES: Final = frozenset(str(number) for number in range(11))
_MAX_SECONDS: Final = 2**31
"""The value of a larger number of seconds (RFC 9111 section 1.2.2)."""


def _whole_seconds(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError("a whole number of seconds")
    return int(text) if len(text) < 10 else _MAX_SECONDS


def _visible(text: str) -> str:
    if not _VISIBLE.match(text):
        raise ValueError("1 to 128 visible ASCII characters")
    return text


def _sample(text: str) -> str:
    if not _INTEGER.match(text):
        raise ValueError("an integer")
    return str(int(text))


def _tag(text: str) -> str:
    if not _TAG.match(text):
        raise ValueError("name:value, the name of letters, digits, '_', '.', '-'")
    return text


def _retries(text: str) -> int:
    if text not in _RETRIES:
        raise ValueError("a whole number from 0 to 10")
    return int(text)


def _stream_cost(text: str) -> bool:
    if text.lower() != "comment":
        raise ValueError("'comment'")
    return True


def _max_cost(text: str) -> Decimal:
    if not _AMOUNT.match(text):
        raise ValueError("an amount of USD, like 2.50")
    return Decimal(text)


def _timeout(text: str) -> float:
    seconds = parse_duration(text)
    if seconds <= 0:
        raise ValueError("a duration above zero")
    return seconds


@dataclass(frozen=True, slots=True)
class _Option:
    header: str
    name: str
    field: str
    parse: Callable[[str], Any]


_OPTIONS: Final = (
    _Option("x-proxy-cache-ttl", "ttl", "ttl", parse_duration),
    _Option("x-proxy-cache-namespace", "namespace", "namespace", _visible),
    _Option("x-proxy-sample", "sample", "sample", _sample),
    _Option("x-proxy-tag", "tag", "tags", _tag),
    _Option("x-proxy-max-wait", "max-wait", "max_wait", parse_duration),
    _Option("x-proxy-timeout", "timeout", "timeout", _timeout),
    _Option("x-proxy-max-retries", "retries", "max_retries", _retries),
    _Option("x-proxy-stream-cost", "stream-cost", "stream_cost", _stream_cost),
    _Option("x-proxy-run", "run", "run", _visible),
    _Option("x-proxy-max-cost", "max-cost", "max_cost", _max_cost),
)
_BY_HEADER: Final = {option.header: option for option in _OPTIONS}
_BY_NAME: Final = {option.name: option for option in _OPTIONS}
_MAX_TAGS: Final = 16


def _apply(options: Options, option: _Option, shown: str, text: str) -> Options:
    try:
        value = option.parse(text.strip())
    except ValueError as error:
        raise ProxyError("invalid_option", f"{shown}: expected {error}", param=shown) from None
    if option.field == "tags":
        if len(options.tags) >= _MAX_TAGS:
            raise ProxyError("invalid_option", f"{shown}: at most {_MAX_TAGS} tags", param=shown)
        value = (*options.tags, value)
    return replace(options, **{option.field: value})


def _directive(options: Options, name: str, value: str | None, shown: str) -> Options:
    match name:
        case "no-cache":
            return replace(options, no_cache=True)
        case "no-store":
            return replace(options, no_store=True)
        case "only-if-cached":
            return replace(options, only_if_cached=True)
        case "max-age" | "stale-if-error":
            try:
                seconds = _whole_seconds((value or "").strip('"'))
            except ValueError as error:
                where = name if shown == name else f"{shown}: {name}"
                raise ProxyError("invalid_option", f"{where}: expected {error}", param=shown) from None
            return replace(options, max_age=seconds) if name == "max-age" else replace(options, stale_if_error=seconds)
        case _:
            return options  # RFC 9111 section 5.2.3: unrecognised directives are ignored


def from_headers(options: Options, headers: Iterable[tuple[str, str]]) -> Options:
    """Return `options` overridden by the headers. Raises ProxyError(invalid_option) naming the header."""
    for name, value in headers:
        lower = name.lower()
        if lower == "cache-control":
            for part in value.split(","):
                directive, _, argument = part.strip().partition("=")
                options = _directive(options, directive.lower(), argument, "Cache-Control")
        elif lower.startswith("x-proxy-"):
            option = _BY_HEADER.get(lower)
            if option is not None:
                options = _apply(options, option, name, value)
    return options


def from_segment(segment: str) -> Options:
    """Return the options of `/_/{segment}/…`. Raises ProxyError(invalid_option) naming the option."""
    options = NO_OPTIONS
    for part in segment.split(";"):
        if not part:
            continue
        raw_name, equals, raw_value = part.partition("=")
        name, value = unquote(raw_name), unquote(raw_value)
        shown = name[:64].encode("ascii", "backslashreplace").decode()
        if not equals:
            raise ProxyError("invalid_option", f"{shown!r} in the base URL: expected name=value", param=shown)
        if name == "cache":
            if value not in ("no-cache", "no-store", "only-if-cached"):
                message = "cache: expected no-cache, no-store or only-if-cached"
                raise ProxyError("invalid_option", message, param="cache")
            options = _directive(options, value, None, "cache")
        elif name in ("max-age", "stale-if-error"):
            options = _directive(options, name, value, name)
        elif name in _BY_NAME:
            options = _apply(options, _BY_NAME[name], name, value)
        else:
            raise ProxyError("invalid_option", f"unknown option {shown!r} in the base URL", param=shown)
    return options
