"""Identical requests at the same time make one upstream request (docs/caching.md)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from proxy.config.limits import Limits
from proxy.config.settings import CacheSettings, CostSettings, Settings, ThrottleSettings, TimeoutSettings
from proxy.pipeline.coalescing.broadcast import SubscriberStream
from proxy.pipeline.coalescing.hit_for_miss import HIT_FOR_MISS, HIT_FOR_MISS_KEPT, HitForMiss
from proxy.pipeline.coalescing.single_flight import (
    FlightResult,
    Lead,
    Sharing,
    SingleFlight,
    Waiter,
)
from proxy.pipeline.relay import StreamBroken, StreamRelay
from proxy.protocol.options import Options
from proxy.protocol.request import Client
from proxy.upstream.interfaces import Write
from proxy.upstream.retry.outcome import TransportFailure
from tests.pipeline.clock import run, settled, virtual_time, virtual_time_loop
from tests.pipeline.fixture import PipelineFixture, Result, ask, pool, settings
from tests.pipeline.script import (
    HANG,
    JSON,
    USAGE,
    Fails,
    Move,
    Responds,
    ScriptedTransport,
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

STREAM = ask(stream=True)
USAGE_TOO = ask(stream=True, stream_options={"include_usage": True})
SLOW = [step for part in events(usage=True) for step in (1.0, part)]
"""One event a second: 3 of text, the finish, usage, [DONE]."""
WHOLE = b"".join(events(usage=True))
UNFINISHED = completion(choices=[{"index": 0, "message": {"content": "Hel"}, "finish_reason": "length"}])
"""Cut by the model's own limit: passed on, never stored."""


def begin(
    pipeline: PipelineFixture, count: int, document: Any = None, options: Options | None = None, **more: Any
) -> list[Any]:
    return [pipeline.loop.create_task(pipeline.ask(document, options, **more)) for _ in range(count)]


