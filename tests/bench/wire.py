"""The bytes of the benchmark, and the two lightest ends that speak them: a closed-loop client and an upstream.

Raw asyncio protocols over prebuilt bytes, without an HTTP library, so that what they cost does not hide what is
measured. Both ends know messages with a `Content-Length` and whole chunked ones; anything else is an error, never a
wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import cache
from time import perf_counter
from typing import Final, cast

# What the openai Python SDK (2.x) sends and what OpenAI answers with: the number of headers is part of the cost.
_ASKED: Final = (
    "Accept: application/json",
    "Accept-Encoding: gzip, deflate",
    "Connection: keep-alive",
    "Content-Type: application/json",
    "User-Agent: OpenAI/Python 2.8.0",
    "Authorization: Bearer sk-bench",
    "X-Stainless-Lang: python",
    "X-Stainless-Package-Version: 2.8.0",
    "X-Stainless-OS: Linux",
    "X-Stainless-Arch: x64",
    "X-Stainless-Runtime: CPython",
    "X-Stainless-Runtime-Version: 3.11.7",
    "X-Stainless-Async: async:asyncio",
    "X-Stainless-Retry-Count: 0",
    "X-Stainless-Read-Timeout: 600",
)
_ANSWERED: Final = (
    "Date: Fri, 20 Nov 2026 18:58:00 GMT",
    "Content-Type: application/json",
    "Connection: keep-alive",
    "Access-Control-Expose-Headers: X-Request-ID",
    "OpenAI-Organization: org-bench",
    "OpenAI-Processing-MS: 412",
    "OpenAI-Project: proj_bench0000000000000000",
    "OpenAI-Version: 2020-10-01",
    "X-Envoy-Upstream-Service-Time: 430",
    "X-RateLimit-Limit-Requests: 10000",
    "X-RateLimit-Limit-Tokens: 30000000",
    "X-RateLimit-Remaining-Requests: 9999",
    "X-RateLimit-Remaining-Tokens: 29999990",
    "X-RateLimit-Reset-Requests: 6ms",
    "X-RateLimit-Reset-Tokens: 0s",
    "X-Request-ID: req_00000000000000000000000000000000",
    "CF-Cache-Status: DYNAMIC",
    "Set-Cookie: __cf_bm=0000000000000000; path=/; HttpOnly; Secure; SameSite=None",
    "Strict-Transport-Security: max-age=31536000; includeSubDomains; preload",
    "X-Content-Type-Options: nosniff",
    "Server: cloudflare",
    "CF-RAY: 0000000000000000-FRA",
    'Alt-Svc: h3=":443"; ma=86400',
)
PATH: Final = "/v1/chat/completions"
NUMBER: Final = b"000000000000"
"""Stands in the prompt; a distinct request has another number of as many digits."""


KB: Final = 1024
EVENTS: Final = 50
"""Events of a stream, each a write of its own."""
LAST_CHUNK: Final = b"\r\n0\r\n\r\n"


def _filled(start: bytes, end: bytes, size: int) -> bytes:
    """`size` bytes with letters between."""
    return start + b"x" * (size - len(start) - len(end)) + end


def request_body(size: int = KB, stream: bool = False) -> bytes:
    return _filled(
        b'{"model":"gpt-4o-mini","temperature":0,'
        + (b'"stream":true,' if stream else b"")
        + b'"messages":[{"role":"system","content":"You are brief."},'
        b'{"role":"user","content":"Number ' + NUMBER + b" ",
        b'"}]}',
        size,
    )


@cache
def answer_body(size: int = KB) -> bytes:
    return _filled(
        b'{"id":"chatcmpl-0000000000000000000000000000","object":"chat.completion","created":1790000000,'
        b'"model":"gpt-4o-mini-2024-07-18","choices":[{"index":0,"message":{"role":"assistant","content":"',
        b'","refusal":null},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":234,'
        b'"completion_tokens":567,"total_tokens":801,"prompt_tokens_details":{"cached_tokens":0,"audio_tokens":0},'
        b'"completion_tokens_details":{"reasoning_tokens":0,"audio_tokens":0}},"service_tier":"default",'
        b'"system_fingerprint":"fp_0000000000"}',
        size,
    )


def _message(first: str, headers: tuple[str, ...], body: bytes) -> bytes:
    return "\r\n".join((first, *headers, f"Content-Length: {len(body)}", "", "")).encode() + body


@cache
def answer(size: int = KB) -> bytes:
    return _message("HTTP/1.1 200 OK", _ANSWERED, answer_body(size))


@cache
def stream_writes() -> tuple[bytes, ...]:
    """The writes of a streamed response: its head, then an event each."""
    headers = [line for line in _ANSWERED if not line.startswith("Content-Type")]
    headers += ["Content-Type: text/event-stream; charset=utf-8", "Transfer-Encoding: chunked"]
    start = (
        b'data: {"id":"chatcmpl-0000000000000000000000000000","object":"chat.completion.chunk","created":1790000000,'
        b'"model":"gpt-4o-mini-2024-07-18","service_tier":"default","system_fingerprint":"fp_0000000000",'
    )
    delta = (
        b'"choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
    )
    stop = b'"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"usage":null}\n\n'
    usage = b'"choices":[],"usage":{"prompt_tokens":234,"completion_tokens":48,"total_tokens":282}}\n\n'
    events = [start + delta] * (EVENTS - 3) + [start + stop, start + usage, b"data: [DONE]\n\n"]
    head = "\r\n".join(("HTTP/1.1 200 OK", *headers, "", "")).encode()
    return (head, *(b"%x\r\n%b\r\n" % (len(event), event) for event in events), LAST_CHUNK[2:])


def request(port: int, size: int = KB, stream: bool = False) -> bytes:
    """The request; another number in place of `NUMBER` makes it another request."""
    return _message(f"POST {PATH} HTTP/1.1", (f"Host: 127.0.0.1:{port}", *_ASKED), request_body(size, stream))


def end_of_message(data: bytes) -> int:
    """Where the HTTP message at the start of `data` ends, 0 while that is not known. Raises ValueError."""
    head = data.find(b"\r\n\r\n") + 4
    if head < 4:
        return 0
    at = data.find(b"Content-Length: ", 0, head)
    if at < 0:
        start = data[:head].lower()
        at = start.find(b"content-length: ")
        if at < 0 and b"transfer-encoding: chunked" in start:
            last = data.find(LAST_CHUNK, head - 2)
            return last + len(LAST_CHUNK) if last >= 0 else 0
        if at < 0:
            raise ValueError("a message without Content-Length")
    return head + int(data[at + 16 : data.index(b"\r\n", at)])


class Upstream(asyncio.Protocol):
    """Answers every request at once: with a body as long as the request's, or with a stream."""

    def __init__(self) -> None:
        self._held = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._held:
            data = self._held + data
        end = end_of_message(data)
        self._held = data[end:] if end and len(data) >= end else data
        if self._held is data:
            return
        if b'"stream":true' in data:
            self._stream(iter(stream_writes()))
        else:
            self._transport.write(answer(end - data.index(b"\r\n\r\n") - 4))

    def _stream(self, writes: Iterator[bytes]) -> None:
        """One write in each turn of the loop."""
        if (data := next(writes, None)) is not None:
            self._transport.write(data)
            asyncio.get_running_loop().call_soon(self._stream, writes)


