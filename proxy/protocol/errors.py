"""The proxy's own errors: one table of codes, one exception, OpenAI's envelope.

The shape `{"error": {"message", "type", "param", "code"}}` is that of OpenAI's API reference, *Error codes*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import orjson


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """The status and headers of an error code.

    should_retry: the value of `X-Should-Retry`. False keeps an SDK from retrying in vain; None sends no header.
    """

    status: int
    type: str
    should_retry: bool | None


_INVALID = "invalid_request_error"
_RATE = "rate_limit_error"
_SERVER = "server_error"

CODES: Final[dict[str, ErrorKind]] = {
    "bad_request": ErrorKind(400, _INVALID, False),
    "invalid_json": ErrorKind(400, _INVALID, False),
    "invalid_option": ErrorKind(400, _INVALID, False),
    "invalid_client_key": ErrorKind(401, "authentication_error", False),
    "model_not_allowed": ErrorKind(403, "permission_error", False),
    "origin_not_allowed": ErrorKind(403, "permission_error", False),
    "unknown_route": ErrorKind(404, _INVALID, False),
    "object_not_found": ErrorKind(404, _INVALID, False),
    "method_not_allowed": ErrorKind(405, _INVALID, False),
    "request_too_large": ErrorKind(413, _INVALID, False),
    "unsupported_media_type": ErrorKind(415, _INVALID, False),
    "host_not_allowed": ErrorKind(421, _INVALID, False),
    "upgrade_required": ErrorKind(426, _INVALID, False),
    "throttled": ErrorKind(429, _RATE, None),
    "queue_full": ErrorKind(429, _RATE, None),
    "request_exceeds_limit": ErrorKind(429, _RATE, False),
    "keys_cooling": ErrorKind(429, _RATE, None),
    "client_limit": ErrorKind(429, _RATE, None),
    "budget_exceeded": ErrorKind(429, _RATE, False),
    "internal_error": ErrorKind(500, _SERVER, None),
    "not_implemented": ErrorKind(501, _INVALID, False),
    "upstream_unreachable": ErrorKind(502, _SERVER, None),
    "upstream_invalid_response": ErrorKind(502, _SERVER, None),
    "no_usable_key": ErrorKind(502, _SERVER, False),
    "overloaded": ErrorKind(503, _SERVER, None),
    "draining": ErrorKind(503, _SERVER, None),
    "circuit_open": ErrorKind(503, _SERVER, None),
    "upstream_timeout": ErrorKind(504, _SERVER, None),
    "not_cached": ErrorKind(504, _SERVER, False),
    "http_version_not_supported": ErrorKind(505, _INVALID, False),
}
"""Every error code of the proxy (`docs/routes-and-errors.md`)."""


class ProxyError(Exception):
    """An error response made by the proxy itself.

    code: a key of `CODES`. message: for people, without secrets. param: the header, option or field at fault.
    retry_after: seconds until another attempt can succeed. should_retry: overrides that of the code. headers: further
    ones.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        should_retry: bool | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after
        kind = CODES[code]
        self.status = kind.status
        self.should_retry = kind.should_retry if should_retry is None else should_retry
        self.headers = headers
        self.proxy_headers: tuple[tuple[str, str], ...] = ()
        """The proxy's own headers of the request that it ended; empty if the request has no receipt."""

    def copy(self, proxy_headers: tuple[tuple[str, str], ...] = ()) -> ProxyError:
        """Return the same error with these headers: for another request, or to be kept or raised without a cycle.

        A raised exception refers to the frames that it passed, and so to each variable that refers to it.
        """
        error = ProxyError(
            self.code,
            self.message,
            param=self.param,
            retry_after=self.retry_after,
            should_retry=self.should_retry,
            headers=self.headers,
        )
        error.proxy_headers = proxy_headers
        return error

    def body(self) -> bytes:
        return envelope(self.message, CODES[self.code].type, self.param, self.code)


def envelope(message: str, type_: str, param: str | None, code: str) -> bytes:
    """Return OpenAI's error object as JSON bytes."""
    return orjson.dumps({"error": {"message": message, "type": type_, "param": param, "code": code}})


def error_event(code: str, message: str) -> bytes:
    """Return a failure after the first streamed byte as an SSE event: the SDKs raise on `error` in a data chunk."""
    return b"data: " + envelope(message, CODES[code].type, None, code) + b"\n\n"


def retry_after_headers(seconds: float) -> tuple[tuple[str, str], ...]:
    """Return `Retry-After` (whole seconds, RFC 9110 section 10.2.3) and `retry-after-ms`, both rounded up."""
    millis = max(1, int(-(-seconds * 1000 // 1)))
    return ("Retry-After", str(max(1, -(-millis // 1000)))), ("retry-after-ms", str(millis))
