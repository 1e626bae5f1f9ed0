"""What the proxy is compared with: `python -m tests.bench.servers empty PORT`, `... pass PORT UPSTREAM_URL`.

Both are aiohttp as one would write it with care: no access log, no cookies, whole bodies in one write, one session,
and the garbage collector tuned as the proxy tunes its own.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import AsyncIterator, Iterable
from typing import Final

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from .wire import PATH, answer_body

_NOT_PASSED: Final = frozenset({"host", "connection", "content-length", "transfer-encoding", "keep-alive"})


async def empty(request: web.Request) -> web.Response:
    """Reads the body, answers as much."""
    body = await request.read()
    return web.Response(body=answer_body(len(body)), content_type="application/json")


class PassThrough:
    """Sends body and headers up, and the answer's down. It reads nothing, keeps nothing, checks nothing."""

    def __init__(self, upstream: str) -> None:
        self._url = URL(upstream + PATH)

    async def session(self, app: web.Application) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None),
        ) as self._session:
            yield

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.read()
        async with self._session.post(
            self._url, data=body, headers=_passed(request.headers.items()), allow_redirects=False
        ) as answer:
            payload = await answer.read()
            return web.Response(status=answer.status, body=payload, headers=_passed(answer.headers.items()))


def _passed(headers: Iterable[tuple[str, str]]) -> CIMultiDict[str]:
    return CIMultiDict([(name, value) for name, value in headers if name.lower() not in _NOT_PASSED])


async def _tune_collector(app: web.Application) -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def main(kind: str, port: str, upstream: str = "") -> None:
    app = web.Application(client_max_size=2**20)
    if kind == "empty":
        app.router.add_post(PATH, empty)
    else:
        through = PassThrough(upstream)
        app.cleanup_ctx.append(through.session)
        app.router.add_post(PATH, through.handle)
    app.on_startup.append(_tune_collector)
    web.run_app(app, host="127.0.0.1", port=int(port), access_log=None, print=None)


if __name__ == "__main__":
    main(*sys.argv[1:])
