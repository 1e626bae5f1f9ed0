"""What is never read from the cache, and what is never stored in it (docs/caching.md)."""

from __future__ import annotations

from typing import Any

import pytest

from tests import upstream_answers
from tests.client import Client, ask
from tests.launch import ProxyProcess
from tests.scripted_upstream import ScriptedUpstream

AUDIO = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}
CHAT_BYPASS = [{"store": True}, {"web_search_options": {}}, AUDIO]
RESPONSES_BYPASS: list[dict[str, Any]] = [
    {"background": True},
    {"conversation": "conv_1"},
    *({"tools": [{"type": kind}]} for kind in ("web_search", "web_search_preview", "file_search")),
    *({"tools": [{"type": kind}]} for kind in ("code_interpreter", "mcp", "image_generation")),
    {"tools": [{"type": "computer_use_preview"}]},
]


@pytest.mark.parametrize("fields", CHAT_BYPASS, ids=lambda f: next(iter(f)))
async def test_uncacheable_chats_bypass(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, fields: dict[str, object]
) -> None:
    question = ask(**fields)
    for _ in range(2):
        answer = await client.send(proxy, question)
        assert (answer.status, answer.cache) == (200, "bypass")
        assert answer.headers["X-Proxy-Cache-Reason"].startswith("uncacheable")
        assert answer.headers["Cache-Status"].startswith("openai-proxy; fwd=bypass")
    assert upstream.count == 2


async def test_the_reason_names_the_field(proxy: ProxyProcess, client: Client) -> None:
    answer = await client.send(proxy, ask(store=True))
    assert answer.headers["X-Proxy-Cache-Reason"] == "uncacheable: store=true"


@pytest.mark.parametrize("fields", RESPONSES_BYPASS, ids=str)
async def test_uncacheable_responses_bypass(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, fields: dict[str, object]
) -> None:
    question = {"model": "gpt-4o", "input": "uncacheable"} | fields
    for _ in range(2):
        answer = await client.send(proxy, question, path="/v1/responses")
        assert (answer.status, answer.cache) == (200, "bypass")
    assert upstream.count == 2


DEEP = b'{"model":"gpt-4o","messages":[{"role":"user","content":"deep"}],"x":' + b"[" * 70 + b"]" * 70 + b"}"
TWICE = b'{"model":"gpt-4o","messages":[{"role":"user","content":"twice"}],"n":1,"n":1}'
NAN = b'{"model":"gpt-4o","messages":[{"role":"user","content":"nan"}],"temperature":NaN}'


@pytest.mark.parametrize("body", [DEEP, TWICE, NAN], ids=["deep", "duplicate keys", "NaN"])
async def test_bodies_without_one_meaning_are_passed_and_not_cached(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, body: bytes
) -> None:
    for _ in range(2):
        answer = await client.send(proxy, body)
        assert (answer.status, answer.cache) == (200, "bypass")
    assert [request.body for request in upstream.requests] == [body, body]


CHOICE = upstream_answers.completion()["choices"][0]
INCOMPLETE = {
    "error in a 200": upstream_answers.completion(error={"message": "no", "type": "x", "param": None, "code": None}),
    "no finish_reason": upstream_answers.completion(finish_reason=None),
    "length without a limit": upstream_answers.completion(finish_reason="length"),
    "content filter": upstream_answers.completion(finish_reason="content_filter"),
    "no choices": upstream_answers.completion(choices=[]),
    "one of two unfinished": upstream_answers.completion(
        choices=[CHOICE, CHOICE | {"index": 1, "finish_reason": None}]
    ),
}


@pytest.mark.parametrize("body", INCOMPLETE.values(), ids=INCOMPLETE.keys())
async def test_incomplete_answers_are_passed_and_not_stored(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, body: dict[str, object]
) -> None:
    raw = upstream_answers.dump(body)
    upstream.always(upstream_answers.reply(200, raw))
    question = ask()
    for _ in range(2):
        answer = await client.send(proxy, question)
        assert (answer.status, answer.body, answer.cache) == (200, raw, "miss")
        assert "stored" not in answer.headers["Cache-Status"]
    assert upstream.count == 2


async def test_length_is_stored_if_the_request_set_a_limit(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    upstream.always(upstream_answers.chat(finish_reason="length"))
    for limit in ("max_tokens", "max_completion_tokens"):
        question = ask(**{limit: 5})
        assert [(await client.send(proxy, question)).cache for _ in range(2)] == ["miss", "hit"]


@pytest.mark.parametrize("status", [400, 422, 500, 503])
async def test_errors_are_not_stored(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, status: int
) -> None:
    question = ask()
    upstream.queue("/v1/chat/completions", upstream_answers.error(status, "no", None))
    first = await client.send(proxy, question, {"X-Proxy-Max-Retries": "0"})
    assert first.status == status
    second = await client.send(proxy, question)
    assert (second.status, second.cache) == (200, "miss")


@pytest.mark.parametrize("body", [b'{"id": "x", "choi', b"", b"<html>login</html>", b"null", b"[]"])
async def test_incomplete_or_empty_responses_are_not_stored(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, body: bytes
) -> None:
    """A "cut or broken body" is a 502; whether that means a broken one of the right length is left open."""
    upstream.always(upstream_answers.reply(200, body))
    question = ask()
    for _ in range(2):
        answer = await client.send(proxy, question, {"X-Proxy-Max-Retries": "0"})
        assert (answer.status, answer.body) == (200, body) or answer.error == "upstream_invalid_response"
    assert upstream.count == 2


BROKEN_STREAMS = {
    "no [DONE]": upstream_answers.chat_events()[:-1],
    "no finish_reason": [*upstream_answers.chat_events()[:-2], upstream_answers.DONE],
    "length": upstream_answers.chat_events(finish="length"),
    "nothing but [DONE]": [upstream_answers.DONE],
    "unfinished second choice": [
        upstream_answers.event(
            upstream_answers.chunk({"content": "x"}) | {"choices": [{"index": 1, "delta": {"content": "y"}}]}
        ),
        *upstream_answers.chat_events(),
    ],
}


@pytest.mark.parametrize("events", BROKEN_STREAMS.values(), ids=BROKEN_STREAMS.keys())
async def test_incomplete_streams_are_not_stored(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, events: list[bytes]
) -> None:
    upstream.always(*upstream_answers.stream(events))
    question = ask(stream=True)
    for _ in range(2):
        async with client.open(proxy, question, {"X-Proxy-Max-Retries": "0"}) as answer:
            assert answer.headers["X-Proxy-Cache"] == "miss"
            try:
                await answer.read()
            except Exception:  # how such an end is shown is not this test's affair
                pass
    assert upstream.count == 2
