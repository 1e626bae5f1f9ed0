"""The simulated `/v1/responses`: one message of text, whole or as the events of a stream."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from .answers import (
    SNAPSHOTS,
    BadRequest,
    Json,
    Reply,
    count_tokens,
    last_user_text,
    new_id,
    reply,
    text_of,
)

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
    value = body.get("input")
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return last_user_text(value)
    raise BadRequest("Missing required parameter: 'input'.", "input")


def _input_tokens(body: Mapping[str, Any]) -> int:
    value = body.get("input")
    items = value if isinstance(value, list) else [{"content": value}]
    texts = [text_of(item.get("content")) for item in items if isinstance(item, dict)]
    return sum(4 + count_tokens(text) for text in texts) + count_tokens(text_of(body.get("instructions"))) + 3


def _part(text: str) -> Json:
    return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}


def answer(body: Mapping[str, Any], model: str) -> tuple[Json, Reply]:
    """The finished response object and its text. Raises BadRequest."""
    said = reply(prompt_of(body), 0, body.get("max_output_tokens"))
    cut = said.finish_reason == "length"
    status = "incomplete" if cut else "completed"
    input_tokens = _input_tokens(body)
    message = {
        "id": new_id("msg_", 48),
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [_part(said.text)],
    }
    return {
        "id": new_id("resp_", 48),
        "object": "response",
        "created_at": int(time.time()),
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "model": SNAPSHOTS.get(model, model),
        "output": [message],
        "usage": {
            "input_tokens": input_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": said.tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": input_tokens + said.tokens,
        },
        **{name: body.get(name, default) for name, default in _ECHOED.items()},
    }, said


def events(finished: Json, said: Reply) -> Iterator[Json]:
    """The events of a stream that ends in this response, in OpenAI's order."""
    begun = finished | {"status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    message = finished["output"][0]
    place = {"item_id": message["id"], "output_index": 0, "content_index": 0}
    final = "response.incomplete" if finished["incomplete_details"] else "response.completed"

    def unnumbered() -> Iterator[Json]:
        yield {"type": "response.created", "response": begun}
        yield {"type": "response.in_progress", "response": begun}
        opened = message | {"status": "in_progress", "content": []}
        yield {"type": "response.output_item.added", "output_index": 0, "item": opened}
        yield {"type": "response.content_part.added", **place, "part": _part("")}
        for piece in said.pieces:
            yield {"type": "response.output_text.delta", **place, "delta": piece, "logprobs": []}
        yield {"type": "response.output_text.done", **place, "text": said.text, "logprobs": []}
        yield {"type": "response.content_part.done", **place, "part": _part(said.text)}
        yield {"type": "response.output_item.done", "output_index": 0, "item": message}
        yield {"type": final, "response": finished}

    for number, event in enumerate(unnumbered()):
        yield event | {"sequence_number": number}
