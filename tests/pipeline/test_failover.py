"""If an upstream fails: the next priority, the circuit breaker, fallback models (docs/keys-and-limits.md)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proxy.config.settings import BreakerSettings, RetrySettings, Settings
from proxy.protocol.options import Options
from tests.pipeline.clock import virtual_time
from tests.pipeline.fixture import PipelineFixture, ask, pool, settings
from tests.pipeline.script import (
    Fails,
    Move,
    Responds,
    ScriptedTransport,
    Sent,
    error,
    event,
    rate_limited,
    says,
    streams,
)

QUICK = RetrySettings(jitter=0.0, base_delay=1.0, max_delay=1.0)


def two(**sections: object) -> Settings:
    """Provisioned capacity first, then pay-as-you-go."""
    return settings(pool("ptu"), pool("payg", name="spare", priority=1), **{"retry": QUICK, **sections})


def by_key(**moves: Move) -> ScriptedTransport:
    return ScriptedTransport(otherwise=lambda sent: moves.get(sent.key) or says())


def by_model(**moves: Move) -> Callable[[Sent], Move]:
    return lambda sent: moves.get(sent.json()["model"].replace("-", "_")) or says()


# Priorities.


@virtual_time
async def test_the_next_priority_is_used_when_the_retries_are_spent() -> None:
    pipeline = PipelineFixture(transport=by_key(ptu=error(500)), config=two())
    result = await pipeline.ask()
    assert (result.status, result.headers["X-Proxy-Key"], result.at) == (200, "payg", 3.0)
    assert pipeline.transport.keys == ["ptu"] * 4 + ["payg"]
    assert "X-Should-Retry" not in result.headers
    pipeline.assert_nothing_leaked()


@pytest.mark.parametrize("trouble", [Fails("unreached"), Fails("ambiguous"), Fails("timeout"), error(503), error(408)])
@virtual_time
async def test_failures_that_may_be_resent_fail_over(trouble: Move) -> None:
    pipeline = PipelineFixture(transport=by_key(ptu=trouble), config=two())
    result = await pipeline.ask(None, Options(max_retries=0))
    assert (result.status, pipeline.transport.keys, result.at) == (200, ["ptu", "payg"], 0.0)
    pipeline.assert_nothing_leaked()


@pytest.mark.parametrize(("trouble", "status"), [(error(400), 400), (Fails("invalid"), 502), (error(422), 422)])
@virtual_time
async def test_failures_that_may_not_be_resent_do_not_fail_over(trouble: Move, status: int) -> None:
    pipeline = PipelineFixture(transport=by_key(ptu=trouble), config=two())
    result = await pipeline.ask()
    assert (result.status, pipeline.transport.keys) == (status, ["ptu"])
    pipeline.assert_nothing_leaked()


@pytest.mark.parametrize(
    ("trouble", "code"), [(Fails("ambiguous"), "upstream_unreachable"), (Fails("timeout"), "upstream_timeout")]
)
@virtual_time
async def test_without_ambiguous_no_lost_request_fails_over(trouble: Move, code: str) -> None:
    pipeline = PipelineFixture(transport=by_key(ptu=trouble), config=two(retry=RetrySettings(ambiguous=False)))
    result = await pipeline.ask()
    assert (result.refused, pipeline.transport.keys) == (code, ["ptu"])
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_a_rate_limited_priority_fails_over_at_once() -> None:
    pipeline = PipelineFixture(transport=by_key(ptu=rate_limited("30")), config=two())
    for number in range(3):
        result = await pipeline.ask(ask(str(number)), Options(max_retries=0))
        assert (result.status, result.headers["X-Proxy-Key"]) == (200, "payg")
    assert pipeline.transport.keys == ["ptu", "payg", "payg", "payg"]


@virtual_time
async def test_if_every_priority_fails_x_should_retry_is_false() -> None:
    pipeline = PipelineFixture(transport=by_key(ptu=error(500), payg=error(503)), config=two())
    result = await pipeline.ask()
    assert (result.status, result.headers["X-Should-Retry"]) == (503, "false")
    assert pipeline.transport.keys == ["ptu"] * 4 + ["payg"]  # the retries are the request's, not each tier's
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_if_the_next_priority_cools_too_long_the_response_is_returned() -> None:
    pipeline = PipelineFixture(rate_limited("1"), rate_limited("600"), says(), error(500), config=two())
    assert (await pipeline.ask()).status == 200  # ptu, after its second; payg cools for ten minutes
    result = await pipeline.ask(ask("next"), Options(max_retries=0))
    assert (result.status, pipeline.transport.keys) == (500, ["ptu", "payg", "ptu", "ptu"])
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_two_upstreams_of_equal_priority_fail_over() -> None:
    regions = settings(pool("east", name="east"), pool("west", name="west"), retry=QUICK)
    pipeline = PipelineFixture(transport=by_key(east=error(503)), config=regions)
    for number in range(8):
        result = await pipeline.ask(ask(str(number)))
        assert (result.status, result.headers["X-Proxy-Key"]) == (200, "west")
    # A retry goes to the other region, and after five requests in a row nobody asks the first any more.
    assert pipeline.transport.keys.count("east") == 5
    pipeline.assert_nothing_leaked()


# The breaker.


def one(**breaker: float) -> Settings:
    return settings(retry=RetrySettings(max_retries=0), breaker=BreakerSettings(**{"failures": 3, **breaker}))  # type: ignore[arg-type]


@virtual_time
async def test_the_circuit_opens_after_repeated_failures() -> None:
    pipeline = PipelineFixture(transport=ScriptedTransport(otherwise=lambda sent: error(500)), config=one())
    assert [(await pipeline.ask(ask(str(n)))).status for n in range(3)] == [500] * 3
    result = await pipeline.ask()
    assert (result.status, result.refused) == (503, "circuit_open")
    assert result.refusal is not None
    assert result.refusal.retry_after == 15.0
    assert result.refusal.should_retry is None
    assert len(pipeline.transport.sent) == 3
    pipeline.assert_nothing_leaked()


@pytest.mark.parametrize(("answer", "after"), [(says(), 200), (error(500), 503), (error(400), 200)])
@virtual_time
async def test_one_request_probes_an_open_circuit(answer: Responds, after: int) -> None:
    pipeline = PipelineFixture(transport=ScriptedTransport(otherwise=lambda sent: error(500)), config=one())
    for n in range(3):
        await pipeline.ask(ask(str(n)))
    pipeline.transport.otherwise = lambda sent: says()
    await pipeline.services.clock.sleep(15.0)
    slow = Responds(answer.status, answer.headers, answer.body, wait=2.0)
    pipeline.transport.queue.append(slow)
    probe = pipeline.loop.create_task(pipeline.ask(ask("probe")))
    await pipeline.services.clock.sleep(1.0)
    assert (await pipeline.ask(ask("meanwhile"))).refused == "circuit_open"
    assert (await probe).status == answer.status
    assert (await pipeline.ask(ask("after"))).status == after
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_retries_of_one_request_do_not_open_the_circuit() -> None:
    config = settings(retry=QUICK, breaker=BreakerSettings(failures=2))
    pipeline = PipelineFixture(transport=ScriptedTransport(otherwise=lambda sent: error(500)), config=config)
    assert (await pipeline.ask(None, Options(max_retries=10))).attempts == 11
    assert pipeline.services.upstreams[0].breaker.state(pipeline.loop.time()) == "closed"


@virtual_time
async def test_failures_mended_by_a_retry_do_not_open_the_circuit() -> None:
    pipeline = PipelineFixture(*[error(500)] * 10, *[says()] * 10, config=settings(retry=QUICK))
    tasks = [pipeline.loop.create_task(pipeline.ask(ask(str(n)))) for n in range(10)]
    assert [(await task).status for task in tasks] == [200] * 10
    assert pipeline.services.upstreams[0].breaker.state(pipeline.loop.time()) == "closed"


@virtual_time
async def test_a_clients_short_timeout_does_not_open_the_circuit() -> None:
    pipeline = PipelineFixture(transport=ScriptedTransport(otherwise=lambda sent: Fails("hang")), config=one())
    for n in range(5):
        result = await pipeline.ask(ask(str(n)), total=1.0)
        assert result.refused == "upstream_timeout"


@virtual_time
async def test_a_request_in_retry_when_the_circuit_opens_gets_the_upstreams_response() -> None:
    config = settings(retry=RetrySettings(jitter=0.0, base_delay=5.0), breaker=BreakerSettings(failures=3))
    pipeline = PipelineFixture(
        transport=ScriptedTransport(otherwise=lambda sent: error(500, message="ours")), config=config
    )
    waiting = pipeline.loop.create_task(pipeline.ask(ask("waits")))
    await pipeline.services.clock.sleep(1.0)
    for n in range(3):
        await pipeline.ask(ask(str(n)), Options(max_retries=0))
    result = await waiting
    assert (result.status, result.attempts, result.headers["X-Should-Retry"]) == (500, 1, "false")
    assert result.json()["error"]["message"] == "ours"
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_an_open_circuit_fails_over_at_once() -> None:
    config = two(retry=RetrySettings(max_retries=0), breaker=BreakerSettings(failures=2))
    pipeline = PipelineFixture(transport=by_key(ptu=error(500)), config=config)
    for n in range(5):
        assert (await pipeline.ask(ask(str(n)))).headers["X-Proxy-Key"] == "payg"
    assert pipeline.transport.keys.count("ptu") == 2


# The last answer of a stream.


@virtual_time
async def test_a_persistent_error_event_sets_x_should_retry_false() -> None:
    told_off = streams([event({"error": {"message": "overloaded", "type": "server_error"}})])
    pipeline = PipelineFixture(
        transport=ScriptedTransport(otherwise=lambda sent: told_off), config=settings(retry=QUICK)
    )
    result = await pipeline.ask(ask(stream=True))
    assert (result.status, result.attempts, result.headers["X-Should-Retry"]) == (200, 4, "false")
    assert b"overloaded" in result.body
    pipeline.assert_nothing_leaked()


# Other models.


def fallback(*models: str, **sections: object) -> Settings:
    retry = RetrySettings(max_retries=0, fallbacks={"gpt-4o": models})
    return settings(pool("k1"), **{"retry": retry, **sections})


def given_back(pipeline: PipelineFixture) -> None:
    """As `balanced`, which counts one model's requests only."""
    assert all(reply.given_back for reply in pipeline.transport.replies)
    for model in ("gpt-4o", "gpt-4o-mini", "a", "b"):
        assert pipeline.used(model=model)["concurrency"] == 0


