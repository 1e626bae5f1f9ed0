"""Converts a stored stream to a plain response, and a plain response to a stream (`docs/caching.md`).

Nothing is lost or guessed: if a field has no certain rule, the result is None, and the other form is a miss.

A stream is joined by the rules in `assemble`. A stream is made so that both these rules and the accumulator of the
official SDK restore the stored response; every conversion checks that the rules do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
import orjson

from ..protocol.json_parse import is_deeper
from ..protocol.sse import Splitter, data_of
from .assemble import (
    CALL_KINDS,
    LOGPROBS,
    OBJECTS,
    TEXTS,
    Json,
    NotConvertible,
    Number,
    assemble,
    decode,
    encode,
    is_text,
)
from .completeness import plain_complete

DONE: Final = b"data: [DONE]\n\n"

_CHUNK_FIELDS: Final[Sequence[str]] = ("id", "object", "created", "model", "service_tier", "system_fingerprint")
"""The fields that every chunk repeats."""

_MAX_PIECES: Final = 64
_MIN_PIECE: Final = 8
"""A text is streamed in at most `_MAX_PIECES` pieces; only the last has fewer than `_MIN_PIECE` characters."""


def plain_from_stream(endpoint: str, request: Mapping[str, Any], events: Iterable[bytes] | bytes) -> bytes | None:
    """Return the plain response that a complete stream makes; None if that is not certain.

    events: the stream's bytes, or its events as `Splitter` returns them. request: the parsed request, which decides
    when a response is complete. On responses it is the `response` of `response.completed`, byte for byte. Never raises.
    """
    try:
        if endpoint == "responses":
            body = _completed_response(_payloads(events))
        elif endpoint in OBJECTS:
            body = encode(_plain(endpoint, list(_chunks_of(_payloads(events)))))
        else:
            return None
        return body if plain_complete(endpoint, request, orjson.loads(body)) is None else None
    except _NOT_CONVERTIBLE:
        return None


def stream_from_plain(
    endpoint: str, request: Mapping[str, Any], body: bytes
) -> tuple[bytes, tuple[int, int] | None] | None:
    """Return a stream that makes a complete plain response, and where its usage chunk is; None if it is not certain.

    The usage chunk, (from, to), is sent only to clients that ask for it; it is None if the response has no usage.
    Always None on responses: a client may rely on any of about fifty kinds of event. Never raises.
    """
    if endpoint not in OBJECTS:
        return None
    body = body.removeprefix(b"\xef\xbb\xbf")
    try:
        if plain_complete(endpoint, request, orjson.loads(body)) is not None:
            return None
        answer = decode(body)
        chunks = list(_stream(endpoint, answer))
        if assemble(endpoint, chunks) != _without_call_indexes(answer):
            return None
        events = [b"data: %b\n\n" % encode(chunk) for chunk in chunks]
    except _NOT_CONVERTIBLE:
        return None
    stream = b"".join(events)
    span = None
    if chunks[-1]["choices"] == []:
        span = (len(stream) - len(events[-1]), len(stream))
    return stream + DONE, span


_NOT_CONVERTIBLE: Final = (NotConvertible, ValueError, TypeError, LookupError)
"""The exceptions of `decode`, `encode` and unexpected shapes."""


# -- stream to plain --------------------------------------------------------------------------------------------------


def _payloads(events: Iterable[bytes] | bytes) -> Iterator[bytes]:
    """Yield the data of the events, without comments."""
    if isinstance(events, bytes):
        splitter = Splitter()
        stream = events
        events = [*splitter.feed(stream), *splitter.finish()]
        if splitter.rest.strip(b"\r\n"):
            raise NotConvertible("cut")
    for event in events:
        data = data_of(event)
        if data is not None:
            yield data


def _chunks_of(payloads: Iterable[bytes]) -> Iterator[Json]:
    for data in payloads:
        if data.strip() == b"[DONE]":
            return
        yield decode(data)
    raise NotConvertible("no [DONE]")


def _plain(endpoint: str, chunks: Sequence[Json]) -> Json:
    """Return the response, with the fields that every plain response has."""
    answer = assemble(endpoint, chunks)
    if type(answer.get("usage")) is not dict:
        raise NotConvertible("no usage")
    if endpoint == "chat":
        for choice in answer["choices"]:
            choice["message"] = {"role": "assistant", "content": None} | (choice["message"] or {})
    return answer


class _Event(msgspec.Struct):
    """The fields that are read from an event of a Responses stream."""

    type: str = ""
    output_index: int = 0
    response: msgspec.Raw = msgspec.Raw()


def _completed_response(payloads: Iterable[bytes]) -> bytes:
    """Return the `response` of `response.completed`, verbatim.

    Raises NotConvertible if it lacks the usage or an item of the stream, as with some servers.
    """
    done: set[int] = set()
    completed = b""
    for data in payloads:
        if data.strip() == b"[DONE]":
            break
        if is_deeper(data):
            raise NotConvertible("depth")
        event = _EVENTS.decode(data)
        if event.type == "response.output_item.done":
            done.add(event.output_index)
        elif event.type == "response.completed":
            completed = bytes(event.response)
    response = orjson.loads(completed)
    if type(response) is not dict or type(response.get("usage")) is not dict:
        raise NotConvertible("no usage")
    if done and done != set(range(len(response.get("output") or ()))):
        raise NotConvertible("items missing")
    return completed


_EVENTS: Final = msgspec.json.Decoder(_Event)


# -- plain to stream --------------------------------------------------------------------------------------------------


def _stream(endpoint: str, answer: Json) -> Iterator[Json]:
    """Yield the chunks, the usage chunk last.

    The SDK's accumulator takes unknown fields from the first chunk, of the response and of each choice, and the
    fingerprint from the last, so they are put there.
    """
    envelope: Json = {name: answer[name] for name in _CHUNK_FIELDS if name in answer}
    envelope["object"] = OBJECTS[endpoint][0]
    usage = answer.get("usage")
    rest = {name: value for name, value in answer.items() if name not in envelope and name != "choices"}
    if type(usage) is dict:
        del rest["usage"]
    parts = _chat_choice if endpoint == "chat" else _text_choice
    for choice in answer["choices"]:
        for part in parts(choice):
            yield envelope | {"choices": [part]} | rest
            rest = {}
    if type(usage) is dict:
        yield envelope | {"choices": [], "usage": usage}


def _chat_choice(choice: Json) -> Iterator[Json]:
    """Yield a choice's parts: the role and whatever cannot be split, the texts, the calls, the finish reason."""
    message: Json = choice["message"]
    logprobs: Any = choice.get("logprobs")
    frame: Json = {"index": choice.get("index"), "delta": {}, "logprobs": None, "finish_reason": None}
    if "logprobs" not in choice:
        del frame["logprobs"]
    opening = {
        name: "" if name in TEXTS and type(value) is str else value
        for name, value in message.items()
        if not (name in ("tool_calls", "function_call") and value)
    }
    for value in opening.values():
        _check_list(value)
    rest = {name: value for name, value in choice.items() if name not in frame and name != "message"}
    yield frame | {"delta": opening} | rest
    by_token, tokens = _tokens_of(message, logprobs)
    if logprobs is not None and not by_token:
        # Beside the first part of a choice the SDK would count them twice; it ignores any but these.
        if type(logprobs) is not dict or not logprobs.keys() <= LOGPROBS.keys():
            raise NotConvertible("unknown logprobs")
        yield frame | {"logprobs": logprobs}
    for name in TEXTS:
        if name == by_token:
            for item in tokens:
                yield frame | {"delta": {name: item["token"]}, "logprobs": logprobs | {name: [item]}}
        elif type(message.get(name)) is str:
            for piece in _pieces(message[name]):
                yield frame | {"delta": {name: piece}}
    for delta in _call_deltas(message):
        yield frame | {"delta": delta}
    yield frame | {"finish_reason": choice["finish_reason"]}


