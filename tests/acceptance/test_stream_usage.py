"""Usage and cost of streams: asked for if the client did not, and removed again (docs/costs-and-budgets.md)."""

from __future__ import annotations

import json

import pytest

from tests import upstream_answers
from tests.client import Client, ask
from tests.launch import Launch, ProxyProcess, settings
from tests.scripted_upstream import ScriptedUpstream


def wants_usage() -> dict[str, object]:
    return ask(stream=True, stream_options={"include_usage": True})


async def test_usage_is_injected_in_place_and_its_chunk_taken_out(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    body = b'{"stream" : true, "model":"gpt-4o", "messages":[{"role":"user","content":"inj\\u00e9ct 1.0"}]}'
    answer = await client.send(proxy, body)
    sent = upstream.last
    assert sent.json() == json.loads(body) | {"stream_options": {"include_usage": True}}
    # "Then only that field changes, in place": the rest of the bytes are the client's.
    assert _inserted_once(body, sent.body), sent.body
    assert b'"usage":{' not in answer.body
    assert answer.body.endswith(upstream_answers.DONE)
    expected = upstream_answers.chat_events(["echo", ": injéct 1.0"], include_usage=True)
    assert answer.body == b"".join(expected[:-2] + expected[-1:])


def _inserted_once(before: bytes, after: bytes) -> bool:
    """Whether `after` is `before` with one run of bytes inserted."""
    at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
    return after.endswith(before[at:])


async def test_a_stream_that_asked_for_usage_is_untouched(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    body = json.dumps(wants_usage()).encode()
    answer = await client.send(proxy, body)
    assert upstream.last.body == body
    assert b'"usage":{' in answer.body


@pytest.mark.parametrize("options", [{"include_usage": False}, {"include_usage": None}, None])
async def test_an_explicit_answer_about_usage_is_obeyed(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, options: object
) -> None:
    """Only `false` is promised; for null, the client must see no usage chunk."""
    body = json.dumps(ask(stream=True, stream_options=options)).encode()
    answer = await client.send(proxy, body)
    if options == {"include_usage": False}:
        assert upstream.last.body == body
    assert b'"usage":{' not in answer.body


async def test_other_stream_options_do_not_prevent_the_injection(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    await client.send(proxy, ask(stream=True, stream_options={"include_obfuscation": False}))
    sent = upstream.last.json()["stream_options"]
    assert sent == {"include_obfuscation": False, "include_usage": True}


async def test_injection_can_be_switched_off(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port, cost={"stream_usage": "off"}))
    body = json.dumps(ask(stream=True)).encode()
    assert (await client.send(proxy, body)).status == 200
    assert upstream.last.body == body


async def test_usage_on_a_chunk_with_choices_is_not_removed(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    last = upstream_answers.event(upstream_answers.chunk({}, "stop", usage=upstream_answers.usage(100, 200)))
    events = [*upstream_answers.chat_events()[:2], last, upstream_answers.DONE]
    upstream.always(*upstream_answers.stream(events))
    answer = await client.send(proxy, ask(stream=True))
    assert answer.body == b"".join(events)
    receipt = await client.receipt(proxy, answer.headers["X-Proxy-Request-Id"])
    assert receipt["cost_usd"] == "0.002250"


async def test_azure_shaped_chunks_pass(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    filters = upstream_answers.chunk(None, prompt_filter_results=[{"prompt_index": 0}]) | {"id": "", "model": ""}
    events = [upstream_answers.event(filters), *upstream_answers.chat_events(include_usage=True)]
    upstream.always(*upstream_answers.stream(events))
    answer = await client.send(proxy, ask(stream=True))
    assert answer.body == b"".join(events[:-2] + events[-1:])


# Cost of streams.


@pytest.mark.parametrize("asked", [True, False])
async def test_a_receipt_has_the_cost_of_a_stream(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, asked: bool
) -> None:
    answer = await client.send(proxy, wants_usage() if asked else ask(stream=True))
    assert answer.headers["X-Proxy-Cost-Status"] == "pending"
    assert "X-Proxy-Cost-USD" not in answer.headers
    receipt = await client.receipt(proxy, answer.headers["X-Proxy-Request-Id"])
    assert receipt["cost_usd"] == "0.002250"
    assert (receipt["prompt_tokens"], receipt["completion_tokens"]) == (100, 200)
    assert receipt["cost_status"] == "exact"


@pytest.mark.parametrize("asked", [True, False])
async def test_the_cost_comment_comes_before_done_and_only_if_asked_for(
    proxy: ProxyProcess, client: Client, asked: bool
) -> None:
    question = wants_usage() if asked else ask(stream=True)
    plain = await client.send(proxy, question, {"Cache-Control": "no-store"})
    assert b"x-proxy-cost-usd" not in plain.body
    headers = {"Cache-Control": "no-store", "X-Proxy-Stream-Cost": "comment"}
    answer = await client.send(proxy, question, headers)
    comment = b": x-proxy-cost-usd=0.002250 x-proxy-prompt-tokens=100 x-proxy-completion-tokens=200\n"
    assert answer.body.endswith(comment + upstream_answers.DONE)
    assert answer.body.replace(comment, b"") == plain.body


async def test_streams_carry_headers_against_buffering(proxy: ProxyProcess, client: Client) -> None:
    answer = await client.send(proxy, ask(stream=True))
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert "Content-Length" not in answer.headers
