"""Metrics and the log line of a request: what is counted, and that labels stay few whatever clients send."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy.config.settings import Cache
from proxy.core.entry import Entry
from proxy.core.receipt import Receipt
from proxy.core.usage import Usage
from proxy.edge.logs import fields, log_receipt
from proxy.edge.metrics import MAX_MODELS, Metrics
from proxy.seams import REAL
from proxy.world import World, compile_world
from tests.edge.kit import house
from tests.journey.scene import ask, pool, settings
from tests.journey.script import error, says


def world(**sections: Any) -> World:
    return compile_world(settings(**sections), REAL)


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


def samples(metrics: Metrics, in_flight: int = 0, of: World | None = None) -> dict[str, float]:
    """`name{label=value,…}` without the prefix, as scraped; those that are 0 left out."""
    text = metrics.render(of or world(), in_flight).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            if sample.value and not sample.name.endswith("_created"):
                found[sample.name.removeprefix("openai_proxy_") + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def test_a_miss() -> None:
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


def test_a_hit_saves_and_is_not_in_the_durations() -> None:
    metrics = Metrics()
    for cost in ("0.002250", "0.002250", None):
        metrics.hit(entry(cost=cost))
    seen = samples(metrics)
    assert seen["requests_total{cache=hit,endpoint=chat,model=gpt-4o,status=2xx}"] == 3
    assert seen["cost_saved_usd_total{model=gpt-4o}"] == 0.0045
    assert not any(name.startswith("request_duration") for name in seen)


def test_a_batch_of_embeddings_may_cost_and_save() -> None:
    metrics = Metrics()
    metrics.observe(receipt(endpoint="embeddings", cache="partial", cost_usd="0.000004", saved_usd="0.000002"))
    seen = samples(metrics)
    assert seen["requests_total{cache=partial,endpoint=embeddings,model=gpt-4o,status=2xx}"] == 1
    assert (seen["cost_usd_total{model=gpt-4o}"], seen["cost_saved_usd_total{model=gpt-4o}"]) == (0.000004, 0.000002)


def test_errors_by_code_and_unknown_costs() -> None:
    metrics = Metrics()
    metrics.observe(receipt(status=502, error="upstream_unreachable", upstream="openai", attempts=4))
    metrics.observe(receipt(status=200, model="mystery"))
    metrics.refusal("invalid_json")
    seen = samples(metrics)
    assert seen["errors_total{code=upstream_unreachable}"] == 1
    assert seen["errors_total{code=invalid_json}"] == 1
    assert seen["cost_unknown_total{model=mystery}"] == 1
    assert "cost_unknown_total{model=gpt-4o}" not in seen  # an error has no cost to be unknown
    assert seen["requests_total{cache=miss,endpoint=chat,model=gpt-4o,status=5xx}"] == 1


def test_a_short_wait_is_no_wait() -> None:
    metrics = Metrics()
    metrics.observe(receipt(queue_ms=0.5))
    assert not any(name.startswith("queue_wait") for name in samples(metrics))


def test_gauges_are_read_at_each_scrape() -> None:
    metrics, of = Metrics(), world()
    assert of.store is not None
    of.store.put(entry())
    seen = samples(metrics, 7, of)
    assert (seen["in_flight"], seen["cache_entries"], seen["keys{state=ready}"]) == (7, 1, 1)
    assert seen["cache_bytes"] > 100
    assert "in_flight" not in samples(metrics, 0, of)
    assert samples(metrics, 1, world(cache=Cache(backend="off")))["in_flight"] == 1


def test_rendering_without_a_scrape_before_shows_every_state_of_keys() -> None:
    text = Metrics().render(world(), 0).decode()
    assert set(re.findall(r'openai_proxy_keys\{state="(\w+)"\}', text)) >= {"ready", "cooling", "exhausted", "rejected"}


# Labels.


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb", "\ud800", "a\x00", "\u2028"])
def test_names_that_are_no_label(name: str) -> None:
    metrics = Metrics()
    metrics.observe(receipt(model=name))
    metrics.hit(entry(model=name))
    seen = samples(metrics)
    assert seen["requests_total{cache=miss,endpoint=chat,model=other,status=2xx}"] == 1
    assert seen["requests_total{cache=hit,endpoint=chat,model=other,status=2xx}"] == 1


def test_labels_stay_few_whatever_models_are_asked_for() -> None:
    metrics = Metrics()
    metrics.observe(receipt(model="gpt-4o"))
    for n in range(5000):
        metrics.observe(receipt(model=f"model-{n}"))
        metrics.hit(entry(model=f"model-{n}"))
    metrics.observe(receipt(model="gpt-4o"))
    seen = samples(metrics)
    models = {re.search(r"model=([^,}]*)", name) for name in seen if name.startswith("requests_total")}
    assert len({found[1] for found in models if found}) == MAX_MODELS + 1
    assert seen["requests_total{cache=miss,endpoint=chat,model=gpt-4o,status=2xx}"] == 2
    assert seen["requests_total{cache=miss,endpoint=chat,model=other,status=2xx}"] == 5000 - (MAX_MODELS - 1)
    assert len(metrics._kinds) <= 10 * MAX_MODELS
    assert len(metrics._hits) <= 10 * MAX_MODELS


async def test_labels_stay_few_whatever_routes_are_asked_for() -> None:
    """Any path below /v1 is passed on; its first segment must not become a label of its own."""
    async with house(*[error(404)] * 50) as home:
        for n in range(50):
            assert (await home.ask("GET", f"/v1/invented-{n}/x")).status == 404
        text = home.metrics.render(home.world, 0).decode()
        endpoints = set(re.findall(r'endpoint="([^"]*)"', text))
        assert endpoints == {"other"}
        assert {receipt.endpoint for receipt in home.receipts} == {f"invented-{n}" for n in range(50)}


async def test_known_routes_have_their_names() -> None:
    async with house(says(), says(), config=settings(pool("k1"))) as home:
        await home.ask("GET", "/v1/models")
        await home.ask(body=ask())
        text = home.metrics.render(home.world, 0).decode()
        assert set(re.findall(r'endpoint="([^"]*)"', text)) == {"models", "chat"}


async def test_a_refused_request_names_no_upstream() -> None:
    metrics = Metrics()
    metrics.observe(receipt(status=429, error="throttled"))
    assert 'upstream=""' not in metrics.render(world(), 0).decode()


# The log line.


def test_the_line_says_what_is_known_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "proxy.request")
    log_receipt(receipt(usage=Usage(1, 2, 3), cost_usd="0.1", attempts=1, upstream="openai", key="k1", reason="new"))
    [record] = caplog.records
    assert (record.levelname, record.getMessage()) == ("INFO", "chat gpt-4o -> 200")
    assert record.__dict__["fields"] == {
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
def test_only_failures_are_warnings(status: int, level: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "proxy.request")
    log_receipt(receipt(status=status, error="x"))
    assert caplog.records[0].levelname == level


def test_no_line_where_nobody_reads_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "proxy.request")
    log_receipt(receipt())
    assert caplog.records == []


def test_a_model_name_cannot_forge_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "proxy.request")
    log_receipt(receipt(model="gpt\n12:00:00 info    all is well\ud800\u2028" + "x" * 1000))
    text = caplog.records[0].getMessage()
    assert len(text.splitlines()) == 1
    assert text.isascii()
    assert len(text) < 200
    assert fields(receipt(model=""))["id"] == "id-1"
