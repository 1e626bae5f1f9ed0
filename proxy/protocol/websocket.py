"""WebSocket handshakes and frames as bytes (RFC 6455)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from .headers import Raw

CREDENTIAL: Final = "openai-insecure-api-key."
"""Browsers cannot set headers, so OpenAI's Realtime API also takes a key as a subprotocol that begins like this."""

_OF_ACCOUNT: Final = (CREDENTIAL, "openai-organization.", "openai-project.")
_KEPT: Final = frozenset({b"sec-websocket-key", b"sec-websocket-version", b"sec-websocket-extensions"})
_PROTOCOL: Final = b"sec-websocket-protocol"

GOING_AWAY: Final = 1001
"""The close code of a server that shuts down (RFC 6455 section 7.4.1)."""


def is_handshake(method: str, headers: Mapping[str, str]) -> bool:
    """Return whether a request asks for a WebSocket, even if something in front has dropped a part of its handshake."""
    return method == "GET" and (
        headers.get("Upgrade", "").strip().lower() == "websocket" or "Sec-WebSocket-Key" in headers
    )


def is_whole_handshake(headers: Mapping[str, str]) -> bool:
    """Return whether a handshake has what RFC 6455 section 4.2.1 asks for."""
    options = {part.strip().lower() for part in headers.get("Connection", "").split(",")}
    upgrade = headers.get("Upgrade", "").strip().lower()
    return upgrade == "websocket" and "upgrade" in options and "Sec-WebSocket-Key" in headers


def credential_in(values: Sequence[str]) -> str | None:
    """Return the key that a client sends as a subprotocol; None if it sends none, or several.

    values: those of the `Sec-WebSocket-Protocol` headers.
    """
    found = [token.removeprefix(CREDENTIAL) for token in _tokens(values) if token.startswith(CREDENTIAL)]
    return found[0] or None if len(found) == 1 else None


def handshake_headers(raw: Sequence[Raw], credential: Sequence[tuple[str, str]] | None) -> list[tuple[str, str]]:
    """Return the headers of a client's handshake that go upstream.

    credential: the headers that carry the pool's key, which replaces a key among the subprotocols; None: the client's
    own goes up.
    """
    out = [("Connection", "Upgrade"), ("Upgrade", "websocket")]
    offered = []
    for name, value in raw:
        lower = name.lower()
        if lower in _KEPT:
            out.append((name.decode("latin-1"), value.decode("latin-1")))
        elif lower == _PROTOCOL:
            offered.append(value.decode("latin-1"))
    tokens = _tokens(offered)
    if credential is not None:
        secret = _secret_of(credential)
        replaced = [CREDENTIAL + secret] if secret else []
        had_key = any(token.startswith(CREDENTIAL) for token in tokens)
        tokens = [token for token in tokens if not token.startswith(_OF_ACCOUNT)] + (replaced if had_key else [])
    if tokens:
        out.append(("Sec-WebSocket-Protocol", ", ".join(tokens)))
    return out


def without_credential(headers: Sequence[Raw]) -> list[Raw]:
    """Return an answer's headers without a chosen subprotocol that repeats a key."""
    mark = CREDENTIAL.encode()
    return [pair for pair in headers if not (pair[0].lower() == _PROTOCOL and mark in pair[1].lower())]


def _tokens(values: Sequence[str]) -> list[str]:
    return [token for value in values for part in value.split(",") if (token := part.strip())]


def _secret_of(credential: Sequence[tuple[str, str]]) -> str:
    for name, value in credential:
        if name.lower() == "authorization":
            return value.removeprefix("Bearer ")
        if name.lower() == "api-key":
            return value
    return ""


def close_frame(code: int, masked: bool) -> bytes:
    """Return a Close frame (RFC 6455 sections 5.2 and 5.5.1). masked: as a client sends it, with a mask of zeros."""
    payload = code.to_bytes(2, "big")
    return b"\x88\x82\0\0\0\0" + payload if masked else b"\x88\x02" + payload


class FrameBoundaries:
    """Follows the frames of one direction by their headers alone, to know where one may be put in between."""

    __slots__ = ("_head", "_left")

    def __init__(self) -> None:
        self._head = b""
        self._left = 0

    @property
    def between_frames(self) -> bool:
        return not self._left and not self._head

    def feed(self, data: bytes) -> None:
        """Take note of the next bytes."""
        at, end = 0, len(data)
        while at < end:
            if self._left:
                step = min(self._left, end - at)
                self._left -= step
                at += step
                continue
            known = len(self._head)
            head = self._head + data[at : at + 14 - known]
            size = _header_size(head)
            if len(head) < size:
                self._head = head
                return
            self._head = b""
            at += size - known
            self._left = _payload_size(head)


def _header_size(head: bytes) -> int:
    """Return how many bytes a frame's header has, as far as its first bytes say (RFC 6455 section 5.2)."""
    if len(head) < 2:
        return 2
    length = head[1] & 0x7F
    return 2 + (2 if length == 126 else 8 if length == 127 else 0) + (4 if head[1] & 0x80 else 0)


def _payload_size(head: bytes) -> int:
    length = head[1] & 0x7F
    if length == 126:
        return int.from_bytes(head[2:4], "big")
    return int.from_bytes(head[2:10], "big") if length == 127 else length
