"""The responses of the simulated OpenAI API: texts, tool calls, JSON for a schema, embeddings.

Their shapes are those of OpenAI's API reference. The same request gets the same response, except for ids and times.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
import secrets
import string
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

Json = dict[str, Any]

MODELS = (
    "gpt-3.5-turbo",
    "gpt-3.5-turbo-instruct",
    "gpt-4.1",
    "gpt-4.1-mini",
    "gpt-4o",
    "gpt-4o-mini",
    "gpt-5",
    "gpt-5-mini",
    "o3",
    "o4-mini",
    "omni-moderation-latest",
    "text-embedding-3-large",
    "text-embedding-3-small",
    "text-embedding-ada-002",
)
# As with OpenAI, the response names the snapshot of an alias.
SNAPSHOTS = {"gpt-4o": "gpt-4o-2024-08-06", "gpt-4o-mini": "gpt-4o-mini-2024-07-18"}
MODEL_FAMILIES = (
    "gpt-",
    "o1",
    "o3",
    "o4",
    "chatgpt-",
    "text-embedding-",
    "text-moderation-",
    "omni-moderation-",
    "ft:",
)
DIMENSIONS = {"text-embedding-3-large": 3072}
DEFAULT_DIMENSIONS = 1536
MAX_INPUTS = 2048
TOOL_PROMPT = "use tool"

_ALPHABET = string.ascii_letters + string.digits
_WORDS = re.compile(r"\s*\S+")
_TOKENS = re.compile(r"\w{1,8}|[^\w\s]")
_SCHEMA_DEPTH = 12


class BadRequest(Exception):
    """A request that OpenAI refuses with 400. param: the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


@dataclass(frozen=True, slots=True)
class Reply:
    """The content of one choice: text, or one tool call. text: of the tool call, its arguments."""

    text: str
    tool: str | None
    finish_reason: str

    @property
    def pieces(self) -> list[str]:
        """The pieces in which it is streamed: words, or twelve characters of a call's arguments."""
        if self.tool is None:
            return _WORDS.findall(self.text)
        return [self.text[start : start + 12] for start in range(0, len(self.text), 12)]

    @property
    def tokens(self) -> int:
        return count_tokens(self.text)


def new_id(prefix: str, length: int = 29) -> str:
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(length))


def known_model(model: str) -> bool:
    return model.startswith(MODEL_FAMILIES)


def count_tokens(text: str) -> int:
    """Count one token for each eight letters of a word, and one for each punctuation mark."""
    return len(_TOKENS.findall(text))


def text_of(content: object) -> str:
    """Return the text of a message's `content`: a string, or the text parts of a list."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = (part.get("text") for part in content if isinstance(part, dict))
        return "\n".join(text for text in texts if isinstance(text, str))
    return ""


def last_user_text(messages: Sequence[Mapping[str, Any]]) -> str:
    return next((text_of(m.get("content")) for m in reversed(messages) if m.get("role") == "user"), "")


def messages_of(body: Mapping[str, Any]) -> list[Json]:
    """Return the messages of a chat request. Raises BadRequest if there are none."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise BadRequest("Missing required parameter: 'messages'.", "messages")
    return messages


def prose(prompt: str, number: int = 0) -> str:
    """Return the text for a prompt. number: of the choice."""
    quote = " ".join(prompt.split())
    quote = quote if len(quote) <= 200 else quote[:197] + "..."
    variant = f" (choice {number})" if number else ""
    return f"You said: {quote}. This is a simulated answer{variant}: no model was asked."


def reply(prompt: str, number: int, limit: object) -> Reply:
    """Return a text of at most `limit` tokens; of any length if that is not a number."""
    text = prose(prompt, number)
    if not isinstance(limit, int) or limit >= count_tokens(text):
        return Reply(text, None, "stop")
    end = next((m.end() for i, m in enumerate(_TOKENS.finditer(text), 1) if i == limit), 0)
    return Reply(text[:end], None, "length")


