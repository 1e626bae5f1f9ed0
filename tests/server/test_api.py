"""The handler of the main listener: fast path, pipeline, errors, browsers, and the end of streams."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from multidict import CIMultiDict

import proxy.pipeline.fetch
import proxy.server.api
import proxy.server.request_body
import proxy.server.request_parser
from proxy.config.limits import Limits
from proxy.config.settings import (
    CacheSettings,
    CostSettings,
    ServerSettings,
    Settings,
    ThrottleSettings,
    TimeoutSettings,
)
from proxy.protocol.options import NO_OPTIONS, from_headers
from proxy.server.request_parser import time_limits
from proxy.system.clock import SYSTEM_CLOCK
from proxy.upstream.retry.outcome import TransportFailure
from tests.pipeline.fixture import ask, pool, settings
from tests.pipeline.script import (
    DONE,
    HANG,
    SSE,
    Fails,
    Responds,
    chunk,
    completion,
    dump,
    error,
    event,
    events,
    says,
    streams,
)
from tests.server.kit import TEST_TIMEOUT, raw_connection, request, running_proxy, until

pytestmark = pytest.mark.slow

CUT = TransportFailure("invalid", "cut")
CHAT = "/v1/chat/completions"
Headers = Iterable[tuple[str, str]]


def server_config(**fields: Any) -> Settings:
    return replace(settings(), server=ServerSettings(**fields))


# --- hits and misses --------------------------------------------------------------------------------------------------


async def test_a_miss_is_followed_by_hits() -> None:
    async with running_proxy(says(headers=[("x-ratelimit-limit-requests", "5"), ("openai-version", "v")])) as server:
        miss = await server.ask(body=ask())
        assert (miss.status, miss.reason, miss.body) == (200, "As You Like It", dump(completion()))
        assert (miss.get("X-Proxy-Cache"), miss.get("X-Proxy-Cost-USD")) == ("miss", "0.002250")
        assert miss.get("x-request-id") == "req_1"
        slow, fast = await server.ask(body=ask()), await server.ask(body=ask())
        for hit in (slow, fast):
            assert (hit.status, hit.body) == (200, miss.body)
            names = [name for name, _ in hit.headers]
            assert len(names) == len({name.lower() for name in names})
            shown = dict(hit.headers)
            assert shown.pop("X-Proxy-Request-Id")
            assert shown.pop("Date").endswith("GMT")
            assert shown.pop("Server-Timing").startswith("queue;dur=0.0, upstream;dur=0.0, proxy;dur=")
            assert shown.pop("X-Proxy-Cache-Key") == miss.get("X-Proxy-Cache-Key")
            assert shown == {
                "Content-Type": "application/json",
                "openai-version": "v",
                "X-Proxy-Cache": "hit",
                "X-Proxy-Attempts": "0",
                "X-Proxy-Cost-USD": "0.000000",
                "X-Proxy-Cost-Status": "exact",
                "X-Proxy-Cost-Saved-USD": "0.002250",
                "X-Proxy-Prompt-Tokens": "100",
                "X-Proxy-Cached-Tokens": "0",
                "X-Proxy-Completion-Tokens": "200",
                "X-Proxy-Total-Tokens": "300",
                "Age": "0",
                "Cache-Status": "openai-proxy; hit; ttl=86399; detail=sampled",
                "Content-Length": str(len(miss.body)),
            }
        assert len(server.transport.sent) == 1


async def test_a_hit_parses_nothing_and_logs_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_proxy(says()) as server:
        for _ in range(2):
            await server.ask(body=ask())
        monkeypatch.setattr(proxy.server.request_parser, "parse_body", None)
        caplog.set_level(logging.DEBUG)
        caplog.clear()
        assert (await server.ask(body=ask())).get("X-Proxy-Cache") == "hit"
        assert [record for record in caplog.records if record.name.startswith("proxy")] == []


async def test_the_rendered_head_of_a_hit_belongs_to_its_entry() -> None:
    """A head is rendered once for each entry."""
    async with running_proxy(
        says(headers=[("openai-version", "1")]), says(headers=[("openai-version", "2")])
    ) as server:
        for _ in range(3):
            await server.ask(body=ask())
        await server.ask(body=ask(), headers=[("Cache-Control", "no-cache")])
        assert (await server.ask(body=ask())).get("openai-version") == "2"


async def test_kept_heads_and_routes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.server.api, "_MAX_MEMOIZED", 3)
    async with running_proxy(*[says()] * 10) as server:
        for n in range(10):
            for _ in range(2):
                target = f"{CHAT}?n={n}"
                assert (await server.ask("POST", target, ask())).status == 200
            await server.ask("GET", f"/nowhere/{n}")
        assert len(server.api._heads) <= 3
        assert len(server.api._routes) <= 3
        assert (await server.ask("POST", f"{CHAT}?n=0", ask())).get("X-Proxy-Cache") == "hit"


async def test_long_targets_are_not_kept() -> None:
    async with running_proxy(says()) as server:
        await server.ask("POST", f"{CHAT}?{'x' * 300}", ask())
        assert server.api._routes == {}


@pytest.mark.parametrize("segment", ["max-age=0", "stream-cost=comment"])
async def test_options_in_the_base_url_apply_to_every_request(segment: str) -> None:
    """The fast path knows no options, so requests with options must not take it."""
    target = f"/_/{segment}{CHAT}"
    now = 1_790_000_000.0
    clock = replace(SYSTEM_CLOCK, wall=lambda: now)
    async with running_proxy(*[streams()] * 3, clock=clock) as server:
        first, *others = [await server.ask("POST", target, ask(stream=True)) for _ in range(3)]
        assert all(other.get("X-Proxy-Cache") == "hit" for other in others)
        if segment.startswith("stream"):
            assert b": x-proxy-cost-usd=0.002250 x-proxy" in first.body
            zero = b": x-proxy-cost-usd=0.000000 x-proxy-prompt-tokens=100 x-proxy-completion-tokens=200\n" + DONE
            assert all(other.body.endswith(zero) for other in others)
        now += 1.0
        again = await server.ask("POST", target, ask(stream=True))
        assert again.get("X-Proxy-Cache") == ("miss" if segment == "max-age=0" else "hit")


async def test_configured_cost_comments_are_in_every_stream() -> None:
    async with running_proxy(streams(), says(), config=settings(cost=CostSettings(stream_comment=True))) as server:
        for cost in (b"0.002250", b"0.000000", b"0.000000"):
            answer = await server.ask(body=ask(stream=True))
            assert answer.body.count(b": x-proxy-cost-usd=" + cost) == 1
        for _ in range(3):
            assert (await server.ask(body=ask(x=1))).body == dump(completion())


async def test_json_to_a_stream_request_has_no_cost_comment() -> None:
    async with running_proxy(*[says()] * 3, config=settings(cost=CostSettings(stream_comment=True))) as server:
        for _ in range(3):
            assert (await server.ask(body=ask(stream=True))).body == dump(completion())


async def test_requests_with_options_do_not_take_the_fast_path() -> None:
    async with running_proxy(*[says()] * 5) as server:

        async def cache(*headers: tuple[str, str]) -> str | None:
            return (await server.ask(body=ask(), headers=headers)).get("X-Proxy-Cache")

        assert [await cache(), await cache(), await cache()] == ["miss", "hit", "hit"]
        assert await cache(("cache-control", "no-store")) == "bypass"
        assert await cache(("X-PROXY-Sample", "1")) == "miss"
        assert await cache(("x-proxy-cache-namespace", "ci")) == "miss"
        assert await cache(("OpenAI-Beta", "x")) == "miss"
        assert await cache(("X-Stainless-Retry-Count", "1")) == "hit"


# --- streams ----------------------------------------------------------------------------------------------------------


async def test_a_stream_is_chunked_and_its_hit_has_a_length() -> None:
    async with running_proxy(streams()) as server:
        miss, hit = await server.ask(body=ask(stream=True)), await server.ask(body=ask(stream=True))
        assert (miss.framing, miss.whole, hit.framing) == ("chunked", True, "length")
        assert miss.body == hit.body == b"".join(events())
        assert (miss.get("Cache-Control"), miss.get("X-Accel-Buffering")) == ("no-cache", "no")
        assert miss.get("X-Proxy-Cost-Status") == "pending"
        assert miss.get("Connection") is None
        assert hit.get("Content-Type") == SSE[1]


async def test_buffering_headers_of_the_upstream_are_kept() -> None:
    async with running_proxy(
        streams(headers=[("cache-control", "no-transform"), ("x-accel-buffering", "yes")])
    ) as server:
        answer = await server.ask(body=ask(stream=True))
        assert (answer.get("Cache-Control"), answer.get("X-Accel-Buffering")) == ("no-transform", "yes")


async def test_a_broken_stream_ends_with_an_error_event_and_no_last_chunk() -> None:
    async with running_proxy(streams([*events()[:2], CUT])) as server:
        answer = await server.ask(body=ask(stream=True))
        assert (answer.status, answer.framing, answer.whole) == (200, "chunked", False)
        last = orjson.loads(answer.chunks[-1].removeprefix(b"data: "))
        assert last["error"]["code"] == "upstream_invalid_response"
        assert answer.get("Connection") is None


async def test_http_1_0_gets_a_stream_without_chunks() -> None:
    async with running_proxy(streams()) as server, raw_connection(server.port) as line:
        line.send(request(body=ask(stream=True), version="1.0"))
        answer = await line.answer()
        assert (answer.framing, answer.body) == ("close", b"".join(events()))


async def test_a_broken_stream_to_an_http_1_0_client_ends_with_a_reset() -> None:
    """A mere close would be the end of the body (RFC 9112 section 6.3)."""
    async with running_proxy(streams([*events()[:2], CUT])) as server, raw_connection(server.port) as line:
        line.send(request(body=ask(stream=True), version="1.0"))
        assert (await line.answer()).whole is False


@pytest.mark.parametrize("move", [streams([*events()[:2], HANG]), Fails("hang"), Responds(body=(b"{", HANG))])
async def test_the_upstream_is_closed_at_once_when_the_client_leaves(move: Any) -> None:
    async with running_proxy(move) as server:
        async with raw_connection(server.port) as line:
            line.send(request(body=ask(stream=True)))
            await until(lambda: server.in_flight.requests == 1 and server.transport.sent)
            await line.gone()
        await server.settled()
        assert [(receipt.status, receipt.error) for receipt in server.receipts] == [(499, "client_gone")]


async def test_a_client_that_leaves_the_queue_is_not_sent() -> None:
    config = settings(throttle=ThrottleSettings(limits={"*": Limits(concurrency=1)}))
    async with running_proxy(Fails("hang"), config=config) as server:
        async with raw_connection(server.port) as first, raw_connection(server.port) as second:
            first.send(request(body=ask("a")))
            await until(lambda: server.transport.sent)
            second.send(request(body=ask("b")))
            await until(lambda: server.services.admission.depth == 1)
            await second.gone()
            await until(lambda: server.services.admission.depth == 0)
            await first.gone()
        assert len(server.transport.sent) == 1


async def test_draining_ends_streams_with_an_error_event() -> None:
    async with running_proxy(streams([event(chunk("a")), HANG])) as server, raw_connection(server.port) as line:
        line.send(request(body=ask(stream=True)))
        await line.reader.readuntil(b'"a"')
        [(task, flow)] = server.in_flight.streams.items()
        flow.interrupted = "draining"
        task.cancel()
        rest = await line.ended()
        assert b'"code":"draining"' in rest
        assert not rest.endswith(b"0\r\n\r\n")


async def test_while_draining_new_requests_are_refused() -> None:
    async with running_proxy() as server:
        server.in_flight.closing = True
        for method, target, body in (("POST", CHAT, ask()), ("GET", "/v1/models", None)):
            answer = await server.ask(method, target, body)
            assert (answer.status, answer.error, answer.get("Retry-After")) == (503, "draining", "1")
        assert (await server.ask("GET", "/healthz")).status == 200


async def test_a_body_sent_too_slowly_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.server.request_body, "BODY_TIMEOUT", 0.05)
    async with running_proxy() as server, raw_connection(server.port) as line:
        line.send(request(headers=[("Content-Type", "application/json"), ("Content-Length", "9")]) + b'{"a')
        assert await line.ended() == b""
        assert server.receipts == []  # it never became a call


# --- overload ---------------------------------------------------------------------------------------------------------


async def test_requests_beyond_max_in_flight_are_refused() -> None:
    config = server_config(max_in_flight=2)
    async with running_proxy(says(), Fails("hang"), Fails("hang"), config=config) as server:
        await server.ask(body=ask("stored"))
        async with raw_connection(server.port) as first, raw_connection(server.port) as second:
            for n, line in enumerate((first, second)):
                line.send(request(body=ask(str(n))))
                await until(lambda n=n: server.in_flight.requests == n + 1)  # type: ignore[misc]
            answer = await server.ask(body=ask("c"))
            assert (answer.status, answer.error, answer.get("Retry-After")) == (503, "overloaded", "1")
            assert (await server.ask("GET", "/v1/models")).error == "overloaded"
            assert (await server.ask(body=ask("stored"))).get("X-Proxy-Cache") == "hit"  # hits are served all the same
            await first.gone()
            await second.gone()


async def test_queued_requests_do_not_count_as_in_flight() -> None:
    """Five requests wait for one permit, although only two may be in flight."""
    config = replace(server_config(max_in_flight=2), throttle=ThrottleSettings(limits={"*": Limits(concurrency=1)}))
    async with running_proxy(*[says(wait=0.02)] * 6, config=config) as server:
        tasks = []
        async with asyncio.timeout(TEST_TIMEOUT):
            for n in range(6):
                tasks.append(asyncio.create_task(server.ask(body=ask(str(n)))))
                while server.in_flight.requests + len(server.receipts) <= n:  # noqa: ASYNC110 - one after the other
                    await asyncio.sleep(0.001)
            assert [(await task).status for task in tasks] == [200] * 6


# --- time limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "total", "act_for"),
    [
        ([], 60.0, 60.0),
        ([("X-Proxy-Timeout", "5s")], 5.0, 5.0),
        ([("X-Stainless-Read-Timeout", "20")], 60.0, 19.0),
        ([("X-Stainless-Timeout", "20"), ("X-Stainless-Read-Timeout", "10")], 60.0, 9.0),
        ([("X-Stainless-Timeout", "0.5")], 60.0, 0.45),
        ([("X-Stainless-Timeout", "600")], 60.0, 60.0),
        ([("X-Stainless-Timeout", "20"), ("X-Proxy-Timeout", "5s")], 5.0, 5.0),
        ([("X-Stainless-Timeout", "soon"), ("X-Stainless-Read-Timeout", "-1")], 60.0, 60.0),
        ([("X-Stainless-Timeout", "nan"), ("X-Stainless-Read-Timeout", "1e300")], 60.0, 60.0),
    ],
)
async def test_the_clients_own_timeout_bounds_what_the_proxy_does_by_itself(
    headers: Headers, total: float, act_for: float
) -> None:
    async with running_proxy(says()) as server:
        await server.ask(body=ask(), headers=headers)
        assert max(0.0, total - 1.0) < server.transport.sent[0].first_byte <= total
        now = 1000.0
        raw = SimpleNamespace(headers=CIMultiDict(headers))
        options = from_headers(NO_OPTIONS, headers)
        limits = time_limits(server.services.settings, options, raw, now)  # type: ignore[arg-type]
        assert (limits.deadline - now, limits.act_until - now) == pytest.approx((total, act_for))


@pytest.mark.parametrize(
    ("max_wait", "headers", "seconds"),
    [
        (None, [], 15.0),
        (None, [("X-Stainless-Read-Timeout", "12")], 7.0),
        (None, [("X-Proxy-Timeout", "3")], 0.0),
        (30.0, [], 30.0),
        (30.0, [("X-Proxy-Max-Wait", "2s")], 2.0),
    ],
)
async def test_max_wait_of_each_request(max_wait: float | None, headers: Headers, seconds: float) -> None:
    config = settings(throttle=ThrottleSettings(max_wait=max_wait), timeouts=TimeoutSettings(total=20.0))
    raw = SimpleNamespace(headers=CIMultiDict(headers))
    limits = time_limits(config, from_headers(NO_OPTIONS, headers), raw, 0.0)  # type: ignore[arg-type]
    assert limits.max_wait == pytest.approx(seconds)


# --- upstream errors --------------------------------------------------------------------------------------------------


async def test_an_upstream_error_is_passed_with_its_status_and_masked_keys() -> None:
    bad = error(418, "teapot", [("Set-Cookie", "a=b"), ("x-debug", "sk-k1")], message="sk-k1 is short and stout")
    async with running_proxy(bad) as server:
        answer = await server.ask(body=ask())
        assert (answer.status, answer.reason) == (418, "As You Like It")
        assert answer.json()["error"]["message"] == "*** is short and stout"
        assert (answer.get("Set-Cookie"), answer.get("x-debug"), answer.error) == (None, "***", None)


async def test_errors_after_an_attempt_carry_its_headers() -> None:
    async with running_proxy(Responds(302)) as server:
        answer = await server.ask(body=ask())
        assert (answer.status, answer.error) == (502, "upstream_invalid_response")
        assert answer.get("X-Proxy-Attempts") == "1"
        assert answer.get("X-Proxy-Upstream") == "openai"
        assert server.receipts[0].id == answer.get("X-Proxy-Request-Id")
        text = server.metrics.render(server.services, 0).decode()
        assert 'openai_proxy_errors_total{code="upstream_invalid_response"} 1.0' in text  # counted once


async def test_a_204_has_no_body_and_the_connection_persists() -> None:
    config = settings(pool("k1"), cache=CacheSettings(backend="off"))
    async with running_proxy(Responds(204), says(), config=config) as server, raw_connection(server.port) as line:
        line.send(request(body=ask()) + request(body=ask()))
        assert [(await line.answer()).status for _ in range(2)] == [204, 200]


async def test_a_response_too_large_to_hold_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.pipeline.fetch, "SPILL", 100)
    async with running_proxy(Responds(body=(b"{" + b" " * 200, b" " * 100, b"}"))) as server:
        answer = await server.ask(body=ask())
        assert (answer.framing, answer.whole, len(answer.body)) == ("chunked", True, 302)
        assert answer.get("X-Accel-Buffering") is None
