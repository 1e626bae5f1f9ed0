"""A scripted upstream: a real TCP server that speaks HTTP/1.1 byte by byte, with no HTTP library.

It lives in a thread of its own, so that it answers whatever loop (or none) a test runs in. Answers are chosen by a
script, `(Request) -> Step | Sequence[Step]`, or a queue per path; a step is an async function over the open
`Connection`. What arrives is kept in a ledger; what must never arrive at an upstream (docs/headers.md) is a
complaint, and the `upstream` fixture fails the test that caused one.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeAlias

from tests.launch import AT_ONCE
from tests.ledger import Request, complaints_about

Step: TypeAlias = Callable[["Connection"], Awaitable[None]]
Answer: TypeAlias = Step | Sequence[Step]


class Gate:
    """Holds a script until the test opens it. Made by `ScriptedUpstream.gate()`, opened from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._event = asyncio.Event()

    def open(self) -> None:
        self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        await self._event.wait()


class Connection(asyncio.Protocol):
    """One accepted connection: parses requests, runs the script's steps, notices the peer's leaving."""

    def __init__(self, upstream: ScriptedUpstream, number: int) -> None:
        self._upstream = upstream
        self._number = number
        self._buffer = bytearray()
        self._news = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._task: asyncio.Task[None] | None = None
        self.transport: asyncio.Transport
        self.request: Request | None = None
        self.requests = 0
        self._closed_by_us = False

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=64 * 1024)
        self._upstream.open_connections.add(self)
        if self._upstream.reset_on_accept:
            self._upstream.reset_on_accept -= 1
            self.reset()
            return
        self._task = asyncio.get_running_loop().create_task(self._serve())

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._news.set()

    def eof_received(self) -> bool:
        self._peer_left()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._upstream.open_connections.discard(self)
        self._peer_left()
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _peer_left(self) -> None:
        if self.request is not None and self.request.peer_closed_at is None and not self._closed_by_us:
            self.request.peer_closed_at = time.monotonic()

    # What steps use.

    async def write(self, data: bytes) -> None:
        """Writes, then waits while the peer does not read."""
        if self.transport.is_closing():
            return
        self.transport.write(data)
        await self._writable.wait()
        if self.request is not None:
            self.request.sent += len(data)

    def close(self) -> None:
        """Ends the connection with FIN, after what has been written."""
        self._closed_by_us = True
        self.transport.close()

    def reset(self) -> None:
        """Ends the connection with RST."""
        self._closed_by_us = True
        sock = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    # The conversation.

    async def _more(self) -> None:
        self._news.clear()
        await self._news.wait()

    async def _until(self, mark: bytes) -> bytes:
        while (at := self._buffer.find(mark)) < 0:
            await self._more()
        piece = bytes(self._buffer[:at])
        del self._buffer[: at + len(mark)]
        return piece

    async def _take(self, count: int, into: bytearray) -> None:
        while count:
            if not self._buffer:
                await self._more()
            piece = self._buffer[:count]
            into += piece
            count -= len(piece)
            del self._buffer[: len(piece)]

    async def _serve(self) -> None:
        try:
            while not self.transport.is_closing():
                await self._one()
        except Exception as problem:  # a script's own mistake must fail the test, not hang it
            self._upstream.complaints.append(f"script failed: {problem!r}")
            self.reset()

    async def _one(self) -> None:
        head = (await self._until(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, version = head[0].split(" ")
        headers = []
        for line in head[1:]:
            name, _, value = line.partition(":")
            headers.append((name, value.strip(" \t")))
        self.requests += 1
        request = self._upstream.enter(self._number, self.requests, method, target, version, headers)
        self.request = request
        early = self._upstream.on_head(request) if self._upstream.on_head is not None else None
        if early is None:
            await self._body(request)
            request.complete_at = time.monotonic()
        await self.run(early if early is not None else self._upstream.answer(request))
        request.answered_at = time.monotonic()
        self.request = None

    async def _body(self, request: Request) -> None:
        if (request.header("transfer-encoding") or "").lower() == "chunked":
            while size := int((await self._until(b"\r\n")).partition(b";")[0], 16):
                await self._take(size, request.received)
                await self._until(b"\r\n")
            while await self._until(b"\r\n"):
                pass
        else:
            await self._take(int(request.header("content-length") or 0), request.received)

    async def run(self, answer: Answer) -> None:
        for step in [answer] if callable(answer) else answer:
            await step(self)
            if self.transport.is_closing():
                return


def send(data: bytes) -> Step:
    """Raw bytes, as they are."""
    return lambda connection: connection.write(data)


def sleep(seconds: float) -> Step:
    async def step(_: Connection) -> None:
        await asyncio.sleep(seconds)

    return step


def hold(gate: Gate) -> Step:
    """Waits until the test opens the gate."""

    async def step(_: Connection) -> None:
        await gate.wait()

    return step


def stall() -> Step:
    """Says nothing more, until the peer leaves."""
    return sleep(3600)


def cut() -> Step:
    """FIN, whatever was promised."""

    async def step(connection: Connection) -> None:
        connection.close()

    return step


def reset() -> Step:
    """RST."""

    async def step(connection: Connection) -> None:
        connection.reset()

    return step


def drip(data: bytes, size: int, pause: float = 0.0) -> Step:
    """`size` bytes at a time, each its own write, `pause` seconds apart."""

    async def step(connection: Connection) -> None:
        for at in range(0, len(data), size):
            await connection.write(data[at : at + size])
            await asyncio.sleep(pause)

    return step


class ScriptedUpstream:
    """The server. `start()` and `stop()` from any thread; `reset()` between tests."""

    def __init__(self, default: Callable[[Request], Answer]) -> None:
        self._default = default
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="upstream", daemon=True)
        self._server: asyncio.Server | None = None
        self._queues: dict[str, deque[Answer]] = {}
        self.port = 0
        self.script: Callable[[Request], Answer] = default
        self.on_head: Callable[[Request], Answer | None] | None = None
        """Where set, asked when the head is in and the body is not: an answer here leaves the body unread."""
        self.requests: list[Request] = []
        self.complaints: list[str] = []
        self.open_connections: set[Connection] = set()
        self.connections = 0
        self.reset_on_accept = 0
        """How many of the next connections to reset before a byte is read."""

    def start(self) -> None:
        self._thread.start()
        self._call(self._listen())

    async def _listen(self) -> None:
        self._server = await self._loop.create_server(self._accept, "127.0.0.1", self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    def _accept(self) -> Connection:
        self.connections += 1
        return Connection(self, self.connections)

    def stop(self) -> None:
        async def end() -> None:
            assert self._server is not None
            self._server.close()
            for connection in list(self.open_connections):
                connection.reset()
            await asyncio.sleep(0)
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._call(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _call(self, work: Awaitable[None]) -> None:
        async def run() -> None:
            await work

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    def reset(self) -> None:
        """Forgets everything and everybody: the next test begins on an empty ledger."""

        async def clear() -> None:
            for connection in list(self.open_connections):
                connection.reset()
            await asyncio.sleep(0)
            self.script, self.on_head, self.reset_on_accept = self._default, None, 0
            self._queues.clear()
            self.requests.clear()
            self.complaints.clear()

        self._call(clear())

    def close_connections(self, idle_only: bool = True) -> None:
        """FIN on every connection, or on those that are between two requests."""

        async def close() -> None:
            for connection in list(self.open_connections):
                if connection.request is None or not idle_only:
                    connection.close()

        self._call(close())

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Nobody listens on the port meanwhile: connections are refused."""

        async def close() -> None:
            assert self._server is not None
            self._server.close()
            for connection in list(self.open_connections):
                connection.close()

        self._call(close())
        try:
            yield
        finally:
            self._call(self._listen())

    # The script.

    def gate(self) -> Gate:
        return Gate(self._loop)

    def queue(self, path: str, *answers: Answer) -> None:
        """The next requests for `path` (without the query) get these in order, then the script decides."""
        self._queues.setdefault(path, deque()).extend(answers)

    def always(self, *steps: Step) -> None:
        """Every request gets these steps."""
        self.script = lambda _: steps

    def answer(self, request: Request) -> Answer:
        waiting = self._queues.get(request.path)
        return waiting.popleft() if waiting else self.script(request)

    # The ledger.

    def enter(
        self,
        connection: int,
        nth: int,
        method: str,
        target: str,
        version: str,
        headers: list[tuple[str, str]],
    ) -> Request:
        request = Request(len(self.requests) + 1, connection, nth, method, target, version, headers, time.monotonic())
        self.requests.append(request)
        self.complaints += [f"{method} {target}: {line}" for line in complaints_about(request)]
        return request

    @property
    def count(self) -> int:
        return len(self.requests)

    @property
    def last(self) -> Request:
        return self.requests[-1]

    @property
    def keys(self) -> list[str | None]:
        """The credential of each request, in order of arrival."""
        return [request.key for request in self.requests]

    async def until(self, condition: Callable[[], bool], seconds: float = AT_ONCE, what: str = "") -> None:
        """Waits for something to be true of the ledger. Raises AssertionError after `seconds`."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not within {seconds} s: {what or condition}; ledger: {self!r}"
            await asyncio.sleep(0.005)

    def __repr__(self) -> str:
        lines = [f"{r.number}. {r.method} {r.target} on {r.connection}" for r in self.requests]
        return f"<upstream {self.port}: {'; '.join(lines) or 'nothing came'}>"
