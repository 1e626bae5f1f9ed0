"""The simulated `/v1/responses`: one message or one function call, plain or as the events of a stream.

A request is converted to a chat request and gets the same content. The shapes are those of OpenAI's API reference
(Responses, and its streaming events).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from .answers import SNAPSHOTS, BadRequest, Json, Reply, chat_reply, chat_usage, last_user_text, new_id

# Fields of the request that the response repeats, with their defaults.
_ECHOED: Mapping[str, Any] = {
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "service_tier": "default",
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "truncation": "disabled",
}


def prompt_of(body: Mapping[str, Any]) -> str:
    """Return the prompt: `input`, or the last user message in it. Raises BadRequest."""
    return last_user_text(_messages(body))


def _messages(body: Mapping[str, Any]) -> list[Json]:
    """Return `instructions` and `input` as chat messages. Raises BadRequest if there is no input."""
    value = body.get("input")
    items = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise BadRequest("Missing required parameter: 'input'.", "input")
    system = [{"role": "system", "content": text}] if (text := body.get("instructions")) else []
    return system + [
        {"role": "tool", "content": item.get("output")} if item.get("type") == "function_call_output" else item
        for item in items
    ]


def _as_chat(body: Mapping[str, Any]) -> Json:
    """Return the same request for chat, where tools and formats are nested one level deeper. Raises BadRequest."""
    tools, choice, text = body.get("tools"), body.get("tool_choice"), body.get("text")
    form = text.get("format") if isinstance(text, dict) else None
    return {
        "messages": _messages(body),
        "tools": [{"function": tool} for tool in tools if _is_function(tool)] if isinstance(tools, list) else [],
        "tool_choice": {"function": choice} if _is_function(choice) else choice,
        "response_format": {"type": form.get("type"), "json_schema": form} if isinstance(form, dict) else None,
        "max_tokens": body.get("max_output_tokens"),
    }


def _is_function(value: object) -> bool:
    return isinstance(value, dict) and value.get("type") == "function"


def _part(text: str) -> Json:
    return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}


def _item(reply: Reply, status: str) -> Json:
    """Return the only item of `output`."""
    if reply.tool is not None:
        return {
            "id": new_id("fc_", 48),
            "type": "function_call",
            "status": status,
            "call_id": new_id("call_", 24),
            "name": reply.tool,
            "arguments": reply.text,
        }
    return {
        "id": new_id("msg_", 48),
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [_part(reply.text)],
    }


def answer(body: Mapping[str, Any], model: str) -> tuple[Json, Reply]:
    """Return the finished response object and its content. Raises BadRequest."""
    chat_body = _as_chat(body)
    reply = chat_reply(chat_body)
    usage = chat_usage(chat_body, [reply])
    cut = reply.finish_reason == "length"
    status = "incomplete" if cut else "completed"
    return {
        "id": new_id("resp_", 48),
        "object": "response",
        "created_at": int(time.time()),
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "model": SNAPSHOTS.get(model, model),
        "output": [_item(reply, status)],
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        },
        **{name: body.get(name, default) for name, default in _ECHOED.items()},
    }, reply


def _message_events(item: Json, reply: Reply) -> Iterator[Json]:
    place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    yield {"type": "response.content_part.added", **place, "part": _part("")}
    for piece in reply.pieces:
        yield {"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []}
    yield {"type": "response.output_text.done", **place, "text": reply.text, "logprobs": []}
    yield {"type": "response.content_part.done", **place, "part": _part(reply.text)}


def _call_events(item: Json, reply: Reply) -> Iterator[Json]:
    kind, place = "response.function_call_arguments", {"item_id": item["id"], "output_index": 0}
    for piece in reply.pieces:
        yield {"type": f"{kind}.delta", **place, "delta": piece}
    yield {"type": f"{kind}.done", **place, "arguments": reply.text}


def events(finished: Json, reply: Reply) -> Iterator[Json]:
    """Yield the events of a stream that ends with this response, in OpenAI's order."""
    started = finished | {"status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    item = finished["output"][0]
    empty: Json = {"content": []} if reply.tool is None else {"arguments": ""}
    final = "response.incomplete" if finished["incomplete_details"] else "response.completed"

    def without_numbers() -> Iterator[Json]:
        yield {"type": "response.created", "response": started}
        yield {"type": "response.in_progress", "response": started}
        added = item | {"status": "in_progress"} | empty
        yield {"type": "response.output_item.added", "output_index": 0, "item": added}
        yield from (_message_events if reply.tool is None else _call_events)(item, reply)
        yield {"type": "response.output_item.done", "output_index": 0, "item": item}
        yield {"type": final, "response": finished}

    for number, event in enumerate(without_numbers()):
        yield event | {"sequence_number": number}
