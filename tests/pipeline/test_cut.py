"""Truncation never looks like success: answers cut at every byte, by a broken connection or by a clean end too early.

A cut stream never ends cleanly, never gets an invented `[DONE]`, and is not stored (docs/routes-and-errors.md).
"""

from __future__ import annotations

import gzip
import zlib
from typing import Any

import orjson
import pytest

from proxy.config.settings import CostSettings
from proxy.protocol.options import Options
from proxy.upstream.retry.outcome import TransportFailure
from tests.pipeline.clock import run
from tests.pipeline.fixture import PipelineFixture, Result, ask, settings
from tests.pipeline.script import (
    DONE,
    JSON,
    SSE,
    USAGE,
    Responds,
    Step,
    chunk,
    completion,
    dump,
    event,
    events,
    says,
    streams,
)

MODES: dict[str, tuple[str, Options]] = {
    "as it comes": ("off", Options()),
    "through the usage filter": ("inject", Options()),
    "with a cost comment": ("inject", Options(stream_cost=True)),
}


def broken(body: bytes) -> tuple[Step, ...]:
    half = len(body) // 2
    return (body[:half], body[half:], TransportFailure("invalid", "cut"))


def ended(body: bytes) -> tuple[Step, ...]:
    half = len(body) // 2
    return tuple(piece for piece in (body[:half], body[half:]) if piece)


def boundaries(whole: bytes) -> set[int]:
    found, at = set(), 0
    while at >= 0:
        found.add(at)
        at = whole.find(b"\n\n", at)
        at = at + 2 if at >= 0 else -1
    return found


def judge(result: Result, whole: bytes, got: int) -> None:
    """What came of a stream of which `got` bytes were read."""
    assert result.attempts == 1
    if result.refusal is not None:
        assert (result.status, result.refused) == (502, "upstream_invalid_response")
        return
    assert result.broken
    body = result.body
    at = body.rfind(b'data: {"error":')
    if at >= 0:
        problem = orjson.loads(body[at + 6 :])["error"]
        assert (problem["code"], problem["type"]) == ("upstream_invalid_response", "server_error")
        body = body[:at]
        assert body == b"" or body.endswith(b"\n\n")  # it stands where an event may stand
    body = b"".join(part for part in body.splitlines(keepends=True) if not part.startswith(b": x-proxy-cost"))
    assert whole.startswith(body) or whole.replace(USAGE, b"").startswith(body)
    assert len(body) <= got


STREAM = b"".join([b": hi\n\n", *events("Hé", usage=True)])
FINISHED = STREAM.index(USAGE)


