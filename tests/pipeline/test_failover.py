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
    scene = PipelineFixture(transport=by_key(ptu=error(500)), config=two())
    told = await scene.ask()
    assert (told.status, told.headers["X-Proxy-Key"], told.at) == (200, "payg", 3.0)
    assert scene.transport.keys == ["ptu"] * 4 + ["payg"]
    assert "X-Should-Retry" not in told.headers
    scene.assert_nothing_leaked()


@pytest.mark.parametrize("trouble", [Fails("unreached"), Fails("ambiguous"), error(503), error(408)])
@virtual_time
async def test_failures_that_may_be_resent_fail_over(trouble: Move) -> None:
    scene = PipelineFixture(transport=by_key(ptu=trouble), config=two())
    told = await scene.ask(None, Options(max_retries=0))
    assert (told.status, scene.transport.keys, told.at) == (200, ["ptu", "payg"], 0.0)
    scene.assert_nothing_leaked()


@pytest.mark.parametrize(
    ("trouble", "status"), [(error(400), 400), (Fails("timeout"), 504), (Fails("invalid"), 502), (error(422), 422)]
)
@virtual_time
async def test_failures_that_may_not_be_resent_do_not_fail_over(trouble: Move, status: int) -> None:
    scene = PipelineFixture(transport=by_key(ptu=trouble), config=two())
    told = await scene.ask()
    assert (told.status, scene.transport.keys) == (status, ["ptu"])
    scene.assert_nothing_leaked()


@virtual_time
async def test_without_ambiguous_no_lost_request_fails_over() -> None:
    scene = PipelineFixture(transport=by_key(ptu=Fails("ambiguous")), config=two(retry=RetrySettings(ambiguous=False)))
    told = await scene.ask()
    assert (told.refused, scene.transport.keys) == ("upstream_unreachable", ["ptu"])
    scene.assert_nothing_leaked()


@virtual_time
async def test_a_rate_limited_priority_fails_over_at_once() -> None:
    scene = PipelineFixture(transport=by_key(ptu=rate_limited("30")), config=two())
    for number in range(3):
        told = await scene.ask(ask(str(number)), Options(max_retries=0))
        assert (told.status, told.headers["X-Proxy-Key"]) == (200, "payg")
    assert scene.transport.keys == ["ptu", "payg", "payg", "payg"]


@virtual_time
async def test_if_every_priority_fails_x_should_retry_is_false() -> None:
    scene = PipelineFixture(transport=by_key(ptu=error(500), payg=error(503)), config=two())
    told = await scene.ask()
    assert (told.status, told.headers["X-Should-Retry"]) == (503, "false")
    assert scene.transport.keys == ["ptu"] * 4 + ["payg"]  # the retries are the request's, not each tier's
    scene.assert_nothing_leaked()


@virtual_time
async def test_if_the_next_priority_cools_too_long_the_response_is_returned() -> None:
    scene = PipelineFixture(rate_limited("1"), rate_limited("600"), says(), error(500), config=two())
    assert (await scene.ask()).status == 200  # ptu, after its second; payg cools for ten minutes
    told = await scene.ask(ask("next"), Options(max_retries=0))
    assert (told.status, scene.transport.keys) == (500, ["ptu", "payg", "ptu", "ptu"])
    scene.assert_nothing_leaked()


@virtual_time
async def test_two_upstreams_of_equal_priority_fail_over() -> None:
    regions = settings(pool("east", name="east"), pool("west", name="west"), retry=QUICK)
    scene = PipelineFixture(transport=by_key(east=error(503)), config=regions)
    for number in range(8):
        told = await scene.ask(ask(str(number)))
        assert (told.status, told.headers["X-Proxy-Key"]) == (200, "west")
    # A retry goes to the other region, and after five requests in a row nobody asks the first any more.
    assert scene.transport.keys.count("east") == 5
    scene.assert_nothing_leaked()


# The breaker.


def one(**breaker: float) -> Settings:
    return settings(retry=RetrySettings(max_retries=0), breaker=BreakerSettings(**{"failures": 3, **breaker}))  # type: ignore[arg-type]


