"""Identical requests at the same time make one upstream request (docs/caching.md, Coalescing)."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests import upstream_answers
from tests.cache.stores.kit import valkey
from tests.client import Client, Reply, ask, raw_request, read_until_broken
from tests.launch import AT_ONCE, Launch, ProxyProcess, secret, settings
from tests.ledger import Request
from tests.scripted_upstream import Answer, ScriptedUpstream, Step, hold, send, sleep, stall

T = TypeVar("T")

ONCE = {"retry": {"max_retries": 0}}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def tasks(*work: Coroutine[Any, Any, T]) -> list[asyncio.Task[T]]:
    return [asyncio.create_task(each) for each in work]


async def in_flight(proxy: ProxyProcess, client: Client, count: int) -> None:
    """Waits until that many requests are being served."""
    end = time.monotonic() + 20
    while True:
        metrics = (await client.get(proxy, "/metrics")).body.decode()
        found = re.search(r"^openai_proxy_in_flight (\S+)", metrics, re.MULTILINE)
        assert found is not None
        if float(found.group(1)) - 1 == count:  # one is the scrape
            return
        assert time.monotonic() < end, found.group(0)
        await asyncio.sleep(0.01)


async def together(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, question: dict[str, Any], count: int
) -> list[asyncio.Task[Reply]]:
    """`count` equal requests: the first is upstream, then the others come. Returns when all are in flight."""
    before = upstream.count
    asking = tasks(client.send(proxy, question))
    await upstream.until(lambda: upstream.count == before + 1)
    asking += tasks(*(client.send(proxy, question) for _ in range(count - 1)))
    await in_flight(proxy, client, count)
    return asking


def caches(answers: Sequence[Reply]) -> list[str | None]:
    return [answer.cache for answer in answers]


# Plain answers.


async def test_50_plain_requests_make_one_call(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    gate, question = upstream.gate(), ask(temperature=0)
    upstream.always(hold(gate), upstream_answers.chat("once"))
    asking = await together(proxy, upstream, client, question, 50)
    gate.open()
    answers = await asyncio.gather(*asking)
    assert upstream.count == 1
    assert caches(answers) == ["miss"] + ["coalesced"] * 49
    assert {answer.status for answer in answers} == {200}
    assert len({answer.body for answer in answers}) == 1
    assert len({answer.headers["X-Proxy-Request-Id"] for answer in answers}) == 50
    miss, follower = answers[0], answers[1]
    assert miss.headers["X-Proxy-Cost-USD"] == "0.002250"
    assert miss.headers["X-Proxy-Attempts"] == "1"
    assert follower.headers["Cache-Status"] == "openai-proxy; fwd=uri-miss; collapsed"
    assert follower.headers["X-Proxy-Cost-USD"] == "0.000000"
    assert follower.headers["X-Proxy-Cost-Saved-USD"] == "0.002250"
    assert follower.headers["X-Proxy-Attempts"] == "0"
    assert follower.headers["X-Proxy-Total-Tokens"] == "300"
    assert follower.headers["X-Proxy-Cache-Key"] == miss.headers["X-Proxy-Cache-Key"]
    assert follower.headers["Content-Type"] == miss.headers["Content-Type"]
    receipt = await client.receipt(proxy, follower.headers["X-Proxy-Request-Id"])
    told = [receipt[name] for name in ("cache", "cost_usd", "saved_usd", "cost_status", "attempts", "status")]
    assert told == ["coalesced", "0.000000", "0.002250", "exact", 0, 200]
    assert (await client.send(proxy, question)).cache == "hit"


async def test_tokens_are_counted_once_and_the_saving_too(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy, gate = launch(settings(upstream.port)), upstream.gate()
    upstream.always(hold(gate), upstream_answers.chat())
    asking = await together(proxy, upstream, client, ask(), 5)
    gate.open()
    await asyncio.gather(*asking)
    metrics = (await client.get(proxy, "/metrics")).body.decode()
    for line in (
        'openai_proxy_tokens_total{kind="completion",model="gpt-4o"} 200.0',
        'openai_proxy_cost_usd_total{model="gpt-4o"} 0.00225',
        'openai_proxy_cost_saved_usd_total{model="gpt-4o"} 0.009',
        'openai_proxy_requests_total{cache="coalesced",endpoint="chat",model="gpt-4o",status="2xx"} 4.0',
        'openai_proxy_upstream_attempts_total{upstream="openai"} 1.0',
    ):
        assert line in metrics, metrics


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/moderations", "/v1/responses", "/v1/completions"])
async def test_the_other_endpoints(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, path: str) -> None:
    gate, question = upstream.gate(), {"model": "m", "input": f"same {time.monotonic_ns()}", "prompt": "same"}

    def script(request: Request) -> Answer:
        answer = upstream_answers.behave(request)
        return [hold(gate), *([answer] if callable(answer) else answer)]

    upstream.script = script
    asking = tasks(*(client.send(proxy, question, path=path) for _ in range(10)))
    await in_flight(proxy, client, 10)
    gate.open()
    answers = await asyncio.gather(*asking)
    assert sorted(map(str, caches(answers))) == ["coalesced"] * 9 + ["miss"]
    assert upstream.count == 1


async def test_1000_equal_requests(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port, server={"max_in_flight": 2000}, log={"level": "warning"}))
    for fields in ({}, {"stream": True}):
        gate, before = upstream.gate(), upstream.count
        answer = upstream_answers.stream(upstream_answers.chat_events()) if fields else [upstream_answers.chat()]
        upstream.always(hold(gate), *answer)
        asking = await together(proxy, upstream, client, ask(**fields), 1000)
        gate.open()
        answers = await asyncio.gather(*asking)
        assert {reply.status for reply in answers} == {200}
        assert len({reply.body for reply in answers}) == 1
        assert caches(answers).count("coalesced") == 999
        assert upstream.count == before + 1


async def test_coalesce_false(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy, gate, question = launch(settings(upstream.port, cache={"coalesce": False})), upstream.gate(), ask()
    upstream.always(hold(gate), upstream_answers.chat())
    asking = tasks(*(client.send(proxy, question) for _ in range(5)))
    await upstream.until(lambda: upstream.count == 5)
    gate.open()
    assert set(caches(await asyncio.gather(*asking))) == {"miss"}


async def test_clients_and_namespaces_share_nothing(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    keys = [{"name": name, "key": secret(name)} for name in ("anna", "ben")]
    proxy, gate, question = launch(settings(upstream.port, server={"client_keys": keys})), upstream.gate(), ask()
    upstream.always(hold(gate), upstream_answers.chat())
    anna, ben = ({"Authorization": f"Bearer {secret(name)}"} for name in ("anna", "ben"))
    asking = tasks(*(client.send(proxy, question, one) for one in (anna, ben, anna | {"X-Proxy-Cache-Namespace": "n"})))
    await upstream.until(lambda: upstream.count == 3)
    gate.open()
    assert caches(await asyncio.gather(*asking)) == ["miss"] * 3


async def test_no_cache_is_not_coalesced(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    gate, question = upstream.gate(), ask()
    upstream.always(hold(gate), upstream_answers.chat())
    asking = tasks(*(client.send(proxy, question, {"Cache-Control": "no-cache"}) for _ in range(3)))
    await upstream.until(lambda: upstream.count == 3)
    gate.open()
    await asyncio.gather(*asking)


# Who leaves.


@pytest.mark.parametrize("stream", [False, True])
async def test_the_leaders_client_is_killed_and_49_are_answered(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, stream: bool
) -> None:
    gate, question = upstream.gate(), ask(stream=stream)
    events = upstream_answers.chat_events()
    upstream.always(
        *([hold(gate), *upstream_answers.stream(events)] if stream else [hold(gate), upstream_answers.chat()])
    )
    _, leader = await asyncio.open_connection("127.0.0.1", proxy.port)
    body = upstream_answers.dump(question)
    leader.write(raw_request("POST", "/v1/chat/completions", {"Content-Type": "application/json"}, body))
    await upstream.until(lambda: upstream.count == 1)
    asking = tasks(*(client.send(proxy, question) for _ in range(49)))
    await in_flight(proxy, client, 50)
    leader.transport.abort()
    await in_flight(proxy, client, 49)
    gate.open()
    answers = await asyncio.gather(*asking)
    assert [answer.status for answer in answers] == [200] * 49
    assert caches(answers) == ["coalesced"] * 49
    assert upstream.count == 1
    assert (await client.send(proxy, question)).cache == "hit"


async def test_followers_get_the_rest_when_the_leader_leaves_mid_stream(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    gate, question, events = upstream.gate(), ask(**USAGE), upstream_answers.chat_events(["a", "b"], include_usage=True)
    rest = upstream_answers.chunked(b"".join(events[2:])) + upstream_answers.LAST_CHUNK
    upstream.always(*upstream_answers.stream(events[:2], end=False), hold(gate), send(rest))
    async with client.open(proxy, question) as leader:
        await leader.content.readexactly(len(events[0]))
        follower = asyncio.create_task(client.send(proxy, question))
        await in_flight(proxy, client, 2)
        leader.close()
    await in_flight(proxy, client, 1)
    gate.open()
    assert (await follower).body == b"".join(events)
    assert upstream.count == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_the_upstream_is_closed_when_the_last_client_leaves(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, stream: bool
) -> None:
    question = ask(stream=stream)
    upstream.always(
        *(upstream_answers.stream(upstream_answers.chat_events()[:2], end=False) if stream else []), stall()
    )
    asking = await together(proxy, upstream, client, question, 20)
    for task in asking[:-1]:
        task.cancel()
    await in_flight(proxy, client, 1)
    assert not upstream.last.peer_gone
    asking[-1].cancel()
    await upstream.until(lambda: upstream.last.peer_gone)
    await asyncio.gather(*asking, return_exceptions=True)
    upstream.script = upstream_answers.behave
    assert (await client.send(proxy, question)).cache == "miss"


async def test_each_client_keeps_its_own_deadline(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    hurried = {"X-Proxy-Timeout": "400ms"}
    for first, second in ((hurried, {}), ({}, hurried)):
        question, before, gate = ask(), upstream.count, upstream.gate()
        upstream.always(hold(gate), upstream_answers.chat())
        asking = tasks(client.send(proxy, question, first))
        await upstream.until(lambda before=before: upstream.count == before + 1)  # type: ignore[misc]
        asking += tasks(client.send(proxy, question, second))
        done, [patient] = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        late = done.pop().result()
        assert (late.status, late.error) == (504, "upstream_timeout")
        gate.open()
        assert (await patient).status == 200
        assert upstream.count == before + 1


# Failures.


async def test_a_follower_leads_after_the_leaders_500(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy, gate = launch(settings(upstream.port, **ONCE)), upstream.gate()
    upstream.queue("/v1/chat/completions", [hold(gate), upstream_answers.server_error()], upstream_answers.chat())
    asking = await together(proxy, upstream, client, ask(), 50)
    gate.open()
    answers = await asyncio.gather(*asking)
    assert [answer.status for answer in answers] == [500] + [200] * 49
    assert sorted(map(str, caches(answers))) == ["coalesced"] * 48 + ["miss"] * 2
    assert upstream.count == 2


async def test_after_two_failures_there_is_no_third_call(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy, gate = launch(settings(upstream.port, **ONCE)), upstream.gate()
    upstream.always(hold(gate), upstream_answers.server_error(503))
    asking = await together(proxy, upstream, client, ask(), 20)
    gate.open()
    answers = await asyncio.gather(*asking)
    assert {answer.status for answer in answers} == {503}
    assert upstream.count == 2


async def test_followers_wait_for_the_leaders_retry(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy, gate = launch(settings(upstream.port)), upstream.gate()
    upstream.queue("/v1/chat/completions", [hold(gate), upstream_answers.server_error()], upstream_answers.chat())
    asking = await together(proxy, upstream, client, ask(), 10)
    gate.open()
    answers = await asyncio.gather(*asking)
    assert [answer.status for answer in answers] == [200] * 10
    assert (answers[0].headers["X-Proxy-Attempts"], answers[1].headers["X-Proxy-Attempts"]) == ("2", "0")
    assert upstream.count == 2


@pytest.mark.parametrize("status", [400, 404, 422])
async def test_a_deterministic_error_is_shared(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, status: int
) -> None:
    gate = upstream.gate()
    upstream.always(hold(gate), upstream_answers.error(status, "no such thing", "wrong"))
    asking = await together(proxy, upstream, client, ask(), 10)
    gate.open()
    answers = await asyncio.gather(*asking)
    assert {answer.status for answer in answers} == {status}
    assert len({answer.body for answer in answers}) == 1
    assert upstream.count == 1


async def test_a_cut_stream_is_cut_for_every_client(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    gate, question = upstream.gate(), ask(**USAGE)
    events = upstream_answers.chat_events(include_usage=True)[:3]

    async def end(connection: Any) -> None:
        connection.close()

    upstream.always(*upstream_answers.stream(events, end=False), hold(gate), end)

    async def read() -> tuple[bytes, bool]:
        async with client.open(proxy, question) as answer:
            return await read_until_broken(answer)

    reading = tasks(*(read() for _ in range(5)))
    await in_flight(proxy, client, 5)
    gate.open()
    for body, clean in await asyncio.gather(*reading):
        assert body.startswith(b"".join(events))
        assert body.count(b'"upstream_invalid_response"') == 1
        assert not clean
    assert upstream.count == 1


# What cannot be shared.


async def test_uncacheable_responses_are_not_serialised(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    question = ask()
    upstream.always(sleep(0.5), upstream_answers.chat(finish_reason="content_filter"))
    began = time.monotonic()
    answers = await asyncio.gather(*(client.send(proxy, question) for _ in range(100)))
    assert time.monotonic() - began < AT_ONCE  # in a line: 50 s
    assert (set(caches(answers)), upstream.count) == ({"miss"}, 100)
    answers = await asyncio.gather(*(client.send(proxy, question) for _ in range(100)))  # it is remembered
    assert max(answer.seconds for answer in answers) < AT_ONCE
    assert upstream.count == 200


async def test_requests_that_are_never_cached_are_not_coalesced(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    gate, question = upstream.gate(), ask(store=True)
    upstream.always(hold(gate), upstream_answers.chat())
    asking = tasks(*(client.send(proxy, question) for _ in range(20)))
    await upstream.until(lambda: upstream.count == 20)
    gate.open()
    assert set(caches(await asyncio.gather(*asking))) == {"bypass"}


# Streams.


async def test_a_running_stream_is_joined(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    """All events so far, then the rest as they come; the usage chunk only for who asked."""
    events = upstream_answers.chat_events(["a", "b", "c"], include_usage=True)
    gates = [upstream.gate() for _ in events]
    steps: list[Step] = [send(upstream_answers.stream_head())]
    for event, gate in zip(events, gates, strict=True):
        steps += [send(upstream_answers.chunked(event)), hold(gate)]
    upstream.always(*steps, send(upstream_answers.LAST_CHUNK))
    question = ask(stream=True)
    wanting = question | USAGE
    async with client.open(proxy, question) as first:
        for event, gate in zip(events[:2], gates, strict=False):
            assert await asyncio.wait_for(first.content.readexactly(len(event)), 5) == event
            gate.open()
        async with client.open(proxy, wanting) as late:
            so_far = b"".join(events[:3])
            assert await asyncio.wait_for(late.content.readexactly(len(so_far)), 5) == so_far
            for event, before in zip(events[3:], gates[2:], strict=False):
                before.open()
                assert await asyncio.wait_for(late.content.readexactly(len(event)), 5) == event
            gates[-1].open()
            assert await late.content.read() == b""
        assert await first.content.read() == b"".join([*events[2:-2], events[-1]])
        assert first.headers["X-Proxy-Cost-Status"] == "pending"
        assert late.headers["X-Proxy-Cache"] == "coalesced"
        assert late.headers["Cache-Status"] == "openai-proxy; fwd=uri-miss; collapsed"
        assert late.headers["X-Proxy-Cost-USD"] == "0.000000"
        assert "X-Proxy-Cost-Saved-USD" not in late.headers
    receipt = await client.receipt(proxy, late.headers["X-Proxy-Request-Id"])
    assert (receipt["cache"], receipt["saved_usd"]) == ("coalesced", "0.002250")
    receipt = await client.receipt(proxy, first.headers["X-Proxy-Request-Id"])
    assert (receipt["cache"], receipt["cost_usd"]) == ("miss", "0.002250")
    assert upstream.count == 1
    assert (await client.send(proxy, wanting)).body == b"".join(events)


def large(megabytes: int) -> tuple[list[bytes], bytes]:
    """A stream of that size in events of 64 KB, and its bytes as the client gets them."""
    text = "x" * 65_400
    events = upstream_answers.chat_events([text] * (megabytes * 16), include_usage=True)
    return events, b"".join(events)


async def stalled(proxy: ProxyProcess, body: dict[str, Any]) -> socket.socket:
    """A client that asks and reads nothing."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", proxy.port))
    head = {"Content-Type": "application/json"}
    await loop.sock_sendall(sock, raw_request("POST", "/v1/chat/completions", head, upstream_answers.dump(body)))
    return sock


