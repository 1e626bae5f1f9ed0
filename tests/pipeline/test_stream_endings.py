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
    told = data_of(body[body.rindex(b"data: ") :])
    assert told is not None
    return orjson.loads(told)["error"]


# Drain, silence, and clients that leave.


async def started(
    scene: PipelineFixture, document: dict[str, Any], options: Options | None = None
) -> asyncio.Task[Result]:
    task = scene.loop.create_task(scene.ask(document, options))
    await settled()
    return task


@pytest.mark.parametrize("config", [OFF, settings()], ids=["as it comes", "through the usage filter"])
@pytest.mark.parametrize("comment", [True, False])
@pytest.mark.parametrize("extra", [b"", event(chunk("b"))[:30], event(chunk("b"))[:-1]])
@virtual_time
async def test_draining_adds_an_error_event_at_an_event_boundary(config: Any, comment: bool, extra: bytes) -> None:
    first = event(chunk("a"))
    scene = PipelineFixture(streams([first, *([extra] if extra else []), HANG]), config=config)
    told = await scene.interrupt(await started(scene, STREAM, Options(stream_cost=comment)))
    assert told.broken
    if told.body.startswith(first + extra) and extra:
        assert told.body == first + extra  # inside an event: the abort alone
    else:
        assert told.body.startswith(first + b"data: ")
        assert last_error(told.body)["code"] == "draining"
    assert (scene.receipt.status, scene.receipt.error) == (200, "draining")
    scene.assert_nothing_leaked()


@virtual_time
async def test_draining_ends_an_event_beyond_the_size_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.pipeline.relay, "MAX_EVENT", 100)
    first, big = event(chunk("a")), event(chunk("x" * 1000))[:500]
    scene = PipelineFixture(streams([first, big, HANG]))
    told = await scene.interrupt(await started(scene, STREAM, Options(stream_cost=True)))
    assert (told.broken, told.body) == (True, first + big)


@virtual_time
async def test_draining_ends_a_stream_that_has_not_begun() -> None:
    """The client is slow to take the first event."""
    scene = PipelineFixture(streams([event(chunk("a")), HANG]), config=OFF)

    async def stuck(data: bytes) -> None:
        if b"error" not in data:
            await asyncio.Event().wait()

    scene.write = stuck
    told = await scene.interrupt(await started(scene, STREAM))
    assert (told.broken, last_error(told.body)["code"]) == (True, "draining")
    scene.assert_nothing_leaked()


@pytest.mark.parametrize(("failure", "code"), [(CUT, "upstream_invalid_response"), (SILENT, "upstream_timeout")])
@virtual_time
async def test_a_failure_in_mid_stream_is_an_error_event_without_a_clean_end(
    failure: TransportFailure, code: str
) -> None:
    scene = PipelineFixture(streams([*events()[:2], failure]), streams())
    told = await scene.ask(STREAM)
    assert told.broken
    assert told.body.startswith(b"".join(events()[:2]))
    problem = last_error(told.body)
    assert (problem["code"], problem["type"]) == (code, "server_error")
    assert (scene.receipt.status, scene.receipt.error) == (200, code)
    assert (await scene.ask(STREAM)).cache == "miss"
    scene.assert_nothing_leaked()


@virtual_time
async def test_no_error_event_is_added_after_the_upstreams_own() -> None:
    steps = [event(chunk("a")), event({"error": {"message": "theirs"}})]
    scene = PipelineFixture(streams([*steps, CUT]), config=OFF)
    told = await scene.ask(STREAM)
    assert (told.broken, told.body) == (True, b"".join(steps))


@pytest.mark.parametrize("how", [ConnectionResetError("the client is gone"), None], ids=["a failed write", "cancelled"])
@virtual_time
async def test_a_client_that_leaves_in_mid_stream(how: Exception | None) -> None:
    scene = PipelineFixture(streams([*events()[:2], 1.0, *events()[2:-1], 9.0, DONE]), streams())
    task = await started(scene, STREAM)

    async def fail(data: bytes) -> None:
        if how is not None:
            raise how
        task.cancel()
        await asyncio.sleep(0)

    scene.write = fail
    with pytest.raises(asyncio.CancelledError if how is None else ConnectionResetError):
        await task
    assert scene.loop.time() - scene.transport.sent[0].at == 1.0  # not 10: the upstream was closed at once
    assert (scene.receipt.status, scene.receipt.error) == (499, "client_gone")
    assert scene.used()["tpm"] > 0  # what went up keeps the estimate
    scene.assert_nothing_leaked()
    scene.write = None
    assert (await scene.ask(STREAM)).cache == "miss"


@virtual_time
async def test_a_client_that_leaves_before_the_first_byte() -> None:
    scene = PipelineFixture(streams([*events()[:1], HANG]), error(400))
    request = scene.request(STREAM)
    bought = await scene.fetch(request)
    assert bought.stream is not None
    bought.stream.client_left()
    bought.stream.client_left()
    assert [receipt.status for receipt in scene.receipts] == [499]
    scene.assert_nothing_leaked()


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
    scene = PipelineFixture(streams([1.0, *events(usage=True), *after]))
    task = await started(scene, STREAM)

    async def write(data: bytes) -> None:
        if DONE in data:
            if how is not None:
                raise how
            task.cancel()
            await asyncio.sleep(0)

    scene.write = write
    with pytest.raises(asyncio.CancelledError if how is None else ConnectionResetError):
        await task
    assert (scene.receipt.status, scene.receipt.error, scene.receipt.cost_usd) == (200, "", "0.002250")
    scene.write = None
    assert (await scene.ask(STREAM)).cache == "hit"
    await scene.clock.sleep(READ_ON)
    await settled()
    [reply] = scene.transport.replies
    assert (reply.finished, reply.closed > 0) == (kept, True)
    scene.assert_nothing_leaked()


@virtual_time
async def test_a_connection_lost_after_done_does_not_break_the_stream() -> None:
    for failure in (CUT, SILENT):
        scene = PipelineFixture(streams([*events(), failure]), config=OFF)
        told = await scene.ask(STREAM)
        assert (told.body, told.broken) == (WHOLE, False)
        assert [(receipt.status, receipt.error) for receipt in scene.receipts] == [(200, "")]
        assert (await scene.ask(STREAM)).cache == "hit"
        scene.assert_nothing_leaked()


@virtual_time
async def test_a_stream_is_stored_at_done_before_the_upstream_closes() -> None:
    scene = PipelineFixture(streams([*events(), 5.0]), config=OFF)
    task = await started(scene, STREAM)
    assert (await scene.ask(STREAM)).cache == "hit"
    assert (await task).at == 5.0
    scene.assert_nothing_leaked()
