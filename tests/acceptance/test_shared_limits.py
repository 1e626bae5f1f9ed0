"""Several real proxies over one real Redis share limits and key states (docs/keys-and-limits.md)."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from proxy.upstream.limits.redis_loss import SETTLING
from tests import upstream_answers
from tests.cache.stores.kit import Valkey, valkey
from tests.client import Client, Reply, ask
from tests.launch import AT_ONCE, Config, Launch, settings
from tests.scripted_upstream import ScriptedUpstream, hold

CHAT = "/v1/chat/completions"


@pytest.fixture
def server() -> Iterator[Valkey]:
    with valkey() as started:
        yield started


def shared(server: Valkey, port: int, keys: tuple[str, ...] = ("k1",), max_wait: str = "0s", **limits: int) -> Config:
    throttle: dict[str, Any] = {"backend": "redis", "limits": {"*": limits} if limits else {}, "max_wait": max_wait}
    return settings(port, keys, throttle=throttle, redis={"url": server.url}, retry={"max_retries": 0})


async def test_one_limit_holds_across_proxies_and_a_burst_is_sent_at_once(
    launch: Launch, upstream: ScriptedUpstream, client: Client, server: Valkey
) -> None:
    proxies = [launch(shared(server, upstream.port, rpm=20)) for _ in range(3)]
    answers: list[Reply] = []
    for _ in range(20):  # a busy machine may miss a deadline, and then a place comes back a moment later
        answers += await asyncio.gather(*(client.send(proxies[n % 3], ask()) for n in range(9)))
    assert {a.status for a in answers} == {200, 429}
    assert upstream.count == sum(a.status == 200 for a in answers) == 20
    for answer in answers:
        if answer.status == 429:
            assert answer.error == "throttled"
            assert 50 <= float(answer.headers["Retry-After"]) <= 62
    assert (await client.send(proxies[1], {}, path="/_proxy/limits/reset")).status == 200
    await asyncio.sleep(1.5)  # a sign of life later everybody knows
    assert (await client.send(proxies[0], ask())).status == 200


async def test_a_cooling_key_cools_for_every_process(
    launch: Launch, upstream: ScriptedUpstream, client: Client, server: Valkey
) -> None:
    one, other = (launch(shared(server, upstream.port, ("k1", "k2"))) for _ in range(2))
    upstream.queue(CHAT, [upstream_answers.rate_limited("50")])
    assert (await client.send(one, ask())).status == 200
    tired = upstream.requests[0].key
    await asyncio.sleep(0.2)
    for _ in range(6):
        assert (await client.send(other, ask())).status == 200
    assert [request.key for request in upstream.requests].count(tired) == 1


async def test_the_permits_of_a_killed_proxy_are_returned(
    launch: Launch, upstream: ScriptedUpstream, client: Client, server: Valkey
) -> None:
    one, other = (launch(shared(server, upstream.port, max_wait="15s", concurrency=1)) for _ in range(2))
    gate = upstream.gate()
    upstream.queue(CHAT, [hold(gate), upstream_answers.chat()])
    held = asyncio.create_task(client.send(one, ask()))
    await upstream.until(lambda: upstream.count == 1)
    one.process.send_signal(signal.SIGKILL)
    with pytest.raises(aiohttp.ClientError):
        await held
    assert (await client.send(other, ask())).status == 200
    gate.open()


async def test_a_clients_limit_holds_across_proxies(
    launch: Launch, upstream: ScriptedUpstream, client: Client, server: Valkey
) -> None:
    config = shared(server, upstream.port)
    config["server"]["client_keys"] = [{"name": "anna", "key": "a-long-key-of-anna", "limits": {"rpm": 3}}]
    proxies, anna = [launch(config) for _ in range(2)], {"Authorization": "Bearer a-long-key-of-anna"}
    answers = [await client.send(proxies[n % 2], ask(), anna) for n in range(5)]
    assert [answer.status for answer in answers] == [200, 200, 200, 429, 429]
    assert answers[3].error == "client_limit"
    assert answers[2].headers["X-Proxy-Client-Limit"] == "rpm=3/3"


async def test_without_redis_requests_are_served_and_a_warning_is_logged(
    launch: Launch, upstream: ScriptedUpstream, client: Client, server: Valkey
) -> None:
    proxy = launch(shared(server, upstream.port, rpm=1000))
    assert (await client.send(proxy, ask())).status == 200
    assert "openai_proxy_limits_sound 1.0" in (await client.get(proxy, "/metrics")).body.decode()
    await asyncio.sleep(SETTLING)  # just started, it would wait for Redis so long
    server.kill()
    answers = [await client.send(proxy, ask()) for _ in range(5)]
    assert [answer.status for answer in answers] == [200] * 5
    assert sum(answer.seconds for answer in answers) < AT_ONCE
    assert "openai_proxy_limits_sound 0.0" in (await client.get(proxy, "/metrics")).body.decode()
    assert "limits are no longer shared" in proxy.stderr_so_far()
