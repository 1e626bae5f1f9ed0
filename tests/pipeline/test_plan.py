"""What the cache may do for a request, under which key, and how the headers show it (docs/caching.md)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import proxy.system.threads
from proxy.cache.plan import CachePlan
from proxy.config.settings import CacheSettings, ClientKeySettings, ServerSettings, UpstreamSettings
from proxy.protocol.options import Options
from proxy.protocol.request import Client
from tests.pipeline.clock import virtual_time
from tests.pipeline.fixture import PipelineFixture, ask, pool, settings
from tests.pipeline.script import says

SAMPLED = ask()
FIXED = ask(temperature=0)
SEEDED = ask(seed=7)
STORED = ask(store=True)
KEY = "<key>"

# backend, when, request, options -> (key, reason, read, write, fwd)
PLANS: list[tuple[str, str, Any, Options, tuple[str, str, bool, bool, str]]] = [
    ("memory", "always", SAMPLED, Options(), (KEY, "new", True, True, "uri-miss")),
    ("memory", "always", SAMPLED, Options(no_cache=True), (KEY, "no-cache", False, True, "request")),
    ("memory", "always", SAMPLED, Options(no_store=True), ("", "no-store", False, False, "bypass")),
    ("memory", "always", SAMPLED, Options(no_store=True, no_cache=True), ("", "no-store", False, False, "bypass")),
    ("memory", "always", SAMPLED, Options(max_age=5), (KEY, "new", True, True, "uri-miss")),
    ("memory", "always", SAMPLED, Options(only_if_cached=True), (KEY, "new", True, True, "uri-miss")),
    ("memory", "always", STORED, Options(), ("", "uncacheable: store=true", False, False, "bypass")),
    ("memory", "always", STORED, Options(no_cache=True), ("", "uncacheable: store=true", False, False, "bypass")),
    ("memory", "deterministic", SAMPLED, Options(), ("", "uncacheable: sampled", False, False, "bypass")),
    ("memory", "deterministic", FIXED, Options(), (KEY, "new", True, True, "uri-miss")),
    ("memory", "deterministic", SEEDED, Options(), (KEY, "new", True, True, "uri-miss")),
    ("memory", "deterministic", STORED, Options(), ("", "uncacheable: store=true", False, False, "bypass")),
    ("memory", "deterministic", FIXED, Options(no_cache=True), (KEY, "no-cache", False, True, "request")),
    ("memory", "never", FIXED, Options(), ("", "when=never", False, False, "bypass")),
    ("memory", "never", FIXED, Options(no_cache=True), ("", "when=never", False, False, "bypass")),
    ("off", "always", FIXED, Options(), ("", "off", False, False, "bypass")),
    ("off", "deterministic", SAMPLED, Options(no_store=True), ("", "off", False, False, "bypass")),
    ("off", "never", FIXED, Options(), ("", "off", False, False, "bypass")),
]


@pytest.mark.parametrize(("backend", "when", "document", "options", "expected"), PLANS)
@virtual_time
async def test_the_plan_for_each_request(
    backend: str, when: str, document: Any, options: Options, expected: tuple[str, str, bool, bool, str]
) -> None:
    pipeline = PipelineFixture(says(), says(), config=settings(cache=CacheSettings(backend=backend, when=when)))
    plan = await pipeline.planned(document, options)
    assert (bool(plan.key), plan.reason, plan.read, plan.write, plan.fwd) == (expected[0] == KEY, *expected[1:])
    if options.only_if_cached:
        return
    result = await pipeline.ask(document, options)
    assert (result.cache, result.reason) == ("miss" if plan.key else "bypass", plan.reason)
    status = f"openai-proxy; fwd={plan.fwd}" + ("; stored" if plan.write else "")
    detail = plan.reason if plan.fwd != "uri-miss" else ""
    shown = f'"{detail}"' if set(detail) & set(" =") else detail
    assert result.headers["Cache-Status"] == status + (f"; detail={shown}" if detail else "")
    assert ("X-Proxy-Cache-Key" in result.headers) is bool(plan.key)
    again = await pipeline.ask(document)
    assert again.cache == ("hit" if plan.write else "miss" if (await pipeline.planned(document)).key else "bypass")


@pytest.mark.parametrize(
    ("target", "document", "ttl"),
    [
        ("/v1/embeddings", {"model": "text-embedding-3-small", "input": "Hi"}, 604_800),
        ("/v1/moderations", {"input": "Hi"}, 86_400),
    ],
)
@virtual_time
async def test_embeddings_and_moderations_count_as_deterministic(target: str, document: Any, ttl: int) -> None:
    answer = {"data": [{"index": 0, "embedding": [1.0]}], "results": [{"flagged": False}], "model": "m"}
    pipeline = PipelineFixture(says(answer), config=settings(cache=CacheSettings(when="deterministic")))
    await pipeline.ask(document, target=target)
    hit = (await pipeline.ask(document, target=target)).hit
    assert hit is not None
    assert (hit.entry.ttl, hit.entry.sampled) == (ttl, False)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"model":"gpt-4o","model":"gpt-4o","messages":[]}', "uncacheable: duplicate keys"),
        (b'{"model":"gpt-4o","x":NaN}', "uncacheable: NaN"),
        (b'{"model":"gpt-4o","x":' + b"[" * 70 + b"]" * 70 + b"}", "uncacheable: depth"),
    ],
)
@virtual_time
async def test_ambiguous_bodies_are_forwarded_and_not_cached(body: bytes, why: str) -> None:
    pipeline = PipelineFixture(says(), says())
    for _ in range(2):
        result = await pipeline.ask(body=body)
        assert (result.status, result.cache, result.reason) == (200, "bypass", why)
        assert pipeline.transport.sent[-1].body == body


# The key: what may change the answer is in it, what may not is not.


async def key(pipeline: PipelineFixture, document: Any = None, options: Options | None = None, **more: Any) -> str:
    plan = await pipeline.planned(document, options, **more)
    assert plan.key
    return plan.key


DIFFERENT: dict[str, dict[str, Any]] = {
    "model": {"document": ask(model="gpt-4o-mini")},
    "an unknown field": {"document": ask(x_new_field=1)},
    "null is not absent": {"document": ask(seed=None)},
    "endpoint": {"target": "/v1/completions"},
    "query": {"target": "/v1/chat/completions?x=1"},
    "deployment": {"target": "/openai/deployments/d/chat/completions?x=1"},
    "namespace": {"options": Options(namespace="ci")},
    "sample": {"options": Options(sample="1")},
    "client": {"client": Client("a", "name a")},
    "OpenAI-Beta": {"headers": [(b"OpenAI-Beta", b"assistants=v2")]},
}
SAME: dict[str, dict[str, Any]] = {
    "user": {"document": ask(user="u", metadata={"a": "b"}, safety_identifier="x", prompt_cache_key="y")},
    "stream": {"document": ask(stream=True, stream_options={"include_usage": True})},
    "spelling": {"body": b'{ "messages":[{"content":"\\u0048i","role":"user"}],"model":"gpt-4o" }'},
    "what SDKs say of themselves": {"headers": [(b"X-Stainless-Retry-Count", b"1"), (b"User-Agent", b"x")]},
    "options that change no answer": {
        "options": Options(ttl=5.0, tags=("a:b",), max_age=1, max_wait=1.0, timeout=9.0, max_retries=1)
    },
    "without /v1": {"target": "/chat/completions"},
    "options in the URL": {"target": "/_/ttl=1h/v1/chat/completions"},
    "a client's name": {"client": Client("a", "")},
}


@pytest.mark.parametrize("more", DIFFERENT.values(), ids=DIFFERENT.keys())
@virtual_time
async def test_requests_that_differ_have_different_keys(more: dict[str, Any]) -> None:
    pipeline = PipelineFixture()
    assert await key(pipeline, **more) != await key(pipeline)


@pytest.mark.parametrize("more", SAME.values(), ids=SAME.keys())
@virtual_time
async def test_requests_that_mean_the_same_have_the_same_key(more: dict[str, Any]) -> None:
    pipeline = PipelineFixture()
    assert await key(pipeline, **more) == await key(pipeline)


@virtual_time
async def test_namespace_and_client_are_separate_in_the_key() -> None:
    pipeline = PipelineFixture()
    keys = [
        await key(pipeline, None, Options(namespace=namespace), client=Client("", scope))
        for scope, namespace in (("a", "b"), ("a\nb", ""), ("", "a\nb"), ("", "ab"), ("ab", ""))
    ]
    assert len(set(keys)) == len(keys)


@virtual_time
async def test_sample_0_has_the_key_of_a_request_without_a_sample() -> None:
    """Number 0 of a run is the entry of a request without a sample (docs/runs.md)."""
    pipeline = PipelineFixture()
    none, zero, one, minus = [await key(pipeline, None, Options(sample=text)) for text in ("", "0", "1", "-1")]
    assert none == zero
    assert len({none, one, minus}) == 3


@virtual_time
async def test_upstreams_have_separate_keys_unless_cache_as_is_equal() -> None:
    def pipeline(*upstreams: UpstreamSettings) -> PipelineFixture:
        return PipelineFixture(config=settings(*upstreams))

    here, there = pool("k1"), replace(pool("k1"), base_url="http://there.test/v1")
    one, other = await key(pipeline(here)), await key(pipeline(there))
    both = await key(pipeline(here, replace(there, name="b", keys=pool("k2").keys)))
    assert one != other
    assert both == one  # the first upstream of the lowest priority decides: another region empties no cache
    region = [replace(upstream, cache_as="gpt") for upstream in (here, there)]
    assert await key(pipeline(region[0])) == await key(pipeline(region[1]))
    assert await key(pipeline(replace(here, keys=pool("k9").keys))) == one  # the key in use does not matter
    elsewhere = replace(there, name="b", models=("o1*",), keys=pool("k2").keys)
    assert await key(pipeline(here, elsewhere)) == one  # it does not serve this model


@virtual_time
async def test_a_large_body_gets_the_same_key(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = PipelineFixture()
    small = await pipeline.planned()
    monkeypatch.setattr(proxy.system.threads, "LARGE", 10)
    assert await pipeline.planned() == small
    assert isinstance(small, CachePlan)


@virtual_time
async def test_the_cache_key_is_hidden_if_the_proxy_has_several_clients() -> None:
    clients = tuple(ClientKeySettings(name, b"x" * 32) for name in "ab")
    for known, shown in ((clients[:1], True), (clients, False)):
        pipeline = PipelineFixture(says(), config=replace(settings(), server=ServerSettings(client_keys=known)))
        assert ("X-Proxy-Cache-Key" in (await pipeline.ask()).headers) is shown
