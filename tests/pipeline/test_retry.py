"""Retries, pauses, and one deadline over all (docs/keys-and-limits.md)."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from typing import Any

import pytest

from proxy.config.settings import BreakerSettings, RetrySettings, TimeoutSettings
from proxy.protocol.options import Options
from proxy.upstream.keys.states import KeyOutcome
from proxy.upstream.retry.outcome import OutcomeKind, TransportFailure
from tests.pipeline.clock import WALL, virtual_time
from tests.pipeline.fixture import PipelineFixture, ask, pool, settings
from tests.pipeline.script import (
    DONE,
    HANG,
    SSE,
    Fails,
    Move,
    Responds,
    ScriptedTransport,
    Step,
    chunk,
    error,
    event,
    events,
    rate_limited,
    says,
    streams,
)

CUT = TransportFailure("invalid", "cut")


@pytest.mark.parametrize(
    "trouble",
    [
        error(408),
        error(409),
        error(500),
        error(502),
        error(503),
        error(529),
        rate_limited(),
        error(404, None, [("x-should-retry", "true")]),
        Fails("unreached"),
        Fails("ambiguous"),
        streams([event({"error": {"message": "The server had an error", "type": "server_error"}})]),
        streams([b"event: error\n" + event({"type": "error", "code": "server_error", "message": "no"})]),
    ],
)
@virtual_time
async def test_retried_failures_and_their_pauses(trouble: Move) -> None:
    """min(base · 2^attempt + jitter, max): 1, 2, 4 s."""
    pipeline = PipelineFixture(trouble, trouble, trouble, says())
    result = await pipeline.ask()
    assert (result.status, result.at, result.attempts) == (200, 7.0, 4)
    assert [round(sent.at - pipeline.transport.sent[0].at, 3) for sent in pipeline.transport.sent] == [0, 1, 3, 7]
    assert "X-Should-Retry" not in result.headers
    assert pipeline.receipt.attempts == 4
    pipeline.assert_nothing_leaked()


@pytest.mark.parametrize(
    "final",
    [error(400), error(404), error(422), error(500, None, [("x-should-retry", "false")]), error(501, None, [])],
    ids=["400", "404", "422", "500, do not", "501"],
)
@virtual_time
async def test_failures_that_are_not_retried(final: Responds) -> None:
    pipeline = PipelineFixture(final, says())
    result = await pipeline.ask()
    retried = final.status == 501  # a 5xx, after all
    assert result.status == (200 if retried else final.status)
    assert result.attempts == 1 + retried
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_a_429_with_x_should_retry_false_is_returned_and_cools_no_key() -> None:
    pipeline = PipelineFixture(error(429, "rate_limit_exceeded", [("x-should-retry", "false"), ("retry-after", "9")]))
    result = await pipeline.ask()
    assert (result.status, result.attempts) == (429, 1)
    assert dict(result.raw_headers)[b"x-should-retry"] == b"false"
    assert pipeline.state() is None


@virtual_time
async def test_pauses_are_limited_and_jittered() -> None:
    retry = RetrySettings(max_retries=5, base_delay=2.0, max_delay=9.0, jitter=1.0)  # the dice always show 0.5
    pipeline = PipelineFixture(*[error(500)] * 5, says(), config=settings(retry=retry))
    assert (await pipeline.ask()).status == 200
    starts = [sent.at for sent in pipeline.transport.sent]
    pauses = [round(after - before, 6) for before, after in itertools.pairwise(starts)]
    assert pauses == [2.5, 4.5, 8.5, 9.0, 9.0]


@virtual_time
async def test_after_the_last_retry_x_should_retry_is_false() -> None:
    pipeline = PipelineFixture(*[error(500, headers=[("x-should-retry", "true")])] * 4)
    result = await pipeline.ask()
    assert (result.status, result.attempts) == (500, 4)
    assert result.headers["X-Should-Retry"] == "false"
    assert b"x-should-retry" not in dict(result.raw_headers)  # the upstream's own would contradict it
    assert "X-Proxy-Error" not in result.headers
    assert pipeline.receipt.error == "upstream_500"
    pipeline.assert_nothing_leaked()


@pytest.mark.parametrize(
    ("kind", "code"), [("unreached", "upstream_unreachable"), ("ambiguous", "upstream_unreachable")]
)
@virtual_time
async def test_an_unreachable_upstream_is_a_502(kind: str, code: str) -> None:
    pipeline = PipelineFixture(*[Fails(kind)] * 4)  # type: ignore[arg-type]
    result = await pipeline.ask()
    assert (result.status, result.refused, result.attempts) == (502, code, 4)
    assert result.refusal is not None
    assert result.refusal.should_retry is False
    assert pipeline.receipt.error == code
    # What never went up gets its whole reservation back; what went up keeps its request and the estimate.
    assert pipeline.used()["rpm"] == (0 if kind == "unreached" else 4)
    assert (pipeline.used()["tpm"] > 0) is (kind == "ambiguous")
    pipeline.assert_nothing_leaked()


@pytest.mark.parametrize(("asked", "attempts"), [(0, 1), (1, 2), (5, 6)])
@virtual_time
async def test_a_request_can_set_max_retries(asked: int, attempts: int) -> None:
    pipeline = PipelineFixture(*[error(500)] * 6)
    result = await pipeline.ask(None, Options(max_retries=asked))
    assert result.attempts == attempts
    # Without any of ours, the client's own retries multiply nothing.
    assert result.headers.get("X-Should-Retry") == ("false" if asked else None)


@virtual_time
async def test_ambiguous_failures_are_retried_only_if_allowed() -> None:
    """The request may have been executed: a second one may cost a second time."""
    pipeline = PipelineFixture(Fails("ambiguous"), config=settings(retry=RetrySettings(ambiguous=False)))
    result = await pipeline.ask()
    assert (result.status, result.refused, result.attempts) == (502, "upstream_unreachable", 1)
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_a_stale_connection_is_replaced_once_without_a_pause() -> None:
    """A reused connection that closed without a byte: the next one is new, with no pause and no retry spent."""
    pipeline = PipelineFixture(Fails("stale"), says(), config=settings(retry=RetrySettings(max_retries=0)))
    result = await pipeline.ask()
    assert (result.status, result.at, result.attempts) == (200, 0.0, 2)
    assert [sent.connection.fresh for sent in pipeline.transport.sent] == [False, True]
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_a_second_stale_connection_counts_as_ambiguous() -> None:
    pipeline = PipelineFixture(Fails("stale"), Fails("stale"), says())
    result = await pipeline.ask()
    assert (result.status, result.at) == (200, 1.0)
    assert [sent.connection.fresh for sent in pipeline.transport.sent] == [False, True, False]
    cautious = PipelineFixture(Fails("stale"), Fails("stale"), config=settings(retry=RetrySettings(ambiguous=False)))
    assert (await cautious.ask()).refused == "upstream_unreachable"
    cautious.assert_nothing_leaked()


# Retry-After.

HTTP_DATE = "Mon, 21 Sep 2026 14:13:40 GMT"


@pytest.mark.parametrize(
    ("value", "pause"),
    [
        ("20", 20.0),
        ("2.5", 2.5),
        ("0", 1.0),
        ("6m0s", 360.0),
        (HTTP_DATE, 20.0),
        ("Mon, 21 Sep 2020 14:13:40 GMT", 1.0),
        ("-5", 1.0),
        ("nonsense", 1.0),
        ("nan", 1.0),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
@virtual_time
async def test_no_retry_is_sent_before_retry_after(status: int, value: str, pause: float) -> None:
    assert WALL == 1_790_000_000.0  # 14:13:20 of that day
    pipeline = PipelineFixture(error(status, None, [("Retry-After", value)]), says())
    result = await pipeline.ask(total=1000.0)
    assert (result.status, result.at) == (200, pause)


@virtual_time
async def test_a_retry_after_beyond_the_deadline_returns_the_response_at_once() -> None:
    pipeline = PipelineFixture(rate_limited("61"), config=settings(timeouts=TimeoutSettings(total=60.0)))
    result = await pipeline.ask()
    assert (result.status, result.at, result.attempts) == (429, 0.0, 1)
    assert dict(result.raw_headers)[b"Retry-After"] == b"61"
    assert "X-Should-Retry" not in result.headers  # the client may well wait that long
    assert pipeline.state() == ("cooling", 61.0)
    pipeline.assert_nothing_leaked()


# The deadline.


@pytest.mark.parametrize(
    "slow",
    [
        Fails("hang"),
        Responds(wait=99.0),
        says(wait=11.0),
        Responds(body=(b"{", HANG)),
        Responds(body=(HANG,)),
        Responds(500, body=(b"{", HANG)),
        Responds(400, (SSE,), (HANG,)),
    ],
)
@virtual_time
async def test_the_deadline_ends_a_request_in_every_phase(slow: Move) -> None:
    """504 when the time is over, whatever was being waited for; and nobody is asked again: it may have been done."""
    pipeline = PipelineFixture(slow)
    result = await pipeline.ask(ask(stream=True), total=10.0)
    assert (result.status, result.refused, result.at) == (504, "upstream_timeout", 10.0)
    assert (pipeline.receipt.status, pipeline.receipt.error) == (504, "upstream_timeout")
    assert pipeline.used()["tpm"] > 0  # it went up: the estimate stays
    pipeline.assert_nothing_leaked()


@pytest.mark.parametrize(
    "slow",
    [
        (b": ping\n\n", HANG),
        (b": ping\n\n", 4.0, b": ping\n\n", 4.0, b": ping\n\n", 4.0, *events()),
    ],
)
@virtual_time
async def test_the_deadline_ends_a_stream_without_an_event(slow: tuple[Any, ...]) -> None:
    """Its comments have gone down already, so an error event says it."""
    pipeline = PipelineFixture(Responds(200, (SSE,), slow))
    result = await pipeline.ask(ask(stream=True), total=10.0)
    assert (result.status, result.broken, result.at) == (200, True, 10.0)
    assert b'"code":"upstream_timeout"' in result.body
    assert pipeline.receipt.error == "upstream_timeout"
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_an_endless_connect_ends_at_the_deadline() -> None:
    pipeline = PipelineFixture(Fails("hang connecting"))
    result = await pipeline.ask(total=10.0)
    assert (result.status, result.at) == (502, 10.0)
    assert pipeline.used() == {"rpm": 0, "tpm": 0, "concurrency": 0}
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_the_first_byte_has_its_own_limit() -> None:
    config = settings(timeouts=TimeoutSettings(first_byte=3.0, total=60.0))
    pipeline = PipelineFixture(Fails("hang"), config=config)
    result = await pipeline.ask(None, Options(max_retries=0))
    assert (result.refused, result.at) == ("upstream_timeout", 3.0)
    pipeline = PipelineFixture(Fails("hang"), config=config)
    assert (await pipeline.ask(total=2.0)).at == pytest.approx(2.0)
    pipeline = PipelineFixture(says(wait=2.9), config=config)
    assert (await pipeline.ask()).status == 200


@virtual_time
async def test_an_upstream_that_is_silent_for_first_byte_is_asked_again() -> None:
    config = settings(timeouts=TimeoutSettings(first_byte=3.0, total=60.0), retry=RetrySettings(jitter=0.0))
    pipeline = PipelineFixture(Fails("hang"), says(), config=config)
    result = await pipeline.ask()
    assert (result.status, result.attempts, result.at) == (200, 2, 4.0)
    pipeline = PipelineFixture(Fails("hang"), config=replace(config, retry=RetrySettings(jitter=0.0, ambiguous=False)))
    result = await pipeline.ask()
    assert (result.refused, result.at) == ("upstream_timeout", 3.0)
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_the_proxy_begins_nothing_that_would_end_after_the_client_has_given_up() -> None:
    """No pause and no wait reaches beyond `act_until`; a call under way is left to the client's own timeout."""
    pipeline = PipelineFixture(*[error(500)] * 3)
    result = await pipeline.ask(act_for=6.0)
    assert (result.status, result.at, result.attempts) == (500, 3.0, 3)
    pipeline = PipelineFixture(says(wait=20.0))
    result = await pipeline.ask(act_for=6.0)
    assert (result.status, result.at) == (200, 20.0)
    pipeline = PipelineFixture(rate_limited("2"), says())
    assert (await pipeline.ask(act_for=1.0)).status == 429
    result = await pipeline.ask(act_for=1.0)
    assert (result.refused, result.at) == ("keys_cooling", 0.0)
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_a_joining_request_lets_the_proxy_act_for_longer() -> None:
    pipeline = PipelineFixture(error(500), says())
    first = asyncio.create_task(pipeline.ask(act_for=0.5))
    await asyncio.sleep(0)
    second = asyncio.create_task(pipeline.ask())
    assert [(await task).status for task in (first, second)] == [200, 200]
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_a_permit_granted_at_the_deadline_is_not_used() -> None:
    """No call is made, none is counted, and the place is given back."""
    pipeline = PipelineFixture()
    pipeline.services.pool.record_outcome(
        pipeline.services.pool.keys[0], "gpt-4o", KeyOutcome(OutcomeKind.RATE_LIMITED, pipeline.loop.time(), 3.0)
    )
    result = await pipeline.ask(total=3.0)
    assert (result.status, result.refused, result.attempts, result.at) == (504, "upstream_timeout", 0, 3.0)
    assert "X-Proxy-Upstream" not in result.headers
    assert pipeline.used() == {"rpm": 0, "tpm": 0, "concurrency": 0}
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_no_pause_reaches_beyond_the_deadline() -> None:
    """1 s, then 2 s, then 4 s would be too late: the answer in hand is given before the client gives up."""
    pipeline = PipelineFixture(*[error(500)] * 3)
    result = await pipeline.ask(total=6.0)
    assert (result.status, result.at, result.attempts) == (500, 3.0, 3)
    assert result.headers["X-Should-Retry"] == "false"


