"""The HTTP client: aiohttp's connections and parser without its session.

It follows no redirects, keeps no cookies, and reads no proxies or netrc from the environment. It alone knows aiohttp's
exceptions, and turns each into a `TransportFailure`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from ssl import SSLContext, create_default_context
from typing import TYPE_CHECKING, Any, Final, cast

import aiohttp
from aiohttp import ClientTimeout, TCPConnector
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.tcp_helpers import tcp_keepalive
from yarl import URL

from ..protocol.errors import ProxyError
from ..protocol.headers import Raw
from ..system.sockets import read_in_small_pieces
from .client_errors import error_name, transport_failure, without_frames
from .interfaces import ConnectionInfo, SwitchedConnection
from .outgoing import LARGE, OutgoingRequest, framing_of, request_head
from .retry.outcome import TransportFailure

if TYPE_CHECKING:
    from aiohttp.client_reqrep import ConnectionKey
    from aiohttp.connector import Connection
    from aiohttp.http import RawResponseMessage
    from aiohttp.streams import StreamReader
    from aiohttp.tracing import Trace

_RESPONSE_PARAMS: Final[dict[str, Any]] = {
    "read_until_eof": True,
    "auto_decompress": False,
    "read_bufsize": LARGE,
    "max_line_size": 16 * 1024,
    "max_field_size": 64 * 1024,
}
"""How aiohttp's parser reads a response; sizes in bytes."""


class _Protocol(ResponseHandler):
    """Notes the first byte of a response: from then on a request is never sent again."""

    connection: ConnectionInfo | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        read_in_small_pieces(transport)

    def data_received(self, data: bytes) -> None:
        if self.connection is not None:
            self.connection.answered = True
            self.connection = None
        super().data_received(data)
        if self._exception is not None and self._payload is not None and not self._payload.is_eof():
            # Broken framing inside a body: aiohttp does not tell the reader, who would wait for ever.
            self._payload.set_exception(aiohttp.ClientPayloadError("broken framing"))

    def eof_received(self) -> bool | None:  # type: ignore[override]
        super().eof_received()
        tunnel = self._payload_parser
        return tunnel.keeps_open() if tunnel is not None else None

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._payload_parser is not None:
            self._payload_parser.connection_lost(exc)
        super().connection_lost(exc)

    def give_up(self) -> None:
        """End the wait: the head of the response did not come in time."""
        self.set_exception(TimeoutError())


class _Connector(TCPConnector):
    """aiohttp's connection pool; `pooled` returns only used connections, `connect` only new ones."""

    def __init__(self) -> None:
        super().__init__(limit=0, keepalive_timeout=60, ttl_dns_cache=300)
        self._factory = cast("partial[ResponseHandler]", partial(_Protocol, loop=self._loop))

    async def _get(self, key: ConnectionKey, traces: list[Trace]) -> Connection | None:
        return None

    async def pooled(self, key: ConnectionKey) -> Connection | None:
        return await super()._get(key, [])


