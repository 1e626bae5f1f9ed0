"""Several processes' scrapes as one."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from proxy.core.receipt import Receipt
from proxy.edge.merged import merged
from proxy.edge.metrics import Metrics
from proxy.seams import REAL
from proxy.world import compile_world
from tests.journey.scene import pool, settings


def scrape(in_flight: int = 0, *models: str, **fields: Any) -> bytes:
    metrics = Metrics()
    for model in models:
        metrics.observe(Receipt("i", "", "chat", model, 200, "miss", 0.0, **fields))
    return metrics.render(compile_world(settings(pool("k1", "k2")), REAL), in_flight)


def samples(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name.removeprefix("openai_proxy_"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_one_alone_is_as_it_was() -> None:
    text = scrape(3, "a", "b", cost_usd="0.1", queue_ms=40.0)
    assert samples(merged([text])) == samples(text)
    kinds = [
        [line for line in t.splitlines() if line.startswith((b"# TYPE", b"# HELP"))] for t in (merged([text]), text)
    ]
    assert kinds[0] == kinds[1]


def test_what_is_counted_adds_up_and_what_all_see_alike_does_not() -> None:
    texts = [scrape(3, "a", "b", cost_usd="0.1", total_ms=40.0), scrape(4, "b", total_ms=2000.0, error="x")]
    seen = samples(merged(texts))
    of = {"endpoint": "chat", "cache": "miss", "status": "2xx"}
    assert seen["requests_total", frozenset({**of, "model": "a"}.items())] == 1
    assert seen["requests_total", frozenset({**of, "model": "b"}.items())] == 2
    histogram = frozenset({"endpoint": "chat", "cache": "miss", "le": "0.1"}.items())
    assert seen["request_duration_seconds_bucket", histogram] == 2
    assert seen["errors_total", frozenset({("code", "x")})] == 1
    assert seen["in_flight", frozenset()] == 7
    assert seen["keys", frozenset({("state", "ready")})] == 2
    assert seen["limits_sound", frozenset()] == 1
    assert seen["breaker_state", frozenset({("upstream", "openai"), ("state", "closed")})] == 1


def test_merging_what_was_merged_is_merging_all() -> None:
    texts = [scrape(n, *"abc"[:n], total_ms=10.0 * n) for n in range(4)]
    assert samples(merged([merged(texts[:2]), merged(texts[2:])])) == samples(merged(texts))
    assert samples(merged([])) == {}