@virtual_time
async def test_a_first_pause_beyond_the_deadline_returns_the_response() -> None:
    pipeline = PipelineFixture(error(500))
    result = await pipeline.ask(total=0.5)
    assert (result.status, result.attempts) == (500, 1)
    assert "X-Should-Retry" not in result.headers  # none of ours was made


@virtual_time
async def test_one_deadline_over_queue_attempts_and_pauses() -> None:
    """3 s in the queue, 4 s for a 500, a pause of 1 s: 2 s are left of ten."""
    pipeline = PipelineFixture(error(500, wait=4.0), Fails("hang"))
    pipeline.services.pool.record_outcome(
        pipeline.services.pool.keys[0], "gpt-4o", KeyOutcome(OutcomeKind.RATE_LIMITED, pipeline.loop.time(), 3.0)
    )
    result = await pipeline.ask(total=10.0)
    assert (result.refused, result.at) == ("upstream_timeout", 10.0)
    assert pipeline.transport.sent[1].first_byte == pytest.approx(2.0)
    receipt = pipeline.receipt
    assert (receipt.queue_ms, receipt.upstream_ms, receipt.total_ms) == pytest.approx((4000, 6000, 10_000))


@virtual_time
async def test_a_stream_that_has_begun_may_outlast_the_deadline() -> None:
    steps: list[Step] = [event(chunk("a")), 100.0, event(chunk("b")), 100.0, event(chunk(None, "stop")), DONE]
    pipeline = PipelineFixture(streams(steps))
    result = await pipeline.ask(ask(stream=True), total=10.0)
    assert (result.status, result.broken, result.at) == (200, False, 200.0)


