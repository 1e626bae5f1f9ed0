"""What browsers want to be told before they let a page see an answer (Fetch standard, section 3.2: CORS)."""

from __future__ import annotations

from typing import Final

from aiohttp.web import BaseRequest

from ..protocol.headers import EXPOSED
from .responses import FullResponse, status_line

METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"})
"""What may be asked of routes that are passed through."""


def cors_headers(origin: str | None) -> bytes:
    """The headers for an origin that may call; nothing for anybody else."""
    if origin is None:
        return b""
    return (
        f"Access-Control-Allow-Origin: {origin}\r\nVary: Origin\r\n"
        f"Access-Control-Expose-Headers: {', '.join(EXPOSED)}\r\n"
    ).encode("latin-1", "replace")


def preflight(request: BaseRequest, origin: str, date: bytes) -> FullResponse:
    """The answer to an OPTIONS request of a browser on behalf of an origin that may call."""
    wanted = request.headers.get("Access-Control-Request-Headers", "")
    allowed = ", ".join(part.strip() for part in wanted.split(",") if part.strip().replace("-", "").isalnum())
    lines = f"Access-Control-Allow-Methods: {', '.join(sorted(METHODS))}\r\nAccess-Control-Max-Age: 600\r\n" + (
        f"Access-Control-Allow-Headers: {allowed}\r\n" if allowed else ""
    )
    head = status_line(204) + date + cors_headers(origin) + lines.encode("latin-1", "replace")
    return FullResponse(request, head, b"", status=204)
