"""Upstreams that fail, keys that differ, stored objects and their keys (docs/keys-and-limits.md)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests import upstream_answers
from tests.client import Client, ask
from tests.launch import AT_ONCE, Config, Launch, secret, settings
from tests.ledger import Request
from tests.scripted_upstream import Answer, ScriptedUpstream

CHAT = "/v1/chat/completions"


def tiers(port: int, **sections: Any) -> Config:
    """Provisioned capacity first, then pay-as-you-go below another path of the same server."""
    config = settings(port, ["ptu"], **sections)
    spare = {"name": "spare", "priority": 1, "base_url": f"http://127.0.0.1:{port}/spare/v1"}
    config["upstreams"].append(spare | {"keys": [{"name": "payg", "key": secret("payg")}]})
    return config


async def test_a_failing_upstream_is_failed_over_and_its_breaker_opens(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(tiers(upstream.port, retry={"max_retries": 1}, breaker={"failures": 3, "open_for": "1s"}))
    broken = True

    def script(request: Request) -> Answer:
        sick = broken and request.key == secret("ptu")
        return upstream_answers.server_error(500) if sick else upstream_answers.behave(request)

    upstream.script = script
    answers = [await client.send(proxy, ask()) for _ in range(6)]
    assert [(a.status, a.headers["X-Proxy-Upstream"]) for a in answers] == [(200, "spare")] * 6
    assert upstream.keys.count(secret("ptu")) == 3 * 2  # a retry each, until it is left alone
    state = (await client.get(proxy, "/_proxy/keys")).json()
    assert {row["name"]: row["state"] for row in state["upstreams"]} == {"openai": "open", "spare": "closed"}
    broken = False
    await asyncio.sleep(1.1)
    assert (await client.send(proxy, ask())).headers["X-Proxy-Upstream"] == "openai"


async def test_circuit_open_is_returned_at_once(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port, retry={"max_retries": 0}, breaker={"failures": 2}))
    upstream.always(upstream_answers.server_error(500))
    assert [(await client.send(proxy, ask())).status for _ in range(2)] == [500, 500]
    answer = await client.send(proxy, ask())
    assert (answer.status, answer.error, upstream.count) == (503, "circuit_open", 2)
    assert 1 <= int(answer.headers["Retry-After"]) <= 15
    assert answer.seconds < 10  # not the 15 s until the upstream is tried again


async def test_another_model_answers_and_is_not_stored(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    config = settings(upstream.port, retry={"max_retries": 0, "fallbacks": {"gpt-4o": ["gpt-4o-mini"]}})
    proxy = launch(config)
    request = ask()
    upstream.queue(CHAT, upstream_answers.server_error(500))
    answer = await client.send(proxy, request)
    assert (answer.status, answer.headers["X-Proxy-Model"]) == (200, "gpt-4o-mini")
    assert [r.json()["model"] for r in upstream.requests] == ["gpt-4o", "gpt-4o-mini"]
    again = await client.send(proxy, request)
    assert again.headers["X-Proxy-Cache"] == "miss"
    assert "X-Proxy-Model" not in again.headers


async def test_stored_objects_stay_with_their_key(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    """A response, the vector store made of a file, and what asks for them later: each stays with its maker."""
    proxy = launch(settings(upstream.port, ["k1", "k2"], selection="round_robin", cache={"backend": "off"}))
    made = 0

    def script(request: Request) -> Answer:
        nonlocal made
        made += 1
        return upstream_answers.reply(
            200, {"id": f"obj_{made}", "object": "thing"}, {"Content-Type": "application/json"}, None
        )

    upstream.script = script
    for key in ("k1", "k2"):
        first = await client.send(proxy, {"model": "gpt-4o", "input": "x"}, path="/v1/responses")
        assert first.headers["X-Proxy-Key"] == key
        one = first.json()["id"]
        then = await client.send(
            proxy, {"model": "gpt-4o", "input": "y", "previous_response_id": one}, path="/v1/responses"
        )
        assert then.headers["X-Proxy-Key"] == key
        assert (await client.get(proxy, f"/v1/responses/{one}")).headers["X-Proxy-Key"] == key
        store = await client.send(proxy, {"name": "é", "file_ids": [one]}, path="/v1/vector_stores")
        assert store.headers["X-Proxy-Key"] == key
        assert upstream.last.json() == {"name": "é", "file_ids": [one]}
        assert [name.lower() for name, _ in upstream.last.headers].count("content-length") == 1
        assert (await client.get(proxy, f"/v1/vector_stores/{store.json()['id']}/files")).headers["X-Proxy-Key"] == key


@pytest.mark.parametrize("value", ["-1", "0", "soon", "", "1e400", "9" * 40, "9999h", "\xff", "nan", "-0.0"])
async def test_nonsense_in_headers_blocks_no_key(
    launch: Launch, upstream: ScriptedUpstream, client: Client, value: str
) -> None:
    """On good answers, on a 429 and on a 503: no answer breaks, and nobody waits longer than the pauses of a retry."""
    proxy = launch(settings(upstream.port))
    names = [f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")]
    headers = dict.fromkeys([*names, "x-should-retry", "openai-processing-ms"], value)
    good = upstream_answers.reply(200, upstream_answers.completion("Hello!"), headers)
    for status in (429, 503, 200):
        bad = (
            upstream_answers.reply(status, upstream_answers.error_body("No.", None), headers) if status != 200 else good
        )
        upstream.queue(CHAT, bad, good)
        answer = await client.send(proxy, ask())
        assert (answer.status, answer.seconds < AT_ONCE) == (200, True)
