"""The simulated OpenAI API over HTTP: routes, headers, streams, and prompts that provoke failures."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
from aiohttp import web

from . import answers, responses
from .answers import BadRequest, Json

# What happens if a prompt begins with these words.
SPECIAL_PROMPTS = {
    "provoke 429": "the first attempt gets 429 with Retry-After: 1, the next one succeeds",
    "provoke 500": "the first attempt gets 500, the next one succeeds",
    "slow": 'with "stream": true, half a second passes between the chunks',
    answers.TOOL_PROMPT: "a request with tools gets a call of the first one",
}

_CHUNK_DELAY = 0.02  # seconds
_SLOW_DELAY = 0.5  # seconds
_MAX_BODY = 256 * 2**20
_MAX_PROVOKED = 1000
_STARTED = web.RequestKey("started", float)

_Answer = Callable[[web.Request, Json, str], Awaitable[web.StreamResponse]]


class _Failure(Exception):
    """An error response, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body: Json = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = {"retry-after": "1", "retry-after-ms": "1000"} if status == 429 else {}


class _Simulator:
    """One simulated account. It remembers only which provoked failures have had their first attempt."""

    def __init__(self) -> None:
        self._provoked: set[str] = set()

    def application(self) -> web.Application:
        app = web.Application(middlewares=[_errors_in_openai_shape], client_max_size=_MAX_BODY)
        app.on_response_prepare.append(_add_headers)
        app.router.add_post("/v1/chat/completions", self._route(self._chat))
        app.router.add_post("/v1/completions", self._route(self._completion))
        app.router.add_post("/v1/embeddings", self._route(_embeddings))
        app.router.add_post("/v1/moderations", self._route(_moderation, "omni-moderation-latest"))
        app.router.add_post("/v1/responses", self._route(self._responses))
        app.router.add_get("/v1/models", _models)
        app.router.add_get("/v1/models/{model}", _model)
        return app

    def _route(
        self, answer: _Answer, default_model: str | None = None
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """Return a handler for a POST of a JSON object that names a known model."""

        async def handler(request: web.Request) -> web.StreamResponse:
            try:
                body = orjson.loads(await request.read())
            except orjson.JSONDecodeError:
                raise _Failure(400, "We could not parse the JSON body of your request.") from None
            model = body.get("model", default_model) if isinstance(body, dict) else None
            if not isinstance(model, str):
                raise _Failure(400, "you must provide a model parameter")
            _must_exist(model)
            return await answer(request, body, model)

        return handler

    def _provoke(self, prompt: str) -> None:
        """Raise the failure that a prompt asks for, at every second attempt, beginning with the first."""
        lowered = prompt.lower()
        if lowered.startswith("provoke 429"):
            message = "Rate limit reached for requests. Please try again in 1s."
            failure = _Failure(429, message, "requests", "rate_limit_exceeded")
        elif lowered.startswith("provoke 500"):
            failure = _Failure(500, "The server had an error while processing your request.", "server_error")
        else:
            return
        if prompt in self._provoked:
            self._provoked.discard(prompt)
            return
        if len(self._provoked) >= _MAX_PROVOKED:
            self._provoked.clear()
        self._provoked.add(prompt)
        raise failure

    async def _chat(self, request: web.Request, body: Json, model: str) -> web.StreamResponse:
        prompt = answers.last_user_text(answers.messages_of(body))
        self._provoke(prompt)
        replies = [answers.chat_reply(body, number) for number in range(_choices(body))]
        used = answers.chat_usage(body, replies)
        if body.get("stream") is True:
            head = answers.head("chat.completion.chunk", "chatcmpl-", model)
            return await _stream(request, _data(_chat_chunks(head, replies, used, _wants_usage(body))), prompt)
        choices = [
            {
                "index": i,
                "message": answers.chat_message(r),
                "logprobs": None,
                "finish_reason": r.finish_reason,
            }
            for i, r in enumerate(replies)
        ]
        head = answers.head("chat.completion", "chatcmpl-", model)
        return web.json_response(head | {"choices": choices, "usage": used}, dumps=_dumps)

    async def _completion(self, request: web.Request, body: Json, model: str) -> web.StreamResponse:
        prompts = answers.inputs_of(body.get("prompt", "<|endoftext|>"))
        self._provoke(prompts[0])
        limit = body.get("max_tokens", 16)
        replies = [answers.reply(p, number, limit) for p in prompts for number in range(_choices(body))]
        used = answers.usage(sum(answers.count_tokens(p) for p in prompts), replies)
        head = answers.head("text_completion", "cmpl-", model)
        if body.get("stream") is True:
            return await _stream(request, _data(_text_chunks(head, replies, used, _wants_usage(body))), prompts[0])
        choices = [_text_choice(i, r.text, r.finish_reason) for i, r in enumerate(replies)]
        return web.json_response(head | {"choices": choices, "usage": used}, dumps=_dumps)

    async def _responses(self, request: web.Request, body: Json, model: str) -> web.StreamResponse:
        prompt = responses.prompt_of(body)
        self._provoke(prompt)
        finished, reply = responses.answer(body, model)
        if body.get("stream") is True:
            lines = (
                b"event: %s\ndata: %s\n\n" % (event["type"].encode(), orjson.dumps(event))
                for event in responses.events(finished, reply)
            )
            return await _stream(request, lines, prompt)
        return web.json_response(finished, dumps=_dumps)


async def _embeddings(request: web.Request, body: Json, model: str) -> web.StreamResponse:
    return web.json_response(answers.embeddings(body, model), dumps=_dumps)


async def _moderation(request: web.Request, body: Json, model: str) -> web.StreamResponse:
    return web.json_response(answers.moderation(body, model), dumps=_dumps)


async def _models(request: web.Request) -> web.StreamResponse:
    cards = [answers.model_card(name) for name in answers.MODELS]
    return web.json_response({"object": "list", "data": cards}, dumps=_dumps)


async def _model(request: web.Request) -> web.StreamResponse:
    model = request.match_info["model"]
    _must_exist(model)
    return web.json_response(answers.model_card(model), dumps=_dumps)


@web.middleware
async def _errors_in_openai_shape(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Check the credential, and give every error OpenAI's shape."""
    request[_STARTED] = time.perf_counter()
    try:
        if not request.headers.get("Authorization", "").startswith("Bearer "):
            raise _Failure(401, "You didn't provide an API key.")
        return await handler(request)
    except _Failure as error:
        failure = error
    except BadRequest as error:
        failure = _Failure(400, error.message, param=error.param)
    except (web.HTTPNotFound, web.HTTPMethodNotAllowed):
        failure = _Failure(404, f"Invalid URL ({request.method} {request.path})", code="unknown_url")
    return web.json_response(failure.body, status=failure.status, headers=failure.headers, dumps=_dumps)


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    milliseconds = (time.perf_counter() - request[_STARTED]) * 1000
    response.headers.update(
        {
            "x-request-id": "req_" + secrets.token_hex(16),
            "openai-organization": "simulated",
            "openai-processing-ms": str(int(milliseconds)),
            "openai-version": "2020-10-01",
            "x-ratelimit-limit-requests": "10000",
            "x-ratelimit-remaining-requests": "9999",
            "x-ratelimit-reset-requests": "6ms",
            "x-ratelimit-limit-tokens": "2000000",
            "x-ratelimit-remaining-tokens": "1999900",
            "x-ratelimit-reset-tokens": "3ms",
        }
    )


def _must_exist(model: str) -> None:
    if not answers.known_model(model):
        message = f"The model `{model}` does not exist or you do not have access to it."
        raise _Failure(404, message, code="model_not_found", param="model")


def _choices(body: Json) -> int:
    n = body.get("n", 1)
    return n if isinstance(n, int) and 1 <= n <= 128 else 1


def _wants_usage(body: Json) -> bool:
    options = body.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def _dumps(value: Any) -> str:
    return orjson.dumps(value).decode()


def _chat_chunks(head: Json, replies: list[answers.Reply], used: Json, with_usage: bool) -> Iterator[Json]:
    tail: Json = {"usage": None} if with_usage else {}

    def chunk(index: int, delta: Json, finish_reason: str | None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return head | {"choices": [choice]} | tail

    for index, reply in enumerate(replies):
        for delta in answers.chat_deltas(reply):
            yield chunk(index, delta, None)
        yield chunk(index, {}, reply.finish_reason)
    if with_usage:
        yield head | {"choices": [], "usage": used}


def _text_choice(index: int, text: str, finish_reason: str | None) -> Json:
    return {"text": text, "index": index, "logprobs": None, "finish_reason": finish_reason}


def _text_chunks(head: Json, replies: list[answers.Reply], used: Json, with_usage: bool) -> Iterator[Json]:
    tail: Json = {"usage": None} if with_usage else {}
    for index, reply in enumerate(replies):
        for piece in reply.pieces:
            yield head | {"choices": [_text_choice(index, piece, None)]} | tail
        yield head | {"choices": [_text_choice(index, "", reply.finish_reason)]} | tail
    if with_usage:
        yield head | {"choices": [], "usage": used}


def _data(chunks: Iterable[Json]) -> Iterator[bytes]:
    for chunk in chunks:
        yield b"data: %s\n\n" % orjson.dumps(chunk)
    yield b"data: [DONE]\n\n"


async def _stream(request: web.Request, lines: Iterable[bytes], prompt: str) -> web.StreamResponse:
    """Send the events with a pause after each; it is long if the prompt begins with `slow`."""
    delay = _SLOW_DELAY if prompt.lower().startswith("slow") else _CHUNK_DELAY
    headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    for line in lines:
        await response.write(line)
        await asyncio.sleep(delay)
    await response.write_eof()
    return response


@asynccontextmanager
async def running_simulator(port: int = 0) -> AsyncIterator[str]:
    """Serve the simulated API on 127.0.0.1; yield its base URL, `http://127.0.0.1:PORT/v1`.

    port: 0 takes a free one. Raises OSError if the port is in use.
    """
    runner = web.AppRunner(_Simulator().application(), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()
