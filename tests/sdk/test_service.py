"""What goes well, in every SDK, in front of the scripted upstream and of the demo."""

from __future__ import annotations

import json
from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest

from tests.sdk.conftest import Caller

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "City",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "people": {"type": "integer"}},
            "required": ["name", "people"],
            "additionalProperties": False,
        },
    },
}


def test_a_plain_request(anywhere: Caller) -> None:
    answer = anywhere.chat("plain wörld 🌍")
    assert f"plain wörld 🌍 {anywhere.name}" in answer.message["content"]
    assert answer.value["usage"]["total_tokens"] > 0
    assert anywhere.chat("plain wörld 🌍").value == answer.value


@pytest.mark.parametrize("azure", [False, True], ids=["openai", "azure"])
def test_headers_show_a_miss_and_a_free_hit(anywhere: Caller, azure: bool) -> None:
    first, second = (anywhere.chat(raw=True, azure=azure) for _ in range(2))
    assert (first.cache, second.cache) == ("miss", "hit")
    assert Decimal(first.cost) > 0
    assert second.cost == "0.000000"
    assert second.headers["x-proxy-cost-saved-usd"] == first.cost
    assert first.value == second.value
    assert anywhere.name in first.message["content"]


@pytest.mark.parametrize("azure", [False, True], ids=["openai", "azure"])
def test_a_streamed_hit_equals_the_stream(anywhere: Caller, azure: bool) -> None:
    first, second = (anywhere.chat("stream 🌍", raw=True, stream=True, azure=azure) for _ in range(2))
    assert (first.cache, second.cache) == ("miss", "hit")
    assert first.headers["x-proxy-cost-status"] == "pending"
    assert second.cost == "0.000000"
    assert first.value == second.value
    assert f"stream 🌍 {anywhere.name}" in first.text


def test_a_stream_and_its_events(caller: Caller) -> None:
    chunks = caller.chat("iterate", stream=True)
    assert f"iterate {caller.name}" in chunks.text
    assert chunks.value[-1]["choices"][0]["finish_reason"] == "stop"


def test_usage_is_sent_if_asked_for(anywhere: Caller) -> None:
    check_usage(anywhere, (False, True, False, True))


def test_usage_is_sent_if_the_first_client_asked(caller: Caller) -> None:
    check_usage(caller, (True, False, True, False))


def check_usage(caller: Caller, asks: Sequence[bool]) -> None:
    """The first is a miss, whose stream answers the others."""
    for number, ask in enumerate(asks):
        options: dict[str, Any] = {"stream_options": {"include_usage": True}} if ask else {}
        answer = caller.chat(raw=True, stream=True, **options)
        assert answer.cache == ("hit" if number else "miss")
        usages = [chunk["usage"] for chunk in answer.value if chunk.get("usage")]
        empty = [chunk for chunk in answer.value if not chunk["choices"]]
        assert len(usages) == len(empty) == ask
        assert caller.name in answer.text


def test_the_stream_helper(anywhere: Caller) -> None:
    if not anywhere.sdk.kind.helpers:
        pytest.skip("this SDK has no such helper")
    for _ in range(2):
        assert anywhere.name in anywhere.chat(method="stream").message["content"]


def test_tools(anywhere: Caller) -> None:
    first, second = (anywhere.chat("use tool", tools=TOOLS, raw=True) for _ in range(2))
    (call,) = first.message["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert set(json.loads(call["function"]["arguments"])) == {"city"}
    assert second.cache == "hit"
    assert first.value == second.value


def test_streamed_tools(anywhere: Caller) -> None:
    first, second = (anywhere.chat("use tool", tools=TOOLS, raw=True, stream=True) for _ in range(2))
    calls = [call for delta in first.deltas for call in delta.get("tool_calls") or []]
    assert calls[0]["function"]["name"] == "weather"
    assert set(json.loads("".join(call["function"]["arguments"] for call in calls))) == {"city"}
    assert first.value[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert second.cache == "hit"
    assert first.value == second.value


def test_structured_outputs(anywhere: Caller) -> None:
    parses = anywhere.sdk.kind.helpers
    first, second = (anywhere.chat(method="parse" if parses else "create", response_format=SCHEMA) for _ in range(2))
    city = first.message["parsed"] if parses else json.loads(first.message["content"])
    assert set(city) == {"name", "people"}
    assert first.value == second.value  # the demo's answers have new ids: this one came from the cache


def test_embeddings(anywhere: Caller) -> None:
    """By default the newer SDKs ask for base64 and decode it; an explicit format is passed through."""
    texts = [f"three {anywhere.name}", anywhere.name, f"a {anywhere.name}"]
    asked: dict[str, Any] = {"model": "text-embedding-3-small", "input": texts}
    default, again = (anywhere.call("embeddings.create", raw=True, **asked) for _ in range(2))
    floats = anywhere.call("embeddings.create", encoding_format="float", **asked)
    assert (default.cache, again.cache) == ("miss", "hit")
    assert again.cost == "0.000000"
    vectors = [[item["embedding"] for item in answer.value["data"]] for answer in (default, again, floats)]
    assert all(one == other for one, other in pairwise(vectors))
    assert [item["index"] for item in default.value["data"]] == [0, 1, 2]
    # Each text alone has the vector it has in the list.
    for text, vector in zip(texts, vectors[0], strict=True):
        alone = anywhere.call("embeddings.create", model="text-embedding-3-small", input=text)
        assert [item["embedding"] for item in alone.value["data"]] == [vector]


def test_embeddings_of_an_azure_client(anywhere: Caller) -> None:
    asked: dict[str, Any] = {"model": "text-embedding-3-small", "input": ["a", anywhere.name]}
    azure, openai = (anywhere.call("embeddings.create", azure=azure, **asked) for azure in (True, False))
    assert azure.value["data"] == openai.value["data"]
    assert len(azure.value["data"]) == 2


def test_models(anywhere: Caller) -> None:
    assert "gpt-4o" in [model["id"] for model in anywhere.call("models.list").value["data"]]
