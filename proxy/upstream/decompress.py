"""Decodes a compressed response within bounds, so that a hostile upstream cannot exhaust memory."""

from __future__ import annotations

import zlib
from typing import Final

from .retry.outcome import TransportFailure

MAX_DECODED: Final = 256 * 1024 * 1024
BOMB_FLOOR: Final = 8 * 1024 * 1024
BOMB_RATIO: Final = 100
"""A response may decode to MAX_DECODED bytes, and to BOMB_FLOOR bytes or BOMB_RATIO times its size if that is more."""


class Decompressor:
    """Decodes a `gzip` or `deflate` body piece by piece, within the bounds above. Raises TransportFailure(invalid)."""

    def __init__(self, encoding: str) -> None:
        self._gzip = encoding in ("gzip", "x-gzip")
        self._stream = zlib.decompressobj(31)
        self._undecided = not self._gzip
        self._head = b""
        self._in = 0
        self._out = 0

    @staticmethod
    def knows(encoding: str) -> bool:
        return encoding in ("gzip", "x-gzip", "deflate")

    def feed(self, data: bytes) -> bytes:
        self._in += len(data)
        if self._undecided:
            data = self._head + data
            if len(data) < 2:
                self._head = data
                return b""
            self._undecided = False
            self._stream = zlib.decompressobj(15 if _is_zlib(data) else -15)
        bound = min(MAX_DECODED, max(BOMB_FLOOR, self._in * BOMB_RATIO)) - self._out
        try:
            out = self._decompress(data, bound + 1)
        except zlib.error:
            raise TransportFailure("invalid", "the upstream's compressed answer is broken") from None
        self._out += len(out)
        if len(out) > bound:
            raise TransportFailure("invalid", "the upstream's compressed answer decodes to too much")
        return out

    def _decompress(self, data: bytes, limit: int) -> bytes:
        if self._stream.eof and not self._gzip:
            return b""  # what follows is not part of the body; zlib would keep it
        out = self._stream.decompress(data, limit)
        while self._gzip and self._stream.eof and self._stream.unused_data and len(out) < limit:
            rest = self._stream.unused_data  # gzip allows several members in a row (RFC 1952 section 2.2)
            self._stream = zlib.decompressobj(31)
            out += self._stream.decompress(rest, limit - len(out))
        return out

    def finish(self) -> None:
        """The body has ended. Raises TransportFailure(invalid) if the compressed data has not."""
        if self._in and not self._stream.eof:
            raise TransportFailure("invalid", "the upstream's compressed answer is cut short")


def _is_zlib(head: bytes) -> bool:
    """Whether a `deflate` body has the zlib format (RFC 1950 section 2.2), as RFC 9110 section 8.4.1.2 asks.

    Some servers send raw deflate instead, which never begins like this: its padding bits would have to be set.
    """
    return head[0] & 0x8F == 8 and int.from_bytes(head[:2], "big") % 31 == 0
