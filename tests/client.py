"""Clients for tests: one over aiohttp that changes nothing, raw sockets for what no client would send."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import aiohttp
from multidict import CIMultiDictProxy
from yarl import URL

from tests.launch import AT_ONCE

_numbers = itertools.count(1)


def ask(prompt: str | None = None, /, **fields: Any) -> dict[str, Any]:
    """A chat request; without a prompt it has one that nobody else uses."""
    text = prompt if prompt is not None else f"question {next(_numbers)} of {time.monotonic_ns()}"
    return {"model": "gpt-4o", "messages": [{"role": "user", "content": text}]} | fields


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer, undecoded. `seconds` is from the request to its end."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes
    seconds: float

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def cache(self) -> str | None:
        return self.headers.get("X-Proxy-Cache")

    @property
    def error(self) -> str | None:
        """The proxy's own error code, after checking that the body has OpenAI's shape and agrees."""
        code = self.headers.get("X-Proxy-Error")
        if code is not None:
            shape = self.json()["error"]
            assert set(shape) >= {"message", "type", "param", "code"}, shape
            assert code == "no_usable_key" or shape["code"] == code, shape
            assert self.headers["Content-Type"].startswith("application/json")
        return code


class Address(Protocol):
    """Whatever listens: a proxy, or the upstream itself."""

    @property
    def address(self) -> str: ...
    @property
    def port(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Server:
    """An address that is not a proxy's main one."""

    address: str
    port: int


async def read_until_broken(answer: aiohttp.ClientResponse) -> tuple[bytes, bool]:
    """What came, and whether it ended cleanly."""
    got = b""
    try:
        async for piece in answer.content.iter_any():
            got += piece
    except aiohttp.ClientError:
        return got, False
    return got, True


class Client:
    """Requests as given: nothing decompressed, no cookies, no redirects, no headers of aiohttp's own."""

    def __init__(self) -> None:
        self.session = aiohttp.ClientSession(
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=30),
            skip_auto_headers=["User-Agent", "Accept", "Accept-Encoding", "Content-Type"],
            read_bufsize=2**16,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.session.close()

    @asynccontextmanager
    async def open(
        self,
        proxy: Address,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        path: str = "/v1/chat/completions",
        method: str | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer whose body the caller reads. A dict goes up as JSON, bytes and iterators as they are."""
        fields = dict(headers or {})
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
        if isinstance(body, bytes) and len(body) > 2**20:
            body = io.BytesIO(body)  # aiohttp warns about large bytes
        if body is not None and not any(name.lower() == "content-type" for name in fields):
            fields["Content-Type"] = "application/json"
        verb = method or ("GET" if body is None else "POST")
        url = URL(proxy.address + path, encoded=True)
        async with self.session.request(verb, url, data=body, headers=fields, allow_redirects=False) as answer:
            yield answer

    async def send(
        self,
        proxy: Address,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        path: str = "/v1/chat/completions",
        method: str | None = None,
    ) -> Reply:
        """A whole exchange. Raises aiohttp.ClientPayloadError when the answer is aborted."""
        start = time.monotonic()
        async with self.open(proxy, body, headers, path, method) as answer:
            content = await answer.read()
        return Reply(answer.status, answer.headers, content, time.monotonic() - start)

    async def get(self, proxy: Address, path: str, **headers: str) -> Reply:
        return await self.send(proxy, None, headers, path)

    async def receipt(self, proxy: Address, request_id: str, headers: Mapping[str, str] | None = None) -> Any:
        """The receipt of a finished request, which may come a moment after its answer."""
        end = time.monotonic() + AT_ONCE
        while True:
            answer = await self.send(proxy, None, headers, f"/_proxy/requests/{request_id}")
            if answer.status == 200 or time.monotonic() > end:
                assert answer.status == 200, answer.body
                return answer.json()
            await asyncio.sleep(0.02)


async def raw(proxy: Address, data: bytes, seconds: float = 5.0, eof: bool = False) -> bytes:
    """Sends bytes and reads until the peer closes, or says nothing more for 300 ms after an answer.

    `eof` half-closes after sending.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    answer = b""
    try:
        writer.write(data)
        if eof:
            writer.write_eof()
        end = time.monotonic() + seconds
        while True:
            patience = min(0.3, end - time.monotonic()) if answer else end - time.monotonic()
            try:
                piece = await asyncio.wait_for(reader.read(65536), max(patience, 0.01))
            except (TimeoutError, ConnectionResetError):
                return answer
            if not piece:
                return answer
            answer += piece
    finally:
        writer.close()


def raw_request(
    method: str,
    target: str,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    host: str = "127.0.0.1",
) -> bytes:
    """A request as bytes, with a Host (unless `host` is empty) and a Content-Length for a body."""
    fields = ([("Host", host)] if host else []) + list((headers or {}).items())
    if body:
        fields.append(("Content-Length", str(len(body))))
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def status_of(answer: bytes) -> int:
    """The status of a raw answer; 0 when there was none."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.") else 0