async def leave(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def over(pipeline: PipelineFixture) -> None:
    """Nothing is left: no flight, no task, no lease, no connection; and every upstream call is on one receipt."""
    assert len(pipeline.handler.coalescer.flights) == 0
    assert {task.get_name() for task in asyncio.all_tasks()} & {"flight"} == set()
    pipeline.assert_nothing_leaked()
    assert sum(receipt.attempts for receipt in pipeline.receipts) == len(pipeline.transport.sent)


def caches(tolds: Sequence[Result]) -> list[str]:
    return [told.cache for told in tolds]


# Plain answers.


@virtual_time
async def test_equal_requests_make_one_call() -> None:
    pipeline = PipelineFixture(says(wait=2.0))
    first = begin(pipeline, 1)
    await asyncio.sleep(1.5)
    told = await asyncio.gather(*first, *begin(pipeline, 49))
    assert caches(told) == ["miss"] + ["coalesced"] * 49
    assert {(each.status, each.body) for each in told} == {(200, dump(completion()))}
    assert [each.at for each in told] == [2.0] + [0.5] * 49
    assert len({each.headers["X-Proxy-Request-Id"] for each in told}) == 50
    leader, follower = told[0].headers, told[1].headers
    assert leader["X-Proxy-Cost-USD"] == "0.002250"
    assert "X-Proxy-Cost-Saved-USD" not in leader
    assert follower["Cache-Status"] == "openai-proxy; fwd=uri-miss; collapsed"
    assert follower["X-Proxy-Attempts"] == "0"
    assert (follower["X-Proxy-Cost-USD"], follower["X-Proxy-Cost-Status"]) == ("0.000000", "exact")
    assert follower["X-Proxy-Cost-Saved-USD"] == "0.002250"
    assert follower["X-Proxy-Total-Tokens"] == "300"
    assert "X-Proxy-Key" not in follower
    assert "X-Proxy-Cache-Reason" not in follower
    receipts = {receipt.id: receipt for receipt in pipeline.receipts}
    mine = receipts[follower["X-Proxy-Request-Id"]]
    assert (mine.cache, mine.cost_usd, mine.saved_usd, mine.attempts) == ("coalesced", "0.000000", "0.002250", 0)
    assert (await pipeline.ask()).cache == "hit"
    over(pipeline)


@virtual_time
async def test_different_requests_are_not_coalesced() -> None:
    pipeline = PipelineFixture(transport=ScriptedTransport(otherwise=lambda sent: says(wait=1.0)))
    asked = begin(pipeline, 1)
    asked += begin(pipeline, 1, ask("other"))
    asked += begin(pipeline, 1, None, Options(namespace="n"))
    asked += begin(pipeline, 1, client=Client("c", "scope"))
    asked += begin(pipeline, 1, None, Options(sample="1"))
    assert caches(await asyncio.gather(*asked)) == ["miss"] * 5
    assert len(pipeline.transport.sent) == 5
    over(pipeline)


@pytest.mark.parametrize(
    ("options", "cache"),
    [(Options(no_cache=True), "miss"), (Options(ttl=0.0), "miss"), (Options(no_store=True), "bypass")],
)
def test_requests_that_refuse_the_cache_are_not_coalesced(options: Options, cache: str) -> None:
    async def tell() -> None:
        pipeline = PipelineFixture(transport=ScriptedTransport(otherwise=lambda sent: says(wait=1.0)))
        assert caches(await asyncio.gather(*begin(pipeline, 3, None, options))) == [cache] * 3
        assert len(pipeline.transport.sent) == 3
        over(pipeline)

    run(tell())


@virtual_time
async def test_without_coalesce_every_request_is_sent() -> None:
    pipeline = PipelineFixture(says(wait=1.0), says(wait=1.0), config=settings(cache=CacheSettings(coalesce=False)))
    assert caches(await asyncio.gather(*begin(pipeline, 2))) == ["miss", "miss"]
    over(pipeline)


@pytest.mark.parametrize("gone", [0, 1, 25, 49])
@pytest.mark.parametrize("stream", [True, False])
def test_any_client_may_leave_and_the_others_are_served(gone: int, stream: bool) -> None:
    async def tell() -> None:
        pipeline = PipelineFixture(streams([2.0, *SLOW]) if stream else says(wait=3.0))
        tasks = begin(pipeline, 50, ask(stream=stream))
        await asyncio.sleep(1.0)
        await leave(tasks.pop(gone))
        told = await asyncio.gather(*tasks)
        assert {each.status for each in told} == {200}
        assert not any(each.broken for each in told)
        assert len(pipeline.transport.sent) == 1
        left = [receipt for receipt in pipeline.receipts if receipt.status == 499]
        assert [(receipt.error, receipt.attempts) for receipt in left] == [("client_gone", int(gone == 0))]
        assert sum(receipt.cost_usd == "0.002250" for receipt in pipeline.receipts) == 1
        over(pipeline)

    run(tell())


@pytest.mark.parametrize("after", [0.0, 0.5, 1.5, 3.5])
def test_the_upstream_is_closed_when_the_last_client_leaves(after: float) -> None:
    async def tell() -> None:
        pipeline = PipelineFixture(streams([1.0, *SLOW[1:4], HANG]))
        tasks = begin(pipeline, 20, STREAM)
        await asyncio.sleep(after)
        await leave(*tasks[:10])
        await leave(*tasks[10:])
        assert pipeline.receipt.total_ms == pytest.approx(after * 1000)
        assert [receipt.status for receipt in pipeline.receipts] == [499] * 20
        over(pipeline)
        assert pipeline.services.store.memory.stats()["entries"] == 0

    run(tell())


@virtual_time
async def test_a_request_in_the_turn_in_which_the_last_client_leaves_starts_a_new_flight() -> None:
    pipeline = PipelineFixture(says(wait=9.0), says(wait=1.0))
    (first,) = begin(pipeline, 1)
    await asyncio.sleep(1.0)
    first.cancel()
    (second,) = begin(pipeline, 1)
    assert (await second).cache == "miss"
    assert len(pipeline.transport.sent) == 2
    over(pipeline)


# Deadlines and patience.


@virtual_time
async def test_a_follower_with_an_earlier_deadline_leaves_alone() -> None:
    pipeline = PipelineFixture(says(wait=5.0))
    asked = begin(pipeline, 1) + begin(pipeline, 1, total=2.0)
    leader, follower = await asyncio.gather(*asked)
    assert (leader.status, leader.at, leader.cache) == (200, 5.0, "miss")
    assert (follower.refused, follower.at, follower.cache) == ("upstream_timeout", 2.0, "coalesced")
    over(pipeline)


@virtual_time
async def test_a_leader_with_an_earlier_deadline_leaves_alone() -> None:
    pipeline = PipelineFixture(Responds(200, (JSON,), (dump(completion())[:9], 2.0, dump(completion())[9:]), wait=3.0))
    asked = begin(pipeline, 1, total=2.0) + begin(pipeline, 1, total=4.0) + begin(pipeline, 1)
    leader, second, third = await asyncio.gather(*asked)
    assert (leader.refused, leader.at, leader.cache) == ("upstream_timeout", 2.0, "miss")
    assert (second.refused, second.at) == ("upstream_timeout", 4.0)
    assert (third.status, third.at, third.cache) == (200, 5.0, "coalesced")
    bought = next(receipt for receipt in pipeline.receipts if receipt.attempts)
    assert (bought.status, bought.error, bought.cost_usd) == (504, "upstream_timeout", "0.002250")
    over(pipeline)


@virtual_time
async def test_a_flight_has_the_latest_deadline_of_its_requests() -> None:
    pipeline = PipelineFixture(Fails("hang"))
    told = await asyncio.gather(*begin(pipeline, 1, total=2.0), *begin(pipeline, 1, total=7.0))
    assert [(each.refused, each.at) for each in told] == [("upstream_timeout", 2.0), ("upstream_timeout", 7.0)]
    assert len(pipeline.transport.sent) == 1
    over(pipeline)


@virtual_time
async def test_each_request_keeps_its_own_max_wait() -> None:
    config = settings(throttle=ThrottleSettings(limits={"*": Limits(rpm=1000, concurrency=1)}, max_wait=1000.0))
    pipeline = PipelineFixture(says(wait=20.0), says(), config=config)
    other = begin(pipeline, 1, ask("other"))
    await asyncio.sleep(1.0)
    leader, short, none = begin(pipeline, 1) + begin(pipeline, 1, patience=3.0) + begin(pipeline, 1, patience=0.0)
    assert ((await none).refused, (await none).at) == ("throttled", 0.0)
    assert ((await short).refused, (await short).at) == ("throttled", 3.0)
    assert (await leader).at == 19.0
    await asyncio.gather(*other)
    over(pipeline)


@virtual_time
async def test_a_leader_with_a_short_max_wait_is_replaced() -> None:
    config = settings(throttle=ThrottleSettings(limits={"*": Limits(rpm=1000, concurrency=1)}))
    pipeline = PipelineFixture(says(wait=20.0), says(wait=1.0), config=config)
    other = begin(pipeline, 1, ask("other"))
    await asyncio.sleep(1.0)
    told = await asyncio.gather(*begin(pipeline, 1, patience=2.0), *begin(pipeline, 3))
    assert [(each.status, each.at) for each in told] == [(429, 2.0)] + [(200, 20.0)] * 3
    assert caches(told) == ["miss", "miss", "coalesced", "coalesced"]
    await asyncio.gather(*other)
    over(pipeline)


# Failures.

ONCE = Options(max_retries=0)
AGAIN: dict[str, Move] = {
    "500": error(500, wait=1.0),
    "503": error(503, wait=1.0),
    "429": rate_limited(wait=1.0),
    "408": error(408, wait=1.0),
    "unreached": Fails("unreached", 1.0),
    "ambiguous": Fails("ambiguous", 1.0),
    "timeout": Fails("timeout", 1.0),
    "cut": Responds(200, (JSON,), (b"{", TransportFailure("invalid", "cut")), wait=1.0),
    "a stream's first event": streams([0.5, event({"error": {"message": "busy", "type": "server_error"}})]),
}


@pytest.mark.parametrize("move", AGAIN.values(), ids=AGAIN.keys())
def test_a_retryable_failure_is_only_the_leaders(move: Move) -> None:
    async def tell() -> None:
        pipeline = PipelineFixture(move, says(wait=1.0))
        document = ask(stream=isinstance(move, Responds) and move.headers[0] != JSON)
        if document["stream"]:
            pipeline.transport.queue[1] = streams(SLOW)
        told = await asyncio.gather(*begin(pipeline, 5, document, ONCE))
        assert told[0].status != 200 or told[0].broken or b"busy" in told[0].body
        assert told[0].cache == "miss"
        assert [each.status for each in told[1:]] == [200] * 4
        assert caches(told[1:]) == ["miss"] + ["coalesced"] * 3
        assert len(pipeline.transport.sent) == 2
        over(pipeline)

    run(tell())


@virtual_time
async def test_after_a_second_failure_all_followers_get_it() -> None:
    pipeline = PipelineFixture(error(503, wait=1.0), error(500, wait=1.0))
    told = await asyncio.gather(*begin(pipeline, 10, None, ONCE))
    assert [(each.status, each.at) for each in told] == [(503, 1.0)] + [(500, 2.0)] * 9
    assert caches(told) == ["miss"] * 2 + ["coalesced"] * 8
    assert len(pipeline.transport.sent) == 2
    assert [receipt.error for receipt in pipeline.receipts].count("upstream_500") == 9
    over(pipeline)


@virtual_time
async def test_a_shared_error_carries_each_requests_own_id() -> None:
    pipeline = PipelineFixture(*[Fails("unreached", 1.0)] * 2)
    told = await asyncio.gather(*begin(pipeline, 4, None, ONCE))
    assert [each.refused for each in told] == ["upstream_unreachable"] * 4
    assert len({each.headers["X-Proxy-Request-Id"] for each in told}) == 4
    assert caches(told) == ["miss", "miss", "coalesced", "coalesced"]
    over(pipeline)


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_deterministic_error_is_shared(status: int) -> None:
    async def tell() -> None:
        pipeline = PipelineFixture(error(status, wait=1.0))
        told = await asyncio.gather(*begin(pipeline, 5))
        assert {each.status for each in told} == {status}
        assert len({each.body for each in told}) == 1
        assert caches(told) == ["miss"] + ["coalesced"] * 4
        assert (told[0].headers.get("X-Should-Retry"), told[0].headers.get("X-Proxy-Error")) == (
            told[1].headers.get("X-Should-Retry"),
            told[1].headers.get("X-Proxy-Error"),
        )
        over(pipeline)

    run(tell())


@virtual_time
async def test_a_follower_leads_if_the_leader_left_before_its_failure() -> None:
    pipeline = PipelineFixture(error(500, wait=2.0), says(wait=1.0))
    tasks = begin(pipeline, 3, None, ONCE)
    await asyncio.sleep(1.0)
    await leave(tasks.pop(0))
    assert caches(await asyncio.gather(*tasks)) == ["miss", "coalesced"]
    over(pipeline)


# What cannot be shared.


@virtual_time
async def test_uncacheable_responses_are_not_serialised() -> None:
    pipeline = PipelineFixture(transport=ScriptedTransport(otherwise=lambda sent: says(UNFINISHED, wait=1.0)))
    told = await asyncio.gather(*begin(pipeline, 100))
    assert caches(told) == ["miss"] * 100
    assert [each.at for each in told] == [1.0] + [2.0] * 99  # all at the same time, not one after the other
    assert len(pipeline.transport.sent) == 100
    told = await asyncio.gather(*begin(pipeline, 100))  # and the next ones wait for nobody
    assert [each.at for each in told] == [1.0] * 100
    over(pipeline)
    await asyncio.sleep(HIT_FOR_MISS)
    pipeline.transport.otherwise = lambda sent: says(wait=1.0)
    assert caches(await asyncio.gather(*begin(pipeline, 3))) == ["miss", "coalesced", "coalesced"]


@virtual_time
async def test_a_stream_too_large_for_the_cache_cannot_be_joined() -> None:
    big = [event(chunk("x" * 30_000)) for _ in range(8)]
    script = [step for part in [*big, *events(usage=True)] for step in (1.0, part)]
    pipeline = PipelineFixture(
        streams(script), streams(script), config=settings(cache=CacheSettings(max_entry=100_000))
    )
    early = begin(pipeline, 2, STREAM)
    await asyncio.sleep(2.5)
    early += begin(pipeline, 1, STREAM)
    await asyncio.sleep(3.0)
    late = begin(pipeline, 1, STREAM)
    told = await asyncio.gather(*early, *late)
    assert caches(told) == ["miss", "coalesced", "coalesced", "miss"]
    assert len({each.body for each in told}) == 1
    over(pipeline)


@pytest.mark.parametrize(
    "move",
    [says(wait=1.0), Responds(200, (("Content-Type", "text/event-stream"), ("Content-Encoding", "exi")), (1.0, b"?"))],
)
def test_a_response_in_an_unexpected_form_is_not_shared(move: Responds) -> None:
    async def tell() -> None:
        pipeline = PipelineFixture(transport=ScriptedTransport(otherwise=lambda sent: move))
        assert caches(await asyncio.gather(*begin(pipeline, 3, STREAM))) == ["miss"] * 3
        assert len(pipeline.transport.sent) == 3
        over(pipeline)

    run(tell())


# Streams.


@virtual_time
async def test_a_client_that_joins_a_running_stream_gets_all_events_so_far() -> None:
    pipeline = PipelineFixture(streams(SLOW))
    early = begin(pipeline, 2, STREAM)
    await asyncio.sleep(2.5)
    late = begin(pipeline, 1, STREAM) + begin(pipeline, 1, USAGE_TOO)
    told = await asyncio.gather(*early, *late)
    assert caches(told) == ["miss", "coalesced", "coalesced", "coalesced"]
    assert [each.at for each in told] == [6.0, 6.0, 3.5, 3.5]
    assert [each.body for each in told[:3]] == [WHOLE.replace(USAGE, b"")] * 3
    assert told[3].body == WHOLE  # the usage chunk only for who asked
    follower = told[1].headers
    assert follower["Cache-Status"] == "openai-proxy; fwd=uri-miss; collapsed"
    assert (follower["X-Proxy-Cost-USD"], follower["X-Proxy-Cost-Status"]) == ("0.000000", "exact")
    assert "X-Proxy-Cost-Saved-USD" not in follower  # known at the end: in its receipt
    assert [receipt.saved_usd for receipt in pipeline.receipts] == ["0.000000"] + ["0.002250"] * 3
    assert (await pipeline.ask(STREAM)).body == told[0].body
    assert (await pipeline.ask(USAGE_TOO)).body == WHOLE
    over(pipeline)


@virtual_time
async def test_each_client_gets_the_cost_comment_if_it_asked() -> None:
    pipeline = PipelineFixture(streams(SLOW))
    asked = begin(pipeline, 1, STREAM, Options(stream_cost=True)) + begin(pipeline, 1, STREAM)
    told = await asyncio.gather(*asked, *begin(pipeline, 1, STREAM, Options(stream_cost=True)))
    assert b": x-proxy-cost-usd=0.002250 " in told[0].body
    assert b"x-proxy" not in told[1].body
    assert b": x-proxy-cost-usd=0.000000 x-proxy-prompt-tokens=100 " in told[2].body
    over(pipeline)


@pytest.mark.parametrize("inject", ["inject", "off"])
def test_a_client_that_wants_usage_does_not_share_a_stream_without_it(inject: str) -> None:
    async def tell() -> None:
        def answer(sent: Any) -> Move:
            asked = (sent.json().get("stream_options") or {}).get("include_usage")
            return streams([step for part in events(usage=bool(asked)) for step in (1.0, part)])

        pipeline = PipelineFixture(
            transport=ScriptedTransport(otherwise=answer), config=settings(cost=CostSettings(stream_usage=inject))
        )
        without = ask(stream=True, stream_options={"include_usage": False})
        told = await asyncio.gather(
            *begin(pipeline, 2, without),
            *begin(pipeline, 2, USAGE_TOO),
            *begin(pipeline, 2, STREAM),
            *begin(pipeline, 1, without),
        )
        assert [USAGE in each.body for each in told] == [False, False, True, True, False, False, False]
        assert len(pipeline.transport.sent) == 2
        over(pipeline)

    run(tell())


@virtual_time
async def test_a_broken_stream_breaks_for_every_client_with_one_error_event() -> None:
    pipeline = PipelineFixture(streams([*SLOW[:4], 1.0, TransportFailure("timeout", "silent")]))
    told = await asyncio.gather(*begin(pipeline, 3, STREAM))
    assert [(each.broken, each.at) for each in told] == [(True, 3.0)] * 3
    assert all(each.body.count(b'"upstream_timeout"') == 1 for each in told)
    assert [receipt.error for receipt in pipeline.receipts] == ["upstream_timeout"] * 3
    over(pipeline)
    pipeline.transport.queue.append(streams())
    assert (await pipeline.ask(STREAM)).cache == "miss"  # nothing was stored, and nobody avoids anything
    assert len(pipeline.handler.coalescer.flights.hit_for_miss) == 0


@virtual_time
async def test_a_slow_follower_delays_no_other() -> None:
    pipeline = PipelineFixture(streams(SLOW))
    request = pipeline.request(STREAM)
    leader, *fast = begin(pipeline, 3, STREAM)
    bought = await pipeline.fetch(request)
    got = []

    async def write(data: bytes) -> None:
        got.append(data)
        await asyncio.sleep(5.0)

    assert bought.stream is not None
    slow = pipeline.loop.create_task(bought.stream.relay(write))
    told = await asyncio.gather(leader, *fast)
    assert [each.at for each in told] == [6.0] * 3
    await slow
    assert b"".join(got) == told[0].body
    over(pipeline)


@virtual_time
async def test_a_follower_too_far_behind_is_cut_off() -> None:
    big = event(chunk("x" * 1_000_000))
    pipeline = PipelineFixture(streams([step for _ in range(20) for step in (1.0, big)] + [*events(usage=True)]))
    request = pipeline.request(STREAM)
    leader, *fast = begin(pipeline, 3, STREAM)
    bought = await pipeline.fetch(request)
    told = Result(200)

    async def write(data: bytes) -> None:
        await asyncio.Event().wait()

    scene_pump = pipeline.loop.create_task(_pumped(bought.stream, write, told))
    done = await asyncio.gather(leader, *fast)
    assert [each.broken for each in done] == [False] * 3
    await scene_pump
    assert told.broken
    late = next(receipt for receipt in pipeline.receipts if receipt.id == request.id)
    assert late.error == "client_too_slow"
    over(pipeline)


async def _pumped(flow: StreamRelay | SubscriberStream | None, write: Write, told: Result) -> None:
    assert flow is not None
    try:
        await flow.relay(write)
    except StreamBroken as broken:
        told.broken = broken.at_once


@virtual_time
async def test_draining_ends_every_stream_with_an_error_and_closes_the_upstream() -> None:
    pipeline = PipelineFixture(streams([*SLOW[:4], HANG]))
    calls = [pipeline.request(STREAM) for _ in range(3)]
    buying = [pipeline.loop.create_task(pipeline.fetch(request)) for request in calls]
    bought = await asyncio.gather(*buying)
    told = [Result(200) for _ in calls]
    pumps = [pipeline.loop.create_task(pipeline.pump(each, one)) for each, one in zip(bought, told, strict=True)]
    await asyncio.sleep(5.0)
    for each, pump in zip(bought, pumps, strict=True):
        assert each.stream is not None
        each.stream.interrupted = "draining"
        pump.cancel()
    await asyncio.wait(pumps)
    assert [one.broken for one in told] == [True] * 3
    assert all(b'"draining"' in one.body for one in told)
    await settled(3)
    assert {receipt.error for receipt in pipeline.receipts} == {"draining"}
    over(pipeline)


# Flights themselves.


def lead_of(*landings: FlightResult[str] | Exception, wait: float = 1.0) -> tuple[Lead[str], list[float]]:
    left, began = list(landings), []

    async def lead(seat: Waiter[str]) -> FlightResult[str]:
        began.append(virtual_time_loop().time())
        await asyncio.sleep(wait)
        landing = left.pop(0)
        if isinstance(landing, Exception):
            raise landing
        return landing

    return lead, began


def far() -> tuple[float, float]:
    return virtual_time_loop().time() + 60.0, virtual_time_loop().time() + 60.0


@virtual_time
async def test_an_exception_fails_every_waiter_and_leaves_no_flight() -> None:
    flights: SingleFlight[str] = SingleFlight(virtual_time_loop().time, HitForMiss(virtual_time_loop().time))
    lead, began = lead_of(RuntimeError("a bug"))
    seats = [flights.join([("k", "json")], lead, *far()) for _ in range(3)]
    assert len(flights) == 1
    for seat in seats:
        assert seat is not None
        with pytest.raises(RuntimeError, match="a bug"):
            await seat.result()
        seat.leave()
    assert (len(flights), len(began)) == (0, 1)


@virtual_time
async def test_a_flight_that_everybody_left_before_its_start_is_not_started() -> None:
    flights: SingleFlight[str] = SingleFlight(virtual_time_loop().time, HitForMiss(virtual_time_loop().time))
    lead, began = lead_of(FlightResult("a", Sharing.SHARED))
    first, second = (flights.join([("k", "json")], lead, *far()) for _ in range(2))
    assert first is not None
    assert second is not None
    first.leave()
    assert len(flights) == 1
    second.leave()
    second.leave()
    assert (len(flights), began) == (0, [])
    await settled()
    assert began == []


@virtual_time
async def test_a_leader_that_left_before_the_start_is_replaced() -> None:
    flights: SingleFlight[str] = SingleFlight(virtual_time_loop().time, HitForMiss(virtual_time_loop().time))
    lead, began = lead_of(FlightResult("a", Sharing.SHARED))
    first, second = (flights.join([("k", "json")], lead, *far()) for _ in range(2))
    assert first is not None
    assert second is not None
    first.leave()
    landing = await second.result()
    assert landing is not None
    assert landing.value == "a"
    assert (first.led, second.led, len(began)) == (False, True, 1)


@virtual_time
async def test_a_result_that_nobody_takes_is_dropped() -> None:
    flights: SingleFlight[str] = SingleFlight(virtual_time_loop().time, HitForMiss(virtual_time_loop().time))
    dropped: list[str] = []
    landing = FlightResult("mine", Sharing.PRIVATE, drop=lambda: dropped.append("mine"))
    lead, _ = lead_of(landing, landing)
    first, second = (flights.join([("k", "json")], lead, *far()) for _ in range(2))
    assert first is not None
    assert second is not None
    await asyncio.sleep(0.5)
    first.leave()
    landed = await second.result()
    assert landed is not None
    assert landed.sharing is Sharing.PRIVATE
    assert dropped == ["mine"]
    third = flights.join([("k", "json")], lead, *far())
    assert third is not None
    await asyncio.sleep(2.0)
    third.leave()  # it landed, and its request was gone in the same turn
    assert dropped == ["mine", "mine"]


@virtual_time
async def test_hit_for_miss_marks_are_bounded_and_expire() -> None:
    flights: SingleFlight[str] = SingleFlight(virtual_time_loop().time, HitForMiss(virtual_time_loop().time))
    lead, _ = lead_of()
    for number in range(HIT_FOR_MISS_KEPT + 5):
        flights.hit_for_miss.mark([(str(number), "json")])
    assert len(flights.hit_for_miss) == HIT_FOR_MISS_KEPT
    assert flights.join([(str(HIT_FOR_MISS_KEPT), "json")], lead, *far()) is None
    seat = flights.join([("0", "json")], lead, *far())
    assert seat is not None
    seat.leave()
    await asyncio.sleep(HIT_FOR_MISS)
    seat = flights.join([(str(HIT_FOR_MISS_KEPT), "json")], lead, *far())
    assert seat is not None
    seat.leave()
    assert len(flights.hit_for_miss) == HIT_FOR_MISS_KEPT - 1


@virtual_time
async def test_a_thousand_equal_requests_make_one_call() -> None:
    pipeline = PipelineFixture(says(wait=1.0), streams(SLOW), config=settings(throttle=ThrottleSettings()))
    told = await asyncio.gather(*begin(pipeline, 1000))
    assert caches(told).count("coalesced") == 999
    told = await asyncio.gather(*begin(pipeline, 1000, ask("other", stream=True)))
    assert caches(told).count("coalesced") == 999
    assert len({each.body for each in told}) == 1
    assert len(pipeline.transport.sent) == 2
    over(pipeline)


# Anything, and anybody may leave at any time.

_CUT = TransportFailure("invalid", "cut")
_GOOD: list[Move] = [says(wait=1.0), says(wait=3.0), streams(SLOW), streams(SLOW), streams([0.5, *events(usage=True)])]
_BAD: list[Move] = [
    *AGAIN.values(),
    says(UNFINISHED, wait=1.0),
    streams([*SLOW[:5], _CUT]),
    streams([*SLOW[:3], 5.0, TransportFailure("timeout", "silent")]),
    error(400, wait=1.0),
    error(401, wait=1.0),
    Fails("hang"),
    Responds(200, (JSON,), (b"{", HANG)),
]
_REQUEST = st.tuples(
    st.integers(0, 1),  # which prompt
    st.booleans(),  # streaming
    st.booleans(),  # with usage
    st.sampled_from([0.0, 0.0, 0.5, 1.5, 4.0]),  # when it comes
    st.none() | st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.5]),  # after how long it leaves
    st.sampled_from([2.0, 10.0, 40.0]),  # its deadline
)


