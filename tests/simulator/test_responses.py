"""Structured outputs and function calls of the simulated `/v1/responses`, with OpenAI's SDK."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai.types.responses import (
    FunctionToolParam,
    ResponseFunctionToolCall,
    ResponseInputParam,
    ResponseStreamEvent,
    WebSearchToolParam,
)
from pydantic import BaseModel

from proxy.simulator.server import running_simulator

pytestmark = pytest.mark.slow

WEATHER: FunctionToolParam = {
    "type": "function",
    "name": "weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 3}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
OTHER: FunctionToolParam = {"type": "function", "name": "other", "strict": None, "parameters": None}
SEARCH: WebSearchToolParam = {"type": "web_search"}
ARGUMENTS = {"city": "simulated", "days": 3}


class Leaf(BaseModel):
    name: str
    weight: float


class Tree(BaseModel):
    leaves: list[Leaf]
    parent: Tree | None
    green: bool


@pytest.fixture
async def sdk() -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        running_simulator() as url,
        openai.AsyncOpenAI(base_url=url, api_key="sk-any", max_retries=0) as client,
    ):
        yield client


async def events_of(sdk: openai.AsyncOpenAI, **request: Any) -> list[ResponseStreamEvent]:
    stream = await sdk.responses.create(model="gpt-4o", stream=True, **request)
    events: list[ResponseStreamEvent] = [event async for event in stream]
    assert [e.sequence_number for e in events] == list(range(len(events)))
    return events


def kinds(events: list[ResponseStreamEvent]) -> list[str]:
    """Return the event types in order; consecutive deltas count once."""
    types = [e.type.removeprefix("response.") for e in events]
    return [t for i, t in enumerate(types) if i == 0 or t != types[i - 1]]


async def test_structured_outputs(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.responses.parse(model="gpt-4o", input="a tree", text_format=Tree)
    assert answer.output_parsed is not None
    assert answer.output_parsed.leaves[0].name == "simulated"
    loose = await sdk.responses.create(model="gpt-4o", input="json", text={"format": {"type": "json_object"}})
    assert "json" in json.loads(loose.output_text)["answer"]
    plain = await sdk.responses.create(model="gpt-4o", input="text", text={"format": {"type": "text"}})
    assert plain.output_text.startswith("You said")


async def test_a_streamed_structured_output(sdk: openai.AsyncOpenAI) -> None:
    async with sdk.responses.stream(model="gpt-4o", input="a tree", text_format=Tree) as stream:
        final = await stream.get_final_response()
    assert isinstance(final.output_parsed, Tree)
    events = await events_of(sdk, input="json", text={"format": {"type": "json_object"}})
    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert len(deltas) > 1
    assert "answer" in json.loads("".join(deltas))


async def test_a_function_is_called_once(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.responses.create(model="gpt-4o", input="use tool, please", tools=[SEARCH, WEATHER, OTHER])
    assert answer.status == "completed"
    (call,) = answer.output
    assert isinstance(call, ResponseFunctionToolCall)
    assert (call.name, call.status) == ("weather", "completed")
    assert json.loads(call.arguments) == ARGUMENTS
    assert call.id is not None
    assert call.id.startswith("fc_")
    assert call.call_id.startswith("call_")
    assert answer.usage is not None
    assert answer.usage.output_tokens > 0
    result: ResponseInputParam = [
        {"role": "user", "content": "use tool, please"},
        {"type": "function_call", "call_id": call.call_id, "name": "weather", "arguments": call.arguments},
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny all week"},
    ]
    final = await sdk.responses.create(model="gpt-4o", input=result, tools=[WEATHER])
    assert "use tool" in final.output_text
    by_reference = await sdk.responses.create(
        model="gpt-4o", input=result[2:], previous_response_id=answer.id, tools=[WEATHER], tool_choice="required"
    )
    assert by_reference.output_text


@pytest.mark.parametrize(
    ("text", "choice", "called"),
    [
        ("Hello", "auto", None),
        ("use tool", "none", None),
        ("Hello", "required", "weather"),
        ("Hello", {"type": "function", "name": "other"}, "other"),
        ("Hello", {"type": "function", "name": "missing"}, None),
        ("Hello", {"type": "web_search_preview"}, None),
    ],
)
async def test_tool_choice_decides(sdk: openai.AsyncOpenAI, text: str, choice: Any, called: str | None) -> None:
    answer = await sdk.responses.create(model="gpt-4o", input=text, tools=[WEATHER, OTHER], tool_choice=choice)
    assert [item.name for item in answer.output if item.type == "function_call"] == ([called] if called else [])


async def test_other_tools_are_not_called(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.responses.create(model="gpt-4o", input="use tool", tools=[SEARCH])
    assert "use tool" in answer.output_text


async def test_a_streamed_function_call(sdk: openai.AsyncOpenAI) -> None:
    events = await events_of(sdk, input="use tool", tools=[WEATHER])
    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    added, done, last = events[2], events[-2], events[-1]
    assert added.type == "response.output_item.added"
    assert isinstance(added.item, ResponseFunctionToolCall)
    assert (added.item.arguments, added.item.status) == ("", "in_progress")
    assert done.type == "response.output_item.done"
    assert isinstance(done.item, ResponseFunctionToolCall)
    assert (done.item.id, done.item.call_id) == (added.item.id, added.item.call_id)
    assert last.type == "response.completed"
    assert last.response.output == [done.item]
    assert last.response.usage is not None
    deltas = [e for e in events if e.type == "response.function_call_arguments.delta"]
    assert {e.item_id for e in deltas} == {added.item.id}
    assert "".join(e.delta for e in deltas) == done.item.arguments
    assert json.loads(done.item.arguments) == ARGUMENTS


async def test_instructions_count_as_input(sdk: openai.AsyncOpenAI) -> None:
    short = await sdk.responses.create(model="gpt-4o", input="Hello")
    long = await sdk.responses.create(model="gpt-4o", input="Hello", instructions="be brief")
    assert short.output_text == long.output_text
    assert short.usage is not None
    assert long.usage is not None
    assert long.usage.input_tokens > short.usage.input_tokens
