"""Hits from memory: when, how old, and the fast lane (docs/caching.md)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
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


async def ages(pipeline: PipelineFixture, seconds: float) -> None:
    await pipeline.clock.sleep(seconds)


@virtual_time
async def test_a_hit_is_byte_identical_and_sends_nothing_upstream() -> None:
    pipeline = PipelineFixture(
        says(headers=[("x-ratelimit-limit-requests", "9"), ("openai-version", "v"), ("Date", "today")])
    )
    result = await pipeline.ask()
    hit = await pipeline.ask()
    assert (hit.status, hit.body, hit.cache) == (200, result.body, "hit")
    assert dict(hit.raw_headers) == {b"Content-Type": b"application/json", b"openai-version": b"v"}
    assert hit.hit is not None
    assert (hit.hit.entry.cost, hit.hit.entry.sampled, hit.hit.entry.namespace) == ("0.002250", True, "")
    assert len(pipeline.transport.sent) == 1
    assert len(pipeline.receipts) == 1  # hits are the edge's to count
    assert hit.hit.id != result.headers["X-Proxy-Request-Id"]


@virtual_time
async def test_an_expired_entry_is_not_served() -> None:
    pipeline = PipelineFixture(
        says(), says(completion("new")), config=settings(cache=CacheSettings(ttl=TtlSettings(chat=100.0)))
    )
    await pipeline.ask()
    await ages(pipeline, 99.0)
    assert (await pipeline.ask()).cache == "hit"
    await ages(pipeline, 1.0)
    result = await pipeline.ask()
    assert (result.cache, result.reason, result.headers["Cache-Status"]) == (
        "miss",
        "expired",
        "openai-proxy; fwd=stale; stored",
    )
    hit = await pipeline.ask()
    assert hit.json()["choices"][0]["message"]["content"] == "new"


@pytest.mark.parametrize(("ttl", "age", "cache"), [(5.0, 4.0, "hit"), (5.0, 5.0, "miss"), (0.0, 0.0, "miss")])
@virtual_time
async def test_a_request_can_set_its_ttl(ttl: float, age: float, cache: str) -> None:
    pipeline = PipelineFixture(says(), says())
    result = await pipeline.ask(None, Options(ttl=ttl))
    assert result.headers["Cache-Status"] == "openai-proxy; fwd=uri-miss" + ("; stored" if ttl else "")
    await ages(pipeline, age)
    assert (await pipeline.ask()).cache == cache


@virtual_time
async def test_max_age_limits_the_age_of_a_hit() -> None:
    pipeline = PipelineFixture(says(), says())
    await pipeline.ask()
    await ages(pipeline, 10.0)
    assert (await pipeline.ask(None, Options(max_age=10))).cache == "hit"
    await ages(pipeline, 1.0)
    result = await pipeline.ask(None, Options(max_age=10))
    assert (result.cache, result.reason) == ("miss", "max-age")
    assert result.headers["Cache-Status"] == "openai-proxy; fwd=request; stored; detail=max-age"
    assert (await pipeline.ask(None, Options(max_age=0))).cache == "hit"  # it has just been renewed


@virtual_time
async def test_no_cache_does_not_read_and_does_store() -> None:
    pipeline = PipelineFixture(says(), says(completion("new")))
    await pipeline.ask()
    assert (await pipeline.ask(None, Options(no_cache=True))).cache == "miss"
    hit = await pipeline.ask()
    assert (hit.cache, hit.json()["choices"][0]["message"]["content"]) == ("hit", "new")


@virtual_time
async def test_no_store_neither_reads_nor_stores() -> None:
    pipeline = PipelineFixture(says(), says(), says())
    assert (await pipeline.ask(None, Options(no_store=True))).cache == "bypass"
    assert (await pipeline.ask()).cache == "miss"
    assert (await pipeline.ask(None, Options(no_store=True))).cache == "bypass"


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
    pipeline = PipelineFixture()
    result = await pipeline.ask(document, options)
    assert (result.status, result.refused) == (504, "not_cached")
    assert result.refusal is not None
    assert result.refusal.should_retry is False
    assert reason in result.refusal.message


@virtual_time
async def test_only_if_cached_serves_a_stored_response() -> None:
    pipeline = PipelineFixture(says())
    await pipeline.ask(None, Options(ttl=10.0))
    assert (await pipeline.ask(None, Options(only_if_cached=True))).cache == "hit"
    await ages(pipeline, 10.0)
    result = await pipeline.ask(None, Options(only_if_cached=True))
    assert result.refusal is not None
    assert "expired" in result.refusal.message


@virtual_time
async def test_a_stored_plain_response_serves_a_stream_request() -> None:
    pipeline = PipelineFixture(says())
    plain = (await pipeline.ask()).json()
    for _ in range(2):
        streamed = await pipeline.ask(ask(stream=True))
        assert streamed.cache == "hit"
        assert dict(streamed.raw_headers)[b"Content-Type"] == b"text/event-stream; charset=utf-8"
        assert streamed.body.startswith(b"data: ")
        assert streamed.body.endswith(b"data: [DONE]\n\n")
        assert b'"usage":{' not in streamed.body  # nobody asked
        assert plain["choices"][0]["message"]["content"].split()[0].encode() in streamed.body
    asked = await pipeline.ask(ask(stream=True, stream_options={"include_usage": True}))
    assert asked.cache == "hit"
    assert b'"usage":{' in asked.body
    assert len(pipeline.transport.sent) == 1


@virtual_time
async def test_a_stored_stream_serves_a_plain_request() -> None:
    pipeline = PipelineFixture(streams(events("Hello", usage=True)))
    assert (await pipeline.ask(ask(stream=True))).cache == "miss"
    for _ in range(2):
        plain = await pipeline.ask()
        assert plain.cache == "hit"
        assert dict(plain.raw_headers)[b"Content-Type"] == b"application/json"
        assert plain.json()["object"] == "chat.completion"
        assert plain.json()["usage"]["total_tokens"]
    assert len(pipeline.transport.sent) == 1


@virtual_time
async def test_a_large_response_is_converted_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.system.threads, "LARGE", 10)
    pipeline = PipelineFixture(streams())
    await pipeline.ask(ask(stream=True))
    assert (await pipeline.ask()).cache == "hit"


@virtual_time
async def test_a_response_that_cannot_be_converted_is_stored_in_both_forms() -> None:
    """Two chunks tell of a field that nobody knows how to join."""
    odd = [event(chunk(choices=[{"index": 0, "delta": {"content": "a", "odd": 1}, "finish_reason": None}]))] * 2
    pipeline = PipelineFixture(streams([*odd, event(chunk(None, "stop")), DONE]), says())
    assert (await pipeline.ask(ask(stream=True))).cache == "miss"
    assert (await pipeline.ask()).cache == "miss"
    assert (await pipeline.ask(ask(stream=True))).cache == "hit"
    assert (await pipeline.ask()).cache == "hit"
    assert len(pipeline.transport.sent) == 2


@pytest.mark.parametrize("status", [400, 404, 500, 429, 401])
@virtual_time
async def test_errors_are_never_stored(status: int) -> None:
    pipeline = PipelineFixture(error(status), error(status))
    for _ in range(2):
        assert (await pipeline.ask(None, Options(max_retries=0))).status == status
    assert len(pipeline.transport.sent) == 2


@virtual_time
async def test_a_clock_set_back_does_not_extend_ttl_or_give_a_negative_age() -> None:
    """An entry stored while the clock was ahead does not serve; a few minutes are the difference of two machines."""
    pipeline = PipelineFixture(says(), says(), config=settings())
    await pipeline.ask()
    stored = pipeline.clock.wall()
    for seconds, cache in ((200.0, "hit"), (1e9, "miss")):
        back = replace(pipeline.clock, wall=partial(float, stored - seconds))
        pipeline.services.clock = back
        pipeline.rebuild()
        result = await pipeline.ask(None, Options(max_age=5))
        if cache == "hit":
            assert result.hit is not None
            assert result.hit.entry.age(back.wall()) == 0
        else:
            assert result.cache == "miss"


@virtual_time
async def test_a_response_too_large_for_the_cache_is_passed() -> None:
    pipeline = PipelineFixture(says(), says(), config=settings(cache=CacheSettings(max_entry=50)))
    for _ in range(2):
        result = await pipeline.ask()
        assert (result.cache, result.body) == ("miss", dump(completion()))
        assert "stored" not in result.headers["Cache-Status"]


# The short way.


async def remembered(pipeline: PipelineFixture, target: str = CHAT, **fields: Any) -> tuple[ProxyRequest, bytes]:
    """A request that was bought and remembered, as `edge.downstream` does it."""
    request = pipeline.request(ask(**fields), target=target)
    served = await pipeline.handler.handle(
        request, lambda: None, digest_of_request(target, request.client.cache_partition, request.body)
    )
    if isinstance(served, Reply) and served.stream is not None:
        await pipeline.pump(served, Result(200))
    return request, request.body


@pytest.mark.parametrize("stream", [True, False])
@virtual_time
async def test_an_identical_request_is_found_without_parsing(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = PipelineFixture(streams() if stream else says())
    assert pipeline.peek(CHAT, "", orjson.dumps(ask(stream=stream))) is None
    _, body = await remembered(pipeline, stream=stream)
    whole = await pipeline.ask(ask(stream=stream))
    monkeypatch.setattr(proxy.cache.planner, "canonical", None)
    monkeypatch.setattr(proxy.upstream.reader, "parse_leniently", None)
    hit = pipeline.peek(CHAT, "", body)
    assert hit is not None
    assert hit.body == whole.body


@virtual_time
async def test_peek_needs_identical_bytes_target_and_client() -> None:
    pipeline = PipelineFixture(says())
    _, body = await remembered(pipeline)
    peek = pipeline.peek
    assert peek(CHAT, "", body) is not None
    assert peek(CHAT, "", body + b" ") is None
    assert peek(CHAT + "?a=b", "", body) is None
    assert peek("/chat/completions", "", body) is None
    assert peek(CHAT, "name b", body) is None


@virtual_time
async def test_peek_includes_usage_if_asked_for() -> None:
    pipeline = PipelineFixture(streams(events("Hello", usage=True)))
    _, without = await remembered(pipeline, stream=True)
    _, asked = await remembered(pipeline, stream=True, stream_options={"include_usage": True})
    hits = [pipeline.peek(CHAT, "", body) for body in (without, asked)]
    assert [hit is not None and b'"usage"' in hit.body for hit in hits] == [False, True]


@virtual_time
async def test_peek_does_not_find_an_expired_entry() -> None:
    pipeline = PipelineFixture(says())
    _, body = await remembered(pipeline, "/_/ttl=10s/v1/chat/completions")
    assert pipeline.peek("/_/ttl=10s/v1/chat/completions", "", body) is not None
    await ages(pipeline, 10.0)
    assert pipeline.peek("/_/ttl=10s/v1/chat/completions", "", body) is None


@virtual_time
async def test_peek_does_not_find_an_entry_that_is_not_stored() -> None:
    pipeline = PipelineFixture(error(400), says(), says())
    _, body = await remembered(pipeline)
    assert pipeline.peek(CHAT, "", body) is None
    for segment in ("cache=no-store", "cache=no-cache"):
        target = f"/_/{segment}/v1/chat/completions"
        _, body = await remembered(pipeline, target)
        assert pipeline.peek(target, "", body) is None


@virtual_time
async def test_the_memo_is_bounded_and_drops_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.cache.lookup, "_MEMO_SIZE", 3)
    pipeline = PipelineFixture(*[says()] * 5)
    bodies = [(await remembered(pipeline, x=n))[1] for n in range(5)]
    found = [pipeline.peek(CHAT, "", body) is not None for body in bodies]
    assert found == [False, False, True, True, True]


@virtual_time
async def test_peek_finds_nothing_without_a_cache() -> None:
    pipeline = PipelineFixture(says(), config=settings(cache=CacheSettings(backend="off")))
    _, body = await remembered(pipeline)
    assert pipeline.peek(CHAT, "", body) is None
