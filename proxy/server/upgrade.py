"""WebSockets: the handshake passes like any other request, then frames pass unread (`docs/routes-and-errors.md`).

Where no WebSocket can be had, the answer is 426 at once, so that a client falls back to HTTP.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Final

from aiohttp.web import BaseRequest

from ..protocol.errors import ProxyError
from ..protocol.options import Options
from ..protocol.request import Client
from ..protocol.routes import REALTIME, Route, query_values
from ..protocol.websocket import is_whole_handshake, without_credential
from ..services import Services
from ..upstream.keys.lease import KeyRequest
from ..upstream.limits.clients import check_any_model, check_model
from ..upstream.providers.registry import model_named
from ..upstream.request import NO_BODY, UpstreamRequest
from ..upstream.response import ResponseInHand
from ..upstream.sender import RetryingSender
from ..upstream.websocket import Tunnel
from .in_flight import InFlight
from .passed import PassedRequest
from .passthrough import PassthroughHandler
from .responses import FullResponse, StreamedResponse

_CARRIED: Final = frozenset({REALTIME, "/responses"})
"""The routes that may be WebSockets, by their path below `/v1`."""

_REASON: Final = "uncacheable: websocket"


class UpgradeHandler:
    """Carries WebSockets. in_flight: those that are open are streams in it."""

    def __init__(
        self, services: Services, sender: RetryingSender, passthrough: PassthroughHandler, in_flight: InFlight
    ) -> None:
        self._services = services
        self._sender = sender
        self._passthrough = passthrough
        self._in_flight = in_flight

    async def serve(
        self, request: BaseRequest, route: Route, client: Client, options: Options
    ) -> FullResponse | StreamedResponse:
        """Serve one WebSocket to its end. Raises ProxyError."""
        services = self._services
        if route.path not in _CARRIED:
            raise upgrade_required("this route is no WebSocket; use HTTP")
        if not is_whole_handshake(request.headers):
            raise upgrade_required("the WebSocket handshake is not whole (RFC 6455 section 4.1); use HTTP")
        if services.replays:
            raise upgrade_required("replay: WebSockets are not recorded; use HTTP")
        models = self._models(route)
        if models:
            check_model(client, *models)
        else:
            check_any_model(client)
        services.budgets.check(client)
        passed = PassedRequest(services, request, route, client, options, _REASON)
        passed.read(models[0] if models else "", True, b"", {})
        try:
            passed.reservation = await self._passthrough.reserve(client)
            response = await self._send(request, route, client, options, passed)
        except ProxyError as error:
            self._passthrough.finish(passed, error.status, error.code)
            error.proxy_headers = passed.headers()
            raise
        except asyncio.CancelledError:
            self._passthrough.finish(passed, 499, "client_gone")
            raise
        if response.status == 101:
            return await self._carry(request, passed, response)
        if response.status < 400:
            response.lease.settle(0)
        elif response.body is not None:
            return self._passthrough.error_response(request, passed, response, response.body, b"")
        response.response.close()
        self._passthrough.finish(passed, 426, "upgrade_required")
        message = f"the upstream speaks no WebSocket here (it answered {response.status}); use HTTP"
        refusal = upgrade_required(message)
        refusal.proxy_headers = passed.headers()
        raise refusal

    def _models(self, route: Route) -> list[str]:
        """Return the models that the path and the query name; several only if a client names several."""
        addresses = self._services.addresses
        named = [name for name in query_values(route.query, "model") if name]
        deployments = [name for name in query_values(route.query, "deployment") if name]
        if route.deployment is not None:
            deployments.append(route.deployment)
        found = [model_named(addresses, replace(route, deployment=name), None) for name in deployments] + named
        return list(dict.fromkeys(found))

    async def _send(
        self, request: BaseRequest, route: Route, client: Client, options: Options, passed: PassedRequest
    ) -> ResponseInHand:
        groups = None if passed.model else self._passthrough.key_groups(route)
        pinned_to = await self._passthrough.pin(passed) if route.query else ""
        return await self._sender.send(
            UpstreamRequest(
                method="GET",
                route=route,
                headers=request.raw_headers,
                body=NO_BODY,
                model=passed.model,
                client=client,
                attempt_log=passed.log,
                max_wait=passed.max_wait,
                key_request=KeyRequest(pinned_to=pinned_to, groups=groups),
                max_retries=options.max_retries,
                quota=self._sender.leases.quota(client),
                verbatim=True,
                upgrade=True,
            )
        )

    async def _carry(self, request: BaseRequest, passed: PassedRequest, response: ResponseInHand) -> StreamedResponse:
        """Let the frames pass until one side ends them."""
        task = asyncio.current_task()
        protocol = request.protocol
        assert task is not None
        passed.first_byte_ms = passed.elapsed_ms()
        error = ""
        tunnel = Tunnel(protocol, response.response.switched())
        self._in_flight.streams[task] = tunnel
        try:
            transport = protocol.transport
            if transport is None or transport.is_closing():
                raise ConnectionResetError("the client is gone")
            transport.write(self._head(passed, response))
            await tunnel.run()
            if tunnel.upstream_broke:
                error = "upstream_invalid_response"
        except ConnectionError:
            error = "client_gone"
        except asyncio.CancelledError:
            error = "client_gone" if tunnel.client_broke else ""
            raise
        finally:
            error = tunnel.interrupted or error
            del self._in_flight.streams[task]
            response.response.close()
            response.lease.settle(0)
            self._passthrough.finish(passed, 101, error)
        return StreamedResponse(False, 101)

    def _head(self, passed: PassedRequest, response: ResponseInHand) -> bytes:
        response.response.raw_headers = without_credential(response.response.raw_headers)
        return self._passthrough.head(passed, response) + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


def upgrade_required(message: str) -> ProxyError:
    """Return the error that sends a client to HTTP (RFC 9110 section 15.5.22)."""
    headers = (("Upgrade", "HTTP/1.1"), ("Connection", "Upgrade"))
    return ProxyError("upgrade_required", message, headers=headers)
