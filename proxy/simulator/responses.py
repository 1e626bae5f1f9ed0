"""The simulated `/v1/responses`: one message or one function call, whole or as the events of a stream.

A request is put into chat's words and answered as chat answers it; what differs is the shape of the answer.
The shapes are those of OpenAI's API reference (Responses, and its streaming events).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from .answers import SNAPSHOTS, BadRequest, Json, Reply, chat_reply, chat_usage, last_user_text, new_id

# Fields that the answer repeats, each with what it says when the request leaves it out.
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
    """The text that is answered: `input`, or the last user message in it. Raises BadRequest."""
    return last_user_text(_messages(body))


def _messages(body: Mapping[str, Any]) -> list[Json]:
    """`instructions` and `input` as the messages of a chat. Raises BadRequest where there is no input."""
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
    """The request as chat would be sent it: what stands flat here is one level deeper there. Raises BadRequest."""
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


def _item(said: Reply, status: str) -> Json:
    """The one item of `output`."""
    if said.tool is not None:
        return {
            "id": new_id("fc_", 48),
            "type": "function_call",
            "status": status,
            "call_id": new_id("call_", 24),
            "name": said.tool,
            "arguments": said.text,
        }
    return {
        "id": new_id("msg_", 48),
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [_part(said.text)],
    }


def answer(body: Mapping[str, Any], model: str) -> tuple[Json, Reply]:
    """The finished response object and what it says. Raises BadRequest."""
    asked = _as_chat(body)
    said = chat_reply(asked)
    used = chat_usage(asked, [said])
    cut = said.finish_reason == "length"
    status = "incomplete" if cut else "completed"
    return {
        "id": new_id("resp_", 48),
        "object": "response",
        "created_at": int(time.time()),
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "model": SNAPSHOTS.get(model, model),
        "output": [_item(said, status)],
        "usage": {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["total_tokens"],
        },
        **{name: body.get(name, default) for name, default in _ECHOED.items()},
    }, said


def _message_events(item: Json, said: Reply) -> Iterator[Json]:
    place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    yield {"type": "response.content_part.added", **place, "part": _part("")}
    for piece in said.pieces:
        yield {"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []}
    yield {"type": "response.output_text.done", **place, "text": said.text, "logprobs": []}
    yield {"type": "response.content_part.done", **place, "part": _part(said.text)}


def _call_events(item: Json, said: Reply) -> Iterator[Json]:
    kind, place = "response.function_call_arguments", {"item_id": item["id"], "output_index": 0}
    for piece in said.pieces:
        yield {"type": f"{kind}.delta", **place, "delta": piece}
    yield {"type": f"{kind}.done", **place, "arguments": said.text}


def events(finished: Json, said: Reply) -> Iterator[Json]:
    """The events of a stream that ends in this response, in OpenAI's order."""
    begun = finished | {"status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    item = finished["output"][0]
    empty: Json = {"content": []} if said.tool is None else {"arguments": ""}
    final = "response.incomplete" if finished["incomplete_details"] else "response.completed"

    def unnumbered() -> Iterator[Json]:
        yield {"type": "response.created", "response": begun}
        yield {"type": "response.in_progress", "response": begun}
        opened = item | {"status": "in_progress"} | empty
        yield {"type": "response.output_item.added", "output_index": 0, "item": opened}
        yield from (_message_events if said.tool is None else _call_events)(item, said)
        yield {"type": "response.output_item.done", "output_index": 0, "item": item}
        yield {"type": final, "response": finished}

    for number, event in enumerate(unnumbered()):
        yield event | {"sequence_number": number}