FAILURES = {
    "500": error(500),
    "429": rate_limited("600"),
    "401": error(401),
    "404": error(404, "model_not_found"),
    "unreachable": Fails("unreached"),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
@pytest.mark.parametrize("stream", [False, True])
@virtual_time
async def test_a_fallback_model_is_named_in_the_response(failure: Move, stream: bool) -> None:
    pipeline = PipelineFixture(failure, config=fallback("gpt-4o-mini"))
    pipeline.transport.otherwise = lambda sent: streams() if stream else says()
    result = await pipeline.ask(ask(stream=stream))
    assert (result.status, result.headers["X-Proxy-Model"], result.attempts) == (200, "gpt-4o-mini", 2)
    assert [sent.json()["model"] for sent in pipeline.transport.sent] == ["gpt-4o", "gpt-4o-mini"]
    assert "stored" not in result.headers["Cache-Status"]
    assert pipeline.receipt.model == "gpt-4o-mini"
    pipeline.transport.queue.clear()
    again = await pipeline.ask(ask(stream=stream), Options(max_wait=0.0))
    assert again.cache == "miss"  # nothing was stored under the name that was asked for
    given_back(pipeline)


@pytest.mark.parametrize("failure", [error(400), error(422), Fails("invalid")])
@virtual_time
async def test_client_errors_use_no_fallback_model(failure: Move) -> None:
    pipeline = PipelineFixture(failure, config=fallback("gpt-4o-mini"))
    result = await pipeline.ask()
    assert "X-Proxy-Model" not in result.headers
    assert len(pipeline.transport.sent) == 1


@virtual_time
async def test_fallback_models_are_tried_in_order_and_else_the_first_failure_is_returned() -> None:
    pipeline = PipelineFixture(config=fallback("a", "b"))
    pipeline.transport.otherwise = by_model(gpt_4o=error(503, message="asked for"), a=error(500), b=error(400))
    result = await pipeline.ask()
    assert (result.status, result.json()["error"]["message"], result.attempts) == (503, "asked for", 3)
    assert "X-Proxy-Model" not in result.headers
    pipeline.transport.otherwise = by_model(gpt_4o=error(503), a=error(500))
    assert (await pipeline.ask()).headers["X-Proxy-Model"] == "b"
    given_back(pipeline)


@virtual_time
async def test_the_next_priority_comes_before_a_fallback_model() -> None:
    config = two(retry=RetrySettings(max_retries=0, fallbacks={"gpt-4o": ("gpt-4o-mini",)}))
    pipeline = PipelineFixture(transport=by_key(ptu=error(500)), config=config)
    result = await pipeline.ask()
    assert (result.headers["X-Proxy-Key"], result.attempts) == ("payg", 2)
    assert "X-Proxy-Model" not in result.headers
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_an_error_of_the_proxy_uses_the_fallback_model() -> None:
    pipeline = PipelineFixture(rate_limited("600"), config=fallback("gpt-4o-mini"))
    pipeline.transport.otherwise = lambda sent: says()
    await pipeline.ask()
    result = await pipeline.ask(ask("next"), Options(max_wait=0.0))  # the key cools for gpt-4o: not even asked
    assert (result.headers["X-Proxy-Model"], result.attempts) == ("gpt-4o-mini", 1)


@virtual_time
async def test_no_fallback_model_is_asked_after_the_deadline() -> None:
    pipeline = PipelineFixture(Fails("unreached", wait=5.0), config=fallback("gpt-4o-mini"))
    result = await pipeline.ask(total=5.0)
    assert len(pipeline.transport.sent) == 1
    assert result.status in (502, 504)
