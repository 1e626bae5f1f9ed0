"""What a request may cost at most, estimated before it is sent."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal

from ..cost.usage import Usage
from ..protocol.request import ProxyRequest
from .limits.estimate import RequestSize
from .target import Upstream


def max_cost_estimate(
    request: ProxyRequest, size: RequestSize, upstreams: Iterable[Upstream], ratio: float = 1.0, output: int = 0
) -> Decimal | None:
    """Return the estimated cost in USD at the most expensive upstream and service tier; None if no price is known.

    The tiers are the one that the request asks for and the default one, which the upstream may use instead. At least
    one token is assumed each way, so that only a free model is estimated at 0.

    upstreams: those that serve the request's model.
    ratio: tokens of the prompt's text, divided by its UTF-8 bytes / 4.
    output: tokens of one answer if the request sets no limit.
    """
    prompt = size.prompt_tokens(ratio)
    completion = max(size.tokens(ratio, output) - prompt, 1) if size.choices else 0
    prompt = max(prompt, 1)
    usage = Usage(prompt, completion, prompt + completion)
    tier = request.document.get("service_tier")
    tiers = {None, tier} if isinstance(tier, str) else {None}
    costs = [
        upstream.prices.cost(
            upstream.seller,
            (request.model,),
            usage,
            each,
            upstream.provider.deployment(upstream.address, request.route, request.model),
        )
        for upstream in upstreams
        for each in tiers
    ]
    return max([cost.usd for cost in costs if cost is not None], default=None)
