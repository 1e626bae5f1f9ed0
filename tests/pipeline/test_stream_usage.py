"""The cost of a stream: usage asked for where nobody decided, taken out again, and told in a comment where wanted."""

from __future__ import annotations

import asyncio
import itertools
import re
from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.settings import CostSettings
from proxy.cost.pricing import usd
from proxy.pipeline.relay import with_comment
from proxy.protocol.options import Options
from tests.pipeline.clock import run, virtual_time
from tests.pipeline.fixture import PipelineFixture, ask, pool, settings
from tests.pipeline.script import (
    DONE,
    HANG,
    USAGE,
    Responds,
    ScriptedTransport,
    Sent,
    chunk,
    error,
    event,
    events,
    says,
    streams,
    usage,
)

COST = b": x-proxy-cost-usd=0.002250 x-proxy-prompt-tokens=100 x-proxy-completion-tokens=200\n"
UNKNOWN = b": x-proxy-cost-status=unknown\n"
COMMENT = Options(stream_cost=True)
WITH = b"".join(events(usage=True))
WITHOUT = b"".join(events())


def stream(**fields: Any) -> dict[str, Any]:
    return ask(stream=True, **fields)


# Asking for it.

INCLUDE = {"include_usage": True}


@pytest.mark.parametrize(
    ("options", "sent", "seen"),
    [
        (None, INCLUDE, WITHOUT),
        ({}, INCLUDE, WITHOUT),
        ({"include_obfuscation": False}, {"include_obfuscation": False} | INCLUDE, WITHOUT),
        (INCLUDE, INCLUDE, WITH),
        ({"include_usage": False}, {"include_usage": False}, WITHOUT),
        ({"include_usage": None}, {"include_usage": None}, WITHOUT),
    ],
    ids=["absent", "empty", "other options", "asked for", "explicitly not", "explicitly null"],
)
@virtual_time
async def test_usage_is_requested_only_if_the_client_left_it_open(options: Any, sent: Any, seen: bytes) -> None:
    """And what only we asked for is taken out again."""

    def upstream(request: Sent) -> Responds:
        asked = request.json().get("stream_options", {}).get("include_usage")
        return streams(events(usage=asked is True))

    pipeline = PipelineFixture(transport=ScriptedTransport(otherwise=upstream))
    document = stream() if options is None else stream(stream_options=options)
    result = await pipeline.ask(document)
    assert pipeline.transport.sent[0].json()["stream_options"] == sent
    assert result.body == seen
    explicitly_not = isinstance(options, dict) and options.get("include_usage", 1) in (False, None)
    assert pipeline.receipt.cost_status == ("estimated" if explicitly_not else "exact")
    assert (pipeline.receipt.cost_usd == "0.002250") is not explicitly_not


@virtual_time
async def test_only_include_usage_changes() -> None:
    body = b'{ "model":"gpt-4o",  "stream" : true, "messages":[{"role":"user","content":"h\\u00e9"}]\n}'
    pipeline = PipelineFixture(streams())
    await pipeline.ask(orjson.loads(body), body=body)
    assert pipeline.transport.sent[0].body == body.replace(b"\n}", b',"stream_options":{"include_usage":true}\n}')


@virtual_time
async def test_usage_is_not_requested_if_switched_off() -> None:
    pipeline = PipelineFixture(streams(events()), config=settings(cost=CostSettings(stream_usage="off")))
    await pipeline.ask(stream())
    assert "stream_options" not in pipeline.transport.sent[0].json()
    assert pipeline.receipt.cost_status == "estimated"


@virtual_time
async def test_other_endpoints_and_plain_requests_are_not_changed() -> None:
    pipeline = PipelineFixture(says(), streams([event({"type": "response.completed", "response": {}})]))
    await pipeline.ask()
    await pipeline.ask({"model": "gpt-4o", "input": "Hi", "stream": True}, target="/v1/responses")
    assert all("stream_options" not in sent.json() for sent in pipeline.transport.sent)


