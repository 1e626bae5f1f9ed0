"""proxy.cache.convert and proxy.core.assembly: one stored answer in both forms, seen by rules and by the SDK."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import openai
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.cache.completeness import plain_complete
from proxy.cache.convert import plain_from_stream, stream_from_plain
from proxy.cache.stream_audit import StreamAudit
from proxy.protocol.sse import Splitter, data_of

Json = dict[str, Any]

HEAD: Json = {"id": "chatcmpl-1", "created": 1_790_000_000, "model": "gpt-4o-2024-08-06", "service_tier": "default"}
HEAD |= {"system_fingerprint": "fp_1"}
USAGE: Json = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
USAGE |= {"prompt_tokens_details": {"cached_tokens": 3}, "completion_tokens_details": {"reasoning_tokens": 1}}
DONE = b"data: [DONE]\n\n"


def event(data: object) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def chunk(*choices: Json, **fields: Any) -> Json:
    return HEAD | {"object": "chat.completion.chunk", "choices": list(choices), "usage": None} | fields


def part(delta: Json, finish: str | None = None, index: int = 0, **fields: Any) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish} | fields


def sse(*chunks: Json, usage: Json | None = USAGE) -> bytes:
    result = [*chunks, chunk(usage=usage)] if usage is not None else chunks
    return b"".join(map(event, result)) + DONE


def plain(message: Json, finish: str = "stop", usage: Json | None = USAGE, **choice: Any) -> Json:
    result = {"role": "assistant", "content": None, "refusal": None} | message
    return answer({"index": 0, "message": result, "logprobs": None, "finish_reason": finish} | choice, usage=usage)


def answer(*choices: Json, **fields: Any) -> Json:
    return HEAD | {"object": "chat.completion", "choices": list(choices), "usage": USAGE} | fields


def token(text: str, **fields: Any) -> Json:
    return {"token": text, "logprob": -0.25, "bytes": list(text.encode()), "top_logprobs": []} | fields


def told_in(stream: bytes) -> list[Json]:
    events = Splitter().feed(stream)
    return [json.loads(data) for one in events if (data := data_of(one)) is not None and data != b"[DONE]"]


OPENING = part({"role": "assistant", "content": "", "refusal": None})
NO_TEXT = part({"role": "assistant", "content": None, "refusal": None})


def call(name: str, text: str, number: int = 1, **fields: Any) -> Json:
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": text}} | fields


def calling(position: int, **fields: Any) -> Json:
    return part({"tool_calls": [{"index": position, **fields}]})


# What OpenAI and its likes send, in both forms: written by hand, so that neither is made by what is tested.

PAIRS: dict[str, tuple[bytes, Json]] = {
    "content": (
        sse(
            chunk(OPENING, obfuscation="xy1"),
            chunk(part({"content": "Hel"}), obfuscation="z"),
            chunk(part({"content": "lo 🌍"}), obfuscation=""),
            chunk(part({}, "stop"), obfuscation="abc"),
        ),
        plain({"content": "Hello 🌍"}),
    ),
    "tools": (
        sse(
            chunk(NO_TEXT),
            chunk(calling(0, id="call_1", type="function", function={"name": "search", "arguments": ""})),
            chunk(calling(0, function={"arguments": '{"q":'})),
            chunk(calling(1, id="call_2", type="function", function={"name": "now", "arguments": ""})),
            chunk(calling(0, function={"arguments": ' "x"}'}), calling(1, function={"arguments": "{}"})),
            chunk(part({}, "tool_calls")),
        ),
        plain({"tool_calls": [call("search", '{"q": "x"}'), call("now", "{}", 2)]}, "tool_calls"),
    ),
    "tools that repeat themselves": (
        sse(
            chunk(part({"role": "assistant", "content": "", "tool_calls": None})),
            chunk(
                calling(0, id="call_1", type="function", function={"name": "now", "arguments": "{"}),
                calling(0, id="call_1", type="function", function={"name": "", "arguments": None}),
            ),
            chunk(part({"role": "assistant", "tool_calls": [{"index": 0, "id": "", "function": {"arguments": "}"}}]})),
            chunk(part({"tool_calls": []}, "tool_calls")),
        ),
        answer(
            {
                "index": 0,
                "message": {"role": "assistant", "content": "", "tool_calls": [call("now", "{}")]},
                "logprobs": None,
                "finish_reason": "tool_calls",
            }
        ),
    ),
    "custom tool": (
        sse(
            chunk(NO_TEXT),
            chunk(calling(0, id="call_1", type="custom", custom={"name": "sql", "input": ""})),
            chunk(calling(0, custom={"input": "SELECT"})),
            chunk(calling(0, custom={"input": " 1"})),
            chunk(part({}, "tool_calls")),
        ),
        plain(
            {"tool_calls": [{"id": "call_1", "type": "custom", "custom": {"name": "sql", "input": "SELECT 1"}}]},
            "tool_calls",
        ),
    ),
    "legacy function call": (
        sse(
            chunk(part({"role": "assistant", "content": None, "function_call": {"name": "now", "arguments": ""}})),
            chunk(part({"function_call": {"arguments": '{"a"'}})),
            chunk(part({"function_call": {"arguments": ": 1}"}})),
            chunk(part({}, "function_call")),
        ),
        answer(
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "now", "arguments": '{"a": 1}'},
                },
                "logprobs": None,
                "finish_reason": "function_call",
            }
        ),
    ),
    "n=2": (
        sse(
            chunk(OPENING),
            chunk(part({"role": "assistant", "content": "", "refusal": None}, index=1)),
            chunk(part({"content": "B"}, index=1)),
            chunk(part({"content": "A"}), part({"content": "b"}, index=1)),
            chunk(part({}, "stop", index=1)),
            chunk(part({"content": "a"})),
            chunk(part({}, "stop")),
        ),
        answer(
            *(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": text, "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
                for index, text in enumerate(["Aa", "Bb"])
            )
        ),
    ),
    "refusal": (
        sse(
            chunk(part({"role": "assistant", "content": None, "refusal": ""})),
            chunk(part({"refusal": "I can"})),
            chunk(part({"refusal": "not."})),
            chunk(part({}, "stop")),
        ),
        plain({"refusal": "I cannot."}),
    ),
    "logprobs": (
        sse(
            chunk(OPENING),
            chunk(part({"content": "Hel"}, logprobs={"content": [token("Hel")], "refusal": None})),
            chunk(part({"content": "lo"}, logprobs={"content": [token("l"), token("o")], "refusal": None})),
            chunk(part({}, "stop")),
        ),
        plain({"content": "Hello"}, logprobs={"content": [token("Hel"), token("l"), token("o")], "refusal": None}),
    ),
    "logprobs of a refusal": (
        sse(
            chunk(part({"role": "assistant", "content": None, "refusal": ""})),
            chunk(part({"refusal": "No"}, logprobs={"content": None, "refusal": [token("No")]})),
            chunk(part({"refusal": "."}, logprobs={"content": None, "refusal": [token(".")]})),
            chunk(part({}, "stop")),
        ),
        plain({"refusal": "No."}, logprobs={"content": None, "refusal": [token("No"), token(".")]}),
    ),
    "unknown delta fields": (
        sse(
            chunk(
                part(
                    {"role": "assistant", "content": "", "refusal": None, "reasoning_content": None, "x": {"a": [1.0]}},
                    seed=12,
                ),
                provider="P",
            ),
            chunk(part({"reasoning_content": "Let me "}), provider="P"),
            chunk(part({"reasoning_content": "think"}), provider="P"),
            chunk(part({"content": "Yes"}), provider="P"),
            chunk(part({"annotations": [{"type": "url_citation", "url_citation": {"url": "u"}}]}), provider="P"),
            chunk(part({}, "stop", native_finish_reason="end"), provider="P"),
        ),
        plain(
            {
                "content": "Yes",
                "reasoning_content": "Let me think",
                "x": {"a": [1.0]},
                "annotations": [{"type": "url_citation", "url_citation": {"url": "u"}}],
            },
            seed=12,
            native_finish_reason="end",
        )
        | {"provider": "P"},
    ),
    "Azure": (
        sse(
            {"choices": [], "created": 0, "id": "", "model": "", "object": "", "prompt_filter_results": [{"i": 0}]},
            chunk(part({"role": "assistant", "content": "", "refusal": None}, content_filter_results={})),
            chunk(part({"content": "Yes"}, content_filter_results={"hate": {"filtered": False}})),
            chunk(part({"content": "."}, content_filter_results={"hate": {"filtered": False}, "code": {"x": 1}})),
            chunk(part({}, "stop", content_filter_results={})),
        ),
        plain({"content": "Yes."}, content_filter_results={"hate": {"filtered": False}, "code": {"x": 1}})
        | {"prompt_filter_results": [{"i": 0}]},
    ),
    "Groq": (
        sse(
            chunk(OPENING, x_groq={"id": "req_1"}),
            chunk(part({"content": "Yes"})),
            chunk(part({}, "stop"), x_groq={"id": "req_1", "usage": USAGE}),
        ),
        plain({"content": "Yes"}) | {"x_groq": {"id": "req_1", "usage": USAGE}},
    ),
    "usage beside the choices, creation restamped, chunks without role or content": (
        sse(
            chunk(part({"tool_calls": [{"index": 0, **call("now", "{}")}]}), created=7),
            chunk(part({}, "tool_calls"), created=8, usage=USAGE),
            usage=None,
        ),
        answer(
            {
                "index": 0,
                "message": {"role": "assistant", "content": None, "tool_calls": [call("now", "{}")]},
                "logprobs": None,
                "finish_reason": "tool_calls",
            },
            created=7,
        ),
    ),
}

ENVELOPE_OF_TEXT: Json = {"id": "cmpl-1", "object": "text_completion", "created": 5, "model": "gpt-3.5-turbo-instruct"}


def text_chunk(text: str, finish: str | None = None, index: int = 0, logprobs: Json | None = None) -> Json:
    choice = {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish}
    return ENVELOPE_OF_TEXT | {"choices": [choice]}


def text_sse(*chunks: Json) -> bytes:
    return b"".join(map(event, [*chunks, ENVELOPE_OF_TEXT | {"choices": [], "usage": USAGE}])) + DONE


def columns(tokens: Sequence[str], offsets: Sequence[int]) -> Json:
    return {"tokens": tokens, "token_logprobs": [-0.5 for _ in tokens], "top_logprobs": None, "text_offset": offsets}


TEXT_PAIRS: dict[str, tuple[bytes, Json]] = {
    "text": (
        text_sse(text_chunk("one"), text_chunk(" two"), text_chunk("", "stop")),
        text_chunk("one two", "stop") | {"usage": USAGE},
    ),
    "n=2": (
        text_sse(text_chunk("a"), text_chunk("b", "stop", 1), text_chunk("A", "stop")),
        ENVELOPE_OF_TEXT
        | {"choices": [*text_chunk("aA", "stop")["choices"], *text_chunk("b", "stop", 1)["choices"]], "usage": USAGE},
    ),
    "logprobs": (
        text_sse(
            text_chunk("one two", logprobs=columns(["one", " two"], [10, 13])),
            text_chunk("!", logprobs=columns(["!"], [17])),
            text_chunk("", "stop"),
        ),
        text_chunk("one two!", "stop", logprobs=columns(["one", " two", "!"], [10, 13, 17])) | {"usage": USAGE},
    ),
}


def dump(document: Json) -> bytes:
    return json.dumps(document, ensure_ascii=False, indent=1).encode()


def back(endpoint: str, request: Json, document: Json) -> bytes | None:
    """Plain to stream to plain."""
    made = stream_from_plain(endpoint, request, dump(document))
    assert made is not None
    return plain_from_stream(endpoint, request, made[0])


class TestPlainFromStream:
    @pytest.mark.parametrize("name", PAIRS)
    def test_chat(self, name: str) -> None:
        stream, expected = PAIRS[name]
        made = plain_from_stream("chat", {}, stream)
        assert made is not None
        assert json.loads(made) == expected
        assert plain_complete("chat", {}, json.loads(made)) is None

    @pytest.mark.parametrize("name", TEXT_PAIRS)
    def test_completions(self, name: str) -> None:
        stream, expected = TEXT_PAIRS[name]
        made = plain_from_stream("completions", {}, stream)
        assert made is not None
        assert json.loads(made) == expected

    def test_events_and_bytes_give_the_same_response(self) -> None:
        stream, _ = PAIRS["tools"]
        assert plain_from_stream("chat", {}, Splitter().feed(stream)) == plain_from_stream("chat", {}, stream)

    def test_comments_event_names_and_line_ends_do_not_matter(self) -> None:
        stream, expected = PAIRS["content"]
        odd = b": ping\r\n\r\n" + stream.replace(b"\n\n", b"\r\n\r\n").replace(b"data: ", b"data:") + b"\n"
        made = plain_from_stream("chat", {}, odd)
        assert made is not None
        assert json.loads(made) == expected

    def test_numbers_keep_their_spelling(self) -> None:
        odd = b'{"prompt_tokens":9,"total_tokens":9,"x":[1.0,1e2,-0,0.1234567890123456789,123456789012345678901234]}'
        stream = b"".join(
            [
                event(chunk(OPENING)),
                event(chunk(part({"content": "1"}, "stop"))),
                event(chunk(usage={"x": 1})).replace(b'{"x": 1}', odd),
                DONE,
            ]
        )
        made = plain_from_stream("chat", {}, stream)
        assert made is not None
        assert odd in made

    def test_fields_are_in_the_order_of_a_plain_response(self) -> None:
        made = json.loads(plain_from_stream("chat", {}, PAIRS["content"][0]) or b"")
        assert list(made)[:5] == ["id", "object", "created", "model", "choices"]
        assert list(made["choices"][0]) == ["index", "message", "logprobs", "finish_reason"]

    @pytest.mark.parametrize(
        ("chunks", "why"),
        [
            ([chunk(part({"x": "a"})), chunk(part({"x": "b", "content": "c"}, "stop"))], "an unknown field, twice"),
            ([chunk(part({"x": "a"})), chunk(part({"x": "a", "content": "c"}, "stop"))], "even if it is the same"),
            ([chunk(part({"content": "a"}, y=1)), chunk(part({}, "stop", y=2))], "an unknown field of a choice"),
            ([chunk(part({"content": "a"}), z="1"), chunk(part({}, "stop"), z=1)], "top level, text and number"),
            ([chunk(part({"content": "a"}), z=1), chunk(part({}, "stop"), z=1.0)], "top level, other spelling"),
            ([chunk(part({"content": "a"})), chunk(part({}, "stop"), model="m")], "another model"),
            ([chunk(part({"content": "a"})), chunk(part({}, "stop"), object="x")], "another object"),
            ([chunk(part({"content": "a"}, "stop"), object="chat.completion")], "no chunks"),
            ([chunk(part({"content": "a"}, "stop", message={"content": "a"}))], "a message and a delta"),
            ([chunk(part({"content": "a"}, "stop")), chunk(part({}, "length"))], "two finishes"),
            ([chunk(part({"content": "a"})), chunk(part({"content": ["b"]}, "stop"))], "text and parts"),
            ([chunk(part({"content": "a"}, logprobs={"content": 1}), part({}, "stop", logprobs={"content": []}))], "1"),
            ([chunk(part({"content": "a", "annotations": [1]})), chunk(part({"annotations": [1]}, "stop"))], "twice"),
            ([chunk(part({"role": "a", "content": "a"})), chunk(part({"role": "b"}, "stop"))], "two roles"),
            ([chunk(part({"content": "a"}), part({}, "stop", index=2))], "a choice is missing"),
            ([chunk({"index": 0, "delta": "a", "finish_reason": "stop"})], "a delta that is text"),
            ([chunk({"index": "0", "delta": {"content": "a"}, "finish_reason": "stop"})], "an index that is text"),
            ([chunk({"index": 1.0, "delta": {"content": "a"}, "finish_reason": "stop"})], "an index with a point"),
            ([chunk({"index": -1, "delta": {"content": "a"}, "finish_reason": "stop"})], "a negative index"),
            ([chunk({"index": 10**30, "delta": {"content": "a"}, "finish_reason": "stop"})], "a huge index"),
            ([chunk(part({"content": "a"}, "stop"), choices=[1])], "choices that are none"),
            ([chunk(part({"content": "a"}, "stop"), choices=True)], "choices that are true"),
            ([chunk(part({"content": "a"}))], "no finish"),
            ([chunk({"index": 0, "finish_reason": "stop"})], "nothing said"),
            ([chunk(part({"content": "a"}, "length"))], "cut"),
            ([chunk(part({"content": "a"}, "stop"), error={"message": "m"})], "an error"),
            ([chunk(calling(0, **call("f", "{}")), part({"function_call": {"name": "f"}}, "stop"))], "no arguments"),
            ([chunk(calling(1, **call("f", "{}")), part({}, "stop"))], "the first tool call is missing"),
            ([chunk(calling(0, **call("f", "{}")), calling(0, **call("f", "", 2)), part({}, "stop"))], "two ids"),
            ([chunk(calling(0, **call("f", "{}")), calling(0, **call("f", "")), part({}, "stop"))], "name told twice"),
            ([chunk(calling(0, **call("f", "{}", x=1)), calling(0, x=1), part({}, "stop"))], "unknown, twice"),
            ([chunk(calling(0, function={"name": "f", "arguments": "{}"}), part({}, "stop"))], "no id, no type"),
            ([chunk(calling(0, id="c", type="function", function={"name": "f"}), part({}, "stop"))], "no arguments"),
            ([chunk(calling(0, id="c", type="odd", odd={"name": "f"}), part({}, "stop"))], "unknown kind of call"),
            ([chunk(calling(0, id="c", type=["odd"]), part({}, "stop"))], "no kind of call"),
            ([chunk(part({"tool_calls": [call("f", "{}")]}, "stop"))], "a tool call without index"),
            ([chunk(part({"tool_calls": [1]}, "stop"))], "a tool call that is none"),
            ([chunk(part({"tool_calls": {"0": 1}}, "stop")), chunk(part({"tool_calls": []}))], "calls that are none"),
            ([chunk(part({"content": "a", "tool_calls": "x"}, None), y=[1]), chunk(part({}), y=[2])], "lists"),
        ],
    )
    def test_uncertain(self, chunks: list[Json], why: str) -> None:
        assert plain_from_stream("chat", {}, sse(*chunks)) is None, why

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            (columns(["a"], [0]), columns(["b"], [0])),
            (columns(["a"], [0]), columns(["b"], [])),
            (columns(["a"], [0]), columns(["b"], [1]) | {"top_logprobs": [{}]}),
            (columns(["a"], [0]), {"x": 1} | columns(["b"], [1]) | {"text_offset": ["1"]}),
        ],
    )
    def test_differing_logprobs_are_not_converted(self, first: Json, second: Json) -> None:
        stream = text_sse(text_chunk("a", logprobs=first), text_chunk("b", "stop", logprobs=second))
        assert plain_from_stream("completions", {}, stream) is None

    def test_a_stream_without_usage_is_not_converted(self) -> None:
        assert plain_from_stream("chat", {}, sse(chunk(part({"content": "a"}, "stop")), usage=None)) is None

    def test_the_request_decides_whether_a_length_stop_is_complete(self) -> None:
        stream = sse(chunk(part({"content": "a"}, "length")))
        assert plain_from_stream("chat", {"max_tokens": 1}, stream) is not None
        assert plain_from_stream("chat", {"max_tokens": 1, "n": 2}, stream) is None

    @pytest.mark.parametrize(
        "stream",
        [
            b"",
            DONE,
            b"data: {\n\n" + DONE,
            b"data: 1\n\n" + DONE,
            b"data: \xff\n\n" + DONE,
            b"data: " + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"\n\n" + DONE,
            PAIRS["content"][0][: -len(DONE)],
            PAIRS["content"][0] + b"data: [DO",
            PAIRS["content"][0].replace(b'"Hel"', b'"Hel", "content": "Hel"'),
            PAIRS["content"][0].replace(b'"Hel"', b"NaN"),
            PAIRS["content"][0].replace(b'"Hel"', b'"\\ud83d"'),
        ],
    )
    def test_incomplete_streams_are_not_converted(self, stream: bytes) -> None:
        assert plain_from_stream("chat", {}, stream) is None

    @pytest.mark.parametrize("depth", [40, 100, 990, 1200, 5000])
    def test_dropped_fields_obey_the_depth_limit(self, depth: int) -> None:
        """On every version of Python."""
        padding = b'{"obfuscation":' + b"[" * depth + b"]" * depth + b","
        streams = {"chat": PAIRS["tools"][0], "responses": response_events(json.dumps(RESPONSE).encode())}
        for endpoint, stream in streams.items():
            assert plain_from_stream(endpoint, {}, stream) is not None
            found = plain_from_stream(endpoint, {}, stream.replace(b"{", padding, 1))
            assert (found is not None) == (depth == 40)

    @pytest.mark.parametrize("endpoint", ["embeddings", "moderations", "x"])
    def test_other_endpoints_are_not_converted(self, endpoint: str) -> None:
        assert plain_from_stream(endpoint, {}, PAIRS["content"][0]) is None
        assert stream_from_plain(endpoint, {}, dump(PAIRS["content"][1])) is None


ITEM: Json = {
    "id": "msg_1",
    "type": "message",
    "status": "completed",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "Hi", "annotations": []}],
}
RESPONSE: Json = {"id": "resp_1", "object": "response", "status": "completed", "model": "m", "output": [ITEM]}
RESPONSE |= {"usage": {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}, "created_at": 1, "x": [1.0]}


def response_events(spelling: bytes) -> bytes:
    created = {"type": "response.created", "sequence_number": 0, "response": RESPONSE | {"output": [], "usage": None}}
    added = {"type": "response.output_item.added", "output_index": 0, "item": ITEM | {"content": []}}
    done = {"type": "response.output_item.done", "output_index": 0, "item": ITEM}
    named = [b"event: x\n" + event(one) for one in (created, added, done)]
    end = b'data: {"type":"response.completed","sequence_number":3,"response": %b }\n\n' % spelling
    return b"".join(named) + end


class TestResponses:
    def test_a_completed_response_is_taken_byte_for_byte(self) -> None:
        spelling = json.dumps(RESPONSE, indent=None, separators=(" ,", ": ")).replace("1.0", "1.00e0").encode()
        assert plain_from_stream("responses", {}, response_events(spelling)) == spelling
        assert plain_from_stream("responses", {}, response_events(spelling) + DONE) == spelling

    @pytest.mark.parametrize(
        "response",
        [
            RESPONSE | {"output": []},
            RESPONSE | {"output": None},
            RESPONSE | {"output": [ITEM, ITEM]},
            RESPONSE | {"output": 1},
            RESPONSE | {"usage": None},
            RESPONSE | {"status": "incomplete"},
            {},
        ],
    )
    def test_incomplete_responses_are_not_converted(self, response: Json) -> None:
        assert plain_from_stream("responses", {}, response_events(json.dumps(response).encode())) is None

    @pytest.mark.parametrize("stream", [b"", DONE, b"data: [1]\n\n", b'data: {"type":1}\n\n', response_events(b"1")])
    def test_streams_without_a_completed_response_are_not_converted(self, stream: bytes) -> None:
        assert plain_from_stream("responses", {}, stream) is None

    def test_a_plain_responses_object_is_not_converted_to_a_stream(self) -> None:
        assert stream_from_plain("responses", {}, dump(RESPONSE)) is None


class TestStreamFromPlain:
    def test_a_plain_response_becomes_the_chunks_of_openai(self) -> None:
        made = stream_from_plain("chat", {}, dump(plain({"content": "Hello! How are you?"})))
        assert made is not None
        chunks = told_in(made[0])
        assert [chunk["choices"][0]["delta"] for chunk in chunks[:-1]] == [
            {"role": "assistant", "content": "", "refusal": None},
            {"content": "Hello! H"},
            {"content": "ow are y"},
            {"content": "ou?"},
            {},
        ]
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, None, None, "stop"]
        assert all(chunk.items() >= (HEAD | {"object": "chat.completion.chunk"}).items() for chunk in chunks)
        assert chunks[-1] == HEAD | {"object": "chat.completion.chunk", "choices": [], "usage": USAGE}
        assert made[0].endswith(b"}\n\ndata: [DONE]\n\n")

    @pytest.mark.parametrize("name", PAIRS)
    def test_the_stream_is_complete_and_its_usage_span_correct(self, name: str) -> None:
        made = stream_from_plain("chat", {}, dump(PAIRS[name][1]))
        assert made is not None
        stream, span = made
        assert span is not None
        for served, expected in ((stream, span), (stream[: span[0]] + stream[span[1] :], None)):
            audit = StreamAudit("chat", {})
            for one in Splitter().feed(served):
                audit.event(one)
            assert audit.reason_not_stored() is None
            assert audit.usage_span == expected
        assert told_in(stream[slice(*span)]) == [told_in(stream)[-1]]

    @pytest.mark.parametrize(
        ("endpoint", "document"),
        [("chat", pair[1]) for pair in PAIRS.values()] + [("completions", pair[1]) for pair in TEXT_PAIRS.values()],
    )
    def test_there_and_back(self, endpoint: str, document: Json) -> None:
        assert json.loads(back(endpoint, {}, document) or b"") == document

    def test_a_text_without_a_logprobs_field(self) -> None:
        choice = {"text": "one two three", "index": 0, "finish_reason": "stop", "x": 1}
        document = ENVELOPE_OF_TEXT | {"choices": [choice], "usage": USAGE}
        assert json.loads(back("completions", {}, document) or b"") == document

    @pytest.mark.parametrize("absent", [{}, {"usage": None}])
    def test_a_response_without_usage(self, absent: Json) -> None:
        document = {name: value for name, value in plain({"content": "a"}).items() if name != "usage"} | absent
        made = stream_from_plain("chat", {}, dump(document))
        assert made is not None
        assert made[1] is None
        assert b"total_tokens" not in made[0]

    def test_a_long_text_becomes_few_chunks(self) -> None:
        made = stream_from_plain("chat", {}, dump(plain({"content": "ä" * 100_000})))
        assert made is not None
        assert 60 < len(told_in(made[0])) < 70

    def test_a_text_with_logprobs_becomes_one_chunk_a_token(self) -> None:
        made = stream_from_plain("chat", {}, dump(PAIRS["logprobs"][1]))
        assert made is not None
        result = [(chunk["choices"] or [{}])[0] for chunk in told_in(made[0])]
        assert [choice["delta"]["content"] for choice in result[1:4]] == ["Hel", "l", "o"]
        assert [choice["logprobs"]["content"][0]["token"] for choice in result[1:4]] == ["Hel", "l", "o"]

    def test_a_tool_call_with_its_own_index(self) -> None:
        message = {"tool_calls": [call("f", "{}", index=0), call("g", "{}", 2, index=1)]}
        assert stream_from_plain("chat", {}, dump(plain(message, "tool_calls"))) is not None

    @pytest.mark.parametrize(
        "logprobs",
        [
            {"content": []},
            {"content": [token("x")], "refusal": []},
            {"content": [token("y")]},
            {"content": [1, token("x")]},
            {"refusal": None},
            {},
        ],
    )
    def test_logprobs_that_do_not_match_the_text_are_not_converted(self, logprobs: Json) -> None:
        document = plain({"content": "x"}, logprobs=logprobs)
        assert json.loads(back("chat", {}, document) or b"") == document

    @pytest.mark.parametrize(
        ("document", "why"),
        [
            (plain({"tool_calls": [call("f", "{}", index=1)]}, "tool_calls"), "a wrong index"),
            (plain({"tool_calls": [call("f", "{}", index=0), call("g", "{}")]}, "tool_calls"), "one index"),
            (plain({"tool_calls": [{"id": "c", "type": "odd"}]}, "tool_calls"), "unknown kind of call"),
            (plain({"tool_calls": [{"id": "c", "type": "function"}]}, "tool_calls"), "nothing called"),
            (plain({"tool_calls": ["c"]}, "tool_calls"), "a call that is none"),
            (plain({"tool_calls": {"0": "c"}}, "tool_calls"), "calls that are none"),
            (plain({"tool_calls": 17}, "tool_calls"), "calls that are a number"),
            (plain({"function_call": {"name": "f"}}, "function_call"), "no arguments"),
            (plain({"function_call": {"arguments": "{}"}}, "function_call"), "no name"),
            (plain({"function_call": "f"}, "function_call"), "a function that is none"),
            (plain({"content": "x", "details": [{"index": 1}]}), "a list the SDK would put elsewhere"),
            (plain({"content": "x", "details": [{"index": 0}, 1]}), "a list it does not take"),
            (plain({"content": "x"}, logprobs={"content": [], "x": 1}), "logprobs the SDK ignores"),
            (plain({"content": "x"}, logprobs=7), "logprobs that are none"),
            (plain({"content": "x"}, delta={"y": 1}), "a field of that name"),
            (plain({"content": "x"}) | {"obfuscation": "x"}, "what a stream drops"),
            (plain({"content": "x"}) | {"usage": 7}, "usage that is none"),
            (plain({"content": "x"}) | {"object": "x"}, "another object"),
            (plain({"content": "x"}) | {"choices": []}, "no choices"),
            (plain({"content": "x"}, index=1), "the wrong choice"),
            (plain({"content": "x"}, "content_filter"), "not whole"),
            (plain({"content": "x"}) | {"error": {"message": "m"}}, "an error"),
            ({"object": "chat.completion", "choices": PAIRS["n=2"][1]["choices"][::-1]}, "an order that is lost"),
        ],
    )
    def test_uncertain(self, document: Json, why: str) -> None:
        assert stream_from_plain("chat", {}, dump(document)) is None, why

    @pytest.mark.parametrize(
        "body", [b"", b"[]", b"{}", b"\xff", b'{"choices":1}', dump(plain({"content": "x"})).replace(b"9", b"9,9:1")]
    )
    def test_invalid_responses_are_not_converted(self, body: bytes) -> None:
        assert stream_from_plain("chat", {}, body) is None

    @pytest.mark.parametrize("text", [{"a": None}, [], ["x"], 7])
    def test_text_of_another_type_is_not_converted(self, text: object) -> None:
        document = json.loads(dump(TEXT_PAIRS["text"][1]))
        assert stream_from_plain("completions", {}, dump(document)) is not None
        document["choices"][0]["text"] = text
        assert stream_from_plain("completions", {}, dump(document)) is None

    def test_responses_with_duplicate_keys_are_not_converted(self) -> None:
        body = dump(plain({"content": "x"})).replace(b'"content": "x"', b'"content": "y", "content": "x"')
        assert stream_from_plain("chat", {}, body) is None


# Any complete answer.

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "type"]), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=60)
UNKNOWN = st.dictionaries(st.sampled_from(["x_a", "x_b", "x c"]), VALUES, max_size=2)
CALL_FIELDS = st.sampled_from(["x_extra", "zz"])


@st.composite
def tool_calls(draw: st.DrawFn) -> list[Json]:
    calls: list[Json] = []
    for number in range(draw(st.integers(1, 3))):
        kind, text = draw(st.sampled_from([("function", "arguments"), ("custom", "input")]))
        called = {"name": draw(TEXT), text: draw(st.text(st.characters(codec="utf-8"), max_size=60))}
        calls.append({"id": f"call_{number}", "type": kind, kind: called} | draw(UNKNOWN))
    return calls


@st.composite
def tokens_of(draw: st.DrawFn, text: str) -> Json:
    cuts = sorted({0, len(text), *draw(st.lists(st.integers(0, len(text)), max_size=3))})
    tokens = [token(text[start:end]) for start, end in pairwise(cuts)]
    return {"content": tokens, "refusal": draw(st.sampled_from([None, []]))}


@st.composite
def choices_of(draw: st.DrawFn, index: int) -> Json:
    message: Json = {"role": "assistant", "content": draw(st.none() | TEXT)}
    message |= draw(st.fixed_dictionaries({}, optional={"reasoning": TEXT, "reasoning_content": TEXT, "refusal": TEXT}))
    message |= draw(
        st.fixed_dictionaries(
            {},
            optional={
                "tool_calls": tool_calls() | st.just([]) | st.none(),
                "annotations": st.just([]) | st.just([{"type": "url_citation"}, {"type": "x"}]),
                "function_call": st.none() | st.just({"name": "f", "arguments": "{}", "x": 1}),
                "audio": st.none(),
            },
        )
    )
    message |= draw(UNKNOWN)
    if not any(message.get(name) for name in ("content", "refusal", "tool_calls", "function_call")):
        message["content"] = "x"
    choice: Json = {"index": index, "message": message, "finish_reason": "stop"}
    if draw(st.booleans()):
        choice["logprobs"] = draw(st.none() | tokens_of(message["content"] or ""))
    return choice | draw(UNKNOWN)


@st.composite
def answers(draw: st.DrawFn) -> Json:
    count = draw(st.integers(1, 3))
    result = answer(*(draw(choices_of(index)) for index in range(count)), usage=USAGE | draw(UNKNOWN))
    return result | draw(UNKNOWN) | draw(st.fixed_dictionaries({}, optional={"system_fingerprint": st.none()}))


class TestAnyAnswer:
    @given(answers())
    @settings(max_examples=100)
    def test_there_and_back(self, document: Json) -> None:
        assert json.loads(back("chat", {}, document) or b"") == document

    @given(st.data())
    @settings(max_examples=100)
    def test_any_stream_is_converted_exactly_or_not_at_all(self, data: st.DataObject) -> None:
        """A value anywhere in the chunks replaced by any other: an answer, or None."""
        stream, _ = data.draw(st.sampled_from(list(PAIRS.values())))
        chunks = told_in(stream)
        _replace(data, chunks[data.draw(st.integers(0, len(chunks) - 1))])
        made = plain_from_stream("chat", {}, b"".join(map(event, chunks)) + DONE)
        assert made is None or plain_complete("chat", {}, json.loads(made)) is None

    @given(st.data())
    @settings(max_examples=100)
    def test_any_change_of_a_plain_response_shows_in_the_stream_or_prevents_it(self, data: st.DataObject) -> None:
        endpoint = data.draw(st.sampled_from(["chat", "completions"]))
        pairs = PAIRS if endpoint == "chat" else TEXT_PAIRS
        document = json.loads(json.dumps(data.draw(st.sampled_from(list(pairs.values())))[1]))
        _replace(data, document)
        made = stream_from_plain(endpoint, {}, dump(document))
        if made is not None and made[1] is not None:
            again = json.loads(plain_from_stream(endpoint, {}, made[0]) or b"")
            assert _bare(again) == _bare(document)


def _replace(data: st.DataObject, document: Any) -> None:
    while True:
        names = list(document) if isinstance(document, dict) else list(range(len(document)))
        name = data.draw(st.sampled_from(names))
        if not isinstance(document[name], dict | list) or not document[name] or data.draw(st.integers(0, 3)) == 0:
            document[name] = data.draw(VALUES)
            return
        document = document[name]


def _bare(value: Any) -> Any:
    """Without what the two forms have or lack by their nature: null members, and the index of a tool call."""
    if isinstance(value, list):
        return [_bare(item) for item in value]
    if not isinstance(value, dict):
        return value
    is_call = "function" in value or "custom" in value
    left_out = {"parsed", "parsed_arguments"} | ({"index"} if is_call else set())
    return {name: _bare(item) for name, item in value.items() if item is not None and name not in left_out}


# What the official SDK makes of them.


@dataclass(frozen=True, slots=True)
class Sdk:
    """The official client in front of a server that answers with `bodies`: plain or streamed, as asked."""

    client: openai.OpenAI
    bodies: dict[str, bytes]

    def read(self, plain: bytes | None, stream: bytes | None, how: str) -> Json:
        """The answer as the SDK assembles it."""
        self.bodies.clear()
        self.bodies.update({name: body for name, body in (("plain", plain), ("stream", stream)) if body is not None})
        asked: Any = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
        if how == "plain":
            read: Any = self.client.chat.completions.create(**asked)
        else:
            with self.client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as events:
                # Not get_final_completion, which fails on custom tools and turns [] into null.
                read = events.until_done().current_completion_snapshot
        bare = _bare(read.model_dump(warnings=False))
        assert isinstance(bare, dict)
        return bare


@pytest.fixture(scope="module")
def sdk() -> Iterator[Sdk]:
    bodies: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            form, kind = ("stream", "text/event-stream") if asked.get("stream") else ("plain", "application/json")
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(bodies[form])))
            self.end_headers()
            self.wfile.write(bodies[form])

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        own = openai.DefaultHttpxClient(trust_env=False)
        address = f"http://127.0.0.1:{server.server_port}/v1"
        with openai.OpenAI(api_key="k", base_url=address, max_retries=0, http_client=own) as client:
            yield Sdk(client, bodies)
        server.shutdown()
        thread.join()


MATRIX = ["content", "tools", "n=2", "refusal", "logprobs", "unknown delta fields", "logprobs of a refusal"]
MATRIX += ["legacy function call", "custom tool", "Azure", "Groq"]


@pytest.mark.slow
class TestWithTheSdk:
    @pytest.mark.parametrize("read_as", ["plain", "stream"])
    @pytest.mark.parametrize("stored_as", ["plain", "stream"])
    @pytest.mark.parametrize("name", MATRIX)
    def test_the_sdk_reads_the_same_from_every_form(self, sdk: Sdk, name: str, stored_as: str, read_as: str) -> None:
        stream, document = PAIRS[name]
        if stored_as == "plain":
            made = stream_from_plain("chat", {}, dump(document))
            assert made is not None
            read = sdk.read(dump(document), made[0], read_as)
        else:
            read = sdk.read(plain_from_stream("chat", {}, stream), stream, read_as)
        if stored_as == read_as == "stream" and name in ("unknown delta fields", "Azure", "Groq"):
            # Of the provider's own stream the SDK's accumulator drops what comes in a later chunk than the first.
            read["choices"] = _bare(document["choices"])
            for late in ("prompt_filter_results", "x_groq"):
                read |= {late: document[late]} if late in document else {}
            read |= {field: document[field] for field in ("id", "created", "model", "service_tier")}
        assert read == _bare(document)

    @given(answers())
    @settings(max_examples=25)
    @example(plain({"content": "x", "details": [{"index": 0, "text": "a"}, {"index": 1, "text": "b"}]}))
    @example(plain({"content": "x"}, logprobs={"content": [token("y")], "refusal": [token("z")]}))
    def test_the_sdk_assembles_any_plain_response_from_its_stream(self, sdk: Sdk, document: Json) -> None:
        made = stream_from_plain("chat", {}, dump(document))
        assert made is not None
        assert sdk.read(dump(document), made[0], "stream") == sdk.read(dump(document), made[0], "plain")

    def test_without_the_usage_chunk(self, sdk: Sdk) -> None:
        document = plain({"content": "Hello"})
        made = stream_from_plain("chat", {}, dump(document))
        assert made is not None
        assert made[1] is not None
        start, end = made[1]
        read = sdk.read(None, made[0][:start] + made[0][end:], "stream")
        assert read == _bare(document | {"usage": None})

    def test_completions(self, sdk: Sdk) -> None:
        for stream, document in TEXT_PAIRS.values():
            made = stream_from_plain("completions", {}, dump(document))
            assert made is not None
            for served in (stream, made[0]):
                sdk.bodies["stream"] = served
                texts: dict[int, str] = {}
                for one in sdk.client.completions.create(model="m", prompt="?", stream=True):
                    for choice in one.choices:
                        texts[choice.index] = texts.get(choice.index, "") + choice.text
                assert texts == {choice["index"]: choice["text"] for choice in document["choices"]}

    def test_responses(self, sdk: Sdk) -> None:
        stream = response_events(json.dumps(RESPONSE).encode())
        sdk.bodies.update(stream=stream, plain=plain_from_stream("responses", {}, stream) or b"")
        read = sdk.client.responses.create(model="m", input="?")
        with sdk.client.responses.stream(model="m", input="?") as events:
            streamed = events.get_final_response()
        assert _bare(streamed.model_dump(warnings=False)) == _bare(read.model_dump(warnings=False)) == RESPONSE
