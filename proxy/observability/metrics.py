"""Prometheus metrics.

Requests only add to plain numbers; metric families are built when Prometheus scrapes. The number of label values is
bounded: at most `MAX_MODELS` model names, otherwise only the proxy's own words and configured names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ..accounting.budgets.budgets import Budgets
from ..accounting.receipt import Receipt
from ..cache.entry import Entry
from ..cache.stores.tiered import TieredStore
from ..pipeline.response_headers import ZERO_COST
from ..protocol.routes import ENDPOINTS, SEGMENTS
from ..system.clock import Clock
from ..upstream.counters import GAPS, Histogram, UpstreamCounters
from ..upstream.keys.pool import KeyPool
from ..upstream.limits.queue import AdmissionQueue
from ..upstream.limits.shared import SharedLimits
from ..upstream.retry.circuit_breaker import STATES
from ..upstream.target import Upstream
from .budget_gauges import budget_gauges
from .event_counters import counted_events

MAX_MODELS: Final = 100
LOOP_LAG_INTERVAL: Final = 0.5
"""Seconds between two measurements of the event loop's lag."""

_ENDPOINTS: Final = SEGMENTS | set(ENDPOINTS.values())
"""Values of the label `endpoint`. Clients choose the paths of passed-through requests, so any other is `other`."""

_SECONDS: Final = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_SHORT: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
_MAX_MEMOIZED: Final = 10 * MAX_MODELS
_PREFIX: Final = "openai_proxy_"

Labels = tuple[str, ...]


class _Counter:
    """A counter for each set of label values. name: without the prefix and `_total`."""

    def __init__(self, name: str, help_: str, *labels: str) -> None:
        self._name_and_help = _PREFIX + name, help_
        self._labels = labels
        self.values: defaultdict[Labels, float] = defaultdict(float)
        if not labels:
            self.values[()] = 0.0

    def family(self) -> Metric:
        family = CounterMetricFamily(*self._name_and_help, labels=self._labels)
        for labels, value in self.values.items():
            family.add_metric(labels, value)
        return family


class _Histogram:
    """A histogram for each set of label values. name: without the prefix; bounds: of its buckets."""

    def __init__(self, name: str, help_: str, bounds: Sequence[float], *labels: str) -> None:
        self._name_and_help = _PREFIX + name, help_
        self._labels = labels
        self.bounds = bounds
        self.values: dict[Labels, Histogram] = {} if labels else {(): Histogram(bounds)}

    def with_labels(self, *labels: str) -> Histogram:
        histogram = self.values.get(labels)
        if histogram is None:
            histogram = self.values[labels] = Histogram(self.bounds)
        return histogram

    def family(self) -> Metric:
        family = HistogramMetricFamily(*self._name_and_help, labels=self._labels)
        for labels, histogram in self.values.items():
            family.add_metric(labels, histogram.cumulative(), histogram.total)
        return family


class GaugeSources(Protocol):
    """The parts of the running proxy that gauges are read from at a scrape."""

    @property
    def clock(self) -> Clock: ...
    @property
    def admission(self) -> AdmissionQueue: ...
    @property
    def pool(self) -> KeyPool: ...
    @property
    def limiter(self) -> SharedLimits | None: ...
    @property
    def upstreams(self) -> Sequence[Upstream]: ...
    @property
    def store(self) -> TieredStore: ...
    @property
    def budgets(self) -> Budgets: ...
    @property
    def counters(self) -> UpstreamCounters: ...


@dataclass(frozen=True, slots=True)
class _RequestSeries:
    """The series that requests of one kind add to, looked up once: labels of counters, and histograms."""

    requests: Labels
    model: Labels
    prompt: Labels
    cached: Labels
    completion: Labels
    seconds: Histogram
    first_byte: Histogram


