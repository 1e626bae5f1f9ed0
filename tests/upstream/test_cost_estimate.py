"""The estimated cost of a request: the most expensive upstream and tier, and what a missing limit stands for."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from proxy.config.settings import BreakerSettings
from proxy.cost.pricing import PriceTable
from proxy.protocol.options import NO_OPTIONS
from proxy.protocol.request import Client, ProxyRequest
from proxy.protocol.routes import Route
from proxy.upstream.cost_estimate import max_cost_estimate
from proxy.upstream.limits.estimate import request_size
from proxy.upstream.providers.interface import UpstreamAddress
from proxy.upstream.providers.registry import PROVIDERS
from proxy.upstream.retry.circuit_breaker import CircuitBreaker
from proxy.upstream.retry.policy import RetryBudget
from proxy.upstream.target import Upstream

D = Decimal


def upstream(model: str = "m", dollars: int = 1) -> Upstream:
    """One whose prompt tokens cost `dollars` USD per million, its completion tokens ten times that."""
    prices = PriceTable({model: {"input": D(dollars), "output": D(10 * dollars)}})
    address = UpstreamAddress("u", "openai", "https://u.example/v1", None, {})
    breaker = CircuitBreaker(BreakerSettings())
    return Upstream(address, PROVIDERS["openai"], prices, "openai", RetryBudget(0.1), None, breaker)


def estimate(document: dict[str, Any], *upstreams: Upstream, endpoint: str = "chat", **more: Any) -> Decimal | None:
    """In millionths of a USD."""
    request = ProxyRequest(
        id="id",
        route=Route("endpoint", "/", "", endpoint),
        endpoint=endpoint,
        headers=(),
        body=b"",
        document=document,
        model="m",
        body_model="m",
        stream=False,
        wants_usage=False,
        options=NO_OPTIONS,
        client=Client("", ""),
        arrived=0.0,
        deadline=0.0,
        max_wait=0.0,
    )
    found = max_cost_estimate(request, request_size(endpoint, document), upstreams, **more)
    return None if found is None else found * 10**6


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


@pytest.mark.parametrize(
    ("document", "more", "cost"),
    [
        (chat("x" * 40, max_tokens=5), {}, 10 + 50),
        (chat("x" * 40, max_tokens=5, n=2), {}, 10 + 100),
        (chat("x" * 40), {"output": 7}, 10 + 70),
        (chat("x" * 40, max_tokens=5), {"output": 7}, 10 + 50),
        (chat("x" * 40, max_tokens=5), {"ratio": 2.0}, 20 + 50),
        (chat("", max_tokens=0), {}, 1 + 10),  # what is not free does not look free
        ({"input": "x" * 40}, {"endpoint": "embeddings"}, 10),
    ],
)
def test_prompt_and_output_are_priced(document: dict[str, Any], more: dict[str, Any], cost: int) -> None:
    assert estimate(document, upstream(), **more) == cost


def test_the_most_expensive_upstream_counts() -> None:
    assert estimate(chat("x" * 40, max_tokens=5), upstream(), upstream(dollars=3), upstream(dollars=2)) == 180


def test_without_a_price_there_is_no_estimate() -> None:
    assert estimate(chat("x")) is None
    assert estimate(chat("x"), upstream("another")) is None
    assert estimate(chat("x" * 40, max_tokens=5), upstream("another"), upstream()) == 60


def test_an_unpriced_tier_counts_as_the_default_tier() -> None:
    assert estimate(chat("x" * 40, max_tokens=5, service_tier="scale"), upstream()) == 60
    assert estimate(chat("x" * 40, max_tokens=5, service_tier=7), upstream()) == 60


def test_a_free_model_costs_nothing() -> None:
    assert estimate(chat("x" * 40, max_tokens=5), upstream(dollars=0)) == 0