def chat_reply(body: Mapping[str, Any], number: int = 0) -> Reply:
    """Return the reply to a chat request: a tool call, JSON, or text."""
    messages = messages_of(body)
    prompt = last_user_text(messages)
    tool = _tool_to_call(body, messages, prompt)
    if tool is not None:
        name, parameters = tool
        return Reply(orjson.dumps(example(parameters)).decode(), name, "tool_calls")
    form = body.get("response_format")
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "json_schema" and isinstance(form, dict):
        wrapper = form.get("json_schema")
        schema = wrapper.get("schema") if isinstance(wrapper, dict) else None
        return Reply(orjson.dumps(example(schema)).decode(), None, "stop")
    if kind == "json_object":
        return Reply(orjson.dumps({"answer": prose(prompt, number)}).decode(), None, "stop")
    return reply(prompt, number, body.get("max_completion_tokens", body.get("max_tokens")))


def _tool_to_call(body: Mapping[str, Any], messages: Sequence[Json], prompt: str) -> tuple[str, object] | None:
    """Return the function to call and its parameters' schema, if any.

    It is called if the prompt starts with `use tool` or the request requires it, unless the tool has answered.
    """
    tools = body.get("tools")
    if not isinstance(tools, list) or messages[-1].get("role") == "tool":
        return None
    functions = {
        str(f.get("name")): f.get("parameters")
        for t in tools
        if isinstance(t, dict) and isinstance(f := t.get("function"), dict)
    }
    choice = body.get("tool_choice")
    if isinstance(choice, dict) and isinstance(chosen := choice.get("function"), dict):
        name = str(chosen.get("name"))
        return (name, functions[name]) if name in functions else None
    if functions and choice != "none" and (choice == "required" or prompt.lower().startswith(TOOL_PROMPT)):
        return next(iter(functions.items()))
    return None