class ConnectOptions:
    """How an upstream is reached if not directly: through an HTTP proxy, or with other trusted certificates.

    proxy: `http://[user:password@]host:port`. ca_file: PEM certificates in place of the system's. Raises OSError if
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


class Target:
    """Where a URL leads, worked out once.

    address, key: what aiohttp's connector needs. start: the request's head after the method. lines: how many it has.
    """

    __slots__ = ("address", "key", "lines", "start")

    def __init__(self, url: str, options: Mapping[str, ConnectOptions]) -> None:
        """Raises ValueError for a URL that names no host."""
        parsed = URL(url, encoded=True)
        if not parsed.host:
            raise ValueError("a URL without a host")
        option = options.get(str(parsed.origin()), _DIRECT)
        self.address = aiohttp.ClientRequest(
            "GET",
            parsed,
            loop=asyncio.get_running_loop(),
            proxy=option.proxy,
            proxy_auth=option.auth,
            ssl=option.ssl,
        )
        self.key = self.address.connection_key
        # To a proxy, plain http is asked for in absolute form (RFC 9112 section 3.2.2); https goes through a tunnel.
        forwarded = option.proxy is not None and parsed.scheme == "http"
        self.start = f" {parsed if forwarded else parsed.raw_path_qs} HTTP/1.1\r\nHost: {parsed.host_port_subcomponent}"
        if forwarded and option.auth is not None:
            self.start += f"\r\nProxy-Authorization: {option.auth.encode()}"
        self.start += "\r\n"
        self.lines = self.start.count("\n")


class AiohttpResponse:
    """A response whose head is here; `ready` or `chunks` reads the body. Ends with `close`.

    The connection returns to the pool by itself as soon as the whole body is here.
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

    def switched(self) -> SwitchedConnection:
        """Return the connection after a 101, for as long as this response is not closed."""
        assert self._connection is not None
        protocol = self._connection.protocol
        assert isinstance(protocol, _Protocol)
        protocol.read_timeout = None
        if protocol.transport is not None:
            tcp_keepalive(protocol.transport)
        return protocol

    def _ended(self) -> None:
        if self.status == 101:
            return  # the connection speaks another protocol from here on
        connection, self._connection = self._connection, None
        if connection is None:
            return
        transport = connection.transport
        unsent = transport is not None and transport.get_write_buffer_size() > 0
        if unsent or (self._writer is not None and not self._writer.done()):
            self._connection = connection
            self.close()  # it answered before it had the whole request
        else:
            connection.release()

    def ready(self) -> bytes | None:
        """Return the whole body, undecoded, if all of it came together with the head."""
        content = self._content
        if not content.is_eof() or content.exception() is not None:
            return None
        return content.read_nowait(-1)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes, undecoded. Raises TransportFailure (invalid: cut; timeout: idle)."""
        content = self._content
        try:
            while True:
                chunk = await content.readany()
                if not chunk:
                    break
                yield chunk
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(without_frames(error), TimeoutError):
                raise TransportFailure("timeout", "the upstream fell silent") from None
            raise TransportFailure("invalid", f"the upstream cut its answer short ({error_name(error)})") from None

    def close(self) -> None:
        """End the response: a connection that is not back in the pool yet is closed."""
        if self._writer is not None:
            self._writer.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            if not self._content.is_eof():  # it will not end any more: let go of `_ended`
                self._content.set_exception(aiohttp.ClientConnectionError("closed"))


class AiohttpTransport:
    """Sends requests to upstreams.

    aiohttp's connector makes and keeps connections, and its parser reads responses. What its session adds (redirects,
    cookies, retries, default headers) is not wanted here and would cost more than all the rest.
    """

    def __init__(
        self,
        connect: float,
        idle: float,
        options: Mapping[str, ConnectOptions] = NO_CONNECT_OPTIONS,
        offline: bool = False,
    ) -> None:
        """connect, idle, options: as in `apply_settings`. offline: nothing is sent (replay)."""
        self._offline = offline
        self._connector = _Connector()
        self.apply_settings(connect, idle, options)

    def apply_settings(self, connect: float, idle: float, options: Mapping[str, ConnectOptions]) -> None:
        """Set what holds for requests from now on.

        connect: seconds to wait for a connection. idle: seconds to wait for the next bytes of a body.
        options: by origin, of the upstreams that are not reached directly.
        """
        self._idle = idle
        self._timeout = ClientTimeout(total=None, sock_connect=connect)
        self._options = options
        self._targets: dict[str, Target] = {}

    async def send(
        self,
        method: str,
        url: str,
        headers: Sequence[tuple[str, str]],
        body: bytes | AsyncIterator[bytes] | None,
        *,
        first_byte: float,
        connection: ConnectionInfo,
    ) -> AiohttpResponse:
        """Send, and return the head of the response, within `first_byte` seconds. Raises TransportFailure."""
        if self._offline:  # stored responses were searched before: this check is the last one
            raise ProxyError("not_cached", "replay: nothing is sent upstream")
        try:
            end = asyncio.get_running_loop().time() + first_byte
            target = self._target(url)
            framing, chunked = framing_of(method, headers, body)
            head = request_head(method, target, headers, framing)
            link = await self._connect(target, connection, end)
            return await self._exchange(link, OutgoingRequest(method, head, body, chunked), connection, end)
        except (TimeoutError, aiohttp.ClientError, HttpProcessingError, OSError, ValueError) as error:
            raise transport_failure(without_frames(error), connection) from None

    async def _connect(self, target: Target, info: ConnectionInfo, end: float) -> Connection:
        """Return a connection: a used one unless a new one is asked for. end: the loop's time to be ready by."""
        link = None if info.fresh else await self._connector.pooled(target.key)
        info.reused = link is not None
        if link is None:
            async with asyncio.timeout_at(end):
                link = await self._connector.connect(target.address, [], self._timeout)
        info.connected = True
        return link

    async def _exchange(
        self, link: Connection, request: OutgoingRequest, info: ConnectionInfo, end: float
    ) -> AiohttpResponse:
        """Write the request and wait for the head of the response, until `end` (the loop's time) or as extended."""
        loop = asyncio.get_running_loop()
        writer = timer = None
        try:
            protocol, transport = link.protocol, link.transport
            assert isinstance(protocol, _Protocol)
            if transport is None:
                raise aiohttp.ServerDisconnectedError
            protocol.connection = info
            protocol.set_response_params(skip_payload=request.method == "HEAD", **_RESPONSE_PARAMS)
            writer = request.write(protocol, transport)
            timer = loop.call_at(max(end, info.until), protocol.give_up)

            def extend(until: float) -> None:
                nonlocal timer
                if timer is not None:
                    timer.cancel()
                    timer = loop.call_at(until, protocol.give_up)

            info.extend = extend
            while True:
                message, content = await protocol.read()
                if message.code >= 200 or message.code == 101:
                    return AiohttpResponse(message, content, link, writer, self._idle)
        except BaseException:
            if writer is not None:
                writer.cancel()
            link.close()
            raise
        finally:
            if timer is not None:
                timer.cancel()
                timer = info.extend = None

    def _target(self, url: str) -> Target:
        target = self._targets.get(url)
        if target is None:
            target = Target(url, self._options)
            if len(url) <= 1024:
                if len(self._targets) >= 1024:
                    self._targets.clear()
                self._targets[url] = target
        return target

    async def close(self) -> None:
        await self._connector.close()
