"""Decodes compressed bodies within bounds, so that a hostile peer cannot exhaust memory."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import brotli

if sys.version_info >= (3, 14):  # pragma: no cover - the standard library's, which backports.zstd is a copy of
    from compression import zstd
else:
    from backports import zstd

_ZSTD_OPTIONS: Final[Mapping[int, int]] = {zstd.DecompressionParameter.window_log_max: 23}
"""A window of at most 8 MiB (RFC 9659 section 3)."""


class DecodingError(ValueError):
    """A compressed body that is broken, cut short, or too large. too_large: the last of these."""

    def __init__(self, problem: str, too_large: bool = False) -> None:
        super().__init__(problem)
        self.too_large = too_large


@dataclass(frozen=True, slots=True)
class Bounds:
    """A body may decode to `total` bytes, and to `floor` bytes or 100 times its size if that is more."""

    total: int
    floor: int

    def of(self, size: int) -> int:
        """Return the most bytes that `size` bytes may decode to."""
        return min(self.total, max(self.floor, size * BOMB_RATIO))


BOMB_RATIO: Final = 100
RESPONSE_BOUNDS: Final = Bounds(256 * 1024 * 1024, 8 * 1024 * 1024)


class _Coding(Protocol):
    """Decodes one content coding."""

    @property
    def ended(self) -> bool:
        """Whether the data so far is whole."""

    def decode(self, data: bytes, limit: int) -> bytes:
        """Return what `data` adds, about `limit` bytes at most. If it is less, all of `data` was taken."""


class _Gzip:
    def __init__(self) -> None:
        self._stream = zlib.decompressobj(31)

    @property
    def ended(self) -> bool:
        return self._stream.eof

    def decode(self, data: bytes, limit: int) -> bytes:
        out = self._stream.decompress(data, limit)
        while self._stream.eof and self._stream.unused_data and len(out) < limit:
            rest = self._stream.unused_data  # gzip allows several members in a row (RFC 1952 section 2.2)
            self._stream = zlib.decompressobj(31)
            out += self._stream.decompress(rest, limit - len(out))
        return out


class _Deflate:
    def __init__(self) -> None:
        self._stream = zlib.decompressobj(15)
        self._decided = False
        self._head = b""

    @property
    def ended(self) -> bool:
        return self._stream.eof

    def decode(self, data: bytes, limit: int) -> bytes:
        if not self._decided:
            data = self._head + data
            if len(data) < 2:
                self._head = data
                return b""
            self._decided = True
            self._stream = zlib.decompressobj(15 if _is_zlib(data) else -15)
        if self._stream.eof:
            return b""  # what follows is not part of the body; zlib would keep it
        return self._stream.decompress(data, limit)


class _Brotli:
    def __init__(self) -> None:
        self._stream = brotli.Decompressor()

    @property
    def ended(self) -> bool:
        return bool(self._stream.is_finished())

    def decode(self, data: bytes, limit: int) -> bytes:
        out: bytes = self._stream.process(data, output_buffer_limit=limit) if data else b""
        return out


class _Zstd:
    def __init__(self) -> None:
        self._stream = zstd.ZstdDecompressor(options=_ZSTD_OPTIONS)

    @property
    def ended(self) -> bool:
        return self._stream.eof

    def decode(self, data: bytes, limit: int) -> bytes:
        out = b""
        while data and len(out) < limit:
            if self._stream.eof:  # several frames may follow each other (RFC 8878 section 3)
                self._stream = zstd.ZstdDecompressor(options=_ZSTD_OPTIONS)
            out += self._stream.decompress(data, limit - len(out))
            data = self._stream.unused_data if self._stream.eof else b""
        return out


_CODINGS: Final[dict[str, type[_Coding]]] = {
    "gzip": _Gzip,
    "x-gzip": _Gzip,
    "deflate": _Deflate,
    "br": _Brotli,
    "zstd": _Zstd,
}
_BROKEN: Final = (zlib.error, brotli.error, zstd.ZstdError)

ACCEPTED: Final = "gzip, deflate, br, zstd"
"""The codings that are decoded, as a header value."""


class Decompressor:
    """Decodes a body piece by piece. encoding: one that `knows` names. Raises DecodingError."""

    def __init__(self, encoding: str, bounds: Bounds = RESPONSE_BOUNDS) -> None:
        self._coding = _CODINGS[encoding]()
        self._bounds = bounds
        self._in = 0
        self._out = 0

    @staticmethod
    def knows(encoding: str) -> bool:
        return encoding in _CODINGS

    def feed(self, data: bytes) -> bytes:
        self._in += len(data)
        left = self._bounds.of(self._in) - self._out
        try:
            out = self._coding.decode(data, left + 1)
        except _BROKEN:
            raise DecodingError("is broken") from None
        self._out += len(out)
        if len(out) > left:
            raise DecodingError("decodes to too much", too_large=True)
        return out

    def finish(self) -> None:
        """The body has ended. Raises DecodingError if the compressed data has not."""
        if self._in and not self._coding.ended:
            raise DecodingError("is cut short")


def _is_zlib(head: bytes) -> bool:
    """Whether a `deflate` body has the zlib format (RFC 1950 section 2.2), as RFC 9110 section 8.4.1.2 asks.

    Some servers send raw deflate instead, which never begins like this: its padding bits would have to be set.
    """
    return head[0] & 0x8F == 8 and int.from_bytes(head[:2], "big") % 31 == 0
