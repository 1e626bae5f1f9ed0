"""The simulated OpenAI API, with OpenAI's SDK and with a client that reads bytes."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import math
import struct
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest
from openai.types import ModerationTextInputParam
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel

from proxy.simulator.answers import BadRequest, count_tokens, example, inputs_of, vector
from proxy.simulator.server import SPECIAL_PROMPTS, running_simulator

pytestmark = pytest.mark.slow

KEY = {"Authorization": "Bearer sk-any"}
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 3}},
            "required": ["city", "days"],
        },
    },
}


@pytest.fixture
async def base_url() -> AsyncIterator[str]:
    async with running_simulator() as url:
        yield url


@pytest.fixture
async def sdk(base_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="sk-any", max_retries=0) as client:
        yield client


@pytest.fixture
async def http(base_url: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(base_url.removesuffix("v1"), headers=KEY) as session:
        yield session


def say(text: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


async def events_of(http: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> list[Any]:
    """Return the JSON of every event; the stream must end as OpenAI's do."""
    async with http.post(path, json=body | {"stream": True}) as answer:
        assert answer.status == 200
        assert answer.content_type == "text/event-stream"
        assert answer.headers["x-request-id"].startswith("req_")
        text = (await answer.read()).decode()
    *events, end = text.split("\n\n")
    assert end == ""
    return [
        data if data == "[DONE]" else json.loads(data) for event in events for data in [event.partition("data: ")[2]]
    ]


async def test_plain_chat_is_deterministic_and_has_openais_fields_and_headers(
    sdk: openai.AsyncOpenAI,
) -> None:
    raw = await sdk.chat.completions.with_raw_response.create(model="gpt-4o", messages=say("Hello"))
    again = await sdk.chat.completions.create(model="gpt-4o", messages=say("Hello"))
    answer = raw.parse()
    assert answer.choices[0].message.content == again.choices[0].message.content
    assert "Hello" in (answer.choices[0].message.content or "")
    assert answer.id.startswith("chatcmpl-")
    assert answer.id != again.id
    assert answer.model == "gpt-4o-2024-08-06"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    for name in ("x-request-id", "openai-processing-ms", "x-ratelimit-remaining-requests", "openai-version"):
        assert raw.headers[name]


async def test_several_choices_content_parts_and_max_tokens(sdk: openai.AsyncOpenAI) -> None:
    parts: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "in parts"}]},
    ]
    two = await sdk.chat.completions.create(model="gpt-4o-mini", messages=parts, n=2)
    assert [c.index for c in two.choices] == [0, 1]
    assert two.choices[0].message.content != two.choices[1].message.content
    assert "in parts" in (two.choices[0].message.content or "")
    short = await sdk.chat.completions.create(model="gpt-4o", messages=say("Hello"), max_tokens=3)
    assert short.choices[0].finish_reason == "length"
    assert short.usage is not None
    assert short.usage.completion_tokens == 3


@pytest.mark.parametrize("with_usage", [True, False])
async def test_streamed_chat(http: aiohttp.ClientSession, with_usage: bool) -> None:
    body: dict[str, Any] = {"model": "gpt-4o", "messages": say("Hello"), "n": 2}
    async with http.post("v1/chat/completions", json=body) as answer:
        plain = await answer.json()
    options = {"stream_options": {"include_usage": True}} if with_usage else {}
    *chunks, done = await events_of(http, "v1/chat/completions", body | options)
    assert done == "[DONE]"
    assert len({(c["id"], c["created"], c["model"]) for c in chunks}) == 1
    if with_usage:
        last = chunks.pop()
        assert last["choices"] == []
        assert last["usage"] == plain["usage"]
        assert all(c["usage"] is None for c in chunks)
    else:
        assert not any("usage" in c for c in chunks)
    for index, choice in enumerate(plain["choices"]):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["stop"]


