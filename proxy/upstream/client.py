"""Going up: aiohttp's connections and parser without its session, and the table from its exceptions to failures.

Nothing is followed, kept or read from the environment here: no redirects, no cookies, no proxies, no netrc.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from ssl import SSLContext, create_default_context
from typing import TYPE_CHECKING, Final, cast

import aiohttp
from aiohttp import ClientTimeout, TCPConnector
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from ..protocol.errors import ProxyError
from ..protocol.headers import Raw
from ..system.sockets import read_in_small_pieces
from .interfaces import ConnectionInfo
from .retry.outcome import TransportFailure

if TYPE_CHECKING:
    from aiohttp.client_reqrep import ConnectionKey
    from aiohttp.connector import Connection
    from aiohttp.http import RawResponseMessage
    from aiohttp.streams import StreamReader
    from aiohttp.tracing import Trace

_LARGE: Final = 256 * 1024
_NO_BODY: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
"""Methods for which a missing body goes without saying (RFC 9110 section 8.6)."""


class _Protocol(ResponseHandler):
    """Notes the first byte of an answer: from then on a request is never sent again."""

    trip: ConnectionInfo | None = None

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

    def give_up(self) -> None:
        """The head of the answer did not come in time."""
        self.set_exception(TimeoutError())


class _Connector(TCPConnector):
    """aiohttp's pool, with the two ways to a connection apart: `pooled` gives used ones, `connect` new ones."""

    def __init__(self) -> None:
        super().__init__(limit=0, keepalive_timeout=60, ttl_dns_cache=300)
        self._factory = cast("partial[ResponseHandler]", partial(_Protocol, loop=self._loop))

    async def _get(self, key: ConnectionKey, traces: list[Trace]) -> Connection | None:
        return None

    async def pooled(self, key: ConnectionKey) -> Connection | None:
        return await super()._get(key, [])


class ConnectOptions:
    """How an upstream is reached, where not directly: through an HTTP proxy, or trusting other certificates.

    proxy: `http://[user:password@]host:port`; ca_file: PEM certificates in place of the system's. Raises OSError where
    they cannot be read.
    """

    def __init__(self, proxy: str | None, ca_file: str | None) -> None:
        self.proxy: URL | None = None
        self.auth: aiohttp.BasicAuth | None = None
        if proxy is not None:
            url = URL(proxy)
            self.proxy = url.with_user(None)
            if url.user is not None:
                self.auth = aiohttp.BasicAuth(url.user, url.password or "", "utf-8")
        self.ssl: SSLContext | bool = True if ca_file is None else create_default_context(cafile=ca_file)


_DIRECT: Final = ConnectOptions(None, None)
NO_CONNECT_OPTIONS: Final[Mapping[str, ConnectOptions]] = {}


class _Target:
    """Where a URL leads, worked out once. address: what the pool knows it by; start: the head after the method."""

    __slots__ = ("address", "key", "lines", "start")

    def __init__(self, url: str, outlets: Mapping[str, ConnectOptions]) -> None:
        """Raises ValueError for a URL that names no host."""
        parsed = URL(url, encoded=True)
        if not parsed.host:
            raise ValueError("a URL without a host")
        outlet = outlets.get(str(parsed.origin()), _DIRECT)
        self.address = aiohttp.ClientRequest(
            "GET",
            parsed,
            loop=asyncio.get_running_loop(),
            proxy=outlet.proxy,
            proxy_auth=outlet.auth,
            ssl=outlet.ssl,
        )
        self.key = self.address.connection_key
        # To a proxy, plain http is asked for in absolute form (RFC 9112 section 3.2.2); https goes through a tunnel.
        forwarded = outlet.proxy is not None and parsed.scheme == "http"
        self.start = f" {parsed if forwarded else parsed.raw_path_qs} HTTP/1.1\r\nHost: {parsed.host_port_subcomponent}"
        if forwarded and outlet.auth is not None:
            self.start += f"\r\nProxy-Authorization: {outlet.auth.encode()}"
        self.start += "\r\n"
        self.lines = self.start.count("\n")