class Metrics(Collector):
    """Counts finished requests from their receipts; reads gauges when Prometheus scrapes."""

    def __init__(self) -> None:
        self._requests = _Counter(
            "requests", "Finished requests, by status class.", "endpoint", "model", "cache", "status"
        )
        self._tokens = _Counter("tokens", "Tokens used upstream, by kind.", "model", "kind")
        self._cost = _Counter("cost_usd", "Cost of responses from upstream in USD.", "model")
        self._saved = _Counter("cost_saved_usd", "Cost avoided by cache hits and coalesced requests in USD.", "model")
        self._unknown = _Counter("cost_unknown", "Responses whose cost is unknown.", "model")
        self._attempts = _Counter("upstream_attempts", "Requests sent to upstreams, retries included.", "upstream")
        self._retries = _Counter("retries", "Attempts that were retried, by reason.", "upstream", "reason")
        self._upstream_errors = _Counter(
            "upstream_errors", "Error responses of upstreams, by the upstream's own code.", "upstream", "status", "code"
        )
        self._errors = _Counter("errors", "Requests that ended in an error, by code.", "code")
        self._seconds = _Histogram(
            "request_duration_seconds",
            "Time from a request's arrival to the end of its response; without cache hits.",
            _SECONDS,
            "endpoint",
            "cache",
        )
        self._first_byte = _Histogram(
            "time_to_first_byte_seconds",
            "Time from a request's arrival to the first byte of its response; without cache hits.",
            _SECONDS,
            "endpoint",
        )
        self._queue = _Histogram("queue_wait_seconds", "Time that requests waited for a key or a limit.", _SECONDS)
        self._overhead = _Histogram(
            "overhead_seconds", "Time that the proxy itself added to a request; without cache hits.", _SHORT
        )
        self._gaps = _Histogram("stream_chunk_gap_seconds", "Time between two reads of an upstream stream.", GAPS)
        self._lag = _Histogram("event_loop_lag_seconds", "Delay of timers in the event loop.", _SHORT)
        self._models: set[str] = set()
        self._hits: dict[tuple[str, str], tuple[Labels, Labels]] = {}
        self._series: dict[tuple[str, str, str, int], _RequestSeries] = {}
        self._scraped: tuple[GaugeSources, int] | None = None
        self.registry = CollectorRegistry()
        self.registry.register(self)

    # -- requests ------------------------------------------------------------------------------------------------------

    def model_label(self, name: str) -> str:
        """Return `name` as a label value, `other` if it is empty, too long, unprintable, or one too many."""
        if name in self._models:
            return name
        if not name or len(name) > 64 or not name.isprintable() or len(self._models) >= MAX_MODELS:
            return "other"
        self._models.add(name)
        return name

    def record_hit(self, entry: Entry) -> None:
        """Count a cache hit. This is on the hot path."""
        labels = self._hits.get((entry.endpoint, entry.model))
        if labels is None:
            model = self.model_label(entry.model)
            labels = (entry.endpoint, model, "hit", "2xx"), (model,)
            if len(self._hits) < _MAX_MEMOIZED and len(entry.model) < 1000:
                self._hits[entry.endpoint, entry.model] = labels
        self._requests.values[labels[0]] += 1
        if entry.cost is not None:
            self._saved.values[labels[1]] += float(entry.cost)

    def observe(self, receipt: Receipt) -> None:
        """Count a finished request that was not a hit."""
        kind = receipt.endpoint, receipt.model, receipt.cache, receipt.status // 100
        series = self._series.get(kind)
        if series is None:
            series = self._series_of(*kind)
            if len(self._series) < _MAX_MEMOIZED and len(receipt.model) < 1000:
                self._series[kind] = series
        self._requests.values[series.requests] += 1
        total = receipt.total_ms
        series.seconds.add(total / 1000)
        if receipt.status < 400:
            first = receipt.first_byte_ms
            series.first_byte.add((total if first is None else first) / 1000)
        if receipt.queue_ms > 1:
            self._queue.values[()].add(receipt.queue_ms / 1000)
        if receipt.attempts and receipt.upstream:
            self._attempts.values[receipt.upstream,] += receipt.attempts
            self._overhead.values[()].add(max(0.0, total - receipt.queue_ms - receipt.upstream_ms) / 1000)
        if receipt.error:
            self._errors.values[receipt.error,] += 1
        saved, usage = receipt.saved_usd, receipt.usage
        if saved is not None and saved != ZERO_COST:
            self._saved.values[series.model] += float(saved)
        if receipt.cache == "stale":  # its usage was counted when it was stored
            return
        if usage is not None and receipt.cache != "coalesced":
            tokens = self._tokens.values
            tokens[series.prompt] += usage.prompt_tokens
            if usage.cached_tokens:
                tokens[series.cached] += usage.cached_tokens
            tokens[series.completion] += usage.completion_tokens
        if receipt.cost_usd is not None:
            self._cost.values[series.model] += float(receipt.cost_usd)
        elif receipt.status < 300:
            self._unknown.values[series.model] += 1

    def _series_of(self, endpoint: str, model: str, cache: str, status: int) -> _RequestSeries:
        endpoint = endpoint if endpoint in _ENDPOINTS else "other"
        name = self.model_label(model)
        return _RequestSeries(
            requests=(endpoint, name, cache, f"{status}xx"),
            model=(name,),
            prompt=(name, "prompt"),
            cached=(name, "cached"),
            completion=(name, "completion"),
            seconds=self._seconds.with_labels(endpoint, cache),
            first_byte=self._first_byte.with_labels(endpoint),
        )

    def record_refusal(self, code: str) -> None:
        """Count a request that the proxy refused before it had a receipt."""
        self._errors.values[code,] += 1

    async def measure_loop_lag(self, clock: Clock) -> None:
        """Measure the lag of the event loop every `LOOP_LAG_INTERVAL`, without end."""
        while True:
            due = clock.monotonic() + LOOP_LAG_INTERVAL
            await clock.sleep(LOOP_LAG_INTERVAL)
            self._lag.values[()].add(max(0.0, clock.monotonic() - due))

    # -- scrapes -------------------------------------------------------------------------------------------------------

    def render(self, sources: GaugeSources, in_flight: int) -> bytes:
        """Return the text of one scrape (Prometheus exposition format 0.0.4). in_flight: number of requests."""
        self._scraped = sources, in_flight
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """Yield every family; gauges are read from the sources of the last `render`."""
        sources, in_flight = self._scraped or (None, 0)
        counters = sources.counters if sources is not None else UpstreamCounters()
        self._retries.values = counters.retries
        self._upstream_errors.values = counters.errors
        self._gaps.values[()] = counters.gaps
        for metric in (
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
            self._upstream_errors,
            self._errors,
            self._lag,
        ):
            yield metric.family()
        yield from counted_events()
        yield from _gauges(sources, in_flight)
        yield from budget_gauges(sources.budgets if sources is not None else None)