async def test_tools_are_called_once(sdk: openai.AsyncOpenAI) -> None:
    asked = say("use tool, please")
    answer = await sdk.chat.completions.create(model="gpt-4o", messages=asked, tools=[WEATHER])
    assert answer.choices[0].finish_reason == "tool_calls"
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].type == "function"
    assert calls[0].function.name == "weather"
    assert json.loads(calls[0].function.arguments) == {"city": "simulated", "days": 3}
    result: list[ChatCompletionMessageParam] = [
        *asked,
        {
            "role": "assistant",
            "tool_calls": [{"id": calls[0].id, "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": calls[0].id, "content": "sunny"},
    ]
    final = await sdk.chat.completions.create(model="gpt-4o", messages=result, tools=[WEATHER])
    assert final.choices[0].finish_reason == "stop"


async def test_tool_choice_decides(sdk: openai.AsyncOpenAI) -> None:
    async def reason(text: str, choice: Any) -> str:
        answer = await sdk.chat.completions.create(
            model="gpt-4o", messages=say(text), tools=[WEATHER], tool_choice=choice
        )
        return answer.choices[0].finish_reason

    assert await reason("Hello", "auto") == "stop"
    assert await reason("use tool", "none") == "stop"
    assert await reason("Hello", "required") == "tool_calls"
    assert await reason("Hello", {"type": "function", "function": {"name": "weather"}}) == "tool_calls"
    assert await reason("Hello", {"type": "function", "function": {"name": "other"}}) == "stop"


async def test_streamed_tool_call(sdk: openai.AsyncOpenAI) -> None:
    async with sdk.chat.completions.stream(model="gpt-4o", messages=say("use tool"), tools=[WEATHER]) as stream:
        final = await stream.get_final_completion()
    calls = final.choices[0].message.tool_calls
    assert calls is not None
    assert json.loads(calls[0].function.arguments) == {"city": "simulated", "days": 3}
    assert final.choices[0].finish_reason == "tool_calls"


class Leaf(BaseModel):
    name: str
    weight: float


class Tree(BaseModel):
    leaves: list[Leaf]
    parent: Tree | None
    green: bool


async def test_structured_outputs(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.parse(model="gpt-4o", messages=say("a tree"), response_format=Tree)
    tree = answer.choices[0].message.parsed
    assert isinstance(tree, Tree)
    assert tree.leaves[0].name == "simulated"
    loose = await sdk.chat.completions.create(
        model="gpt-4o", messages=say("json"), response_format={"type": "json_object"}
    )
    assert json.loads(loose.choices[0].message.content or "")["answer"]


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"const": 7}, 7),
        ({"enum": ["red", "blue"]}, "red"),
        ({"type": ["null", "boolean"]}, True),
        ({"type": "null"}, None),
        ({"type": "string", "minLength": 12}, "simulated..."),
        ({"type": "integer", "minimum": 2.5}, 3),
        ({"type": "integer", "minimum": "broken"}, 1),
        ({"type": "number", "minimum": 0}, 0.0),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, [True, True]),
        ({"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"enum": [1]}}}, 1),
        ({"$ref": "#/nowhere/at/all"}, None),
        ({}, None),
        (None, None),
    ],
)
def test_example_fits_the_schema(schema: object, value: object) -> None:
    assert example(schema) == value


