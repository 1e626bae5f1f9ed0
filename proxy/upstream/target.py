"""One upstream, ready to use: address, provider, prices, retry budget, circuit breaker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..cost.pricing import PriceTable
from .providers.interface import Provider, UpstreamAddress
from .retry.circuit_breaker import CircuitBreaker
from .retry.policy import RetryBudget

CLIENTS_KEY: Final = "client"
"""The label of the only key if the proxy has none of its own: the client's credential goes upstream."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """One upstream, ready to use. cache_as: stands for it in the cache key; None: its own identity."""

    address: UpstreamAddress
    provider: Provider
    prices: PriceTable
    budget: RetryBudget
    cache_as: str | None
    breaker: CircuitBreaker

    def identity(self, model: str) -> str:
        """Return what stands for the upstream in the cache key of a request for `model`."""
        return self.cache_as or self.provider.identity(self.address, model)
