"""A first set of Prometheus metrics. Label values are few: model names are bounded, the rest are our own words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..core.answer import ZERO_COST
from ..core.entry import Entry
from ..core.receipt import Receipt
from ..core.routes import ENDPOINTS, SEGMENTS
from ..world import World
from .budget_gauges import BudgetGauges

MAX_MODELS: Final = 100
_ENDPOINTS: Final = SEGMENTS | set(ENDPOINTS.values())
"""What may stand as `endpoint`: any other path is passed on, too, and would be a label of the client's making."""

_SECONDS: Final = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass(frozen=True, slots=True)
class _Counters:
    """The metrics that requests of one kind move, found once: looking a label up costs more than counting."""

    requests: Counter
    seconds: Histogram
    attempts: Counter | None
    prompt: Counter
    cached: Counter
    completion: Counter
    cost: Counter
    unknown: Counter


class Metrics:
    """Counts what receipts tell. `sample` reads gauges from a world when a scrape comes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ["endpoint", "model", "cache", "status"]
        self._requests = Counter(
            "openai_proxy_requests", "Requests finished, by status class.", labels, registry=self.registry
        )
        self._seconds = Histogram(
            "openai_proxy_request_duration_seconds",
            "From a request's arrival to the end of its answer; hits are not in it.",
            ["endpoint", "cache"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._queue = Histogram(
            "openai_proxy_queue_wait_seconds",
            "Time waited for a key or a limit.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._tokens = Counter(
            "openai_proxy_tokens", "Tokens bought, by kind.", ["model", "kind"], registry=self.registry
        )
        self._cost = Counter("openai_proxy_cost_usd", "What answers cost.", ["model"], registry=self.registry)
        self._saved = Counter(
            "openai_proxy_cost_saved_usd",
            "What came from the cache or was coalesced would have cost.",
            ["model"],
            registry=self.registry,
        )
        self._unknown = Counter(
            "openai_proxy_cost_unknown", "Answers whose cost is not known.", ["model"], registry=self.registry
        )
        self._attempts = Counter(
            "openai_proxy_upstream_attempts", "Calls made to upstreams.", ["upstream"], registry=self.registry
        )
        self._errors = Counter(
            "openai_proxy_errors", "Requests that ended in an error, by code.", ["code"], registry=self.registry
        )
        self._in_flight = Gauge("openai_proxy_in_flight", "Requests being served.", registry=self.registry)
        self._waiting = Gauge("openai_proxy_queue_depth", "Requests waiting for a key.", registry=self.registry)
        self._keys = Gauge("openai_proxy_keys", "Pool keys by state.", ["state"], registry=self.registry)
        self._sound = Gauge(
            "openai_proxy_limits_sound",
            "1 while limits hold as they should, 0 while the Redis they are shared over is lost.",
            registry=self.registry,
        )
        self._open = Gauge(
            "openai_proxy_upstream_open",
            "1 while an upstream is left alone after failures (the circuit breaker is open or half open).",
            ["upstream"],
            registry=self.registry,
        )
        self._entries = Gauge("openai_proxy_cache_entries", "Entries in memory.", registry=self.registry)
        self._bytes = Gauge("openai_proxy_cache_bytes", "Bytes of entries in memory.", registry=self.registry)
        self._budgets = BudgetGauges(self.registry)
        self._models: set[str] = set()
        self._hits: dict[tuple[str, str], tuple[Counter, Counter]] = {}
        self._kinds: dict[tuple[str, str, str, int, str], _Counters] = {}

    def model(self, name: str) -> str:
        """`name` as a label value: bounded in number, length and characters."""
        if name in self._models:
            return name
        if not name or len(name) > 64 or not name.isprintable() or len(self._models) >= MAX_MODELS:
            return "other"
        self._models.add(name)
        return name

    def hit(self, entry: Entry) -> None:
        """One hit; cheap, for it is on the hot path."""
        counters = self._hits.get((entry.endpoint, entry.model))
        if counters is None:
            model = self.model(entry.model)
            counters = self._requests.labels(entry.endpoint, model, "hit", "2xx"), self._saved.labels(model)
            if len(self._hits) < 10 * MAX_MODELS:
                self._hits[entry.endpoint, entry.model] = counters
        counters[0].inc()
        if entry.cost is not None:
            counters[1].inc(float(entry.cost))

    def observe(self, receipt: Receipt) -> None:
        """One request that was not a hit."""
        endpoint = receipt.endpoint if receipt.endpoint in _ENDPOINTS else "other"
        kind = (endpoint, receipt.model, receipt.cache, receipt.status // 100, receipt.upstream)
        counters = self._kinds.get(kind)
        if counters is None:
            counters = self._counters(*kind)
            if len(self._kinds) < 10 * MAX_MODELS:
                self._kinds[kind] = counters
        counters.requests.inc()
        counters.seconds.observe(receipt.total_ms / 1000)
        if receipt.queue_ms > 1:
            self._queue.observe(receipt.queue_ms / 1000)
        if receipt.attempts and counters.attempts is not None:
            counters.attempts.inc(receipt.attempts)
        if receipt.error:
            self._errors.labels(receipt.error).inc()
        if receipt.cache == "stale":  # its usage was bought long ago
            if receipt.saved_usd is not None:
                self._saved.labels(self.model(receipt.model)).inc(float(receipt.saved_usd))
            return
        usage = receipt.usage
        if usage is not None and receipt.cache != "coalesced":
            counters.prompt.inc(usage.prompt_tokens)
            if usage.cached_tokens:
                counters.cached.inc(usage.cached_tokens)
            counters.completion.inc(usage.completion_tokens)
        if receipt.cost_usd is not None:
            counters.cost.inc(float(receipt.cost_usd))
            if receipt.saved_usd not in (None, ZERO_COST):
                self._saved.labels(self.model(receipt.model)).inc(float(receipt.saved_usd))
        elif receipt.status < 300:
            counters.unknown.inc()

    def _counters(self, endpoint: str, model: str, cache: str, status: int, upstream: str) -> _Counters:
        name = self.model(model)
        return _Counters(
            requests=self._requests.labels(endpoint, name, cache, f"{status}xx"),
            seconds=self._seconds.labels(endpoint, cache),
            attempts=self._attempts.labels(upstream) if upstream else None,
            prompt=self._tokens.labels(name, "prompt"),
            cached=self._tokens.labels(name, "cached"),
            completion=self._tokens.labels(name, "completion"),
            cost=self._cost.labels(name),
            unknown=self._unknown.labels(name),
        )

    def refusal(self, code: str) -> None:
        """A request turned away before it became a call."""
        self._errors.labels(code).inc()

    def render(self, world: World, in_flight: int) -> bytes:
        """The text for one scrape (Prometheus exposition format 0.0.4)."""
        self._in_flight.set(in_flight)
        self._waiting.set(world.gate.depth)
        for state, count in world.ring.counts(world.seams.monotonic()).items():
            self._keys.labels(state).set(count)
        self._sound.set(world.limiter is None or world.limiter.sound)
        for upstream in world.upstreams:
            state = upstream.breaker.state(world.seams.monotonic())
            self._open.labels(upstream.site.name).set(state != "closed")
        self._budgets.show(world.budgets)
        if world.store is not None:
            stats = world.store.memory.stats()
            self._entries.set(stats["entries"])
            self._bytes.set(stats["bytes"])
        return generate_latest(self.registry)
