"""How a text becomes a value, and back: the kinds of single values that settings have."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from ipaddress import ip_address
from math import ulp
from typing import Any, Final, TypeVar

from ..protocol.durations import parse_duration
from .description import TEXT_SCHEMA, Leaf
from .secret import Secret

T = TypeVar("T", int, float, Decimal)
U = TypeVar("U")

# Numbers.

_NUMBER: Final = re.compile(r"[+-]?\d{1,18}(?:_\d{3}){0,5}(?:\.\d{1,18})?(?:[eE][+-]?\d{1,2})?\Z", re.ASCII)
_LARGEST: Final = 10**15


def _number(expected: str, convert: Callable[[Decimal], T], low: float, high: float, whole: bool = False) -> Leaf[T]:
    def read(text: str) -> T:
        amount = Decimal(text.replace("_", "")) if _NUMBER.match(text) else None
        if amount is None or not low <= amount <= high or (whole and amount % 1):
            raise ValueError("not such a number")
        return convert(amount)

    bounds = {"minimum": low} | ({"maximum": high} if high != _LARGEST else {})
    schema = {"type": "integer" if whole else "number", **bounds}
    return Leaf(expected, read, lambda value: f"{value:f}" if isinstance(value, Decimal) else str(value), schema=schema)


def integer(low: int = 0, high: int = _LARGEST) -> Leaf[int]:
    """A whole number; `010` is ten and `1e6` a million, as a person would read them."""
    bounds = f"of at least {low}" if high == _LARGEST else f"from {low} to {high}"
    return _number(f"a whole number {bounds}", int, low, high, whole=True)


def number(high: float) -> Leaf[float]:
    return _number(f"a number from 0 to {high:.15g}", float, 0, high)


SHARE: Final = _number("a number above 0 and at most 1", float, ulp(0.0), 1)
MONEY: Final = _number("an amount in USD from 0 to 1000000000", Decimal, 0, 10**9)

# Durations and sizes.

_TEN_YEARS: Final = 3650 * 86400.0
_SPANS: Final = ((86400.0, "d"), (3600.0, "h"), (60.0, "m"), (1.0, "s"))
_DURATION_SCHEMA: Final = {"type": ["string", "number"], "pattern": r"^\d+(\.\d+)?(ms|s|m|h|d)?$", "minimum": 0}


def _duration(low: float, text: str) -> float:
    seconds = parse_duration(text)
    if not text.isascii() or not low <= seconds <= _TEN_YEARS:
        raise ValueError("out of range")
    return seconds


def show_duration(seconds: float) -> str:
    """Return a duration in the largest unit that gives a whole number (a single day as 24h)."""
    for span, unit in _SPANS:
        if seconds >= span and seconds % span == 0 and seconds != 86400.0 * (unit == "d"):
            return f"{seconds / span:.0f}{unit}"
    return f"{seconds * 1000:.6g}ms" if 0 < seconds < 1 else f"{seconds:g}s"


def duration(low: float = 0.0) -> Leaf[float]:
    """A duration in seconds, at least `low` seconds."""
    bound = f", of at least {show_duration(low)}" if low else ""
    expected = f"a duration such as 250ms, 30s, 5m, 24h or 7d{bound}"
    return Leaf(expected, lambda text: _duration(low, text), show_duration, schema=_DURATION_SCHEMA)


def duration_or_auto() -> Leaf[float | None]:
    """A duration in seconds, or None for `auto`."""
    return Leaf(
        "a duration such as 30s or 5m, or auto",
        lambda text: None if text == "auto" else _duration(0.0, text),
        lambda value: "auto" if value is None else show_duration(value),
        schema=_DURATION_SCHEMA | {"pattern": rf"^auto$|{_DURATION_SCHEMA['pattern']}"},
    )


_SIZE: Final = re.compile(r"(\d{1,16}(?:\.\d{1,6})?) ?(KiB|MiB|GiB|B)?\Z", re.ASCII | re.IGNORECASE)
_SIZES: Final = {"GiB": 1024**3, "MiB": 1024**2, "KiB": 1024}
_LARGEST_SIZE: Final = 2**50


def show_size(size: int) -> str:
    return next((f"{size // f}{unit}" for unit, f in _SIZES.items() if size and size % f == 0), str(size))


def size(low: int = 0) -> Leaf[int]:
    """A size in bytes, at least `low` bytes."""

    def read(text: str) -> int:
        match = _SIZE.match(text)
        if match is None:
            raise ValueError("not a size")
        unit = (match[2] or "b").lower()
        size = Decimal(match[1]) * next((factor for name, factor in _SIZES.items() if name.lower() == unit), 1)
        if not low <= size <= _LARGEST_SIZE or size % 1:
            raise ValueError("out of range")
        return int(size)

    bound = f", of at least {low}" if low else ""
    schema = {"type": ["string", "integer"], "pattern": r"^\d+(\.\d+)? ?([KkMmGg][Ii])?[Bb]?$", "minimum": low}
    return Leaf(f"a size such as 64KiB, 256MiB or 4GiB, or plain bytes{bound}", read, show_size, schema=schema)


# Words.


def choice(*words: str) -> Leaf[str]:
    return _word(f"{', '.join(words[:-1])} or {words[-1]}", {word: word for word in words}.__getitem__, words)


def _word(expected: str, convert: Callable[[str], U], words: Sequence[str], show: Callable[[U], str] = str) -> Leaf[U]:
    def read(text: str) -> U:
        try:
            return convert(text)
        except KeyError:
            raise ValueError("not one of them") from None

    # YAML 1.1 reads `off` as false, and every YAML a digit as a number.
    numbers = [int(word) for word in words if word.isdigit()]
    truths = [word in _TRUE for word in words if word in _TRUE + _FALSE]
    return Leaf(expected, read, show, schema={"enum": [*words, *numbers, *dict.fromkeys(truths)]})


_TRUE: Final = ("true", "yes", "on")
_FALSE: Final = ("false", "no", "off")
_BOOLEANS: Final = dict.fromkeys(_TRUE, True) | dict.fromkeys(_FALSE, False)
BOOLEAN: Final = _word(
    "true or false", lambda text: _BOOLEANS[text.lower()], (*_TRUE, *_FALSE), lambda value: "true" if value else "false"
)


def pattern(expected: str, regex: str, convert: Callable[[str], Any] = str, secret: bool = False) -> Leaf[Any]:
    """A text that the whole of `regex` matches (ASCII)."""
    compiled = re.compile(regex, re.ASCII)

    def read(text: str) -> Any:
        if not compiled.fullmatch(text):
            raise ValueError("another shape")
        return convert(text)

    return Leaf(expected, read, secret=secret, schema=TEXT_SCHEMA | {"pattern": f"^(?:{regex})$"})


NAME: Final = pattern(
    "a name of at most 64 letters, digits and . _ - @ + /", r"(?!sk-)[A-Za-z0-9_][A-Za-z0-9._@+/-]{0,63}"
)
VISIBLE: Final = pattern("1 to 128 visible ASCII characters", r"[!-~]{1,128}")
HEADER_ID: Final = pattern("an id of at most 128 letters, digits and . _ -", r"[A-Za-z0-9._-]{1,128}")
GLOB: Final = pattern("a model's name or a glob such as gpt-4o*, in visible ASCII characters", r"[!-~]{1,256}")
DEPLOYMENT: Final = pattern(
    "a deployment's name of at most 128 letters, digits and . _ -", r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
)
FIELD: Final = pattern("the name of a request's field", r"[A-Za-z_][A-Za-z0-9_]{0,63}")
SHA256: Final = pattern("a SHA-256 of 64 hex digits", r"[0-9a-fA-F]{64}", bytes.fromhex, secret=True)
# The classic mistake is a key in this place, so no message repeats what was found.
API_VERSION: Final = pattern(
    "an api-version such as 2024-10-21 or 2025-04-01-preview, or v1, preview or latest",
    r"20\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])(-preview)?|v1|preview|latest",
    secret=True,
)
PATH: Final = pattern("a file's path", r"[^\0]*[^\0\s][^\0]*")
TEXT: Final = Leaf("a text", str)
SECRET_TEXT: Final = Leaf("a key", str, secret=True)
SECRET: Final = Leaf("a text", Secret, secret=True)

LONGEST_SOCKET_PATH: Final = 103
"""Bytes: the shorter of Linux's and macOS's limits on `sun_path`, less the terminating zero."""


def _socket_path(text: str) -> str:
    if len(text.encode()) > LONGEST_SOCKET_PATH:
        raise ValueError("too long")
    return str(PATH.convert(text))


SOCKET_PATH: Final = Leaf(f"a socket's path of at most {LONGEST_SOCKET_PATH} bytes", _socket_path)

# Hosts.

_HOST: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9_])?\.?\Z", re.ASCII)


def host_name(text: str) -> str:
    """Return a host in lower case, an IPv6 address without brackets. Raises ValueError for anything else."""
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    if ":" in text:
        return str(ip_address(text))
    if not _HOST.match(text) or ".." in text:
        raise ValueError("not a host")
    return text.lower()


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a host, by its spelling alone: no name is looked up."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.rstrip(".") == "localhost" or host.rstrip(".").endswith(".localhost")


def _allowed_host(text: str) -> str:
    if ":" in text and not text.startswith("["):
        ip_address(text)
    return host_name(text)


_PORT: Final = integer(0, 65535)


def _host_and_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        raise ValueError("no port")
    return host_name(host), _PORT.convert(port)


def show_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


_ORIGIN: Final = re.compile(
    r"[a-z][a-z0-9+.-]{0,31}://(\[[0-9a-f:.]+\]|[a-z0-9._*-]{1,253})(:(\d{1,5}|\*))?/?\Z", re.ASCII
)
"""An origin, or a glob within one scheme."""


def _origin(text: str) -> str:
    origin = text.lower()
    if origin != "null" and not _ORIGIN.match(origin):
        raise ValueError("not an origin")
    return origin.rstrip("/")


HOST: Final = Leaf("an address such as 127.0.0.1, or a host's name", host_name)
ALLOWED_HOST: Final = Leaf("a host's name, without scheme or port", _allowed_host)
HOST_AND_PORT: Final = Leaf("HOST:PORT", _host_and_port, lambda value: f"{show_host(value[0])}:{value[1]}")
ORIGIN: Final = Leaf(
    'an origin such as https://app.example.com or vscode-webview://*, without a path, or "null"', _origin
)
