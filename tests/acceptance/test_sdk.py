"""The official SDK, sync and async, through the real process."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

openai = pytest.importorskip("openai")

from pydantic import BaseModel  # noqa: E402

from tests import upstream_answers  # noqa: E402
from tests.launch import Launch, ProxyProcess, secret, settings  # noqa: E402
from tests.ledger import Request  # noqa: E402
from tests.scripted_upstream import Answer, ScriptedUpstream, cut, sleep  # noqa: E402


def messages(text: str) -> Any:
    return [{"role": "user", "content": text}]


def connect(proxy: ProxyProcess, **options: Any) -> Any:
    return openai.OpenAI(base_url=proxy.base_url, api_key="sk-unused", **options)


def test_plain(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    with connect(proxy) as client:
        answer = client.chat.completions.create(model="gpt-4o", messages=messages("sdk plain"))
        assert answer.choices[0].message.content == "echo: sdk plain"
        assert answer.usage.total_tokens == 300
        assert answer._request_id.startswith("req_")
    assert upstream.last.key == secret("k1")


def test_with_raw_response_shows_the_cost(proxy: ProxyProcess) -> None:
    with connect(proxy) as client:
        for cost, cache in (("0.002250", "miss"), ("0.000000", "hit")):
            raw = client.chat.completions.with_raw_response.create(model="gpt-4o", messages=messages("sdk raw"))
            assert raw.headers["x-proxy-cost-usd"] == cost
            assert raw.headers["x-proxy-cache"] == cache
            assert raw.parse().choices[0].message.content == "echo: sdk raw"


@pytest.mark.parametrize("usage", [True, False])
def test_stream(proxy: ProxyProcess, usage: bool) -> None:
    extra: Any = {"stream_options": {"include_usage": True}} if usage else {}
    with connect(proxy) as client:
        for _ in range(2):  # a miss and a hit
            said, seen = "", None
            for chunk in client.chat.completions.create(
                model="gpt-4o", messages=messages(f"sdk stream {usage}"), stream=True, **extra
            ):
                if chunk.choices or not usage:
                    said += chunk.choices[0].delta.content or ""  # nobody gets a chunk they did not ask for
                seen = chunk.usage or seen
            assert said == f"echo: sdk stream {usage}"
            assert (seen is not None) == usage


def test_the_stream_helper(proxy: ProxyProcess) -> None:
    with (
        connect(proxy) as client,
        client.chat.completions.stream(model="gpt-4o", messages=messages("sdk helper")) as stream,
    ):
        assert stream.get_final_completion().choices[0].message.content == "echo: sdk helper"


def test_the_cost_comment_disturbs_no_sdk(proxy: ProxyProcess) -> None:
    headers = {"X-Proxy-Stream-Cost": "comment"}
    with connect(proxy, default_headers=headers) as client:
        chunks = list(client.chat.completions.create(model="gpt-4o", messages=messages("sdk comment"), stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "echo: sdk comment"


CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Köln"}'}}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def test_tools(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls", "logprobs": None}
    upstream.always(upstream_answers.chat(choices=[choice]))
    with connect(proxy) as client:
        for _ in range(2):
            answer = client.chat.completions.create(model="gpt-4o", messages=messages("sdk tools"), tools=TOOLS)
            assert answer.choices[0].message.tool_calls[0].function.arguments == '{"city":"Köln"}'
    assert upstream.count == 1


def test_streamed_tools(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    def delta(**function: str) -> bytes:
        call = {"index": 0, "function": function}
        return upstream_answers.event(upstream_answers.chunk({"tool_calls": [call]}))

    pieces = [delta(name="weather", arguments=""), delta(arguments='{"city"'), delta(arguments=':"Köln"}')]
    upstream.always(*upstream_answers.stream([*pieces, *upstream_answers.chat_events([], finish="tool_calls")[1:]]))
    with connect(proxy) as client:
        for _ in range(2):
            got = ""
            for chunk in client.chat.completions.create(
                model="gpt-4o", messages=messages("sdk tool stream"), tools=TOOLS, stream=True
            ):
                for call in chunk.choices[0].delta.tool_calls or []:
                    got += call.function.arguments or ""
            assert got == '{"city":"Köln"}'
    assert upstream.count == 1


class City(BaseModel):
    name: str
    people: int


def test_parse_is_cached(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    upstream.always(upstream_answers.chat('{"name": "Köln", "people": 1}'))
    with connect(proxy) as client:
        for _ in range(2):
            answer = client.chat.completions.parse(model="gpt-4o", messages=messages("sdk parse"), response_format=City)
            assert answer.choices[0].message.parsed == City(name="Köln", people=1)
    assert upstream.count == 1


def test_embeddings(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    with connect(proxy) as client:
        for options in ({}, {"encoding_format": "float"}):
            for _ in range(2):
                answer = client.embeddings.create(model="text-embedding-3-small", input=["sdk", "embed"], **options)
                assert [item.embedding for item in answer.data] == [[3.0, 0.5, -0.25], [5.0, 0.5, -0.25]]
                assert [item.index for item in answer.data] == [0, 1]
    assert upstream.count == 2


def test_embeddings_of_batches_that_overlap(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    """base64, the SDK's choice, and floats asked for give the same; so do texts and tokens, cached or not."""
    batches: list[Any] = [
        ["overlap", "item", "overlap"],
        "item",
        ["more of it", "item"],
        [[1, 2], [3]],
        [3],
        ["more of it"],
    ]
    with connect(proxy) as client:
        for given in batches:
            items = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
            for options in ({}, {"encoding_format": "float"}):
                answer = client.embeddings.create(model="text-embedding-3-small", input=given, **options)
                assert [row.embedding for row in answer.data] == [[float(len(str(i))), 0.5, -0.25] for i in items]
                assert [row.index for row in answer.data] == list(range(len(items)))
                assert answer.object == "list"
                assert answer.model == "text-embedding-3-small"
    asked = [request.json()["input"] for request in upstream.requests]
    assert asked == [one for one in (["overlap", "item"], ["more of it"], [[1, 2], [3]]) for _ in range(2)]