class Client(asyncio.Protocol):
    """Sends a request, waits for the whole answer, sends the next, while `load.going`."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._held = b""
        self._sent = 0.0
        self.idle = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self) -> None:
        self.idle = False
        self._sent = perf_counter()
        self._transport.write(self._load.next_request())

    def data_received(self, data: bytes) -> None:
        if self._held:
            data = self._held + data
        try:
            end = end_of_message(data)
        except ValueError as error:
            self._load.fail(error)
            return
        if not end or len(data) < end:
            self._held = data
            return
        self._held = data[end:]
        if not data.startswith(b"HTTP/1.1 200 ") or self._held:
            self._load.fail(ValueError(f"an unexpected answer: {data[:200]!r}"))
            return
        self._load.answered += 1
        self._load.waits.append(perf_counter() - self._sent)
        if self._load.marker not in data:
            self._load.strays += 1
        self._load.last = data
        if self._load.going:
            self.send()
        else:
            self.idle = True
            self._load.tell_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._load.closing:
            self._load.fail(exc or ConnectionError("the server closed a connection"))


class Load:
    """`connections` closed loops against one server. distinct: every request differs from all others; size: bytes of
    its body; stream: it asks for a stream; waits: seconds that each request of the last run took; strays: answers of
    that run without `marker`."""

    def __init__(
        self,
        port: int,
        *,
        distinct: bool,
        connections: int,
        size: int = KB,
        stream: bool = False,
        marker: bytes = b"",
    ) -> None:
        self._port = port
        whole = request(port, size, stream)
        self._before, _, self._after = whole.partition(NUMBER)
        self.next_request: Callable[[], bytes] = self._numbered if distinct else lambda: whole
        self._sent = 0
        self._connections = connections
        self._clients: list[Client] = []
        self._idle: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self.answered = 0
        self.waits: list[float] = []
        self.marker = marker
        self.strays = 0
        self.last = b""
        self.going = False
        self.closing = False

    def _numbered(self) -> bytes:
        self._sent += 1
        return b"%b%012d%b" % (self._before, self._sent, self._after)

    async def open(self) -> None:
        """Raises OSError."""
        loop = asyncio.get_running_loop()
        for _ in range(self._connections):
            _, client = await loop.create_connection(lambda: Client(self), "127.0.0.1", self._port)
            self._clients.append(client)

    async def run(self, seconds: float, measure: Callable[[], float]) -> tuple[int, float, float]:
        """Loads the server for `seconds`: (answers, seconds taken, what `measure` rose by).

        Raises what went wrong, TimeoutError where an answer stays out.
        """
        loop = asyncio.get_running_loop()
        self._idle = loop.create_future()
        if self._error is not None:
            raise self._error
        answered, measured, began = self.answered, measure(), loop.time()
        self.going = True
        self.waits, self.strays = [], 0
        for client in self._clients:
            client.send()
        while True:  # once, unless the machine is so busy that not even one answer came
            await asyncio.wait((self._idle,), timeout=seconds)
            if self.answered > answered or self._idle.done() or loop.time() - began > 30:
                break
        took, answers, rose = loop.time() - began, self.answered - answered, measure() - measured
        self.going = False
        async with asyncio.timeout(30):
            await self._idle
        return answers, took, rose

    def tell_idle(self) -> None:
        """Ends a run once the last answer is in."""
        if self._idle is not None and not self._idle.done() and all(client.idle for client in self._clients):
            self._idle.set_result(None)

    def fail(self, error: Exception) -> None:
        """Ends the run, or the next one, with an error."""
        self._error = error
        self.going = False
        if self._idle is not None and not self._idle.done():
            self._idle.set_exception(error)

    def close(self) -> None:
        self.closing = True
        for client in self._clients:
            client._transport.abort()