@pytest.mark.parametrize(
    "usage_in",
    [
        [*events()[:-1], USAGE, DONE],
        [event(chunk("a", usage=None)), event(chunk(None, "stop", usage=usage())), USAGE, DONE],
        [*events()[:-1], USAGE.replace(b"\n", b"\r\n"), DONE],
    ],
)
@virtual_time
async def test_the_injected_usage_chunk_is_removed(usage_in: list[bytes]) -> None:
    pipeline = PipelineFixture(streams(usage_in))
    result = await pipeline.ask(stream())
    assert result.body == b"".join(piece for piece in usage_in if not piece.startswith(USAGE[:-2]))
    assert pipeline.receipt.cost_usd == "0.002250"
    hit = await pipeline.ask(stream())
    assert (hit.cache, hit.body) == ("hit", result.body)


@virtual_time
async def test_usage_in_a_chunk_with_choices_stays() -> None:
    """Some providers put it there unasked: it is not the chunk that we asked for."""
    steps = [event(chunk("a")), event(chunk(None, "stop", usage=usage())), DONE]
    pipeline = PipelineFixture(streams(steps))
    result = await pipeline.ask(stream())
    assert result.body == b"".join(steps)
    assert pipeline.receipt.cost_usd == "0.002250"


# Upstreams that do not know the field.

DISLIKE = error(400, "unknown_parameter", message="Unrecognized request argument supplied: stream_options")


@virtual_time
async def test_an_upstream_that_refuses_stream_options_is_retried_without() -> None:
    """At once, with no retry spent; and it is remembered, for this upstream and model."""
    pipeline = PipelineFixture(DISLIKE, streams(events()), streams(events()), DISLIKE, streams(events()))
    result = await pipeline.ask(stream(), Options(max_retries=0))
    assert (result.status, result.body, result.at, result.attempts) == (200, WITHOUT, 0.0, 2)
    assert "X-Should-Retry" not in result.headers
    assert pipeline.used() == {"rpm": 2, "tpm": pipeline.used()["tpm"], "concurrency": 0}
    assert (await pipeline.ask(stream(n=1))).attempts == 1
    pipeline.assert_nothing_leaked()
    assert (await pipeline.ask(stream(model="other"))).attempts == 2
    assert ["stream_options" in sent.json() for sent in pipeline.transport.sent] == [True, False, False, True, False]


@pytest.mark.parametrize("status", [400, 404, 422])
@virtual_time
async def test_any_4xx_that_names_the_field_is_a_refusal(status: int) -> None:
    refusal = error(status, message="extra_forbidden: body.stream_options")
    pipeline = PipelineFixture(refusal, streams(events()), streams(events()))
    assert (await pipeline.ask(stream())).body == WITHOUT
    assert (await pipeline.ask(stream(n=1))).attempts == 1


@pytest.mark.parametrize("choices", [b'"choices":[],', b'"choices":null,', b""])
@virtual_time
async def test_a_usage_chunk_is_taken_out_whatever_its_choices(choices: bytes) -> None:
    """Of the miss, of its hit, and of the hit of a client that asked for it not."""
    odd = b'data: {"id":"c","model":"gpt-4o",' + choices + b'"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n'
    *head, done = events()
    pipeline = PipelineFixture(streams([*head, odd, done]))
    assert [(await pipeline.ask(stream())).body for _ in range(2)] == [WITHOUT, WITHOUT]
    assert (await pipeline.ask(stream(stream_options=INCLUDE))).body == b"".join([*head, odd, done])


@virtual_time
async def test_a_refusal_of_the_clients_own_stream_options_is_returned() -> None:
    pipeline = PipelineFixture(DISLIKE)
    result = await pipeline.ask(stream(stream_options={"include_usage": True}))
    assert (result.status, result.attempts) == (400, 1)


@virtual_time
async def test_refused_stream_options_are_remembered_per_upstream() -> None:
    first, second = pool("k1", name="first"), pool("k2", name="second", priority=1)
    pipeline = PipelineFixture(DISLIKE, error(401), streams(), config=settings(first, second))
    result = await pipeline.ask(stream())
    assert (result.status, result.headers["X-Proxy-Upstream"]) == (200, "second")
    assert ["stream_options" in sent.json() for sent in pipeline.transport.sent] == [True, False, True]


