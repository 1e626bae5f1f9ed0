"""proxy.cache.completeness: which requests are cached, and no answer that is not whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cache.completeness import is_deterministic, plain_complete
from proxy.cache.fields import request_bypass
from proxy.cache.stream_audit import StreamAudit
from proxy.protocol.sse import Splitter

Json = dict[str, Any]
ENDPOINTS = ["chat", "completions", "embeddings", "responses", "moderations"]


class TestRequestBypass:
    @pytest.mark.parametrize(
        ("document", "reason"),
        [
            ({"store": True}, "uncacheable: store=true"),
            ({"background": True}, "uncacheable: background=true"),
            ({"conversation": "conv_1"}, "uncacheable: conversation"),
            ({"conversation": {"id": "conv_1"}}, "uncacheable: conversation"),
            ({"web_search_options": {}}, "uncacheable: web_search_options"),
            ({"modalities": ["text", "audio"]}, "uncacheable: audio"),
            ({"audio": {"voice": "alloy", "format": "wav"}}, "uncacheable: audio"),
            ({"tools": [{"type": "web_search"}]}, "uncacheable: tool web_search"),
            ({"tools": [{"type": "web_search_preview_2025_03_11"}]}, "uncacheable: tool web_search"),
            ({"tools": [{"type": "function"}, {"type": "file_search"}]}, "uncacheable: tool file_search"),
            ({"tools": [{"type": "code_interpreter", "container": {}}]}, "uncacheable: tool code_interpreter"),
            ({"tools": [{"type": "computer_use_preview"}]}, "uncacheable: tool computer"),
            ({"tools": [{"type": "mcp", "server_url": "x"}]}, "uncacheable: tool mcp"),
            ({"tools": [{"type": "image_generation"}]}, "uncacheable: tool image_generation"),
            ({"tools": [{"type": "programmatic_tool_calling"}]}, "uncacheable: tool programmatic_tool_calling"),
            ({"tools": [{"type": "shell", "environment": {"type": "container_auto"}}]}, "uncacheable: tool shell"),
            ({"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "mcp"}]}]}, "uncacheable: tool mcp"),
            ({"model": "gpt-4o-search-preview"}, "uncacheable: search model"),
            ({"model": "gpt-4o-mini-search-preview-2025-03-11"}, "uncacheable: search model"),
            ({"model": "gpt-5-search-api"}, "uncacheable: search model"),
            ({"model": "o4-mini-deep-research"}, "uncacheable: search model"),
            ({"model": "perplexity/sonar-pro"}, "uncacheable: search model"),
            ({"model": "groq/compound-mini"}, "uncacheable: search model"),
            ({"model": "openai/gpt-4o:online"}, "uncacheable: search model"),
            ({"search_parameters": {"mode": "auto"}}, "uncacheable: search_parameters"),
            ({"enable_search": True}, "uncacheable: enable_search"),
            ({"plugins": [{"id": "web", "max_results": 3}]}, "uncacheable: plugins"),
        ],
    )
    def test_requests_that_are_not_cached(self, document: Json, reason: str) -> None:
        assert request_bypass("chat", document) == reason
        if "store" not in document:
            assert request_bypass("responses", document) == reason

    @pytest.mark.parametrize("endpoint", ENDPOINTS)
    @pytest.mark.parametrize(
        "document",
        [
            {},
            {"store": False, "background": False, "conversation": None, "web_search_options": None, "audio": None},
            {"store": None, "modalities": ["text"], "tools": []},
            {"modalities": None, "tools": None},
            {"modalities": "audio", "tools": {"type": "mcp"}},
            {"tools": [{"type": "function", "function": {"name": "web_search"}}, {"type": "custom"}]},
            {"tools": [None, "mcp", {"type": 1}, {}]},
            {
                "tools": [
                    {"type": "shell"},
                    {"type": "shell", "environment": {"type": "local"}},
                    {"type": "local_shell"},
                ]
            },
            {"tools": [{"type": "namespace", "tools": [{"type": "function"}]}, {"type": "apply_patch"}]},
            {"input": [{"type": "additional_tools", "tools": [{"type": "function"}]}, "mcp", None, 5]},
            {"previous_response_id": "resp_1"},
            {"model": "gpt-4o", "enable_search": False, "search_parameters": {"mode": "off"}},
            {"model": "my-search-bot", "plugins": [{"id": "file-parser"}, "web"], "search_parameters": "on"},
            {"model": "gpt-4o-search-preview" + "x" * 300},
            {"metadata": {"store": True}, "messages": [{"role": "user", "content": "web_search_options"}]},
            {"seed": 1, "n": 3, "temperature": 1, "stream": True, "vendor": {}},
        ],
    )
    def test_requests_that_are_cached(self, endpoint: str, document: Json) -> None:
        assert request_bypass(endpoint, document) is None

    @pytest.mark.parametrize("item", ["additional_tools", "tool_search_output"])
    def test_tools_in_the_input_bypass_the_cache(self, item: str) -> None:
        document = {"input": [{"role": "user", "content": "x"}, {"type": item, "tools": [{"type": "web_search"}]}]}
        assert request_bypass("responses", document) == "uncacheable: tool web_search"

    def test_a_responses_request_with_store_is_cached(self) -> None:
        assert request_bypass("responses", {"store": True}) is None


class TestDeterministic:
    @pytest.mark.parametrize(
        ("document", "expected"),
        [
            ({}, False),
            ({"temperature": 0}, True),
            ({"temperature": 0.0}, True),
            ({"temperature": -0.0}, True),
            ({"temperature": 0.01}, False),
            ({"temperature": 1}, False),
            ({"temperature": None}, False),
            ({"temperature": False}, False),
            ({"temperature": "0"}, False),
            ({"seed": 7}, True),
            ({"seed": 0}, True),
            ({"seed": None}, False),
            ({"temperature": 1, "seed": 7}, True),
        ],
    )
    def test_deterministic_chat_requests(self, document: Json, expected: bool) -> None:
        assert is_deterministic("chat", document) is expected
        assert is_deterministic("embeddings", document)
        assert is_deterministic("moderations", document)


def chat(*choices: Json, **fields: Any) -> Json:
    return {"id": "c", "object": "chat.completion", "model": "gpt-4o", "choices": list(choices), **fields}


def choice(index: int = 0, finish: Any = "stop", **message: Any) -> Json:
    return {"index": index, "message": {"role": "assistant", **(message or {"content": "hi"})}, "finish_reason": finish}


def text_choice(index: int = 0, finish: Any = "stop", text: str = "hi") -> Json:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


TOOL_CALLS = [{"id": "t", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


class TestPlainChat:
    @pytest.mark.parametrize(
        ("request_", "answer"),
        [
            ({}, chat(choice())),
            ({}, chat(choice(), error=None, model="other", service_tier="default", vendor=1)),
            ({}, chat(choice(content=None, tool_calls=TOOL_CALLS, finish="tool_calls"))),
            ({}, chat(choice(content="", function_call={"name": "f"}, finish="function_call"))),
            ({}, chat(choice(content=None, refusal="No."))),
            ({}, chat(choice(content=[{"type": "text", "text": "x"}]))),
            ({}, chat(choice(), choice(1))),
            ({"n": 2}, chat(choice(1), choice(0))),
            ({"n": 1}, chat(choice())),
            ({"n": None}, chat(choice())),
            ({"n": "2"}, chat(choice())),
            ({"n": True}, chat(choice())),
            ({"max_tokens": 5}, chat(choice(finish="length"))),
            ({"max_completion_tokens": 5}, chat(choice(finish="length"))),
            ({}, chat({"message": {"content": "no index"}, "finish_reason": "stop"})),
        ],
    )
    def test_whole(self, request_: Json, answer: Json) -> None:
        assert plain_complete("chat", request_, answer) is None

    @pytest.mark.parametrize(
        ("request_", "answer", "reason"),
        [
            ({}, [], "not an object"),
            ({}, None, "not an object"),
            ({}, {}, "no choices"),
            ({}, {"choices": None}, "no choices"),
            ({}, chat(), "no choices"),
            ({}, {"error": {"message": "quota exceeded"}}, "error"),
            ({}, chat(choice(), error={"message": "x"}), "error"),
            ({}, chat(choice(), error=""), "error"),
            ({}, chat(choice(finish=None)), "no finish_reason"),
            ({}, chat({"index": 0, "message": {"content": "x"}}), "no finish_reason"),
            ({}, chat(choice(finish="length")), "finish_reason length"),
            ({"max_tokens": None}, chat(choice(finish="length")), "finish_reason length"),
            ({"max_output_tokens": 5}, chat(choice(finish="length")), "finish_reason length"),
            ({"max_tokens": 5}, chat(choice(finish="content_filter")), "finish_reason content_filter"),
            ({}, chat(choice(finish="x\r\nSet-Cookie: a")), "finish_reason unknown"),
            ({}, chat(choice(finish="")), "finish_reason unknown"),
            ({}, chat(choice(finish=["stop"])), "malformed choices"),
            ({}, chat(choice(finish=1)), "malformed choices"),
            ({}, chat(choice(), choice(1, finish=None)), "no finish_reason"),
            ({}, chat(choice(content="")), "empty"),
            ({}, chat(choice(content=None)), "empty"),
            ({}, chat(choice(content="", tool_calls=[])), "empty"),
            ({"max_tokens": 1}, chat(choice(content="", finish="length")), "empty"),
            ({}, chat({"index": 0, "message": None, "finish_reason": "stop"}), "empty"),
            ({"n": 2}, chat(choice()), "choices missing"),
            ({"n": 10**12}, chat(choice()), "choices missing"),
            ({"n": 1}, chat(choice(), choice(1)), "choices missing"),
            ({"n": 2}, chat(choice(), choice(2)), "choices missing"),
            ({}, chat(choice(1)), "choices missing"),
            ({}, chat(choice(), choice()), "malformed choices"),
            ({}, chat(choice(-1)), "malformed choices"),
            ({}, chat({"index": "0", "message": {"content": "x"}, "finish_reason": "stop"}), "malformed choices"),
            ({}, {"choices": ["x"]}, "malformed choices"),
        ],
    )
    def test_not_whole(self, request_: Json, answer: Any, reason: str) -> None:
        assert plain_complete("chat", request_, answer) == reason

    def test_unknown_endpoint(self) -> None:
        assert plain_complete("images", {}, chat(choice())) == "unknown endpoint"


class TestPlainCompletions:
    @pytest.mark.parametrize(
        ("request_", "answer", "reason"),
        [
            ({"prompt": "a"}, chat(text_choice()), None),
            ({"prompt": [1, 2, 3]}, chat(text_choice()), None),
            ({"prompt": ["a", "b"]}, chat(text_choice(), text_choice(1)), None),
            ({"prompt": [[1], [2]], "n": 2}, chat(*map(text_choice, range(4))), None),
            ({}, chat(text_choice()), None),
            ({"n": 2}, chat(text_choice(), text_choice(1)), None),
            ({"prompt": ["a", "b"]}, chat(text_choice()), "choices missing"),
            ({"prompt": ["a", "b"], "n": 2}, chat(text_choice(), text_choice(1)), "choices missing"),
            ({"max_tokens": 3}, chat(text_choice(finish="length")), None),
            ({"prompt": "a"}, chat(text_choice(finish="length")), "finish_reason length"),
            ({"prompt": "a"}, chat(text_choice(text="")), "empty"),
            ({"prompt": "a"}, chat(choice()), "empty"),
        ],
    )
    def test_verdict(self, request_: Json, answer: Json, reason: str | None) -> None:
        assert plain_complete("completions", request_, answer) == reason


def embeddings(*indexes: Any, vector: Any = "AAAA") -> Json:
    return {"object": "list", "data": [{"index": i, "embedding": vector} for i in indexes], "model": "m"}


class TestPlainEmbeddings:
    @pytest.mark.parametrize(
        ("input_", "answer", "reason"),
        [
            ("a", embeddings(0), None),
            ("a", embeddings(0, vector=[0.1, 0.2]), None),
            ([1, 2, 3], embeddings(0), None),
            (["a"], embeddings(0), None),
            (["a", "b"], embeddings(0, 1), None),
            (["a", "b"], embeddings(1, 0), None),
            ([[1, 2], [3]], embeddings(0, 1), None),
            ({"odd": 1}, embeddings(0, 1), None),
            ([], embeddings(0), None),
            ("a", embeddings(), "no embeddings"),
            ("a", {"data": None}, "no embeddings"),
            ("a", embeddings(0, 1), "embeddings missing"),
            (["a", "b"], embeddings(0), "embeddings missing"),
            (["a", "b"], embeddings(0, 2), "embeddings missing"),
            (["a", "b"], embeddings(0, 0), "malformed embeddings"),
            ("a", embeddings(None), "malformed embeddings"),
            ("a", embeddings(True), "malformed embeddings"),
            ("a", embeddings(-1), "malformed embeddings"),
            ("a", embeddings(0, vector=[]), "malformed embeddings"),
            ("a", embeddings(0, vector=""), "malformed embeddings"),
            ("a", embeddings(0, vector=None), "malformed embeddings"),
            ("a", {"data": [1]}, "malformed embeddings"),
            ("a", {"data": [{"index": 0, "embedding": [1]}], "error": {"message": "x"}}, "error"),
        ],
    )
    def test_verdict(self, input_: Any, answer: Json, reason: str | None) -> None:
        assert plain_complete("embeddings", {"input": input_}, answer) == reason


MESSAGE = {"type": "message", "status": "completed", "content": [{"type": "output_text", "text": "hi"}]}


def response(*output: Any, status: Any = "completed", **fields: Any) -> Json:
    return {
        "id": "resp_1",
        "object": "response",
        "model": "gpt-4o",
        "status": status,
        "error": None,
        "incomplete_details": None,
        "output": list(output),
        "usage": {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3},
        **fields,
    }


class TestPlainResponses:
    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            (response(MESSAGE), None),
            (response({"type": "reasoning", "summary": []}, MESSAGE), None),
            (response({"type": "function_call", "name": "f", "arguments": "{}", "status": "completed"}), None),
            (response({"type": "custom_tool_call"}), None),
            (response({**MESSAGE, "content": [{"type": "refusal", "refusal": "No."}]}), None),
            (response(MESSAGE, status="incomplete"), "status incomplete"),
            (response(MESSAGE, status="in_progress"), "status in_progress"),
            (response(status="failed", error={"code": "server_error"}), "error"),
            (response(MESSAGE, status=None), "status unknown"),
            (response(MESSAGE, incomplete_details={"reason": "max_output_tokens"}), "incomplete"),
            (response({**MESSAGE, "status": "incomplete"}), "incomplete"),
            (response(), "empty"),
            (response({"type": "reasoning", "summary": ["x"]}), "empty"),
            (response({**MESSAGE, "content": []}), "empty"),
            (response({**MESSAGE, "content": None}), "empty"),
            (response({**MESSAGE, "content": ["x", {"type": "output_text", "text": ""}]}), "empty"),
            (response("x"), "malformed output"),
            (response(MESSAGE, output=None), "no output"),
        ],
    )
    def test_verdict(self, answer: Json, reason: str | None) -> None:
        assert plain_complete("responses", {}, answer) == reason


class TestPlainModerations:
    RESULT: Json = {"flagged": False, "categories": {}}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("input_", "results", "reason"),
        [
            ("a", [RESULT], None),
            (["a", "b"], [RESULT, RESULT], None),
            ([{"type": "text", "text": "a"}, {"type": "image_url"}], [RESULT], None),
            (None, [RESULT], None),
            ("a", [], "no results"),
            ("a", None, "no results"),
            ("a", [{}], "malformed results"),
            ("a", [None], "malformed results"),
            (["a", "b"], [RESULT], "results missing"),
            ("a", [RESULT, RESULT], "results missing"),
        ],
    )
    def test_verdict(self, input_: Any, results: Any, reason: str | None) -> None:
        assert plain_complete("moderations", {"input": input_}, {"id": "m", "results": results}) == reason


@given(
    st.sampled_from(ENDPOINTS),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "choices",
                        "data",
                        "output",
                        "results",
                        "error",
                        "index",
                        "message",
                        "delta",
                        "content",
                        "finish_reason",
                        "status",
                        "usage",
                        "text",
                        "n",
                        "input",
                        "prompt",
                        "embedding",
                        "tools",
                        "modalities",
                        "type",
                        "x_groq",
                        "response",
                    ]
                ),
                inner,
                max_size=5,
            )
        ),
        max_leaves=15,
    ),
)
def test_no_value_raises(endpoint: str, value: Any) -> None:
    request = value if isinstance(value, dict) else {}
    request_bypass(endpoint, request)
    is_deterministic(endpoint, request)
    plain_complete(endpoint, request, value)
    audit = StreamAudit(endpoint, request)
    try:
        audit.event(b"data: " + orjson.dumps(value) + b"\n\n")
    except TypeError:  # orjson knows no integers beyond 64 bits: not what is tested
        return
    audit.event(b"data: [DONE]\n\n")
    audit.reason_not_stored()


# Streams.


def event(document: Any, name: str = "") -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + orjson.dumps(document) + b"\n\n"


def chunk(*choices: Json, **fields: Any) -> bytes:
    return event({"id": "c", "object": "chat.completion.chunk", "model": "gpt-4o", "choices": list(choices), **fields})


def delta(index: int = 0, finish: Any = None, **fields: Any) -> Json:
    return {"index": index, "delta": fields, "logprobs": None, "finish_reason": finish}


DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
START = chunk(delta(role="assistant", content=""))
HI = chunk(delta(content="hi"))
STOP = chunk(delta(finish="stop"))
USAGE_CHUNK = chunk(usage=USAGE)
AZURE_FIRST = event({"choices": [], "id": "", "model": "", "prompt_filter_results": [{}]})
ADVERSARIAL = chunk(delta(content='"finish_reason":"stop"}],"usage":{}, "error":{"x":1}\n\ndata: [DONE]\n\n'))


def audited(stream: bytes, request: Json | None = None, endpoint: str = "chat") -> StreamAudit:
    audit = StreamAudit(endpoint, request or {})
    for each in Splitter().feed(stream):
        audit.event(each)
    return audit


def verdict(stream: bytes, request: Json | None = None, endpoint: str = "chat") -> str | None:
    splitter = Splitter()
    audit = StreamAudit(endpoint, request or {})
    for each in splitter.feed(stream):
        audit.event(each)
    return audit.reason_not_stored(splitter.rest)


class TestChatStream:
    @pytest.mark.parametrize(
        ("request_", "stream"),
        [
            ({}, START + HI + STOP + DONE),
            ({}, START + HI + STOP + USAGE_CHUNK + DONE),
            ({}, AZURE_FIRST + START + HI + STOP + DONE),
            ({}, b": ping\n\n" + START + b": ping\n\n" + HI + STOP + DONE + b": bye\n\n\n"),
            ({}, (START + HI + STOP + DONE).replace(b"\n", b"\r\n")),
            ({}, (START + HI + STOP + DONE).replace(b'":', b'" : ').replace(b"data: ", b"data:")),
            ({}, START + ADVERSARIAL + STOP + DONE),
            ({}, START + HI + STOP + chunk(delta(content_filter_offsets={})) + DONE),
            ({}, chunk(delta(content="hi", finish="")) + chunk(delta(finish="stop")) + DONE),
            ({"n": 2}, HI + chunk(delta(1, content="x", finish="stop")) + STOP + DONE),
            ({}, chunk(delta(content="a"), delta(1, content="b")) + STOP + chunk(delta(1, finish="stop")) + DONE),
            ({"max_tokens": 3}, HI + chunk(delta(finish="length")) + DONE),
            ({}, chunk(delta(tool_calls=TOOL_CALLS)) + chunk(delta(finish="tool_calls")) + DONE),
            ({}, chunk(delta(refusal="No.")) + STOP + DONE),
            ({}, chunk({"delta": {"content": "x"}}) + chunk({"delta": {}, "finish_reason": "stop"}) + DONE),
            ({}, event({"object": "meta"}) + HI + STOP + DONE),
            ({}, event({"error": None, "choices": None}) + HI + STOP + DONE),
            ({}, b"event: message\n" + HI + STOP + DONE),
        ],
    )
    def test_whole(self, request_: Json, stream: bytes) -> None:
        assert verdict(stream, request_) is None

    @pytest.mark.parametrize(
        ("request_", "stream", "reason"),
        [
            ({}, b"", "no [DONE]"),
            ({}, DONE, "no choices"),
            ({}, AZURE_FIRST + USAGE_CHUNK + DONE, "no choices"),
            ({}, START + HI + STOP, "no [DONE]"),
            ({}, START + HI + STOP + DONE[:-1], "cut"),
            ({}, START + HI + STOP + DONE + b"data: ", "cut"),
            ({}, START + HI + DONE, "no finish_reason"),
            ({}, HI + chunk(delta(1, role="assistant")) + STOP + DONE, "no finish_reason"),
            ({"n": 2}, HI + STOP + DONE, "choices missing"),
            ({}, chunk(delta(1, content="x", finish="stop")) + DONE, "choices missing"),
            ({}, HI + chunk(delta(finish="length")) + DONE, "finish_reason length"),
            ({}, HI + chunk(delta(finish="content_filter")) + DONE, "finish_reason content_filter"),
            ({}, HI + chunk(delta(finish=1)) + DONE, "malformed choices"),
            ({}, START + STOP + DONE, "empty"),
            ({}, HI + event({"error": {"message": "x"}}) + STOP + DONE, "error event"),
            ({}, HI + STOP + chunk(error={"message": "x"}) + DONE, "error event"),
            ({}, HI + STOP + event({"message": "x"}, "error") + DONE, "error event"),
            ({}, HI + STOP + DONE + HI, "data after [DONE]"),
            ({}, HI + STOP + DONE + DONE, "data after [DONE]"),
            ({}, HI + b"data: {\n\n" + STOP + DONE, "event not JSON"),
            ({}, HI + b"data:\n\n" + STOP + DONE, "event not JSON"),
            ({}, HI + b"data: []\n\n" + STOP + DONE, "event not an object"),
            ({}, HI + event({"choices": {}}) + STOP + DONE, "malformed choices"),
            ({}, HI + event({"choices": ["x"]}) + STOP + DONE, "malformed choices"),
            ({}, HI + event({"choices": [{"index": -1}]}) + STOP + DONE, "malformed choices"),
            ({}, HI + USAGE_CHUNK + STOP + USAGE_CHUNK + DONE, "several usage chunks"),
        ],
    )
    def test_not_whole(self, request_: Json, stream: bytes, reason: str) -> None:
        assert verdict(stream, request_) == reason

    @pytest.mark.parametrize("end", [b"\n", b"\r\n"])
    def test_every_truncation(self, end: bytes) -> None:
        stream = (AZURE_FIRST + START + HI + ADVERSARIAL + STOP + USAGE_CHUNK + DONE).replace(b"\n", end)
        assert verdict(stream) is None
        for length in range(len(stream)):
            assert verdict(stream[:length]) is not None

    @given(st.permutations([START, HI, ADVERSARIAL, STOP, USAGE_CHUNK, DONE]), st.integers(0, 5))
    def test_a_stream_without_a_required_part_is_incomplete(self, events: list[bytes], length: int) -> None:
        kept = events[:length]
        if STOP not in kept or not {HI, ADVERSARIAL} & set(kept) or kept[-1] != DONE:
            assert verdict(b"".join(kept)) is not None
        else:
            assert verdict(b"".join(kept)) is None

    def test_completions(self) -> None:
        text = chunk({"index": 0, "text": "hi", "finish_reason": None})
        stop = chunk({"index": 0, "text": "", "finish_reason": "stop"})
        assert verdict(text + stop + DONE, endpoint="completions") is None
        assert verdict(stop + DONE, endpoint="completions") == "empty"
        assert verdict(text + DONE, endpoint="completions") == "no finish_reason"

    @pytest.mark.parametrize("endpoint", ["embeddings", "moderations"])
    def test_other_endpoints_have_no_streams(self, endpoint: str) -> None:
        assert verdict(HI + STOP + DONE, endpoint=endpoint) == "not a streamed endpoint"


CREATED = event(
    {"type": "response.created", "response": response(status="in_progress", usage=None)}, "response.created"
)
TEXT = event(
    {"type": "response.output_text.delta", "delta": "response.completed [DONE] error"}, "response.output_text.delta"
)
COMPLETED = event({"type": "response.completed", "response": response(MESSAGE)}, "response.completed")


def ended(answer: Json, kind: str = "response.completed") -> bytes:
    return event({"type": kind, "response": answer}, kind)


class TestTruncated:
    """A stream that its upstream did not finish, as opposed to one that is finished but odd."""

    @pytest.mark.parametrize(
        ("endpoint", "request_", "stream", "truncated"),
        [
            ("chat", {}, b"", True),
            ("chat", {}, START + HI, True),
            ("chat", {}, START + HI + STOP, False),
            ("chat", {}, HI + chunk(delta(finish="content_filter")), False),
            ("chat", {}, START + HI + DONE, False),
            ("chat", {}, START + HI + STOP + DONE[:-3], True),
            ("chat", {}, START + HI + STOP + DONE + b"x", False),
            ("chat", {}, HI + STOP + chunk(delta(1, content="x")), True),
            ("chat", {"n": 2}, HI + STOP, True),
            ("chat", {}, HI + event({"error": {"message": "x"}}), False),
            ("responses", {}, CREATED + TEXT, True),
            ("responses", {}, CREATED + COMPLETED, False),
            ("responses", {}, CREATED + ended(response(status="incomplete"), "response.incomplete"), False),
            ("responses", {}, CREATED + ended(response(status="failed"), "response.failed"), False),
            ("responses", {}, CREATED + event({"type": ["response.completed"]}), True),
        ],
    )
    def test_deterministic_requests(self, endpoint: str, request_: Json, stream: bytes, truncated: bool) -> None:
        splitter = Splitter()
        audit = StreamAudit(endpoint, request_)
        for each in splitter.feed(stream):
            audit.event(each)
        assert audit.truncated(splitter.rest) is truncated

    def test_done_is_noticed(self) -> None:
        assert not audited(HI + STOP).done
        assert audited(HI + STOP + DONE).done


class TestLearnt:
    @pytest.mark.parametrize(
        "last",
        [
            USAGE_CHUNK,
            chunk(delta(finish="stop"), usage=USAGE),
            chunk({**delta(finish="stop"), "usage": USAGE}),
            chunk(delta(finish="stop"), x_groq={"id": "r", "usage": USAGE}),
        ],
    )
    def test_usage_is_found_in_any_chunk(self, last: bytes) -> None:
        assert audited(START + HI + last).usage == USAGE

    def test_the_last_usage_counts(self) -> None:
        first = chunk(delta(content="x"), usage={"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4})
        assert audited(first + chunk(delta(), usage=None) + USAGE_CHUNK + chunk(delta(), usage=None)).usage == USAGE

    def test_usage_span(self) -> None:
        before = AZURE_FIRST + START + b": c\n\n" + HI + STOP
        audit = audited(before + USAGE_CHUNK + DONE)
        assert audit.usage_span == (len(before), len(before) + len(USAGE_CHUNK))
        twice = audited(before + USAGE_CHUNK + USAGE_CHUNK + DONE)
        assert twice.usage_span == (len(before), len(before) + 2 * len(USAGE_CHUNK))
        assert twice.reason_not_stored() is None
        assert audited(before + DONE).usage_span is None

    def test_model_and_tier(self) -> None:
        audit = audited(AZURE_FIRST + chunk(delta(), service_tier="default") + HI)
        assert (audit.model, audit.service_tier, audit.usage, audit.error) == ("gpt-4o", "default", None, False)
        nonsense = audited(event({"model": 1, "service_tier": [], "usage": [], "x_groq": {"usage": 1}, "choices": []}))
        assert (nonsense.model, nonsense.service_tier, nonsense.usage) == (None, None, None)

    def test_usage_after_an_error_event_is_read(self) -> None:
        audit = audited(event({"error": {"message": "x"}}) + USAGE_CHUNK)
        assert audit.error
        assert audit.usage == USAGE


class TestResponsesStream:
    @pytest.mark.parametrize(
        ("stream", "reason"),
        [
            (CREATED + TEXT + COMPLETED, None),
            (CREATED + TEXT + COMPLETED + DONE, None),
            (CREATED + TEXT + COMPLETED.replace(b"event: response.completed\n", b""), None),
            (CREATED + TEXT, "no response.completed"),
            (CREATED + TEXT + DONE, "no response.completed"),
            (b"", "no response.completed"),
            (CREATED + COMPLETED[:-1], "cut"),
            (CREATED + COMPLETED + TEXT, "data after response.completed"),
            (CREATED + ended(response(MESSAGE, status="incomplete")), "status incomplete"),
            (CREATED + ended(response(MESSAGE, error={"code": "x"})), "error"),
            (CREATED + ended(response()), "empty"),
            (CREATED + event({"type": "response.completed"}), "no response.completed"),
            (CREATED + ended(response(MESSAGE, status="incomplete"), "response.incomplete"), "no response.completed"),
            (CREATED + ended(response(status="failed"), "response.failed"), "error event"),
            (CREATED + event({"type": "error", "code": "x", "message": "y"}, "error"), "error event"),
            (CREATED + event({"type": "error", "message": "y"}) + COMPLETED, "error event"),
        ],
    )
    def test_verdict(self, stream: bytes, reason: str | None) -> None:
        assert verdict(stream, endpoint="responses") == reason

    def test_every_truncation(self) -> None:
        stream = CREATED + TEXT + COMPLETED
        for length in range(len(stream)):
            assert verdict(stream[:length], endpoint="responses") is not None

    def test_usage_and_model_of_a_responses_stream(self) -> None:
        audit = audited(CREATED + TEXT + COMPLETED, endpoint="responses")
        assert audit.usage == {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}
        assert audit.model == "gpt-4o"
        assert audit.usage_span is None
        incomplete = audited(CREATED + ended(response(MESSAGE), "response.incomplete"), endpoint="responses")
        assert incomplete.usage == {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}
        assert audited(CREATED + ended(response(), "response.failed"), endpoint="responses").error


WHOLE: list[tuple[str, Json, Json]] = [
    ("chat", {"n": 2}, chat(choice(), choice(1, finish="tool_calls", content=None, tool_calls=TOOL_CALLS))),
    ("completions", {"prompt": ["a", "b"]}, chat(text_choice(), text_choice(1))),
    ("embeddings", {"input": ["a", "b"]}, embeddings(0, 1)),
    ("responses", {}, response(MESSAGE)),
    ("moderations", {"input": ["a", "b"]}, {"results": [{"flagged": False}, {"flagged": True}]}),
]

BREAKS: list[Callable[[list[Any]], Any]] = [
    lambda items: items.pop(),
    lambda items: items.clear(),
    lambda items: items.append(None),
    lambda items: items.__setitem__(0, None),
]


@pytest.mark.parametrize(("endpoint", "request_", "answer"), WHOLE, ids=ENDPOINTS)
@pytest.mark.parametrize("damage", BREAKS, ids=["pop", "clear", "append", "replace"])
def test_responses_with_damaged_lists_are_incomplete(
    endpoint: str, request_: Json, answer: Json, damage: Callable[[list[Any]], Any]
) -> None:
    assert plain_complete(endpoint, request_, answer) is None
    broken = copy.deepcopy(answer)
    damage(next(value for value in broken.values() if isinstance(value, list)))
    assert plain_complete(endpoint, request_, broken) is not None
