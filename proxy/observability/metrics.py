"""Prometheus metrics. Label values are few: model names are bounded, the rest are our own words.

Counted in plain numbers and made into metrics at a scrape: a request pays for additions only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ..accounting.receipt import Receipt
from ..cache.entry import Entry
from ..pipeline.response_headers import ZERO_COST
from ..protocol.routes import ENDPOINTS, SEGMENTS
from ..services import Services
from ..system.clock import Clock
from ..upstream.counters import GAPS, Histogram, UpstreamCounters
from ..upstream.retry.circuit_breaker import STATES
from .budget_gauges import budget_gauges

MAX_MODELS: Final = 100
LOOP_LAG_INTERVAL: Final = 0.5
"""Seconds between two looks at how late the event loop is."""

_ENDPOINTS: Final = SEGMENTS | set(ENDPOINTS.values())
"""What may stand as `endpoint`: any other path is passed on, too, and would be a label of the client's making."""

_SECONDS: Final = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_OWN: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
_KEPT: Final = 10 * MAX_MODELS
_PREFIX: Final = "openai_proxy_"

Labels = tuple[str, ...]


class _Counter:
    """A counter by label values. name: without the prefix and `_total`."""

    def __init__(self, name: str, about: str, *labels: str) -> None:
        self._told = _PREFIX + name, about
        self._labels = labels
        self.values: defaultdict[Labels, float] = defaultdict(float)
        if not labels:
            self.values[()] = 0.0

    def family(self) -> Metric:
        found = CounterMetricFamily(*self._told, labels=self._labels)
        for labels, value in self.values.items():
            found.add_metric(labels, value)
        return found


class _Histogram:
    """A histogram by label values. name: without the prefix; bounds: of its buckets."""

    def __init__(self, name: str, about: str, bounds: Sequence[float], *labels: str) -> None:
        self._told = _PREFIX + name, about
        self._labels = labels
        self.bounds = bounds
        self.values: dict[Labels, Histogram] = {} if labels else {(): Histogram(bounds)}

    def of(self, *labels: str) -> Histogram:
        found = self.values.get(labels)
        if found is None:
            found = self.values[labels] = Histogram(self.bounds)
        return found

    def family(self) -> Metric:
        found = HistogramMetricFamily(*self._told, labels=self._labels)
        for labels, tally in self.values.items():
            found.add_metric(labels, tally.cumulative(), tally.total)
        return found


@dataclass(frozen=True, slots=True)
class _HitCounters:
    """What requests of one kind move, found once: the labels of counters, and histograms."""

    requests: Labels
    model: Labels
    prompt: Labels
    cached: Labels
    completion: Labels
    seconds: Histogram
    first_byte: Histogram


