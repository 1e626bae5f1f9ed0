"""No request leaves a reference cycle, on real sockets and with aiohttp's own objects."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from proxy.config.settings import BreakerSettings, RetrySettings, Settings
from proxy.upstream.client import AiohttpTransport
from proxy.upstream.interfaces import ConnectionInfo
from proxy.upstream.retry.outcome import TransportFailure
from tests.garbage import uncollected
from tests.pipeline.fixture import ask, settings
from tests.pipeline.script import JSON, Fails, Move, Responds, error, events, says, streams
from tests.server.kit import Raw, RawConnection, RunningProxy, Say, raw_connection, raw_upstream, request, running_proxy
from tests.upstream.transport import OK, send, whole
from tests.upstream.transport import says as upstream_says

pytestmark = pytest.mark.slow

TIMES = 5
CUT = TransportFailure("invalid", "cut")
FILES, MODELS = "/v1/files", "/v1/models"
PACED = tuple(step for part in events(usage=True) for step in (0.005, part))

Do = Callable[[RunningProxy, RawConnection, int], Awaitable[object]]


@dataclass(frozen=True)
class Kind:
    """One kind of request. do: sends request number n on a new connection; moves: what the upstream does."""

    do: Do
    moves: Sequence[Move] = ()
    config: Settings = field(default_factory=settings)


def sends(
    method: str = "POST", target: str = "/v1/chat/completions", body: Any = None, leave: bool = False, **fields: Any
) -> Do:
    """body: None for a new request each time. leave: the client disconnects before the end of the response."""

    async def do(server: RunningProxy, line: RawConnection, n: int) -> None:
        own = ask(f"question {n}", **fields) if body is None and method == "POST" else body
        line.send(request(method, target, own))
        if leave:
            await asyncio.sleep(0.03)
            await line.gone()
        else:
            await line.answer(head=method == "HEAD")

    return do


async def several(server: RunningProxy, line: RawConnection, n: int) -> None:
    """Send several requests on one connection."""
    for number in range(3):
        line.send(request(body=ask(f"question {n}.{number}")))
        await line.answer()


async def the_same(server: RunningProxy, line: RawConnection, n: int) -> None:
    server.transport.queue = [] if n else [says()]
    line.send(request(body=ask()))
    await line.answer()


async def broken_upload(server: RunningProxy, line: RawConnection, n: int) -> None:
    """Disconnect while a passed-through body is being sent."""
    line.send(request("POST", FILES, b"", [("Content-Length", "1000")]) + b"abc")
    await asyncio.sleep(0.03)
    await line.gone()


async def broken_body(server: RunningProxy, line: RawConnection, n: int) -> None:
    """Disconnect while the body for a cached endpoint is being sent."""
    line.send(request("POST", body=b"{", headers=[("Content-Length", "1000")]))
    await asyncio.sleep(0.03)
    await line.gone()


TRIES = settings(retry=RetrySettings(base_delay=0.001), breaker=BreakerSettings(failures=1000))
ONE_TRY = settings(retry=RetrySettings(max_retries=0), breaker=BreakerSettings(failures=1000))
KINDS: dict[str, Kind] = {
    "hit": Kind(the_same),
    "miss": Kind(sends(), [says()]),
    "misses on one connection": Kind(several, [says()] * 3),
    "stream": Kind(sends(stream=True), [streams()]),
    "paced stream": Kind(sends(stream=True), [streams(PACED)]),
    "left waiting": Kind(sends(leave=True), [says(wait=0.2)]),
    "left in the stream": Kind(sends(leave=True, stream=True), [streams([*PACED[:4], 0.2, *PACED[4:]])]),
    "cut stream": Kind(sends(stream=True), [streams([*PACED[:4], CUT])]),
    "refused by the upstream": Kind(sends(), [error(400)]),
    "unreached": Kind(sends(), [Fails("unreached")], ONE_TRY),
    "no JSON": Kind(sends(body=b"{")),
    "no such route": Kind(sends("GET", "/nowhere")),
    "no such method": Kind(sends("TRACE", "/v1/models")),
    "broken body": Kind(broken_body),
    "bug": Kind(sends(), []),
    "own route": Kind(sends("GET", "/_proxy/status")),
    "passed through": Kind(sends("GET", MODELS), [says()]),
    "passed through, head": Kind(sends("HEAD", MODELS), [says()]),
    "passed through, upload": Kind(sends("POST", FILES, b"a" * 300_000), [says()]),
    "passed through, refused": Kind(sends("GET", MODELS), [error(404)]),
    "passed through, tried again": Kind(sends("GET", MODELS), [Fails("stale"), says()], TRIES),
    "passed through, unreached": Kind(sends("GET", MODELS), [Fails("unreached")], ONE_TRY),
    "passed through, cut": Kind(sends("GET", MODELS), [Responds(200, (JSON,), (b"{", CUT))]),
    "passed through, cut before the body": Kind(sends("GET", MODELS), [Responds(200, (JSON,), (CUT,))]),
    "passed through, left waiting": Kind(sends("GET", MODELS, leave=True), [says(wait=0.2)]),
    "passed through, left": Kind(sends("GET", MODELS, leave=True), [Responds(200, (JSON,), (b"{", 0.2, b"}"))]),
    "passed through, broken upload": Kind(broken_upload, [says()]),
}


@pytest.mark.parametrize("name", KINDS)
async def test_no_request_leaves_a_reference_cycle(name: str) -> None:
    kind = KINDS[name]
    found: Counter[str] = Counter()

    async def repeat(server: RunningProxy, first: int) -> None:
        for n in range(first, first + TIMES):
            server.transport.queue = list(kind.moves)
            async with raw_connection(server.port) as line:
                await kind.do(server, line, n)
            await server.settled()
            await asyncio.sleep(0.01)
            assert not server.transport.queue
        server.transport.sent.clear()
        server.receipts.clear()

    async with running_proxy(config=kind.config) as server:
        await repeat(server, 0)
        with uncollected(found, ours=True):
            await repeat(server, TIMES)
    assert not found


async def deaf(raw: Raw, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read little of the request, and never answer."""
    await reader.read(1)
    await asyncio.sleep(0.1)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"


