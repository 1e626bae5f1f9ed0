"""Streams: relayed read by read, stored when complete, never ended cleanly if they were cut (docs/caching.md)."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

import proxy.pipeline.relay
from proxy.config.settings import CacheSettings, CostSettings
from proxy.protocol.options import Options
from proxy.protocol.sse import data_of
from proxy.upstream.retry.outcome import TransportFailure
from tests.codings import CODINGS
from tests.pipeline.clock import virtual_time
from tests.pipeline.fixture import PipelineFixture, ask, pool, settings
from tests.pipeline.script import DONE, SSE, Responds, Step, chunk, event, events, says, streams

CUT = TransportFailure("invalid", "the upstream cut its answer short")
SILENT = TransportFailure("timeout", "the upstream fell silent")
STREAM = ask(stream=True)
ASKED = ask(stream=True, stream_options={"include_usage": True})
WHOLE = b"".join(events())
OFF = settings(cost=CostSettings(stream_usage="off"))


def last_error(body: bytes) -> Any:
    """The error event a stream ends with."""
    result = data_of(body[body.rindex(b"data: ") :])
    assert result is not None
    return orjson.loads(result)["error"]


def timed(pipeline: PipelineFixture) -> list[tuple[float, bytes]]:
    """Note each write to the client, with the seconds since the request was sent."""
    seen: list[tuple[float, bytes]] = []

    async def write(data: bytes) -> None:
        seen.append((round(pipeline.loop.time() - pipeline.transport.sent[0].at, 3), data))

    pipeline.write = write
    return seen


@virtual_time
async def test_each_read_is_forwarded_at_once_and_unchanged() -> None:
    """However it is cut, and before the next one is there."""
    reads = [WHOLE[:50], WHOLE[50:51], WHOLE[51:200], WHOLE[200:]]
    steps: list[Any] = [step for read in reads for step in (0.25, read)]
    pipeline = PipelineFixture(streams(steps), config=OFF)
    seen = timed(pipeline)
    result = await pipeline.ask(STREAM)
    first = next(n for n in range(4) if b"\n\n" in b"".join(reads[: n + 1]))
    assert seen == [((max(first, n) + 1) * 0.25, read) for n, read in enumerate(reads)]
    assert (result.body, result.broken) == (WHOLE, False)
    assert result.headers["X-Proxy-Cost-Status"] == "pending"
    assert "X-Proxy-Cost-USD" not in result.headers
    assert "stored" not in result.headers["Cache-Status"]
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_the_receipt_is_written_at_the_end_of_the_stream() -> None:
    pipeline = PipelineFixture(streams([*events(usage=True)[:2], 2.0, *events(usage=True)[2:]]))
    await pipeline.ask(STREAM)
    [receipt] = pipeline.receipts
    assert (receipt.status, receipt.stream, receipt.error) == (200, True, "")
    assert (receipt.cost_usd, receipt.cost_status, receipt.saved_usd) == ("0.002250", "exact", "0.000000")
    assert receipt.usage is not None
    assert receipt.usage.total_tokens == 300
    assert receipt.answer_model == "gpt-4o-2024-08-06"
    assert (receipt.upstream_ms, receipt.total_ms) == (2000.0, 2000.0)


@virtual_time
async def test_a_service_tier_has_its_own_price() -> None:
    pipeline = PipelineFixture(streams(events(usage=True, service_tier="priority")))
    assert b": x-proxy-cost-usd=0.003825 " in (await pipeline.ask(STREAM, Options(stream_cost=True))).body
    assert pipeline.receipt.cost_usd == "0.003825"


@pytest.mark.parametrize("tier", ["flex", "scale"])
@virtual_time
async def test_a_service_tier_without_a_known_price_has_no_cost(tier: str) -> None:
    pipeline = PipelineFixture(streams(events(usage=True, service_tier=tier)))
    result = await pipeline.ask(STREAM, Options(stream_cost=True))
    assert (pipeline.receipt.cost_usd, pipeline.receipt.cost_status) == (None, "unknown")
    assert b"x-proxy-cost-usd=" not in result.body
    assert b": x-proxy-cost-status=unknown x-proxy-prompt-tokens=100 x-proxy-completion-tokens=200\n" in result.body


@pytest.mark.parametrize("document", [STREAM, ASKED], ids=["usage not asked for", "usage asked for"])
@virtual_time
async def test_a_complete_stream_is_stored_and_replayed_byte_for_byte(document: dict[str, Any]) -> None:
    pipeline = PipelineFixture(streams(headers=[("openai-version", "2020-10-01"), ("x-ratelimit-limit-requests", "5")]))
    result = await pipeline.ask(document)
    hit = await pipeline.ask(document)
    assert (result.cache, hit.cache, hit.body) == ("miss", "hit", result.body)
    assert dict(hit.raw_headers) == {b"Content-Type": SSE[1].encode(), b"openai-version": b"2020-10-01"}
    assert hit.hit is not None
    assert hit.hit.entry.cost == "0.002250"


@virtual_time
async def test_the_usage_chunk_is_sent_only_to_clients_that_asked() -> None:
    """Whoever was first, each gets the stream as the upstream would have sent it to him alone."""
    for first, second in ((STREAM, ASKED), (ASKED, STREAM)):
        pipeline = PipelineFixture(streams())
        tolds = [await pipeline.ask(first), await pipeline.ask(second)]
        assert [result.cache for result in tolds] == ["miss", "hit"]
        for document, result in zip((first, second), tolds, strict=True):
            assert result.body == b"".join(events(usage=document is ASKED))


@virtual_time
async def test_a_stored_stream_without_usage_is_a_miss_for_clients_that_ask_for_it() -> None:
    pipeline = PipelineFixture(streams(events()), streams(), config=OFF)
    await pipeline.ask(STREAM)
    result = await pipeline.ask(ASKED)
    assert (result.cache, result.body) == ("miss", b"".join(events(usage=True)))


NOT_STORED: dict[str, list[bytes]] = {
    "without [DONE]": events()[:-1],
    "filtered": [event(chunk("a")), event(chunk(None, "content_filter")), DONE],
    "cut by its limit": [event(chunk("a")), event(chunk(None, "length")), DONE],
    "an error in the middle": [event(chunk("a")), event({"error": {"message": "no"}}), DONE],
    "an error and no more": [event(chunk("a")), event({"error": {"message": "no"}})],
    "not JSON": [event(chunk("a")), event("{"), event(chunk(None, "stop")), DONE],
    "empty": [event(chunk(None, "stop")), DONE],
}


@pytest.mark.parametrize("steps", NOT_STORED.values(), ids=NOT_STORED.keys())
@virtual_time
async def test_abnormal_streams_are_passed_and_not_stored(steps: list[bytes]) -> None:
    pipeline = PipelineFixture(streams(steps), streams(), config=OFF)
    result = await pipeline.ask(STREAM)
    assert (result.status, result.body, result.broken) == (200, b"".join(steps), False)
    assert pipeline.receipt.error == ""
    assert (await pipeline.ask(STREAM)).cache == "miss"


@virtual_time
async def test_a_stream_with_a_pool_key_is_not_stored() -> None:
    """It has gone to this client; it must not rest in the cache and go to others."""
    pipeline = PipelineFixture(streams(events("your key is ", "sk-k1", "!")), streams())
    await pipeline.ask(STREAM)
    assert (await pipeline.ask(STREAM)).cache == "miss"


@virtual_time
async def test_a_pool_key_in_a_header_of_a_stream_is_masked() -> None:
    pipeline = PipelineFixture(streams(headers=[("x-debug", "sk-k1")]), streams())
    result = await pipeline.ask(STREAM)
    assert dict(result.raw_headers)[b"x-debug"] == b"***"
    assert (await pipeline.ask(STREAM)).cache == "miss"


@virtual_time
async def test_a_stream_too_large_for_the_cache_is_forwarded() -> None:
    pipeline = PipelineFixture(streams(), streams(), config=settings(cache=CacheSettings(max_entry=100)))
    result = await pipeline.ask(ASKED)
    assert result.body == b"".join(events(usage=True))
    assert (await pipeline.ask(ASKED)).cache == "miss"


# What comes before the first event.


@virtual_time
async def test_headers_are_held_back_until_the_first_event() -> None:
    """Until then all can still be tried again."""
    ping = b": OPENROUTER PROCESSING\n\n"
    refused: list[Step] = [ping, 0.4, ping, event({"error": {"message": "overloaded", "type": "server_error"}})]
    pipeline = PipelineFixture(streams(refused), streams([ping, 0.4, ping, *events()]), config=OFF)
    result = await pipeline.ask(STREAM)
    assert (result.status, result.body, result.attempts) == (200, ping + ping + WHOLE, 2)
    hit = await pipeline.ask(STREAM)
    assert (hit.cache, hit.body) == ("hit", result.body)
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_comments_before_the_first_event_are_held_back_for_a_second_at_most() -> None:
    """From then on an error is an event of the stream."""
    ping, bad = b": keep-alive\n\n", event({"error": {"message": "overloaded", "type": "server_error"}})
    steps: list[Step] = [ping, 0.4]
    pipeline = PipelineFixture(streams([*steps * 6, bad]), config=OFF)
    seen = timed(pipeline)
    result = await pipeline.ask(STREAM)
    assert (result.status, result.body, result.attempts) == (200, ping * 6 + bad, 1)
    assert [at for at, _ in seen] == [1.0, 1.0, 1.0, 1.2, 1.6, 2.0, 2.4]
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_the_head_of_a_silent_stream_is_held_back_for_a_second_at_most() -> None:
    pipeline = PipelineFixture(streams([5.0, *events()]), config=OFF)
    result = await pipeline.ask(STREAM)
    assert (result.status, result.body) == (200, WHOLE)
    assert pipeline.receipt.first_byte_ms == pytest.approx(1000)
    assert (await pipeline.ask(STREAM)).cache == "hit"


@pytest.mark.parametrize("kind", ["text/plain; charset=utf-8", "application/json", "text/html", ""])
@pytest.mark.parametrize("start", [b"", b": first a comment\n\n", b"\xef\xbb\xbf", b"\r\n"])
@virtual_time
async def test_a_stream_is_known_by_its_first_bytes(kind: str, start: bytes) -> None:
    headers = (("Content-Type", kind),) if kind else ()
    first, *rest = events()
    body: tuple[Step, ...] = (0.6, start + first, 0.8, *rest)
    pipeline = PipelineFixture(Responds(200, headers, body))
    seen = timed(pipeline)
    result = await pipeline.ask(STREAM)
    assert (result.status, result.body, seen[0][0]) == (200, start + WHOLE, 0.6)
    assert result.headers["X-Proxy-Cost-Status"] == "pending"
    assert (await pipeline.ask(STREAM)).body == result.body


@virtual_time
async def test_first_bytes_that_come_late_and_one_by_one_are_waited_for() -> None:
    whole = b"".join(events())
    body: tuple[Step, ...] = (3.0, *[whole[at : at + 1] for at in range(8)], whole[8:])
    pipeline = PipelineFixture(Responds(200, (("Content-Type", "text/plain"),), body))
    result = await pipeline.ask(STREAM)
    assert (result.status, result.body) == (200, WHOLE)


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
@virtual_time
async def test_json_in_answer_to_a_stream_is_passed_on(kind: str) -> None:
    said = says()
    body = b"".join(part for part in said.body if isinstance(part, bytes))
    pipeline = PipelineFixture(Responds(200, (("Content-Type", kind),), (body[:1], 2.0, body[1:])))
    result = await pipeline.ask(STREAM)
    assert (result.status, result.body) == (200, body)


@virtual_time
async def test_a_persistent_error_as_the_first_event_is_forwarded() -> None:
    bad = event({"error": {"message": "overloaded", "type": "server_error"}})
    pipeline = PipelineFixture(*[streams([bad])] * 4, streams(), config=OFF)
    result = await pipeline.ask(STREAM)
    assert (result.status, result.body, result.attempts) == (200, bad, 4)
    assert (await pipeline.ask(STREAM)).cache == "miss"
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_a_client_error_as_the_first_event_is_not_retried() -> None:
    bad = event({"error": {"message": "too long", "type": "invalid_request_error"}})
    pipeline = PipelineFixture(streams([bad]))
    result = await pipeline.ask(STREAM)
    assert (result.status, result.body, result.attempts) == (200, bad, 1)
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_a_key_error_as_the_first_event_tries_every_key() -> None:
    bad = event({"error": {"message": "no", "code": "insufficient_quota"}})
    pipeline = PipelineFixture(streams([bad]), streams([bad]), config=settings(pool("k1", "k2")))
    result = await pipeline.ask(STREAM)
    assert (result.status, result.body, result.attempts) == (200, bad, 2)
    assert result.headers["X-Proxy-Error"] == "no_usable_key"
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_a_very_large_first_event_is_forwarded() -> None:
    """A megabyte in one line: it flows, and the rest of the story is the same."""
    big = events("x" * 1_000_000)
    first = big[0]
    pipeline = PipelineFixture(
        streams([first[:50_000], first[50_000:100_000], 1.0, first[100_000:], *big[1:]]), config=OFF
    )
    result = await pipeline.ask(STREAM)
    assert result.body == b"".join(big)
    assert result.reads[0] == first[:50_000]
    assert (await pipeline.ask(STREAM)).cache == "hit"


@virtual_time
async def test_a_stream_of_nothing_but_comments() -> None:
    pipeline = PipelineFixture(streams([b": ping\n\n"]))
    result = await pipeline.ask(STREAM)
    assert result.broken or result.status == 502
    assert pipeline.receipt.error == "upstream_invalid_response"
    pipeline.assert_nothing_leaked()


# Odd shapes.


@virtual_time
async def test_an_event_stream_to_a_plain_request_is_passed_and_not_stored() -> None:
    pipeline = PipelineFixture(streams(events()), says())
    result = await pipeline.ask()
    assert (result.body, result.broken) == (WHOLE, False)
    assert (await pipeline.ask()).cache == "miss"


@virtual_time
async def test_json_to_a_stream_request_is_passed_with_its_cost() -> None:
    """Mock servers do that. It is passed on with its cost; stream or not, a hit would be the same bytes."""
    pipeline = PipelineFixture(says(), says())
    result = await pipeline.ask(STREAM, Options(stream_cost=True))
    assert (result.status, result.cost) == (200, "0.002250")
    again = await pipeline.ask(STREAM)
    assert again.body == result.body


@pytest.mark.parametrize("coding", CODINGS)
@virtual_time
async def test_a_compressed_stream_is_decoded_and_stored(coding: str) -> None:
    packed = CODINGS[coding](WHOLE)
    headers = (SSE, ("Content-Encoding", coding))
    pipeline = PipelineFixture(
        Responds(200, headers, (packed[:30], packed[30:])), Responds(200, headers, (packed[:-20],)), config=OFF
    )
    result = await pipeline.ask(STREAM)
    assert (result.body, result.broken) == (WHOLE, False)
    assert b"Content-Encoding" not in dict(result.raw_headers)
    assert (await pipeline.ask(STREAM)).cache == "hit"
    cut = await pipeline.ask(ask("cut", stream=True))
    assert cut.broken or cut.status == 502
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_a_stream_in_an_unknown_coding_is_passed_unchanged() -> None:
    pipeline = PipelineFixture(Responds(200, (SSE, ("Content-Encoding", "exi")), (b"\x28\xb5", b"\x2f\xfd")), streams())
    result = await pipeline.ask(STREAM)
    assert (result.body, result.broken) == (b"\x28\xb5\x2f\xfd", False)
    assert (pipeline.receipt.cost_status, pipeline.receipt.status) == ("unknown", 200)
    assert (await pipeline.ask(STREAM)).cache == "miss"


RESPONSE = {"id": "r", "status": "completed", "model": "gpt-4o", "error": None}
OUTPUT = [{"type": "message", "status": "completed", "content": [{"type": "output_text", "text": "Hi"}]}]
R_USAGE = {"input_tokens": 100, "output_tokens": 200, "total_tokens": 300}


@virtual_time
async def test_a_responses_stream_ends_with_its_completed_event() -> None:
    told_all = [
        b"event: response.created\n" + event({"type": "response.created", "response": {"id": "r", "model": "gpt-4o"}}),
        b"event: response.completed\n"
        + event({"type": "response.completed", "response": {**RESPONSE, "output": OUTPUT, "usage": R_USAGE}}),
    ]
    document = {"model": "gpt-4o", "input": "Hi", "stream": True}
    pipeline = PipelineFixture(streams(told_all), streams(told_all[:1]))
    result = await pipeline.ask(document, Options(stream_cost=True), target="/v1/responses")
    cost = b": x-proxy-cost-usd=0.002250 x-proxy-prompt-tokens=100 x-proxy-completion-tokens=200\n"
    assert (result.body, result.broken) == (b"".join(told_all) + cost, False)
    assert pipeline.transport.sent[0].json() == document  # nothing to inject here
    assert (await pipeline.ask(document, target="/v1/responses")).cache == "hit"
    cut = await pipeline.ask({**document, "input": "other"}, target="/v1/responses")
    assert (cut.broken, last_error(cut.body)["code"]) == (True, "upstream_invalid_response")


# Events longer than anybody looks at.


@pytest.mark.parametrize("usage", ["inject", "off"])
@pytest.mark.parametrize("comment", [True, False])
@virtual_time
async def test_an_event_beyond_the_size_limit_is_forwarded_unparsed(
    monkeypatch: pytest.MonkeyPatch, usage: str, comment: bool
) -> None:
    monkeypatch.setattr(proxy.pipeline.relay, "MAX_EVENT", 1000)
    big = events("a", "x" * 5000)
    body = b"".join(big)
    pieces = [body[at : at + 700] for at in range(0, len(body), 700)]
    pieces[-1] = pieces[-1].removesuffix(b"\n\n")  # [DONE] without its blank line
    pipeline = PipelineFixture(streams(pieces), streams(), config=settings(cost=CostSettings(stream_usage=usage)))
    result = await pipeline.ask(STREAM, Options(stream_cost=comment))
    assert (result.body, result.broken) == (body.removesuffix(b"\n\n"), False)
    assert (pipeline.receipt.status, pipeline.receipt.error) == (200, "")
    assert (await pipeline.ask(STREAM)).cache == "miss"
    pipeline.assert_nothing_leaked()