# What is never sent again.


@pytest.mark.parametrize(
    "broken",
    [
        Responds(body=(b'{"id":', CUT)),
        Responds(500, body=(b'{"id":', CUT)),
        Responds(200, (SSE,), (CUT,)),
        Responds(200, (SSE,), (b"data: {", CUT)),
        Responds(200, (SSE,), ()),
        Responds(301, (("Location", "http://elsewhere.test/v1"),)),
        Responds(307, (("Location", "/v1"),)),
        Responds(304),
        Fails("invalid"),
        Responds(429, body=(b" " * 5_000_000, b" " * 5_000_000)),
    ],
)
@virtual_time
async def test_a_broken_response_is_502_and_not_retried(broken: Move) -> None:
    pipeline = PipelineFixture(broken)
    result = await pipeline.ask(ask(stream=True))
    assert (result.status, result.refused, result.attempts) == (502, "upstream_invalid_response", 1)
    assert (pipeline.receipt.status, pipeline.receipt.error) == (502, "upstream_invalid_response")
    pipeline.assert_nothing_leaked()


# The budget.

UNBROKEN = settings(retry=RetrySettings(jitter=0.0), breaker=BreakerSettings(failures=1000))


@virtual_time
async def test_retries_are_bounded_by_a_share_of_the_requests() -> None:
    """Everything fails: ten retries in ten seconds and a fifth of the requests, however many ask."""
    pipeline = PipelineFixture(transport=ScriptedTransport(otherwise=lambda sent: error(503)), config=UNBROKEN)
    asked = [pipeline.loop.create_task(pipeline.ask(ask(str(n)))) for n in range(50)]
    tolds = [await task for task in asked]
    assert {result.status for result in tolds} == {503}
    assert all(result.headers["X-Should-Retry"] == "false" for result in tolds)
    assert len(pipeline.transport.sent) == 50 + 10 + 10
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_each_upstream_has_its_own_budget() -> None:
    spare = pool("k2", name="spare", priority=1)
    config = settings(pool("k1"), spare, retry=RetrySettings(budget=0.0, jitter=0.0, max_delay=1.0))
    pipeline = PipelineFixture(transport=ScriptedTransport(otherwise=lambda sent: error(503)), config=config)
    for n in range(12):
        await pipeline.ask(ask(str(n)), Options(max_retries=1))
    budgets = [upstream.budget for upstream in pipeline.services.upstreams]
    assert budgets[1].take(pipeline.loop.time())  # nobody used it
