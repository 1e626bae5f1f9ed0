"""What a request may use and cost, estimated before it is sent; the estimates learn from what requests used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from decimal import Decimal

from ..cost.usage import Usage
from ..protocol.request import ProxyRequest
from .cost_estimate import max_cost_estimate
from .limits.calibration import TokenCalibration
from .limits.estimate import RequestSize, request_size
from .target import Upstream


class Estimates:
    """Estimates requests.

    serving: the upstreams that serve a model. counted: whether any limit or budget counts tokens or cost.
    """

    def __init__(
        self,
        calibration: TokenCalibration,
        serving: Callable[[str], Iterable[Upstream]],
        counted: Callable[[], bool],
    ) -> None:
        self._calibration = calibration
        self._serving = serving
        self._counted = counted

    def size(self, request: ProxyRequest) -> RequestSize | None:
        """Return what a request's estimates are made of; None if no limit or budget counts them."""
        return request_size(request.endpoint, request.document) if self._counted() else None

    def tokens(self, model: str, size: RequestSize | None) -> int:
        """Return how many tokens to reserve for a request; 0 if nothing counts them."""
        return 0 if size is None else self._calibration.estimate(model, size)

    def max_cost(self, request: ProxyRequest, size: RequestSize) -> Decimal | None:
        """Return the cost in USD to reserve for a request; None if no price is known."""
        ratio, output = self._calibration.ratio(request.model), self._calibration.output(request.model)
        return max_cost_estimate(request, size, self._serving(request.model), ratio, output)

    def used(self, request: ProxyRequest, size: RequestSize | None, text: int) -> Usage:
        """Return what a response has used by estimate. text: its bytes of text."""
        size = size or request_size(request.endpoint, request.document)
        return self._calibration.estimated_usage(request.model, size, text)

    def record(self, request: ProxyRequest, size: RequestSize | None, usage: Usage | None) -> None:
        """Improve the next estimate for the model by what a response used."""
        if usage is not None and size is not None:
            self._calibration.record(request.model, size, usage)
