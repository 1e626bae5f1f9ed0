"""How a text becomes a value, and back. A `Leaf` says what is expected, how it is read and shown."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from ..protocol.durations import parse_duration
from .secret import Secret

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Leaf(Generic[T]):
    """One kind of scalar. `convert` raises ValueError for a text that is not one; `expected` names it.

    `secret`: what was found is never shown. `empty`: nothing is a value too, namely None.
    """

    expected: str
    convert: Callable[[str], T]
    show: Callable[[Any], str] = str
    secret: bool = False
    empty: bool = False


def optional(leaf: Leaf[T]) -> Leaf[T | None]:
    """The same, or nothing: an absent value, `null`, or a variable that turned out empty."""
    return Leaf(leaf.expected, leaf.convert, partial(_show_optional, leaf.show), leaf.secret, empty=True)


def _show_optional(show: Callable[[Any], str], value: object) -> str:
    return "" if value is None else show(value)


# Numbers.

_NUMBER: Final = re.compile(r"[+-]?\d{1,18}(?:_\d{3}){0,5}(?:\.\d{1,18})?(?:[eE][+-]?\d{1,2})?\Z", re.ASCII)


def _decimal(text: str) -> Decimal:
    if not _NUMBER.match(text):
        raise ValueError("not a number")
    return Decimal(text.replace("_", ""))


def _integer(low: int, high: int, text: str) -> int:
    number = _decimal(text)
    if not low <= number <= high or number != int(number):
        raise ValueError("out of range")
    return int(number)


def integer(low: int = 0, high: int = 10**15) -> Leaf[int]:
    """A whole number; `010` is ten and `1e6` a million, as a person would read them."""
    bounds = f"of at least {low}" if high == 10**15 else f"from {low} to {high}"
    return Leaf(f"a whole number {bounds}", partial(_integer, low, high))


def _number(high: float, text: str) -> float:
    number = float(_decimal(text))
    if not 0 <= number <= high:
        raise ValueError("out of range")
    return number


def _share(text: str) -> float:
    if not (number := _number(1.0, text)):
        raise ValueError("out of range")
    return number


SHARE: Final = Leaf("a number above 0 and at most 1", _share)


def number(high: float) -> Leaf[float]:
    return Leaf(f"a number from 0 to {high:g}", partial(_number, high))


def _money(text: str) -> Decimal:
    amount = _decimal(text)
    if not 0 <= amount <= 10**9:
        raise ValueError("out of range")
    return amount


def _show_money(amount: Decimal) -> str:
    return f"{amount:f}"


MONEY: Final = Leaf("an amount in USD from 0 to 1000000000", _money, _show_money)

# Durations and sizes.

_TEN_YEARS: Final = 3650 * 86400.0
_SPANS: Final = ((86400.0, "d"), (3600.0, "h"), (60.0, "m"), (1.0, "s"))


def _duration(low: float, text: str) -> float:
    seconds = parse_duration(text)
    if not text.isascii() or not low <= seconds <= _TEN_YEARS:
        raise ValueError("out of range")
    return seconds


def show_duration(seconds: float) -> str:
    """In the largest unit that gives a whole number (a single day as 24h)."""
    for span, unit in _SPANS:
        if seconds >= span and seconds % span == 0 and seconds != 86400.0 * (unit == "d"):
            return f"{seconds / span:.0f}{unit}"
    return f"{seconds * 1000:.6g}ms" if 0 < seconds < 1 else f"{seconds:g}s"


def duration(low: float = 0.0) -> Leaf[float]:
    bound = f", of at least {show_duration(low)}" if low else ""
    return Leaf(f"a duration such as 250ms, 30s, 5m, 24h or 7d{bound}", partial(_duration, low), show_duration)


def duration_or_auto() -> Leaf[float | None]:
    def convert(text: str) -> float | None:
        return None if text == "auto" else _duration(0.0, text)

    def show(value: float | None) -> str:
        return "auto" if value is None else show_duration(value)

    return Leaf("a duration such as 30s or 5m, or auto", convert, show)


_SIZE: Final = re.compile(r"(\d{1,16}(?:\.\d{1,6})?) ?(KiB|MiB|GiB|B)?\Z", re.ASCII | re.IGNORECASE)
_SIZES: Final = (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024))
_LARGEST_SIZE: Final = 2**50


def _size(low: int, text: str) -> int:
    match = _SIZE.match(text)
    if match is None:
        raise ValueError("not a size")
    unit = (match[2] or "B").lower()
    factor = next((factor for name, factor in _SIZES if name.lower() == unit), 1)
    size = Decimal(match[1]) * factor
    if not low <= size <= _LARGEST_SIZE or size != int(size):
        raise ValueError("out of range")
    return int(size)


def show_size(size: int) -> str:
    return next((f"{size // f}{unit}" for unit, f in _SIZES if size and size % f == 0), str(size))


def size(low: int = 0) -> Leaf[int]:
    bound = f", of at least {low}" if low else ""
    return Leaf(f"a size such as 64KiB, 256MiB or 4GiB, or plain bytes{bound}", partial(_size, low), show_size)


# Words.

_BOOLEANS: Final = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _boolean(text: str) -> bool:
    try:
        return _BOOLEANS[text.lower()]
    except KeyError:
        raise ValueError("not a truth value") from None


BOOLEAN: Final = Leaf("true or false", _boolean, lambda value: "true" if value else "false")


def choice(*words: str) -> Leaf[str]:
    def convert(text: str) -> str:
        if text not in words:
            raise ValueError("not one of them")
        return text

    return Leaf(f"{', '.join(words[:-1])} or {words[-1]}", convert)


def pattern(expected: str, regex: str) -> Leaf[str]:
    """A text that the whole of `regex` matches (ASCII)."""
    compiled = re.compile(regex, re.ASCII)

    def convert(text: str) -> str:
        if not compiled.fullmatch(text):
            raise ValueError("another shape")
        return text

    return Leaf(expected, convert)


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
TEXT: Final = Leaf("a text", lambda text: text)


def _sha256(text: str) -> bytes:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise ValueError("another shape")
    return bytes.fromhex(text)


SHA256: Final = Leaf("a SHA-256 of 64 hex digits", _sha256, secret=True)
SECRET_TEXT: Final = Leaf("a key", lambda text: text, secret=True)
SECRET: Final = Leaf("a text", Secret, secret=True)


def _path(text: str) -> str:
    if "\0" in text or not text.strip():
        raise ValueError("not a path")
    return text


PATH: Final = Leaf("a file's path", _path)


def _socket_path(text: str) -> str:
    try:
        path = str(Path(_path(text)).expanduser())
    except RuntimeError:  # `~name` of nobody
        raise ValueError("no such home directory") from None
    if len(path.encode()) > 103:
        raise ValueError("too long")
    return path


# The shorter of Linux's and macOS's limits on sun_path, less the terminating zero.
SOCKET_PATH: Final = Leaf("a socket's path of at most 103 bytes", _socket_path)

# Hosts.

_HOST: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9_])?\.?\Z", re.ASCII)


def host_name(text: str) -> str:
    """A host in lower case, an IPv6 address without brackets. Raises ValueError."""
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    if ":" in text:
        return str(ip_address(text))
    if not _HOST.match(text) or ".." in text:
        raise ValueError("not a host")
    return text.lower()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host, by its spelling alone: names are not looked up."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.rstrip(".") == "localhost" or host.rstrip(".").endswith(".localhost")


def _allowed_host(text: str) -> str:
    if ":" in text and not text.startswith("["):
        ip_address(text)
    return host_name(text)


def _host_and_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        raise ValueError("no port")
    return host_name(host), _integer(0, 65535, port)


def show_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _show_host_and_port(value: tuple[str, int]) -> str:
    return f"{show_host(value[0])}:{value[1]}"


_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]{0,31}://(\[[0-9a-f:.]+\]|[a-z0-9._-]{1,253})(:\d{1,5})?/?\Z", re.ASCII)


def _origin(text: str) -> str:
    origin = text.lower()
    if not _ORIGIN.match(origin):
        raise ValueError("not an origin")
    return origin.rstrip("/")


HOST: Final = Leaf("an address such as 127.0.0.1, or a host's name", host_name)
ALLOWED_HOST: Final = Leaf("a host's name, without scheme or port", _allowed_host)
HOST_AND_PORT: Final = Leaf("HOST:PORT", _host_and_port, _show_host_and_port)
ORIGIN: Final = Leaf("an origin such as https://app.example.com, without a path", _origin)
