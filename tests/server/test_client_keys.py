"""Client keys: which models, how much, what the headers say; hits are free (docs/keys-and-limits.md)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest

from proxy.config.limits import Limits
from proxy.config.settings import ClientKeySettings, ServerSettings, ThrottleSettings
from tests.pipeline.fixture import ask, pool, settings
from tests.pipeline.script import Fails, error, rate_limited, says, streams
from tests.server.kit import Answer, RunningProxy, running_proxy

pytestmark = pytest.mark.slow


def config(*upstreams: Any, models: tuple[str, ...] = (), namespace: str | None = None, **limits: int) -> Any:
    keys = (
        ClientKeySettings("a", hashlib.sha256(b"key-a").digest(), namespace, models, Limits(**limits)),
        ClientKeySettings("b", hashlib.sha256(b"key-b").digest(), namespace),
    )
    return replace(settings(*upstreams), server=ServerSettings(client_keys=keys))


async def asked(
    server: RunningProxy, text: str = "Hi", who: str = "a", target: str = "/v1/chat/completions", **more: Any
) -> Answer:
    headers = [("Authorization", f"Bearer key-{who}"), *more.pop("headers", ())]
    return await server.ask(target=target, body=ask(text, **more), headers=headers)


async def test_a_model_not_allowed_is_403_and_not_sent() -> None:
    async with running_proxy(says(), config=config(models=("gpt-4o-mini",))) as server:
        answer = await asked(server)
        assert (answer.status, answer.error, answer.get("X-Should-Retry")) == (403, "model_not_allowed", "false")
        assert server.transport.sent == []
        assert (await asked(server, model="gpt-4o-mini")).status == 200


async def test_a_model_not_allowed_is_not_served_from_a_shared_cache() -> None:
    async with running_proxy(says(), config=config(models=("gpt-4o-mini",), namespace="team")) as server:
        for _ in range(2):
            assert (await asked(server, who="b")).status == 200
        assert (await asked(server)).error == "model_not_allowed"


async def test_the_deployment_in_the_path_decides_on_azure() -> None:
    azure = pool("k1", kind="azure", api_version="v", deployments={"gpt-4o": "large", "gpt-4o-mini": "small"})
    async with running_proxy(says(), config=config(azure, models=("gpt-4o-mini",))) as server:
        for deployment, status in (("large", 403), ("small", 200)):
            target = f"/openai/deployments/{deployment}/chat/completions?api-version=v"
            assert (await asked(server, model="gpt-4o-mini", target=target)).status == status


@pytest.mark.parametrize(
    "models",
    [
        '"model":"gpt-4o","model":"gpt-4o-mini"',
        '"model":"gpt-4o-mini","model":"gpt-4o"',
        '"mod\\u0065l":"gpt-4o","model":"gpt-4o-mini"',
        '"model":"gpt-4o-mini","Model":"gpt-4o"',
        '"MODEL":"gpt-4o-mini"',
    ],
)
async def test_a_body_that_parsers_may_read_differently_is_refused(models: str) -> None:
    """Some parsers take the first of two fields, others the last, and Go's do not tell upper from lower case."""
    body = f'{{{models},"messages":[{{"role":"user","content":"Hi"}}]}}'.encode()
    async with running_proxy(says(), config=config(models=("gpt-4o-mini",))) as server:
        headers = [("Authorization", "Bearer key-a")]
        answer = await server.ask(body=body, headers=headers)
        assert (answer.status, answer.error, server.transport.sent) == (403, "model_not_allowed", [])


async def test_a_client_limited_to_models_may_not_use_unparsed_routes() -> None:
    async with running_proxy(says(), config=config(models=("gpt-4o-mini",))) as server:
        answer = await asked(server, target="/v1/images/generations")
        assert answer.error == "model_not_allowed"
        assert (await asked(server, who="b", target="/v1/images/generations")).status == 200


