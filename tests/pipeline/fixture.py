"""The pipeline without sockets: settings, a scripted upstream, virtual time, and a check that nothing is leaked."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import orjson

from proxy.accounting.receipt import Receipt
from proxy.app import build_handler
from proxy.cache.lookup import CacheHit, digest_of_request
from proxy.cache.plan import CachePlan
from proxy.config.limits import Limits
from proxy.config.secret import Secret
from proxy.config.settings import (
    KeySettings,
    RetrySettings,
    Settings,
    ThrottleSettings,
    TimeoutSettings,
    UpstreamSettings,
)
from proxy.coordination import NO_COORDINATION, Coordination
from proxy.pipeline.coalescing.broadcast import SubscriberStream
from proxy.pipeline.coalescing.reply import Reply
from proxy.pipeline.handler import RequestHandler
from proxy.pipeline.relay import StreamBroken, StreamRelay
from proxy.pipeline.response_headers import lines_of
from proxy.protocol.errors import ProxyError
from proxy.protocol.headers import Raw
from proxy.protocol.options import Options
from proxy.protocol.request import Client, ProxyRequest
from proxy.protocol.routes import parse_target
from proxy.services import Services, build_endpoint_sender, build_reservations, build_sender, build_services
from proxy.system.clock import Clock
from proxy.upstream.interfaces import UpstreamTransport, Write
from proxy.upstream.limits.rate_limiter import MARGIN
from proxy.upstream.providers.registry import model_named
from tests.pipeline.clock import START, WALL, virtual_time_loop
from tests.pipeline.script import Move, ScriptedTransport

CHAT = "/v1/chat/completions"
LIMITS = Limits(rpm=1000, tpm=1_000_000, concurrency=100)
"""Wide limits: nothing waits, everything is counted."""


def pool(*names: str, **fields: Any) -> UpstreamSettings:
    """Return an upstream with a key `sk-NAME` for each name."""
    keys = tuple(KeySettings(name, Secret(f"sk-{name}"), quota=name) for name in names)
    return UpstreamSettings(base_url="http://up.test/v1", keys=keys, **fields)


def settings(*upstreams: UpstreamSettings, **sections: Any) -> Settings:
    """Return settings with one key if no upstream is given. Pauses are 1 s without jitter, and every limit counts."""
    base = Settings(
        upstreams=upstreams or (pool("k1"),),
        retry=RetrySettings(jitter=0.0),
        throttle=ThrottleSettings(limits={"*": LIMITS}),
        timeouts=TimeoutSettings(total=60.0),
    )
    return replace(base, **sections)


def ask(text: str = "Hi", **fields: Any) -> dict[str, Any]:
    return {"model": "gpt-4o", "messages": [{"role": "user", "content": text}]} | fields


@dataclass(slots=True)
class Result:
    """What the client saw of one request. refused: the proxy's error code. broken: the stream had no clean end."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    raw_headers: Sequence[Raw] = ()
    hit: CacheHit | None = None
    refusal: ProxyError | None = None
    broken: bool = False
    reads: list[bytes] = field(default_factory=list)
    flow: StreamRelay | SubscriberStream | None = None
    at: float = 0.0

    @property
    def refused(self) -> str:
        return self.refusal.code if self.refusal is not None else ""

    @property
    def cache(self) -> str:
        return "hit" if self.hit is not None else self.headers["X-Proxy-Cache"]

    @property
    def reason(self) -> str:
        return self.headers["X-Proxy-Cache-Reason"]

    @property
    def attempts(self) -> int:
        return int(self.headers["X-Proxy-Attempts"])

    @property
    def cost(self) -> str | None:
        return self.headers.get("X-Proxy-Cost-USD")

    def json(self) -> Any:
        return orjson.loads(self.body)


def request_handler(
    services: Services, transport: UpstreamTransport, observe: Callable[[Receipt], None]
) -> RequestHandler:
    """Return the handler of the five endpoints, as `app` builds it."""
    sender = build_endpoint_sender(services, build_sender(services, transport), build_reservations(services))
    return build_handler(services, sender, [observe])


def header_lines(lines: str) -> dict[str, str]:
    """Return the proxy's own headers. Each must be whole and occur once."""
    pairs = [line.partition(": ") for line in lines.split("\r\n")]
    assert pairs.pop() == ("", "", ""), lines
    names = [name for name, _, _ in pairs]
    assert len({name.lower() for name in names}) == len(names), lines
    assert all(name and value for name, _, value in pairs), lines
    return {name: value for name, _, value in pairs}


