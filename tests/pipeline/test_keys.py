"""The pool in the pipeline: a client does not notice a bad key while a good one is left (docs/keys-and-limits.md)."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from proxy.config.settings import RetrySettings, UpstreamSettings
from proxy.protocol.request import Client
from tests.pipeline.clock import virtual_time
from tests.pipeline.fixture import PipelineFixture, ask, pool, settings
from tests.pipeline.script import Responds, ScriptedTransport, Sent, error, event, rate_limited, says, streams

NO_RETRIES = RetrySettings(max_retries=0, jitter=0.0)

BAD: dict[str, tuple[Responds, tuple[str, float], bool]] = {
    "401": (error(401, "invalid_api_key"), ("rejected", 600.0), True),
    "403": (error(403, "unsupported_country_region_territory"), ("rejected", 600.0), False),
    "404 model": (error(404, "model_not_found"), ("missing", 600.0), False),
    "404 deployment": (error(404, "DeploymentNotFound"), ("missing", 600.0), False),
    "quota": (error(429, "insufficient_quota"), ("exhausted", 600.0), True),
    "429": (rate_limited("30"), ("cooling", 30.0), False),
    "429 in ms": (error(429, None, [("retry-after-ms", "1500"), ("retry-after", "9")]), ("cooling", 1.5), False),
    "429 in words": (rate_limited("1m30s"), ("cooling", 90.0), False),
    "429 without a hint": (rate_limited(), ("cooling", 1.0), False),
    "quota in a stream": (
        streams([event({"error": {"code": "insufficient_quota", "message": "no"}})]),
        ("exhausted", 600.0),
        True,
    ),
    "429 in a stream": (
        streams([event({"error": {"code": "rate_limit_exceeded", "message": "no"}})]),
        ("cooling", 1.0),
        False,
    ),
}


@pytest.mark.parametrize(("bad", "state", "whole"), BAD.values(), ids=BAD.keys())
@virtual_time
async def test_a_bad_key_is_replaced_by_the_next(bad: Responds, state: tuple[str, float], whole: bool) -> None:
    """At once and without a retry; and its state stands: for the model, or for the whole key."""
    pipeline = PipelineFixture(bad, says(), config=settings(pool("k1", "k2"), retry=NO_RETRIES))
    result = await pipeline.ask()
    assert (result.status, result.at, result.attempts) == (200, 0.0, 2)
    assert result.headers["X-Proxy-Key"] == "k2"
    assert "X-Should-Retry" not in result.headers
    assert "X-Proxy-Error" not in result.headers
    # Without a hint the pause of a first retry is the guess: base 1 s, no jitter here.
    assert pipeline.state("k1") == state
    assert (pipeline.state("k1", "gpt-4o-mini") is not None) is whole
    assert pipeline.state("k2") is None
    assert pipeline.used("k1") == {"rpm": 1, "tpm": 0, "concurrency": 0}
    assert pipeline.used("k2") == {"rpm": 1, "tpm": 300, "concurrency": 0}
    pipeline.assert_nothing_leaked()
    assert [receipt.status for receipt in pipeline.receipts] == [200]
    assert (pipeline.receipt.key, pipeline.receipt.attempts) == ("k2", 2)

    pipeline.transport.queue.append(says())
    await pipeline.ask(ask("again"))
    assert pipeline.transport.keys == ["k1", "k2", "k2"]  # it is not asked again


@pytest.mark.parametrize(("status", "code"), [(401, "invalid_api_key"), (403, None), (404, "model_not_found")])
@virtual_time
async def test_if_every_key_is_bad_the_last_response_is_returned(status: int, code: str | None) -> None:
    moves = [error(status, code, message="first"), error(status, code, message="last, for sk-k2")]
    pipeline = PipelineFixture(*moves, config=settings(pool("k1", "k2")))
    result = await pipeline.ask()
    assert (result.status, result.attempts, result.at) == (status, 2, 0.0)
    assert result.json()["error"]["message"] == "last, for ***"
    assert result.headers["X-Proxy-Error"] == "no_usable_key"
    assert result.headers["X-Should-Retry"] == "false"
    assert pipeline.receipt.error == "no_usable_key"
    assert pipeline.receipt.status == status
    assert pipeline.used("k1")["tpm"] == pipeline.used("k2")["tpm"] == 0
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_if_every_key_is_rejected_the_error_is_no_usable_key() -> None:
    """502 without a call, except for one request in a second, and without waiting ten minutes."""
    pipeline = PipelineFixture(*[error(401)] * 6, config=settings(pool("k1", "k2")))
    await pipeline.ask()
    for _ in range(2):
        assert (await pipeline.ask()).attempts == 2
        result = await pipeline.ask()
        await pipeline.clock.sleep(1)
    assert (result.status, result.refused, result.attempts) == (502, "no_usable_key", 0)
    assert result.refusal is not None
    assert result.refusal.should_retry is False
    assert "X-Proxy-Upstream" not in result.headers
    assert (pipeline.receipt.status, pipeline.receipt.error) == (502, "no_usable_key")
    pipeline.assert_nothing_leaked()


WAF = Responds(403, headers=(("Content-Type", "text/html"),), body=(b"<html>Attention Required! blocked</html>",))

ABOUT_ONE_REQUEST = {
    "a firewall's page": WAF,
    "a flagged prompt": error(403, None, message="The input was flagged: violence"),
    "a content policy": error(403, "content_policy_violation"),
    "a refusal without a word": Responds(403, body=()),
    "a path that is not there": Responds(404, headers=(("Content-Type", "text/plain"),), body=(b"404 page not found",)),
    "flex without room": error(429, "resource_unavailable"),
}


@pytest.mark.parametrize("refusal", ABOUT_ONE_REQUEST.values(), ids=ABOUT_ONE_REQUEST.keys())
@virtual_time
async def test_what_is_about_one_request_is_not_held_against_a_key(refusal: Responds) -> None:
    pipeline = PipelineFixture(refusal, refusal, says(), config=settings(pool("k1", "k2"), retry=NO_RETRIES))
    result = await pipeline.ask(ask("bad"))
    assert (result.status, result.at) == (refusal.status, 0.0)
    assert (pipeline.state("k1"), pipeline.state("k2")) == (None, None)
    pipeline.transport.queue[:] = [says()]
    assert (await pipeline.ask(ask("good"))).status == 200


@virtual_time
async def test_a_key_that_refuses_two_different_requests_is_rejected() -> None:
    mute = Responds(403, body=())
    pipeline = PipelineFixture(*[mute] * 4, config=settings(pool("k1", "k2"), retry=NO_RETRIES))
    await pipeline.ask(ask("one"))
    await pipeline.ask(ask("two"))
    assert pipeline.state("k1") == pipeline.state("k2") == ("rejected", 600.0)


DEAD = {
    "billing": error(400, "billing_not_active"),
    "terminated": error(403, "access_terminated", message="Your access was terminated: it violated our policies."),
    "deactivated": error(401, "account_deactivated"),
    "in words": error(403, None, message="The OpenAI account associated with this API key has been deactivated."),
    "no money": error(402, None, message="Insufficient Balance"),
}


@pytest.mark.parametrize("dead", DEAD.values(), ids=DEAD.keys())
@virtual_time
async def test_a_dead_account_rests_like_one_without_quota(dead: Responds) -> None:
    pipeline = PipelineFixture(dead, says(), config=settings(pool("k1", "k2")))
    result = await pipeline.ask()
    assert (result.status, result.at, result.headers["X-Proxy-Key"]) == (200, 0.0, "k2")
    assert pipeline.state("k1") == pipeline.state("k1", "gpt-4o-mini") == ("exhausted", 600.0)


SAYS_NO_MODEL = {
    "vLLM": (404, {"object": "error", "message": "The model `m` does not exist.", "code": 404}),
    "Ollama": (404, {"error": {"message": 'model "m" not found, try pulling it first', "type": "api_error"}}),
    "Ollama's own API": (404, {"error": "model 'm' not found"}),
    "Gemini": (404, [{"error": {"code": 404, "message": "models/m is not found for API version v1main"}}]),
    "LiteLLM": (400, {"error": {"message": "/chat/completions: Invalid model name passed in model=m", "code": "400"}}),
    "OpenRouter": (400, {"error": {"message": "m/m is not a valid model ID", "code": 400}}),
    "OpenRouter's router": (404, {"error": {"message": "No endpoints found for m/m.", "code": 404}}),
    "Mistral": (400, {"object": "error", "message": "Invalid model: m", "type": "invalid_model", "code": "1500"}),
    "DeepSeek": (400, {"error": {"message": "Model Not Exist", "type": "invalid_request_error"}}),
    "Together": (404, {"error": {"message": "Unable to access model m.", "code": "model_not_available"}}),
    "FastAPI": (404, {"detail": "Model m not found"}),
    "OpenAI, of a project": (403, {"error": {"message": "Project p does not have access to model m", "code": None}}),
}


@pytest.mark.parametrize(("status", "document"), SAYS_NO_MODEL.values(), ids=SAYS_NO_MODEL.keys())
@virtual_time
async def test_a_missing_model_is_known_in_any_providers_words(status: int, document: Any) -> None:
    missing = Responds(status, body=(json.dumps(document).encode(),))
    pipeline = PipelineFixture(missing, says(), config=settings(pool("k1", "k2")))
    result = await pipeline.ask()
    assert (result.status, result.headers["X-Proxy-Key"]) == (200, "k2")
    assert pipeline.state("k1") == ("missing", 600.0)


@pytest.mark.parametrize("message", ["Response with id 'resp_12345678' not found.", "No such File object: file-x1y2z3"])
@virtual_time
async def test_a_404_that_names_a_stored_object_is_returned_at_once(message: str) -> None:
    pipeline = PipelineFixture(error(404, None, message=message), config=settings(pool("k1", "k2")))
    result = await pipeline.ask()
    assert (result.status, result.attempts) == (404, 1)
    assert "X-Proxy-Error" not in result.headers


@virtual_time
async def test_a_rejected_key_is_tried_again_after_ten_minutes() -> None:
    pipeline = PipelineFixture(error(401), says(), says(), says(), config=settings(pool("k1", "k2")))
    await pipeline.ask()
    await pipeline.clock.sleep(599)
    await pipeline.ask(ask("a"))
    await pipeline.clock.sleep(1)
    await pipeline.ask(ask("b"))
    assert pipeline.transport.keys == ["k1", "k2", "k2", "k1"]
    assert pipeline.state("k1") is None


@virtual_time
async def test_a_rejected_key_is_still_used_if_it_is_the_only_one() -> None:
    """With no other, a 401 an hour ago is no reason to fail: the key may have been put right."""
    pipeline = PipelineFixture(error(401), says())
    assert (await pipeline.ask()).status == 401
    assert (await pipeline.ask()).status == 200
    assert pipeline.state() is None


@pytest.mark.parametrize("status", [400, 413, 422])
@virtual_time
async def test_other_4xx_responses_are_returned_and_sent_once(status: int) -> None:
    """Once only, with whichever key."""
    pipeline = PipelineFixture(
        error(status, "context_length_exceeded", message="Too long."), config=settings(pool("k1", "k2"))
    )
    result = await pipeline.ask()
    assert (result.status, result.attempts) == (status, 1)
    assert result.json()["error"]["message"] == "Too long."
    assert "X-Should-Retry" not in result.headers
    assert "X-Proxy-Error" not in result.headers
    assert pipeline.state("k1") is None
    assert (pipeline.receipt.error, pipeline.receipt.cost_status) == (f"upstream_{status}", "unknown")
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_a_mismatched_organization_does_not_reject_the_key() -> None:
    pipeline = PipelineFixture(error(401, "mismatched_organization"), says(), config=settings(pool("k1", "k2")))
    assert (await pipeline.ask()).status == 200
    assert pipeline.state("k1") is None


@virtual_time
async def test_a_lower_priority_upstream_serves_while_the_first_cools() -> None:
    spare = replace(pool("spare", priority=1), name="spare", base_url="http://spare.test/v1")
    pipeline = PipelineFixture(rate_limited("5"), says(), says(), says(), config=settings(pool("k1"), spare))
    result = await pipeline.ask()
    assert (result.headers["X-Proxy-Upstream"], result.headers["X-Proxy-Key"]) == ("spare", "spare")
    await pipeline.ask(ask("a"))
    await pipeline.clock.sleep(5)
    await pipeline.ask(ask("b"))
    assert pipeline.transport.keys == ["k1", "spare", "spare", "k1"]
    assert [sent.url for sent in pipeline.transport.sent][1] == "http://spare.test/v1/chat/completions"


@virtual_time
async def test_an_upstream_that_does_not_serve_the_model_is_not_used() -> None:
    pipeline = PipelineFixture(config=settings(pool("k1", models=("gpt-3*",))))
    result = await pipeline.ask()
    assert (result.status, result.refused, result.attempts) == (502, "no_usable_key", 0)


@virtual_time
async def test_if_all_keys_cool_the_first_ready_one_is_waited_for() -> None:
    pipeline = PipelineFixture(
        rate_limited("30"), rate_limited("20"), says(), config=settings(pool("k1", "k2"), retry=NO_RETRIES)
    )
    assert (await pipeline.ask()).status == 429
    result = await pipeline.ask(ask("later"))
    assert (result.status, result.at) == (200, 20.0)
    assert pipeline.transport.keys[-1] == "k2"
    assert pipeline.receipt.queue_ms == pytest.approx(20_000)
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_keys_cooling_is_returned_if_max_wait_is_too_short() -> None:
    pipeline = PipelineFixture(rate_limited("300"), config=settings(retry=NO_RETRIES))
    await pipeline.ask()
    result = await pipeline.ask(patience=100)
    assert (result.status, result.refused, result.at) == (429, "keys_cooling", 0.0)
    assert result.refusal is not None
    assert result.refusal.retry_after == pytest.approx(300)
    assert result.refusal.should_retry is None
    assert pipeline.receipt.error == "keys_cooling"
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_a_cooldown_is_extended_and_never_shortened() -> None:
    moves = [rate_limited("40", wait=2.0), rate_limited("10", wait=3.0), rate_limited("90", wait=4.0)]
    pipeline = PipelineFixture(*moves, config=settings(retry=NO_RETRIES))
    tasks = [pipeline.loop.create_task(pipeline.ask(ask(str(n)))) for n in range(3)]
    for seconds, left in ((2.5, 39.5), (1, 38.5), (1, 89.5)):
        await pipeline.clock.sleep(seconds)
        assert pipeline.state() == ("cooling", left)
    for task in tasks:
        await task
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_after_a_429_from_every_key_the_soonest_one_is_waited_for() -> None:
    """The first is ready after 2 s: the second's hour must neither be waited for nor handed on."""
    for first, second in (("2", "3600"), ("3600", "2")):
        pipeline = PipelineFixture(rate_limited(first), rate_limited(second), says(), config=settings(pool("k1", "k2")))
        result = await pipeline.ask()
        assert (result.status, result.at) == (200, 2.0), (first, second)
        pipeline.assert_nothing_leaked()