async def test_embeddings_are_unit_vectors_in_order_and_the_same_in_both_encodings(
    http: aiohttp.ClientSession,
) -> None:
    body = {"model": "text-embedding-3-small", "input": ["one", "two", "one"], "dimensions": 64}
    async with http.post("v1/embeddings", json=body) as answer:
        floats = await answer.json()
    async with http.post("v1/embeddings", json=body | {"encoding_format": "base64"}) as answer:
        packed = await answer.json()
    assert [d["index"] for d in floats["data"]] == [0, 1, 2]
    one, two, same = (d["embedding"] for d in floats["data"])
    assert one == same != two
    assert len(one) == 64
    assert math.isclose(math.hypot(*one), 1.0, rel_tol=1e-6)
    for number, text in zip(floats["data"], packed["data"], strict=True):
        assert list(struct.unpack("<64f", base64.b64decode(text["embedding"]))) == number["embedding"]
    assert floats["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


async def test_the_sdk_reads_the_vectors(sdk: openai.AsyncOpenAI) -> None:
    small = await sdk.embeddings.create(model="text-embedding-3-small", input="x")
    large = await sdk.embeddings.create(model="text-embedding-3-large", input=[[1, 2], [3]])
    assert len(small.data[0].embedding) == 1536
    assert [len(d.embedding) for d in large.data] == [3072, 3072]


def test_a_short_vector_is_the_beginning_of_the_long_one_rescaled() -> None:
    long, short = vector("m", "x", 100), vector("m", "x", 10)
    scale = long[0] / short[0]
    assert all(math.isclose(a, b * scale, rel_tol=1e-4) for a, b in zip(long, short, strict=False))


@pytest.mark.parametrize("value", [None, [], [[]], ["a", 1], {"a": 1}, [["a"]]])
def test_inputs_of_other_forms_are_refused(value: object) -> None:
    with pytest.raises(BadRequest, match="input"):
        inputs_of(value)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("chat/completions", {"model": "gpt-4o"}, 400, "messages"),
        ("chat/completions", {"model": "gpt-4o", "messages": ["x"]}, 400, "messages"),
        ("chat/completions", {"messages": []}, 400, None),
        ("chat/completions", {"model": "claude", "messages": []}, 404, "model"),
        ("chat/completions", [], 400, None),
        (
            "embeddings",
            {"model": "text-embedding-3-small", "input": "x", "dimensions": 9999},
            400,
            "dimensions",
        ),
        ("embeddings", {"model": "text-embedding-3-small", "input": ["x"] * 2049}, 400, "input"),
        ("responses", {"model": "gpt-4o"}, 400, "input"),
        ("nothing/here", {"model": "gpt-4o"}, 404, None),
        ("models", {"model": "gpt-4o"}, 404, None),
    ],
)
async def test_errors_have_openais_shape(
    http: aiohttp.ClientSession, path: str, body: object, status: int, param: str | None
) -> None:
    async with http.post(f"v1/{path}", json=body) as answer:
        assert answer.status == status
        error = (await answer.json())["error"]
        assert answer.headers["x-request-id"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


async def test_broken_json_and_a_missing_key(http: aiohttp.ClientSession, base_url: str) -> None:
    async with http.post("v1/chat/completions", data=b"{") as answer:
        assert answer.status == 400
    async with aiohttp.ClientSession() as stranger, stranger.get(f"{base_url}/models") as answer:
        assert answer.status == 401


async def test_models(sdk: openai.AsyncOpenAI) -> None:
    names = [model.id async for model in sdk.models.list()]
    assert "gpt-4o" in names
    assert (await sdk.models.retrieve("gpt-4o")).id == "gpt-4o"
    with pytest.raises(openai.NotFoundError, match="claude"):
        await sdk.models.retrieve("claude")


@pytest.mark.parametrize(
    ("prompt", "status", "type_"), [("provoke 429", 429, "requests"), ("Provoke 500", 500, "server_error")]
)
async def test_provoked_failures_come_at_every_other_attempt(
    http: aiohttp.ClientSession, prompt: str, status: int, type_: str
) -> None:
    for kind, text in itertools.product(("chat/completions", "responses", "completions"), ("a", "b")):
        asked = f"{prompt} {kind} {text}"
        body = {"model": "gpt-4o", "messages": say(asked), "input": asked, "prompt": asked}
        seen = []
        for _ in range(4):
            async with http.post(f"v1/{kind}", json=body) as answer:
                seen.append(answer.status)
                if answer.status != 200:
                    assert (await answer.json())["error"]["type"] == type_
                    assert answer.headers.get("Retry-After") == ("1" if status == 429 else None)
        assert seen == [status, 200, status, 200]


async def test_a_slow_stream_pauses_between_chunks_and_can_be_cancelled(http: aiohttp.ClientSession) -> None:
    body = {"model": "gpt-4o", "messages": say("slow, please"), "stream": True}
    async with http.post("v1/chat/completions", json=body) as answer:
        first, _ = await answer.content.readchunk()
        assert first.startswith(b"data: ")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(answer.content.readchunk(), 0.2)


async def test_completions_plain_and_streamed(http: aiohttp.ClientSession) -> None:
    body = {"model": "gpt-3.5-turbo-instruct", "prompt": ["a", "b"], "max_tokens": 500}
    async with http.post("v1/completions", json=body) as answer:
        plain = await answer.json()
    *chunks, usage, done = await events_of(http, "v1/completions", body | {"stream_options": {"include_usage": True}})
    assert done == "[DONE]"
    assert usage["usage"] == plain["usage"]
    assert plain["id"].startswith("cmpl-")
    for choice in plain["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == "stop"


async def test_moderations(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.moderations.create(input=["fine", "harmful"])
    assert [r.flagged for r in answer.results] == [False, True]
    part: ModerationTextInputParam = {"type": "text", "text": "harm"}
    parts = await sdk.moderations.create(input=[part])
    assert parts.results[0].flagged


async def test_responses_plain_and_streamed(sdk: openai.AsyncOpenAI, http: aiohttp.ClientSession) -> None:
    plain = await sdk.responses.create(model="gpt-4o", input="Hello", metadata={"a": "b"})
    assert plain.status == "completed"
    assert "Hello" in plain.output_text
    assert plain.metadata == {"a": "b"}
    assert plain.usage is not None
    assert plain.usage.total_tokens == plain.usage.input_tokens + plain.usage.output_tokens
    async with sdk.responses.stream(model="gpt-4o", input=[{"role": "user", "content": "Hello"}]) as stream:
        async for _ in stream:
            pass
        assert (await stream.get_final_response()).output_text == plain.output_text
    events = await events_of(http, "v1/responses", {"model": "gpt-4o", "input": "Hello"})
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["status"] == "completed"


async def test_a_response_cut_by_max_tokens_is_incomplete(http: aiohttp.ClientSession) -> None:
    body = {"model": "gpt-4o", "input": "Hello", "max_output_tokens": 2}
    events = await events_of(http, "v1/responses", body)
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_a_port_in_use_is_an_error(base_url: str) -> None:
    port = int(base_url.rsplit(":", 1)[1].removesuffix("/v1"))
    with pytest.raises(OSError, match=str(port)):
        async with running_simulator(port):
            pass


def test_tokens_are_counted_simply() -> None:
    assert count_tokens("Hello, internationalisation!") == 6
    assert count_tokens("") == 0


def test_every_special_prompt_says_what_it_does() -> None:
    assert list(SPECIAL_PROMPTS) == ["provoke 429", "provoke 500", "slow", "use tool"]
