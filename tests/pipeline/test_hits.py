"""Hits from memory: when, how old, and the fast lane (docs/caching.md)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest

import proxy.cache.lookup
import proxy.cache.planner
import proxy.system.threads
import proxy.upstream.reader
from proxy.cache.lookup import digest_of_request
from proxy.config.settings import CacheSettings, TtlSettings
from proxy.pipeline.coalescing.reply import Reply
from proxy.protocol.options import Options
from proxy.protocol.request import ProxyRequest
from tests.pipeline.clock import virtual_time
from tests.pipeline.fixture import CHAT, PipelineFixture, Result, ask, settings
from tests.pipeline.script import DONE, chunk, completion, dump, error, event, events, says, streams


async def ages(scene: PipelineFixture, seconds: float) -> None:
    await scene.clock.sleep(seconds)


@virtual_time
async def test_a_hit_is_byte_identical_and_sends_nothing_upstream() -> None:
    scene = PipelineFixture(
        says(headers=[("x-ratelimit-limit-requests", "9"), ("openai-version", "v"), ("Date", "today")])
    )
    told = await scene.ask()
    hit = await scene.ask()
    assert (hit.status, hit.body, hit.cache) == (200, told.body, "hit")
    assert dict(hit.raw_headers) == {b"Content-Type": b"application/json", b"openai-version": b"v"}
    assert hit.hit is not None
    assert (hit.hit.entry.cost, hit.hit.entry.sampled, hit.hit.entry.namespace) == ("0.002250", True, "")
    assert len(scene.transport.sent) == 1
    assert len(scene.receipts) == 1  # hits are the edge's to count
    assert hit.hit.id != told.headers["X-Proxy-Request-Id"]


@virtual_time
async def test_an_expired_entry_is_not_served() -> None:
    scene = PipelineFixture(
        says(), says(completion("new")), config=settings(cache=CacheSettings(ttl=TtlSettings(chat=100.0)))
    )
    await scene.ask()
    await ages(scene, 99.0)
    assert (await scene.ask()).cache == "hit"
    await ages(scene, 1.0)
    told = await scene.ask()
    assert (told.cache, told.reason, told.headers["Cache-Status"]) == (
        "miss",
        "expired",
        "openai-proxy; fwd=stale; stored",
    )
    hit = await scene.ask()
    assert hit.json()["choices"][0]["message"]["content"] == "new"


@pytest.mark.parametrize(("ttl", "age", "cache"), [(5.0, 4.0, "hit"), (5.0, 5.0, "miss"), (0.0, 0.0, "miss")])
@virtual_time
async def test_a_request_can_set_its_ttl(ttl: float, age: float, cache: str) -> None:
    scene = PipelineFixture(says(), says())
    told = await scene.ask(None, Options(ttl=ttl))
    assert told.headers["Cache-Status"] == "openai-proxy; fwd=uri-miss" + ("; stored" if ttl else "")
    await ages(scene, age)
    assert (await scene.ask()).cache == cache


@virtual_time
async def test_max_age_limits_the_age_of_a_hit() -> None:
    scene = PipelineFixture(says(), says())
    await scene.ask()
    await ages(scene, 10.0)
    assert (await scene.ask(None, Options(max_age=10))).cache == "hit"
    await ages(scene, 1.0)
    told = await scene.ask(None, Options(max_age=10))
    assert (told.cache, told.reason) == ("miss", "max-age")
    assert told.headers["Cache-Status"] == "openai-proxy; fwd=request; stored; detail=max-age"
    assert (await scene.ask(None, Options(max_age=0))).cache == "hit"  # it has just been renewed


@virtual_time
async def test_no_cache_does_not_read_and_does_store() -> None:
    scene = PipelineFixture(says(), says(completion("new")))
    await scene.ask()
    assert (await scene.ask(None, Options(no_cache=True))).cache == "miss"
    hit = await scene.ask()
    assert (hit.cache, hit.json()["choices"][0]["message"]["content"]) == ("hit", "new")


@virtual_time
async def test_no_store_neither_reads_nor_stores() -> None:
    scene = PipelineFixture(says(), says(), says())
    assert (await scene.ask(None, Options(no_store=True))).cache == "bypass"
    assert (await scene.ask()).cache == "miss"
    assert (await scene.ask(None, Options(no_store=True))).cache == "bypass"


@pytest.mark.parametrize(
    ("document", "options", "reason"),
    [
        (ask(), Options(only_if_cached=True), "new"),
        (ask(store=True), Options(only_if_cached=True), "uncacheable: store=true"),
        (ask(), Options(only_if_cached=True, no_store=True), "no-store"),
        (ask(), Options(only_if_cached=True, no_cache=True), "no-cache"),
    ],
)
@virtual_time
async def test_only_if_cached_sends_nothing_upstream(document: Any, options: Options, reason: str) -> None:
    scene = PipelineFixture()
    told = await scene.ask(document, options)
    assert (told.status, told.refused) == (504, "not_cached")
    assert told.refusal is not None
    assert told.refusal.should_retry is False
    assert reason in told.refusal.message


@virtual_time
async def test_only_if_cached_serves_a_stored_response() -> None:
    scene = PipelineFixture(says())
    await scene.ask(None, Options(ttl=10.0))
    assert (await scene.ask(None, Options(only_if_cached=True))).cache == "hit"
    await ages(scene, 10.0)
    told = await scene.ask(None, Options(only_if_cached=True))
    assert told.refusal is not None
    assert "expired" in told.refusal.message


@virtual_time
async def test_a_stored_plain_response_serves_a_stream_request() -> None:
    scene = PipelineFixture(says())
    plain = (await scene.ask()).json()
    for _ in range(2):
        streamed = await scene.ask(ask(stream=True))
        assert streamed.cache == "hit"
        assert dict(streamed.raw_headers)[b"Content-Type"] == b"text/event-stream; charset=utf-8"
        assert streamed.body.startswith(b"data: ")
        assert streamed.body.endswith(b"data: [DONE]\n\n")
        assert b'"usage":{' not in streamed.body  # nobody asked
        assert plain["choices"][0]["message"]["content"].split()[0].encode() in streamed.body
    asked = await scene.ask(ask(stream=True, stream_options={"include_usage": True}))
    assert asked.cache == "hit"
    assert b'"usage":{' in asked.body
    assert len(scene.transport.sent) == 1


@virtual_time
async def test_a_stored_stream_serves_a_plain_request() -> None:
    scene = PipelineFixture(streams(events("Hello", usage=True)))
    assert (await scene.ask(ask(stream=True))).cache == "miss"
    for _ in range(2):
        plain = await scene.ask()
        assert plain.cache == "hit"
        assert dict(plain.raw_headers)[b"Content-Type"] == b"application/json"
        assert plain.json()["object"] == "chat.completion"
        assert plain.json()["usage"]["total_tokens"]
    assert len(scene.transport.sent) == 1


@virtual_time
async def test_a_large_response_is_converted_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.system.threads, "LARGE", 10)
    scene = PipelineFixture(streams())
    await scene.ask(ask(stream=True))
    assert (await scene.ask()).cache == "hit"


@virtual_time
async def test_a_response_that_cannot_be_converted_is_stored_in_both_forms() -> None:
    """Two chunks tell of a field that nobody knows how to join."""
    odd = [event(chunk(choices=[{"index": 0, "delta": {"content": "a", "odd": 1}, "finish_reason": None}]))] * 2
    scene = PipelineFixture(streams([*odd, event(chunk(None, "stop")), DONE]), says())
    assert (await scene.ask(ask(stream=True))).cache == "miss"
    assert (await scene.ask()).cache == "miss"
    assert (await scene.ask(ask(stream=True))).cache == "hit"
    assert (await scene.ask()).cache == "hit"
    assert len(scene.transport.sent) == 2


@pytest.mark.parametrize("status", [400, 404, 500, 429, 401])
@virtual_time
async def test_errors_are_never_stored(status: int) -> None:
    scene = PipelineFixture(error(status), error(status))
    for _ in range(2):
        assert (await scene.ask(None, Options(max_retries=0))).status == status
    assert len(scene.transport.sent) == 2


@virtual_time
async def test_a_clock_set_back_does_not_extend_ttl_or_give_a_negative_age() -> None:
    scene = PipelineFixture(says(), config=settings())
    await scene.ask()
    back = replace(scene.clock, wall=lambda: 1_000_000_000.0)
    scene.services.clock = back
    scene.rebuild()
    hit = await scene.ask(None, Options(max_age=5))
    assert hit.hit is not None
    assert hit.hit.entry.age(back.wall()) == 0


@virtual_time
async def test_a_response_too_large_for_the_cache_is_passed() -> None:
    scene = PipelineFixture(says(), says(), config=settings(cache=CacheSettings(max_entry=50)))
    for _ in range(2):
        told = await scene.ask()
        assert (told.cache, told.body) == ("miss", dump(completion()))
        assert "stored" not in told.headers["Cache-Status"]


# The short way.


async def remembered(scene: PipelineFixture, target: str = CHAT, **fields: Any) -> tuple[ProxyRequest, bytes]:
    """A request that was bought and remembered, as `edge.downstream` does it."""
    request = scene.request(ask(**fields), target=target)
    served = await scene.handler.handle(
        request, lambda: None, digest_of_request(target, request.client.cache_partition, request.body)
    )
    if isinstance(served, Reply) and served.stream is not None:
        await scene.pump(served, Result(200))
    return request, request.body


@pytest.mark.parametrize("stream", [True, False])
@virtual_time
async def test_an_identical_request_is_found_without_parsing(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = PipelineFixture(streams() if stream else says())
    assert scene.peek(CHAT, "", orjson.dumps(ask(stream=stream))) is None
    _, body = await remembered(scene, stream=stream)
    whole = await scene.ask(ask(stream=stream))
    monkeypatch.setattr(proxy.cache.planner, "canonical", None)
    monkeypatch.setattr(proxy.upstream.reader, "parse_leniently", None)
    hit = scene.peek(CHAT, "", body)
    assert hit is not None
    assert hit.body == whole.body


@virtual_time
async def test_peek_needs_identical_bytes_target_and_client() -> None:
    scene = PipelineFixture(says())
    _, body = await remembered(scene)
    peek = scene.peek
    assert peek(CHAT, "", body) is not None
    assert peek(CHAT, "", body + b" ") is None
    assert peek(CHAT + "?a=b", "", body) is None
    assert peek("/chat/completions", "", body) is None
    assert peek(CHAT, "name b", body) is None


@virtual_time
async def test_peek_includes_usage_if_asked_for() -> None:
    scene = PipelineFixture(streams(events("Hello", usage=True)))
    _, without = await remembered(scene, stream=True)
    _, asked = await remembered(scene, stream=True, stream_options={"include_usage": True})
    hits = [scene.peek(CHAT, "", body) for body in (without, asked)]
    assert [hit is not None and b'"usage"' in hit.body for hit in hits] == [False, True]


@virtual_time
async def test_peek_does_not_find_an_expired_entry() -> None:
    scene = PipelineFixture(says())
    _, body = await remembered(scene, "/_/ttl=10s/v1/chat/completions")
    assert scene.peek("/_/ttl=10s/v1/chat/completions", "", body) is not None
    await ages(scene, 10.0)
    assert scene.peek("/_/ttl=10s/v1/chat/completions", "", body) is None


@virtual_time
async def test_peek_does_not_find_an_entry_that_is_not_stored() -> None:
    scene = PipelineFixture(error(400), says(), says())
    _, body = await remembered(scene)
    assert scene.peek(CHAT, "", body) is None
    for segment in ("cache=no-store", "cache=no-cache"):
        target = f"/_/{segment}/v1/chat/completions"
        _, body = await remembered(scene, target)
        assert scene.peek(target, "", body) is None


@virtual_time
async def test_the_memo_is_bounded_and_drops_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.cache.lookup, "_MEMO_SIZE", 3)
    scene = PipelineFixture(*[says()] * 5)
    bodies = [(await remembered(scene, x=n))[1] for n in range(5)]
    found = [scene.peek(CHAT, "", body) is not None for body in bodies]
    assert found == [False, False, True, True, True]


@virtual_time
async def test_peek_finds_nothing_without_a_cache() -> None:
    scene = PipelineFixture(says(), config=settings(cache=CacheSettings(backend="off")))
    _, body = await remembered(scene)
    assert scene.peek(CHAT, "", body) is None
