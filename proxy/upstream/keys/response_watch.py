"""`ResponseWatch`: finds the objects that a passed-through response brings, while its bytes flow on unchanged."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

import orjson

from ...protocol.decompress import DecodingError, Decompressor
from ...protocol.sse import Splitter, data_of
from .stored_objects import BroughtObjects, brought_by, looks_like_id

KEPT: Final = 1024 * 1024
"""Bytes of a response, or of one event, that are kept to be parsed. In what is larger, ids are found by their look."""

_OVERLAP: Final = 2048
_BEFORE: Final = b"\xef\xbb\xbf \t\r\n"
"""Bytes that may stand before a document: a byte order mark and white space."""

_SEALED: Final = b'"encrypted_content"'
_ID: Final = re.compile(rb'"(?:id|[a-z_]{1,40}_id)"\s{0,8}:\s{0,8}"([A-Za-z0-9_.:=+/-]{1,1024})"')
_TYPES: Final = ("application/json", "text/event-stream", "text/plain", "application/octet-stream", "")


class ResponseWatch:
    """Reads a copy of one response.

    found: is called with what it brings, before the bytes that say so are passed on. length: of the body, if known.
    """

    def __init__(self, encoding: str, length: int | None, found: Callable[[BroughtObjects], None]) -> None:
        self._found = found
        self._left = length
        self._decompressor = Decompressor(encoding) if Decompressor.knows(encoding) else None
        self._over = self._decompressor is None and encoding not in ("", "identity")
        self._splitter: Splitter | None = None
        self._parts: list[bytes] = []
        self._size = 0
        self._large = False

    @staticmethod
    def reads(content_type: str) -> bool:
        """Whether a response of this type may bring objects: JSON, events, or what does not say what it is."""
        kind = content_type.partition(";")[0].strip().lower()
        return kind in _TYPES or kind.endswith("+json")

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes, as they came. Never raises."""
        if self._over:
            return
        if self._left is not None:
            self._left -= len(chunk)
        try:
            plain = self._decompressor.feed(chunk) if self._decompressor is not None else chunk
        except DecodingError:
            self._over = True
            return
        if plain:
            self._read(plain)
        if self._left is not None and self._left <= 0:
            self.finish()

    def finish(self) -> None:
        """The response has ended."""
        if self._over:
            return
        self._over = True
        if self._large:
            self._scan(b"")
        elif self._splitter is not None:
            self._event(self._splitter.rest + b"\n\n")
        elif self._parts:
            self._document(b"".join(self._parts))

    def _read(self, plain: bytes) -> None:
        if self._large:
            self._scan(plain)
            return
        if self._splitter is None and not self._parts:
            plain = plain.lstrip(_BEFORE)
            if not plain:
                return
            if plain[:1] not in b"{[":
                self._splitter = Splitter()
        if self._splitter is not None:
            for event in self._splitter.feed(plain):
                self._event(event)
            if self._splitter.held > KEPT:
                self._large = True
                self._scan(self._splitter.rest)
            return
        self._parts.append(plain)
        self._size += len(plain)
        if self._size > KEPT:
            self._large = True
            whole, self._parts = b"".join(self._parts), []
            self._scan(whole)

    def _scan(self, plain: bytes) -> None:
        """Find ids by their look alone. The end of what was searched is searched again with what follows."""
        data = b"".join(self._parts) + plain
        ids = dict.fromkeys([match[1].decode("ascii") for match in _ID.finditer(data)])
        known = tuple([id_ for id_ in ids if looks_like_id(id_)])
        if known:
            self._found(BroughtObjects(known))
        self._parts = [data[-_OVERLAP:]]

    def _event(self, event: bytes) -> None:
        data = data_of(event)
        if data is not None and (b'_id"' in data or b'"id"' in data or _SEALED in data):
            self._document(data)

    def _document(self, text: bytes) -> None:
        try:
            document = orjson.loads(text)
        except orjson.JSONDecodeError:
            return
        brought = brought_by(document)
        if brought:
            self._found(brought)
