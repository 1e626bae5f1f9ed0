"""No request leaves a reference cycle: what it held is let go at its end, not when the garbage collector comes.

The collector of a running proxy comes rarely (`app._run`), and a cycle holds whole requests and answers until then.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from proxy.config.limits import Limits
from proxy.config.settings import CacheSettings, RetrySettings, Settings, ThrottleSettings, TtlSettings
from proxy.coordination import Coordination
from proxy.pipeline.coalescing.broadcast import SubscriberStream
from proxy.pipeline.coalescing.reply import Reply
from proxy.protocol.options import Options
from proxy.upstream.retry.outcome import TransportFailure
from tests.garbage import uncollected
from tests.pipeline.clock import run, settled
from tests.pipeline.coalescing.test_cross_process import Held
from tests.pipeline.fixture import PipelineFixture, Result, ask, pool, settings
from tests.pipeline.script import (
    HANG,
    JSON,
    Fails,
    Move,
    Responds,
    Sent,
    chunk,
    error,
    event,
    events,
    rate_limited,
    says,
    streams,
)
from tests.pipeline.test_embeddings import embed

TIMES = 5
CUT = TransportFailure("invalid", "cut")
SLOW = [step for part in events(usage=True) for step in (1.0, part)]


Ask = Callable[[PipelineFixture, int], Awaitable[object]]


@dataclass(frozen=True)
class Kind:
    """One kind of request. ask: makes one (number n); moves: what the upstream does each time, else the usual."""

    ask: Ask
    moves: Sequence[Move] = ()
    config: Settings = field(default_factory=settings)


def usual(sent: Sent) -> Move:
    """A good answer of the form that is asked for."""
    if sent.url.endswith("/embeddings"):
        return embed(sent)
    return streams() if sent.json().get("stream") else says()


def question(n: int, **fields: Any) -> dict[str, Any]:
    return ask(f"question {n}", **fields)


async def plain(pipeline: PipelineFixture, n: int) -> Result:
    return await pipeline.ask(question(n))


async def streamed(pipeline: PipelineFixture, n: int) -> Result:
    return await pipeline.ask(question(n, stream=True))


async def the_same(pipeline: PipelineFixture, n: int) -> Result:
    return await pipeline.ask()


def together(*streams: bool) -> Ask:
    """The same from several clients, plain or streamed, a moment after each other."""

    async def asked(pipeline: PipelineFixture, n: int) -> None:
        tasks = []
        for stream in streams:
            tasks.append(pipeline.loop.create_task(pipeline.ask(question(n, stream=stream))))
            await asyncio.sleep(0.5)
        await asyncio.gather(*tasks)

    return asked


async def two_questions(pipeline: PipelineFixture, n: int) -> None:
    await asyncio.gather(plain(pipeline, 2 * n), plain(pipeline, 2 * n + 1))


def left(stream: bool, after: float, clients: int = 1, leaving: tuple[int, ...] = (0,)) -> Ask:
    """Some clients hang up."""

    async def asked(pipeline: PipelineFixture, n: int) -> None:
        tasks = [pipeline.loop.create_task(pipeline.ask(question(n, stream=stream))) for _ in range(clients)]
        await asyncio.sleep(after)
        for number in leaving:
            tasks[number].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    return asked


def options(**fields: Any) -> Ask:
    async def asked(pipeline: PipelineFixture, n: int) -> Result:
        return await pipeline.ask(question(n), Options(**fields))

    return asked


def impatient(total: float, stream: bool = False, clients: int = 1) -> Ask:
    async def asked(pipeline: PipelineFixture, n: int) -> None:
        asks = [pipeline.ask(question(n, stream=stream), total=total + 3 * i) for i in range(clients)]
        await asyncio.gather(*asks)

    return asked


def batch(*texts: str, stored: Sequence[str] = ()) -> Ask:
    """A batch of embeddings; `stored` was asked for just before."""

    async def asked(pipeline: PipelineFixture, n: int) -> None:
        moves, pipeline.transport.queue = pipeline.transport.queue, []
        for each in (stored, texts):
            if each:
                given = [f"{text} {n}" for text in each]
                await pipeline.ask({"model": "text-embedding-3-small", "input": given}, target="/v1/embeddings")
            pipeline.transport.queue = moves

    return asked


def gone_stale(stream: bool = False) -> Ask:
    """The same after its lifetime."""

    async def asked(pipeline: PipelineFixture, n: int) -> Result:
        await pipeline.ask(question(n, stream=stream))
        await pipeline.clock.sleep(120.0)
        return await pipeline.ask(question(n, stream=stream))

    return asked


async def unwritable(pipeline: PipelineFixture, n: int) -> None:
    """A client whose connection breaks while its stream is written."""

    async def write(data: bytes) -> None:
        raise ConnectionResetError

    pipeline.write = write
    with suppress(ConnectionResetError):
        await streamed(pipeline, n)


async def unpushable(pipeline: PipelineFixture, n: int) -> None:
    """The same where the stream is written as it comes, by the task that reads it."""
    bought = await pipeline.handler.handle(pipeline.request(question(n, stream=True)), lambda: None)
    assert isinstance(bought, Reply)
    assert isinstance(bought.stream, SubscriberStream)
    pushed: list[bytes] = []

    def push(data: bytes) -> bool:
        if pushed:
            raise ConnectionResetError
        pushed.append(data)
        return True

    async def write(data: bytes) -> None:
        pass

    bought.stream.push = push
    with suppress(ConnectionResetError):
        await bought.stream.relay(write)
    assert pushed


async def drained(pipeline: PipelineFixture, n: int) -> None:
    """The proxy stops while a stream flows."""
    task = pipeline.loop.create_task(streamed(pipeline, n))
    await asyncio.sleep(2.5)
    await pipeline.interrupt(task)


async def bug(pipeline: PipelineFixture, n: int) -> None:
    """A fault of the proxy's own, in what several wait for."""

    def fail(sent: Sent) -> Move:
        raise RuntimeError

    pipeline.transport.otherwise = fail
    tasks = [pipeline.loop.create_task(plain(pipeline, n)) for _ in range(3)]
    await asyncio.gather(*tasks, return_exceptions=True)