@virtual_time
async def test_the_circuit_opens_after_repeated_failures() -> None:
    scene = PipelineFixture(transport=ScriptedTransport(otherwise=lambda sent: error(500)), config=one())
    assert [(await scene.ask(ask(str(n)))).status for n in range(3)] == [500] * 3
    told = await scene.ask()
    assert (told.status, told.refused) == (503, "circuit_open")
    assert told.refusal is not None
    assert told.refusal.retry_after == 15.0
    assert told.refusal.should_retry is None
    assert len(scene.transport.sent) == 3
    scene.assert_nothing_leaked()


@pytest.mark.parametrize(("answer", "after"), [(says(), 200), (error(500), 503), (error(400), 200)])
@virtual_time
async def test_one_request_probes_an_open_circuit(answer: Responds, after: int) -> None:
    scene = PipelineFixture(transport=ScriptedTransport(otherwise=lambda sent: error(500)), config=one())
    for n in range(3):
        await scene.ask(ask(str(n)))
    scene.transport.otherwise = lambda sent: says()
    await scene.services.clock.sleep(15.0)
    slow = Responds(answer.status, answer.headers, answer.body, wait=2.0)
    scene.transport.queue.append(slow)
    probe = scene.loop.create_task(scene.ask(ask("probe")))
    await scene.services.clock.sleep(1.0)
    assert (await scene.ask(ask("meanwhile"))).refused == "circuit_open"
    assert (await probe).status == answer.status
    assert (await scene.ask(ask("after"))).status == after
    scene.assert_nothing_leaked()


@virtual_time
async def test_retries_of_one_request_do_not_open_the_circuit() -> None:
    config = settings(retry=QUICK, breaker=BreakerSettings(failures=2))
    scene = PipelineFixture(transport=ScriptedTransport(otherwise=lambda sent: error(500)), config=config)
    assert (await scene.ask(None, Options(max_retries=10))).attempts == 11
    assert scene.services.upstreams[0].breaker.state(scene.loop.time()) == "closed"


@virtual_time
async def test_failures_mended_by_a_retry_do_not_open_the_circuit() -> None:
    scene = PipelineFixture(*[error(500)] * 10, *[says()] * 10, config=settings(retry=QUICK))
    tasks = [scene.loop.create_task(scene.ask(ask(str(n)))) for n in range(10)]
    assert [(await task).status for task in tasks] == [200] * 10
    assert scene.services.upstreams[0].breaker.state(scene.loop.time()) == "closed"


@virtual_time
async def test_a_clients_short_timeout_does_not_open_the_circuit() -> None:
    scene = PipelineFixture(transport=ScriptedTransport(otherwise=lambda sent: Fails("hang")), config=one())
    for n in range(5):
        told = await scene.ask(ask(str(n)), total=1.0)
        assert told.refused == "upstream_timeout"


@virtual_time
async def test_a_request_in_retry_when_the_circuit_opens_gets_the_upstreams_response() -> None:
    config = settings(retry=RetrySettings(jitter=0.0, base_delay=5.0), breaker=BreakerSettings(failures=3))
    scene = PipelineFixture(
        transport=ScriptedTransport(otherwise=lambda sent: error(500, message="ours")), config=config
    )
    waiting = scene.loop.create_task(scene.ask(ask("waits")))
    await scene.services.clock.sleep(1.0)
    for n in range(3):
        await scene.ask(ask(str(n)), Options(max_retries=0))
    told = await waiting
    assert (told.status, told.attempts, told.headers["X-Should-Retry"]) == (500, 1, "false")
    assert told.json()["error"]["message"] == "ours"
    scene.assert_nothing_leaked()


@virtual_time
async def test_an_open_circuit_fails_over_at_once() -> None:
    config = two(retry=RetrySettings(max_retries=0), breaker=BreakerSettings(failures=2))
    scene = PipelineFixture(transport=by_key(ptu=error(500)), config=config)
    for n in range(5):
        assert (await scene.ask(ask(str(n)))).headers["X-Proxy-Key"] == "payg"
    assert scene.transport.keys.count("ptu") == 2


# The last answer of a stream.


