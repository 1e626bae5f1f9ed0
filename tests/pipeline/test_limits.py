"""Limits: reserved before, settled after by what was used, on every way out (docs/keys-and-limits.md)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from proxy.config.limits import Limits
from proxy.config.settings import RetrySettings, Settings, ThrottleSettings
from proxy.protocol.options import Options
from proxy.upstream.limits.estimate import estimate_tokens
from proxy.upstream.retry.outcome import TransportFailure
from tests.pipeline.clock import settled, virtual_time
from tests.pipeline.fixture import PipelineFixture, Result, ask, pool, settings
from tests.pipeline.script import (
    HANG,
    Fails,
    Move,
    Responds,
    ScriptedTransport,
    chunk,
    error,
    event,
    events,
    rate_limited,
    says,
    streams,
)

CUT = TransportFailure("invalid", "cut")
FIFTY: dict[str, Any] = {"max_tokens": 50}
ESTIMATE = estimate_tokens("chat", ask(**FIFTY))
ONCE = RetrySettings(max_retries=0, jitter=0.0)


def limited(max_queue: int = 1000, max_wait: float | None = 60.0, **limits: int) -> Settings:
    table = {"*": Limits(**limits)}
    return settings(throttle=ThrottleSettings(limits=table, max_queue=max_queue, max_wait=max_wait), retry=ONCE)


def endless(wait: float = 0.0) -> ScriptedTransport:
    return ScriptedTransport(otherwise=lambda sent: says(wait=wait))


def start(pipeline: PipelineFixture, name: object, **more: Any) -> asyncio.Task[Result]:
    return pipeline.loop.create_task(pipeline.ask(ask(str(name), **FIFTY), **more), name=str(name))


SETTLED: dict[str, tuple[Move, bool, int | None]] = {
    # what happens, streamed or not -> tokens in the end (None: it never went up)
    "a whole answer": (says(), False, 300),
    "without usage": (says({"choices": []}), False, ESTIMATE),
    "with nonsense for usage": (says({"usage": {"prompt_tokens": -1, "completion_tokens": 5}}), False, ESTIMATE),
    "an HTML page": (Responds(200, (("Content-Type", "text/html"),), (b"<p>",)), False, ESTIMATE),
    "204": (Responds(204), False, ESTIMATE),
    "an error": (error(400), False, 0),
    "a 500": (error(500), False, 0),
    "a 429": (rate_limited(), False, 0),
    "a redirect": (Responds(302), False, ESTIMATE),
    "cut JSON": (Responds(200, body=(b"{", CUT)), False, ESTIMATE),
    "broken JSON": (Responds(200, body=(b"{",)), False, ESTIMATE),
    "too slow a body": (Responds(200, body=(b"{", HANG)), False, ESTIMATE),
    "refused": (Fails("unreached"), False, None),
    "ambiguous": (Fails("ambiguous"), False, ESTIMATE),
    "no answer": (Fails("hang"), False, ESTIMATE),
    "no connection": (Fails("hang connecting"), False, None),
    "a stream": (streams(), True, 300),
    "a stream without usage": (streams(events()), True, ESTIMATE),
    "a cut stream": (streams([*events()[:2], CUT]), True, ESTIMATE),
    "a stream cut after its usage": (streams([*events(usage=True)[:-1], CUT]), True, 300),
    "an error as first event": (streams([event({"error": {"message": "no", "type": "server_error"}})]), True, 0),
    "a bad request as first event": (
        streams([event({"error": {"message": "no", "type": "invalid_request_error"}})]),
        True,
        ESTIMATE,
    ),
    "an error in the middle": (streams([event(chunk("a")), event({"error": {"message": "no"}})]), True, ESTIMATE),
}


@pytest.mark.parametrize(("move", "stream", "tokens"), SETTLED.values(), ids=SETTLED.keys())
@virtual_time
async def test_the_final_count_of_a_request(move: Move, stream: bool, tokens: int | None) -> None:
    pipeline = PipelineFixture(move, config=limited(rpm=100, tpm=100_000, concurrency=10))
    await pipeline.ask(ask(stream=stream, **FIFTY))
    assert pipeline.used() == {"rpm": 0 if tokens is None else 1, "tpm": tokens or 0, "concurrency": 0}
    pipeline.assert_nothing_leaked()
    assert len(pipeline.receipts) == 1


@virtual_time
async def test_the_estimate_is_reserved_while_a_request_runs() -> None:
    pipeline = PipelineFixture(says(wait=5.0), config=limited(rpm=100, tpm=100_000, concurrency=10))
    task = start(pipeline, "Hi")
    await settled()
    assert pipeline.used() == {"rpm": 1, "tpm": ESTIMATE, "concurrency": 1}
    await task
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_a_window_is_used_fully_and_never_exceeded() -> None:
    """25 requests at 10 a minute: ten at once, ten after a minute, five after two."""
    pipeline = PipelineFixture(transport=endless(), config=limited(rpm=10, max_wait=200.0))
    tasks = [start(pipeline, n, total=500.0) for n in range(25)]
    for task in tasks:
        assert (await task).status == 200
    starts = [sent.at - pipeline.transport.sent[0].at for sent in pipeline.transport.sent]
    assert starts == sorted(starts)
    assert starts[:10] == [0.0] * 10
    assert all(60 <= start <= 63 for start in starts[10:20])
    assert all(120 <= start <= 126 for start in starts[20:])
    asked = [sent.json()["messages"][0]["content"] for sent in pipeline.transport.sent]
    assert asked == [str(n) for n in range(25)]  # first come, first served
    assert pipeline.services.admission.depth == 0


@virtual_time
async def test_a_free_permit_is_handed_on_at_once() -> None:
    pipeline = PipelineFixture(transport=endless(wait=2.0), config=limited(concurrency=2))
    tasks = [start(pipeline, n) for n in range(6)]
    tolds = [await task for task in tasks]
    assert [result.at for result in tolds] == pytest.approx([2, 2, 4, 4, 6, 6])
    queue = [float(result.headers["Server-Timing"].partition("queue;dur=")[2].partition(",")[0]) for result in tolds]
    assert queue == pytest.approx([0, 0, 2000, 2000, 4000, 4000])
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_an_error_returns_its_tokens_to_waiting_requests() -> None:
    """The first takes all of the tokens and fails: the second need not wait for the window to pass."""
    pipeline = PipelineFixture(error(400, wait=3.0), says(), config=limited(tpm=2 * ESTIMATE - 1, max_wait=200.0))
    first, second = (start(pipeline, name, total=500.0) for name in ("Hi", "Ho"))
    assert [(await first).at, (await second).at] == pytest.approx([3.0, 3.0])
    pipeline.assert_nothing_leaked()


@pytest.mark.parametrize(
    ("options", "total", "patience"), [(None, 30.0, 60.0), (None, 100.0, 30.0), (Options(max_wait=30.0), 100.0, None)]
)
@virtual_time
async def test_a_wait_that_cannot_succeed_is_refused_at_once(
    options: Options | None, total: float, patience: float | None
) -> None:
    """With an honest delay: by then there is room."""
    pipeline = PipelineFixture(says(), says(), config=limited(rpm=1))
    await pipeline.ask()
    await pipeline.clock.sleep(10.0)
    result = await pipeline.ask(ask("other"), options, total=total, patience=patience)
    assert (result.status, result.refused, result.at, result.attempts) == (429, "throttled", 0.0, 0)
    assert result.refusal is not None
    assert result.refusal.should_retry is None
    assert result.refusal.retry_after is not None
    assert 50.0 <= result.refusal.retry_after <= 51.0
    assert (pipeline.receipt.error, pipeline.receipt.attempts) == ("throttled", 0)
    await pipeline.clock.sleep(result.refusal.retry_after)
    assert (await pipeline.ask(ask("other"), options, total=1.0)).status == 200


@virtual_time
async def test_a_full_queue_refuses_requests() -> None:
    pipeline = PipelineFixture(transport=endless(wait=5.0), config=limited(max_queue=2, concurrency=1))
    tasks = [start(pipeline, n) for n in range(3)]
    await settled()
    assert pipeline.services.admission.depth == 2
    result = await pipeline.ask(ask("one too many"))
    assert (result.status, result.refused, result.at) == (429, "queue_full", 0.0)
    assert result.refusal is not None
    assert result.refusal.retry_after is not None
    for task in tasks:
        assert (await task).status == 200
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_a_request_larger_than_the_window_fails_at_once() -> None:
    pipeline = PipelineFixture(config=limited(tpm=100))
    result = await pipeline.ask(ask("x" * 1000))
    assert (result.status, result.refused, result.at) == (429, "request_exceeds_limit", 0.0)
    assert result.refusal is not None
    assert (result.refusal.retry_after, result.refusal.should_retry) == (None, False)
    assert pipeline.receipt.error == "request_exceeds_limit"
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_hits_use_no_limit_and_do_not_wait() -> None:
    pipeline = PipelineFixture(says(), config=limited(rpm=1))
    await pipeline.ask()
    for _ in range(20):
        result = await pipeline.ask()
        assert (result.cache, result.at) == ("hit", 0.0)
    assert pipeline.used()["rpm"] == 1


@virtual_time
async def test_a_retry_pause_holds_no_permit() -> None:
    """While one waits for its retry, another may use the concurrency."""
    config = settings(
        throttle=ThrottleSettings(limits={"*": Limits(concurrency=1)}), retry=RetrySettings(base_delay=10.0, jitter=0.0)
    )
    pipeline = PipelineFixture(error(500), says(wait=3.0), says(), config=config)
    first, second = start(pipeline, "a"), start(pipeline, "b")
    assert ((await second).at, (await first).at) == pytest.approx((3.0, 10.0))
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_max_wait_covers_all_waits_of_a_request() -> None:
    """20 s waited before the first attempt: the second may wait for 10 s only, not for 30 again."""
    config = settings(
        throttle=ThrottleSettings(limits={"*": Limits(rpm=2)}, max_wait=30.0), retry=RetrySettings(jitter=0.0)
    )
    pipeline = PipelineFixture(says(), says(), error(500), says(), config=config)
    await pipeline.ask(ask("a"))
    await pipeline.clock.sleep(40.0)
    await pipeline.ask(ask("b"))
    result = await pipeline.ask(ask("c"), total=500.0)  # 20.6 s for the first place; the next is free at 100.6 s
    assert (result.status, result.refused, result.attempts) == (429, "throttled", 1)
    assert result.at == pytest.approx(21.6, abs=0.1)


@pytest.mark.parametrize("stream", [True, False])
@virtual_time
async def test_without_limits_nothing_is_counted(stream: bool) -> None:
    pipeline = PipelineFixture(
        rate_limited("5"), streams() if stream else says(), config=settings(throttle=ThrottleSettings())
    )
    result = await pipeline.ask(ask(stream=stream))
    assert (result.status, result.at) == (200, 5.0)
    assert pipeline.services.pool.rate_limiter(pipeline.services.pool.keys[0], "gpt-4o", 0.0) is None
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_without_max_tokens_the_mean_usage_is_reserved() -> None:
    """200 tokens of answer, plain and streamed, are reserved for the next one; a limit of its own counts instead."""
    for stream in (False, True):
        pipeline = PipelineFixture(streams() if stream else says(), transport=None, config=limited(tpm=100_000))
        await pipeline.ask(ask("a", stream=stream))
        before = pipeline.used()["tpm"]
        pipeline.transport.queue += [says(wait=5.0), says(wait=5.0)]
        free = pipeline.loop.create_task(pipeline.ask(ask("b")))
        await settled()
        learned = pipeline.used()["tpm"] - before
        assert learned == estimate_tokens("chat", ask("b"), pipeline.services.calibration.output("gpt-4o")) > 100
        bound = pipeline.loop.create_task(pipeline.ask(ask("b", max_tokens=7)))
        await settled()
        assert pipeline.used()["tpm"] - before - learned == estimate_tokens("chat", ask("b", max_tokens=7))
        await free
        await bound


@virtual_time
async def test_an_openai_tier_does_not_apply_to_azure() -> None:
    config = settings(pool("k1"), throttle=ThrottleSettings(tier="free"))
    pipeline = PipelineFixture(transport=endless(), config=config)
    for n in range(3):
        assert (await pipeline.ask(ask(str(n)))).status == 200
    result = await pipeline.ask(ask("4"), patience=1.0)
    assert (result.refused, pipeline.used()["rpm"]) == ("throttled", 3)
    azure = pool("a1", kind="azure", deployments={"*": "d"})
    pipeline = PipelineFixture(transport=endless(), config=settings(azure, throttle=ThrottleSettings(tier="free")))
    assert not pipeline.services.pool.limited
