"""What no client or upstream should send, and some do: passed on or refused, never a crash, never a changed byte."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests import upstream_answers
from tests.client import Client, ask, raw, raw_request, status_of
from tests.launch import Launch, ProxyProcess, settings
from tests.scripted_upstream import ScriptedUpstream, cut, send

# Requests.

ODD_FIELDS: list[dict[str, Any]] = [
    {"model": 7},
    {"model": None},
    {"model": ["gpt-4o"]},
    {"model": "x" * 10_000},
    {"stream": "yes"},
    {"stream": 1},
    {"max_tokens": "many"},
    {"max_tokens": -5},
    {"max_tokens": 1e308},
    {"max_completion_tokens": True},
    {"n": "x"},
    {"n": -1},
    {"messages": "text"},
    {"messages": None},
    {"messages": [1, None, []]},
    {"messages": [{"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": 5}, 7]}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5, "detail": []}}]}]},
    {"stream": True, "stream_options": 5},
    {"stream": True, "stream_options": []},
    {"tools": "x"},
    {"tools": [None, {"type": 5}]},
    {"user": {}},
    {"modalities": 5, "temperature": "hot", "seed": [], "store": "x"},
]


@pytest.mark.parametrize("limits", [False, True], ids=["plain", "with limits"])
async def test_unusual_types_are_sent_upstream(
    launch: Launch, upstream: ScriptedUpstream, client: Client, limits: bool
) -> None:
    throttle = {"limits": {"*": {"tpm": 10_000_000, "rpm": 1000}}} if limits else {}
    proxy = launch(settings(upstream.port, throttle=throttle))
    upstream.always(upstream_answers.error(400, "No.", "bad"))
    for fields in ODD_FIELDS:
        before, body = upstream.count, json.dumps(ask(**fields)).encode()
        answer = await client.send(proxy, body)
        if answer.error == "request_exceeds_limit" and limits:
            continue  # 1e308 tokens are
        assert (answer.status, answer.error, upstream.count) == (400, None, before + 1), fields
        sent = upstream.last.json()
        if isinstance(fields.get("stream_options", {}), dict):
            assert {k: v for k, v in sent.items() if k != "stream_options"} == json.loads(body)


@pytest.mark.parametrize("given", [5, None, {}, [], [None], [[1, 2], [3]], [1, "a"], ""], ids=str)
async def test_unusual_embedding_inputs(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, given: object
) -> None:
    upstream.always(upstream_answers.error(400, "No.", "bad"))
    body = {"model": "text-embedding-3-small", "input": given}
    answer = await client.send(proxy, body, path="/v1/embeddings")
    assert (answer.status, answer.error, upstream.last.json()) == (400, None, body)


SAY = b'"messages":[{"role":"user","content":"odd"}]'
ODD_JSON = {
    "100,000 brackets": b'{"model":"gpt-4o",' + SAY + b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "5,000 digits": b'{"model":"gpt-4o",' + SAY + b',"seed":' + b"1" * 5000 + b"}",
    "1e999": b'{"model":"gpt-4o",' + SAY + b',"temperature":1e999}',
    "a lone surrogate": b'{"model":"gpt-4o","messages":[{"role":"user","content":"\\ud800"}]}',
    "a NUL": b'{"model":"gpt-4o","messages":[{"role":"user","content":"\\u0000"}]}',
    "an empty name": b'{"model":"gpt-4o",' + SAY + b',"":1}',
}


@pytest.mark.parametrize("body", ODD_JSON.values(), ids=ODD_JSON.keys())
async def test_unusual_json_is_passed_unchanged(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, body: bytes
) -> None:
    upstream.always(upstream_answers.chat())
    for _ in range(2):
        answer = await client.send(proxy, body)
        assert answer.status == 200
        assert answer.cache in ("miss", "hit", "bypass")
    assert upstream.requests[0].body == body


async def test_a_model_cannot_forge_log_lines(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    upstream.always(upstream_answers.chat())
    answer = await client.send(proxy, ask(model="x\n12:00:00 info FORGED\r\n\x1b[31mred"))
    assert answer.status == 200
    log = proxy.stderr_so_far()
    assert not any(line.startswith("12:00:00 info FORGED") for line in log.splitlines())
    assert "\x1b[31m" not in log


async def test_a_chunked_json_body_is_read(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    body = json.dumps(ask()).encode()

    async def pieces() -> AsyncIterator[bytes]:
        yield body[:10]
        yield body[10:]

    answers = [await client.send(proxy, piece) for piece in (pieces(), body)]
    assert [a.cache for a in answers] == ["miss", "hit"]
    assert upstream.last.body == body


async def test_expect_100_continue(proxy: ProxyProcess) -> None:
    body = json.dumps(ask()).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    head = {"Content-Type": "application/json", "Expect": "100-continue", "Content-Length": str(len(body))}
    writer.write(raw_request("POST", "/v1/chat/completions", head))
    assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 100")
    await reader.readline()
    writer.write(body)
    assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_pipelined_requests_are_answered_in_order(proxy: ProxyProcess) -> None:
    models, health = raw_request("GET", "/v1/models"), raw_request("GET", "/healthz")
    answer = await raw(proxy, models + health + models)
    assert answer.count(b"HTTP/1.1 200") == 3
    assert status_of(answer) == 200


async def test_a_head_request(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    upstream.always(send(upstream_answers.head(200, [("Content-Type", "application/json"), ("Content-Length", "57")])))
    answer = await client.send(proxy, None, {}, "/v1/models", "HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert (upstream.last.method, upstream.last.target) == ("HEAD", "/v1/models")


# Answers.


async def test_an_answer_without_a_body(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    upstream.always(send(upstream_answers.head(204, [("x-request-id", "req_204")])))
    answer = await client.send(proxy, None, {}, "/v1/files/f-1", "DELETE")
    assert (answer.status, answer.body, answer.headers["x-request-id"]) == (204, b"", "req_204")
    assert (await client.get(proxy, "/healthz")).status == 200


@pytest.mark.parametrize(
    "interim", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"]
)
async def test_interim_answers_are_skipped(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, interim: bytes
) -> None:
    upstream.always(send(interim + upstream_answers.response(200, upstream_answers.completion())))
    answer = await client.send(proxy, ask())
    assert (answer.status, answer.json()["object"]) == (200, "chat.completion")


async def test_repeated_headers_stay_apart(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    body = upstream_answers.dump(upstream_answers.completion())
    fields = [
        ("X-Twice", "a"),
        ("X-Twice", "b"),
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(body))),
    ]
    upstream.always(send(upstream_answers.head(200, fields) + body))
    assert (await client.send(proxy, ask())).headers.getall("X-Twice") == ["a", "b"]


async def test_an_upstream_cannot_speak_for_the_proxy(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    """X-Proxy-Error stands "only on answers made by the proxy itself"; each of ours is there once."""
    forged = {"X-Proxy-Error": "throttled", "X-Proxy-Cost-USD": "999", "X-Proxy-Cache": "hit", "Age": "77"}
    upstream.always(upstream_answers.reply(200, upstream_answers.completion(), forged))
    answer = await client.send(proxy, ask())
    assert "X-Proxy-Error" not in answer.headers
    assert answer.headers.getall("X-Proxy-Cost-USD") == ["0.002250"]
    assert answer.headers.getall("X-Proxy-Cache") == ["miss"]


async def test_an_early_refusal_of_an_upload_is_passed(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    upstream.on_head = lambda _: [upstream_answers.error(413, "Too much.", "too_large"), cut()]
    try:
        answer = await client.send(proxy, b"x" * 3_000_000, {"Content-Type": "text/csv"}, "/v1/files")
    except OSError:
        pytest.skip("the reset overtook the answer")
    assert answer.status in (413, 502)  # 502 where the reset came before the answer could be read


ODD_ANSWERS: list[dict[str, Any]] = [
    {"choices": "x"},
    {"choices": [None]},
    {"choices": {"a": 1}},
    {"choices": [{"index": "x", "finish_reason": 5, "message": []}]},
    {"model": 5, "usage": {"prompt_tokens": "many"}},
    {"model": ["x"], "service_tier": {}},
    {"usage": {"prompt_tokens": 1.5, "completion_tokens": True}},
]


@pytest.mark.parametrize("fields", ODD_ANSWERS, ids=str)
async def test_unusual_responses_are_passed(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, fields: dict[str, Any]
) -> None:
    body = upstream_answers.dump(upstream_answers.completion() | fields)
    upstream.always(upstream_answers.reply(200, body))
    answer = await client.send(proxy, ask())
    assert (answer.status, answer.body) == (200, body)


ODD_EVENTS = [
    b"data: null\n\n",
    b"data: [1]\n\n",
    b'data: {"choices": 5}\n\n',
    b'data: {"choices":[{"delta":null}]}\n\n',
    b'data: {"choices":[],"usage":5}\n\n',
    b'data: {"choices":[],"usage":{}}\n\n',
    b'data: {"choices":[],"usage":null}\n\n',
    b"data: {broken\n\n",
    b"data:\n\n",
    b"\n\n\n\n",
    b"event: x\nid: 7\nretry: 5\nnonsense\n\n",
    b": comment\n\n",
    b"\xff\xfe\x00\n\n",
    b'data: {"choices":\ndata: []}\n\n',
]


async def test_unusual_events_are_passed(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    events = upstream_answers.chat_events()
    for odd in ODD_EVENTS:
        whole = [events[0], odd, *events[1:]]
        upstream.always(*upstream_answers.stream(whole))
        answer = await client.send(proxy, ask(stream=True))
        if b'"usage":{}' in odd:
            continue  # it may be taken for the usage chunk the proxy asked for
        assert answer.body == b"".join(whole), odd


async def test_a_compressed_stream(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    whole = b"".join(upstream_answers.chat_events(include_usage=True))
    head = upstream_answers.stream_head({"Content-Encoding": "gzip"})
    upstream.always(send(head + upstream_answers.chunked(gzip.compress(whole)) + upstream_answers.LAST_CHUNK))
    question = ask(stream=True, stream_options={"include_usage": True})
    for headers in ({}, {"Accept-Encoding": "gzip"}):
        answer = await client.send(proxy, question, headers)
        squeezed = answer.headers.get("Content-Encoding") == "gzip"
        assert (gzip.decompress(answer.body) if squeezed else answer.body) == whole
        assert headers or not squeezed


async def test_an_answer_that_swells_is_502(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    """Beyond 8 MiB and 100 times its size."""
    swelling = gzip.compress(upstream_answers.dump(upstream_answers.completion("0" * 20_000_000)))
    upstream.always(upstream_answers.reply(200, swelling, {"Content-Encoding": "gzip"}))
    answer = await client.send(proxy, ask())
    assert (answer.status, answer.error) == (502, "upstream_invalid_response")


async def test_a_large_but_honest_compressed_answer_passes(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    words = " ".join(str(n * 7919 % 1_000_003) for n in range(1_500_000))
    body = upstream_answers.completion(words)
    upstream.always(upstream_answers.gzipped(body))
    answer = await client.send(proxy, ask())
    assert answer.status == 200
    assert answer.json() == body


async def test_the_memory_cache_is_bounded(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port, cache={"memory_size": "200KiB", "max_entry": "100KiB"}))
    upstream.always(upstream_answers.chat("x" * 20_000))
    questions = [ask() for _ in range(30)]
    for question in questions:
        await client.send(proxy, question)
    assert (await client.send(proxy, questions[-1])).cache == "hit"
    assert (await client.send(proxy, questions[0])).cache == "miss"  # the least recently used left
    kept = sum([(await client.send(proxy, q, {"Cache-Control": "only-if-cached"})).status == 200 for q in questions])
    assert 1 <= kept <= 10