async def test_a_slow_follower_gets_everything_and_delays_no_other(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    gate, question = upstream.gate(), ask(**USAGE)
    events, whole = large(6)
    upstream.always(hold(gate), *upstream_answers.stream(events))
    asking = await together(proxy, upstream, client, question, 3)
    slow = await stalled(proxy, question)
    await in_flight(proxy, client, 4)
    gate.open()
    answers = await asyncio.wait_for(asyncio.gather(*asking), 20)
    assert {answer.body for answer in answers} == {whole}
    loop, got = asyncio.get_running_loop(), bytearray()
    while b"[DONE]" not in got[-100:]:
        piece = await asyncio.wait_for(loop.sock_recv(slow, 2**20), 10)
        assert piece
        got += piece
    slow.close()
    assert len(got) > len(whole)  # with its head and the chunks' sizes
    assert upstream.count == 1


async def test_followers_that_stall_are_cut_off_and_memory_stays_bounded(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port, log={"level": "info"}))
    await client.send(proxy, ask())
    gate, question = upstream.gate(), ask(**USAGE)
    events, whole = large(40)
    upstream.always(hold(gate), *upstream_answers.stream(events))
    asking = await together(proxy, upstream, client, question, 2)
    slow = [await stalled(proxy, question) for _ in range(50)]
    await in_flight(proxy, client, 52)
    before = proxy.rss()
    gate.open()
    answers = await asyncio.wait_for(asyncio.gather(*asking), 30)
    assert [answer.body == whole for answer in answers] == [True] * 2
    await in_flight(proxy, client, 0)  # the stalled ones were cut off
    after = proxy.rss()
    for sock in slow:
        sock.close()
    if before is not None and after is not None:
        assert after - before < 100 * 2**20  # 50 times 40 MB went nowhere
    assert proxy.stderr_so_far().count("client_too_slow") == 50


