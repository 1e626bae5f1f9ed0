"""Explains what the cache makes of a request: its key, whether it would be cached, and the nearest stored request.

`POST /_proxy/cache/explain` and `openai-proxy cache explain` show it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from ..cache.fields import dropped_fields
from ..cache.key import NotCacheable
from ..cache.miss_reason import nearest, reason_of
from ..cache.planner import Planner
from ..config.settings import CacheSettings
from ..protocol.errors import ProxyError
from ..protocol.headers import Raw
from ..protocol.options import from_headers
from ..protocol.request import Client, ProxyRequest, parse_body
from ..protocol.routes import ENDPOINTS, Route, parse_target
from ..upstream.providers.interface import UpstreamAddress
from ..upstream.providers.registry import model_named

EntrySummary = Mapping[str, Any]
"""A stored response as `cache/listing.py` shows it."""

CLIENT: Final = "client"
"""What is said to differ if no field does and the keys still do."""


def request_of(
    addresses: Sequence[UpstreamAddress], target: str, headers: Sequence[Raw], body: bytes, client: Client
) -> ProxyRequest:
    """Return the request that `body` would be, sent to `target`. Raises ProxyError."""
    route: Route = parse_target(target)
    if route.endpoint not in ENDPOINTS.values():
        raise ProxyError("bad_request", f"never cached: only {', '.join(ENDPOINTS)} are", param="target")
    texts = ((name.decode("latin-1"), value.decode("utf-8", "surrogateescape")) for name, value in headers)
    return ProxyRequest.from_body(
        body,
        parse_body(body),
        partial(model_named, addresses),
        route=route,
        headers=headers,
        options=replace(from_headers(route.options, texts), run=""),  # which would count it
        client=client,
    )


async def explain(
    planner: Planner,
    settings: CacheSettings,
    request: ProxyRequest,
    pages: AsyncIterator[Sequence[EntrySummary]],
    progress: Callable[[int], object] = lambda _: None,
) -> dict[str, Any]:
    """Return the explanation of a request, for JSON. Raises what the pages raise.

    settings: those of the cache. pages: the stored responses of the request's endpoint. progress: is called with the
    number of responses that each page held.
    """
    plan = await planner.plan(request)
    dropped = dropped_fields(request.endpoint, settings.ignore_fields)
    explanation: dict[str, Any] = {
        "endpoint": request.endpoint,
        "cacheable": bool(plan.key),
        "reason": plan.reason,
        "key": plan.key or None,
        "parts": None,
        "fields": {},
        "left_out": sorted(dropped.intersection(request.document)),
        "stored": [],
        "nearest": None,
        "differs": [],
        "compared": 0,
    }
    try:
        parts = planner.key_parts(request, dropped)
    except NotCacheable:
        return explanation
    explanation["parts"] = {
        "namespace": request.options.namespace,
        "model": request.model,
        "deployment": request.route.deployment or "",
        "upstreams": parts.upstreams.split("\n"),
        "OpenAI-Beta": parts.beta,
        "sample": request.options.sample,
        "query": parts.query,
    }
    if not plan.key:
        return explanation
    explanation["fields"] = _fields(plan.field_digests)
    ageless = settings.mode == "replay"
    best: tuple[EntrySummary, list[str]] | None = None
    async for page in pages:
        explanation["stored"] += [dict(card) for card in page if card["key"] == plan.key]
        others = [card for card in page if card["key"] != plan.key and (ageless or card["ttl_left_s"] > 0)]
        if best is not None:
            others.append(best[0])
        best = nearest(((card, card["traits"]) for card in sorted(others, key=_age)), plan.field_digests)
        explanation["compared"] += len(page)
        progress(len(page))
    if best is not None:
        explanation["nearest"], explanation["differs"] = dict(best[0]), best[1] or [CLIENT]
    if plan.read:
        explanation["reason"] = _reason(request.endpoint, explanation["stored"], explanation["differs"], ageless)
    return explanation


def _age(card: EntrySummary) -> int:
    age: int = card["age_s"]
    return age


def _reason(endpoint: str, stored: Iterable[EntrySummary], differs: Sequence[str], ageless: bool) -> str:
    left = [card["ttl_left_s"] for card in stored]
    if left:
        return "hit" if ageless or max(left) > 0 else "expired"
    return reason_of(endpoint, differs)


def _fields(traits: str) -> dict[str, str]:
    return {name: digest for name, _, digest in (trait.partition(":") for trait in traits.split())}
