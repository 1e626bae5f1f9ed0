"""Sends requests that are passed through: what is reserved for them, and which key may serve them."""

from __future__ import annotations

from functools import partial

from aiohttp.web import BaseRequest

from ..protocol.routes import Route
from ..services import Services
from ..upstream.keys.fixed_key import FixedKeys
from ..upstream.keys.lease import KeyRequest, UpstreamKey, by_priority
from ..upstream.request import UpstreamRequest
from ..upstream.reservations import Reservations
from ..upstream.response import ResponseInHand
from ..upstream.sender import RetryingSender
from .passed import PassedRequest
from .passed_objects import PassedObjects
from .upload import Upload

Groups = tuple[tuple[UpstreamKey, ...], ...]


class PassedSender:
    """Sends requests that are passed through."""

    def __init__(self, services: Services, sender: RetryingSender, reservations: Reservations) -> None:
        self._services = services
        self._pool = services.pool
        self._sender = sender
        self._reservations = reservations
        self._objects = PassedObjects(services)
        keys, specs = services.pool.keys, services.settings.upstreams
        azure = tuple([key for key in keys if services.upstreams[key.upstream].address.kind == "azure"]) or keys
        self._groups, self._azure_groups = by_priority(keys), by_priority(azure)

        def has_account(key: UpstreamKey) -> bool:
            return specs[key.upstream].pooled

        self._fixed, self._fixed_azure = (FixedKeys(self._pool, each, has_account) for each in (keys, azure))

    def key_groups(self, route: Route) -> Groups:
        """Return the keys that may serve a request without a known model, by priority."""
        return self._groups if route.shape == "openai" else self._azure_groups

    async def send(self, request: BaseRequest, passed: PassedRequest, upload: Upload) -> ResponseInHand:
        """Return the response to give, whose lease holds what was reserved if it is a good one. Raises ProxyError."""
        reservations = self._reservations
        size = reservations.estimates.size(passed.parsed) if passed.runs else None
        tokens = reservations.estimates.tokens(passed.model, size)
        budget = await reservations.budget(passed.parsed, size) if size is not None else None
        send = partial(self._with_key, request, passed, upload, tokens)
        return await reservations.send(passed.client, tokens, budget, passed.log, send)

    async def _with_key(
        self, request: BaseRequest, passed: PassedRequest, upload: Upload, tokens: int
    ) -> ResponseInHand:
        route, client = passed.route, passed.client
        if not self._objects.matter(client):
            return await self._once(request, passed, upload, tokens, "")
        pinned_to = await self.pin(passed, upload.document or upload.packed)
        if pinned_to or not route.stateful or route.path == "/responses/compact":  # it keeps nothing
            return await self._once(request, passed, upload, tokens, pinned_to)
        return await self._with_fixed_key(request, passed, upload, tokens, self._fixed_keys(route))

    def _fixed_keys(self, route: Route) -> FixedKeys:
        return self._fixed if route.shape == "openai" else self._fixed_azure

    async def pin(self, passed: PassedRequest, document: object = None) -> str:
        """Return the label of the only key that may see what a request names; "" for any key.

        document: its body, if that is JSON and was read. Raises ProxyError(object_not_found).
        """
        route = passed.route

        def of_unknown() -> UpstreamKey:
            now = self._services.clock.monotonic()
            return self._fixed_keys(route).choose(route.segment, passed.model, now)

        passed.pinned = await self._objects.pin(route, document, passed.client, of_unknown)
        return passed.pinned.key

    async def _with_fixed_key(
        self, request: BaseRequest, passed: PassedRequest, upload: Upload, tokens: int, fixed: FixedKeys
    ) -> ResponseInHand:
        """Use the fixed key; the next one if it turns out that it cannot serve, and the request may be repeated."""
        segment, log, clock = passed.route.segment, passed.log, self._services.clock
        names_none = passed.route.path.count("/") == 1  # a 404 is about the route
        failed: frozenset[str] = frozenset()
        key = fixed.choose(segment, passed.model, clock.monotonic())
        while True:
            response = await self._once(request, passed, upload, tokens, key.label)
            if names_none:
                fixed.record(key, segment, response.status, clock.monotonic())
            if response.status < 400 or not _repeatable(request):
                return response
            now, used = clock.monotonic(), key
            failed |= {used.label}
            key = fixed.choose(segment, passed.model, now, failed)
            if key.label in failed or not fixed.prefers(key, used, segment, passed.model, now):
                return response
            response.response.close()
            log.spent = log.no_usable_key = False

    async def _once(
        self, request: BaseRequest, passed: PassedRequest, upload: Upload, tokens: int, pinned_to: str
    ) -> ResponseInHand:
        """Send with a key that serves the model, or with the one of label `pinned_to`."""
        groups: Groups | None = None
        if not passed.runs or not passed.model:
            groups = self._pool.serving(passed.named) if passed.named else self.key_groups(passed.route)
        return await self._sender.send(
            UpstreamRequest(
                method=request.method,
                route=passed.route,
                headers=request.raw_headers,
                body=upload,
                model=passed.model,
                client=passed.client,
                attempt_log=passed.log,
                max_wait=passed.max_wait,
                key_request=KeyRequest(pinned_to=pinned_to, groups=groups),
                tokens=tokens,
                max_retries=passed.options.max_retries,
                quota=self._sender.leases.quota(passed.client),
                repeatable=_repeatable(request),
                verbatim=True,
                uncompressed=bool(passed.model),
            )
        )


def _repeatable(request: BaseRequest) -> bool:
    """Whether a request may be sent again after it has gone up."""
    return request.method in ("GET", "HEAD") and not request.body_exists
