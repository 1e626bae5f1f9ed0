"""Going up: one aiohttp session for all upstreams, and the table that turns its exceptions into failures.

Nothing is followed, kept or read from the environment here: no redirects, no cookies, no proxies, no netrc.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Final, cast

import aiohttp
from aiohttp import ClientTimeout, TCPConnector
from aiohttp.client_proto import ResponseHandler
from multidict import CIMultiDict
from yarl import URL

from ..core.headers import Raw
from ..core.outcome import TransportFailure
from ..core.ports import Trip
from .server import read_in_small_pieces

if TYPE_CHECKING:
    from aiohttp.client import ClientRequest
    from aiohttp.client_reqrep import ConnectionKey
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace

_LARGE: Final = 256 * 1024

_trip: ContextVar[Trip] = ContextVar("trip")


class _Protocol(ResponseHandler):
    """Notes the first byte of an answer: from then on a request is never sent again."""

    trip: Trip | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        read_in_small_pieces(transport)

    def data_received(self, data: bytes) -> None:
        if self.trip is not None:
            self.trip.answered = True
            self.trip = None
        super().data_received(data)
        if self._exception is not None and self._payload is not None and not self._payload.is_eof():
            # Broken framing inside a body: aiohttp tells that to nobody who reads it, and he would wait for ever.
            self._payload.set_exception(aiohttp.ClientPayloadError("broken framing"))


class _Connector(TCPConnector):
    """Tells each call whether its connection was used before, and gives a new one to those that ask."""

    def __init__(self) -> None:
        super().__init__(limit=0, keepalive_timeout=60, ttl_dns_cache=300)
        self._factory = cast("partial[ResponseHandler]", partial(_Protocol, loop=self._loop))

    async def _get(self, key: ConnectionKey, traces: list[Trace]) -> Connection | None:
        trip = _trip.get()
        if trip.fresh:
            return None
        connection = await super()._get(key, traces)
        trip.reused = connection is not None
        return connection

    async def connect(self, req: ClientRequest, traces: list[Trace], timeout: ClientTimeout) -> Connection:
        connection = await super().connect(req, traces, timeout)
        trip = _trip.get()
        trip.connected = True
        if isinstance(connection.protocol, _Protocol):
            connection.protocol.trip = trip
        return connection


class UpstreamAnswer:
    """Status and headers are in hand; the body is read by one of `read`, `chunks`. Ends with `release` or `close`."""

    __slots__ = ("_response", "raw_headers", "reason", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.reason = response.reason or ""
        self.raw_headers: Sequence[Raw] = response.raw_headers

    @property
    def headers(self) -> Mapping[str, str]:
        """Case-insensitive."""
        return self._response.headers

    def ready(self) -> bytes | None:
        """The whole body, undecoded, where all of it came together with the head."""
        content = self._response.content
        if not content.is_eof() or content.exception() is not None:
            return None
        return content.read_nowait(-1)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes off the socket, undecoded. Raises TransportFailure (invalid: cut; timeout: idle)."""
        content = self._response.content
        try:
            while True:
                chunk = await content.readany()
                if not chunk:
                    break
                yield chunk
        except TimeoutError:
            raise TransportFailure("timeout", "the upstream fell silent") from None
        except (aiohttp.ClientError, OSError) as error:
            raise TransportFailure("invalid", f"the upstream cut its answer short ({_name(error)})") from None

    def close(self) -> None:
        """Ends it: aiohttp has kept the connection if the body was read to its end, and drops it here if not."""
        self._response.close()


class Upstreams:
    """The way up. connect, idle: seconds; idle bounds each wait for bytes of a body."""

    _SKIP: Final = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")

    def __init__(self, connect: float, idle: float) -> None:
        self._connect = connect
        self._idle = idle
        self._session = aiohttp.ClientSession(
            connector=_Connector(),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            skip_auto_headers=self._SKIP,
            timeout=ClientTimeout(total=None, sock_connect=connect, sock_read=None),
            max_line_size=16 * 1024,
            max_field_size=64 * 1024,
            read_bufsize=256 * 1024,
        )
        # aiohttp would send GET, HEAD, PUT and DELETE again by itself, unseen; whether to is the retry policy's to say.
        self._session._retry_connection = False

    async def send(
        self,
        method: str,
        url: str,
        headers: Sequence[tuple[str, str]],
        body: bytes | AsyncIterator[bytes] | None,
        *,
        first_byte: float,
        trip: Trip,
    ) -> UpstreamAnswer:
        """Sends and waits for the answer's head, at most `first_byte` seconds. Raises TransportFailure."""
        token = _trip.set(trip)
        try:
            async with asyncio.timeout(first_byte):
                wire = CIMultiDict(headers)
                if isinstance(body, bytes) and len(body) > _LARGE:
                    wire["Content-Length"] = str(len(body))
                    body = _sliced(body)
                response = await self._session.request(
                    method, URL(url, encoded=True), data=body, headers=wire, allow_redirects=False
                )
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
            raise _failure(error, trip) from None
        finally:
            _trip.reset(token)
        protocol: ResponseHandler | None = response.connection.protocol if response.connection else None
        if protocol is not None:
            protocol.read_timeout = self._idle
            protocol.start_timeout()
        return UpstreamAnswer(response)

    async def close(self) -> None:
        await self._session.close()


async def _sliced(body: bytes) -> AsyncIterator[bytes]:
    """A large body piece by piece, so that writing it neither blocks the loop nor doubles it in memory."""
    view = memoryview(body)
    for start in range(0, len(view), _LARGE):
        yield bytes(view[start : start + _LARGE])


def _name(error: BaseException) -> str:
    return type(error).__name__


def _why(error: OSError) -> str:
    """In the system's own words, without the address that asyncio puts there."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or _name(error)  # the resolver's errors have negative numbers


def _failure(error: Exception, trip: Trip) -> TransportFailure:
    """The exception table: how far the request got when aiohttp gave up."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return TransportFailure("unreached", "connecting to the upstream took too long")
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError):
        return TransportFailure("unreached", "the upstream's TLS certificate or handshake is not acceptable")
    if isinstance(error, aiohttp.ClientConnectorError):
        return TransportFailure("unreached", f"the upstream cannot be reached ({_why(error.os_error)})")
    if isinstance(error, TimeoutError):
        if trip.connected:
            return TransportFailure("timeout", "the upstream did not answer in time")
        return TransportFailure("unreached", "connecting to the upstream took too long")
    if isinstance(error, aiohttp.ClientResponseError):
        return TransportFailure("invalid", "the upstream's answer is not HTTP")
    if not trip.connected:
        return TransportFailure("unreached", f"the upstream cannot be reached ({_name(error)})")
    if trip.answered:
        return TransportFailure("invalid", "the upstream cut its answer short")
    if trip.reused:
        return TransportFailure("stale", "the upstream closed a connection that had been idle")
    return TransportFailure("ambiguous", "the upstream closed the connection without an answer")
