"""How streams end: by a drain, a break, a disconnect, or well; and what may follow (docs/routes-and-errors.md)."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

import proxy.pipeline.relay
from proxy.config.settings import CostSettings
from proxy.pipeline.relay import READ_ON
from proxy.protocol.options import Options
from proxy.protocol.sse import data_of
from proxy.upstream.retry.outcome import TransportFailure
from tests.pipeline.clock import settled, virtual_time
from tests.pipeline.fixture import PipelineFixture, Result, ask, settings
from tests.pipeline.script import DONE, HANG, Step, chunk, error, event, events, streams

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


FRAMED = [("Transfer-Encoding", "chunked")]


@pytest.mark.parametrize("end", [b"", event(chunk("b"))[:-5]], ids=["between events", "inside an event"])
@virtual_time
async def test_what_the_upstream_ends_by_its_framing_is_passed_on_as_it_ended(end: bytes) -> None:
    """Without framing nothing tells such an end from a cut."""
    steps: list[Step] = [event(chunk("a")), *([end] if end else [])]
    pipeline = PipelineFixture(streams(steps, headers=FRAMED), streams(steps), streams(), config=OFF)
    result = await pipeline.ask(STREAM)
    assert (result.broken, result.body) == (False, event(chunk("a")) + end)
    assert pipeline.receipt.error == ""
    result = await pipeline.ask(STREAM)
    assert (result.cache, result.broken) == ("miss", True)
    assert (await pipeline.ask(STREAM)).cache == "miss"


# Drain, silence, and clients that leave.


async def started(
    pipeline: PipelineFixture, document: dict[str, Any], options: Options | None = None
) -> asyncio.Task[Result]:
    task = pipeline.loop.create_task(pipeline.ask(document, options))
    await settled()
    return task


@pytest.mark.parametrize("config", [OFF, settings()], ids=["as it comes", "through the usage filter"])
@pytest.mark.parametrize("comment", [True, False])
@pytest.mark.parametrize("extra", [b"", event(chunk("b"))[:30], event(chunk("b"))[:-1]])
@virtual_time
async def test_draining_adds_an_error_event_at_an_event_boundary(config: Any, comment: bool, extra: bytes) -> None:
    first = event(chunk("a"))
    pipeline = PipelineFixture(streams([first, *([extra] if extra else []), HANG]), config=config)
    result = await pipeline.interrupt(await started(pipeline, STREAM, Options(stream_cost=comment)))
    assert result.broken
    if result.body.startswith(first + extra) and extra:
        assert result.body == first + extra  # inside an event: the abort alone
    else:
        assert result.body.startswith(first + b"data: ")
        assert last_error(result.body)["code"] == "draining"
    assert (pipeline.receipt.status, pipeline.receipt.error) == (200, "draining")
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_draining_ends_an_event_beyond_the_size_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.pipeline.relay, "MAX_EVENT", 100)
    first, big = event(chunk("a")), event(chunk("x" * 1000))[:500]
    pipeline = PipelineFixture(streams([first, big, HANG]))
    result = await pipeline.interrupt(await started(pipeline, STREAM, Options(stream_cost=True)))
    assert (result.broken, result.body) == (True, first + big)


@virtual_time
async def test_draining_ends_a_stream_that_has_not_begun() -> None:
    """The client is slow to take the first event."""
    pipeline = PipelineFixture(streams([event(chunk("a")), HANG]), config=OFF)

    async def stuck(data: bytes) -> None:
        if b"error" not in data:
            await asyncio.Event().wait()

    pipeline.write = stuck
    result = await pipeline.interrupt(await started(pipeline, STREAM))
    assert (result.broken, last_error(result.body)["code"]) == (True, "draining")
    pipeline.assert_nothing_leaked()


@pytest.mark.parametrize(("failure", "code"), [(CUT, "upstream_invalid_response"), (SILENT, "upstream_timeout")])
@virtual_time
async def test_a_failure_in_mid_stream_is_an_error_event_without_a_clean_end(
    failure: TransportFailure, code: str
) -> None:
    pipeline = PipelineFixture(streams([*events()[:2], failure]), streams())
    result = await pipeline.ask(STREAM)
    assert result.broken
    assert result.body.startswith(b"".join(events()[:2]))
    problem = last_error(result.body)
    assert (problem["code"], problem["type"]) == (code, "server_error")
    assert (pipeline.receipt.status, pipeline.receipt.error) == (200, code)
    assert (await pipeline.ask(STREAM)).cache == "miss"
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_no_error_event_is_added_after_the_upstreams_own() -> None:
    steps = [event(chunk("a")), event({"error": {"message": "theirs"}})]
    pipeline = PipelineFixture(streams([*steps, CUT]), config=OFF)
    result = await pipeline.ask(STREAM)
    assert (result.broken, result.body) == (True, b"".join(steps))


@pytest.mark.parametrize("how", [ConnectionResetError("the client is gone"), None], ids=["a failed write", "cancelled"])
@virtual_time
async def test_a_client_that_leaves_in_mid_stream(how: Exception | None) -> None:
    pipeline = PipelineFixture(streams([*events()[:2], 1.0, *events()[2:-1], 9.0, DONE]), streams())
    task = await started(pipeline, STREAM)

    async def fail(data: bytes) -> None:
        if how is not None:
            raise how
        task.cancel()
        await asyncio.sleep(0)

    pipeline.write = fail
    with pytest.raises(asyncio.CancelledError if how is None else ConnectionResetError):
        await task
    assert pipeline.loop.time() - pipeline.transport.sent[0].at == 1.0  # not 10: the upstream was closed at once
    assert (pipeline.receipt.status, pipeline.receipt.error) == (499, "client_gone")
    assert pipeline.used()["tpm"] > 0  # what went up keeps the estimate
    pipeline.assert_nothing_leaked()
    pipeline.write = None
    assert (await pipeline.ask(STREAM)).cache == "miss"


@virtual_time
async def test_a_client_that_leaves_before_the_first_byte() -> None:
    pipeline = PipelineFixture(streams([*events()[:1], HANG]), error(400))
    request = pipeline.request(STREAM)
    bought = await pipeline.fetch(request)
    assert bought.stream is not None
    bought.stream.client_left()
    bought.stream.client_left()
    assert [receipt.status for receipt in pipeline.receipts] == [499]
    pipeline.assert_nothing_leaked()


# The end, and what comes after it.


@pytest.mark.parametrize("how", [ConnectionResetError("the client is gone"), None], ids=["a failed write", "cancelled"])
@pytest.mark.parametrize(
    ("after", "kept"),
    [((), True), ((0.5, b"\n"), True), ((HANG,), False), ((CUT,), True)],
    ids=["", "late", "never", "cut"],
)
@virtual_time
async def test_a_client_that_hangs_up_at_done_counts_as_served(
    how: Exception | None, after: tuple[Step, ...], kept: bool
) -> None:
    """Most SDKs do. The answer is stored, priced and whole; what is left upstream is read for a second at most."""
    pipeline = PipelineFixture(streams([1.0, *events(usage=True), *after]))
    task = await started(pipeline, STREAM)

    async def write(data: bytes) -> None:
        if DONE in data:
            if how is not None:
                raise how
            task.cancel()
            await asyncio.sleep(0)

    pipeline.write = write
    with pytest.raises(asyncio.CancelledError if how is None else ConnectionResetError):
        await task
    assert (pipeline.receipt.status, pipeline.receipt.error, pipeline.receipt.cost_usd) == (200, "", "0.002250")
    pipeline.write = None
    assert (await pipeline.ask(STREAM)).cache == "hit"
    await pipeline.clock.sleep(READ_ON)
    await settled()
    [reply] = pipeline.transport.replies
    assert (reply.finished, reply.closed > 0) == (kept, True)
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_a_connection_lost_after_done_does_not_break_the_stream() -> None:
    for failure in (CUT, SILENT):
        pipeline = PipelineFixture(streams([*events(), failure]), config=OFF)
        result = await pipeline.ask(STREAM)
        assert (result.body, result.broken) == (WHOLE, False)
        assert [(receipt.status, receipt.error) for receipt in pipeline.receipts] == [(200, "")]
        assert (await pipeline.ask(STREAM)).cache == "hit"
        pipeline.assert_nothing_leaked()


@virtual_time
async def test_a_stream_is_stored_at_done_before_the_upstream_closes() -> None:
    pipeline = PipelineFixture(streams([*events(), 5.0]), config=OFF)
    task = await started(pipeline, STREAM)
    assert (await pipeline.ask(STREAM)).cache == "hit"
    assert (await task).at == 5.0
    pipeline.assert_nothing_leaked()
