"""Plain and streamed requests for the same make one call; and an answer that nobody waits for may still be finished."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from proxy.config.limits import Limits
from proxy.config.settings import CacheSettings, ThrottleSettings
from proxy.pipeline.coalescing.single_flight import READ_ON_TIMEOUT
from proxy.protocol.options import Options
from tests.pipeline.clock import run, settled, virtual_time
from tests.pipeline.fixture import PipelineFixture, Result, ask, settings
from tests.pipeline.script import HANG, Fails, Responds, ScriptedTransport, chunk, error, event, events, says, streams

STREAM = ask(stream=True)
USAGE_TOO = ask(stream=True, stream_options={"include_usage": True})
SLOW = [step for part in events(usage=True) for step in (1.0, part)]
FINISH = settings(cache=CacheSettings(on_disconnect="finish"))


def begin(
    pipeline: PipelineFixture, count: int, document: Any = None, options: Options | None = None, **more: Any
) -> list[Any]:
    return [pipeline.loop.create_task(pipeline.ask(document, options, **more)) for _ in range(count)]


def over(pipeline: PipelineFixture) -> None:
    assert len(pipeline.handler.coalescer.flights) == 0
    assert "flight" not in {task.get_name() for task in asyncio.all_tasks()}
    pipeline.assert_nothing_leaked()


def caches(tolds: Sequence[Result]) -> list[str]:
    return [result.cache for result in tolds]


# Plain and streamed.


@virtual_time
async def test_plain_requests_wait_for_a_running_stream_and_get_it_converted() -> None:
    pipeline = PipelineFixture(streams(SLOW))
    asked = begin(pipeline, 2, STREAM)
    await asyncio.sleep(1.5)
    result = await asyncio.gather(*asked, *begin(pipeline, 3))
    assert caches(result) == ["miss"] + ["coalesced"] * 4
    assert [each.at for each in result] == [6.0] * 2 + [4.5] * 3
    plain = result[2]
    assert plain.json()["choices"][0]["message"]["content"] == "Hello wörld 🌍"
    assert plain.headers["Cache-Status"] == "openai-proxy; fwd=uri-miss; collapsed"
    assert (plain.cost, plain.headers["X-Proxy-Cost-Saved-USD"]) == ("0.000000", "0.002250")
    assert plain.headers["X-Proxy-Total-Tokens"] == "300"
    assert dict(plain.raw_headers)[b"Content-Type"] == b"application/json"
    assert [receipt.saved_usd for receipt in pipeline.receipts].count("0.002250") == 4
    assert len({receipt.id for receipt in pipeline.receipts}) == 5
    assert (await pipeline.ask()).cache == "hit"
    over(pipeline)


@virtual_time
async def test_stream_requests_wait_for_a_plain_response_and_get_it_converted() -> None:
    pipeline = PipelineFixture(says(wait=2.0))
    asked = begin(pipeline, 2)
    await asyncio.sleep(1.0)
    result = await asyncio.gather(
        *asked,
        *begin(pipeline, 2, STREAM),
        *begin(pipeline, 1, USAGE_TOO),
        *begin(pipeline, 1, STREAM, Options(stream_cost=True)),
    )
    assert caches(result) == ["miss"] + ["coalesced"] * 5
    assert [each.at for each in result] == [2.0] * 2 + [1.0] * 4
    assert all(b"[DONE]" in each.body for each in result[2:])
    assert [b'"usage":{' in each.body for each in result[2:5]] == [False, False, True]
    assert b": x-proxy-cost-usd=0.000000 " in result[5].body
    assert len(pipeline.transport.sent) == 1
    over(pipeline)


@pytest.mark.parametrize("stream_first", [True, False])
def test_other_clients_are_served_when_one_leaves_a_mixed_flight(stream_first: bool) -> None:
    """The one who bought leaves while only those in the other form are left: it goes on for them."""

    async def tell() -> None:
        pipeline = PipelineFixture(streams(SLOW) if stream_first else says(wait=3.0))
        (first,) = begin(pipeline, 1, ask(stream=stream_first))
        await asyncio.sleep(0.5)
        others = begin(pipeline, 3, ask(stream=not stream_first))
        await asyncio.sleep(0.5)
        first.cancel()
        result = await asyncio.gather(*others)
        assert caches(result) == ["coalesced"] * 3
        assert len(pipeline.transport.sent) == 1
        assert [receipt.status for receipt in pipeline.receipts].count(499) == 1
        over(pipeline)

    run(tell())


@pytest.mark.parametrize(
    "first",
    [
        error(500, wait=1.0),
        error(400, wait=1.0),  # it may be about streaming itself
        Fails("unreached", 1.0),
        streams([1.0, *events(usage=True)[:2]]),  # cut
        streams([1.0, event(chunk("a")), event(chunk(None, "content_filter")), *events(usage=True)[-2:]]),
        Responds(200, (("Content-Type", "text/event-stream"), ("Content-Encoding", "exi")), (1.0, b"?")),
    ],
    ids=["500", "400", "unreached", "cut", "not stored", "opaque"],
)
def test_if_the_response_is_not_stored_the_other_form_is_fetched(first: Responds | Fails) -> None:
    async def tell() -> None:
        pipeline = PipelineFixture(first, says(wait=1.0), says(wait=1.0))
        asked = begin(pipeline, 1, STREAM, Options(max_retries=0))
        await asyncio.sleep(0.5)
        result = await asyncio.gather(*asked, *begin(pipeline, 3))
        assert sorted(caches(result[1:])) == ["coalesced", "coalesced", "miss"]
        assert {each.status for each in result[1:]} == {200}
        assert len(pipeline.transport.sent) == 2
        over(pipeline)

    run(tell())


@virtual_time
async def test_a_response_that_cannot_be_converted_is_fetched_in_each_form() -> None:
    odd = event({**chunk("Hel"), "choices": [{"index": 0, "delta": {"content": "Hel", "unheard_of": ["?"]}}]})
    pipeline = PipelineFixture(streams([1.0, odd, odd, *events(usage=True)[1:]]), says(wait=1.0))
    asked = begin(pipeline, 1, STREAM)
    await asyncio.sleep(0.5)
    result = await asyncio.gather(*asked, *begin(pipeline, 2))
    assert len(pipeline.transport.sent) == 2
    assert caches(result) == ["miss", "miss", "coalesced"]
    over(pipeline)


@virtual_time
async def test_a_responses_stream_does_not_wait_for_a_plain_answer() -> None:
    document = {"model": "gpt-4o", "input": "Hi"}
    pipeline = PipelineFixture(transport=ScriptedTransport(otherwise=lambda sent: error(400, wait=2.0)))
    asked = begin(pipeline, 1, document, target="/v1/responses")
    await asyncio.sleep(1.0)
    result = await asyncio.gather(*asked, *begin(pipeline, 1, {**document, "stream": True}, target="/v1/responses"))
    assert [each.at for each in result] == [2.0, 2.0]
    assert len(pipeline.transport.sent) == 2
    over(pipeline)


@virtual_time
async def test_a_client_that_asked_for_the_other_form_keeps_its_own_deadline() -> None:
    pipeline = PipelineFixture(streams([*SLOW[:2], 30.0, *SLOW[2:]]))
    asked = begin(pipeline, 1, STREAM)
    await asyncio.sleep(0.5)
    result = await asyncio.gather(*asked, *begin(pipeline, 1, total=3.0))
    assert (result[1].refused, result[1].at, result[1].cache) == ("upstream_timeout", 3.0, "coalesced")
    assert result[0].status == 200
    over(pipeline)


@virtual_time
async def test_a_stream_too_large_for_the_cache_releases_waiting_plain_requests() -> None:
    big = [event(chunk("x" * 30_000)) for _ in range(8)]
    script = [step for part in [*big, *events(usage=True)] for step in (1.0, part)]
    pipeline = PipelineFixture(streams(script), says(wait=1.0), config=settings(cache=CacheSettings(max_entry=100_000)))
    asked = begin(pipeline, 1, STREAM)
    await asyncio.sleep(0.5)
    result = await asyncio.gather(*asked, *begin(pipeline, 1))
    assert (result[1].cache, result[1].at) == ("miss", 4.5)
    over(pipeline)


@virtual_time
async def test_a_thousand_requests_in_both_forms_make_one_call() -> None:
    pipeline = PipelineFixture(streams(SLOW), config=settings(throttle=ThrottleSettings()))
    asked = begin(pipeline, 1, STREAM)
    await asyncio.sleep(0.5)
    for number in range(999):
        asked += begin(pipeline, 1, (ask(), STREAM, USAGE_TOO)[number % 3])
    result = await asyncio.gather(*asked)
    assert caches(result).count("coalesced") == 999
    assert len(pipeline.transport.sent) == 1
    over(pipeline)


# An answer that nobody waits for any more (on_disconnect: finish).


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("after", [0.5, 2.5])
def test_on_disconnect_finish_reads_to_the_end_and_stores(stream: bool, after: float) -> None:
    async def tell() -> None:
        pipeline = PipelineFixture(streams(SLOW) if stream else says(wait=5.0), config=FINISH)
        tasks = begin(pipeline, 2, ask(stream=stream))
        await asyncio.sleep(after)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await asyncio.sleep(10.0)
        assert sorted((receipt.status, receipt.error) for receipt in pipeline.receipts) == [(499, "client_gone")] * 2
        assert [receipt.cost_usd for receipt in pipeline.receipts if receipt.attempts] == ["0.002250"]
        assert pipeline.used()["tpm"] == 300
        assert (await pipeline.ask(ask(stream=stream))).cache == "hit"
        over(pipeline)

    run(tell())


@virtual_time
async def test_a_new_client_joins_a_stream_that_is_being_finished() -> None:
    pipeline = PipelineFixture(streams(SLOW), config=FINISH)
    (task,) = begin(pipeline, 1, STREAM)
    await asyncio.sleep(2.5)
    task.cancel()
    await settled()
    (result,) = await asyncio.gather(*begin(pipeline, 1, STREAM))
    assert (result.cache, result.at, result.broken) == ("coalesced", 3.5, False)
    over(pipeline)


@virtual_time
async def test_on_disconnect_finish_is_limited_to_a_minute() -> None:
    pipeline = PipelineFixture(streams([*SLOW[:4], HANG]), config=FINISH)
    (task,) = begin(pipeline, 1, STREAM)
    await asyncio.sleep(3.0)
    task.cancel()
    await settled()
    assert len(pipeline.handler.coalescer.flights) == 1
    await asyncio.sleep(READ_ON_TIMEOUT + 0.1)
    assert (pipeline.receipt.status, pipeline.receipt.error) == (499, "client_gone")
    over(pipeline)


@pytest.mark.parametrize("stream", [True, False])
def test_on_disconnect_finish_reads_no_more_than_max_entry(stream: bool) -> None:
    async def tell() -> None:
        cache = CacheSettings(on_disconnect="finish", max_entry=100_000)
        big = b"x" * 60_000
        steps = [step for _ in range(20) for step in (1.0, event(chunk("x" * 60_000)) if stream else big)]
        move = streams(steps) if stream else Responds(200, (("Content-Type", "application/json"),), tuple(steps))
        pipeline = PipelineFixture(move, config=settings(cache=cache))
        (task,) = begin(pipeline, 1, ask(stream=stream))
        await asyncio.sleep(1.5)
        task.cancel()
        await asyncio.sleep(2.0)
        assert (pipeline.receipt.status, pipeline.receipt.error) == (499, "client_gone")
        over(pipeline)

    run(tell())


@virtual_time
async def test_a_request_that_was_not_sent_is_not_finished() -> None:
    limits = ThrottleSettings(limits={"*": Limits(rpm=1000, concurrency=1)})
    pipeline = PipelineFixture(
        says(wait=9.0), config=settings(cache=CacheSettings(on_disconnect="finish"), throttle=limits)
    )
    other = begin(pipeline, 1, ask("other"))
    await asyncio.sleep(1.0)
    (task,) = begin(pipeline, 1)
    await asyncio.sleep(1.0)
    task.cancel()
    await asyncio.gather(*other)
    await settled()
    assert len(pipeline.transport.sent) == 1
    over(pipeline)


@virtual_time
async def test_on_disconnect_finish_works_without_coalesce() -> None:
    config = settings(cache=CacheSettings(on_disconnect="finish", coalesce=False))
    pipeline = PipelineFixture(says(wait=2.0), says(wait=2.0), config=config)
    tasks = begin(pipeline, 2)
    await asyncio.sleep(1.0)
    tasks[0].cancel()
    assert (await tasks[1]).cache == "miss"
    assert len(pipeline.transport.sent) == 2
    await settled()
    assert (await pipeline.ask()).cache == "hit"
    over(pipeline)


# In the background.


@pytest.mark.parametrize("stream", [True, False])
def test_a_revalidation_fetches_once_and_stores(stream: bool) -> None:
    async def tell() -> None:
        pipeline = PipelineFixture(streams(SLOW) if stream else says(wait=2.0))
        request = pipeline.request(ask(stream=stream))
        plan = await pipeline.handler.planner.plan(request)
        assert [pipeline.handler.revalidator.start(request, plan) for _ in range(3)] == [True, False, False]
        await asyncio.sleep(1.0)
        assert not pipeline.handler.revalidator.start(request, plan)
        await asyncio.sleep(10.0)
        assert len(pipeline.transport.sent) == 1
        assert [(receipt.status, receipt.cost_usd) for receipt in pipeline.receipts] == [(200, "0.002250")]
        assert pipeline.receipt.id != request.id
        assert (await pipeline.ask(ask(stream=stream))).cache == "hit"
        over(pipeline)

    run(tell())


@virtual_time
async def test_a_failed_revalidation_leaves_nothing_behind() -> None:
    pipeline = PipelineFixture(error(500, wait=1.0))
    request = pipeline.request(None, Options(max_retries=0))
    assert pipeline.handler.revalidator.start(request, await pipeline.handler.planner.plan(request))
    await asyncio.sleep(5.0)
    assert pipeline.receipt.error == "upstream_500"
    over(pipeline)
