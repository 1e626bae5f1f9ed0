"""Parses requests to the cached endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from aiohttp.web import BaseRequest

from ..config.settings import Settings
from ..protocol.headers import Raw
from ..protocol.options import Options, from_headers
from ..protocol.request import Client, ProxyRequest, parse_body
from ..protocol.routes import Route
from ..services import Services
from ..system.threads import in_thread_if_large
from ..upstream.providers.registry import model_named


class RequestParser:
    """Makes a `ProxyRequest` of an HTTP request."""

    def __init__(self, services: Services) -> None:
        self._clock = services.clock
        self._settings = services.settings
        self._model_of = partial(model_named, services.addresses)

    async def parse(
        self,
        request: BaseRequest,
        route: Route,
        client: Client,
        body: bytes,
        headers: Sequence[Raw],
        *,
        has_options: bool,
    ) -> ProxyRequest:
        """Return the parsed request. headers: those that fit the body. has_options: a header may be a request option.

        Raises ProxyError(invalid_json, invalid_option).
        """
        options = from_headers(route.options, text_headers(headers)) if has_options else route.options
        document = await in_thread_if_large(len(body), parse_body, body)
        now = self._clock.monotonic()
        limits = time_limits(self._settings, options, request, now)
        return ProxyRequest.from_body(
            body,
            document,
            self._model_of,
            route=route,
            headers=headers,
            options=options,
            client=client,
            id=self._clock.new_id(),
            arrived=now,
            deadline=limits.deadline,
            max_wait=limits.max_wait,
            act_until=limits.act_until,
        )


class TimeLimits(NamedTuple):
    """deadline, act_until: monotonic seconds, as in `SharedDeadline`. max_wait: seconds to wait for a key."""

    deadline: float
    act_until: float
    max_wait: float


def time_limits(settings: Settings, options: Options, request: BaseRequest, now: float) -> TimeLimits:
    """Return the time limits of a request that came at `now` (monotonic seconds)."""
    timeout = settings.timeouts.total if options.timeout is None else options.timeout
    client_timeout = _client_timeout(request)
    act_for = timeout
    if client_timeout is not None:  # refuse before the client gives up
        act_for = min(timeout, client_timeout - min(1.0, client_timeout / 10))
    max_wait = options.max_wait if options.max_wait is not None else settings.throttle.max_wait
    if max_wait is None:
        max_wait = max(0.0, (client_timeout if client_timeout is not None else timeout) - 5.0)
    return TimeLimits(now + timeout, now + act_for, max_wait)


def text_headers(headers: Sequence[Raw]) -> list[tuple[str, str]]:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]


def _client_timeout(request: BaseRequest) -> float | None:
    """Return the client's own timeout in seconds, which OpenAI's SDKs send."""
    timeouts = []
    for name in ("X-Stainless-Read-Timeout", "X-Stainless-Timeout"):
        text = request.headers.get(name)
        if text is None:
            continue
        try:
            seconds = float(text)
        except ValueError:
            continue
        if 0 < seconds < 1e6:
            timeouts.append(seconds)
    return min(timeouts) if timeouts else None
