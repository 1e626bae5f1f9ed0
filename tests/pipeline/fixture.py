"""A world on a stage: settings, a scripted way up, turned time; and books that must balance when the story is over."""

from __future__ import annotations

import asyncio
import itertools
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
    """One upstream with a key `sk-NAME` for each name."""
    keys = tuple(KeySettings(name, Secret(f"sk-{name}"), quota=name) for name in names)
    return UpstreamSettings(base_url="http://up.test/v1", keys=keys, **fields)


def settings(*upstreams: UpstreamSettings, **sections: Any) -> Settings:
    """One pool with one key where no upstream is given; no dice, 1 s of pause, everything counted."""
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
    """What the client saw of one request. refused: our error code; broken: the stream had no clean end."""

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
    """The handler of the five endpoints, built as `app` builds it."""
    sender = build_endpoint_sender(services, build_sender(services, transport), build_reservations(services))
    return build_handler(services, sender, [observe])


def header_lines(lines: str) -> dict[str, str]:
    """Our own header lines, each of which must be whole and stand once."""
    pairs = [line.partition(": ") for line in lines.split("\r\n")]
    assert pairs.pop() == ("", "", ""), lines
    names = [name for name, _, _ in pairs]
    assert len({name.lower() for name in names}) == len(names), lines
    assert all(name and value for name, _, value in pairs), lines
    return {name: value for name, _, value in pairs}


class PipelineFixture:
    """One proxy without its edges, in turned time. `moves`: what the upstream does, in order."""

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
        self.journey = request_handler(self.services, self.transport, self.receipts.append)

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
    ) -> ProxyRequest:
        """A request, understood as the edge does it."""
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
        )

    async def ask(self, document: Any = None, options: Options | None = None, **more: Any) -> Result:
        """One request to the end of its answer."""
        return await self.serve(self.request(document, options, **more))

    async def serve(self, request: ProxyRequest) -> Result:
        told = await self.answer(request)
        told.at = round(self.loop.time() - request.arrived, 6)
        return told

    async def answer(self, request: ProxyRequest) -> Result:
        """As `edge.downstream` goes about it: serve, let flow."""
        try:
            served = await self.journey.handle(request, lambda: None)
        except ProxyError as refusal:
            headers = header_lines(lines_of(refusal.proxy_headers)) if refusal.proxy_headers else {}
            return Result(refusal.status, refusal.body(), headers, refusal=refusal.copy(refusal.proxy_headers))
        if isinstance(served, CacheHit):
            return Result(served.entry.status, served.body, raw_headers=served.entry.headers, hit=served)
        bought = served
        told = Result(
            bought.status,
            bought.body or b"",
            header_lines(lines_of(bought.proxy_headers)),
            bought.headers,
            flow=bought.stream,
        )
        if bought.stream is not None:
            await self.pump(bought, told)
        return told

    async def pump(self, bought: Reply, told: Result) -> None:
        assert bought.stream is not None
        assert bought.body is None
        self.flows.append(bought.stream)

        async def write(data: bytes) -> None:
            assert data
            told.reads.append(data)
            if self.write is not None:
                await self.write(data)

        try:
            await bought.stream.relay(write)
        except StreamBroken:
            told.broken = True
        finally:
            bought.stream.client_left()
            told.body = b"".join(told.reads)

    async def fetch(self, request: ProxyRequest) -> Reply:
        """The reply from upstream, shared with identical requests; its receipt is not finished."""
        reply = await self.journey.coalescer.fetch(request, await self.journey.planner.plan(request))
        assert isinstance(reply, Reply)
        return reply

    def peek(self, target: str, scope: str, body: bytes) -> CacheHit | None:
        return self.journey.cache.peek(digest_of_request(target, scope, body))

    async def planned(self, document: Any = None, options: Options | None = None, **more: Any) -> CachePlan:
        return await self.journey.planner.plan(self.request(document, options, **more))

    async def interrupt(self, told: asyncio.Task[Result]) -> Result:
        """The drain's last word to a stream, as `app` speaks it."""
        self.flows[-1].interrupted = "draining"
        told.cancel()
        return await told

    # -- judging ------------------------------------------------------------------------------------------------------

    @property
    def receipt(self) -> Receipt:
        """The last one."""
        return self.receipts[-1]

    def used(self, name: str = "k1", model: str = "gpt-4o") -> dict[str, int]:
        """What is held of each limit of a key."""
        key = next(key for key in self.services.pool.keys if key.label == name)
        allowance = self.services.pool.rate_limiter(key, model, self.loop.time())
        assert allowance is not None
        return {limit: row["used"] for limit, row in allowance.usage(self.loop.time()).items()}

    def state(self, name: str = "k1", model: str = "gpt-4o") -> tuple[str, float] | None:
        """(state, seconds left), None where the key is ready."""
        state = self.services.pool.state(name, model, self.loop.time())
        return None if state is None else (state.status.value, round(state.until - self.loop.time(), 3))

    def assert_nothing_leaked(self, model: str = "gpt-4o") -> None:
        """Nothing is held any more: no place in the queue, no permit, no connection; and what went up was counted."""
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