@pytest.mark.parametrize(("usage", "options"), MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("kind", ["broken", "ended"])
def test_a_stream_cut_at_every_byte(kind: str, usage: str, options: Options) -> None:
    whole = STREAM
    # Cleanly ended, these are odd but finished: SDKs take them for whole, and so they are; only the cache does not.
    finished = {at for at in boundaries(whole) if at >= FINISHED} | set(range(len(whole) - 2, len(whole)))

    async def tell() -> None:
        for at in range(len(whole)):
            pipeline = PipelineFixture(
                streams(broken(whole[:at]) if kind == "broken" else ended(whole[:at])),
                streams(),
                config=settings(cost=CostSettings(stream_usage=usage)),
            )
            result = await pipeline.ask(ask(stream=True), options)
            if kind == "ended" and at in finished:
                assert (result.status, result.broken) == (200, False), at
                assert result.body.count(b"[DONE]") == (at >= len(whole) - 2)
            else:
                judge(result, whole, at)
                assert b"[DONE]" not in result.body or at >= len(whole) - 2
                assert pipeline.receipt.error == "upstream_invalid_response"
            assert len(pipeline.receipts) == 1
            assert (await pipeline.ask(ask(stream=True), options)).cache == "miss"
            pipeline.assert_nothing_leaked()

    run(tell())


@pytest.mark.parametrize("kind", ["broken", "ended"])
def test_a_responses_stream_cut_at_every_byte(kind: str) -> None:
    output = [{"type": "message", "status": "completed", "content": [{"type": "output_text", "text": "Hi"}]}]
    response = {"status": "completed", "model": "gpt-4o", "output": output}
    whole = b"event: response.created\n" + event({"type": "response.created", "response": {"model": "gpt-4o"}})
    whole += b"event: response.completed\n" + event({"type": "response.completed", "response": response})
    document = {"model": "gpt-4o", "input": "Hi", "stream": True}

    async def tell() -> None:
        for at in range(len(whole)):
            pipeline = PipelineFixture(
                streams(broken(whole[:at]) if kind == "broken" else ended(whole[:at])), streams([whole])
            )
            judge(await pipeline.ask(document, target="/v1/responses"), whole, at)
            result = await pipeline.ask(document, target="/v1/responses")
            assert (result.cache, result.body, result.broken) == ("miss", whole, False)
            pipeline.assert_nothing_leaked()

    run(tell())


def test_a_connection_lost_after_done_does_not_break_the_stream() -> None:
    """The stream has said that it is over: SDKs hang up there, and nothing can be missing."""

    async def tell() -> None:
        pipeline = PipelineFixture(streams(broken(STREAM)), streams())
        result = await pipeline.ask(ask(stream=True))
        assert (result.body, result.broken) == (STREAM.replace(USAGE, b""), False)
        assert (await pipeline.ask(ask(stream=True))).cache == "hit"

    run(tell())


@pytest.mark.parametrize("kind", ["broken", "ended"])
def test_a_json_answer_cut_at_every_byte(kind: str) -> None:
    whole = dump(completion())

    async def tell() -> None:
        for at in range(len(whole) + (kind == "broken")):
            steps = broken(whole[:at]) if kind == "broken" else ended(whole[:at])
            pipeline = PipelineFixture(Responds(200, (JSON,), steps), says())
            result = await pipeline.ask()
            assert (result.status, result.refused, result.attempts) == (502, "upstream_invalid_response", 1)
            assert (await pipeline.ask()).cache == "miss"
            pipeline.assert_nothing_leaked()

    run(tell())


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
@pytest.mark.parametrize("stream", [True, False])
def test_a_compressed_answer_cut_at_every_byte(coding: str, pack: Any, stream: bool) -> None:
    """With a length or a last chunk that agrees, so that HTTP itself sees nothing wrong."""
    whole = STREAM if stream else dump(completion())
    packed = pack(whole)

    async def tell() -> None:
        for at in range(len(packed)):
            headers = (SSE if stream else JSON, ("Content-Encoding", coding))
            pipeline = PipelineFixture(Responds(200, headers, ended(packed[:at])), streams() if stream else says())
            result = await pipeline.ask(ask(stream=stream))
            if stream:
                if result.body == whole.replace(USAGE, b""):  # only the checksum is missing, and [DONE] was said
                    continue
                judge(result, whole, len(whole))
            else:
                assert (result.status, result.refused) == (502, "upstream_invalid_response")
            assert (await pipeline.ask(ask(stream=stream))).cache == "miss"
            pipeline.assert_nothing_leaked()

    run(tell())


@pytest.mark.parametrize("lost", range(2))
def test_a_stream_without_one_of_its_finish_reasons_is_not_stored(lost: int) -> None:
    async def tell() -> None:
        steps = [event(chunk(choices=[{"index": i, "delta": {"content": "a"}}])) for i in range(2)]
        done = [{"index": i, "delta": {}, "finish_reason": "stop"} for i in range(2) if i != lost]
        pipeline = PipelineFixture(
            streams([*steps, event(chunk(choices=done))]), streams([*steps, event(chunk(choices=done)), DONE])
        )
        result = await pipeline.ask(ask(stream=True, n=2))
        assert result.broken
        result = await pipeline.ask(ask(stream=True, n=2))
        assert (result.cache, result.broken) == ("miss", False)  # [DONE] is the upstream's own word for the end

    run(tell())