def example(schema: object, root: object = None, depth: int = 0) -> object:
    """Return a value that matches a simple JSON schema: objects, arrays, enums, references and simple types."""
    root = schema if root is None else root
    if not isinstance(schema, dict) or depth > _SCHEMA_DEPTH:
        return None
    deeper = depth + 1
    if "const" in schema:
        return schema["const"]
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return schema["enum"][0]
    if isinstance(reference := schema.get("$ref"), str):
        return example(_resolve(reference, root), root, deeper)
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(options := schema.get(key), list) and options:
            # From half of the depth on, prefer null, so that a recursive schema ends.
            preferred = options if depth < _SCHEMA_DEPTH // 2 else sorted(options, key=_is_not_null)
            return example(preferred[0], root, deeper)
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((k for k in kind if k != "null"), "null")
    match kind:
        case "object":
            properties = schema.get("properties")
            names = properties if isinstance(properties, dict) else {}
            return {name: example(sub, root, deeper) for name, sub in names.items()}
        case "array":
            count = _bound(schema, "minItems", 1 if depth < _SCHEMA_DEPTH // 2 else 0)
            return [example(schema.get("items"), root, deeper) for _ in range(min(math.ceil(count), 100))]
        case "string":
            return "simulated".ljust(min(math.ceil(_bound(schema, "minLength", 0)), 1000), ".")
        case "integer":
            return math.ceil(_bound(schema, "minimum", 1))
        case "number":
            return float(_bound(schema, "minimum", 1))
        case "boolean":
            return True
        case _:
            return None


def _bound(schema: Mapping[str, object], name: str, default: int) -> int | float:
    value = schema.get(name, default)
    return value if isinstance(value, int | float) else default


def _is_not_null(schema: object) -> bool:
    return not (isinstance(schema, dict) and schema.get("type") == "null")


def _resolve(reference: str, root: object) -> object:
    target = root
    for step in reference.removeprefix("#").strip("/").split("/"):
        if step:
            target = target.get(step) if isinstance(target, dict) else None
    return target


def chat_usage(body: Mapping[str, Any], replies: Sequence[Reply]) -> Json:
    return usage(sum(4 + count_tokens(text_of(m.get("content"))) for m in messages_of(body)) + 3, replies)


def usage(prompt_tokens: int, replies: Sequence[Reply]) -> Json:
    """Return the `usage` object of chat and completions."""
    completion_tokens = sum(r.tokens for r in replies)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def tool_call(reply: Reply) -> Json:
    return {
        "id": new_id("call_", 24),
        "type": "function",
        "function": {"name": reply.tool, "arguments": reply.text},
    }


def chat_message(reply: Reply) -> Json:
    message: Json = {"role": "assistant", "content": reply.text, "refusal": None, "annotations": []}
    if reply.tool is not None:
        message |= {"content": None, "tool_calls": [tool_call(reply)]}
    return message


def chat_deltas(reply: Reply) -> Iterator[Json]:
    """Yield the `delta` objects of one streamed choice, without the last, empty one."""
    if reply.tool is None:
        yield {"role": "assistant", "content": "", "refusal": None}
        for piece in reply.pieces:
            yield {"content": piece}
        return
    call = tool_call(reply)
    call["function"] = {"name": reply.tool, "arguments": ""}
    yield {"role": "assistant", "content": None, "tool_calls": [{"index": 0, **call}]}
    for piece in reply.pieces:
        yield {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}


def head(kind: str, prefix: str, model: str) -> Json:
    """Return the first fields of a chat or completion response; all chunks of a stream have the same."""
    return {
        "id": new_id(prefix),
        "object": kind,
        "created": int(time.time()),
        "model": SNAPSHOTS.get(model, model),
        "service_tier": "default",
        "system_fingerprint": "fp_simulated",
    }


def inputs_of(value: object) -> list[str]:
    """Return the input of embeddings or completions as texts; of token arrays, their numbers.

    Raises BadRequest for anything else.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(v, int) for v in value):
            return [" ".join(map(str, value))]
        if all(isinstance(v, str) for v in value):
            return list(value)
        if all(isinstance(v, list) and v and all(isinstance(t, int) for t in v) for v in value):
            return [" ".join(map(str, v)) for v in value]
    raise BadRequest("'$.input' is invalid. Please check the API reference.", "input")


def vector(model: str, text: str, dimensions: int) -> list[float]:
    """Return a unit vector of single-precision numbers that depends on the model and the text only.

    As with OpenAI's `dimensions`, a shorter vector is the start of the longer one, scaled to length one.
    """
    seed = f"{model}\0{text}".encode(errors="replace")
    raw = struct.unpack(f"<{dimensions}i", hashlib.shake_256(seed).digest(4 * dimensions))
    length = math.sqrt(sum(x * x for x in raw))
    return list(struct.unpack(f"<{dimensions}f", struct.pack(f"<{dimensions}f", *(x / length for x in raw))))


def embeddings(body: Mapping[str, Any], model: str) -> Json:
    """Return the response to an embeddings request. Raises BadRequest."""
    texts = inputs_of(body.get("input"))
    if len(texts) > MAX_INPUTS:
        raise BadRequest(f"'input' must contain at most {MAX_INPUTS} items.", "input")
    longest = DIMENSIONS.get(model, DEFAULT_DIMENSIONS)
    dimensions = body.get("dimensions") or longest
    if not isinstance(dimensions, int) or not 1 <= dimensions <= longest:
        raise BadRequest(f"'dimensions' must be between 1 and {longest}.", "dimensions")
    in_base64 = body.get("encoding_format") == "base64"
    data = []
    for index, text in enumerate(texts):
        numbers = vector(model, text, dimensions)
        packed = base64.b64encode(struct.pack(f"<{dimensions}f", *numbers)).decode() if in_base64 else numbers
        data.append({"object": "embedding", "index": index, "embedding": packed})
    tokens = sum(count_tokens(text) for text in texts)
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def moderation(body: Mapping[str, Any], model: str) -> Json:
    """Return the response to a moderation request; a text with `harm` is flagged. Raises BadRequest."""
    value = body.get("input")
    parts = isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)
    texts = [text_of(value)] if parts else inputs_of(value)
    results = []
    for text in texts:
        flagged = "harm" in text.lower()
        categories = {name: flagged and name == "violence" for name in ("harassment", "hate", "self-harm", "violence")}
        scores = {name: 0.9 if hit else 0.0001 for name, hit in categories.items()}
        applied = {name: ["text"] for name in categories}
        results.append(
            {
                "flagged": flagged,
                "categories": categories,
                "category_scores": scores,
                "category_applied_input_types": applied,
            }
        )
    return {"id": new_id("modr-", 32), "model": model, "results": results}


def model_card(name: str) -> Json:
    return {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "simulated"}