class Metrics(Collector):
    """Counts what receipts tell. What stands still between requests is read from a world when a scrape comes."""

    def __init__(self) -> None:
        self._requests = _Counter(
            "requests", "Requests finished, by status class.", "endpoint", "model", "cache", "status"
        )
        self._tokens = _Counter("tokens", "Tokens bought, by kind.", "model", "kind")
        self._cost = _Counter("cost_usd", "What answers cost.", "model")
        self._saved = _Counter("cost_saved_usd", "What came from the cache or was coalesced would have cost.", "model")
        self._unknown = _Counter("cost_unknown", "Answers whose cost is not known.", "model")
        self._attempts = _Counter("upstream_attempts", "Calls made to upstreams.", "upstream")
        self._retries = _Counter(
            "retries", "Attempts that another followed, by what came of them.", "upstream", "reason"
        )
        self._errors = _Counter("errors", "Requests that ended in an error, by code.", "code")
        self._seconds = _Histogram(
            "request_duration_seconds",
            "From a request's arrival to the end of its answer; hits are not in it.",
            _SECONDS,
            "endpoint",
            "cache",
        )
        self._first_byte = _Histogram(
            "time_to_first_byte_seconds",
            "From a request's arrival to the first byte of its answer; hits are not in it.",
            _SECONDS,
            "endpoint",
        )
        self._queue = _Histogram("queue_wait_seconds", "Time waited for a key or a limit.", _SECONDS)
        self._overhead = _Histogram(
            "overhead_seconds", "Time that the proxy itself added to a request; hits are not in it.", _OWN
        )
        self._gaps = _Histogram("stream_chunk_gap_seconds", "Time between two reads of a stream from upstream.", GAPS)
        self._lag = _Histogram("event_loop_lag_seconds", "How late the event loop is with what is due.", _OWN)
        self._models: set[str] = set()
        self._hits: dict[tuple[str, str], tuple[Labels, Labels]] = {}
        self._kinds: dict[tuple[str, str, str, int], _HitCounters] = {}
        self._now: tuple[Services, int] | None = None
        self.registry = CollectorRegistry()
        self.registry.register(self)

    # -- what happens --------------------------------------------------------------------------------------------------

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
        labels = self._hits.get((entry.endpoint, entry.model))
        if labels is None:
            model = self.model(entry.model)
            labels = (entry.endpoint, model, "hit", "2xx"), (model,)
            if len(self._hits) < _KEPT and len(entry.model) < 1000:
                self._hits[entry.endpoint, entry.model] = labels
        self._requests.values[labels[0]] += 1
        if entry.cost is not None:
            self._saved.values[labels[1]] += float(entry.cost)

    def observe(self, receipt: Receipt) -> None:
        """One request that was not a hit."""
        kind_of = receipt.endpoint, receipt.model, receipt.cache, receipt.status // 100
        kind = self._kinds.get(kind_of)
        if kind is None:
            kind = self._kind(*kind_of)
            if len(self._kinds) < _KEPT and len(receipt.model) < 1000:
                self._kinds[kind_of] = kind
        self._requests.values[kind.requests] += 1
        total = receipt.total_ms
        kind.seconds.add(total / 1000)
        if receipt.status < 400:
            first = receipt.first_byte_ms
            kind.first_byte.add((total if first is None else first) / 1000)
        if receipt.queue_ms > 1:
            self._queue.values[()].add(receipt.queue_ms / 1000)
        if receipt.attempts and receipt.upstream:
            self._attempts.values[receipt.upstream,] += receipt.attempts
            self._overhead.values[()].add(max(0.0, total - receipt.queue_ms - receipt.upstream_ms) / 1000)
        if receipt.error:
            self._errors.values[receipt.error,] += 1
        saved, usage = receipt.saved_usd, receipt.usage
        if saved is not None and saved != ZERO_COST:
            self._saved.values[kind.model] += float(saved)
        if receipt.cache == "stale":  # its usage was bought long ago
            return
        if usage is not None and receipt.cache != "coalesced":
            tokens = self._tokens.values
            tokens[kind.prompt] += usage.prompt_tokens
            if usage.cached_tokens:
                tokens[kind.cached] += usage.cached_tokens
            tokens[kind.completion] += usage.completion_tokens
        if receipt.cost_usd is not None:
            self._cost.values[kind.model] += float(receipt.cost_usd)
        elif receipt.status < 300:
            self._unknown.values[kind.model] += 1

    def _kind(self, endpoint: str, model: str, cache: str, status: int) -> _HitCounters:
        endpoint = endpoint if endpoint in _ENDPOINTS else "other"
        name = self.model(model)
        return _HitCounters(
            requests=(endpoint, name, cache, f"{status}xx"),
            model=(name,),
            prompt=(name, "prompt"),
            cached=(name, "cached"),
            completion=(name, "completion"),
            seconds=self._seconds.of(endpoint, cache),
            first_byte=self._first_byte.of(endpoint),
        )

    def refusal(self, code: str) -> None:
        """A request turned away before it became a call."""
        self._errors.values[code,] += 1

    async def measure_loop_lag(self, clock: Clock) -> None:
        """Measures, again and again, how late the event loop is with what is due."""
        while True:
            due = clock.monotonic() + LOOP_LAG_INTERVAL
            await clock.sleep(LOOP_LAG_INTERVAL)
            self._lag.values[()].add(max(0.0, clock.monotonic() - due))

    # -- a scrape ------------------------------------------------------------------------------------------------------

    def render(self, services: Services, in_flight: int) -> bytes:
        """The text for one scrape (Prometheus exposition format 0.0.4)."""
        self._now = services, in_flight
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """Every family; what stands still between requests is of the world that was rendered last."""
        services, in_flight = self._now or (None, 0)
        tallies = services.counters if services is not None else UpstreamCounters()
        self._retries.values = tallies.retries
        self._gaps.values[()] = tallies.gaps
        for one in (
            self._requests,
            self._seconds,
            self._first_byte,
            self._queue,
            self._overhead,
            self._gaps,
            self._tokens,
            self._cost,
            self._saved,
            self._unknown,
            self._attempts,
            self._retries,
            self._errors,
            self._lag,
        ):
            yield one.family()
        yield from _gauges(services, in_flight)
        yield from budget_gauges(services.budgets if services is not None else None)


def _gauges(services: Services | None, in_flight: int) -> list[Metric]:
    """What stands still between requests."""
    served = GaugeMetricFamily(_PREFIX + "in_flight", "Requests being served.")
    waiting = GaugeMetricFamily(_PREFIX + "queue_depth", "Requests waiting for a key.")
    keys = GaugeMetricFamily(_PREFIX + "keys", "Pool keys by state.", labels=["state"])
    free = GaugeMetricFamily(
        _PREFIX + "key_headroom_ratio", "Share still free of the tightest limit of a key.", labels=["key"]
    )
    about = "1 while limits hold as they should, 0 while the Redis they are shared over is lost."
    sound = GaugeMetricFamily(_PREFIX + "limits_sound", about)
    about = "1 for the state an upstream's circuit breaker is in; in all but closed it is left alone after failures."
    breaker = GaugeMetricFamily(_PREFIX + "breaker_state", about, labels=["upstream", "state"])
    entries = GaugeMetricFamily(_PREFIX + "cache_entries", "Entries in memory.")
    size = GaugeMetricFamily(_PREFIX + "cache_bytes", "Bytes of entries in memory.")
    errors = CounterMetricFamily(_PREFIX + "store_errors", "Reads and writes of the store behind memory that failed.")
    if services is not None:
        now = services.clock.monotonic()
        served.add_metric([], in_flight)
        waiting.add_metric([], services.admission.depth)
        for state, count in services.pool.counts(now).items():
            keys.add_metric([state], count)
        for label, share in services.pool.free(now).items():
            free.add_metric([label], share)
        sound.add_metric([], float(services.limiter is None or services.limiter.sound))
        for upstream in services.upstreams:
            current = upstream.breaker.state(now)
            for state in STATES:
                breaker.add_metric([upstream.address.name, state], float(current == state))
        if services.store is not None:
            stats = services.store.memory.stats()
            entries.add_metric([], stats["entries"])
            size.add_metric([], stats["bytes"])
            errors.add_metric([], services.store.errors)
    return [served, waiting, keys, free, sound, breaker, entries, size, errors]
