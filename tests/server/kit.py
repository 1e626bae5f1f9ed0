"""Real sockets in one process: a raw client, a server for a handler, a scripted upstream, and a whole proxy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp.web import ServerRunner, SockSite

from proxy.accounting.ledger.ledger import Ledger
from proxy.accounting.receipt import Receipt
from proxy.config.settings import Settings
from proxy.observability.metrics import Metrics
from proxy.server.access import AccessControl
from proxy.server.admin import AdminHandler
from proxy.server.api import ApiHandler
from proxy.server.connections import ListeningServer
from proxy.server.in_flight import InFlight
from proxy.server.listeners import bind
from proxy.server.passthrough import PassthroughHandler
from proxy.server.upgrade import UpgradeHandler
from proxy.services import Services, build_reservations, build_sender, build_services
from proxy.system.clock import SYSTEM_CLOCK, Clock
from tests.pipeline.fixture import request_handler, settings
from tests.pipeline.script import Move, ScriptedTransport

TEST_TIMEOUT = 30.0
"""Seconds after which a waiting test fails."""

CHAT = "/v1/chat/completions"


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TEST_TIMEOUT):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@dataclass(slots=True)
class Answer:
    """One response as received.

    body: without framing. framing: `length`, `chunked`, `close` or `none`. whole: the body had the end that its
    framing requires.
    """

    version: str
    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes = b""
    framing: str = "none"
    whole: bool = True
    chunks: list[bytes] = field(default_factory=list)
    trailers: dict[str, str] = field(default_factory=dict)

    def get(self, name: str) -> str | None:
        """Return the value of a header, which occurs at most once."""
        values = [value for key, value in self.headers if key.lower() == name.lower()]
        assert len(values) <= 1, (name, values)
        return values[0] if values else None

    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def error(self) -> str | None:
        """Return the proxy's error code, and check that the body has OpenAI's shape."""
        code = self.get("X-Proxy-Error")
        if code is not None and self.body:
            assert self.get("Content-Type") == "application/json"
            shape = self.json()["error"]
            assert set(shape) == {"message", "type", "param", "code"}
            assert shape["code"] == code
            assert isinstance(shape["message"], str)
        return code


class RawConnection:
    """The client's end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self, *, head: bool = False) -> Answer:
        """Return the next response. head: it answers a HEAD request, so it has no body."""
        async with asyncio.timeout(TEST_TIMEOUT):
            raw = await self.reader.readuntil(b"\r\n\r\n")
            first, *lines = raw.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
            version, status, reason = first.split(" ", 2)
            headers = [(name, value) for name, _, value in (line.partition(": ") for line in lines)]
            answer = Answer(version, int(status), reason, headers)
            if not head and answer.status >= 200 and answer.status not in (204, 304):
                await self._body(answer)
            return answer

    async def _body(self, answer: Answer) -> None:
        length = answer.get("Content-Length")
        assert (length is None) or (answer.get("Transfer-Encoding") is None)
        try:
            if length is not None:
                answer.framing = "length"
                answer.body = await self.reader.readexactly(int(length))
            elif answer.get("Transfer-Encoding") == "chunked":
                answer.framing = "chunked"
                while size := int(await self.reader.readuntil(b"\r\n"), 16):
                    answer.chunks.append((await self.reader.readexactly(size + 2))[:-2])
                while line := (await self.reader.readuntil(b"\r\n"))[:-2]:
                    name, _, value = line.decode().partition(": ")
                    answer.trailers[name] = value
            else:
                answer.framing = "close"
                answer.body = await self.reader.read()
        except (asyncio.IncompleteReadError, ConnectionResetError) as error:
            answer.whole = False
            answer.body = getattr(error, "partial", b"")
        answer.body = b"".join(answer.chunks) + answer.body

    async def ended(self) -> bytes:
        """Return the bytes that arrive until the server closes the connection."""
        async with asyncio.timeout(TEST_TIMEOUT):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    async def silent(self, seconds: float = 0.05) -> bool:
        """Return True if no byte arrives and the connection stays open."""
        try:
            async with asyncio.timeout(seconds):
                await self.reader.read(1)
        except TimeoutError:
            return True
        return False

    async def gone(self) -> None:
        """Disconnect."""
        self.writer.transport.abort()
        await asyncio.sleep(0)