async def test_client_limits_are_counted_and_reported_and_hits_are_free() -> None:
    async with running_proxy(says(), says(), config=config(rpm=2, tpm=100_000, concurrency=5)) as server:
        answer = await asked(server, "1")
        assert answer.get("X-Proxy-Client-Limit") == "rpm=1/2, tpm=300/100000, concurrency=0/5"
        for _ in range(5):
            assert (await asked(server, "1")).get("X-Proxy-Cache") == "hit"
        assert (await asked(server, "2")).status == 200
        answer = await asked(server, "3")
        assert (answer.status, answer.error, answer.get("X-Should-Retry")) == (429, "client_limit", None)
        assert 55 <= int(answer.get("Retry-After") or 0) <= 61
        assert answer.get("retry-after-ms")
        assert answer.get("X-Proxy-Client-Limit") == "rpm=2/2, tpm=600/100000, concurrency=0/5"
        assert len(server.transport.sent) == 2
        assert (await asked(server, "1")).get("X-Proxy-Cache") == "hit"


@pytest.mark.parametrize(
    ("moves", "limit_header"),
    [
        ([error(400)], "rpm=1/9, tpm=0/100000"),
        ([rate_limited("0"), says()], "rpm=1/9, tpm=300/100000"),
        ([Fails("unreached")] * 9, "rpm=0/9, tpm=0/100000"),
        ([streams()], None),
    ],
    ids=["an error", "a retry", "never went up", "a stream"],
)
async def test_the_final_count_of_a_clients_request(moves: list[Any], limit_header: str | None) -> None:
    base = config(rpm=9, tpm=100_000)
    base = replace(base, retry=replace(base.retry, base_delay=0.0))
    async with running_proxy(*moves, config=base) as server:
        answer = await asked(server, stream=limit_header is None)
        if limit_header is not None:
            assert answer.get("X-Proxy-Client-Limit") == limit_header
        use = server.services.clients.report(server.services.clock.monotonic())["a"]
        assert use["running"] == 0
        assert use["limits"]["rpm"]["used"] == (0 if limit_header and "rpm=0" in limit_header else 1)


async def test_passed_through_requests_count_for_the_client() -> None:
    async with running_proxy(says(), says(), config=config(rpm=1)) as server:
        answer = await asked(server, target="/v1/images/generations")
        assert (answer.status, answer.get("X-Proxy-Client-Limit")) == (200, "rpm=1/1")
        answer = await asked(server, target="/v1/images/generations")
        assert (answer.status, answer.error) == (429, "client_limit")
        assert answer.get("X-Proxy-Client-Limit") == "rpm=1/1"


async def test_status_shows_client_usage_and_a_reset_clears_it() -> None:
    base = replace(config(rpm=1), throttle=ThrottleSettings(limits={"*": Limits(rpm=1)}, max_wait=0.0))
    async with running_proxy(says(), says(), config=base) as server:
        assert (await asked(server, "1")).status == 200
        clients = (await server.ask("GET", "/_proxy/status")).json()["clients"]
        assert clients["a"] == {"requests": 1, "tokens": 300, "running": 0, "limits": {"rpm": {"limit": 1, "used": 1}}}
        assert clients["b"] == {"requests": 0, "tokens": 0, "running": 0, "limits": {}}
        assert (await asked(server, "2")).error == "client_limit"
        assert (await asked(server, "2", who="b")).error == "throttled"
        assert (await server.ask("GET", "/_proxy/limits/reset")).status == 405
        assert (await server.ask("POST", "/_proxy/limits/reset", headers=[("Host", "evil.test")])).status == 421
        assert (
            await server.ask("POST", "/_proxy/limits/reset", headers=[("Sec-Fetch-Site", "cross-site")])
        ).status == 403
        answer = await server.ask("POST", "/_proxy/limits/reset")
        assert (answer.status, answer.json()) == (200, {"reset": True})
        assert (await asked(server, "2")).status == 200
