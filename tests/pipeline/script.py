"""The scripted way up: an upstream without sockets whose every move is written down beforehand.

Steps of a body: bytes are read off; a number lets that many seconds pass; a TransportFailure breaks it; HANG is silence
until somebody gives up: the way up itself after `IDLE` seconds.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn

import orjson
from multidict import CIMultiDict

from proxy.protocol.headers import Raw
from proxy.upstream.interfaces import ConnectionInfo, SwitchedConnection
from proxy.upstream.retry.outcome import FailureKind, TransportFailure

HANG: Final = "hang"
IDLE: Final = 300.0
Step = bytes | float | TransportFailure | Literal["hang"]
Headers = tuple[tuple[str, str], ...]

JSON: Final = ("Content-Type", "application/json")
SSE: Final = ("Content-Type", "text/event-stream; charset=utf-8")


@dataclass(frozen=True, slots=True)
class Responds:
    """An answer. connect, wait: seconds until the connection stands, and from there to the answer's head; at_once: the
    body comes with the head.
    """

    status: int = 200
    headers: Headers = (JSON,)
    body: tuple[Step, ...] = ()
    connect: float = 0.0
    wait: float = 0.0
    reason: str = "As You Like It"
    at_once: bool = False


@dataclass(frozen=True, slots=True)
class Fails:
    """No answer. wait: seconds until it is known; `hang`: never known."""

    kind: FailureKind | Literal["hang", "hang connecting"]
    wait: float = 0.0


Move = Responds | Fails


@dataclass(slots=True)
class Sent:
    """One call as it went up."""

    method: str
    url: str
    headers: CIMultiDict[str]
    body: bytes | None
    first_byte: float
    connection: ConnectionInfo
    at: float
    reply: ScriptedResponse | None = None

    @property
    def key(self) -> str:
        """The pool key's label: secrets are `sk-LABEL`."""
        credential = self.headers.get("Authorization", "") or self.headers.get("api-key", "")
        return credential.removeprefix("Bearer ").removeprefix("sk-")

    def json(self) -> Any:
        assert self.body is not None
        return orjson.loads(self.body)


