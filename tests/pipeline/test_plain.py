"""Plain responses: bytes as they came, what they cost, what is stored of them (docs/caching.md)."""

from __future__ import annotations

import gzip
from decimal import Decimal
from typing import Any

import pytest

import proxy.pipeline.fetch
import proxy.system.threads
from proxy.config.settings import CostSettings, RetrySettings
from proxy.protocol.options import Options
from proxy.upstream.retry.outcome import TransportFailure
from tests.codings import CODINGS
from tests.pipeline.clock import virtual_time
from tests.pipeline.fixture import PipelineFixture, ask, pool, settings
from tests.pipeline.script import JSON, Responds, completion, dump, error, says

CUT = TransportFailure("invalid", "cut")
BODY = dump(completion())


def store_size(pipeline: PipelineFixture) -> int:
    return pipeline.services.store.memory.stats()["entries"]


@virtual_time
async def test_a_response_and_its_receipt() -> None:
    pipeline = PipelineFixture(says(wait=0.25, connect=0.05))
    result = await pipeline.ask(None, Options(tags=("team:search",)))
    assert (result.status, result.body) == (200, BODY)
    assert dict(result.raw_headers) == {b"Content-Type": b"application/json", b"x-request-id": b"req_1"}
    key = result.headers.pop("X-Proxy-Cache-Key")
    assert len(key) == 64
    assert result.headers == {
        "X-Proxy-Request-Id": "id-1",
        "X-Proxy-Cache": "miss",
        "X-Proxy-Cache-Reason": "new",
        "Cache-Status": "openai-proxy; fwd=uri-miss; stored",
        "X-Proxy-Upstream": "openai",
        "X-Proxy-Key": "k1",
        "X-Proxy-Attempts": "1",
        "X-Proxy-Cost-USD": "0.002250",
        "X-Proxy-Cost-Status": "exact",
        "X-Proxy-Prompt-Tokens": "100",
        "X-Proxy-Cached-Tokens": "0",
        "X-Proxy-Completion-Tokens": "200",
        "X-Proxy-Total-Tokens": "300",
        "Server-Timing": "queue;dur=0.0, upstream;dur=300.0, proxy;dur=0.0",
    }
    receipt = pipeline.services.receipts.get("id-1")
    assert receipt is not None
    assert pipeline.receipts == [receipt]
    shown = receipt.as_json()
    assert shown["cost_usd"] == "0.002250"
    assert (shown["status"], shown["cache"], shown["cache_reason"]) == (200, "miss", "new")
    assert (shown["model"], shown["answer_model"]) == ("gpt-4o", "gpt-4o-2024-08-06")
    assert (shown["upstream"], shown["key"], shown["attempts"], shown["error"]) == ("openai", "k1", 1, None)
    assert (shown["upstream_ms"], shown["total_ms"], shown["tags"]) == (300.0, 300.0, ["team:search"])
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_the_body_is_sent_byte_for_byte() -> None:
    body = b'{ "messages":[{"role":"user","content":"h\\u00e9"}] ,\n"model" : "gpt-4o", "x": 1.50, "y":1e3 }'
    pipeline = PipelineFixture(says())
    await pipeline.ask(body=body)
    assert pipeline.transport.sent[0].body == body


@pytest.mark.parametrize("packed", [False, True])
@virtual_time
async def test_a_response_that_is_complete_at_once(packed: bool) -> None:
    headers = (JSON, ("Content-Encoding", "gzip")) if packed else (JSON,)
    body = gzip.compress(BODY) if packed else BODY
    pipeline = PipelineFixture(
        Responds(200, headers, (body,), at_once=True), Responds(200, headers, (body[:-9],), at_once=True)
    )
    result = await pipeline.ask()
    assert (result.body, result.cost) == (BODY, "0.002250")
    assert (await pipeline.ask(ask("cut"))).refused == "upstream_invalid_response"
    pipeline.assert_nothing_leaked()


# What is broken, what is odd, and what is neither.