@virtual_time
async def test_remembered_refusals_are_bounded_and_retried_once() -> None:
    """More models than are remembered: each still costs one call more, not an endless number."""

    def upstream(request: Sent) -> Responds:
        return DISLIKE if "stream_options" in request.json() else streams(events())

    pipeline = PipelineFixture(transport=ScriptedTransport(otherwise=upstream))
    for n in range(1200):
        result = await pipeline.ask(stream(model=f"model-{n}"))
        assert (result.status, result.attempts) == (200, 2)


# The comment.


@pytest.mark.parametrize("document", [stream(), stream(stream_options=INCLUDE)], ids=["injected", "asked for"])
@pytest.mark.parametrize("by_setting", [True, False])
@virtual_time
async def test_the_cost_comment(document: dict[str, Any], by_setting: bool) -> None:
    """One line, one newline, before [DONE]; a usage chunk that only we asked for is still taken out."""
    config = settings(cost=CostSettings(stream_comment=by_setting))
    pipeline = PipelineFixture(streams(), config=config)
    result = await pipeline.ask(document, Options() if by_setting else COMMENT)
    asked = "stream_options" in document
    assert result.body == b"".join(events(usage=asked)[:-1]) + COST + DONE
    # What is stored is the upstream's.
    hit = await pipeline.ask(document)
    assert hit.body == b"".join(events(usage=asked))


@virtual_time
async def test_there_is_no_cost_comment_unless_asked_for() -> None:
    pipeline = PipelineFixture(streams(), says())
    assert b"x-proxy" not in (await pipeline.ask(stream())).body
    assert b"x-proxy" not in (await pipeline.ask(None, COMMENT)).body  # not a stream


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([*events()[:-1], b"data: [DONE]"], [*events()[:-1], UNKNOWN, b"data: [DONE]"]),
        ([*events()[:-1], b"data: [DONE]\n"], [*events()[:-1], UNKNOWN, b"data: [DONE]\n"]),
        ([*events()[:-1], b"data: [DONE]\r\n\r"], [*events()[:-1], UNKNOWN, b"data: [DONE]\r\n\r"]),
        ([*events()[:-1], b"data:[DONE]\n\n"], [*events()[:-1], UNKNOWN, b"data:[DONE]\n\n"]),
        ([*events()[:-1], b"data: [DONE] \n\n"], [*events()[:-1], UNKNOWN, b"data: [DONE] \n\n"]),
        ([*events(), b"\n"], [*events()[:-1], UNKNOWN, DONE, b"\n"]),
        ([*events(), b": bye\n\n"], [*events()[:-1], UNKNOWN, DONE, b": bye\n\n"]),
        (events()[:-1], [*events()[:-1], UNKNOWN]),
        ([*events()[:-1], b"\n"], [*events()[:-1], b"\n", UNKNOWN]),
        ([*events(), DONE], [*events()[:-1], UNKNOWN, DONE, DONE]),
        ([event(chunk("[DONE]")), *events()], [event(chunk("[DONE]")), *events()[:-1], UNKNOWN, DONE]),
    ],
    ids=[
        "no blank line",
        "half a blank line",
        "half a CRLF",
        "no space",
        "a space too many",
        "a line too many",
        "a comment after it",
        "no [DONE]",
        "no [DONE] and a line too many",
        "two",
        "said by the model",
    ],
)
@virtual_time
async def test_one_cost_comment_comes_before_done(steps: list[bytes], expected: list[bytes]) -> None:
    pipeline = PipelineFixture(streams(steps))
    result = await pipeline.ask(stream(), COMMENT)
    comment = re.compile(rb": x-proxy-cost-usd=[0-9.]+ x-proxy-cost-status=estimated [^\n]*\n")
    assert (comment.sub(UNKNOWN, result.body), result.broken) == (b"".join(expected), False)


