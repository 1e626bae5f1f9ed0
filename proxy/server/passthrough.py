"""Every other `/v1/…` route: passed through in both directions, never cached.

A request is sent once: another key or a retry is possible only while no byte of it has gone up, or for GET and HEAD.
A route that names stored objects uses one fixed key, because the objects belong to the account of the key that made
them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp.web import BaseRequest

from ..accounting.receipt import Receipt
from ..cost.passed_usage import SMALL, ResponseCopy
from ..cost.usage import usage_of
from ..pipeline.response_headers import lines_of
from ..protocol.errors import ProxyError
from ..protocol.headers import LOCATIONS, downstream_headers
from ..protocol.locations import own_locations
from ..protocol.options import Options
from ..protocol.passed_model import model_in_target, names_model, runs_model
from ..protocol.request import Client
from ..protocol.routes import Route
from ..services import Services
from ..upstream.keys.response_watch import ResponseWatch
from ..upstream.limits.clients import ClientReservation, check_any_model, check_model
from ..upstream.providers.registry import model_named, models_that_run
from ..upstream.reservations import Reservations
from ..upstream.response import ResponseInHand
from ..upstream.retry.outcome import TransportFailure
from ..upstream.sender import RetryingSender
from .models import ModelLister
from .passed import PassedRequest
from .passed_objects import PassedObjects
from .passed_sender import Groups, PassedSender
from .request_body import too_large
from .responses import (
    FullResponse,
    StreamedResponse,
    StreamingResponse,
    for_event_stream,
    raw_lines,
    status_line,
)
from .upload import MAX_JSON, Upload


class PassthroughHandler:
    """Passes requests through. `observe` takes each one's receipt."""

    def __init__(
        self,
        services: Services,
        sender: RetryingSender,
        reservations: Reservations,
        observe: Callable[[Receipt], None],
    ) -> None:
        self._services = services
        self._sender = PassedSender(services, sender, reservations)
        self._reservations = reservations
        self._observe = observe
        self._objects = PassedObjects(services)
        self._models = ModelLister(services, sender, self)

    async def forward(
        self, request: BaseRequest, route: Route, client: Client, options: Options, extra: bytes
    ) -> FullResponse | StreamedResponse:
        """Serve one request to its end. extra: further header lines of the response. Raises ProxyError."""
        services = self._services
        if services.replays:
            raise ProxyError("not_cached", "replay: this route is never cached, and nothing is sent upstream")
        if options.only_if_cached:
            raise ProxyError("not_cached", "this route is never cached, and only-if-cached asks for no other")
        limit = services.settings.server.max_upload
        if request.content_length is not None and request.content_length > limit:
            raise too_large(limit, "max_upload")
        passed = PassedRequest(services, request, route, client, options)
        upload = Upload(request, limit)
        await self._read(request, passed, upload)
        try:
            if self._models.serves(request.method, passed):
                passed.reservation = await self.reserve(client)
                return await self._models.respond(request, passed, extra)
            response = await self._sender.send(request, passed, upload)
        except ProxyError as error:
            self.finish(passed, error.status, error.code)
            error.proxy_headers = passed.headers()
            raise
        except asyncio.CancelledError:
            self.finish(passed, 499, "client_gone")
            raise
        if response.body is not None:
            return self.error_response(request, passed, response, response.body, extra)
        return await self._respond(request, passed, response, extra)

    # -- up -----------------------------------------------------------------------------------------------------------

    async def _read(self, request: BaseRequest, passed: PassedRequest, upload: Upload) -> None:
        """Read as much of the body as says which model runs and which objects it names.

        Raises ProxyError(model_not_allowed, request_too_large).
        """
        route, client, method, addresses = passed.route, passed.client, request.method, self._services.addresses
        in_body = names_model(route, method)
        runs = runs_model(route, method)
        if in_body:
            await upload.read_form()
        if in_body or self._objects.matter(client):
            # What a client names must be its own, so it is read up to the size of bodies that are read whole.
            await upload.read_json(self._services.settings.server.max_body if client.name else MAX_JSON)
        models = upload.models if in_body else ()
        target = model_in_target(route)
        named = target or model_named(addresses, route, models[-1] if models else None)
        if client.models:
            if runs and (not named or (in_body and upload.is_ambiguous)):
                check_any_model(client)
            every: list[str | None] = [*models, *([target] if target else [])]
            for model in every or ([None] if named else []):
                check_model(client, *models_that_run(addresses, route, model))
            upload.allow_one_model()
        passed.read(named, runs, upload.raw, upload.document or {})
        if in_body:
            upload.rename(route, named)

    async def reserve(self, client: Client) -> ClientReservation | None:
        """Reserve one request in the client's limits. Raises ProxyError."""
        return await self._reservations.client(client, 0)

    def key_groups(self, route: Route) -> Groups:
        """Return the keys that may serve a request without a known model, by priority."""
        return self._sender.key_groups(route)

    async def pin(self, passed: PassedRequest) -> str:
        """Return the label of the only key that may see what a request without a body names; "" for any key.

        Raises ProxyError(object_not_found).
        """
        return await self._sender.pin(passed)

    # -- down ---------------------------------------------------------------------------------------------------------

    def head(self, passed: PassedRequest, response: ResponseInHand) -> bytes:
        """Return the status line and the headers of a response, without framing."""
        services = self._services
        reply = response.response
        headers = downstream_headers(reply.raw_headers, pooled=not services.passthrough, decoded=response.decoded)
        locations = [pair for pair in reply.raw_headers if pair[0].lower() in LOCATIONS]
        if locations:
            asked = response.upstream.provider.url(response.upstream.address, passed.route, passed.model)
            headers += own_locations(locations, asked, passed.target, passed.route.path)
        headers = [(name, services.masker.mask(value)) for name, value in headers]
        if response.is_stream:
            headers = for_event_stream(headers)
        retries = passed.log.retry_headers()
        if retries:
            headers = [(name, value) for name, value in headers if name.lower() != b"x-should-retry"]
        lines = lines_of((*passed.headers(), *passed.cost_headers(), *retries))
        return status_line(reply.status, reply.reason) + raw_lines(headers) + lines.encode("latin-1", "replace")

    def error_response(
        self, request: BaseRequest, passed: PassedRequest, response: ResponseInHand, body: bytes, extra: bytes
    ) -> FullResponse:
        """Return the upstream's error response, whose whole body is `body`."""
        response.response.close()
        error = "no_usable_key" if passed.log.no_usable_key else f"upstream_{response.status}"
        self.finish(passed, response.status, error)
        head = self.head(passed, response) + extra
        return FullResponse(request, head, self._services.masker.mask(body), status=response.status)

    async def _respond(
        self, request: BaseRequest, passed: PassedRequest, response: ResponseInHand, extra: bytes
    ) -> FullResponse | StreamedResponse:
        """Hand the response on as it comes; a small one of a model is read first, so that its headers have its cost."""
        length = response.response.headers.get("Content-Length")
        known = int(length) if length is not None and length.isascii() and length.isdigit() else None
        passed.is_stream = response.is_stream
        watch = self._objects.watch(request.method, passed.route, passed.client, passed.pinned, response)
        copies = _Copies(watch, request.method != "HEAD" and passed.runs)
        status, error, started = response.status, "", False
        try:
            read: list[bytes] = []
            small = copies.usage is not None and _is_json(response) and (known is None or known <= SMALL)
            if small and await _read_small(passed, response, read):
                body = b"".join(read)
                copies.feed(body)
                self._note(passed, response, copies)
                head = self.head(passed, response) + extra
                return FullResponse(request, head, self._services.masker.mask(body), status=status)
            stream = StreamingResponse(request, self.head(passed, response) + extra, status, known)
            passed.first_byte_ms = passed.elapsed_ms()
            for chunk in read:
                copies.feed(chunk)
                started = True
                await stream.write(chunk)
            if request.method != "HEAD":
                async for chunk in response.more:
                    copies.feed(chunk)
                    started = True
                    await stream.write(chunk)
            self._note(passed, response, copies)
            return await stream.finish()
        except TransportFailure as failure:
            error = failure.code
            if not started:
                proxy_error = failure.proxy_error()
                status = proxy_error.status
                raise proxy_error.copy(passed.headers()) from None
            return stream.abort()
        except BaseException:
            status, error = 499, "client_gone"
            raise
        finally:
            response.response.close()
            used = passed.usage.total_tokens if passed.usage is not None else None
            response.lease.settle(used if passed.runs else 0, passed.cost)
            self.finish(passed, status, error)

    def _note(self, passed: PassedRequest, response: ResponseInHand, copies: _Copies) -> None:
        """Take note of what a whole response tells: the objects that it brings, its usage and its cost."""
        if copies.objects is not None:
            copies.objects.finish()
        if copies.usage is None:
            return
        document = copies.usage.document(response.is_stream)
        passed.usage = usage = usage_of(passed.route.segment, document)
        model = document.get("model")
        passed.answer_model = model if isinstance(model, str) else None
        if usage is not None:
            passed.cost = response.upstream.cost(passed.parsed, model, usage, document.get("service_tier"))

    def finish(self, passed: PassedRequest, status: int, error: str) -> None:
        """End what is reserved, and write the receipt. error: as in `PassedRequest.receipt`."""
        if passed.reservation is not None:
            passed.reservation.settle(0) if passed.log.sent else passed.reservation.cancel()
        self._observe(passed.receipt(status, error))


class _Copies:
    """Copies of a response, made before its bytes are passed on. objects: that it brings; usage: if a model ran."""

    def __init__(self, objects: ResponseWatch | None, runs: bool) -> None:
        self.objects = objects
        self.usage = ResponseCopy() if runs else None

    def feed(self, chunk: bytes) -> None:
        if self.objects is not None:
            self.objects.feed(chunk)
        if self.usage is not None:
            self.usage.feed(chunk)


def _is_json(response: ResponseInHand) -> bool:
    return response.response.headers.get("Content-Type", "").lower().startswith("application/json")


async def _read_small(passed: PassedRequest, response: ResponseInHand, read: list[bytes]) -> bool:
    """Read a response into `read`; return False if it is longer than `SMALL`. Raises TransportFailure."""
    size = 0
    try:
        async with passed.log.deadline.limit():
            async for chunk in response.more:
                read.append(chunk)
                size += len(chunk)
                if size > SMALL:
                    return False
    except TimeoutError:
        raise TransportFailure("timeout", "the upstream did not finish its answer in time") from None
    return True