@asynccontextmanager
async def raw_connection(port: int) -> AsyncIterator[RawConnection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield RawConnection(reader, writer)
    finally:
        writer.close()
        try:
            await writer.wait_closed()
        except ConnectionError:
            pass


def request(
    method: str = "POST",
    target: str = CHAT,
    body: bytes | object | None = None,
    headers: Iterable[tuple[str, str]] = (),
    version: str = "1.1",
) -> bytes:
    """Return a request as bytes.

    body: JSON unless it is bytes. headers: replace the usual ones; a header whose value is "" is not sent.
    """
    raw = body if isinstance(body, bytes) else b"" if body is None else orjson.dumps(body)
    usual = {"host": ("Host", "127.0.0.1")}
    if body is not None:
        usual["content-type"] = ("Content-Type", "application/json")
        usual["content-length"] = ("Content-Length", str(len(raw)))
    for name, _ in headers:
        usual.pop(name.lower(), None)
    lines = [f"{name}: {value}" for name, value in (*usual.values(), *headers) if value]
    return "\r\n".join([f"{method} {target} HTTP/{version}", *lines, "", ""]).encode("latin-1") + raw


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))


@asynccontextmanager
async def served(handler: Callable[[Any], Awaitable[Any]]) -> AsyncIterator[int]:
    """Yield the port of a server that runs `handler` as the proxy's listeners do."""
    runner = ServerRunner(ListeningServer(handler), handle_signals=False, shutdown_timeout=0.1)
    await runner.setup()
    listener = bind("127.0.0.1", 0)
    await SockSite(runner, listener).start()
    try:
        yield listener.getsockname()[1]
    finally:
        await runner.cleanup()


class RunningProxy:
    """What `App` builds, with a scripted transport."""

    def __init__(self, *moves: Move, config: Settings | None = None, clock: Clock = SYSTEM_CLOCK) -> None:
        config = config or settings()
        self.services: Services = build_services(config, clock)
        self.transport = ScriptedTransport(*moves)
        self.metrics = Metrics()
        self.receipts: list[Receipt] = []
        access = AccessControl(config)
        self.in_flight = InFlight(started=clock.wall())
        self.ledger = Ledger(None, clock)
        self.admin = AdminHandler(self.services, self.metrics, access, self.in_flight, self.ledger)
        sender = build_sender(self.services, self.transport)
        passthrough = PassthroughHandler(self.services, sender, build_reservations(self.services), self._keep)
        self.api = ApiHandler(
            self.services,
            request_handler(self.services, self.transport, self._observe),
            passthrough,
            UpgradeHandler(self.services, sender, passthrough, self.in_flight),
            self.admin,
            self.metrics,
            access,
            self.in_flight,
            self.ledger,
        )
        self.port = 0

    def _observe(self, receipt: Receipt) -> None:
        self.receipts.append(receipt)
        self.ledger.record(receipt)
        self.metrics.observe(receipt)

    def _keep(self, receipt: Receipt) -> None:
        self.services.budgets.recorded(receipt)
        self.services.receipts.put(receipt)
        self._observe(receipt)

    async def ask(
        self,
        method: str = "POST",
        target: str = CHAT,
        body: bytes | object | None = None,
        headers: Iterable[tuple[str, str]] = (),
    ) -> Answer:
        """Send a request on a new connection; return the response."""
        async with raw_connection(self.port) as line:
            line.send(request(method, target, body, headers))
            return await line.answer(head=method == "HEAD")

    async def settled(self) -> None:
        """Wait until no request is in flight and every upstream connection is released."""
        await until(lambda: not self.in_flight.requests and all(reply.given_back for reply in self.transport.replies))
        assert self.services.admission.depth == 0
        assert self.in_flight.streams == {}


@asynccontextmanager
async def running_proxy(
    *moves: Move, config: Settings | None = None, clock: Clock = SYSTEM_CLOCK
) -> AsyncIterator[RunningProxy]:
    """Yield a listening proxy. At the end nothing may be in flight."""
    built = RunningProxy(*moves, config=config, clock=clock)
    async with served(built.api.handle) as built.port:
        yield built
        await built.settled()


Turn = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Say = Callable[["Raw", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Raw:
    """A scripted upstream. turn: serves a connection; connections: number accepted."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self.connections = 0
        self.heads: list[bytes] = []
        self.port = 0
        self._at_work: set[asyncio.Task[Any]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._at_work.add(task)
        try:
            await self._turn(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._at_work.discard(task)
            writer.close()

    def hang_up(self) -> None:
        """Close all connections."""
        for task in self._at_work:
            task.cancel()

    async def read_request(self, reader: asyncio.StreamReader) -> bytes:
        """Return the body of the next request, and keep its head."""
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                return await reader.readexactly(int(line.partition(b":")[2]))
        if b"transfer-encoding: chunked" in head.lower():
            body = b""
            while size := int(await reader.readuntil(b"\r\n"), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readexactly(2)
            return body
        return b""


@asynccontextmanager
async def raw_upstream(
    turn: Callable[[Raw, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[Raw]:
    async def bound(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await turn(upstream, reader, writer)

    upstream = Raw(bound)
    server = await asyncio.start_server(upstream.connected, "127.0.0.1", 0)
    upstream.port = server.sockets[0].getsockname()[1]
    try:
        yield upstream
    finally:
        server.close()
        upstream.hang_up()  # from Python 3.12 on, the server waits for them
        await server.wait_closed()
