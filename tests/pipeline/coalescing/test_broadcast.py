"""One stream for several readers: all get all of it, each at his own pace, and memory stays bounded."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.pipeline.coalescing.broadcast import LAG, WINDOW, Broadcast, Subscriber
from proxy.pipeline.relay import ClientFilter, StreamRelay
from proxy.upstream.key_lease import KeyLease
from proxy.upstream.response import ResponseInHand
from proxy.upstream.retry.outcome import TransportFailure
from proxy.upstream.target import Upstream
from tests.pipeline.clock import run, settled, virtual_time, virtual_time_loop
from tests.pipeline.script import ScriptedResponse

READ = b"x" * 65536


class Told:
    def __init__(self) -> None:
        self.full = 0
        self.here = True
        self.unread = False


def reel(keep: int = 2**20) -> tuple[Broadcast, Told]:
    result = Told()

    def full() -> None:
        result.full += 1

    return Broadcast(flow(), keep, full, lambda: result.here, lambda: result.unread), result


def flow() -> StreamRelay:
    reply = ScriptedResponse(200, "OK", (), {}, deque(), at_once=False)
    lease = cast("KeyLease", None)
    answered = ResponseInHand(200, reply, cast("Upstream", None), lease, False, True, False, False, steps())
    return StreamRelay(answered, None, 0, ClientFilter(False, None), lambda ending: None)


def record(stream: Broadcast, reads: AsyncIterator[bytes]) -> Coroutine[Any, Any, None]:
    stream.stream.response.more = reads
    return stream.record()


async def steps(*steps: bytes | float | TransportFailure) -> AsyncIterator[bytes]:
    for step in steps:
        if isinstance(step, TransportFailure):
            raise step
        if isinstance(step, bytes):
            yield step
        else:
            await asyncio.sleep(step)


async def reads(reader: Subscriber) -> AsyncIterator[bytes]:
    while (data := await reader.next()) is not None:
        yield data


async def all_of(reader: Subscriber, pause: float = 0.0) -> list[bytes]:
    got = []
    async for data in reads(reader):
        got.append(data)
        await asyncio.sleep(pause)
    reader.close()
    return got


@virtual_time
async def test_each_read_reaches_all_subscribers_at_once_and_a_late_one_gets_the_start() -> None:
    stream, result = reel()
    times: dict[str, list[float]] = {"early": [], "late": []}

    async def follow(name: str) -> bytes:
        got = b""
        async for data in reads(reader := stream.subscribe()):
            times[name].append(loop.time() - began)
            got += data
        reader.close()
        return got

    loop = virtual_time_loop()
    began = loop.time()
    early = loop.create_task(follow("early"))
    recording = loop.create_task(record(stream, steps(1.0, b"a", 1.0, b"b", 1.0, b"c")))
    await asyncio.sleep(2.5)
    late = loop.create_task(follow("late"))
    assert (await early, await late) == (b"abc", b"abc")
    await recording
    assert times == {"early": [1.0, 2.0, 3.0], "late": [2.5, 2.5, 3.0]}
    assert result.full == 0


@virtual_time
async def test_a_failure_reaches_every_subscriber_after_the_data() -> None:
    stream, _ = reel()
    readers = [stream.subscribe(), stream.subscribe()]
    await record(stream, steps(b"a", b"b", TransportFailure("timeout", "silent")))
    for reader in readers:
        assert [await reader.next(), await reader.next()] == [b"a", b"b"]
        with pytest.raises(TransportFailure, match="silent") as caught:
            await reader.next()
        assert caught.value.kind == "timeout"


@virtual_time
async def test_a_single_slow_subscriber_stops_the_source() -> None:
    stream, result = reel(keep=LAG)
    reader = stream.subscribe()
    recording = asyncio.create_task(record(stream, steps(*[READ] * 100)))
    await settled()
    assert stream.held <= WINDOW + len(READ)
    for number in range(50):
        await reader.next()
        await settled(3)
        assert stream.held <= (number + 1) * len(READ) + WINDOW
    assert sum(map(len, await all_of(reader))) == 50 * len(READ)
    await recording
    assert result.full == 0


@virtual_time
async def test_consumed_chunks_are_freed_once_nobody_can_join() -> None:
    stream, result = reel(keep=10 * len(READ))
    reader = stream.subscribe()
    recording = asyncio.create_task(record(stream, steps(*[READ] * 1000)))
    total = 0
    async for data in reads(reader):
        total += len(data)
        assert stream.held <= 10 * len(READ) + WINDOW + len(READ)
    await recording
    assert (total, result.full) == (1000 * len(READ), 1)


@virtual_time
async def test_chunks_are_kept_until_everybody_has_joined() -> None:
    stream, result = reel(keep=10)
    result.here = False
    recording = asyncio.create_task(record(stream, steps(*[b"0123456789"] * 5)))
    await settled()
    assert result.full == 1
    reader = stream.subscribe()
    result.here = True
    assert b"".join(await all_of(reader)) == b"0123456789" * 5
    await recording


@virtual_time
async def test_a_slow_subscriber_delays_no_other_and_is_dropped_beyond_the_bound() -> None:
    stream, _ = reel(keep=2**20)
    slow, fast = stream.subscribe(), stream.subscribe()
    dropped = []
    slow.too_slow = lambda: dropped.append(virtual_time_loop().time())
    await anext_later(slow)
    most = 0
    recording = asyncio.create_task(record(stream, steps(*[READ] * 400)))
    total = 0
    async for data in reads(fast):
        total += len(data)
        most = max(most, stream.held)
    await recording
    assert total == 400 * len(READ)
    assert LAG - 2 * WINDOW < most <= LAG
    assert len(dropped) == 1
    with pytest.raises(TransportFailure, match="slow"):
        await slow.next()


async def anext_later(reader: Subscriber) -> None:
    """It waits for its first read, and never takes a second."""
    task = asyncio.create_task(reader.next())
    await settled()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@virtual_time
async def test_a_slow_subscriber_within_the_bound_gets_everything() -> None:
    stream, _ = reel(keep=2**20)
    slow, fast = stream.subscribe(), stream.subscribe()
    recording = asyncio.create_task(record(stream, steps(*[READ] * 100)))
    began = virtual_time_loop().time()
    await all_of(fast)
    assert virtual_time_loop().time() == began
    got = await all_of(slow, 1.0)
    await recording
    assert b"".join(got) == READ * 100
    assert stream.held <= LAG


@virtual_time
async def test_a_subscriber_far_behind_gets_several_reads_at_once() -> None:
    stream, _ = reel()
    first = stream.subscribe()
    recording = asyncio.create_task(record(stream, steps(*[b"%04d" % n for n in range(1000)])))
    await all_of(first)
    await recording
    got = await all_of(stream.subscribe())
    assert b"".join(got) == b"".join(b"%04d" % n for n in range(1000))
    assert len(got) < 20


@given(
    reads=st.lists(st.tuples(st.binary(min_size=1, max_size=50), st.sampled_from([0.0, 1.0])), max_size=40),
    readers=st.lists(st.tuples(st.sampled_from([0.0, 0.5, 3.0]), st.sampled_from([0.0, 2.0])), min_size=1, max_size=5),
)
def test_every_subscriber_gets_everything(reads: list[tuple[bytes, float]], readers: list[tuple[float, float]]) -> None:
    async def tell() -> None:
        stream, _ = reel()
        script: list[bytes | float] = [part for data, pause in reads for part in (pause, data)]
        recording = asyncio.create_task(record(stream, steps(*script)))

        async def read(after: float, pause: float) -> bytes:
            await asyncio.sleep(after)
            return b"".join(await all_of(stream.subscribe(), pause))

        got = await asyncio.gather(*(read(*each) for each in readers))
        await recording
        assert set(got) == {b"".join(data for data, _ in reads)}

    run(tell())


@virtual_time
async def test_a_subscriber_is_woken_only_if_it_waits() -> None:
    stream, _ = reel()
    reader = stream.subscribe()
    got: list[bytes] = []

    def take(data: bytes) -> bool:
        got.append(data)
        return data != b"b"

    reader.take = take
    waiting = asyncio.create_task(reader.next())
    await settled(3)
    await stream.publish(b"a")
    await settled(3)
    assert not waiting.done()
    await stream.publish(b"b")
    assert (await waiting, got, reader.caught_up) == (b"", [b"a", b"b"], True)
    await stream.publish(b"c")
    assert await reader.next() == b"c"  # while nobody sleeps, reads are kept as ever
    assert got == [b"a", b"b"]


@virtual_time
async def test_a_disconnected_client_affects_only_its_subscriber() -> None:
    stream, _ = reel()
    gone, other = stream.subscribe(), stream.subscribe()

    def take(data: bytes) -> bool:
        raise ConnectionResetError

    gone.take = take
    waiting = asyncio.create_task(gone.next())
    await settled(3)
    await stream.publish(b"a")
    with pytest.raises(ConnectionResetError):
        await waiting
    assert await other.next() == b"a"
