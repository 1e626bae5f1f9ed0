"""One stored answer, both forms: the plain JSON that a stream stands for, and a stream that stands for plain JSON.

Nothing is lost or guessed: where a field has no certain rule the result is None, and the other form is a miss.

A stream is put together by the rules in `assembly`. A stream is made so that these rules and the accumulator of the
official SDK both give the stored answer again; that the rules do is checked in every conversion.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
import orjson

from ..protocol.json_parse import is_deeper
from ..protocol.sse import Splitter, data_of
from .assemble import (
    KINDS_OF_CALL,
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

_ENVELOPE: Final[Sequence[str]] = ("id", "object", "created", "model", "service_tier", "system_fingerprint")
"""What every chunk repeats."""

_MOST_PIECES: Final = 64
_SHORTEST_PIECE: Final = 8
"""A text is streamed in at most so many pieces, none but the last shorter than so many characters."""


def plain_from_stream(endpoint: str, request: Mapping[str, Any], events: Iterable[bytes] | bytes) -> bytes | None:
    """The plain JSON answer that a complete stream stands for; None: that is not certain.

    events: the stream's bytes, or its events as the Splitter gives them. request: the parsed request, which says when
    an answer is whole. On responses it is the `response` of `response.completed`, byte for byte. Never raises.
    """
    try:
        if endpoint == "responses":
            body = _completed_response(_payloads(events))
        elif endpoint in OBJECTS:
            body = encode(_plain(endpoint, list(_chunks_of(_payloads(events)))))
        else:
            return None
        return body if plain_complete(endpoint, request, orjson.loads(body)) is None else None
    except _UNCERTAIN:
        return None


def stream_from_plain(
    endpoint: str, request: Mapping[str, Any], body: bytes
) -> tuple[bytes, tuple[int, int] | None] | None:
    """A stream that stands for a complete plain answer, and where the usage chunk lies in it (from, to), which only
    those get who asked for it; that is None where the answer has no usage. None: the stream is not certain.

    Always None on responses: a client may rely on any of some fifty kinds of event. Never raises.
    """
    if endpoint not in OBJECTS:
        return None
    try:
        if plain_complete(endpoint, request, orjson.loads(body)) is not None:
            return None
        answer = decode(body)
        chunks = list(_stream(endpoint, answer))
        if assemble(endpoint, chunks) != _without_call_indexes(answer):
            return None
        events = [b"data: %b\n\n" % encode(chunk) for chunk in chunks]
    except _UNCERTAIN:
        return None
    stream = b"".join(events)
    span = None
    if chunks[-1]["choices"] == []:
        span = (len(stream) - len(events[-1]), len(stream))
    return stream + DONE, span


_UNCERTAIN: Final = (NotConvertible, ValueError, TypeError, LookupError)
"""What `decode`, `encode` and unlikely shapes raise."""


# -- stream to plain --------------------------------------------------------------------------------------------------


def _payloads(events: Iterable[bytes] | bytes) -> Iterator[bytes]:
    """The data of the events, comments left out."""
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
    """The answer, with what every plain answer has."""
    answer = assemble(endpoint, chunks)
    if type(answer.get("usage")) is not dict:
        raise NotConvertible("no usage")
    if endpoint == "chat":
        for choice in answer["choices"]:
            choice["message"] = {"role": "assistant", "content": None} | (choice["message"] or {})
    return answer


class _Event(msgspec.Struct):
    """What is read of an event of a Responses stream."""

    type: str = ""
    output_index: int = 0
    response: msgspec.Raw = msgspec.Raw()


def _completed_response(payloads: Iterable[bytes]) -> bytes:
    """The `response` of `response.completed`, verbatim, provided that it holds all items the stream has told, and the
    usage (some servers leave them out there).
    """
    told: set[int] = set()
    completed = b""
    for data in payloads:
        if data.strip() == b"[DONE]":
            break
        if is_deeper(data):
            raise NotConvertible("depth")
        event = _EVENTS.decode(data)
        if event.type == "response.output_item.done":
            told.add(event.output_index)
        elif event.type == "response.completed":
            completed = bytes(event.response)
    response = orjson.loads(completed)
    if type(response) is not dict or type(response.get("usage")) is not dict:
        raise NotConvertible("no usage")
    if told and told != set(range(len(response.get("output") or ()))):
        raise NotConvertible("items missing")
    return completed


_EVENTS: Final = msgspec.json.Decoder(_Event)


# -- plain to stream --------------------------------------------------------------------------------------------------


def _stream(endpoint: str, answer: Json) -> Iterator[Json]:
    """The chunks, the usage chunk last.

    The SDK's accumulator takes unknown fields from the first chunk, of the answer and of each choice, and the
    fingerprint from the last, so that is where they are.
    """
    envelope: Json = {name: answer[name] for name in _ENVELOPE if name in answer}
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
    """A choice's parts: the role and what cannot be cut, the texts, the calls, the finish."""
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
        # Beside the first part of a choice the SDK would count them twice; of others than these it takes no notice.
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
    """The text that the log probabilities are of, and these token by token; "" where they do not fit one exactly."""
    if type(logprobs) is not dict:
        return "", []
    told = [(name, items) for name, items in logprobs.items() if items is not None]
    for name, items in told:
        if len(told) == 1 and name in LOGPROBS and type(items) is list:
            tokens = [item["token"] for item in items if type(item) is dict and is_text(item.get("token"))]
            if items and len(tokens) == len(items) and "".join(tokens) == message.get(name):
                return name, items
    return "", []


def _call_deltas(message: Json) -> Iterator[Json]:
    """The deltas of the legacy function call and of the tool calls: each called by name, then its text."""
    function = message.get("function_call")
    if function:
        for part in _called(function, "arguments"):
            yield {"function_call": part}
    for position, call in enumerate(message.get("tool_calls") or ()):
        if type(call) is not dict or call.get("type") not in KINDS_OF_CALL:
            raise NotConvertible("unknown kind of call")
        index = {"index": Number(position)}
        kind, text = KINDS_OF_CALL[call["type"]]
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
    """A choice of completions, which may have its log probabilities only beside its whole text."""
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
    size = max(_SHORTEST_PIECE, -(-len(text) // _MOST_PIECES))
    for start in range(0, len(text), size):
        yield text[start : start + size]


def _check_list(value: object) -> None:
    """The SDK's accumulator puts items with an `index` where that says: it must say where they are."""
    if type(value) is list and any(type(item) is dict and "index" in item for item in value):
        for position, item in enumerate(value):
            if type(item) is not dict or item.get("index") != Number(position):
                raise NotConvertible("indexes")


def _without_call_indexes(answer: Json) -> Json:
    """`answer` as `assemble` would tell it: some providers give tool calls an index in plain answers, too."""
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