@dataclass(slots=True)
class ScriptedResponse:
    """UpstreamReply. closed: how often; finished: the body was read to its end."""

    status: int
    reason: str
    raw_headers: Sequence[Raw]
    headers: Mapping[str, str]
    left: deque[Step]
    at_once: bool
    closed: int = 0
    finished: bool = False

    def ready(self) -> bytes | None:
        pieces = [step for step in self.left if isinstance(step, bytes)]
        if not self.at_once or len(pieces) < len(self.left):
            return None
        self.left.clear()
        self.finished = True
        return b"".join(pieces)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Goes on where an earlier reader stopped, as a socket does."""
        while self.left:
            assert not self.closed, "read after close"
            step = self.left.popleft()
            if isinstance(step, bytes):
                yield step
            elif isinstance(step, TransportFailure):
                self.finished = True
                raise step.again()
            elif step == HANG:
                self.left.appendleft(HANG)  # for whoever reads on, should this reader leave
                await asyncio.sleep(IDLE)
                self.left.popleft()
                raise TransportFailure("timeout", "scripted: silent")
            else:
                await asyncio.sleep(float(step))
        self.finished = True

    def switched(self) -> SwitchedConnection:
        raise AssertionError("scripted responses change to no other protocol")

    def close(self) -> None:
        self.closed += 1

    @property
    def given_back(self) -> bool:
        """Nobody holds a connection for it any more."""
        return self.finished or self.closed > 0


class ScriptedTransport:
    """WayUp. Moves are taken from the queue, then from `otherwise`; with neither, a call is a mistake of the proxy."""

    def __init__(self, *moves: Move, otherwise: Callable[[Sent], Move] | None = None) -> None:
        self.queue = list(moves)
        self.otherwise = otherwise
        self.sent: list[Sent] = []

    async def send(
        self,
        method: str,
        url: str,
        headers: Sequence[tuple[str, str]],
        body: bytes | AsyncIterator[bytes] | None,
        *,
        first_byte: float,
        connection: ConnectionInfo,
    ) -> ScriptedResponse:
        now = asyncio.get_running_loop().time()
        known = body if isinstance(body, bytes) else None
        sent = Sent(method, url, CIMultiDict(headers), known, first_byte, connection, now)
        self.sent.append(sent)
        assert first_byte > 0
        move = self.queue.pop(0) if self.queue else self._otherwise(sent)
        try:
            async with asyncio.timeout(first_byte) as running:
                connection.extend = running.reschedule
                return await self._play(move, sent, connection, body)
        except TimeoutError:
            kind: FailureKind = "timeout" if connection.connected else "unreached"
            raise TransportFailure(kind, "scripted: too slow") from None
        finally:
            connection.extend = None

    def _otherwise(self, sent: Sent) -> Move:
        assert self.otherwise is not None, f"an unexpected call: {sent}"
        return self.otherwise(sent)

    async def _play(
        self, move: Move, sent: Sent, connection: ConnectionInfo, body: bytes | AsyncIterator[bytes] | None
    ) -> ScriptedResponse:
        if isinstance(move, Fails):
            await asyncio.sleep(move.wait)
            if move.kind == "hang connecting":
                return await _for_ever()
            connection.connected = move.kind != "unreached"
            connection.reused = move.kind == "stale"
            if connection.connected:
                sent.body = await _read(body)
            if move.kind == "hang":
                return await _for_ever()
            raise TransportFailure(move.kind, f"scripted: {move.kind}")
        await asyncio.sleep(move.connect)
        connection.connected = True
        sent.body = await _read(body)
        await asyncio.sleep(move.wait)
        connection.answered = True
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in move.headers]
        headers: CIMultiDict[str] = CIMultiDict(move.headers)
        sent.reply = ScriptedResponse(move.status, move.reason, raw, headers, deque(move.body), move.at_once)
        return sent.reply

    @property
    def keys(self) -> list[str]:
        """Whose key each call went up with."""
        return [sent.key for sent in self.sent]

    @property
    def replies(self) -> list[ScriptedResponse]:
        return [sent.reply for sent in self.sent if sent.reply is not None]


async def _read(body: bytes | AsyncIterator[bytes] | None) -> bytes | None:
    """What goes up. A body that fails to come breaks the connection, as it does with aiohttp."""
    if body is None or isinstance(body, bytes):
        return body
    try:
        return b"".join([piece async for piece in body])
    except Exception as error:
        raise TransportFailure("ambiguous", f"scripted: the body broke: {error!r}") from None


async def _for_ever() -> NoReturn:
    await asyncio.Event().wait()
    raise AssertionError


# What upstreams say.


def dump(value: object) -> bytes:
    """JSON in a spelling nobody would make by accident."""
    return orjson.dumps(value, option=orjson.OPT_INDENT_2)


def usage(prompt: int = 100, completion: int = 200) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def completion(text: str = "Hello!", **fields: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    model = "gpt-4o-2024-08-06"
    return {"id": "chatcmpl-1", "object": "chat.completion", "model": model, "choices": [choice], "usage": usage()} | {
        **fields
    }


def says(document: object = None, status: int = 200, headers: Iterable[tuple[str, str]] = (), **more: Any) -> Responds:
    """A JSON answer, in two pieces; by default a chat completion."""
    body = dump(completion() if document is None else document)
    return Responds(status, (JSON, ("x-request-id", "req_1"), *headers), (body[:10], body[10:]), **more)


def error(
    status: int, code: str | None = None, headers: Iterable[tuple[str, str]] = (), message: str = "No.", **more: Any
) -> Responds:
    """An error answer, as OpenAI words it."""
    document = {"error": {"message": message, "type": "api_error", "param": None, "code": code}}
    return says(document, status, headers, **more)


def rate_limited(after: str | None = None, **more: Any) -> Responds:
    return error(429, "rate_limit_exceeded", [("Retry-After", after)] if after is not None else [], **more)


def event(data: object) -> bytes:
    return b"data: " + (data.encode() if isinstance(data, str) else orjson.dumps(data)) + b"\n\n"


def chunk(content: str | None = None, finish: str | None = None, **fields: Any) -> dict[str, Any]:
    delta = {} if content is None else {"content": content}
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return {"id": "c1", "object": "chat.completion.chunk", "model": "gpt-4o-2024-08-06", "choices": choices} | fields


DONE: Final = event("[DONE]")
USAGE: Final = event(chunk(choices=[], usage=usage()))


def events(*texts: str, usage: bool = False, **fields: Any) -> list[bytes]:
    """A whole chat stream; `fields` stand in every chunk."""
    result = [event(chunk(text, **fields)) for text in texts or ("Hel", "lo ", "wörld 🌍")]
    result.append(event(chunk(None, "stop", **fields)))
    return [*result, *([USAGE] if usage else []), DONE]


def streams(steps: Sequence[Step] | None = None, headers: Iterable[tuple[str, str]] = (), **more: Any) -> Responds:
    """An event stream; by default a whole one with usage."""
    body = tuple(events(usage=True)) if steps is None else tuple(steps)
    return Responds(200, (SSE, ("x-request-id", "req_1"), *headers), body, **more)
