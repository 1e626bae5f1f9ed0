"""Stale answers: served while a fresh one is fetched, or where none is to be had (RFC 5861)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from proxy.config.limits import Limits
from proxy.config.settings import CacheSettings, RetrySettings, ThrottleSettings, TtlSettings
from proxy.pipeline.stale import PAUSE
from proxy.protocol.options import Options
from proxy.upstream.retry.outcome import allows_stale
from tests.pipeline.clock import settled, virtual_time
from tests.pipeline.fixture import PipelineFixture, Result, ask, pool, settings
from tests.pipeline.script import Fails, Move, completion, error, rate_limited, says, streams

QUICK = {"retry": RetrySettings(max_retries=0, jitter=0.0)}


def pipeline(*moves: Move, revalidate: float = 0.0, on_error: float = 0.0) -> PipelineFixture:
    cache = CacheSettings(ttl=TtlSettings(chat=100.0), stale_while_revalidate=revalidate, stale_if_error=on_error)
    return PipelineFixture(*moves, config=settings(cache=cache, **QUICK))


def content(result: Result) -> str:
    found: str = result.json()["choices"][0]["message"]["content"]
    return found


def stale(result: Result) -> str:
    return result.hit.stale if result.hit is not None else "no hit"


@virtual_time
async def test_a_stale_response_is_served_at_once_and_revalidated() -> None:
    play = pipeline(says(completion("old")), says(completion("new"), wait=5.0), revalidate=50.0)
    await play.ask()
    await play.clock.sleep(120.0)
    for _ in range(3):  # one call, however often it is asked for
        result = await play.ask()
        assert (result.at, content(result), stale(result)) == (0.0, "old", "stale-while-revalidate")
        assert (play.receipt.cache, play.receipt.cost_usd, play.receipt.saved_usd) == ("stale", "0.000000", "0.002250")
    await play.clock.sleep(6.0)
    result = await play.ask()
    assert (content(result), stale(result)) == ("new", "")
    assert len(play.transport.sent) == 2
    bought = play.receipts[-1]
    assert (bought.client, bought.reason, bought.cost_usd) == ("", "stale-while-revalidate", "0.002250")
    play.assert_nothing_leaked()


@virtual_time
async def test_a_stale_stream_is_revalidated() -> None:
    play = pipeline(streams(), streams(), revalidate=50.0)
    first = await play.ask(ask(stream=True))
    await play.clock.sleep(120.0)
    result = await play.ask(ask(stream=True))
    assert (result.body, stale(result)) == (first.body, "stale-while-revalidate")
    await settled(50)
    assert stale(await play.ask(ask(stream=True))) == ""
    play.assert_nothing_leaked()


@pytest.mark.parametrize(
    ("age", "options", "cache"),
    [
        (149.0, Options(), "hit"),
        (150.0, Options(), "miss"),
        (120.0, Options(no_cache=True), "miss"),
        (120.0, Options(max_age=110), "miss"),
        (120.0, Options(max_age=130), "hit"),
        (120.0, Options(no_store=True), "bypass"),
    ],
)
@virtual_time
async def test_stale_while_revalidate_limits_the_staleness(age: float, options: Options, cache: str) -> None:
    play = pipeline(says(), says(), revalidate=50.0)
    await play.ask()
    await play.clock.sleep(age)
    assert (await play.ask(None, options)).cache == cache
    await settled(50)


@virtual_time
async def test_only_if_cached_serves_stale_and_sends_nothing() -> None:
    play = pipeline(says(), revalidate=50.0)
    await play.ask()
    await play.clock.sleep(120.0)
    assert stale(await play.ask(None, Options(only_if_cached=True))) == "stale-while-revalidate"
    await settled(50)
    assert len(play.transport.sent) == 1


@virtual_time
async def test_a_failed_revalidation_is_not_repeated_at_once() -> None:
    play = pipeline(says(completion("old")), error(500), says(completion("new")), revalidate=500.0)
    await play.ask()
    await play.clock.sleep(120.0)
    for _ in range(3):
        assert content(await play.ask()) == "old"
        await settled(50)
    assert len(play.transport.sent) == 2
    await play.clock.sleep(PAUSE + 1)
    await play.ask()
    await settled(50)
    assert content(await play.ask()) == "new"
    play.assert_nothing_leaked()


@virtual_time
async def test_revalidations_end_when_the_proxy_stops() -> None:
    play = pipeline(says(), says(wait=1000.0), revalidate=50.0)
    await play.ask()
    await play.clock.sleep(120.0)
    await play.ask()
    await settled()
    await play.handler.revalidator.close()
    play.assert_nothing_leaked()


@pytest.mark.parametrize(
    ("move", "why"),
    [
        (error(500), "upstream_500"),
        (error(503), "upstream_503"),
        (rate_limited(), "upstream_429"),
        (error(429, "insufficient_quota"), "no_usable_key"),
        (error(401), "no_usable_key"),
        (Fails("unreached"), "upstream_unreachable"),
        (Fails("timeout"), "upstream_timeout"),
        (says({"cut": True}, headers=[("Content-Encoding", "gzip")]), "upstream_invalid_response"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@virtual_time
async def test_a_stale_response_is_served_if_the_upstream_fails(move: Move, why: str) -> None:
    play = pipeline(says(completion("old")), move, on_error=50.0)
    await play.ask()
    await play.clock.sleep(120.0)
    result = await play.ask()
    assert (result.status, stale(result), content(result)) == (200, f"stale-if-error: {why}", "old")
    assert result.hit is not None
    assert (result.hit.fwd, result.hit.attempts) == (True, 1)
    assert len(play.receipts) == 2  # one for each request: the failure is in the second
    receipt = play.receipt
    assert (receipt.id, receipt.cache, receipt.status, receipt.error) == (result.hit.id, "stale", 200, "")
    assert receipt.reason == f"stale-if-error: {why}"
    assert (receipt.cost_usd, receipt.saved_usd, receipt.attempts) == ("0.000000", "0.002250", 1)
    play.assert_nothing_leaked()


@pytest.mark.parametrize("move", [error(400), error(404), error(422), error(413)])
@virtual_time
async def test_a_client_error_is_returned_and_not_replaced_by_stale(move: Move) -> None:
    play = pipeline(says(), move, on_error=50.0)
    await play.ask()
    await play.clock.sleep(120.0)
    result = await play.ask()
    assert result.status in (400, 404, 413, 422)
    assert (len(play.receipts), play.receipt.cache) == (2, "miss")


@pytest.mark.parametrize(
    ("setting", "asked", "age", "status"),
    [
        (0.0, None, 101.0, 500),
        (50.0, None, 149.0, 200),
        (50.0, None, 150.0, 500),
        (50.0, Options(stale_if_error=10), 111.0, 500),  # the request's word goes before the setting's
        (50.0, Options(stale_if_error=0), 101.0, 500),
        (0.0, Options(stale_if_error=1000), 1000.0, 200),
        (50.0, Options(no_cache=True), 101.0, 500),
        (0.0, Options(no_cache=True, stale_if_error=60), 101.0, 200),
        (0.0, Options(no_cache=True, stale_if_error=60), 10.0, 200),
        (50.0, Options(max_age=10), 110.0, 500),
        (50.0, Options(no_store=True, stale_if_error=60), 101.0, 500),
    ],
)
@virtual_time
async def test_stale_if_error_limits_the_staleness(
    setting: float, asked: Options | None, age: float, status: int
) -> None:
    play = pipeline(says(), error(500), on_error=setting)
    await play.ask()
    await play.clock.sleep(age)
    assert (await play.ask(None, asked)).status == status
    play.assert_nothing_leaked()


@virtual_time
async def test_stale_if_error_serves_either_form() -> None:
    play = pipeline(streams(), error(502), error(502), on_error=50.0)
    first = await play.ask(ask(stream=True))
    await play.clock.sleep(120.0)
    result = await play.ask(ask(stream=True))
    assert (result.body, stale(result)) == (first.body, "stale-if-error: upstream_502")
    result = await play.ask()
    assert (content(result), stale(result)) == ("Hello wörld 🌍", "stale-if-error: upstream_502")


@virtual_time
async def test_stale_if_error_applies_after_every_key_failed() -> None:
    cache = CacheSettings(ttl=TtlSettings(chat=100.0), stale_if_error=5000.0)
    config = settings(pool("k1", "k2"), cache=cache, retry=RetrySettings(jitter=0.0))
    play = PipelineFixture(says(), rate_limited("9000"), rate_limited("9000"), config=replace(config))
    await play.ask()
    await play.clock.sleep(120.0)
    assert stale(await play.ask()) == "stale-if-error: upstream_429"
    assert len(play.transport.sent) == 3
    result = await play.ask(None, None, patience=0.0)  # now both are cooling
    assert stale(result) == "stale-if-error: keys_cooling"
    assert len(play.transport.sent) == 3


@virtual_time
async def test_the_proxys_own_limits_are_no_upstream_failure() -> None:
    cache = CacheSettings(ttl=TtlSettings(chat=10.0), stale_if_error=5000.0)
    config = settings(cache=cache, throttle=ThrottleSettings(limits={"*": Limits(rpm=1)}, max_wait=0.0))
    play = PipelineFixture(says(), config=config)
    await play.ask()
    await play.clock.sleep(11.0)
    assert (await play.ask()).refused == "throttled"


@pytest.mark.parametrize(
    ("status", "error", "may"),
    [
        (502, "upstream_unreachable", True),
        (504, "upstream_timeout", True),
        (503, "circuit_open", True),
        (429, "keys_cooling", True),
        (401, "no_usable_key", True),
        (529, "upstream_529", True),
        (408, "upstream_408", False),
        (401, "upstream_401", False),
        (429, "throttled", False),
        (429, "queue_full", False),
        (429, "client_limit", False),
        (429, "budget_exceeded", False),
        (429, "request_exceeds_limit", False),
        (503, "overloaded", False),
        (503, "draining", False),
        (504, "not_cached", False),
        (499, "client_gone", False),
    ],
)
def test_errors_that_allow_stale(status: int, error: str, may: bool) -> None:
    assert allows_stale(status, error) is may