@virtual_time
async def test_the_pools_key_is_sent_and_no_other_credential() -> None:
    config = settings(replace(pool("k1"), keys=(replace(pool("k1").keys[0], organization="org-1", project="proj-1"),)))
    pipeline = PipelineFixture(says(), config=config)
    sent_headers = [
        (b"Authorization", b"Bearer client-secret"),
        (b"api-key", b"client-secret"),
        (b"OpenAI-Organization", b"org-client"),
        (b"Cookie", b"a=b"),
        (b"X-Proxy-Tag", b"a:b"),
        (b"Accept-Encoding", b"gzip, br"),
        (b"OpenAI-Beta", b"assistants=v2"),
        (b"X-Stainless-Lang", b"python"),
    ]
    await pipeline.ask(headers=sent_headers)
    headers = pipeline.transport.sent[0].headers
    assert headers.getall("Authorization") == ["Bearer sk-k1"]
    assert headers.getall("OpenAI-Organization") == ["org-1"]
    assert headers.getall("OpenAI-Project") == ["proj-1"]
    assert headers.getall("Accept-Encoding") == ["identity"]
    assert (headers["OpenAI-Beta"], headers["X-Stainless-Lang"]) == ("assistants=v2", "python")
    assert not {"api-key", "Cookie", "X-Proxy-Tag"} & set(headers)