def _tokens_of(message: Json, logprobs: object) -> tuple[str, list[Json]]:
    """Return the text of the log probabilities, and these token by token; "" if they fit no text exactly."""
    if type(logprobs) is not dict:
        return "", []
    present = [(name, items) for name, items in logprobs.items() if items is not None]
    for name, items in present:
        if len(present) == 1 and name in LOGPROBS and type(items) is list:
            tokens = [item["token"] for item in items if type(item) is dict and is_text(item.get("token"))]
            if items and len(tokens) == len(items) and "".join(tokens) == message.get(name):
                return name, items
    return "", []


def _call_deltas(message: Json) -> Iterator[Json]:
    """Yield the deltas of the legacy function call and of the tool calls: for each its name, then its text."""
    function = message.get("function_call")
    if function:
        for part in _called(function, "arguments"):
            yield {"function_call": part}
    for position, call in enumerate(message.get("tool_calls") or ()):
        if type(call) is not dict or call.get("type") not in CALL_KINDS:
            raise NotConvertible("unknown kind of call")
        index = {"index": Number(position)}
        kind, text = CALL_KINDS[call["type"]]
        first = index | call | index
        for part in _called(call.get(kind), text):
            yield {"tool_calls": [first | {kind: part}]}
            first = index


def _called(called: Any, text: str) -> Iterator[Json]:
    if type(called) is not dict or type(called.get(text)) is not str:
        raise NotConvertible("incomplete call")
    yield called | {text: ""}
    for piece in _pieces(called[text]):
        yield {text: piece}


def _text_choice(choice: Json) -> Iterator[Json]:
    """Yield the parts of a choice of completions. Log probabilities can only be beside the whole text."""
    frame: Json = {"index": choice.get("index"), "logprobs": None, "finish_reason": None}
    if "logprobs" not in choice:
        del frame["logprobs"]
    rest = {name: value for name, value in choice.items() if name not in frame and name != "text"}
    text, logprobs = choice["text"], choice.get("logprobs")
    if logprobs is not None:
        yield {"text": text} | frame | {"logprobs": logprobs}
    else:
        for piece in _pieces(text):
            yield {"text": piece} | frame
    yield {"text": ""} | frame | rest | {"finish_reason": choice["finish_reason"]}


def _pieces(text: str) -> Iterator[str]:
    size = max(_MIN_PIECE, -(-len(text) // _MAX_PIECES))
    for start in range(0, len(text), size):
        yield text[start : start + size]


def _check_list(value: object) -> None:
    """Raise NotConvertible if items have an `index` other than their place: the SDK's accumulator goes by `index`."""
    if type(value) is list and any(type(item) is dict and "index" in item for item in value):
        for position, item in enumerate(value):
            if type(item) is not dict or item.get("index") != Number(position):
                raise NotConvertible("indexes")


def _without_call_indexes(answer: Json) -> Json:
    """Return `answer` as `assemble` would make it: some providers give tool calls an index in plain responses, too."""
    choices = []
    for choice in answer["choices"]:
        message = choice.get("message")
        calls = message.get("tool_calls") if type(message) is dict else None
        if calls:
            _check_list(calls)
            bare = [{name: value for name, value in call.items() if name != "index"} for call in calls]
            choice = choice | {"message": message | {"tool_calls": bare}}
        choices.append(choice)
    return answer | {"choices": choices}
