"""Equal requests in two processes that share a store: one buys, the other waits for its entry, within bounds."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pytest

from proxy.config.settings import CacheSettings
from proxy.coordination import Coordination
from proxy.pipeline.coalescing.cross_process import AVOID_FOR, LEASE, STREAM_WAIT, WAIT
from proxy.protocol.options import Options
from tests.pipeline.clock import virtual_time, virtual_time_loop
from tests.pipeline.fixture import PipelineFixture, ask, settings
from tests.pipeline.script import Fails, ScriptedTransport, completion, error, events, says, streams

STREAM = ask(stream=True)
UNFINISHED = completion(choices=[{"index": 0, "message": {"content": "Hel"}, "finish_reason": "length"}])


class Held:
    """Leases as a dict. down: nobody can ask."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[str, float]] = {}
        self.down = False
        self.renewed = 0

    def _now(self, name: str) -> str | None:
        token, until = self.held.get(name, ("", 0.0))
        return token if virtual_time_loop().time() < until else None

    async def acquire(self, name: str, token: str, seconds: float) -> Literal["acquired", "held", "unavailable"]:
        if self.down:
            return "unavailable"
        held = self._now(name)
        if held in (None, token):
            self.held[name] = token, virtual_time_loop().time() + seconds
            return "acquired"
        return "unavailable" if held == "-" else "held"

    async def renew(self, name: str, token: str, seconds: float) -> bool:
        if self.down or self._now(name) != token:
            return False
        self.renewed += 1
        self.held[name] = token, virtual_time_loop().time() + seconds
        return True

    async def release(self, name: str, token: str, open_for: float) -> None:
        if not self.down and self._now(name) == token:
            if open_for:
                self.held[name] = "-", virtual_time_loop().time() + open_for
            else:
                del self.held[name]


def two(transport: ScriptedTransport) -> tuple[PipelineFixture, PipelineFixture, Held]:
    """Return two processes: each has its own handler, and they share a store and an upstream."""
    pipelines, held = (PipelineFixture(transport=transport), PipelineFixture(transport=transport)), Held()
    for name, pipeline in zip("ab", pipelines, strict=True):
        pipeline.clock = replace(pipeline.clock, new_id=partial(_numbered, name, itertools.count()))
        pipeline.services.clock = pipeline.clock
        pipeline.services.coordination = Coordination(locks=held)
        pipeline.services.store = pipelines[0].services.store
        pipeline.rebuild()
    return *pipelines, held


def _numbered(name: str, numbers: Iterator[int]) -> str:
    return f"{name}{next(numbers)}"


def begin(
    pipeline: PipelineFixture, count: int, document: Any = None, options: Options | None = None, **more: Any
) -> list[Any]:
    return [pipeline.loop.create_task(pipeline.ask(document, options, **more)) for _ in range(count)]


@virtual_time
async def test_a_second_process_waits_for_the_entry_of_the_first() -> None:
    transport = ScriptedTransport(says(wait=12.0))
    one, other, held = two(transport)
    first = begin(one, 3)
    await asyncio.sleep(1.0)
    result = await asyncio.gather(*first, *begin(other, 3))
    assert [each.cache for each in result] == ["miss"] + ["coalesced"] * 5
    assert all(11.0 <= each.at <= 11.3 for each in result[3:])
    assert {each.body for each in result} == {result[0].body}
    assert result[3].headers["Cache-Status"] == "openai-proxy; fwd=uri-miss; collapsed"
    assert (result[3].cost, result[3].headers["X-Proxy-Cost-Saved-USD"]) == ("0.000000", "0.002250")
    assert len(transport.sent) == 1
    assert held.renewed >= 3
    await asyncio.sleep(1.0)
    assert held.held == {}
    assert {receipt.cache for receipt in other.receipts} == {"coalesced"}


@virtual_time
async def test_a_lost_lock_costs_one_more_call() -> None:
    transport = ScriptedTransport(says(wait=5.0), says(wait=1.0))
    one, other, held = two(transport)
    first = begin(one, 1)
    await asyncio.sleep(1.0)
    held.held.clear()
    result = await asyncio.gather(*first, *begin(other, 2))
    assert [each.cache for each in result] == ["miss", "miss", "coalesced"]
    assert {each.status for each in result} == {200}
    assert len(transport.sent) == 2


@virtual_time
async def test_a_killed_process_delays_others_until_its_lock_expires() -> None:
    transport = ScriptedTransport(says(wait=1.0))
    _, other, held = two(transport)
    request = other.request()
    plan = await other.handler.planner.plan(request)
    held.held[f"{plan.key}:json"] = "dead", virtual_time_loop().time() + LEASE
    result = await other.serve(request)
    assert (result.status, result.cache) == (200, "miss")
    assert LEASE < result.at < LEASE + 1.5


