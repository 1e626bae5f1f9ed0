"""Decoding a compressed answer within bounds (contract 7, Slow and hostile peers)."""

from __future__ import annotations

import zlib
from typing import Final

from .outcome import TransportFailure

MAX_DECODED: Final = 256 * 1024 * 1024
BOMB_FLOOR: Final = 8 * 1024 * 1024
BOMB_RATIO: Final = 100
"""A compressed answer may not decode beyond MAX_DECODED, nor beyond BOMB_FLOOR and BOMB_RATIO times its size (contract 7)."""


class Inflater:
    """Decodes a `gzip` or `deflate` body piece by piece, within the bounds above. Raises TransportFailure(invalid)."""

    def __init__(self, encoding: str) -> None:
        self._gzip = encoding in ("gzip", "x-gzip")
        self._stream = zlib.decompressobj(31 if self._gzip else 15)
        self._raw_tried = False
        self._in = 0
        self._out = 0

    @staticmethod
    def knows(encoding: str) -> bool:
        return encoding in ("gzip", "x-gzip", "deflate")

    def feed(self, data: bytes) -> bytes:
        self._in += len(data)
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
        try:
            out = self._stream.decompress(data, limit)
        except zlib.error:
            # Some servers send raw deflate where RFC 9110 section 8.4.1.2 asks for the zlib format.
            if self._gzip or self._raw_tried or self._out:
                raise
            self._raw_tried = True
            self._stream = zlib.decompressobj(-15)
            out = self._stream.decompress(data, limit)
        while self._gzip and self._stream.eof and self._stream.unused_data and len(out) < limit:
            rest = self._stream.unused_data  # gzip allows several members in a row (RFC 1952 section 2.2)
            self._stream = zlib.decompressobj(31)
            out += self._stream.decompress(rest, limit - len(out))
        return out

    def finish(self) -> None:
        """The body has ended: it must have ended here too."""
        if self._in and not self._stream.eof:
            raise TransportFailure("invalid", "the upstream's compressed answer is cut short")
