"""aiohttp's low-level server with a time limit for request headers and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import HttpVersion10, HttpVersion11
from aiohttp.http import RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web import BaseRequest, Server
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from ..protocol.errors import ProxyError
from ..system.clock import SYSTEM_CLOCK
from ..system.sockets import read_in_small_pieces
from .responses import error_response

log = logging.getLogger("proxy")

HEADER_TIMEOUT: Final = 10.0
"""Seconds in which a request's header must be complete (docs/security.md)."""

KEEPALIVE: Final = 3630.0
"""Seconds for which an idle connection is kept; longer than the SDKs' pools do, so that the client closes first."""


_CLOSE: Final = (("Connection", "close"),)
"""aiohttp treats an unparsable request as HTTP/1.0, for which this header would be left out."""


def _not_spoken(message: RawRequestMessage) -> ProxyError | None:
    """Return why a request cannot be served as it is framed; None if it can."""
    version = message.version
    if version is not HttpVersion11 and version not in (HttpVersion10, HttpVersion11):
        text = "HTTP/1.1 and HTTP/1.0 are spoken here"  # no version at all is HTTP/0.9
        return ProxyError("http_version_not_supported", text, headers=_CLOSE)
    if message.chunked:
        if version == HttpVersion10:  # RFC 9112 section 6.1: its framing is faulty
            return ProxyError("bad_request", "HTTP/1.0 has no Transfer-Encoding", headers=_CLOSE)
        if message.headers.get("Transfer-Encoding", "").strip().lower() != "chunked":
            text = "a Transfer-Encoding other than chunked is not decoded"  # RFC 9112 section 6.1
            return ProxyError("not_implemented", text, headers=_CLOSE)
    return None


class _Connection(RequestHandler):
    """A connection that is closed if a request header is not complete within `HEADER_TIMEOUT`."""

    __slots__ = ("_header_timer",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        read_in_small_pieces(transport)
        self._header_timer = self._loop.call_later(HEADER_TIMEOUT, self._too_slow)

    def data_received(self, data: bytes) -> None:
        if self._payload_parser is not None:  # a WebSocket: aiohttp would drop what comes during a drain
            self._payload_parser.feed_data(data)
            return
        current = self._current_request
        # While the proxy stops, aiohttp drops what comes; the rest of a body that is being read is still wanted.
        wanted = self._close and current is not None and not current.content.is_eof()
        if wanted:
            self._close = False
        super().data_received(data)
        if wanted:
            self._close = True
        if self._messages:
            self._refuse_what_is_not_spoken()
        if self._messages and current is not None and not current.content.is_eof():
            self.force_close()  # the parser failed within this chunked body, and aiohttp would wait for its end
        if self._waiter is None or self._waiter.done():  # a header is complete, or a body is being read
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None
        elif self._header_timer is None:
            self._header_timer = self._loop.call_later(HEADER_TIMEOUT, self._too_slow)

    def _refuse_what_is_not_spoken(self) -> None:
        """Put an error in the place of each message that aiohttp accepts although it cannot be served right."""
        for index, (message, _) in enumerate(self._messages):
            if isinstance(message, RawRequestMessage) and (error := _not_spoken(message)) is not None:
                self._messages[index] = _ErrInfo(error.status, error, ""), EMPTY_PAYLOAD

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        if self._payload_parser is not None:
            self._payload_parser.connection_lost(exc)
        super().connection_lost(exc)

    def eof_received(self) -> bool | None:  # type: ignore[override]
        return self._payload_parser.keeps_open() if self._payload_parser is not None else None

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> Any:
        """Return the error response to a request that aiohttp cannot parse.

        aiohttp's own message may quote bytes of the request, so it is not repeated.
        """
        if isinstance(exc, ProxyError):
            error = exc
        elif status == 400:
            error = ProxyError("bad_request", "the request is not valid HTTP/1.1", headers=_CLOSE)
        else:
            error = ProxyError("internal_error", "the proxy failed on this request; see its log")
        log.info("refused a request: %s (%s)", error.code, type(exc).__name__)
        return error_response(request, error, SYSTEM_CLOCK.new_id(), b"", close=True)

    def _too_slow(self) -> None:
        self._header_timer = None
        if self._waiter is not None and not self._waiter.done():
            self.force_close()


class ListeningServer(Server):
    """The server of a listener. It cancels the handler if the client disconnects, and does not decode bodies."""

    def __init__(self, handler: Callable[[BaseRequest], Awaitable[Any]]) -> None:
        super().__init__(
            handler,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=KEEPALIVE,
            max_line_size=16 * 1024,
            max_field_size=32 * 1024,
        )

    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)