@pytest.mark.parametrize(
    "body",
    [
        (BODY[:40], CUT),
        (BODY[:-1],),
        (),
        (b"<html>",),
        (BODY, b"x"),
        (b"\xff\xfe",),
    ],
    ids=["cut by the connection", "cut with a good length", "empty", "a page", "more than an answer", "no text"],
)
@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8", "application/x+json"])
@virtual_time
async def test_broken_json_is_502_and_not_stored(body: tuple[Any, ...], content_type: str) -> None:
    pipeline = PipelineFixture(Responds(200, (("Content-Type", content_type),), body), says())
    result = await pipeline.ask()
    assert (result.status, result.refused) == (502, "upstream_invalid_response")
    assert result.headers["X-Proxy-Attempts"] == "1"
    assert result.cost is None
    assert pipeline.receipt.error == "upstream_invalid_response"
    assert store_size(pipeline) == 0
    assert (await pipeline.ask()).cache == "miss"
    pipeline.assert_nothing_leaked()


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "error null is no error": (completion(error=None), ""),
    "an error": (completion(error={"message": "no"}), "error"),
    "no choices": (completion(choices=[]), '"no choices"'),
    "filtered": (
        completion(choices=[{"index": 0, "message": {"content": "x"}, "finish_reason": "content_filter"}]),
        '"finish_reason content_filter"',
    ),
    "cut by its own limit": (
        completion(choices=[{"index": 0, "message": {"content": "x"}, "finish_reason": "length"}]),
        '"finish_reason length"',
    ),
    "not finished": (completion(choices=[{"index": 0, "message": {"content": "x"}}]), '"no finish_reason"'),
}


@pytest.mark.parametrize(("document", "why"), ODD.values(), ids=ODD.keys())
@virtual_time
async def test_abnormal_responses_are_passed_and_not_stored(document: dict[str, Any], why: str) -> None:
    pipeline = PipelineFixture(says(document), says(document))
    result = await pipeline.ask()
    assert (result.status, result.body) == (200, dump(document))
    assert result.headers["Cache-Status"] == "openai-proxy; fwd=uri-miss" + (f"; detail={why}" if why else "; stored")
    assert (await pipeline.ask()).cache == ("miss" if why else "hit")


@virtual_time
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", [(("Content-Type", "text/html; charset=utf-8"),), ()])
async def test_a_web_page_is_no_answer(kind: tuple[tuple[str, str], ...], stream: bool) -> None:
    """A captive portal or a login page, in place of JSON."""
    pipeline = PipelineFixture(Responds(200, kind, (b"<html>", b"sign in</html>")), says())
    result = await pipeline.ask(ask(stream=stream))
    assert (result.status, result.refused) == (502, "upstream_invalid_response")
    assert (await pipeline.ask()).cache == "miss"


@virtual_time
async def test_a_byte_order_mark_before_json_is_passed_on() -> None:
    """RFC 8259 section 8.1: a parser may ignore it."""
    body = b"\xef\xbb\xbf" + b"".join(part for part in says().body if isinstance(part, bytes))
    pipeline = PipelineFixture(Responds(200, (("Content-Type", "application/json"),), (body,)))
    result = await pipeline.ask()
    assert (result.status, result.body, result.headers["X-Proxy-Cost-Status"]) == (200, body, "exact")
    hit = await pipeline.ask()
    assert (hit.cache, hit.body) == ("hit", body)
    assert (await pipeline.ask(ask(stream=True))).cache == "hit"


@pytest.mark.parametrize("status", [201, 202, 204, 206])
@virtual_time
async def test_only_200_is_stored(status: int) -> None:
    body = () if status == 204 else (BODY,)
    pipeline = PipelineFixture(Responds(status, (JSON,), body), says())
    result = await pipeline.ask()
    assert (result.status, result.body) == (status, b"".join(body))
    assert store_size(pipeline) == 0
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_json_that_is_not_an_object_is_passed_and_not_stored() -> None:
    pipeline = PipelineFixture(Responds(body=(b"[1, 2]",)))
    result = await pipeline.ask()
    assert (result.status, result.body, store_size(pipeline)) == (200, b"[1, 2]", 0)