async def leased(pipeline: PipelineFixture, n: int) -> None:
    """Where another process may be buying the same."""
    if pipeline.services.coordination.locks is None:
        pipeline.services.coordination = Coordination(locks=Held())
        pipeline.rebuild()
    await plain(pipeline, n)
    await streamed(pipeline, n + 1000)


async def tried_again(pipeline: PipelineFixture, n: int) -> Result:
    """A refused one, then the same."""
    await plain(pipeline, n)
    return await plain(pipeline, n)


ONE_TRY = settings(retry=RetrySettings(max_retries=0, jitter=0.0))
NARROW = {"*": Limits(concurrency=1)}
KEYS = settings(pool(*(f"k{number}" for number in range(2 * TIMES + 1))))  # a request may cost one
TIRED = Responds(200, (JSON,), (b"{", HANG))

STALE = CacheSettings(ttl=TtlSettings(chat=100.0), stale_while_revalidate=50.0)
ON_ERROR = CacheSettings(ttl=TtlSettings(chat=100.0), stale_if_error=50.0)
FALLBACK = RetrySettings(max_retries=0, jitter=0.0, fallbacks={"gpt-4o": ("gpt-4o-mini",)})


KINDS: dict[str, Kind] = {
    "hit": Kind(the_same),
    "miss": Kind(plain, [says()]),
    "miss, not cached": Kind(plain, [says()], settings(cache=CacheSettings(backend="off"))),
    "miss, not coalesced": Kind(plain, [says()], settings(cache=CacheSettings(coalesce=False))),
    "miss, not stored": Kind(plain, [says({"choices": []})]),
    "stream": Kind(streamed, [streams()]),
    "stream, not cached": Kind(streamed, [streams()], settings(cache=CacheSettings(backend="off"))),
    "stream, paced": Kind(streamed, [streams(SLOW)]),
    "followers": Kind(together(False, False, False), [says(wait=3.0)]),
    "streamed followers": Kind(together(True, True, True), [streams(SLOW)]),
    "plain ones behind a stream": Kind(together(True, False, False), [streams(SLOW)]),
    "streams behind a plain one": Kind(together(False, True, True), [says(wait=3.0)]),
    "follower of what cannot be shared": Kind(
        together(False, False), [says({"choices": []}, wait=3.0), says({"choices": []}, wait=3.0)]
    ),
    "followers of an error": Kind(together(False, False), [error(400, wait=3.0)]),
    "followers of a failure": Kind(together(False, False, False), [Fails("ambiguous", 3.0)] * 2, ONE_TRY),
    "left while waiting": Kind(left(False, 1.0), [says(wait=3.0)]),
    "left in the body": Kind(left(False, 1.0), [TIRED]),
    "left before the stream": Kind(left(True, 1.0), [streams(SLOW, wait=3.0)]),
    "left in the stream": Kind(left(True, 2.5), [streams(SLOW)]),
    "leader left": Kind(left(False, 1.0, 3), [says(wait=3.0)]),
    "streaming leader left": Kind(left(True, 2.5, 3), [streams(SLOW)]),
    "follower left": Kind(left(False, 1.0, 3, (1,)), [says(wait=3.0)]),
    "streaming follower left": Kind(left(True, 2.5, 3, (2,)), [streams(SLOW)]),
    "all left": Kind(left(False, 1.0, 3, (0, 1, 2)), [says(wait=3.0)]),
    "all left a stream": Kind(left(True, 2.5, 3, (0, 1, 2)), [streams(SLOW)]),
    "left, and finished": Kind(
        left(False, 1.0), [says(wait=3.0)], settings(cache=CacheSettings(on_disconnect="finish"))
    ),
    "left a stream, and finished": Kind(
        left(True, 2.5), [streams(SLOW)], settings(cache=CacheSettings(on_disconnect="finish"))
    ),
    "cut stream": Kind(streamed, [streams([*SLOW[:4], CUT])]),
    "cut stream with followers": Kind(together(True, True), [streams([*SLOW[:4], CUT])]),
    "cut stream, not cached": Kind(streamed, [streams([*SLOW[:4], CUT])], settings(cache=CacheSettings(backend="off"))),
    "stream without its end": Kind(streamed, [streams(SLOW[:4])]),
    "stream that stalls": Kind(streamed, [streams([*SLOW[:4], HANG])]),
    "stream with an error": Kind(
        streamed, [streams([event(chunk("a")), event({"error": {"code": "server_error", "message": "no"}})])]
    ),
    "empty stream": Kind(streamed, [streams([])], ONE_TRY),
    "stream refused by its first event": Kind(
        streamed, [streams([event({"error": {"code": "insufficient_quota", "message": "no"}})]), streams()], KEYS
    ),
    "cut answer": Kind(plain, [Responds(200, (JSON,), (b"{", CUT))]),
    "broken JSON": Kind(plain, [Responds(200, (JSON,), (b"{",))]),
    "refused by the upstream": Kind(plain, [error(400)]),
    "refused, not cached": Kind(plain, [error(400)], settings(cache=CacheSettings(backend="off"))),
    "refused twice": Kind(tried_again, [error(400), error(400)]),
    "500 and again": Kind(plain, [error(500), says()]),
    "500 to the end": Kind(plain, [error(500)], ONE_TRY),
    "unreached": Kind(plain, [Fails("unreached")], ONE_TRY),
    "unreached, and again": Kind(plain, [Fails("unreached"), says()]),
    "unreached, not cached": Kind(
        plain, [Fails("unreached")], settings(retry=RetrySettings(max_retries=0), cache=CacheSettings(backend="off"))
    ),
    "broken connection": Kind(streamed, [Fails("ambiguous")], ONE_TRY),
    "stale connection": Kind(plain, [Fails("stale"), says()]),
    "timed out waiting": Kind(impatient(2.0), [Fails("hang")]),
    "timed out connecting": Kind(impatient(2.0), [Fails("hang connecting")]),
    "timed out in the body": Kind(impatient(2.0), [TIRED]),
    "timed out before the stream": Kind(impatient(2.0, stream=True), [Fails("hang")]),
    "timed out one after the other": Kind(impatient(2.0, clients=3), [Fails("hang")]),
    "redirected": Kind(plain, [Responds(302, (JSON,), (b"{}",))]),
    "other key": Kind(plain, [error(401), says()], KEYS),
    "limited key": Kind(plain, [rate_limited("1"), says()], KEYS),
    "no key left": Kind(plain, [error(401)]),
    "not cached, and only-if-cached": Kind(options(only_if_cached=True)),
    "no-store": Kind(options(no_store=True), [says()]),
    "throttled": Kind(
        two_questions, [says(wait=1.0)], settings(throttle=ThrottleSettings(limits=NARROW, max_wait=0.0))
    ),
    "queue full": Kind(
        two_questions, [says(wait=1.0)], settings(throttle=ThrottleSettings(limits=NARROW, max_queue=0))
    ),
    "queued": Kind(two_questions, [says(wait=1.0)] * 2, settings(throttle=ThrottleSettings(limits=NARROW))),
    "batch": Kind(batch("a", "b")),
    "batch, partly stored": Kind(batch("a", "b", stored=["b"])),
    "batch, all stored": Kind(batch("a", "b", stored=["b", "a"])),
    "batch refused": Kind(batch("a", "b", stored=["b"]), [error(400)]),
    "batch unreached": Kind(batch("a", "b", stored=["b"]), [Fails("unreached")], ONE_TRY),
    "batch answered otherwise": Kind(batch("a", "b", stored=["b"]), [says({"data": 1})]),
    "stale, renewed": Kind(gone_stale(), (), settings(cache=STALE)),
    "stale, not renewed": Kind(
        gone_stale(stream=True),
        [streams(), Fails("unreached")],
        settings(cache=STALE, retry=RetrySettings(max_retries=0)),
    ),
    "stale for an error": Kind(
        gone_stale(), [says(), error(500)], settings(cache=ON_ERROR, retry=RetrySettings(max_retries=0))
    ),
    "no stale for an error": Kind(
        plain, [Fails("unreached")], settings(cache=ON_ERROR, retry=RetrySettings(max_retries=0))
    ),
    "fallback": Kind(plain, [error(500), says()], settings(retry=FALLBACK)),
    "fallbacks fail, too": Kind(plain, [Fails("unreached"), Fails("ambiguous")], settings(retry=FALLBACK)),
    "unwritable": Kind(unwritable, [streams(SLOW)]),
    "unpushable": Kind(unpushable, [streams(SLOW)]),
    "drained": Kind(drained, [streams(SLOW)]),
    "bug": Kind(bug),
    "leased": Kind(leased, [says(), streams()]),
    "cost comment": Kind(
        lambda pipeline, n: pipeline.ask(question(n, stream=True), Options(stream_cost=True)), [streams(SLOW)]
    ),
    "budget refuses": Kind(options(max_cost=0.0, run="r")),
    "run": Kind(options(run="r"), [says()]),
}


async def repeat(pipeline: PipelineFixture, kind: Kind, first: int) -> None:
    for n in range(first, first + TIMES):
        pipeline.transport.queue = list(kind.moves)
        pipeline.transport.otherwise = usual
        await kind.ask(pipeline, n)
        await settled(50)
        await pipeline.clock.sleep(120.0)
        assert not pipeline.transport.queue
    pipeline.transport.sent.clear()
    pipeline.flows.clear()
    pipeline.receipts.clear()


@pytest.mark.parametrize("name", KINDS)
def test_no_request_leaves_a_reference_cycle(name: str) -> None:
    kind = KINDS[name]
    found: Counter[str] = Counter()

    async def tell() -> None:
        pipeline = PipelineFixture(config=kind.config)
        await repeat(pipeline, kind, 0)
        with uncollected(found):
            await repeat(pipeline, kind, TIMES)

    run(tell())
    assert not found
