"""Metrics and the log line of a request: what they count, and that clients cannot add labels without bound."""

from __future__ import annotations

import asyncio
import logging
import random
import re
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy.accounting.receipt import Receipt
from proxy.cache.entry import Entry
from proxy.cache.stores.sqlite import SQLiteStore
from proxy.config.limits import Limits
from proxy.config.settings import BreakerSettings, CacheSettings, RetrySettings, ThrottleSettings
from proxy.cost.usage import Usage
from proxy.observability.logs import fields, log_receipt
from proxy.observability.metrics import MAX_MODELS, Metrics
from proxy.services import Services, build_services
from proxy.system.clock import SYSTEM_CLOCK, Clock
from tests.pipeline.clock import virtual_time, virtual_time_loop
from tests.pipeline.fixture import LIMITS, PipelineFixture, ask, pool, settings
from tests.pipeline.script import Fails, error, events, rate_limited, says, streams
from tests.server.kit import running_proxy


def services(**sections: Any) -> Services:
    return build_services(settings(**sections), SYSTEM_CLOCK)


def receipt(**fields: Any) -> Receipt:
    given: dict[str, Any] = {
        "id": "id-1",
        "client": "",
        "endpoint": "chat",
        "model": "gpt-4o",
        "status": 200,
        "cache": "miss",
        "finished_at": 0.0,
    }
    return Receipt(**(given | fields))


def entry(model: str = "gpt-4o", cost: str | None = "0.002250") -> Entry:
    return Entry("k", "json", 200, (), b"{}", None, 0.0, 60.0, "chat", model, None, None, cost, "", (), False)