@virtual_time
async def test_a_large_response_is_parsed_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.system.threads, "LARGE", 10)
    pipeline = PipelineFixture(says(), Responds(body=(b'{"id": "cut short',)))
    assert (await pipeline.ask()).cost == "0.002250"
    assert (await pipeline.ask()).cache == "hit"
    assert (await pipeline.ask(ask("other"))).refused == "upstream_invalid_response"
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_a_response_too_large_to_hold_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.pipeline.fetch, "SPILL", 100)
    pieces = (b"{" + b" " * 60, b" " * 60, b" " * 60, b"}")
    pipeline = PipelineFixture(Responds(body=pieces), says())
    result = await pipeline.ask()
    assert (result.status, result.reads, result.broken) == (200, list(pieces), False)
    assert (result.cost, result.headers["X-Proxy-Cost-Status"]) == (None, "pending")
    assert (pipeline.receipt.cost_usd, pipeline.receipt.cost_status, pipeline.receipt.status) == (None, "unknown", 200)
    assert (await pipeline.ask()).cache == "miss"  # never stored
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_a_streamed_plain_response_has_no_deadline_and_no_clean_end_when_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proxy.pipeline.fetch, "SPILL", 100)
    pipeline = PipelineFixture(Responds(body=(b" " * 200, 500.0, b" " * 60, CUT)))
    result = await pipeline.ask(total=10.0)
    assert (result.status, result.broken, result.body) == (200, True, b" " * 260)  # nothing of ours inside their JSON
    assert (pipeline.receipt.error, pipeline.receipt.total_ms) == ("upstream_invalid_response", 500_000.0)
    pipeline.assert_nothing_leaked()


# Compressed.


@pytest.mark.parametrize("coding", CODINGS)
@virtual_time
async def test_a_compressed_answer_is_decoded(coding: str) -> None:
    packed = CODINGS[coding](BODY)
    headers = (JSON, ("Content-Encoding", coding))
    pipeline = PipelineFixture(
        Responds(200, headers, (packed[:20], packed[20:])), Responds(200, headers, (packed[:-9],))
    )
    result = await pipeline.ask()
    assert (result.status, result.body, result.cost) == (200, BODY, "0.002250")
    assert b"Content-Encoding" not in dict(result.raw_headers)
    hit = await pipeline.ask()
    assert (hit.cache, hit.body) == ("hit", BODY)
    assert (await pipeline.ask(ask("cut"))).refused == "upstream_invalid_response"
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_an_unknown_coding_is_passed_unchanged() -> None:
    pipeline = PipelineFixture(Responds(200, (JSON, ("Content-Encoding", "exi")), (b"\x0b\x02", b"\x80")), says())
    result = await pipeline.ask()
    assert (result.status, result.body, result.broken) == (200, b"\x0b\x02\x80", False)
    assert dict(result.raw_headers)[b"Content-Encoding"] == b"exi"
    assert (await pipeline.ask()).cache == "miss"
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_a_compressed_error_is_decoded() -> None:
    refusal = gzip.compress(b'{"error":{"code":"insufficient_quota"}}')
    bad = Responds(429, (JSON, ("Content-Encoding", "gzip")), (refusal,))
    pipeline = PipelineFixture(bad, says(), config=settings(pool("k1", "k2")))
    assert (await pipeline.ask()).headers["X-Proxy-Key"] == "k2"
    assert pipeline.state("k1") == ("exhausted", 600.0)


# Keys that the upstream lets slip.


@virtual_time
async def test_a_pool_key_in_a_body_is_masked_and_the_response_not_stored() -> None:
    pipeline = PipelineFixture(says(completion("your key is sk-k1!")), says())
    result = await pipeline.ask()
    assert b"sk-k1" not in result.body
    assert b"your key is ***!" in result.body
    assert (await pipeline.ask()).cache == "miss"


@virtual_time
async def test_a_pool_key_in_a_header_is_masked_and_the_response_not_stored() -> None:
    pipeline = PipelineFixture(says(headers=[("x-debug", "used sk-k1 for this"), ("x-other", "fine")]), says())
    result = await pipeline.ask()
    assert dict(result.raw_headers)[b"x-debug"] == b"used *** for this"
    assert dict(result.raw_headers)[b"x-other"] == b"fine"
    assert "stored" not in result.headers["Cache-Status"]
    assert (await pipeline.ask()).cache == "miss"


@virtual_time
async def test_a_pool_key_in_an_error_is_masked() -> None:
    pipeline = PipelineFixture(error(400, message="Incorrect API key provided: sk-k1."))
    assert (await pipeline.ask()).json()["error"]["message"] == "Incorrect API key provided: ***."


# Money.