class AiohttpResponse:
    """Status and headers are in hand; the body is read by one of `ready`, `chunks`. Ends with `close`.

    The connection goes back to the pool by itself as soon as the whole body is here.
    """

    __slots__ = ("_connection", "_content", "_writer", "headers", "raw_headers", "reason", "status")

    def __init__(
        self,
        message: RawResponseMessage,
        content: StreamReader,
        connection: Connection,
        writer: asyncio.Task[None] | None,
        idle: float,
    ) -> None:
        self.status = message.code
        self.reason = message.reason or ""
        self.raw_headers: Sequence[Raw] = message.raw_headers
        self.headers: Mapping[str, str] = message.headers
        self._content = content
        self._writer = writer
        self._connection: Connection | None = connection
        content.on_eof(self._ended)  # called at once where the end is here already
        if self._connection is not None and (protocol := connection.protocol) is not None:
            protocol.read_timeout = idle
            protocol.start_timeout()

    def _ended(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        transport = connection.transport
        unsent = transport is not None and transport.get_write_buffer_size() > 0
        if self.status == 101 or unsent or (self._writer is not None and not self._writer.done()):
            self._connection = connection
            self.close()  # it answered before it had the whole request
        else:
            connection.release()

    def ready(self) -> bytes | None:
        """The whole body, undecoded, where all of it came together with the head."""
        content = self._content
        if not content.is_eof() or content.exception() is not None:
            return None
        return content.read_nowait(-1)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes off the socket, undecoded. Raises TransportFailure (invalid: cut; timeout: idle)."""
        content = self._content
        try:
            while True:
                chunk = await content.readany()
                if not chunk:
                    break
                yield chunk
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(_unframed(error), TimeoutError):
                raise TransportFailure("timeout", "the upstream fell silent") from None
            raise TransportFailure("invalid", f"the upstream cut its answer short ({_name(error)})") from None

    def close(self) -> None:
        """Ends it: a connection that is not back in the pool yet is dropped."""
        if self._writer is not None:
            self._writer.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            if not self._content.is_eof():  # it has no end any more, and lets go of `_ended`, which it would call
                self._content.set_exception(aiohttp.ClientConnectionError("closed"))


class AiohttpTransport:
    """The way up. connect, idle: seconds; idle bounds each wait for bytes of a body; sealed: nothing leaves (replay).

    aiohttp's connector makes and keeps connections and its parser reads answers; what its session does beyond that
    (redirects, cookies, retries, default headers) is not wanted here and would cost more than all the rest.
    """

    def __init__(
        self,
        connect: float,
        idle: float,
        outlets: Mapping[str, ConnectOptions] = NO_CONNECT_OPTIONS,
        sealed: bool = False,
    ) -> None:
        """outlets: by origin, of upstreams that are not reached directly."""
        self._sealed = sealed
        self._connector = _Connector()
        self.apply_settings(connect, idle, outlets)

    def apply_settings(self, connect: float, idle: float, outlets: Mapping[str, ConnectOptions]) -> None:
        """What holds for calls from now on."""
        self._idle = idle
        self._timeout = ClientTimeout(total=None, sock_connect=connect)
        self._outlets = outlets
        self._targets: dict[str, _Target] = {}

    async def send(
        self,
        method: str,
        url: str,
        headers: Sequence[tuple[str, str]],
        body: bytes | AsyncIterator[bytes] | None,
        *,
        first_byte: float,
        trip: ConnectionInfo,
    ) -> AiohttpResponse:
        """Sends and waits for the answer's head, at most `first_byte` seconds. Raises TransportFailure."""
        if self._sealed:  # whoever asks for an answer has looked for a stored one: this is the last door
            raise ProxyError("not_cached", "replay: nothing is sent upstream")
        try:
            return await self._send(method, url, headers, body, first_byte, trip)
        except (TimeoutError, aiohttp.ClientError, HttpProcessingError, OSError, ValueError) as error:
            raise _failure(_unframed(error), trip) from None

    async def _send(
        self,
        method: str,
        url: str,
        headers: Sequence[tuple[str, str]],
        body: bytes | AsyncIterator[bytes] | None,
        first_byte: float,
        trip: ConnectionInfo,
    ) -> AiohttpResponse:
        loop = asyncio.get_running_loop()
        end = loop.time() + first_byte
        target = self._target(url)
        framing, chunked = _framing(method, headers, body)
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers])
        head = f"{method}{target.start}{lines}{framing}\r\n".encode("utf-8", "surrogateescape")
        if head.count(b"\n") != len(headers) + target.lines + 1 + (framing != ""):
            raise ValueError("a header with a line break")  # parser and settings let none in; this is the last door
        connection = None if trip.fresh else await self._connector.pooled(target.key)
        trip.reused = connection is not None
        if connection is None:
            async with asyncio.timeout_at(end):
                connection = await self._connector.connect(target.address, [], self._timeout)
        trip.connected = True
        writer = timer = None
        try:
            protocol, transport = connection.protocol, connection.transport
            assert isinstance(protocol, _Protocol)
            if transport is None:
                raise aiohttp.ServerDisconnectedError
            protocol.trip = trip
            protocol.set_response_params(
                skip_payload=method == "HEAD",
                read_until_eof=True,
                auto_decompress=False,
                read_bufsize=_LARGE,
                max_line_size=16 * 1024,
                max_field_size=64 * 1024,
            )
            if body is None or (isinstance(body, bytes) and len(body) <= _LARGE):
                transport.write(head + body if body else head)
            else:
                transport.write(head)
                pieces = _sliced(body) if isinstance(body, bytes) else body
                writer = loop.create_task(_write(protocol, pieces, chunked))
            timer = loop.call_at(max(end, trip.until), protocol.give_up)

            def extend(until: float) -> None:
                nonlocal timer
                if timer is not None:
                    timer.cancel()
                    timer = loop.call_at(until, protocol.give_up)

            trip.extend = extend
            while True:
                message, content = await protocol.read()
                if message.code >= 200 or message.code == 101:
                    return AiohttpResponse(message, content, connection, writer, self._idle)
        except BaseException:
            if writer is not None:
                writer.cancel()
            connection.close()
            raise
        finally:
            if timer is not None:
                timer.cancel()
                timer = trip.extend = None

    def _target(self, url: str) -> _Target:
        target = self._targets.get(url)
        if target is None:
            target = _Target(url, self._outlets)
            if len(url) <= 1024:
                if len(self._targets) >= 1024:
                    self._targets.clear()
                self._targets[url] = target
        return target

    async def close(self) -> None:
        await self._connector.close()


