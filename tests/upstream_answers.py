"""What OpenAI would answer: bodies, headers, event streams and errors for the scripted upstream."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.ledger import Request
from tests.scripted_upstream import Answer, Connection, Step, send

Json = dict[str, Any]
CREATED = 1_790_000_000
_numbers = itertools.count(1)


def dump(value: object) -> bytes:
    """JSON as the API writes it: not compact, so that nobody can rebuild the bytes by accident."""
    return json.dumps(value, ensure_ascii=False, indent=2).encode()


def upstream_headers() -> list[tuple[str, str]]:
    """A real answer's headers, the unwelcome ones included, with a new x-request-id each time."""
    number = next(_numbers)
    return [
        ("Date", "Fri, 20 Nov 2026 21:02:01 GMT"),
        ("Set-Cookie", "__cf_bm=secret-cookie; path=/; HttpOnly; Secure"),
        ("openai-organization", "org-upstream"),
        ("openai-project", "proj_upstream"),
        ("openai-processing-ms", "412"),
        ("openai-version", "2020-10-01"),
        ("x-request-id", f"req_{number:08d}"),
        ("x-ratelimit-limit-requests", "10000"),
        ("x-ratelimit-limit-tokens", "30000000"),
        ("x-ratelimit-remaining-requests", "9999"),
        ("x-ratelimit-remaining-tokens", "29999967"),
        ("x-ratelimit-reset-requests", "6ms"),
        ("x-ratelimit-reset-tokens", "0s"),
        ("strict-transport-security", "max-age=31536000; includeSubDomains; preload"),
        ("alt-svc", 'h3=":443"; ma=86400'),
        ("Access-Control-Expose-Headers", "X-Request-ID"),
        ("Access-Control-Allow-Origin", "*"),
        ("cf-ray", "9a1b2c3d4e5f6789-FRA"),
        ("CF-Cache-Status", "DYNAMIC"),
        ("Server", "cloudflare"),
    ]


def head(status: int, headers: Iterable[tuple[str, str]], reason: str = "") -> bytes:
    lines = [f"HTTP/1.1 {status} {reason or 'Whatever'}", *(f"{name}: {value}" for name, value in headers)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def response(
    status: int,
    body: bytes | Json,
    headers: Mapping[str, str] | None = None,
    content_type: str | None = "application/json",
) -> bytes:
    """A whole answer with Content-Length. `headers` replace those of the same name."""
    payload = body if isinstance(body, bytes) else dump(body)
    given = {name.lower() for name in headers or {}}
    fields = [(name, value) for name, value in upstream_headers() if name.lower() not in given]
    if content_type is not None:
        fields.append(("Content-Type", content_type))
    fields += [*(headers or {}).items(), ("Content-Length", str(len(payload)))]
    return head(status, fields) + payload


def reply(
    status: int,
    body: bytes | Json,
    headers: Mapping[str, str] | None = None,
    content_type: str | None = "application/json",
) -> Step:
    return send(response(status, body, headers, content_type))


def gzipped(body: Json, cut_at: int | None = None) -> Step:
    """A compressed answer; `cut_at` drops the tail of the data, with a Content-Length that agrees."""
    return reply(200, gzip.compress(dump(body))[:cut_at], {"Content-Encoding": "gzip"})


# Plain answers.


def usage(prompt: int, completion: int, cached: int = 0) -> Json:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }


def completion(
    content: str | None = "Hello! How can I help?",
    model: str = "gpt-4o-2024-08-06",
    tokens: tuple[int, int] = (100, 200),
    finish_reason: str | None = "stop",
    cached: int = 0,
    **extra: Any,
) -> Json:
    """A chat completion; `extra` goes to the top level."""
    return {
        "id": f"chatcmpl-{next(_numbers)}",
        "object": "chat.completion",
        "created": CREATED,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content, "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": finish_reason,
            }
        ],
        "usage": usage(*tokens, cached),
        "service_tier": "default",
        "system_fingerprint": "fp_f33640a400",
        "x_unknown": {"héllo": [1.0, 1e3]},
    } | extra


def chat(content: str | None = "Hello! How can I help?", **options: Any) -> Step:
    return reply(200, completion(content, **options))


def embeddings(request: Json) -> Json:
    """Deterministic vectors; base64 where the request asks for it, as the SDKs do."""
    given = request["input"]
    texts = given if isinstance(given, list) and (not given or not isinstance(given[0], int)) else [given]

    def vector(text: object) -> object:
        floats = [float(len(str(text))), 0.5, -0.25]
        if request.get("encoding_format") == "base64":
            return base64.b64encode(struct.pack("<3f", *floats)).decode()
        return floats

    data = [{"object": "embedding", "index": i, "embedding": vector(text)} for i, text in enumerate(texts)]
    return {
        "object": "list",
        "data": data,
        "model": request["model"],
        "usage": {"prompt_tokens": 8, "total_tokens": 8},
    }


# Streams.


def event(data: Json | str) -> bytes:
    """One SSE event as OpenAI writes it."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"


DONE = event("[DONE]")


def chunk(delta: Json | None, finish: str | None = None, model: str = "gpt-4o-2024-08-06", **extra: Any) -> Json:
    """One chat.completion.chunk; `delta=None` leaves `choices` empty."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
    return {
        "id": "chatcmpl-stream",
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": model,
        "service_tier": "default",
        "system_fingerprint": "fp_f33640a400",
        "choices": choices,
    } | extra


