"""One upstream, ready to use: address, provider, prices, retry budget, circuit breaker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..cost.pricing import PriceTable
from .providers.interface import Provider, UpstreamAddress
from .retry.circuit_breaker import CircuitBreaker
from .retry.policy import RetryBudget

CLIENTS_KEY: Final = "client"
"""The label of the one key a pass-through proxy has: each client's own."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """One upstream, ready to use."""

    address: UpstreamAddress
    provider: Provider
    prices: PriceTable
    budget: RetryBudget
    cache_as: str | None
    breaker: CircuitBreaker

    def identity(self, model: str) -> str:
        return self.cache_as or self.provider.identity(self.address, model)
