"""Joins the chunks of a chat or completions stream into one plain response, without guessing.

How a field of the response is made from its values in the chunks (null is always neutral, "" where it says so):

| field                                                    | rule                                                     |
|----------------------------------------------------------|----------------------------------------------------------|
| top level: `id`, `model`, `service_tier`,                | the same in all chunks that have it ("" neutral: Azure's |
| `system_fingerprint`                                     | first chunk has an empty id and model)                   |
| `created`                                                | the first that is not 0 (some servers restamp each chunk)|
| `object`                                                 | `chat.completion.chunk` becomes `chat.completion`        |
| `usage`                                                  | the last object, as in the SDKs                          |
| `obfuscation`                                            | dropped: padding of the stream                           |
| `x_groq`                                                 | its members united; its `usage` the last                 |
| any other (`prompt_filter_results`, `moderation`, …)     | the same in all chunks that have it                      |
| a choice's `finish_reason`                               | the same wherever it is set ("" neutral)                 |
| `logprobs`: `content`, `refusal`; those of completions   | lists joined                                             |
| `content_filter_results` (Azure)                         | categories united; a repeated category must be the same  |
| `text` of completions                                    | joined                                                   |
| any other field of a choice                              | set once                                                 |
| a delta's `role`                                         | the same wherever it is set ("" neutral)                 |
| `content`, `refusal`, `reasoning`, `reasoning_content`   | joined                                                   |
| `tool_calls`                                             | by `index` from 0 on: `id` and `type` the same, name set |
|                                                          | once, `arguments` and a custom tool's `input` joined     |
| `function_call` (legacy)                                 | name set once, `arguments` joined                        |
| `annotations`                                            | set once (an empty list is neutral)                      |
| any other field of a delta, tool call or function        | set once: two values could be deltas or a constant       |

If a rule does not hold, the response has no other form. Numbers keep their spelling, members their order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, TypeGuard

import orjson

from ..protocol.json_parse import is_deeper

Json = dict[str, Any]
Rule = Callable[[Sequence[Any]], Any]
Rules = Mapping[str, Rule]

OBJECTS: Final[Mapping[str, tuple[str, str]]] = {
    "chat": ("chat.completion.chunk", "chat.completion"),
    "completions": ("text_completion", "text_completion"),
}
"""Endpoint -> the `object` of a chunk and of a plain response."""


class NotConvertible(Exception):
    """No rule applies with certainty: the response has no other form."""


def assemble(endpoint: str, chunks: Sequence[Json]) -> Json:
    """Return the plain response that parsed chunks (see `decode`) make. Raises NotConvertible."""
    tops: list[Json] = []
    choices: dict[int, list[Json]] = {}
    for chunk in chunks:
        tops.append({name: value for name, value in chunk.items() if name not in ("choices", "obfuscation")})
        for position, choice in enumerate(chunk.get("choices") or ()):
            if type(choice) is not dict:
                raise NotConvertible("malformed choices")
            index = _position(choice["index"]) if "index" in choice else position
            choices.setdefault(index, []).append(choice)
    answer = _merge(tops, _TOP, _same)
    of_chunk, of_answer = OBJECTS[endpoint]
    if answer.get("object") != of_chunk:
        raise NotConvertible("not made of chunks")
    lead: Json = {name: answer.pop(name) for name in ("id", "object", "created", "model") if name in answer}
    lead["object"] = of_answer
    lead["choices"] = [_choice(endpoint, index, choices[index]) for index in sorted(choices)]
    return lead | answer


def _choice(endpoint: str, index: int, parts: Sequence[Json]) -> Json:
    merged = _merge(({**part, "index": None} for part in parts), _CHOICES[endpoint], _once)
    merged["index"] = Number(index)
    if endpoint == "completions":
        return merged
    if "message" in merged:
        raise NotConvertible("a message beside the deltas")
    return {"index": merged.pop("index"), "message": merged.pop("delta", None)} | merged


# -- JSON whose numbers keep their spelling ---------------------------------------------------------------------------


class Number(str):
    """A JSON number as it was written; it equals no string and no other spelling."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return type(other) is Number and str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _unique(members: list[tuple[str, Any]]) -> Json:
    document = dict(members)
    if len(document) != len(members):
        raise NotConvertible("duplicate keys")
    return document