@virtual_time
async def test_without_usage_the_cost_is_estimated_from_request_and_text() -> None:
    """gpt-4o: 2.5 and 10 USD per million tokens; text counts as its bytes / 4."""
    said = events("x" * 4000, "y" * 4000)
    pipeline = PipelineFixture(streams(said), config=settings(cost=CostSettings(stream_usage="off")))
    await pipeline.ask(stream(messages=[{"role": "user", "content": "z" * 40_000}]))
    receipt = pipeline.receipt
    assert receipt.cost_status == "estimated"
    assert receipt.usage is not None
    assert 10_000 <= receipt.usage.prompt_tokens <= 10_010
    assert 2000 <= receipt.usage.completion_tokens <= 2010
    tenths = receipt.usage.prompt_tokens * 25 + receipt.usage.completion_tokens * 100
    assert receipt.cost_usd == usd(Decimal(tenths) / 10**7)
    hit = (await pipeline.ask(stream(messages=[{"role": "user", "content": "z" * 40_000}]))).hit
    assert hit is not None
    assert (hit.entry.usage, hit.entry.cost) == (None, None), "an estimate is no saving"


@virtual_time
async def test_a_stream_that_its_client_left_is_estimated_once() -> None:
    pipeline = PipelineFixture(streams([event(chunk("x" * 4000)), HANG, *events()]))
    task = asyncio.create_task(pipeline.ask(stream()))
    await asyncio.sleep(1.0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(1.0)
    [receipt] = pipeline.receipts
    assert (receipt.status, receipt.error, receipt.cost_status) == (499, "client_gone", "estimated")
    assert receipt.usage is not None
    assert receipt.usage.completion_tokens == 1000


@virtual_time
async def test_a_stream_of_an_unpriced_model_has_no_cost() -> None:
    pipeline = PipelineFixture(streams([event(chunk("x", model="unheard-of")), *events()[-1:]]))
    await pipeline.ask(stream(model="unheard-of"))
    assert (pipeline.receipt.cost_usd, pipeline.receipt.usage, pipeline.receipt.cost_status) == (None, None, "unknown")


@virtual_time
async def test_a_broken_stream_has_no_cost_comment() -> None:
    pipeline = PipelineFixture(streams(events(usage=True)[:2]))
    result = await pipeline.ask(stream(), COMMENT)
    assert result.broken
    assert b"x-proxy" not in result.body


@given(cuts=st.lists(st.integers(1, len(WITH) - 1), max_size=12, unique=True), comment=st.booleans())
def test_any_split_of_the_bytes_gives_the_same_bytes(cuts: list[int], comment: bool) -> None:
    places = [0, *sorted(cuts), len(WITH)]
    reads = [WITH[start:end] for start, end in itertools.pairwise(places)]

    async def tell() -> None:
        pipeline = PipelineFixture(streams(reads))
        result = await pipeline.ask(stream(), Options(stream_cost=comment))
        assert result.body == (WITHOUT.replace(DONE, COST + DONE) if comment else WITHOUT)
        assert (await pipeline.ask(stream())).body == WITHOUT
        assert (await pipeline.ask(stream(stream_options=INCLUDE))).body == WITH
        assert len(pipeline.transport.sent) == 1
        assert pipeline.receipt.cost_usd == "0.002250"

    run(tell())


# On a hit.


def test_the_cost_comment_of_a_stored_stream() -> None:
    zero = b": x-proxy-cost-usd=0.000000\n"
    assert with_comment(WITHOUT, zero) == WITHOUT.removesuffix(DONE) + zero + DONE
    assert with_comment(b"data:[DONE]\n\n", zero) == zero + b"data:[DONE]\n\n"
    assert with_comment(b"a\r\n\r\ndata: [DONE]\r\n\r\n", zero) == b"a\r\n\r\n" + zero + b"data: [DONE]\r\n\r\n"
    assert with_comment(b"data: {}\n\n", zero) == b"data: {}\n\n" + zero


def test_done_inside_the_text_does_not_end_the_stream() -> None:
    zero = b": x-proxy-cost-usd=0.000000\n"
    said = event(chunk("streams end with data: [DONE]"))
    assert with_comment(said, zero) == said + zero
    assert with_comment(said + b"data:[DONE]\n\n", zero) == said + zero + b"data:[DONE]\n\n"
