"""One upstream, ready to use: address, provider, prices, retry budget, circuit breaker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..cost.pricing import DEFAULT_TIERS, Cost, PriceTable, Seller
from ..cost.usage import Usage
from ..protocol.request import ProxyRequest
from ..protocol.routes import Shape
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
    seller: Seller
    budget: RetryBudget
    cache_as: str | None
    breaker: CircuitBreaker

    def cost(self, request: ProxyRequest, answer_model: object, usage: Usage, service_tier: object) -> Cost | None:
        """Return the cost of a response here in USD; None if it is not known.

        answer_model, service_tier: as the response names them. If it does not name the tier although the request asked
        for one, the tier is not known.
        """
        asked_tier = request.document.get("service_tier")
        if service_tier is None and not isinstance(asked_tier, list | dict) and asked_tier not in DEFAULT_TIERS:
            return None
        models = answer_model if isinstance(answer_model, str) else None, request.model
        deployment = self.provider.deployment(self.address, request.route, request.model)
        return self.prices.cost(self.seller, models, usage, service_tier, deployment)

    def identity(self, model: str, shape: Shape) -> str:
        """Return what stands for the upstream in the cache key of a request for `model` in this shape."""
        return self.cache_as or self.provider.identity(self.address, model, shape)
