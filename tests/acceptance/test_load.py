"""Many at once, large ones, and nothing left behind."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from tests import upstream_answers
from tests.client import Client, ask
from tests.launch import AT_ONCE, Launch, ProxyProcess, settings
from tests.ledger import Request
from tests.scripted_upstream import Answer, ScriptedUpstream, hold, stall


async def test_300_slow_requests_run_at_the_same_time(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy, gate = launch(settings(upstream.port)), upstream.gate()

    def script(request: Request) -> Answer:
        answer = upstream_answers.behave(request)
        return [hold(gate), *([answer] if callable(answer) else answer)]

    upstream.script = script
    prompts = [f"slow {number}" for number in range(300)]
    asking = [asyncio.create_task(client.send(proxy, ask(p, stream=n % 3 == 0))) for n, p in enumerate(prompts)]
    await upstream.until(lambda: upstream.count == 300, 20)
    gate.open()
    answers = await asyncio.gather(*asking)
    assert {a.status for a in answers} == {200}
    for prompt, answer in zip(prompts, answers, strict=True):  # everybody has their own
        said = prompt.split()[1]
        assert said in answer.body.decode()


async def test_a_prompt_of_20_mb(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    question = ask("x" * 20_000_000)
    first = await client.send(proxy, question)
    assert (first.status, first.cache) == (200, "miss")
    assert len(upstream.last.body) > 20_000_000
    assert (await client.send(proxy, question)).cache == "hit"


async def test_an_answer_of_20_mb(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    body = upstream_answers.dump(upstream_answers.completion("y" * 20_000_000))
    upstream.always(upstream_answers.reply(200, body))
    assert (await client.send(proxy, ask())).body == body


async def test_connections_to_the_upstream_are_reused(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy, before = launch(settings(upstream.port)), upstream.connections
    for _ in range(20):
        await client.send(proxy, ask())
    assert upstream.connections - before <= 2


async def test_200_abandoned_requests_leak_no_descriptor(launch: Launch, upstream: ScriptedUpstream) -> None:
    proxy = launch(settings(upstream.port))
    if proxy.fds() is None:
        pytest.skip("no /proc")
    async with Client() as client:
        await client.send(proxy, ask())
    before = proxy.fds() or 0

    def script(request: Request) -> Answer:
        if request.json().get("stream"):
            return [*upstream_answers.stream(upstream_answers.chat_events()[:2], end=False), stall()]
        return stall()

    upstream.script = script
    async with Client() as client:
        came = upstream.count
        tasks = [asyncio.create_task(client.send(proxy, ask(stream=n % 2 == 0))) for n in range(200)]
        await upstream.until(lambda: upstream.count == came + 200, 20)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await upstream.until(lambda: all(r.peer_gone for r in upstream.requests[came:]))
    await upstream.until(lambda: (proxy.fds() or 0) <= before + 3, what="descriptors went back")


async def test_a_slow_body_does_not_block_other_requests(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    """A client that sends half its body and pauses, while another is served."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(head + b"Content-Length: 1000\r\n\r\n{")
    await writer.drain()
    async with Client() as client:
        assert (await client.send(proxy, ask())).seconds < AT_ONCE
    writer.close()
    assert upstream.count == 1
    del reader


async def test_no_client_gets_the_response_of_another(proxy: ProxyProcess, client: Client) -> None:
    """Misses, hits, streams and leavers all at once; every answer echoes its own question."""
    chance = random.Random(7)
    salt = str(time.monotonic_ns())

    async def one(number: int) -> str:
        nonce = f"{number % 150}/{salt}"
        task = asyncio.create_task(client.send(proxy, ask(nonce, stream=number % 2 == 0)))
        if chance.random() < 0.3:
            await asyncio.sleep(chance.random() * 0.05)
            task.cancel()
        try:
            answer = await task
        except asyncio.CancelledError:
            return "left"
        return "right" if nonce.encode() in answer.body else "wrong"  # the streams cut it after "echo"

    outcomes = await asyncio.gather(*(one(number) for number in range(800)))
    assert outcomes.count("wrong") == 0
    assert outcomes.count("right") > 400