def chat_events(
    contents: Sequence[str] = ("Hel", "lo ", "wörld 🌍"),
    include_usage: bool = False,
    tokens: tuple[int, int] = (100, 200),
    finish: str | None = "stop",
    model: str = "gpt-4o-2024-08-06",
) -> list[bytes]:
    """Role, contents, finish, usage where asked for, [DONE]."""
    extra: Json = {"usage": None} if include_usage else {}
    chunks = [chunk({"role": "assistant", "content": "", "refusal": None}, None, model, **extra)]
    chunks += [chunk({"content": text}, None, model, **extra) for text in contents]
    chunks.append(chunk({}, finish, model, **extra))
    if include_usage:
        chunks.append(chunk(None, None, model, usage=usage(*tokens)))
    return [event(item) for item in chunks] + [DONE]


def stream_head(headers: Mapping[str, str] | None = None) -> bytes:
    fields = [*upstream_headers(), ("Content-Type", "text/event-stream; charset=utf-8")]
    return head(200, [*fields, *(headers or {}).items(), ("Transfer-Encoding", "chunked")])


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"


def stream(pieces: Iterable[bytes], *between: Step, end: bool = True) -> list[Step]:
    """An event stream, each piece its own chunk and write; the `between` steps run after each piece."""
    steps: list[Step] = [send(stream_head())]
    for piece in pieces:
        steps += [send(chunked(piece)), *between]
    return [*steps, send(LAST_CHUNK)] if end else steps


def include_usage(request: Json) -> bool:
    return bool((request.get("stream_options") or {}).get("include_usage"))


# Errors, as OpenAI words them.


def error(status: int, message: str, code: str | None, kind: str = "invalid_request_error", **headers: str) -> Step:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return reply(status, error_body(message, code, kind), fields)


def error_body(message: str, code: str | None, kind: str = "invalid_request_error") -> Json:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def unauthorized(key: str = "sk-xx***") -> Step:
    message = f"Incorrect API key provided: {key}. You can find your API key at https://platform.openai.com."
    return error(401, message, "invalid_api_key")


def forbidden() -> Step:
    return error(403, "Country, region, or territory not supported", "unsupported_country_region_territory")


def model_not_found(model: str = "gpt-4o") -> Step:
    return error(404, f"The model `{model}` does not exist or you do not have access to it.", "model_not_found")


def rate_limited(retry_after: str | None = None, **headers: str) -> Step:
    more = headers | ({"retry_after": retry_after} if retry_after is not None else {})
    return error(429, "Rate limit reached for gpt-4o on requests per min.", "rate_limit_exceeded", "requests", **more)


def insufficient_quota() -> Step:
    message = "You exceeded your current quota, please check your plan and billing details."
    return error(429, message, "insufficient_quota", "insufficient_quota")


def server_error(status: int = 500) -> Step:
    return error(status, "The server had an error while processing your request.", None, "server_error")


# The default script.


def behave(request: Request) -> Answer:
    """A well-behaved API: answers echo the last message, so that a wrong answer is seen."""
    route = request.path.rpartition("/v1/")[2] or request.path
    if request.method == "GET" and route == "models":
        return reply(200, {"object": "list", "data": [{"id": "gpt-4o", "object": "model", "owned_by": "system"}]})
    if request.method != "POST" or "json" not in (request.header("content-type") or ""):
        return reply(200, {"method": request.method, "target": request.target, "size": len(request.body)})
    body = request.json()
    if route.endswith("chat/completions"):
        said = "echo: " + str(body["messages"][-1]["content"])[:100]
        if body.get("stream"):
            return stream(chat_events([said[:4], said[4:]], include_usage(body)))
        return chat(said)
    if route.endswith("embeddings"):
        return reply(200, embeddings(body))
    if route.endswith("moderations"):
        result = {"flagged": False, "categories": {"violence": False}, "category_scores": {"violence": 0.01}}
        return reply(200, {"id": "modr-1", "model": "omni-moderation-latest", "results": [result]})
    if route.endswith("responses"):
        return reply(200, response_object(str(body.get("input"))))
    if route.endswith("completions"):
        choice = {
            "text": "echo: " + str(body["prompt"]),
            "index": 0,
            "logprobs": None,
            "finish_reason": "stop",
        }
        text: Json = {"id": "cmpl-1", "object": "text_completion", "created": CREATED, "choices": [choice]}
        return reply(200, text | {"model": "gpt-3.5-turbo-instruct", "usage": usage(5, 7)})
    return reply(200, {"target": request.target, "size": len(request.body)})


def response_object(text: str, status: str = "completed") -> Json:
    """An object of the Responses API."""
    part = {"type": "output_text", "text": f"echo: {text}", "annotations": []}
    return {
        "id": f"resp_{next(_numbers)}",
        "object": "response",
        "created_at": CREATED,
        "status": status,
        "error": None,
        "incomplete_details": None,
        "model": "gpt-4o-2024-08-06",
        "output": [{"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [part]}],
        "parallel_tool_calls": True,
        "store": True,
        "usage": {
            "input_tokens": 100,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 200,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 300,
        },
    }


async def close_connection(connection: Connection) -> None:
    """A step: ends the connection after a complete answer that did not say so."""
    connection.close()
