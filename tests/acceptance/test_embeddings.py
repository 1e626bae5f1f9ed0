"""Embeddings item by item, on the real process: what is sent, and what the client gets (docs/caching.md)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from tests import upstream_answers
from tests.cache.stores.kit import valkey
from tests.client import Client, Reply
from tests.launch import Launch, ProxyProcess, settings
from tests.ledger import Request
from tests.scripted_upstream import ScriptedUpstream, Step, hold

PATH = "/v1/embeddings"
MODEL = "text-embedding-3-small"
_numbers = itertools.count(1)


def vector(text: object, encoding: object = "float") -> object:
    """Another for each text."""
    code = float(sum((at + 1) * ord(c) for at, c in enumerate(str(text))) % 1_000_003)
    floats = [code, 0.1, -2.5e-7]
    return base64.b64encode(struct.pack("<3f", *floats)).decode() if encoding == "base64" else floats


def embed(request: Request) -> list[Step]:
    """Out of order, four tokens a text."""
    asked = request.json()
    texts = asked["input"]
    if isinstance(texts, str) or isinstance(texts[0], int):
        texts = [texts]
    rows = [
        {"object": "embedding", "index": at, "embedding": vector(text, asked.get("encoding_format"))}
        for at, text in enumerate(texts)
    ]
    rows = rows[1::2] + rows[::2]
    usage = {"prompt_tokens": 4 * len(rows), "total_tokens": 4 * len(rows)}
    return [upstream_answers.reply(200, {"object": "list", "data": rows, "model": MODEL, "usage": usage})]


@pytest.fixture(autouse=True)
def _upstream(upstream: ScriptedUpstream) -> None:
    upstream.script = embed


def texts(count: int) -> list[str]:
    return [f"text {next(_numbers)}" for _ in range(count)]


def check(answer: Reply, given: list[Any], encoding: str = "float") -> None:
    assert answer.status == 200, answer.body
    rows = answer.json()["data"]
    assert [(row["index"], row["embedding"]) for row in rows] == [
        (at, vector(text, encoding)) for at, text in enumerate(given)
    ]


async def ask(client: Client, proxy: ProxyProcess, given: Any, **fields: Any) -> Reply:
    return await client.send(proxy, {"model": MODEL, "input": given} | fields, path=PATH)


async def test_only_new_texts_are_sent(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    a, b, c, d = texts(4)
    miss = await ask(client, proxy, [a, b])
    check(miss, [a, b])
    assert (miss.cache, miss.headers["X-Proxy-Cost-USD"]) == ("miss", "0.00000016")
    partial = await ask(client, proxy, [c, b, d, c, a, b])
    check(partial, [c, b, d, c, a, b])
    assert upstream.last.json() == {"model": MODEL, "input": [c, d]}
    assert partial.json()["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    result = {name: partial.headers[name] for name in partial.headers if name.startswith("X-Proxy-")}
    assert result["X-Proxy-Cache"] == "partial"
    assert result["X-Proxy-Cache-Reason"] == "2 of 4 new"
    assert result["X-Proxy-Attempts"] == "1"
    assert result["X-Proxy-Total-Tokens"] == result["X-Proxy-Saved-Tokens"] == "8"
    assert result["X-Proxy-Cost-USD"] == result["X-Proxy-Cost-Saved-USD"] == "0.00000016"
    assert result["X-Proxy-Cost-Status"] == "estimated"
    assert partial.headers["Cache-Status"] == "openai-proxy; fwd=partial; stored"
    assert "Age" not in partial.headers
    assert partial.headers["Content-Type"] == "application/json"
    receipt = await client.receipt(proxy, result["X-Proxy-Request-Id"])
    assert (receipt["cache"], receipt["cost_usd"], receipt["saved_usd"]) == ("partial", "0.00000016", "0.00000016")
    hit = await ask(client, proxy, [d, c, b, a])
    check(hit, [d, c, b, a])
    assert (hit.cache, upstream.count, hit.headers["X-Proxy-Attempts"]) == ("hit", 2, "0")
    assert (hit.headers["X-Proxy-Cost-USD"], hit.headers["X-Proxy-Cost-Saved-USD"]) == ("0.000000", "0.00000032")
    assert hit.headers["X-Proxy-Cost-Status"] == "estimated"
    assert 0 <= int(hit.headers["Age"]) <= 10
    assert hit.headers["Cache-Status"].startswith("openai-proxy; hit; ttl=6047")
    assert hit.json()["usage"] == {"prompt_tokens": 16, "total_tokens": 16}
    again = await ask(client, proxy, [d, c, b, a])
    assert again.body == hit.body
    metrics = await client.get(proxy, "/metrics")
    assert b'cache="partial",endpoint="embeddings"' in metrics.body
    assert upstream.complaints == []


async def test_a_coalesced_partial_response_saves_its_whole_cost(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    a, b = texts(2)
    await ask(client, proxy, [a])
    gate = upstream.gate()
    upstream.script = lambda request: [hold(gate), *embed(request)]
    asking = [asyncio.create_task(ask(client, proxy, [a, b])) for _ in range(4)]
    await upstream.until(lambda: upstream.count == 2)
    await asyncio.sleep(0.2)
    gate.open()
    answers = await asyncio.gather(*asking)
    assert sorted(str(answer.cache) for answer in answers) == ["coalesced"] * 3 + ["partial"]
    assert len({answer.body for answer in answers}) == 1
    assert upstream.count == 2
    for answer in answers:
        saved = "0.00000008" if answer.cache == "partial" else "0.00000016"
        assert answer.headers["X-Proxy-Cost-Saved-USD"] == saved
        assert answer.headers["X-Proxy-Saved-Tokens"] == "4"
        receipt = await client.receipt(proxy, answer.headers["X-Proxy-Request-Id"])
        assert receipt["saved_usd"] == saved


async def test_every_mix_of_forms(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    a, b = texts(2)
    number = next(_numbers)
    for given in ([a, b], [a], a, [b, a], [[number, 2], [number]], [number], [[number]], [[number], [number, 2]]):
        items = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        for encoding in ("float", "base64"):
            answer = await ask(client, proxy, given, encoding_format=encoding)
            check(answer, items, encoding)
            assert (await ask(client, proxy, given, encoding_format=encoding)).body == answer.body
    assert upstream.count == 4


async def test_a_batch_beyond_the_limits(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    given = texts(3000)
    answer = await ask(client, proxy, given)
    check(answer, given)
    assert [len(request.json()["input"]) for request in upstream.requests] == [2048, 952]
    assert answer.headers["X-Proxy-Attempts"] == "2"
    assert answer.json()["usage"]["total_tokens"] == 12_000
    again = await ask(client, proxy, given)
    assert (again.cache, again.body == answer.body, upstream.count) == ("hit", True, 2)


@pytest.mark.parametrize("backend", ["sqlite", "redis"])
async def test_items_outlive_the_process(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path, backend: str
) -> None:
    with contextlib.ExitStack() as stack:
        if backend == "redis":
            url = stack.enter_context(valkey()).url
            config = settings(upstream.port, cache={"backend": "redis"}, redis={"url": url})
        else:
            config = settings(upstream.port, cache={"backend": "sqlite", "path": str(tmp_path / "c.db")})
        given = texts(2048)
        first = launch(config)
        await ask(client, first, given)
        first.terminate()
        assert first.wait() == 0
        subset = given[::16]
        answer = await ask(client, launch(config), [*subset, "new"])
        check(answer, [*subset, "new"])
        assert answer.cache == "partial"
        assert upstream.last.json()["input"] == ["new"]


async def test_concurrent_batches_get_their_own_vectors(proxy: ProxyProcess, client: Client) -> None:
    names = texts(20)
    batches = [[names[(at * 7 + step * 3) % 20] for step in range(1 + at % 9)] for at in range(60)]
    answers = await asyncio.gather(*(ask(client, proxy, batch) for batch in batches))
    for batch, answer in zip(batches, answers, strict=True):
        check(answer, batch)


async def test_a_large_batch_does_not_block_other_requests(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    """Parsing a large body does not block the event loop."""
    row = "[" + ", ".join(f"{0.001 * n:.9f}" for n in range(1536)) + "]"
    given = texts(2048)
    rows = ",".join(f'{{"object":"embedding","index":{at},"embedding":{row}}}' for at in range(2048))
    body = f'{{"object":"list","data":[{rows}],"model":"m","usage":{{"prompt_tokens":9,"total_tokens":9}}}}'.encode()
    upstream.always(upstream_answers.reply(200, body))
    waits: list[float] = []
    began = time.monotonic()
    asked = asyncio.create_task(ask(client, proxy, given))
    while not asked.done():
        waits.append((await client.get(proxy, "/healthz")).seconds)
        await asyncio.sleep(0.005)
    seconds = time.monotonic() - began
    assert (await asked).body == body
    assert (await ask(client, proxy, given[:3])).cache == "hit"
    assert max(waits) < max(1.0, seconds / 2), "here and now it is some 50 ms"
