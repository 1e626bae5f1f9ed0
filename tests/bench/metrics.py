"""What counting and telling costs a request, in µs: `python -m tests.bench.metrics`. Nothing here asserts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import msgspec

from proxy.accounting.receipt import Receipt
from proxy.cache.entry import Entry
from proxy.cost.usage import Usage
from proxy.observability.logs import HitLog
from proxy.observability.metrics import Metrics
from proxy.protocol.traceparent import traceparent
from proxy.services import build_services
from proxy.system.clock import SYSTEM_CLOCK
from proxy.upstream.counters import UpstreamCounters
from tests.pipeline.fixture import settings

TRACE = (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
HEADERS = [(b"X-Stainless-%d" % number, b"1") for number in range(12)]
ENTRY = Entry("k", "json", 200, (), b"{}", None, 0.0, 60.0, "chat", "gpt-4o", None, None, "0.002250", "", (), False)
RECEIPT = Receipt(
    id="i",
    client="",
    endpoint="chat",
    model="gpt-4o",
    status=200,
    cache="miss",
    finished_at=0.0,
    usage=Usage(100, 200, 300, cached_tokens=40),
    cost_usd="0.002250",
    saved_usd="0.000000",
    attempts=1,
    upstream="openai",
    total_ms=300.0,
    upstream_ms=299.0,
    queue_ms=2.0,
)


def cost(work: Callable[[], object], count: int = 50_000) -> float:
    """The best of seven rounds, in µs."""
    best = float("inf")
    for _ in range(7):
        began = time.perf_counter()
        for _ in range(count):
            work()
        best = min(best, time.perf_counter() - began)
    return best / count * 1e6


def main() -> None:
    logging.getLogger("proxy").setLevel(logging.CRITICAL)
    metrics, log, services = Metrics(), HitLog(), build_services(settings(), SYSTEM_CLOCK)
    read, loop = UpstreamCounters().reads(time.monotonic), cost(lambda: None)
    for number in range(100):
        metrics.record_hit(msgspec.structs.replace(ENTRY, model=f"m{number}"))
    rows: dict[str, Callable[[], object]] = {
        "metrics, a hit": lambda: metrics.record_hit(ENTRY),
        "metrics, a miss (11 series)": lambda: metrics.observe(RECEIPT),
        "metrics, a read of a stream": read,
        "log, a hit that has no line": lambda: log.hit("i", "c", ENTRY, 100.0, HEADERS),
        "traceparent, none among 12 headers": lambda: traceparent(HEADERS),
        "traceparent, a valid one": lambda: traceparent([*HEADERS, TRACE]),
    }
    for name, work in rows.items():
        print(f"{name:36} {cost(work) - loop:7.2f} µs")
    print(f"{'a scrape, 100 models':36} {cost(lambda: metrics.render(services, 0), 20):7.0f} µs")


if __name__ == "__main__":
    main()