def samples(metrics: Metrics, in_flight: int = 0, of: Services | None = None) -> dict[str, float]:
    """Return the scraped samples that are not 0, by `name{label=value,…}` without the prefix."""
    text = metrics.render(of or services(), in_flight).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            if sample.value and not sample.name.endswith("_created"):
                found[sample.name.removeprefix("openai_proxy_") + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def test_miss() -> None:
    metrics = Metrics()
    usage = Usage(100, 200, 300, cached_tokens=40)
    metrics.observe(
        receipt(usage=usage, cost_usd="0.002250", attempts=2, upstream="openai", total_ms=300.0, queue_ms=50.0)
    )
    seen = samples(metrics)
    assert seen["requests_total{cache=miss,endpoint=chat,model=gpt-4o,status=2xx}"] == 1
    assert seen["tokens_total{kind=prompt,model=gpt-4o}"] == 100
    assert seen["tokens_total{kind=cached,model=gpt-4o}"] == 40
    assert seen["tokens_total{kind=completion,model=gpt-4o}"] == 200
    assert seen["cost_usd_total{model=gpt-4o}"] == 0.00225
    assert seen["upstream_attempts_total{upstream=openai}"] == 2
    assert seen["request_duration_seconds_sum{cache=miss,endpoint=chat}"] == 0.3
    assert seen["queue_wait_seconds_sum"] == 0.05
    assert not any(name.startswith(("errors", "cost_unknown", "cost_saved")) for name in seen)


def test_hit_adds_to_saved_cost_and_not_to_durations() -> None:
    metrics = Metrics()
    for cost in ("0.002250", "0.002250", None):
        metrics.record_hit(entry(cost=cost))
    seen = samples(metrics)
    assert seen["requests_total{cache=hit,endpoint=chat,model=gpt-4o,status=2xx}"] == 3
    assert seen["cost_saved_usd_total{model=gpt-4o}"] == 0.0045
    assert not any(name.startswith("request_duration") for name in seen)


def test_partial_batch_adds_to_cost_and_saved_cost() -> None:
    metrics = Metrics()
    metrics.observe(receipt(endpoint="embeddings", cache="partial", cost_usd="0.000004", saved_usd="0.000002"))
    seen = samples(metrics)
    assert seen["requests_total{cache=partial,endpoint=embeddings,model=gpt-4o,status=2xx}"] == 1
    assert (seen["cost_usd_total{model=gpt-4o}"], seen["cost_saved_usd_total{model=gpt-4o}"]) == (0.000004, 0.000002)


def test_errors_by_code_and_unknown_costs() -> None:
    metrics = Metrics()
    metrics.observe(receipt(status=502, error="upstream_unreachable", upstream="openai", attempts=4))
    metrics.observe(receipt(status=200, model="mystery"))
    metrics.record_refusal("invalid_json")
    seen = samples(metrics)
    assert seen["errors_total{code=upstream_unreachable}"] == 1
    assert seen["errors_total{code=invalid_json}"] == 1
    assert seen["cost_unknown_total{model=mystery}"] == 1
    assert "cost_unknown_total{model=gpt-4o}" not in seen  # an error has no cost to be unknown
    assert seen["requests_total{cache=miss,endpoint=chat,model=gpt-4o,status=5xx}"] == 1


def test_queue_wait_under_1_ms_is_not_counted() -> None:
    metrics = Metrics()
    metrics.observe(receipt(queue_ms=0.5))
    assert not any(name.startswith("queue_wait") for name in samples(metrics))


def test_gauges_are_read_at_each_scrape() -> None:
    metrics, of = Metrics(), services()
    of.store.put(entry())
    seen = samples(metrics, 7, of)
    assert (seen["in_flight"], seen["cache_entries"], seen["keys{state=ready}"]) == (7, 1, 1)
    assert seen["cache_bytes"] > 100
    assert "in_flight" not in samples(metrics, 0, of)
    assert samples(metrics, 1, services(cache=CacheSettings(backend="off")))["in_flight"] == 1


def test_first_scrape_shows_every_key_state() -> None:
    text = Metrics().render(services(), 0).decode()
    assert set(re.findall(r'openai_proxy_keys\{state="(\w+)"\}', text)) >= {"ready", "cooling", "exhausted", "rejected"}


def test_registry_collects_gauges_of_last_render() -> None:
    """The metrics of several workers are summed from the registries."""
    metrics, of = Metrics(), services()
    assert not [sample for family in metrics.registry.collect() for sample in family.samples if family.type == "gauge"]
    metrics.render(of, 7)
    of.counters.record_retry("openai", "retry")
    seen = {sample.name: sample.value for family in metrics.registry.collect() for sample in family.samples}
    assert (seen["openai_proxy_in_flight"], seen["openai_proxy_retries_total"]) == (7, 1)


def test_overhead_and_time_to_first_byte() -> None:
    metrics = Metrics()
    metrics.observe(receipt(total_ms=1003.0, queue_ms=200.0, upstream_ms=800.0, attempts=1, upstream="openai"))
    metrics.observe(receipt(total_ms=500.0, status=500, queue_ms=0.0, upstream_ms=501.0, attempts=1, upstream="openai"))
    metrics.observe(receipt(total_ms=0.1, status=400, error="invalid_json"))
    seen = samples(metrics)
    assert seen["overhead_seconds_count"] == 2  # what made no call is not in it
    assert seen["overhead_seconds_sum"] == pytest.approx(0.003)
    assert seen["overhead_seconds_bucket{le=0.0005}"] == 1
    assert seen["overhead_seconds_bucket{le=0.005}"] == 2
    assert seen["time_to_first_byte_seconds_count{endpoint=chat}"] == 1  # of answers only
    assert seen["time_to_first_byte_seconds_sum{endpoint=chat}"] == pytest.approx(1.003)
    metrics.observe(receipt(total_ms=5000.0, first_byte_ms=97.0, stream=True))
    assert samples(metrics)["time_to_first_byte_seconds_sum{endpoint=chat}"] == pytest.approx(1.1)


def test_sum_of_costs_is_exact() -> None:
    metrics, exact = Metrics(), Decimal(0)
    rng = random.Random(7)
    for _ in range(10_000):
        cost = Decimal(rng.randrange(10_000_000)).scaleb(-9)
        exact += cost
        metrics.observe(receipt(cost_usd=f"{cost:f}"))
    assert abs(Decimal(samples(metrics)["cost_usd_total{model=gpt-4o}"]) - exact) < Decimal("1e-9")


@virtual_time
async def test_retries_are_counted_by_reason() -> None:
    pipeline = PipelineFixture(
        error(500), rate_limited(), Fails("unreached"), says(), config=settings(pool("k1", "k2"))
    )
    assert (await pipeline.ask()).status == 200
    metrics = Metrics()
    for one in pipeline.receipts:
        metrics.observe(one)
    seen = samples(metrics, of=pipeline.services)
    reasons = {name: value for name, value in seen.items() if name.startswith("retries")}
    assert reasons == {
        f"retries_total{{reason={reason},upstream=openai}}": 1 for reason in ("retry", "rate_limited", "unreached")
    }
    assert seen["upstream_attempts_total{upstream=openai}"] == 4


@virtual_time
async def test_last_attempt_is_not_counted_as_retry() -> None:
    pipeline = PipelineFixture(error(400), *[error(500)] * 4)
    await pipeline.ask()
    await pipeline.ask()
    assert sum(pipeline.services.counters.retries.values()) == 3


@pytest.mark.slow
async def test_retries_of_passed_through_requests_are_counted() -> None:
    async with running_proxy(
        error(500), says(), config=settings(pool("k1"), retry=RetrySettings(base_delay=0, jitter=0))
    ) as server:
        assert (await server.ask("GET", "/v1/models")).status == 200
        await server.settled()
        assert dict(server.services.counters.retries) == {("openai", "retry"): 1}


@virtual_time
async def test_gaps_between_reads_of_a_stream() -> None:
    first, *more = events(usage=True)
    steps: list[Any] = [first]
    for one in more:
        steps += [0.2, one]
    pipeline = PipelineFixture(streams(steps), says())
    await pipeline.ask(ask(stream=True))
    await pipeline.ask(ask("plain"))
    seen = samples(Metrics(), of=pipeline.services)
    assert seen["stream_chunk_gap_seconds_count"] == len(more)
    assert seen["stream_chunk_gap_seconds_sum"] == pytest.approx(0.2 * len(more))
    assert "stream_chunk_gap_seconds_bucket{le=0.1}" not in seen
    assert seen["stream_chunk_gap_seconds_bucket{le=0.25}"] == len(more)


@virtual_time
async def test_key_headroom_by_configured_and_reported_limits() -> None:
    limits = {"gpt-4o": Limits(rpm=4), "*": LIMITS}
    reported = says(headers=[("x-ratelimit-limit-requests", "10"), ("x-ratelimit-remaining-requests", "1")])
    config = settings(pool("k1", "k2"), throttle=ThrottleSettings(limits=limits), selection="round_robin")
    pipeline = PipelineFixture(says(), reported, rate_limited("60"), config=config)
    for text in ("a", "b"):
        await pipeline.ask(ask(text))
    seen = samples(Metrics(), of=pipeline.services)
    assert seen["key_headroom_ratio{key=k1}"] == 0.75
    assert seen["key_headroom_ratio{key=k2}"] == pytest.approx(0.1)
    assert seen["keys{state=ready}"] == 2


@virtual_time
async def test_key_without_limits_has_full_headroom() -> None:
    seen = samples(Metrics(), of=services(throttle=ThrottleSettings()))
    assert seen["key_headroom_ratio{key=k1}"] == 1


@virtual_time
async def test_breaker_state() -> None:
    pipeline = PipelineFixture(
        *[error(500)] * 2, config=settings(breaker=BreakerSettings(failures=1), retry=RetrySettings(max_retries=0))
    )
    states = "breaker_state{state=%s,upstream=openai}"
    assert samples(Metrics(), of=pipeline.services)[states % "closed"] == 1
    await pipeline.ask()
    seen = samples(Metrics(), of=pipeline.services)
    assert [seen.get(states % state) for state in ("closed", "open", "half_open")] == [None, 1, None]
    await asyncio.sleep(16)
    seen = samples(Metrics(), of=pipeline.services)
    assert [seen.get(states % state) for state in ("closed", "open", "half_open")] == [None, None, 1]


async def test_store_errors(tmp_path: Path) -> None:
    file = tmp_path / "cache.db"
    of = services(cache=CacheSettings(backend="sqlite", path=str(file)))
    await of.store.open()
    try:
        assert "store_errors_total" not in samples(Metrics(), of=of)
        assert of.store.slower is not None
        cast("SQLiteStore", of.store.slower)._counts["read_errors"] += 2
        cast("SQLiteStore", of.store.slower)._writer.failures += 1
        assert samples(Metrics(), of=of)["store_errors_total"] == 3
    finally:
        await of.store.close()


@virtual_time
async def test_event_loop_lag() -> None:
    loop, metrics, late = virtual_time_loop(), Metrics(), 0.0

    def clock() -> float:
        return loop.time() + late

    measuring = asyncio.ensure_future(metrics.measure_loop_lag(Clock(monotonic=clock)))
    await asyncio.sleep(1.2)
    late = 0.3
    await asyncio.sleep(0.9)
    measuring.cancel()
    seen = samples(metrics)
    assert seen["event_loop_lag_seconds_count"] == 4
    assert seen["event_loop_lag_seconds_bucket{le=0.25}"] == 3
    assert seen["event_loop_lag_seconds_sum"] == pytest.approx(0.3)


# Labels.


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb", "\ud800", "a\x00", "\u2028"])
def test_unusable_model_names_are_counted_as_other(name: str) -> None:
    metrics = Metrics()
    metrics.observe(receipt(model=name))
    metrics.record_hit(entry(model=name))
    seen = samples(metrics)
    assert seen["requests_total{cache=miss,endpoint=chat,model=other,status=2xx}"] == 1
    assert seen["requests_total{cache=hit,endpoint=chat,model=other,status=2xx}"] == 1


def test_model_labels_are_bounded() -> None:
    metrics = Metrics()
    metrics.observe(receipt(model="gpt-4o"))
    for n in range(5000):
        metrics.observe(receipt(model=f"model-{n}"))
        metrics.record_hit(entry(model=f"model-{n}"))
    metrics.observe(receipt(model="gpt-4o"))
    seen = samples(metrics)
    models = {re.search(r"model=([^,}]*)", name) for name in seen if name.startswith("requests_total")}
    assert len({found[1] for found in models if found}) == MAX_MODELS + 1
    assert seen["requests_total{cache=miss,endpoint=chat,model=gpt-4o,status=2xx}"] == 2
    assert seen["requests_total{cache=miss,endpoint=chat,model=other,status=2xx}"] == 5000 - (MAX_MODELS - 1)
    assert len(metrics._series) <= 10 * MAX_MODELS
    assert len(metrics._hits) <= 10 * MAX_MODELS


def test_long_model_names_are_not_kept() -> None:
    """Ten thousand names of 20 KB would take 200 MB."""
    metrics = Metrics()
    for n in range(50):
        metrics.observe(receipt(model=f"{n}" + "x" * 20_000))
        metrics.record_hit(entry(model=f"{n}" + "x" * 20_000))
    assert (len(metrics._series), len(metrics._hits), len(metrics._models)) == (0, 0, 0)
    assert len(metrics.render(services(), 0)) < 20_000


@pytest.mark.slow
async def test_endpoint_labels_are_bounded() -> None:
    """Any path below /v1 is passed through; its first segment must not become a label value."""
    async with running_proxy(*[error(404)] * 50) as server:
        for n in range(50):
            assert (await server.ask("GET", f"/v1/invented-{n}/x")).status == 404
        await server.settled()  # the last receipt may come after its answer
        text = server.metrics.render(server.services, 0).decode()
        endpoints = set(re.findall(r'endpoint="([^"]*)"', text))
        assert endpoints == {"other"}
        assert {receipt.endpoint for receipt in server.receipts} == {f"invented-{n}" for n in range(50)}


@pytest.mark.slow
async def test_known_routes_are_labelled_by_name() -> None:
    async with running_proxy(says(), says(), config=settings(pool("k1"))) as server:
        await server.ask("GET", "/v1/models")
        await server.ask(body=ask())
        await server.settled()
        text = server.metrics.render(server.services, 0).decode()
        assert set(re.findall(r'endpoint="([^"]*)"', text)) == {"models", "chat"}


async def test_refused_request_has_no_upstream_label() -> None:
    metrics = Metrics()
    metrics.observe(receipt(status=429, error="throttled"))
    assert 'upstream=""' not in metrics.render(services(), 0).decode()


# The log line.


def test_log_line_has_known_fields_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "proxy.request")
    log_receipt(receipt(usage=Usage(1, 2, 3), cost_usd="0.1", attempts=1, upstream="openai", key="k1", reason="new"))
    [record] = caplog.records
    assert (record.levelname, record.getMessage()) == ("INFO", "chat gpt-4o -> 200")
    assert record.__dict__["fields"] == {
        "endpoint": "chat",
        "model": "gpt-4o",
        "status": 200,
        "id": "id-1",
        "cache": "miss",
        "reason": "new",
        "upstream": "openai",
        "key": "k1",
        "attempts": 1,
        "queue_ms": 0.0,
        "total_ms": 0.0,
        "tokens": 3,
        "cost_usd": "0.1",
    }


@pytest.mark.parametrize(("status", "level"), [(200, "INFO"), (499, "INFO"), (429, "INFO"), (500, "WARNING")])
def test_only_server_errors_are_warnings(status: int, level: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "proxy.request")
    log_receipt(receipt(status=status, error="x"))
    assert caplog.records[0].levelname == level


def test_no_log_line_above_the_log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "proxy.request")
    log_receipt(receipt())
    assert caplog.records == []


def test_model_name_cannot_forge_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "proxy.request")
    log_receipt(receipt(model="gpt\n12:00:00 info    all is well\ud800\u2028" + "x" * 1000))
    text = caplog.records[0].getMessage()
    assert len(text.splitlines()) == 1
    assert text.isascii()
    assert len(text) < 200
    assert fields(receipt(model=""))["id"] == "id-1"