def _no_constant(name: str) -> None:
    raise NotConvertible(name)


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=Number, parse_float=Number, parse_constant=_no_constant
)


def decode(data: bytes) -> Json:
    """Return the JSON object in `data`.

    Raises ValueError if it is no JSON, NotConvertible for duplicate keys, NaN, great depth and other documents.
    """
    if is_deeper(data):
        raise NotConvertible("depth")
    document = _DECODER.decode(data.decode())
    if type(document) is not dict:
        raise NotConvertible("not an object")
    return document


def _spelling(number: Number) -> orjson.Fragment:
    return orjson.Fragment(str(number))


def encode(document: Json) -> bytes:
    """Return compact JSON. Raises TypeError for what orjson cannot write: half a surrogate pair, great depth."""
    # Subclasses go to `default`, which tells a Number from a text.
    return orjson.dumps(document, default=_spelling, option=orjson.OPT_PASSTHROUGH_SUBCLASS)


def _position(value: object) -> int:
    """Return a list index; only the shortest spelling is valid. Raises NotConvertible."""
    if type(value) is not Number or not value.isdigit() or len(value) > 6:
        raise NotConvertible("index")
    return int(value)


# -- rules: all values of a field, in order -> its value in the answer ------------------------------------------------


def _same(values: Sequence[Any]) -> Any:
    present = [value for value in values if value is not None]
    if any(value != present[0] for value in present):
        raise NotConvertible("differs between chunks")
    return present[0] if present else None


def _same_or_empty(values: Sequence[Any]) -> Any:
    return _same([value for value in values if value != ""] or values)


def _once(values: Sequence[Any]) -> Any:
    present = [value for value in values if value is not None]
    if len(present) > 1:
        raise NotConvertible("no rule to join it")
    return present[0] if present else None


def _once_or_empty(values: Sequence[Any]) -> Any:
    """Like `_once`, with empty strings and lists neutral."""
    return _once([value for value in values if value not in ("", [])] or values[:1])


def _first_stamp(values: Sequence[Any]) -> Any:
    return next((value for value in values if value not in (None, Number("0"))), values[0])


def _last_object(values: Sequence[Any]) -> Any:
    return next((value for value in reversed(values) if type(value) is dict), None)


def _joined_text(values: Sequence[Any]) -> Any:
    present = [value for value in values if value is not None]
    if present and all(map(is_text, present)):
        return "".join(present)
    return _once(present)


def _joined_lists(values: Sequence[Any]) -> Any:
    present = [value for value in values if value is not None]
    if present and all(type(value) is list for value in present):
        return [item for value in present for item in value]
    return _once(present)


def _merge(parts: Iterable[Any], rules: Rules, other: Rule) -> Json:
    """Return the objects `parts` merged into one, each field by its rule."""
    fields: dict[str, list[Any]] = {}
    for part in parts:
        if type(part) is not dict:
            raise NotConvertible("not an object")
        for name, value in part.items():
            fields.setdefault(name, []).append(value)
    return {name: rules.get(name, other)(values) for name, values in fields.items()}


def _object(rules: Rules, other: Rule) -> Rule:
    """Return the rule for a field that is an object or null."""

    def merged(values: Sequence[Any]) -> Any:
        present = [value for value in values if value is not None]
        return _merge(present, rules, other) if present else None

    return merged


