"""Streams are relayed read by read, unchanged; a broken one never ends cleanly (docs/routes-and-errors.md)."""

from __future__ import annotations

import asyncio
import itertools
import json
import time

import pytest

from tests import upstream_answers
from tests.client import Client, ask, read_until_broken
from tests.launch import AT_ONCE, Launch, ProxyProcess, settings
from tests.scripted_upstream import ScriptedUpstream, Step, cut, drip, hold, reset, send, sleep, stall


def wants_usage() -> dict[str, object]:
    return ask(stream=True, stream_options={"include_usage": True})


async def test_each_event_arrives_before_the_next_is_sent(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    events = upstream_answers.chat_events(["a", "b", "c"], include_usage=True)
    gates = [upstream.gate() for _ in events]
    steps = [send(upstream_answers.stream_head())]
    for piece, gate in zip(events, gates, strict=True):
        steps += [send(upstream_answers.chunked(piece)), hold(gate)]
    upstream.always(*steps, send(upstream_answers.LAST_CHUNK))
    async with client.open(proxy, wants_usage()) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        for piece, gate in zip(events, gates, strict=True):
            assert await asyncio.wait_for(answer.content.readexactly(len(piece)), 5) == piece
            gate.open()
        assert await answer.content.read() == b""


async def test_an_incomplete_event_is_not_held_back_if_usage_was_asked_for(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    """ "Each upstream read is forwarded at once": after the first event, which may decide about a retry."""
    events = upstream_answers.chat_events(include_usage=True)
    gate, half = upstream.gate(), events[1][:30]
    start = upstream_answers.stream_head() + upstream_answers.chunked(events[0])
    rest = upstream_answers.chunked(events[1][30:] + b"".join(events[2:])) + upstream_answers.LAST_CHUNK
    upstream.always(send(start), sleep(0.05), send(upstream_answers.chunked(half)), hold(gate), send(rest))
    async with client.open(proxy, wants_usage()) as answer:
        assert await asyncio.wait_for(answer.content.readexactly(len(events[0] + half)), 5) == events[0] + half
        gate.open()
        await answer.content.read()


async def test_the_usage_filter_delays_no_event(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    events = upstream_answers.chat_events(["a", "b"])
    gates = [upstream.gate() for _ in events]
    steps = [send(upstream_answers.stream_head())]
    for piece, gate in zip(events, gates, strict=True):
        steps += [send(upstream_answers.chunked(piece)), hold(gate)]
    upstream.always(*steps, send(upstream_answers.LAST_CHUNK))
    async with client.open(proxy, ask(stream=True)) as answer:
        for piece, gate in zip(events, gates, strict=True):
            assert await asyncio.wait_for(answer.content.readexactly(len(piece)), 5) == piece
            gate.open()


async def test_timing_between_events_is_kept(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    events = upstream_answers.chat_events(["1", "2", "3", "4", "5", "6"])
    upstream.always(*upstream_answers.stream(events, sleep(0.1)))
    stamps = []
    async with client.open(proxy, ask(stream=True)) as answer:
        async for _ in answer.content.iter_any():
            stamps.append(time.monotonic())
    gaps = [b - a for a, b in itertools.pairwise(stamps)]
    assert len(stamps) >= len(events) - 1
    assert sorted(gaps)[len(gaps) // 2] > 0.05


@pytest.mark.parametrize("size", [1, 3, 7, 64, 1000])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
async def test_any_split_of_the_bytes_gives_the_same_bytes(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, size: int, newline: bytes
) -> None:
    events = upstream_answers.chat_events(["é🌍", "\u2028x", "data: [DONE]", "\x85"])
    whole = b": comment\n\n" + b"".join(events)
    whole = whole.replace(b"\n", newline)
    pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
    upstream.always(
        send(
            upstream_answers.stream_head()
            + b"".join(upstream_answers.chunked(p) for p in pieces)
            + upstream_answers.LAST_CHUNK
        )
    )
    question = ask(stream=True)
    for cache in ("miss", "hit"):
        answer = await client.send(proxy, question)
        assert answer.body == whole
        assert answer.cache == cache


async def test_one_byte_writes_arrive_whole(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    body = upstream_answers.chunked(b"".join(upstream_answers.chat_events(["🌍" * 20]))) + upstream_answers.LAST_CHUNK
    upstream.always(drip(upstream_answers.stream_head() + body, 11))
    answer = await client.send(proxy, ask(stream=True))
    assert answer.body == b"".join(upstream_answers.chat_events(["🌍" * 20]))


async def test_a_line_of_2_mb_passes(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    events = upstream_answers.chat_events(["x" * 2_000_000])
    upstream.always(*upstream_answers.stream(events))
    answer = await client.send(proxy, ask(stream=True))
    assert answer.body == b"".join(events)


async def test_a_close_delimited_stream_is_readable(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    head = upstream_answers.head(200, [("Content-Type", "text/event-stream"), ("Connection", "close")])
    events = upstream_answers.chat_events()
    upstream.always(send(head + b"".join(events)), cut())
    answer = await client.send(proxy, ask(stream=True))
    assert answer.body == b"".join(events)


@pytest.mark.parametrize("end", [cut(), reset()], ids=["fin", "rst"])
async def test_a_cut_between_events_is_an_error_event_and_an_abort(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, end: Step
) -> None:
    events = upstream_answers.chat_events()[:3]
    upstream.always(*upstream_answers.stream(events, end=False), sleep(0.1), end)
    question = ask(stream=True)
    async with client.open(proxy, question) as answer:
        assert answer.status == 200
        assert "close" not in answer.headers.get("Connection", "").lower()
        got, clean = await read_until_broken(answer)
    assert not clean
    assert got.startswith(b"".join(events))
    said = got.removeprefix(b"".join(events))
    assert said.startswith(b"data: ")
    assert said.endswith(b"\n\n")
    error = json.loads(said.removeprefix(b"data: "))["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert b"[DONE]" not in got
    assert upstream.count == 1  # never retried after the first byte
    upstream.script = upstream_answers.behave
    again = await client.send(proxy, question)
    assert again.cache == "miss"  # and never stored


@pytest.mark.parametrize("stream_options", [None, {"include_usage": True}], ids=["filtered", "as it is"])
async def test_a_cut_inside_an_event_is_an_abort_alone(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, stream_options: object
) -> None:
    events = upstream_answers.chat_events(include_usage=stream_options is not None)
    sent = b"".join(events[:2]) + events[2][:40]
    upstream.always(*upstream_answers.stream([*events[:2], events[2][:40]], end=False), sleep(0.1), cut())
    question = ask(stream=True) | ({"stream_options": stream_options} if stream_options else {})
    async with client.open(proxy, question) as answer:
        got, clean = await read_until_broken(answer)
    assert not clean
    whole = b"".join(events[:2])
    assert got.startswith(whole)
    if stream_options is None and got.startswith(whole + b'data: {"error"'):
        return  # the half event was held back, being looked at: for the client the cut falls between events
    assert sent.startswith(got)


async def test_a_clean_end_without_done_is_passed_and_not_stored(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    """[DONE] is demanded for storing; of the relay it is said only that none is invented."""
    events = upstream_answers.chat_events()[:-1]
    upstream.always(*upstream_answers.stream(events))
    question = ask(stream=True)
    async with client.open(proxy, question) as answer:
        got, _ = await read_until_broken(answer)
    assert got.startswith(b"".join(events))
    assert b"[DONE]" not in got
    async with client.open(proxy, question) as answer:
        assert answer.headers["X-Proxy-Cache"] == "miss"
        await read_until_broken(answer)


async def test_a_200_that_closes_without_an_event_is_an_error(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port, retry={"max_retries": 0}))
    upstream.always(send(upstream_answers.stream_head()), sleep(0.05), cut())
    async with client.open(proxy, ask(stream=True)) as answer:
        _, clean = await read_until_broken(answer)
    assert answer.status >= 500 or not clean


async def test_a_stalled_stream_ends_after_timeouts_idle(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port, timeouts={"idle": "500ms"}))
    events = upstream_answers.chat_events()[:2]
    upstream.always(*upstream_answers.stream(events, end=False), stall())
    start = time.monotonic()
    async with client.open(proxy, ask(stream=True)) as answer:
        got, clean = await read_until_broken(answer)
    assert 0.4 < time.monotonic() - start < AT_ONCE
    assert not clean
    assert got.startswith(b"".join(events))
    assert b'"error"' in got.removeprefix(b"".join(events))
    await upstream.until(lambda: upstream.last.peer_gone)


async def test_a_slow_stream_outlives_idle_and_total(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port, timeouts={"idle": "2s", "total": "1500ms", "first_byte": "1500ms"}))
    events = upstream_answers.chat_events(["a", "b", "c", "d"])
    upstream.always(*upstream_answers.stream([*events[:-1], b": ping\n\n", events[-1]], sleep(0.4)))
    answer = await client.send(proxy, ask(stream=True))
    assert answer.body.endswith(upstream_answers.DONE)
    assert answer.seconds > 2


async def test_an_error_as_the_first_event_is_retried(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(settings(upstream.port))
    bad = upstream_answers.event(upstream_answers.error_body("The server is overloaded", None, "server_error"))
    upstream.queue("/v1/chat/completions", upstream_answers.stream([bad, upstream_answers.DONE]))
    answer = await client.send(proxy, ask(stream=True))
    assert answer.status == 200
    assert b"overloaded" not in answer.body
    assert answer.body.endswith(upstream_answers.DONE)
    assert answer.headers["X-Proxy-Attempts"] == "2"
    assert upstream.count == 2


async def test_an_error_in_mid_stream_is_passed_and_not_stored(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    bad = upstream_answers.event(upstream_answers.error_body("It broke", None, "server_error"))
    events = [*upstream_answers.chat_events()[:2], bad, upstream_answers.DONE]
    upstream.always(*upstream_answers.stream(events))
    question = ask(stream=True)
    for _ in range(2):
        answer = await client.send(proxy, question)
        assert answer.body == b"".join(events)
        assert answer.cache == "miss"
    assert upstream.count == 2


async def test_an_http_error_to_a_stream_request_is_plain(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    upstream.always(upstream_answers.error(400, "Bad", "bad"))
    answer = await client.send(proxy, ask(stream=True))
    assert (answer.status, answer.json()["error"]["code"]) == (400, "bad")


async def test_a_plain_200_to_a_stream_request_is_passed(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    """Mock servers do this."""
    body = upstream_answers.dump(upstream_answers.completion())
    upstream.always(upstream_answers.reply(200, body))
    answer = await client.send(proxy, ask(stream=True))
    assert (answer.status, answer.body) == (200, body)
    assert answer.headers["Content-Type"] == "application/json"


# Peers that are slow, or gone.


async def test_a_slow_reader_does_not_fill_memory(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    if proxy.rss() is None:
        pytest.skip("no /proc")
    piece = upstream_answers.chunked(upstream_answers.event(upstream_answers.chunk({"content": "x" * 100_000})))
    upstream.always(send(upstream_answers.stream_head()), *[send(piece)] * 1500)  # 150 MB
    await client.get(proxy, "/healthz")
    before = proxy.rss() or 0
    async with client.open(proxy, ask(stream=True)) as answer:
        await answer.content.readany()
        last = -1
        while upstream.last.sent != last:  # until the upstream is held back
            last = upstream.last.sent
            await asyncio.sleep(0.3)
        assert last < 60_000_000, "no back-pressure"
        assert (proxy.rss() or 0) - before < 40_000_000
        answer.close()
    await upstream.until(lambda: upstream.last.peer_gone)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("phase", ["before the head", "in the body"])
async def test_the_upstream_is_closed_when_the_client_disconnects(
    proxy: ProxyProcess, upstream: ScriptedUpstream, stream: bool, phase: str
) -> None:
    if phase == "before the head":
        upstream.always(stall())
    elif stream:
        upstream.always(*upstream_answers.stream(upstream_answers.chat_events()[:2], end=False), stall())
    else:
        upstream.always(send(upstream_answers.response(200, upstream_answers.completion())[:-10]), stall())
    question = ask(stream=stream)
    async with Client() as client:
        task = asyncio.create_task(client.send(proxy, question))
        await upstream.until(lambda: upstream.count == 1 and upstream.last.complete_at is not None)
        await asyncio.sleep(0.1)
        task.cancel()
        await upstream.until(lambda: upstream.last.peer_gone)
    upstream.script = upstream_answers.behave
    async with Client() as client:
        assert (await client.send(proxy, question)).cache == "miss"  # nothing was stored


async def test_the_upstream_is_closed_when_the_client_leaves_a_download(
    proxy: ProxyProcess, upstream: ScriptedUpstream
) -> None:
    head = upstream_answers.head(200, [("Content-Type", "audio/mpeg"), ("Content-Length", "100000")])
    upstream.always(send(head + b"x" * 10), stall())
    async with Client() as client, client.open(proxy, path="/v1/files/f/content") as answer:
        await answer.content.readany()
        answer.close()
        await upstream.until(lambda: upstream.last.peer_gone)


async def test_a_hundred_disconnects_log_no_warning(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    upstream.always(*upstream_answers.stream(upstream_answers.chat_events()[:2], end=False), stall())
    async with Client() as client:
        tasks = [asyncio.create_task(client.send(proxy, ask(stream=True))) for _ in range(100)]
        await upstream.until(lambda: upstream.count == 100)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await upstream.until(lambda: all(r.peer_gone for r in upstream.requests))
        answer = await client.get(proxy, "/healthz")
    assert answer.status == 200
    assert "Cannot write to closing transport" not in proxy.stderr_so_far()