def test_responses_models_and_moderations(proxy: ProxyProcess) -> None:
    with connect(proxy) as client:
        answer = client.responses.create(model="gpt-4o", input="sdk responses", store=False)
        assert answer.output_text == "echo: sdk responses"
        assert [model.id for model in client.models.list()] == ["gpt-4o"]
        assert client.moderations.create(input="sdk").results[0].flagged is False


def test_files_upload(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    with connect(proxy) as client:
        client.files.create(file=("a.jsonl", b'{"a": 1}\n' * 1000), purpose="batch")
    assert upstream.last.target == "/v1/files"
    assert b'filename="a.jsonl"' in upstream.last.body


async def test_async(proxy: ProxyProcess) -> None:
    async with openai.AsyncOpenAI(base_url=proxy.base_url, api_key="sk-unused") as client:
        answers = await asyncio.gather(
            *(client.chat.completions.create(model="gpt-4o", messages=messages(f"sdk {n}")) for n in range(20))
        )
        assert [a.choices[0].message.content for a in answers] == [f"echo: sdk {n}" for n in range(20)]
        stream = await client.chat.completions.create(model="gpt-4o", messages=messages("sdk async"), stream=True)
        said = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert said == "echo: sdk async"


@pytest.mark.parametrize("kind", ["openai", "azure"])
def test_azure_client(launch: Launch, upstream: ScriptedUpstream, kind: str) -> None:
    config = settings(upstream.port)
    if kind == "azure":
        address = f"http://127.0.0.1:{upstream.port}"
        config["upstreams"][0] |= {"kind": "azure", "base_url": address, "api_version": "2024-10-21"}
    proxy = launch(config)
    with openai.AzureOpenAI(azure_endpoint=proxy.address, api_key="mine", api_version="2024-06-01") as client:
        answer = client.chat.completions.create(model="gpt-4o", messages=messages("sdk azure"))
        assert answer.choices[0].message.content == "echo: sdk azure"
        chunks = list(client.chat.completions.create(model="gpt-4o", messages=messages("sdk azure"), stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "echo: sdk azure"
    if kind == "azure":
        assert upstream.last.target == "/openai/deployments/gpt-4o/chat/completions?api-version=2024-06-01"
        assert upstream.last.header("api-key") == secret("k1")
    else:
        assert upstream.last.path == "/v1/chat/completions"


# Trouble.


def test_the_sdk_adds_no_attempts_to_those_of_the_proxy(launch: Launch, upstream: ScriptedUpstream) -> None:
    proxy = launch(settings(upstream.port, retry={"max_retries": 2}))
    upstream.always(upstream_answers.server_error(503))
    with connect(proxy) as client, pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="gpt-4o", messages=messages("sdk 503"))
    assert upstream.count == 3  # not 3 × 3


ERRORS = {
    400: openai.BadRequestError,
    404: openai.NotFoundError,
    422: openai.UnprocessableEntityError,
}


@pytest.mark.parametrize("status", ERRORS)
def test_errors_are_the_sdks_own(proxy: ProxyProcess, upstream: ScriptedUpstream, status: int) -> None:
    upstream.always(upstream_answers.error(status, "a message", "a_code"))
    with connect(proxy) as client, pytest.raises(ERRORS[status]) as caught:
        client.chat.completions.create(model="gpt-4o", messages=messages("sdk error"))
    assert caught.value.code == "a_code"
    assert caught.value.request_id.startswith("req_")


def test_a_cut_stream_raises(proxy: ProxyProcess, upstream: ScriptedUpstream) -> None:
    upstream.always(*upstream_answers.stream(upstream_answers.chat_events()[:3], end=False), sleep(0.1), cut())
    with connect(proxy) as client, pytest.raises(openai.APIError):
        list(client.chat.completions.create(model="gpt-4o", messages=messages("sdk cut"), stream=True))


def test_a_pool_with_an_invalid_and_an_exhausted_key(launch: Launch, upstream: ScriptedUpstream) -> None:
    proxy = launch(settings(upstream.port, ("k1", "k2", "k3")))

    def script(request: Request) -> Answer:
        if request.key == secret("k1"):
            return upstream_answers.unauthorized()
        return (
            upstream_answers.insufficient_quota() if request.key == secret("k2") else upstream_answers.behave(request)
        )

    upstream.script = script
    with connect(proxy, max_retries=0) as client:
        for number in range(5):
            answer = client.chat.completions.create(model="gpt-4o", messages=messages(f"sdk pool {number}"))
            assert answer.choices[0].message.content == f"echo: sdk pool {number}"