class PipelineFixture:
    """A proxy without sockets, in virtual time. moves: what the upstream does, in order."""

    def __init__(
        self,
        *moves: Move,
        config: Settings | None = None,
        transport: ScriptedTransport | None = None,
        coordination: Coordination = NO_COORDINATION,
    ) -> None:
        self.loop = virtual_time_loop()
        numbers = itertools.count(1)
        self.clock = Clock(
            monotonic=self.loop.time,
            wall=lambda: WALL + self.loop.time() - START,
            random=lambda: 0.5,
            new_id=lambda: f"id-{next(numbers)}",
        )
        self.transport = transport or ScriptedTransport(*moves)
        self.services: Services = build_services(config or settings(), self.clock, coordination=coordination)
        self.receipts: list[Receipt] = []
        self.rebuild()
        self.flows: list[StreamRelay | SubscriberStream] = []
        self.write: Write | None = None  # a client that is slow, or gone

    def rebuild(self, services: Services | None = None) -> None:
        """Build the handler anew, from other services or from those that a test has changed."""
        self.services = services or self.services
        self.handler = request_handler(self.services, self.transport, self.receipts.append)

    # -- asking -------------------------------------------------------------------------------------------------------

    def request(
        self,
        document: Any = None,
        options: Options | None = None,
        *,
        body: bytes | None = None,
        target: str = CHAT,
        headers: Sequence[Raw] = ((b"Content-Type", b"application/json"),),
        client: Client | None = None,
        total: float | None = None,
        patience: float | None = None,
        act_for: float = math.inf,
    ) -> ProxyRequest:
        """Return a request, parsed as the server parses it."""
        document = ask() if document is None else document
        route = parse_target(target)
        config = self.services.settings
        options = options or route.options
        now = self.loop.time()
        if total is None:
            total = config.timeouts.total if options.timeout is None else options.timeout
        if patience is None:
            patience = options.max_wait if options.max_wait is not None else config.throttle.max_wait
        assert patience is not None
        return ProxyRequest.from_body(
            orjson.dumps(document) if body is None else body,
            document,
            partial(model_named, self.services.addresses),
            route=route,
            headers=headers,
            options=options,
            client=client or Client(),
            id=self.clock.new_id(),
            arrived=now,
            deadline=now + total,
            max_wait=patience,
            act_until=now + act_for,
        )

    async def ask(self, document: Any = None, options: Options | None = None, **more: Any) -> Result:
        """Make a request and return its result, when the response has ended."""
        return await self.serve(self.request(document, options, **more))

    async def serve(self, request: ProxyRequest) -> Result:
        result = await self.answer(request)
        result.at = round(self.loop.time() - request.arrived, 6)
        return result

    async def answer(self, request: ProxyRequest) -> Result:
        """Handle a request as `server/api.py` does, and relay a stream."""
        try:
            answer = await self.handler.handle(request, lambda: None)
        except ProxyError as refusal:
            headers = header_lines(lines_of(refusal.proxy_headers)) if refusal.proxy_headers else {}
            return Result(refusal.status, refusal.body(), headers, refusal=refusal.copy(refusal.proxy_headers))
        if isinstance(answer, CacheHit):
            return Result(answer.entry.status, answer.body, raw_headers=answer.entry.headers, hit=answer)
        reply = answer
        result = Result(
            reply.status,
            reply.body or b"",
            header_lines(lines_of(reply.proxy_headers)),
            reply.headers,
            flow=reply.stream,
        )
        if reply.stream is not None:
            await self.pump(reply, result)
        return result

    async def pump(self, reply: Reply, result: Result) -> None:
        assert reply.stream is not None
        assert reply.body is None
        self.flows.append(reply.stream)

        async def write(data: bytes) -> None:
            assert data
            result.reads.append(data)
            if self.write is not None:
                await self.write(data)

        try:
            await reply.stream.relay(write)
        except StreamBroken:
            result.broken = True
        finally:
            reply.stream.client_left()
            result.body = b"".join(result.reads)

    async def fetch(self, request: ProxyRequest) -> Reply:
        """Return the reply from upstream, shared with identical requests. Its receipt is not finished."""
        reply = await self.handler.coalescer.fetch(request, await self.handler.planner.plan(request))
        assert isinstance(reply, Reply)
        return reply

    def peek(self, target: str, scope: str, body: bytes) -> CacheHit | None:
        return self.handler.cache.peek(digest_of_request(target, scope, body))

    async def planned(self, document: Any = None, options: Options | None = None, **more: Any) -> CachePlan:
        return await self.handler.planner.plan(self.request(document, options, **more))

    async def interrupt(self, result: asyncio.Task[Result]) -> Result:
        """Interrupt a stream as the drain does."""
        self.flows[-1].interrupted = "draining"
        result.cancel()
        return await result

    # -- judging ------------------------------------------------------------------------------------------------------

    @property
    def receipt(self) -> Receipt:
        """Return the last receipt."""
        return self.receipts[-1]

    def used(self, name: str = "k1", model: str = "gpt-4o") -> dict[str, int]:
        """Return what is used of each limit of a key."""
        key = next(key for key in self.services.pool.keys if key.label == name)
        allowance = self.services.pool.rate_limiter(key, model, self.loop.time())
        assert allowance is not None
        return {limit: row["used"] for limit, row in allowance.usage(self.loop.time()).items()}

    def state(self, name: str = "k1", model: str = "gpt-4o") -> tuple[str, float] | None:
        """Return (state, seconds left) of a key; None if it is ready."""
        state = self.services.pool.state(name, model, self.loop.time())
        return None if state is None else (state.status.value, round(state.until - self.loop.time(), 3))

    def assert_nothing_leaked(self, model: str = "gpt-4o") -> None:
        """Assert that no place in a queue, no limit and no connection is held, and that what was sent was counted."""
        assert self.services.admission.depth == 0
        assert self.services.admission.depths() == {}
        went_up: dict[str, int] = {}
        for sent in self.transport.sent:
            if self.loop.time() - sent.at < 60 * MARGIN:
                went_up[sent.key] = went_up.get(sent.key, 0) + sent.connection.connected
            assert sent.reply is None or sent.reply.given_back, sent
        for key in self.services.pool.keys:
            allowance = self.services.pool.rate_limiter(key, model, self.loop.time())
            if allowance is not None:
                used = self.used(key.label, model)
                assert used.get("concurrency", 0) == 0
                if "rpm" in used:
                    assert used["rpm"] == went_up.get(key.label, 0), (key.label, used, went_up)
        assert len(self.receipts) == len({receipt.id for receipt in self.receipts})