# Pass-through: each client's own credential, and nobody else's.


def mine(name: str) -> Client:
    return Client("", f"scope of {name}", ("bearer", name))


@virtual_time
async def test_pass_through_sends_each_clients_credential() -> None:
    pipeline = PipelineFixture(says(), says(), config=settings(UpstreamSettings(base_url="http://up.test/v1")))
    await pipeline.ask(client=mine("alice"), headers=[(b"OpenAI-Organization", b"org-a")])
    await pipeline.ask(client=Client("", "nobody"))
    first, second = (sent.headers for sent in pipeline.transport.sent)
    assert (first["Authorization"], first["OpenAI-Organization"]) == ("Bearer alice", "org-a")
    assert "Authorization" not in second


@pytest.mark.parametrize("bad", [error(401), error(403), error(429, "insufficient_quota"), rate_limited("99")])
@virtual_time
async def test_a_clients_bad_credential_does_not_affect_others(bad: Responds) -> None:
    """Its answer is the upstream's own word, to be shown as it is, and no state of ours."""
    config = settings(UpstreamSettings(base_url="http://up.test/v1"), retry=NO_RETRIES)
    pipeline = PipelineFixture(bad, says(), config=config)
    result = await pipeline.ask(client=mine("mallory"))
    assert result.status == bad.status
    assert "X-Proxy-Error" not in result.headers
    assert pipeline.state("client") is None
    assert (await pipeline.ask(client=mine("alice"))).status == 200
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_in_pass_through_each_credential_has_its_own_limits() -> None:
    config = settings(UpstreamSettings(base_url="http://up.test/v1"))

    def answer(sent: Sent) -> Responds:
        return says()

    pipeline = PipelineFixture(transport=ScriptedTransport(otherwise=answer), config=config)
    for name in ("alice", "bob", "alice"):
        await pipeline.ask(ask(name), client=mine(name))
    ring, now = pipeline.services.pool, pipeline.loop.time()

    def used(quota: str) -> Any:
        allowance = ring.rate_limiter(ring.keys[0], "gpt-4o", now, quota)
        assert allowance is not None
        return allowance.usage(now)["rpm"]["used"]

    assert (used("scope of alice"), used("scope of bob")) == (1, 1)  # the third was a hit