@dataclass(frozen=True)
class Way:
    """One kind of request upstream.

    turn: what the upstream does. leave: seconds until the sender cancels. unread: the body of the response is not
    read. fields: of `send`.
    """

    turn: Say
    leave: float | None = None
    unread: bool = False
    fields: dict[str, Any] = field(default_factory=dict)

    async def go(self, up: AiohttpTransport, upstream: Raw) -> None:
        task = asyncio.create_task(self._call(up, upstream))
        if self.leave is not None:
            await asyncio.sleep(self.leave)
            task.cancel()
        await asyncio.wait([task])

    async def _call(self, up: AiohttpTransport, upstream: Raw) -> None:
        with suppress(TransportFailure):
            answer = await send(up, upstream, **self.fields)
            try:
                if not self.unread:
                    await whole(answer)
            finally:
                answer.close()


WAYS: dict[str, Way] = {
    "whole": Way(upstream_says(OK)),
    "kept alive": Way(upstream_says(OK, times=2 * TIMES)),
    "read to the end of the connection": Way(upstream_says(b"HTTP/1.1 200 OK\r\n\r\nabc")),
    "large body": Way(upstream_says(OK), fields={"body": b"a" * 2_000_000}),
    "not read": Way(upstream_says(HEAD, b"abc", then="wait"), unread=True),
    "cut head": Way(upstream_says(b"HTTP/1.1 200 ")),
    "no HTTP": Way(upstream_says(b"Hello\r\n\r\n")),
    "hung up": Way(upstream_says()),
    "reset": Way(upstream_says(None)),
    "cut body": Way(upstream_says(HEAD, b"abc")),
    "reset in the body": Way(upstream_says(HEAD, b"abc", 0.01, None)),
    "broken framing": Way(upstream_says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", then="wait")),
    "no answer in time": Way(upstream_says(then="wait"), fields={"first_byte": 0.02}),
    "silent body": Way(upstream_says(HEAD, b"abc", then="wait")),
    "left waiting": Way(upstream_says(then="wait"), leave=0.02),
    "left in the body": Way(upstream_says(HEAD, b"abc", then="wait"), leave=0.02),
    "left while sending": Way(deaf, leave=0.02, fields={"body": b"a" * 20_000_000}),
}


@pytest.mark.parametrize("name", WAYS)
async def test_no_upstream_request_leaves_a_reference_cycle(name: str) -> None:
    way, found, up = WAYS[name], Counter[str](), AiohttpTransport(connect=0.5, idle=0.05)
    async with raw_upstream(way.turn) as upstream:

        async def repeat() -> None:
            for _ in range(TIMES):
                await way.go(up, upstream)
                await asyncio.sleep(0.01)

        await repeat()
        with uncollected(found, ours=True):
            await repeat()
        await up.close()
    assert not found


async def test_an_unreachable_upstream_leaves_no_reference_cycle(up: AiohttpTransport) -> None:
    found: Counter[str] = Counter()
    with uncollected(found, ours=True):
        for _ in range(TIMES):
            with pytest.raises(TransportFailure):
                await up.send("GET", "http://127.0.0.1:1/", (), None, first_byte=0.5, connection=ConnectionInfo())
    assert not found