async def test_a_lone_reader_that_stalls_stops_the_upstream(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    question = ask(**USAGE)
    upstream.always(*upstream_answers.stream(large(60)[0]))
    slow = await stalled(proxy, question)
    await upstream.until(lambda: upstream.count == 1)
    seen = -1
    while upstream.last.sent > seen:
        seen = upstream.last.sent
        await asyncio.sleep(0.5)
    assert seen < 20 * 2**20
    slow.close()
    await upstream.until(lambda: upstream.last.peer_gone)


async def test_a_stop_ends_every_shared_stream_with_an_error_event(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy, question = launch(settings(upstream.port, server={"drain_timeout": "500ms"})), ask(**USAGE)
    events = upstream_answers.chat_events()[:2]
    upstream.always(*upstream_answers.stream(events, end=False), stall())

    async def read() -> tuple[bytes, bool]:
        async with client.open(proxy, question) as answer:
            return await read_until_broken(answer)

    reading = tasks(*(read() for _ in range(5)))
    await in_flight(proxy, client, 5)
    proxy.terminate()
    for body, clean in await asyncio.gather(*reading):
        assert body.startswith(b"".join(events))
        assert b'"draining"' in body
        assert not clean
    assert proxy.wait() == 0
    await upstream.until(lambda: upstream.last.peer_gone)


# Plain and streamed, and several processes.


async def test_plain_and_streamed_requests_together_make_one_call(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    question, gate = ask(**USAGE), upstream.gate()
    events = upstream_answers.chat_events(["a", "b"], include_usage=True)
    rest = upstream_answers.chunked(b"".join(events[2:])) + upstream_answers.LAST_CHUNK
    upstream.always(*upstream_answers.stream(events[:2], end=False), hold(gate), send(rest))
    plain = {name: value for name, value in question.items() if not name.startswith("stream")}
    asking = await together(proxy, upstream, client, question, 10)
    asking += tasks(*(client.send(proxy, plain) for _ in range(10)))
    await in_flight(proxy, client, 20)
    gate.open()
    answers = await asyncio.gather(*asking)
    assert caches(answers) == ["miss"] + ["coalesced"] * 19
    assert {answer.body for answer in answers[:10]} == {b"".join(events)}
    assert [answer.json()["choices"][0]["message"]["content"] for answer in answers[10:]] == ["ab"] * 10
    assert answers[10].headers["X-Proxy-Cost-Saved-USD"] == "0.002250"
    assert upstream.count == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_on_disconnect_finish(launch: Launch, upstream: ScriptedUpstream, client: Client, stream: bool) -> None:
    proxy, gate = launch(settings(upstream.port, cache={"on_disconnect": "finish"})), upstream.gate()
    question = ask(stream=stream)
    answer = upstream_answers.stream(upstream_answers.chat_events()) if stream else [upstream_answers.chat()]
    upstream.always(hold(gate), *answer)
    asking = await together(proxy, upstream, client, question, 3)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    await in_flight(proxy, client, 0)
    gate.open()
    end = time.monotonic() + 5
    while (await client.send(proxy, question, {"Cache-Control": "only-if-cached"})).status != 200:
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
    assert upstream.count == 1
    proxy.terminate()
    assert proxy.wait() == 0


async def test_a_stop_waits_for_responses_read_for_the_cache(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    cache = {"on_disconnect": "finish", "backend": "sqlite", "path": str(tmp_path / "c.db")}
    proxy, gate, question = launch(settings(upstream.port, cache=cache)), upstream.gate(), ask()
    upstream.always(hold(gate), upstream_answers.chat())
    asking = await together(proxy, upstream, client, question, 1)
    asking[0].cancel()
    await in_flight(proxy, client, 0)
    proxy.terminate()
    await asyncio.sleep(0.2)
    gate.open()
    assert proxy.wait() == 0
    assert (await client.send(launch(settings(upstream.port, cache=cache)), question)).cache == "hit"


@pytest.mark.parametrize("stream", [False, True])
async def test_two_processes_that_share_redis_make_one_call(
    launch: Launch, upstream: ScriptedUpstream, client: Client, stream: bool
) -> None:
    with valkey() as server:
        config = settings(upstream.port, cache={"backend": "redis"}, redis={"url": server.url})
        one, other = launch(config), launch(config)
        answer = upstream_answers.stream(upstream_answers.chat_events()) if stream else [upstream_answers.chat()]
        for _ in range(10):  # on a busy machine Redis may be late, which costs a call
            gate, question, before = upstream.gate(), ask(stream=stream), upstream.count
            upstream.always(hold(gate), *answer)
            asking = await together(one, upstream, client, question, 5)
            there = tasks(*(client.send(other, question) for _ in range(5)))
            await in_flight(other, client, 5)
            await asyncio.sleep(0.3)
            gate.open()
            answers = await asyncio.gather(*asking, *there)
            assert {reply.status for reply in answers} == {200}
            assert len({reply.body for reply in answers}) == 1
            if upstream.count == before + 1:
                break
        assert upstream.count == before + 1
        assert caches(answers).count("miss") == 1
        # Redis goes away: nobody waits for anybody in another process, and nobody sees an error.
        server.kill()
        upstream.always(upstream_answers.chat())
        answers = await asyncio.gather(*(client.send(each, ask()) for each in (one, other)))
        assert [reply.status for reply in answers] == [200, 200]


async def test_nothing_is_left_behind(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    """Storms of equal requests, half of which leave: file descriptors and memory come back."""
    proxy = launch(settings(upstream.port, log={"level": "warning"}))

    async def storm() -> None:
        gate, question = upstream.gate(), ask(stream=True)
        upstream.always(
            *upstream_answers.stream(upstream_answers.chat_events()[:2], end=False), hold(gate), send(_REST)
        )
        asking = await together(proxy, upstream, client, question, 30)
        for task in asking[::2]:
            task.cancel()
        gate.open()
        await asyncio.gather(*asking, return_exceptions=True)
        await in_flight(proxy, client, 0)

    await storm()
    before = proxy.fds()
    for _ in range(5):
        await storm()
    after = proxy.fds()
    assert before is None or after is None or after <= before + 5


_REST = upstream_answers.chunked(b"".join(upstream_answers.chat_events()[2:])) + upstream_answers.LAST_CHUNK