@pytest.mark.parametrize(
    ("fields", "cost", "status"),
    [
        ({}, "0.002250", "exact"),
        ({"service_tier": "default"}, "0.002250", "exact"),
        ({"service_tier": None}, "0.002250", "exact"),
        ({"service_tier": "flex"}, None, "unknown"),
        ({"service_tier": "priority"}, "0.003825", "exact"),
        ({"service_tier": "scale"}, None, "unknown"),
        ({"model": "nobody-knows-this"}, "0.002250", "exact"),  # then the model asked for
        ({"usage": None}, None, "unknown"),
        ({"usage": {"prompt_tokens": True}}, None, "unknown"),
    ],
)
@virtual_time
async def test_the_cost_of_a_response(fields: dict[str, Any], cost: str | None, status: str) -> None:
    pipeline = PipelineFixture(says(completion(**fields)))
    result = await pipeline.ask()
    assert (result.cost, result.headers["X-Proxy-Cost-Status"]) == (cost, status)
    assert (pipeline.receipt.cost_usd, pipeline.receipt.cost_status) == (cost, status)
    assert pipeline.receipt.saved_usd == ("0.000000" if cost else None)


@virtual_time
async def test_an_unknown_model_has_no_cost_instead_of_zero() -> None:
    pipeline = PipelineFixture(says(completion(model="mystery-1")), says(completion(model="mystery-1")))
    result = await pipeline.ask(ask(model="mystery-1"))
    assert (result.cost, result.headers["X-Proxy-Cost-Status"]) == (None, "unknown")
    assert result.headers["X-Proxy-Total-Tokens"] == "300"
    hit = await pipeline.ask(ask(model="mystery-1"))
    assert hit.hit is not None
    assert hit.hit.entry.cost is None


@virtual_time
async def test_prices_can_be_set_for_all_upstreams_and_for_one() -> None:
    ours = {"mystery-*": {"input": Decimal(1), "output": Decimal(2)}}
    theirs = {"mystery-2": {"input": Decimal(10), "output": Decimal(0)}}
    config = settings(pool("k1", prices=theirs), cost=CostSettings(prices=ours))
    pipeline = PipelineFixture(*[says(completion(model=name)) for name in ("mystery-1", "mystery-2")], config=config)
    assert (await pipeline.ask(ask(model="mystery-1"))).cost == "0.000500"
    assert (await pipeline.ask(ask(model="mystery-2"))).cost == "0.001000"


@virtual_time
async def test_moderations_are_free_and_have_no_usage() -> None:
    answer = {"id": "m", "model": "omni-moderation-latest", "results": [{"flagged": False}]}
    pipeline = PipelineFixture(says(answer))
    result = await pipeline.ask({"input": "Hi"}, target="/v1/moderations")
    assert (result.status, result.cost, result.headers["X-Proxy-Cost-Status"]) == (200, "0.000000", "exact")
    assert (await pipeline.ask({"input": "Hi"}, target="/v1/moderations")).cache == "hit"


@virtual_time
async def test_text_instead_of_moderations_has_no_cost() -> None:
    pipeline = PipelineFixture(Responds(200, (("Content-Type", "text/plain"),), (b"p",)))
    result = await pipeline.ask({"input": "Hi", "model": "omni-moderation-latest"}, target="/v1/moderations")
    assert (result.cost, result.headers["X-Proxy-Cost-Status"]) == (None, "unknown")


@virtual_time
async def test_every_outcome_has_one_receipt() -> None:
    pipeline = PipelineFixture(
        says(), error(400), error(500), Responds(302), config=settings(retry=RetrySettings(max_retries=0))
    )
    for text in "abcd":
        await pipeline.ask(ask(text))
    assert [(r.status, r.error, r.cost_usd) for r in pipeline.receipts] == [
        (200, "", "0.002250"),
        (400, "upstream_400", None),
        (500, "upstream_500", None),
        (502, "upstream_invalid_response", None),
    ]
    assert all(pipeline.services.receipts.get(r.id) is r for r in pipeline.receipts)


@virtual_time
async def test_a_model_without_a_price_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = PipelineFixture(*[says(completion(model="mine\r\n"))] * 2)
    for text in ("one", "two"):
        result = await pipeline.ask(ask(text, model="mine\r\n"))
        assert (result.cost, result.headers["X-Proxy-Cost-Status"]) == (None, "unknown")
    assert [record.message for record in caplog.records if "no price" in record.message] == [
        r"no price for what mine\x0d\x0a answered: its cost is unknown (cost.prices sets one)"
    ]