def _completion_logprobs(values: Sequence[Any]) -> Any:
    """Merge the log probabilities of completions: parallel lists, with offsets from the start of the whole text."""
    present = [value for value in values if value is not None]
    if len(present) < 2:
        return _once(present)
    merged = _merge(present, dict.fromkeys(_COLUMNS, _joined_lists), _once)
    if len({len(column) for column in merged.values() if type(column) is list}) > 1:
        raise NotConvertible("columns of unlike length")
    offsets = [_position(offset) for offset in merged.get("text_offset") or ()]
    if any(later <= earlier for earlier, later in pairwise(offsets)):
        raise NotConvertible("offsets that begin anew")
    return merged


def _calls(values: Sequence[Any]) -> Any:
    """Merge tool calls, which come in pieces with an index."""
    pieces = _joined_lists(values)
    if type(pieces) is not list:
        return pieces
    calls: dict[int, list[Json]] = {}
    for piece in pieces:
        if type(piece) is not dict:
            raise NotConvertible("malformed tool call")
        rest = dict(piece)
        calls.setdefault(_position(rest.pop("index", None)), []).append(rest)
    if sorted(calls) != list(range(len(calls))):
        raise NotConvertible("tool calls missing")
    merged = [_merge(calls[index], _CALL, _once) for index in range(len(calls))]
    for call in merged:
        name, text = CALL_KINDS.get(call.get("type"), ("", ""))
        called = call.get(name)
        if type(called) is not dict or not all(map(is_text, (call.get("id"), called.get("name"), called.get(text)))):
            raise NotConvertible("incomplete tool call")
    return merged


def _legacy_call(values: Sequence[Any]) -> Any:
    call = _object(_FUNCTION, _once)(values)
    if call and not (is_text(call.get("name")) and is_text(call.get("arguments"))):
        raise NotConvertible("incomplete function call")
    return call


def is_text(value: object) -> TypeGuard[str]:
    """Return whether a value is a string and no Number."""
    return type(value) is str


_COLUMNS: Final = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
CALL_KINDS: Final[Mapping[Any, tuple[str, str]]] = {
    "function": ("function", "arguments"),
    "custom": ("custom", "input"),
}
"""A tool call's type -> the member that names the tool, and the field with its text."""

_FUNCTION: Final[Rules] = {"name": _once_or_empty, "arguments": _joined_text}
_CALL: Final[Rules] = {
    "id": _same_or_empty,
    "type": _same_or_empty,
    "function": _object(_FUNCTION, _once),
    "custom": _object({"name": _once_or_empty, "input": _joined_text}, _once),
}
TEXTS: Final[Sequence[str]] = ("reasoning", "reasoning_content", "content", "refusal")
"""The texts of a message, in the order in which they are streamed.

`reasoning_content`: DeepSeek, vLLM, Qwen; `reasoning`: OpenRouter, Groq, Ollama, newer vLLM.
"""

_DELTA: Final[Rules] = dict.fromkeys(TEXTS, _joined_text) | {
    "role": _same_or_empty,
    "tool_calls": _calls,
    "function_call": _legacy_call,
    "annotations": _once_or_empty,
}
LOGPROBS: Final[Rules] = {"content": _joined_lists, "refusal": _joined_lists}
_CHOICE: Final[Rules] = {
    "finish_reason": _same_or_empty,
    "content_filter_results": _object({}, _same),
}
_CHOICES: Final[Mapping[str, Rules]] = {
    "chat": {**_CHOICE, "delta": _object(_DELTA, _once), "logprobs": _object(LOGPROBS, _once)},
    "completions": {**_CHOICE, "text": _joined_text, "logprobs": _completion_logprobs},
}
_TOP: Final[Rules] = {
    "id": _same_or_empty,
    "object": _same_or_empty,
    "created": _first_stamp,
    "model": _same_or_empty,
    "service_tier": _same_or_empty,
    "system_fingerprint": _same_or_empty,
    "usage": _last_object,
    "x_groq": _object({"usage": _last_object}, _same),
}
