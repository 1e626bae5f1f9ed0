"""Named runs against the real process: by header, in the base URL, and shared by two processes over a real Valkey."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests import upstream_answers
from tests.cache.stores.kit import Valkey, valkey
from tests.client import Client, Reply, ask
from tests.launch import AT_ONCE, Config, Launch, ProxyProcess, merge, secret, settings
from tests.ledger import Request
from tests.scripted_upstream import Answer, ScriptedUpstream

CHAT = "/v1/chat/completions"


@pytest.fixture
def server() -> Iterator[Valkey]:
    with valkey() as running:
        yield running


@pytest.fixture(autouse=True)
def counting(upstream: ScriptedUpstream) -> None:
    """Every answer is another."""

    def answer(_: Request) -> Answer:
        return [upstream_answers.chat(f"answer {upstream.count}")]

    upstream.script = answer


def text(reply: Reply) -> str:
    assert reply.status == 200, reply.body
    return str(reply.json()["choices"][0]["message"]["content"])


async def report(client: Client, proxy: ProxyProcess, run: str, **headers: str) -> Any:
    reply = await client.get(proxy, f"/_proxy/runs/{run}", **headers)
    assert reply.status == 200, reply.body
    return reply.json()


def in_redis(port: int, url: str, **more: Any) -> Config:
    return merge(settings(port, cache={"backend": "redis"}, redis={"url": url}), more)


async def test_by_header_and_in_the_base_url(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port))
    question = ask("one", temperature=1)
    first = [await client.send(proxy, question, {"X-Proxy-Run": "eval-7"}) for _ in range(3)]
    again = [await client.send(proxy, question, path=f"/_/run=eval-8;max-cost=0{CHAT}") for _ in range(3)]
    assert [reply.body for reply in again] == [reply.body for reply in first]
    assert len({reply.body for reply in first}) == 3
    assert {reply.cache for reply in again} == {"hit"}
    cost = first[0].headers["X-Proxy-Cost-USD"]
    assert first[0].headers["X-Proxy-Run-Cost-USD"] == cost != "0.000000"
    assert again[2].headers["X-Proxy-Run-Saved-USD"] == first[2].headers["X-Proxy-Run-Cost-USD"]
    assert again[2].headers["X-Proxy-Run-Cost-USD"] == "0.000000"
    refused = await client.send(proxy, question, path=f"/_/run=eval-8;max-cost=0{CHAT}")
    assert (refused.status, refused.error, refused.headers["X-Should-Retry"]) == (429, "budget_exceeded", "false")
    assert "Retry-After" not in refused.headers
    assert refused.headers["X-Proxy-Run-Saved-USD"] == first[2].headers["X-Proxy-Run-Cost-USD"]
    assert upstream.count == 3
    found = await report(client, proxy, "eval-8")
    assert (found["requests"], found["hits"], found["errors"], found["max_cost"]) == (4, 3, 1, "0.000000")
    assert (await client.receipt(proxy, first[0].headers["X-Proxy-Request-Id"]))["run"] == "eval-7"
    assert (await client.receipt(proxy, again[0].headers["X-Proxy-Request-Id"]))["run"] == "eval-8"
    assert (await client.get(proxy, "/_proxy/runs/eval-9")).status == 404
    await client.send(proxy, question, {"X-Proxy-Run": "team/eval:1%"})
    assert (await report(client, proxy, "team/eval:1%25"))["run"] == "team/eval:1%"
    assert "X-Proxy-Run-Cost-USD" not in (await client.send(proxy, question)).headers


async def test_a_limit_without_a_run_is_refused(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port))
    for path, headers in ((f"/_/max-cost=1{CHAT}", {}), (CHAT, {"X-Proxy-Max-Cost": "1"})):
        refused = await client.send(proxy, ask(), headers, path=path)
        assert (refused.status, refused.error) == (400, "invalid_option")
    assert upstream.count == 0


async def test_two_processes_share_numbers_sums_and_limit(
    launch: Launch, upstream: ScriptedUpstream, client: Client, server: Valkey
) -> None:
    proxies = [launch(in_redis(upstream.port, server.url)) for _ in range(2)]
    for attempt in range(5):  # on a busy machine an answer of Redis may be late, and then each numbers alone
        run, before = f"eval-{attempt}", upstream.count
        question, headers = ask(run), {"X-Proxy-Run": run}
        both = await asyncio.gather(*[client.send(proxy, question, headers) for _ in range(5) for proxy in proxies])
        if len({text(reply) for reply in both}) == upstream.count - before == 10:
            break
    assert len({text(reply) for reply in both}) == upstream.count - before == 10
    total = sum(float(reply.headers["X-Proxy-Cost-USD"]) for reply in both)
    for _ in range(100):
        found = [await report(client, proxy, run) for proxy in proxies]
        if all(one["requests"] == 10 for one in found):
            break
        await asyncio.sleep(0.05)
    assert found[0] == found[1]
    assert (found[0]["misses"], found[0]["distinct_keys"]) == (10, 1)
    assert float(found[0]["cost_usd"]) == pytest.approx(total)
    for proxy in proxies:
        refused = await client.send(proxy, question, headers | {"X-Proxy-Max-Cost": found[0]["cost_usd"]})
        assert (refused.status, refused.error) == (429, "budget_exceeded")
        assert refused.headers["X-Proxy-Run-Cost-USD"] == found[0]["cost_usd"]
    assert upstream.count - before == 10
    for attempt in range(5):  # what one stored can be read by the other within a second
        await asyncio.sleep(0.5)
        again_headers = {"X-Proxy-Run": f"again-{attempt}"}
        again = [await client.send(proxies[number % 2], question, again_headers) for number in range(10)]
        if {reply.cache for reply in again} == {"hit"}:
            break
    assert {reply.cache for reply in again} == {"hit"}
    assert len({text(reply) for reply in again}) == 10
    keys = [line for line in server.say("KEYS", "*").split(b"\r\n") if line.startswith(b"openai-proxy:")]
    assert any(b":r1:" in key for key in keys)
    assert all(len(key) <= 160 for key in keys)
    assert b":-1\r\n" not in [server.say("PTTL", key) for key in keys]  # a lease may be gone by now: -2


async def test_without_redis_each_process_counts_runs_alone(
    launch: Launch, upstream: ScriptedUpstream, client: Client, server: Valkey
) -> None:
    proxy = launch(in_redis(upstream.port, server.url))
    headers = {"X-Proxy-Run": "eval-7"}
    texts = [text(await client.send(proxy, ask("one"), headers)) for _ in range(3)]
    assert server.process is not None
    server.process.kill()
    server.process.wait()
    result = [await client.send(proxy, ask("one"), headers) for _ in range(3)]
    texts += [text(reply) for reply in result]
    assert len(set(texts)) == upstream.count == 6
    assert all(reply.seconds < AT_ONCE for reply in result)
    assert (await report(client, proxy, "eval-7"))["requests"] == 6


async def test_clients_do_not_share_runs(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    keys = [{"name": name, "key": secret(name)} for name in ("anna", "otto")]
    admin = secret("admin")
    proxy = launch(settings(upstream.port, server={"client_keys": keys, "admin_key": admin}, cache={"shared": True}))
    for name in ("anna", "anna", "otto"):
        headers = {"X-Proxy-Run": "eval-7", "Authorization": f"Bearer {secret(name)}"}
        await client.send(proxy, ask("one"), headers)
    assert upstream.count == 2  # they share entries, and otto began at 0
    assert (await client.get(proxy, "/_proxy/runs/eval-7", Authorization=f"Bearer {secret('anna')}")).status == 401
    found = await report(client, proxy, "eval-7", Authorization=f"Bearer {admin}")
    assert [(one["client"], one["requests"], one["hits"]) for one in found["clients"]] == [
        ("anna", 2, 0),
        ("otto", 1, 1),
    ]
    assert (found["run"], found["requests"]) == ("eval-7", 3)


async def test_in_pass_through_each_credential_has_its_own(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    config = settings(upstream.port)
    del config["upstreams"][0]["keys"]
    proxy = launch(config)
    for name in ("anna", "anna", "otto"):
        reply = await client.send(
            proxy, ask("one"), {"X-Proxy-Run": "eval-7", "Authorization": f"Bearer {secret(name)}"}
        )
        assert reply.cache == "miss"
    found = await report(client, proxy, "eval-7")
    assert sorted(one["requests"] for one in found["clients"]) == [1, 2]
    assert secret("anna") not in str(found)


async def test_streams_and_their_hits_carry_the_run_headers(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port))
    upstream.script = upstream_answers.behave
    question = ask("one", stream=True)
    for run in ("one", "two"):
        result = [await client.send(proxy, question, {"X-Proxy-Run": run}) for _ in range(2)]
        assert all("X-Proxy-Run-Cost-USD" in reply.headers for reply in result)
    assert {reply.cache for reply in result} == {"hit"}
    assert upstream.count == 2
    assert (await report(client, proxy, "one"))["cost_usd"] == (await report(client, proxy, "two"))["saved_usd"]
