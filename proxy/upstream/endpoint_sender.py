"""Sends requests to the five endpoints that are understood: what is reserved for them, which models may answer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

import orjson

from ..protocol.errors import ProxyError
from ..protocol.json_edit import set_field, want_usage
from ..protocol.request import ProxyRequest
from .keys.lease import KeyRequest
from .keys.object_owners import ObjectOwners
from .keys.prompt_affinity import PREFIX_BYTES, prefix_of
from .progress import AttemptLog
from .request import UpstreamRequest
from .reservations import Reservations
from .response import ResponseInHand
from .result import unwrap
from .retry.fallback import fallbacks_for, with_model
from .retry.outcome import OutcomeKind
from .sender import RetryingSender
from .target import Upstream

_MAX_REFUSALS: Final = 1000


class EndpointSender:
    """Sends requests to the five endpoints.

    fallbacks: models to try instead, by glob. stream_usage: the usage of a stream is asked for.
    """

    def __init__(
        self,
        sender: RetryingSender,
        reservations: Reservations,
        owners: ObjectOwners,
        fallbacks: Mapping[str, tuple[str, ...]],
        stream_usage: bool,
    ) -> None:
        self._sender = sender
        self._leases = sender.leases
        self._pool = sender.leases.pool
        self._reservations = reservations
        self.estimates = reservations.estimates
        self._owners = owners
        self._fallbacks = fallbacks
        self._stream_usage = stream_usage
        self._refusals: set[tuple[str, str]] = set()
        """(upstream, model) that refuse `stream_options`."""

    async def send(self, request: ProxyRequest, attempt_log: AttemptLog, *, whole: bool = True) -> ResponseInHand:
        """Return the response to give. Raises ProxyError if there is none. `attempt_log` is filled in.

        whole: the response is all that the client gets; to a part of one no other model may answer.
        """
        size = attempt_log.size = self.estimates.size(request)
        tokens = self.estimates.tokens(request.model, size)
        budget = await self._reservations.budget(request, size)
        send = partial(self._with_fallbacks, request, tokens, attempt_log, whole)
        return await self._reservations.send(request.client, tokens, budget, attempt_log, send)

    async def _with_fallbacks(
        self, request: ProxyRequest, tokens: int, attempt_log: AttemptLog, whole: bool
    ) -> ResponseInHand:
        """Return the response of the request's own model, or of one of its fallbacks."""
        pinned_to = await self._owners.pinned_key(self._pool, request, self._leases.clock.monotonic())
        first = await self._send_with_model(request, tokens, attempt_log, pinned_to)
        others = fallbacks_for(self._fallbacks, request.model) if whole else ()
        if not others or pinned_to or not attempt_log.exhausted:
            return unwrap(first)
        before = attempt_log.spent, attempt_log.no_usable_key
        kept = False
        try:
            for model in others:
                if attempt_log.deadline.left_to_act() <= 0:
                    break
                attempt_log.spent = attempt_log.no_usable_key = False
                other = await self._send_with_model(with_model(request, model), tokens, attempt_log, "")
                if isinstance(other, ResponseInHand):
                    if other.outcome is OutcomeKind.OK:
                        attempt_log.model = model
                        return other
                    other.response.close()
            kept = True
            attempt_log.spent, attempt_log.no_usable_key = before
            return unwrap(first)
        finally:
            if not kept and isinstance(first, ResponseInHand):
                first.response.close()

    async def _send_with_model(
        self, request: ProxyRequest, tokens: int, attempt_log: AttemptLog, pinned_to: str
    ) -> ResponseInHand | ProxyError:
        """Return the result with the model of `request`. `attempt_log.exhausted`: no key or upstream is left to try."""
        attempt_log.exhausted = False
        try:
            response = await self._sender.send(
                UpstreamRequest(
                    method="POST",
                    route=request.route,
                    headers=request.headers,
                    body=_EndpointBody(request, self._stream_usage, self._refusals),
                    model=request.model,
                    client=request.client,
                    attempt_log=attempt_log,
                    max_wait=request.max_wait,
                    key_request=KeyRequest(self._prefix(request), pinned_to=pinned_to),
                    tokens=tokens,
                    max_retries=request.options.max_retries,
                    quota=self._leases.quota(request.client),
                    stream=request.stream,
                )
            )
        except ProxyError as error:
            return error.copy(error.proxy_headers)
        return response

    def _prefix(self, request: ProxyRequest) -> bytes:
        if len(self._pool.keys) == 1 or len(request.body) < PREFIX_BYTES:
            return b""
        return prefix_of(request.endpoint, request.document, request.model)


class _EndpointBody:
    """The client's bytes, in which only those fields are changed that must be."""

    __slots__ = ("_refusals", "_request", "_stream_usage")
    length = None
    error = None

    def __init__(self, request: ProxyRequest, stream_usage: bool, refusals: set[tuple[str, str]]) -> None:
        self._request = request
        self._stream_usage = stream_usage and request.stream and request.endpoint in ("chat", "completions")
        self._refusals = refusals

    def for_upstream(self, upstream: Upstream) -> tuple[bytes, bool]:
        request, body = self._request, self._request.body
        model = upstream.provider.body_model(upstream.address, request.route, request.model, request.body_model)
        if model is not None:
            body = set_field(body, "model", orjson.dumps(model))
        if self._stream_usage and (upstream.address.name, request.model) not in self._refusals:
            with_usage = want_usage(body, request.document)
            if with_usage is not None:
                return with_usage, True
        return body, False

    def without_usage(self, upstream: Upstream) -> None:
        if len(self._refusals) >= _MAX_REFUSALS:
            self._refusals.clear()  # adding none would send this request round in circles
        self._refusals.add((upstream.address.name, self._request.model))
