"""A client that disconnects at any moment: nothing stays reserved, nothing is stored, the others go on.

A story is told once undisturbed, to count the turns of its loop; then once for each turn, cancelled there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import proxy.system.threads
from proxy.config.limits import Limits
from proxy.config.settings import RetrySettings, ThrottleSettings
from proxy.protocol.options import Options
from proxy.upstream.retry.outcome import TransportFailure
from tests.pipeline.clock import run, settled
from tests.pipeline.fixture import PipelineFixture, Result, ask, pool
from tests.pipeline.fixture import settings as config
from tests.pipeline.script import (
    HANG,
    JSON,
    SSE,
    Fails,
    Move,
    Responds,
    ScriptedTransport,
    Sent,
    chunk,
    completion,
    dump,
    error,
    event,
    events,
    rate_limited,
    says,
    streams,
)

CUT = TransportFailure("invalid", "cut")
SLOW = [step for part in events(usage=True) for step in (1.0, part)]
NARROW = ThrottleSettings(limits={"*": Limits(rpm=50, tpm=100_000, concurrency=1)}, max_wait=1000.0)
STALLED = Responds(200, (JSON,), (b"{", HANG))

STORIES: dict[str, tuple[Sequence[Move], bool]] = {
    "a plain answer": (
        [Responds(200, (JSON,), (dump(completion())[:9], 1.0, dump(completion())[9:]), 1.0, 1.0)],
        False,
    ),
    "a stream": ([streams(SLOW, connect=1.0, wait=1.0)], True),
    "a stream that waits for its first event": ([streams([b": ping\n\n", 1.0, b": ping\n\n", HANG])], True),
    "retries": ([error(500, wait=1.0), Fails("unreached", 1.0), Fails("ambiguous", 1.0), says(wait=1.0)], False),
    "changes of key": ([error(401, wait=1.0), rate_limited("9", wait=1.0), streams(SLOW)], True),
    "refused by a stream": (
        [streams([1.0, event({"error": {"code": "insufficient_quota", "message": "no"}})]), says(wait=1.0)],
        False,
    ),
    "all keys refuse": ([error(401, wait=1.0), error(403, wait=1.0), error(401, wait=1.0)], False),
    "an error body in pieces": ([Responds(400, (JSON,), (b'{"error":', 1.0, b"{}}"))], False),
    "a stale connection": ([Fails("stale", 1.0), streams(SLOW)], True),
    "connecting for ever": ([Fails("hang connecting")], False),
    "waiting for ever": ([Fails("hang")], False),
    "a body that stalls": ([STALLED], False),
    "a cut stream": ([streams([*SLOW[:4], CUT])], True),
    "stream_options disliked": ([error(400, message="stream_options?", wait=1.0), streams(SLOW)], True),
}


def told_once(moves: Sequence[Move], stream: bool, at: int | None, landed: list[int | None]) -> int:
    """Tells it, cancelled in turn `at`; how many turns it took. landed: turns too late for anything but the answer."""
    turns = 0

    async def tell() -> None:
        nonlocal turns
        upstream = pool("k1", "k2", "k3")
        pipeline = PipelineFixture(*moves, config=config(upstream, throttle=NARROW, retry=RetrySettings(jitter=0.0)))
        began = pipeline.loop.steps
        task = pipeline.loop.create_task(pipeline.ask(ask(stream=stream, max_tokens=50)))
        if at is not None:
            pipeline.loop.at_step(at, task.cancel)
        await asyncio.wait([task])
        turns = pipeline.loop.steps - began
        await settled(3)
        pipeline.assert_nothing_leaked()
        tokens = sum(pipeline.used(name)["tpm"] for name in ("k1", "k2", "k3"))
        assert 0 <= tokens <= 400 * len(pipeline.transport.sent)
        if task.cancelled():
            assert len(pipeline.receipts) <= 1
            entries = pipeline.services.store.memory.stats()["entries"]
            if pipeline.transport.sent and (pipeline.receipt.status, pipeline.receipt.error) != (499, "client_gone"):
                landed.append(at)  # what it waited for came in the very turn in which it left
            else:
                assert entries == 0
        else:
            assert task.exception() is None
            assert len(pipeline.receipts) == 1
        assert all(sent.reply is None or sent.reply.closed <= 2 for sent in pipeline.transport.sent)

    run(tell())
    return turns


@pytest.mark.parametrize(("moves", "stream"), STORIES.values(), ids=STORIES.keys())
def test_a_request_cancelled_in_any_turn_of_the_loop_leaks_nothing(moves: Sequence[Move], stream: bool) -> None:
    landed: list[int | None] = []
    turns = told_once(moves, stream, None, landed)
    assert turns > 2
    for at in range(turns + 1):
        told_once(moves, stream, at, landed)
    assert len(landed) <= 2


@pytest.mark.parametrize("stream", [True, False])
def test_the_queue_goes_on_when_any_client_disconnects(stream: bool) -> None:
    """Four at a concurrency of one, the n-th of them gone in any turn: the other three are served, in order."""

    def upstream(sent: Sent) -> Move:
        return streams([*SLOW[:4], *events(usage=True)[2:]]) if stream else says(wait=2.0)

    def tell(gone: int, at: int | None) -> int:
        turns = 0

        async def tell() -> None:
            nonlocal turns
            pipeline = PipelineFixture(transport=ScriptedTransport(otherwise=upstream), config=config(throttle=NARROW))
            began = pipeline.loop.steps
            tasks = [pipeline.loop.create_task(pipeline.ask(ask(str(n), stream=stream))) for n in range(4)]
            if at is not None:
                pipeline.loop.at_step(at, tasks[gone].cancel)
            await asyncio.wait(tasks)
            turns = pipeline.loop.steps - began
            for n, task in enumerate(tasks):
                assert task.cancelled() or (task.result().status, task.result().broken) == (200, False)
                assert n == gone or not task.cancelled()
            order = [sent.json()["messages"][0]["content"] for sent in pipeline.transport.sent]
            assert order == sorted(order)
            pipeline.assert_nothing_leaked()

        run(tell())
        return turns

    turns = tell(0, None)
    for gone in range(4):
        for at in range(turns):
            tell(gone, at)


def test_a_large_request_cancelled_while_a_thread_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.system.threads, "LARGE", 10)

    async def tell() -> None:
        pipeline = PipelineFixture(says())
        for leave in (True, False):
            task = pipeline.loop.create_task(pipeline.ask())
            await asyncio.sleep(0)
            if leave:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert pipeline.transport.sent == []
        assert (await task).status == 200
        pipeline.assert_nothing_leaked()

    run(tell())


# Anything, in any order, and anybody may leave at any time.

_WAIT = st.sampled_from([0.0, 0.5, 3.0])
_BODY = st.sampled_from(
    [tuple(events(usage=True)), tuple(SLOW), (*SLOW[:5], CUT), (*SLOW[:3], HANG), (), (b": hi\n\n",)]
)
_PLAIN = st.sampled_from([(dump(completion()),), (b"{", 2.0, b"}"), (b"{",), (b"{", CUT), (b"{", HANG)])
_MOVES = st.one_of(
    st.builds(Responds, st.just(200), st.just((SSE,)), _BODY, _WAIT, _WAIT, at_once=st.booleans()),
    st.builds(Responds, st.just(200), st.just((JSON,)), _PLAIN, _WAIT, _WAIT, at_once=st.booleans()),
    st.builds(
        Responds, st.sampled_from([302, 400, 401, 403, 404, 429, 500, 503]), st.just((JSON,)), _PLAIN, _WAIT, _WAIT
    ),
    st.builds(Fails, st.sampled_from(["unreached", "stale", "ambiguous", "timeout", "hang", "hang connecting"]), _WAIT),
    st.sampled_from([error(429, "insufficient_quota"), rate_limited("2"), rate_limited("500")]),
    st.just(streams([event(chunk("a")), event({"error": {"message": "no"}})])),
)


@settings(max_examples=300)
@given(
    moves=st.lists(_MOVES, min_size=1, max_size=12),
    keys=st.integers(1, 3),
    requests=st.lists(st.tuples(st.booleans(), st.none() | st.integers(0, 120)), min_size=1, max_size=5),
    limits=st.sampled_from([Limits(), Limits(rpm=200, tpm=200_000, concurrency=1), Limits(concurrency=2)]),
    retries=st.integers(0, 3),
)
def test_any_sequence_of_events_leaks_nothing(
    moves: list[Move], keys: int, requests: list[tuple[bool, int | None]], limits: Limits, retries: int
) -> None:
    names = [f"k{n}" for n in range(keys)]

    async def tell() -> None:
        script = iter([*moves] * 50)
        pipeline = PipelineFixture(
            transport=ScriptedTransport(otherwise=lambda sent: next(script)),
            config=config(pool(*names), throttle=ThrottleSettings(limits={"*": limits})),
        )
        tasks: list[asyncio.Task[Result]] = []
        for n, (stream, cancel_at) in enumerate(requests):
            document = ask(str(n // 2), stream=stream)  # some are asked twice
            task = pipeline.loop.create_task(pipeline.ask(document, Options(max_retries=retries)))
            tasks.append(task)
            if cancel_at is not None:
                canceller: Callable[[], object] = task.cancel
                pipeline.loop.call_later(cancel_at / 10, canceller)
        await asyncio.wait(tasks)
        await settled(3)
        hits = 0
        for task in tasks:
            if not task.cancelled():
                told = task.result()
                hits += told.hit is not None
                assert told.at <= 60.0 or told.flow is not None
                if told.broken:
                    assert b"[DONE]" not in told.body or told.flow is not None
        assert len(pipeline.receipts) + hits <= len(tasks)
        assert len(pipeline.receipts) + hits >= sum(not task.cancelled() for task in tasks)
        pipeline.assert_nothing_leaked()

    run(tell())
