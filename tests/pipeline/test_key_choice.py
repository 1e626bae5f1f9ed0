"""Requests pinned to stored objects; prompts that stay with the key that has them cached (docs/keys-and-limits.md)."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.config.settings import RetrySettings, Settings, ThrottleSettings
from proxy.protocol.options import Options
from tests.pipeline.clock import virtual_time
from tests.pipeline.fixture import PipelineFixture, Result, ask, pool, settings
from tests.pipeline.script import ScriptedTransport, Sent, dump, error, event, rate_limited, says, streams

RESPONSES = "/v1/responses"


def config(**sections: Any) -> Settings:
    return settings(pool("k1", "k2", "k3"), **{"retry": RetrySettings(max_retries=0, jitter=0.0), **sections})


def response(id_: str) -> dict[str, Any]:
    return {"id": id_, "object": "response", "status": "completed", "error": None, "output": [], "model": "gpt-4o"}


def answering(sent: Sent) -> Any:
    """Each response is named after the key that made it and the call."""
    made = response(f"resp_{sent.key}_{sent.json()['input']}")
    if sent.json().get("stream"):
        created = {"type": "response.created", "response": made | {"status": "in_progress"}}
        done = {"type": "response.completed", "response": made}
        return streams([event(created), event(done)])
    return says(made)


async def respond(pipeline: PipelineFixture, text: str, **fields: Any) -> Result:
    return await pipeline.ask({"model": "gpt-4o", "input": text, **fields}, target=RESPONSES)


def scene_of(**sections: Any) -> PipelineFixture:
    return PipelineFixture(transport=ScriptedTransport(otherwise=answering), config=config(**sections))


@pytest.mark.parametrize("stream", [False, True])
@virtual_time
async def test_a_conversation_uses_the_key_that_started_it(stream: bool) -> None:
    pipeline = scene_of()
    for number in range(3):
        first = await respond(pipeline, f"a{number}", stream=stream)
        key = first.headers["X-Proxy-Key"]
        for turn in range(4):
            told = await respond(
                pipeline, f"b{number}{turn}", previous_response_id=f"resp_{key}_a{number}", stream=stream
            )
            assert told.headers["X-Proxy-Key"] == key
    assert set(pipeline.transport.keys) == {"k1", "k2", "k3"}
    pipeline.assert_nothing_leaked()


@pytest.mark.parametrize("named", [{"previous_response_id": "resp_x"}, {"conversation": {"id": "conv_x"}}])
@virtual_time
async def test_unknown_stored_objects_use_the_fixed_key(named: dict[str, Any]) -> None:
    pipeline = scene_of()
    for number in range(3):
        assert (await respond(pipeline, str(number), **named)).headers["X-Proxy-Key"] == "k1"


@pytest.mark.parametrize("trouble", [error(401), error(404, "model_not_found"), rate_limited("99"), error(500)])
@virtual_time
async def test_a_request_for_a_stored_object_does_not_fail_over(trouble: Any) -> None:
    fallbacks = RetrySettings(max_retries=0, fallbacks={"*": ("o1",)})
    pipeline = PipelineFixture(trouble, config=config(retry=fallbacks))
    told = await respond(pipeline, "x", previous_response_id="resp_x")
    assert (told.status, pipeline.transport.keys) == (trouble.status, ["k1"])
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_a_request_for_a_stored_object_is_retried_with_the_same_key() -> None:
    pipeline = PipelineFixture(error(500), config=config(retry=RetrySettings(jitter=0.0)))
    pipeline.transport.otherwise = answering
    told = await respond(pipeline, "x", previous_response_id="resp_x")
    assert (told.status, pipeline.transport.keys) == (200, ["k1", "k1"])


@virtual_time
async def test_a_rejected_key_is_still_used_for_its_stored_objects() -> None:
    pipeline = scene_of()
    made = await respond(pipeline, "a")
    assert made.headers["X-Proxy-Key"] == "k1"
    pipeline.transport.queue[:] = [error(401)]
    await respond(pipeline, "b", previous_response_id="resp_k1_a")  # k1 rests
    assert (await respond(pipeline, "c", previous_response_id="resp_x")).headers["X-Proxy-Key"] == "k2"  # unknown
    assert (await respond(pipeline, "d", previous_response_id="resp_k1_a")).headers["X-Proxy-Key"] == "k1"


@virtual_time
async def test_long_prompts_with_the_same_prefix_use_the_same_key() -> None:
    pipeline = PipelineFixture(transport=ScriptedTransport(otherwise=lambda sent: says()), config=config())
    system = {"role": "system", "content": "Be brief. " * 500}
    for number in range(12):
        turn = {"role": "user", "content": str(number)}
        await pipeline.ask({"model": "gpt-4o", "messages": [system, turn]})
        await pipeline.ask(ask(f"short {number}"))
    assert len(set(pipeline.transport.keys[::2])) == 1
    assert len(set(pipeline.transport.keys[1::2])) == 2  # in turn, and the busiest is not the next


@virtual_time
async def test_a_reported_quota_is_used_up_and_then_waited_for() -> None:
    """The upstream says that two requests are left of sixty a minute: two go, the third waits for its turn."""
    told = [("x-ratelimit-limit-requests", "60"), ("x-ratelimit-remaining-requests", "2")]
    told += [("x-ratelimit-reset-requests", "58s")]
    pipeline = PipelineFixture(
        says(headers=told), says(), says(), says(), config=settings(retry=RetrySettings(jitter=0.0))
    )
    for number in range(3):
        assert (await pipeline.ask(ask(str(number)))).at == 0.0
    late = await pipeline.ask(ask("late"))
    assert late.status == 200
    assert late.at == pytest.approx(1.0, abs=0.01)
    assert dump(pipeline.services.pool.report(pipeline.loop.time())[0]["learned"])


@virtual_time
async def test_the_key_with_more_remaining_quota_is_used_first() -> None:
    def told(sent: Sent) -> Any:
        left = "100" if sent.key == "k1" else "900"
        return says(headers=[("x-ratelimit-limit-tokens", "1000"), ("x-ratelimit-remaining-tokens", left)])

    pipeline = PipelineFixture(transport=ScriptedTransport(otherwise=told), config=settings(pool("k1", "k2")))
    for number in range(10):
        await pipeline.ask(ask(str(number)))
    assert pipeline.transport.keys.count("k1") <= 2


@virtual_time
async def test_without_adaptive_reported_quotas_are_ignored() -> None:
    headers = [("x-ratelimit-limit-requests", "60"), ("x-ratelimit-remaining-requests", "0")]
    headers += [("x-ratelimit-reset-requests", "60s")]
    pipeline = PipelineFixture(
        says(headers=headers), says(), config=settings(throttle=ThrottleSettings(adaptive=False))
    )
    assert [(await pipeline.ask(ask(str(n)), Options(max_wait=0.0))).status for n in range(2)] == [200, 200]


@virtual_time
async def test_a_request_too_large_for_one_key_is_tried_on_another_and_no_key_cools() -> None:
    large = error(
        429,
        "rate_limit_exceeded",
        message="Request too large for gpt-4o in organization org-x on tokens per min (TPM): "
        "Limit 30000, Requested 40000. The input or output tokens must be reduced.",
    )
    pipeline = PipelineFixture(large, says(), large, large, large, config=config(retry=RetrySettings(jitter=0.0)))
    told = await pipeline.ask()
    assert (told.status, told.attempts) == (200, 2)
    assert pipeline.state("k1") is None
    told = await pipeline.ask(ask("larger"))
    assert (told.status, told.attempts, told.at) == (429, 3, 0.0)  # no wait would help
    assert told.headers["X-Should-Retry"] == "false"
    assert "X-Proxy-Error" not in told.headers
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_a_mismatched_organization_does_not_reject_the_key() -> None:
    pipeline = PipelineFixture(error(401, "mismatched_organization"), says(), config=config())
    assert (await pipeline.ask()).status == 200
    assert pipeline.state("k1") is None
