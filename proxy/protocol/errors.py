"""The proxy's own errors: one table of codes, one exception, OpenAI's envelope.

The shape `{"error": {"message", "type", "param", "code"}}` is that of OpenAI's API reference, *Error codes*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import orjson


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """What a code of ours means on the wire.

    `should_retry` is what `X-Should-Retry` says: False keeps an SDK from repeating what cannot succeed, None is silent.
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
    "method_not_allowed": ErrorKind(405, _INVALID, False),
    "request_too_large": ErrorKind(413, _INVALID, False),
    "unsupported_media_type": ErrorKind(415, _INVALID, False),
    "host_not_allowed": ErrorKind(421, _INVALID, False),
    "throttled": ErrorKind(429, _RATE, None),
    "queue_full": ErrorKind(429, _RATE, None),
    "request_exceeds_limit": ErrorKind(429, _RATE, False),
    "keys_cooling": ErrorKind(429, _RATE, None),
    "client_limit": ErrorKind(429, _RATE, None),
    "budget_exceeded": ErrorKind(429, _RATE, False),
    "internal_error": ErrorKind(500, _SERVER, None),
    "upstream_unreachable": ErrorKind(502, _SERVER, None),
    "upstream_invalid_response": ErrorKind(502, _SERVER, None),
    "no_usable_key": ErrorKind(502, _SERVER, False),
    "overloaded": ErrorKind(503, _SERVER, None),
    "draining": ErrorKind(503, _SERVER, None),
    "circuit_open": ErrorKind(503, _SERVER, None),
    "upstream_timeout": ErrorKind(504, _SERVER, None),
    "not_cached": ErrorKind(504, _SERVER, False),
}
"""Every code the proxy can answer with today (contract 6); a test holds the README to it."""


class ProxyError(Exception):
    """An answer made by the proxy itself.

    code: a key of `CODES`; message: for people, free of secrets; param: the header, option or field at fault;
    retry_after: seconds until another try can succeed; should_retry: overrides the code's own; headers: extra ones.
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
        self.lines = ""
        """Header lines of the call it ended, request id included; '' where no call was made of the request."""

    def copy(self, lines: str = "") -> ProxyError:
        """The same anew, with these `lines`: for another request, or to be kept or raised without a reference cycle.

        A raised exception holds the frames that it came through, and with them each variable that holds it.
        """
        refusal = ProxyError(
            self.code,
            self.message,
            param=self.param,
            retry_after=self.retry_after,
            should_retry=self.should_retry,
            headers=self.headers,
        )
        refusal.lines = lines
        return refusal

    def body(self) -> bytes:
        return envelope(self.message, CODES[self.code].type, self.param, self.code)


def envelope(message: str, type_: str, param: str | None, code: str) -> bytes:
    """OpenAI's error object as JSON bytes."""
    return orjson.dumps({"error": {"message": message, "type": type_, "param": param, "code": code}})


def error_event(code: str, message: str) -> bytes:
    """A failure after the first streamed byte, as the SSE event every SDK raises on (`error` in a data chunk)."""
    return b"data: " + envelope(message, CODES[code].type, None, code) + b"\n\n"


def retry_after_headers(seconds: float) -> tuple[tuple[str, str], ...]:
    """`Retry-After` (whole seconds, RFC 9110 section 10.2.3) and `retry-after-ms`: rounded up, so neither is early."""
    millis = max(1, int(-(-seconds * 1000 // 1)))
    return ("Retry-After", str(max(1, -(-millis // 1000)))), ("retry-after-ms", str(millis))
