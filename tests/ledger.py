"""The ledger of the scripted upstream: what arrived, and what of it must not have."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

# docs/headers.md, "Not sent upstream" (the credential is each test's own affair).
FORBIDDEN_NAMES = {
    *("cookie", "cookie2", "forwarded", "x-real-ip", "via", "origin", "referer", "cache-control"),
    *("keep-alive", "proxy-authorization", "proxy-authenticate", "proxy-connection", "te", "trailer"),
    "upgrade",
}
FORBIDDEN_PREFIXES = ("x-proxy-", "x-forwarded-", "sec-")


@dataclass(slots=True)
class Request:
    """One request as it arrived. Times are monotonic seconds; header names keep their wire spelling."""

    number: int
    connection: int
    nth: int
    """Which request on its connection this is, from 1."""
    method: str
    target: str
    version: str
    headers: list[tuple[str, str]]
    at: float
    received: bytearray = field(default_factory=bytearray)
    complete_at: float | None = None
    """When the last byte of the body was here."""
    answered_at: float | None = None
    """When the script's last step had run."""
    peer_closed_at: float | None = None
    """When the peer closed while the request was being handled."""
    sent: int = 0
    """Bytes of answer that the transport has taken."""

    @property
    def peer_gone(self) -> bool:
        return self.peer_closed_at is not None

    @property
    def body(self) -> bytes:
        return bytes(self.received)

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def query(self) -> str:
        return self.target.partition("?")[2]

    def json(self) -> Any:
        return json.loads(self.body)

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def header(self, name: str) -> str | None:
        values = self.all(name)
        return ", ".join(values) if values else None

    @property
    def key(self) -> str | None:
        """The credential that came up, bearer or `api-key`."""
        bearer = self.header("authorization")
        return bearer.removeprefix("Bearer ") if bearer is not None else self.header("api-key")


def complaints_about(request: Request) -> Iterable[str]:
    """What about this request may not be, whatever the test (docs/headers.md; RFC 9112, section 6.3)."""
    names = [name.lower() for name, _ in request.headers]
    for name in names:
        if name in FORBIDDEN_NAMES or name.startswith(FORBIDDEN_PREFIXES):
            yield f"header {name} was sent upstream"
    if names.count("host") != 1:
        yield f"{names.count('host')} Host headers"
    if (request.header("connection") or "keep-alive").lower() not in ("keep-alive", "close"):
        yield f"Connection: {request.header('connection')}"
    if "content-length" in names and "transfer-encoding" in names:
        yield "both Content-Length and Transfer-Encoding"
    for single in ("content-length", "authorization", "content-type", "transfer-encoding"):
        if names.count(single) > 1:
            yield f"{names.count(single)} {single} headers"
    if request.version != "HTTP/1.1":
        yield f"version {request.version}"