def _gauges(sources: GaugeSources | None, in_flight: int) -> list[Metric]:
    served = GaugeMetricFamily(_PREFIX + "in_flight", "Requests in flight.")
    waiting = GaugeMetricFamily(_PREFIX + "queue_depth", "Requests waiting for a key or a limit.")
    keys = GaugeMetricFamily(_PREFIX + "keys", "Pool keys, by state.", labels=["state"])
    headroom = GaugeMetricFamily(
        _PREFIX + "key_headroom_ratio", "Free share of a key's tightest limit, 0 to 1.", labels=["key"]
    )
    help_ = "1 if limits hold across processes, 0 while the Redis that shares them is unavailable."
    shared = GaugeMetricFamily(_PREFIX + "limits_sound", help_)
    help_ = "1 for the current state of an upstream's circuit breaker, 0 for the others."
    breaker = GaugeMetricFamily(_PREFIX + "breaker_state", help_, labels=["upstream", "state"])
    entries = GaugeMetricFamily(_PREFIX + "cache_entries", "Cache entries in memory.")
    size = GaugeMetricFamily(_PREFIX + "cache_bytes", "Bytes of cache entries in memory.")
    errors = CounterMetricFamily(_PREFIX + "store_errors", "Failed reads and writes of SQLite or Redis.")
    success = GaugeMetricFamily(
        _PREFIX + "upstream_last_success_timestamp_seconds",
        "Unix time of the last good response of an upstream.",
        labels=["upstream"],
    )
    store_up = GaugeMetricFamily(_PREFIX + "store_up", "1 if the store behind memory works, or there is none; else 0.")
    if sources is not None:
        now = sources.clock.monotonic()
        served.add_metric([], in_flight)
        waiting.add_metric([], sources.admission.depth)
        for state, count in sources.pool.counts_by_state(now).items():
            keys.add_metric([state], count)
        for label, share in sources.pool.headroom_by_label(now).items():
            headroom.add_metric([label], share)
        shared.add_metric([], float(sources.limiter is None or sources.limiter.sound))
        for upstream in sources.upstreams:
            current = upstream.breaker.state(now)
            for state in STATES:
                breaker.add_metric([upstream.address.name, state], float(current == state))
        if sources.store.enabled:
            stats = sources.store.memory.stats()
            entries.add_metric([], stats["entries"])
            size.add_metric([], stats["bytes"])
            errors.add_metric([], sources.store.errors)
            store_up.add_metric([], float(sources.store.up))
        for name, at in sources.counters.last_success.items():
            success.add_metric([name], at)
    return [served, waiting, keys, headroom, shared, breaker, entries, size, errors, success, store_up]