@examples(max_examples=300)
@given(
    moves=st.lists(st.sampled_from(_GOOD + _BAD), min_size=1, max_size=8),
    requests=st.lists(_REQUEST, min_size=1, max_size=12),
    concurrency=st.sampled_from([1, 2, 100]),
    retries=st.integers(0, 2),
)
def test_any_mix_of_requests_leaves_nothing_behind(
    moves: list[Move],
    requests: list[tuple[int, bool, bool, float, float | None, float]],
    concurrency: int,
    retries: int,
) -> None:
    config: Settings = settings(
        pool("k1", "k2"),
        throttle=ThrottleSettings(limits={"*": Limits(rpm=1000, tpm=1_000_000, concurrency=concurrency)}),
        timeouts=TimeoutSettings(total=60.0, first_byte=15.0),
    )

    async def tell() -> None:
        script = iter([*moves] * 100)
        pipeline = PipelineFixture(transport=ScriptedTransport(otherwise=lambda sent: next(script)), config=config)

        async def one(prompt: int, stream: bool, usage: bool, after: float, total: float) -> Result:
            await asyncio.sleep(after)
            document = ask(str(prompt), stream=stream) | ({"stream_options": {"include_usage": True}} if usage else {})
            return await pipeline.ask(document, Options(max_retries=retries), total=total)

        tasks = []
        for prompt, stream, usage, after, leaves, total in requests:
            task = pipeline.loop.create_task(one(prompt, stream, usage and stream, after, total))
            tasks.append(task)
            if leaves is not None:
                pipeline.loop.call_later(after + leaves, task.cancel)
        await asyncio.wait(tasks)
        await settled(3)
        over(pipeline)
        served = [task.result() for task in tasks if not task.cancelled()]
        hits = sum(told.hit is not None for told in served)
        assert len(served) <= len(pipeline.receipts) + hits <= len(tasks)
        for told in served:
            assert told.at <= 60.0 or told.flow is not None
            if (
                told.flow is not None
                and not told.broken
                and b'"error"' not in told.body
                and told.flow.audit is not None
            ):
                assert told.body in (WHOLE, WHOLE.replace(USAGE, b""))

    run(tell())


def test_a_client_may_leave_a_flight_in_any_turn_of_the_loop() -> None:
    """Three share a stream, and then a plain answer whose first leader fails; one of them leaves in each turn."""

    def tell(gone: int, at: int | None, stream: bool) -> int:
        turns = 0

        async def tell() -> None:
            nonlocal turns
            pipeline = PipelineFixture(*([streams(SLOW)] if stream else [error(500, wait=1.0), says(wait=1.0)]))
            began = pipeline.loop.steps
            tasks = begin(pipeline, 3, ask(stream=stream), ONCE)
            if at is not None:
                pipeline.loop.at_step(at, tasks[gone].cancel)
            await asyncio.wait(tasks)
            turns = pipeline.loop.steps - began
            await settled(3)
            over(pipeline)
            for n, task in enumerate(tasks):
                assert n == gone or not task.cancelled()
            told = [task.result() for task in tasks if not task.cancelled()]
            assert not any(each.broken for each in told)
            assert [each.status for each in told].count(200) >= (len(told) if stream else len(told) - 1)
            assert len(pipeline.transport.sent) <= 2

        run(tell())
        return turns

    for stream in (True, False):
        turns = tell(0, None, stream)
        for gone in range(3):
            for at in range(turns):
                tell(gone, at, stream)