@pytest.mark.parametrize(("stream", "longest"), [(False, WAIT), (True, STREAM_WAIT)])
@virtual_time
async def test_the_wait_for_another_process_is_bounded(stream: bool, longest: float) -> None:
    transport = ScriptedTransport(
        otherwise=lambda sent: streams([40.0, *events(usage=True)]) if stream else says(wait=40.0)
    )
    one, other, _ = two(transport)
    first = begin(one, 1, ask(stream=stream), total=200.0)
    await asyncio.sleep(0.5)
    second = begin(other, 1, ask(stream=stream), total=200.0)
    await asyncio.sleep(longest + 1.0)
    assert len(transport.sent) == 2
    assert longest - 0.3 <= transport.sent[1].at - transport.sent[0].at - 0.5 <= longest
    result = await asyncio.gather(*first, *second)
    assert [each.status for each in result] == [200, 200]


@virtual_time
async def test_a_short_deadline_ends_the_wait() -> None:
    transport = ScriptedTransport(otherwise=lambda sent: says(wait=9.0))
    one, other, _ = two(transport)
    first = begin(one, 1)
    await asyncio.sleep(0.5)
    (result,) = await asyncio.gather(*begin(other, 1, total=2.0))
    assert (result.refused, result.at) == ("upstream_timeout", 2.0)
    assert (await first[0]).status == 200


@virtual_time
async def test_without_redis_no_lock_is_taken() -> None:
    transport = ScriptedTransport(otherwise=lambda sent: says(wait=1.0))
    one, other, held = two(transport)
    held.down = True
    result = await asyncio.gather(*begin(one, 2), *begin(other, 2))
    assert [each.cache for each in result] == ["miss", "coalesced"] * 2
    assert [each.at for each in result] == [1.0] * 4


@virtual_time
async def test_a_failure_releases_the_lock_at_once() -> None:
    transport = ScriptedTransport(Fails("unreached", 2.0), says(wait=1.0))
    one, other, _ = two(transport)
    first = begin(one, 1, None, Options(max_retries=0))
    await asyncio.sleep(0.5)
    result = await asyncio.gather(*first, *begin(other, 1))
    assert (result[0].refused, result[1].cache) == ("upstream_unreachable", "miss")
    assert result[1].at < 3.0


@virtual_time
async def test_responses_that_cannot_be_stored_are_not_serialised() -> None:
    transport = ScriptedTransport(otherwise=lambda sent: says(UNFINISHED, wait=2.0))
    one, other, held = two(transport)
    first = begin(one, 1)
    await asyncio.sleep(0.5)
    result = await asyncio.gather(*first, *begin(other, 1))
    assert result[1].at < 4.0
    other.handler.coalescer.flights.hit_for_miss.clear()
    (again,) = await asyncio.gather(*begin(other, 1))
    assert again.at == 2.0
    await asyncio.sleep(AVOID_FOR)
    assert held._now(next(iter(held.held))) is None


@virtual_time
async def test_a_client_that_leaves_while_waiting_leaves_nothing() -> None:
    transport = ScriptedTransport(says(wait=5.0))
    one, other, held = two(transport)
    first = begin(one, 1)
    await asyncio.sleep(0.5)
    second = begin(other, 1)
    await asyncio.sleep(1.0)
    second[0].cancel()
    await asyncio.wait(second)
    assert (other.receipt.status, other.receipt.attempts) == (499, 0)
    assert len(other.handler.coalescer.flights) == 0
    assert (await first[0]).status == 200
    await asyncio.sleep(1.0)
    assert held.held == {}


@virtual_time
async def test_a_stream_holds_its_lock_to_its_end() -> None:
    transport = ScriptedTransport(streams([step for part in events(usage=True) for step in (0.5, part)]))
    one, other, held = two(transport)
    first = begin(one, 1, STREAM)
    await asyncio.sleep(1.6)
    assert len(held.held) == 1
    result = await asyncio.gather(*first, *begin(other, 1, STREAM))
    assert result[1].cache == "coalesced"
    assert result[1].body == result[0].body
    await asyncio.sleep(1.0)
    assert held.held == {}


@virtual_time
async def test_without_coalesce_no_lock_is_taken() -> None:
    held = Held()
    config = settings(cache=CacheSettings(coalesce=False))
    pipeline = PipelineFixture(error(400), config=config, coordination=Coordination(locks=held))
    assert (await pipeline.ask()).status == 400
    assert held.held == {}