@virtual_time
async def test_a_persistent_error_event_sets_x_should_retry_false() -> None:
    told_off = streams([event({"error": {"message": "overloaded", "type": "server_error"}})])
    scene = PipelineFixture(transport=ScriptedTransport(otherwise=lambda sent: told_off), config=settings(retry=QUICK))
    told = await scene.ask(ask(stream=True))
    assert (told.status, told.attempts, told.headers["X-Should-Retry"]) == (200, 4, "false")
    assert b"overloaded" in told.body
    scene.assert_nothing_leaked()


# Other models.


def fallback(*models: str, **sections: object) -> Settings:
    retry = RetrySettings(max_retries=0, fallbacks={"gpt-4o": models})
    return settings(pool("k1"), **{"retry": retry, **sections})


def given_back(scene: PipelineFixture) -> None:
    """As `balanced`, which counts one model's requests only."""
    assert all(reply.given_back for reply in scene.transport.replies)
    for model in ("gpt-4o", "gpt-4o-mini", "a", "b"):
        assert scene.used(model=model)["concurrency"] == 0


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
    scene = PipelineFixture(failure, config=fallback("gpt-4o-mini"))
    scene.transport.otherwise = lambda sent: streams() if stream else says()
    told = await scene.ask(ask(stream=stream))
    assert (told.status, told.headers["X-Proxy-Model"], told.attempts) == (200, "gpt-4o-mini", 2)
    assert [sent.json()["model"] for sent in scene.transport.sent] == ["gpt-4o", "gpt-4o-mini"]
    assert "stored" not in told.headers["Cache-Status"]
    assert scene.receipt.model == "gpt-4o-mini"
    scene.transport.queue.clear()
    again = await scene.ask(ask(stream=stream), Options(max_wait=0.0))
    assert again.cache == "miss"  # nothing was stored under the name that was asked for
    given_back(scene)


@pytest.mark.parametrize("failure", [error(400), error(422), Fails("timeout"), Fails("invalid")])
@virtual_time
async def test_client_errors_use_no_fallback_model(failure: Move) -> None:
    scene = PipelineFixture(failure, config=fallback("gpt-4o-mini"))
    told = await scene.ask()
    assert "X-Proxy-Model" not in told.headers
    assert len(scene.transport.sent) == 1


@virtual_time
async def test_fallback_models_are_tried_in_order_and_else_the_first_failure_is_returned() -> None:
    scene = PipelineFixture(config=fallback("a", "b"))
    scene.transport.otherwise = by_model(gpt_4o=error(503, message="asked for"), a=error(500), b=error(400))
    told = await scene.ask()
    assert (told.status, told.json()["error"]["message"], told.attempts) == (503, "asked for", 3)
    assert "X-Proxy-Model" not in told.headers
    scene.transport.otherwise = by_model(gpt_4o=error(503), a=error(500))
    assert (await scene.ask()).headers["X-Proxy-Model"] == "b"
    given_back(scene)


@virtual_time
async def test_the_next_priority_comes_before_a_fallback_model() -> None:
    config = two(retry=RetrySettings(max_retries=0, fallbacks={"gpt-4o": ("gpt-4o-mini",)}))
    scene = PipelineFixture(transport=by_key(ptu=error(500)), config=config)
    told = await scene.ask()
    assert (told.headers["X-Proxy-Key"], told.attempts) == ("payg", 2)
    assert "X-Proxy-Model" not in told.headers
    scene.assert_nothing_leaked()


@virtual_time
async def test_an_error_of_the_proxy_uses_the_fallback_model() -> None:
    scene = PipelineFixture(rate_limited("600"), config=fallback("gpt-4o-mini"))
    scene.transport.otherwise = lambda sent: says()
    await scene.ask()
    told = await scene.ask(ask("next"), Options(max_wait=0.0))  # the key cools for gpt-4o: not even asked
    assert (told.headers["X-Proxy-Model"], told.attempts) == ("gpt-4o-mini", 1)


@virtual_time
async def test_no_fallback_model_is_asked_after_the_deadline() -> None:
    scene = PipelineFixture(Fails("unreached", wait=5.0), config=fallback("gpt-4o-mini"))
    told = await scene.ask(total=5.0)
    assert len(scene.transport.sent) == 1
    assert told.status in (502, 504)
