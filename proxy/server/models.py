"""`GET /v1/models`: one list of the models of all upstreams that the client may use (`docs/routes-and-errors.md`)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import orjson
from aiohttp.web import BaseRequest

from ..pipeline.response_headers import lines_of
from ..protocol.errors import ProxyError
from ..protocol.json_parse import parse_leniently
from ..protocol.routes import Route
from ..services import Services
from ..upstream.keys.lease import KeyRequest, UpstreamKey, by_priority
from ..upstream.limits.clients import may_use
from ..upstream.progress import AttemptLog
from ..upstream.request import NO_BODY, UpstreamRequest
from ..upstream.response import ResponseInHand
from ..upstream.retry.outcome import OutcomeKind, TransportFailure
from ..upstream.sender import RetryingSender
from .passed import PassedRequest
from .responses import FullResponse, status_line

Items = list[dict[str, Any]]


class Passthrough(Protocol):
    """What it needs of the handler of requests that are passed through."""

    def key_groups(self, route: Route) -> tuple[tuple[UpstreamKey, ...], ...]: ...

    def finish(self, passed: PassedRequest, status: int, error: str) -> None: ...

    def error_response(
        self, request: BaseRequest, passed: PassedRequest, response: ResponseInHand, body: bytes, extra: bytes
    ) -> FullResponse: ...


class ModelLister:
    """Lists models."""

    def __init__(self, services: Services, sender: RetryingSender, passthrough: Passthrough) -> None:
        self._services = services
        self._sender = sender
        self._passthrough = passthrough
        self._as_they_are = len(services.upstreams) == 1 and all(key.models == ("*",) for key in services.pool.keys)

    def serves(self, method: str, passed: PassedRequest) -> bool:
        """Return whether a request asks for the list, and one upstream's own list will not do."""
        if method != "GET" or passed.route.path != "/models":
            return False
        return not self._as_they_are or bool(passed.client.models)

    async def respond(self, request: BaseRequest, passed: PassedRequest, extra: bytes) -> FullResponse:
        """Return the list. Raises ProxyError if no upstream has one."""
        keys = [key for group in self._passthrough.key_groups(passed.route) for key in group]
        upstreams = list(dict.fromkeys(key.upstream for key in keys))
        groups = [[key for key in keys if key.upstream == index] for index in upstreams]
        found = await asyncio.gather(*[self._list(request, passed, group) for group in groups])
        lists = [each for each in found if isinstance(each, list)]
        if not lists:
            first = found[0]
            if isinstance(first, ProxyError):
                raise first
            assert isinstance(first, ResponseInHand)
            return self._passthrough.error_response(request, passed, first, first.body or b"", extra)
        models: dict[str, dict[str, Any]] = {}
        for items in lists:
            for item in items:
                if may_use(passed.client, item["id"]):
                    models.setdefault(item["id"], item)
        body = orjson.dumps({"object": "list", "data": list(models.values())})
        lines = lines_of((("Content-Type", "application/json"), *passed.headers(), *passed.cost_headers()))
        self._passthrough.finish(passed, 200, "")
        return FullResponse(request, status_line(200) + lines.encode("latin-1", "replace") + extra, body, status=200)

    async def _list(
        self, request: BaseRequest, passed: PassedRequest, keys: Sequence[UpstreamKey]
    ) -> Items | ProxyError | ResponseInHand:
        """Return the models of one upstream that its globs let it serve, or why there are none."""
        log = AttemptLog(passed.log.deadline)
        try:
            response = await self._sender.send(
                UpstreamRequest(
                    method="GET",
                    route=passed.route,
                    headers=request.raw_headers,
                    body=NO_BODY,
                    model="",
                    client=passed.client,
                    attempt_log=log,
                    max_wait=passed.max_wait,
                    key_request=KeyRequest(groups=by_priority(keys)),
                    max_retries=passed.options.max_retries,
                    quota=self._sender.leases.quota(passed.client),
                    verbatim=True,
                    uncompressed=True,
                )
            )
            try:
                if response.outcome is not OutcomeKind.OK:
                    passed.log.no_usable_key |= log.no_usable_key
                    return response
                body = b"".join([chunk async for chunk in response.more])
                return _items(body, keys[0])
            except TransportFailure as failure:
                return failure.proxy_error()
            finally:
                response.response.close()
                response.lease.settle(0)
        except ProxyError as error:
            return error
        finally:
            passed.log.attempts += log.attempts
            passed.log.sent |= log.sent
            if not passed.log.upstream:
                passed.log.upstream, passed.log.key = log.upstream, log.key


def _items(body: bytes, key: UpstreamKey) -> Items | ProxyError:
    try:
        document = parse_leniently(body)
    except ValueError:
        document = None
    items = (document.get("data") or []) if isinstance(document, dict) else document  # null: none
    if not isinstance(items, list):
        return ProxyError("upstream_invalid_response", "the upstream's list of models is no list")
    return [
        item for item in items if isinstance(item, dict) and isinstance(item.get("id"), str) and key.serves(item["id"])
    ]