def _framing(
    method: str, headers: Sequence[tuple[str, str]], body: bytes | AsyncIterator[bytes] | None
) -> tuple[str, bool]:
    """(the line that says how long the body is, whether it is chunked) (RFC 9112 section 6)."""
    if isinstance(body, bytes):
        return f"Content-Length: {len(body)}\r\n", False
    if body is None:
        return ("" if method in _NO_BODY else "Content-Length: 0\r\n"), False
    if any(name.lower() == "content-length" for name, _ in headers):
        return "", False
    return "Transfer-Encoding: chunked\r\n", True


async def _write(protocol: ResponseHandler, pieces: AsyncIterator[bytes], chunked: bool) -> None:
    """Sends a body that flows, as fast as the upstream takes it. Where it breaks, so does the wait for an answer."""
    try:
        async for piece in pieces:
            transport = protocol.transport
            if transport is None or transport.is_closing():
                return
            if piece:
                transport.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            if protocol.writing_paused:
                await protocol._drain_helper()
        if chunked and protocol.transport is not None:
            protocol.transport.write(b"0\r\n\r\n")
    except Exception as error:
        protocol.set_exception(aiohttp.ClientConnectionError(f"the request body broke off ({_name(error)})"))


async def _sliced(body: bytes) -> AsyncIterator[bytes]:
    """A large body piece by piece, so that writing it neither blocks the loop nor doubles it in memory."""
    view = memoryview(body)
    for start in range(0, len(view), _LARGE):
        yield bytes(view[start : start + _LARGE])


def _unframed(error: Exception) -> Exception:
    """The same error without the frames it came through: aiohttp's objects keep it, and those frames keep them."""
    chain: BaseException | None = error
    while chain is not None:
        chain.__traceback__, chain = None, chain.__cause__ or chain.__context__
    return error


def _name(error: BaseException) -> str:
    return type(error).__name__


def _why(error: OSError) -> str:
    """In the system's own words, without the address that asyncio puts there."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or _name(error)  # the resolver's errors have negative numbers


def _failure(error: Exception, trip: ConnectionInfo) -> TransportFailure:
    """The exception table: how far the request got when aiohttp gave up."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return TransportFailure("unreached", "connecting to the upstream took too long")
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError):
        return TransportFailure("unreached", "the upstream's TLS certificate or handshake is not acceptable")
    if isinstance(error, aiohttp.ClientProxyConnectionError | aiohttp.ClientHttpProxyError):
        return TransportFailure("unreached", "the upstream's proxy cannot be reached or refuses")
    if isinstance(error, aiohttp.ClientConnectorError):
        return TransportFailure("unreached", f"the upstream cannot be reached ({_why(error.os_error)})")
    if isinstance(error, TimeoutError):
        if trip.connected:
            return TransportFailure("timeout", "the upstream did not answer in time")
        return TransportFailure("unreached", "connecting to the upstream took too long")
    if isinstance(error, HttpProcessingError):
        return TransportFailure("invalid", "the upstream's answer is not HTTP")
    if not trip.connected:
        return TransportFailure("unreached", f"the upstream cannot be reached ({_name(error)})")
    if trip.answered:
        return TransportFailure("invalid", "the upstream cut its answer short")
    if trip.reused:
        return TransportFailure("stale", "the upstream closed a connection that had been idle")
    return TransportFailure("ambiguous", "the upstream closed the connection without an answer")
