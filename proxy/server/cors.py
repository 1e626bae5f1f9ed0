"""CORS: the headers that let pages of allowed origins read responses (Fetch standard, section 3.2)."""

from __future__ import annotations

from typing import Final

from aiohttp.web import BaseRequest

from ..protocol.headers import EXPOSED
from .responses import FullResponse, status_line

METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"})
"""The methods of passed-through requests."""


def cors_headers(origin: str | None) -> bytes:
    """Return the header lines for an allowed origin; none without one."""
    if origin is None:
        return b""
    return (
        f"Access-Control-Allow-Origin: {origin}\r\nVary: Origin\r\n"
        f"Access-Control-Expose-Headers: {', '.join(EXPOSED)}\r\n"
    ).encode("latin-1", "replace")


def preflight(request: BaseRequest, origin: str, date: bytes) -> FullResponse:
    """Return the response to a preflight request of an allowed origin."""
    requested = request.headers.get("Access-Control-Request-Headers", "")
    allowed = ", ".join(name.strip() for name in requested.split(",") if name.strip().replace("-", "").isalnum())
    lines = f"Access-Control-Allow-Methods: {', '.join(sorted(METHODS))}\r\nAccess-Control-Max-Age: 600\r\n" + (
        f"Access-Control-Allow-Headers: {allowed}\r\n" if allowed else ""
    )
    if request.headers.get("Access-Control-Request-Private-Network") == "true":  # Chrome, for a proxy on loopback
        lines += "Access-Control-Allow-Private-Network: true\r\n"
    head = status_line(204) + date + cors_headers(origin) + lines.encode("latin-1", "replace")
    return FullResponse(request, head, b"", status=204)
