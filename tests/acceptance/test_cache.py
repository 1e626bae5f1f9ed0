"""What is stored, what is replayed, and what a response says about it (docs/caching.md, docs/headers.md)."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from tests import upstream_answers
from tests.client import Client, ask
from tests.launch import Launch, ProxyProcess, secret, settings
from tests.scripted_upstream import ScriptedUpstream

HIT = re.compile(r"openai-proxy; hit; ttl=(\d+)(; detail=sampled)?")


async def test_a_miss_then_a_hit(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    question = ask(temperature=0)
    miss = await client.send(proxy, question)
    assert miss.cache == "miss"
    assert miss.headers["X-Proxy-Cache-Reason"] == "new"
    assert miss.headers["Cache-Status"] == "openai-proxy; fwd=uri-miss; stored"
    assert miss.headers["X-Proxy-Attempts"] == "1"
    assert (miss.headers["X-Proxy-Upstream"], miss.headers["X-Proxy-Key"]) == ("openai", "k1")
    assert "Age" not in miss.headers
    hit = await client.send(proxy, question)
    assert (hit.status, hit.body, hit.cache) == (200, miss.body, "hit")
    status = HIT.fullmatch(hit.headers["Cache-Status"])
    assert status is not None, hit.headers["Cache-Status"]
    assert 86_000 < int(status.group(1)) <= 86_400
    assert status.group(2) is None  # temperature 0 is not sampled
    assert 0 <= int(hit.headers["Age"]) <= 10
    assert hit.headers["Content-Type"] == miss.headers["Content-Type"]
    assert hit.headers["X-Proxy-Cost-USD"] == "0.000000"
    assert hit.headers["X-Proxy-Cost-Saved-USD"] == "0.002250"
    assert hit.headers["X-Proxy-Attempts"] == "0"
    assert hit.headers["X-Proxy-Total-Tokens"] == "300"
    assert re.fullmatch(r"[0-9a-f]{16,}", hit.headers["X-Proxy-Cache-Key"])
    assert hit.headers["X-Proxy-Cache-Key"] == miss.headers["X-Proxy-Cache-Key"]
    assert upstream.count == 1


async def test_a_hit_on_a_sampled_request_says_so(proxy: ProxyProcess, client: Client) -> None:
    for fields, sampled in [({}, True), ({"temperature": 1}, True), ({"seed": 7}, False)]:
        question = ask(**fields)
        await client.send(proxy, question)
        hit = await client.send(proxy, question)
        assert ("detail=sampled" in hit.headers["Cache-Status"]) == sampled, fields


async def test_no_per_request_header_is_replayed(proxy: ProxyProcess, client: Client) -> None:
    question = ask()
    miss = await client.send(proxy, question)
    hit = await client.send(proxy, question)
    assert "x-request-id" in miss.headers
    gone = ["x-request-id", "openai-processing-ms", "Set-Cookie", "cf-ray"]
    gone += [name for name in hit.headers if name.lower().startswith("x-ratelimit-")]
    assert [name for name in gone[:3] if name in hit.headers] == []
    assert gone[4:] == []
    assert hit.headers.get("Date") != "Fri, 20 Nov 2026 21:02:01 GMT"


SAME = [
    b'{"model":"gpt-4o","messages":[{"role":"user","content":"s\\u00e4me"}],"temperature":0.5,"x":{"a":1,"b":2}}',
    '{"temperature":0.5,"messages":[{"content":"säme","role":"user"}],"x":{"b":2,"a":1},"model":"gpt-4o"}'.encode(),
    b'{ "model" : "gpt-4o",\n "messages": [ {"role":"user","content":"s\\u00E4me"} ], "x":{"a":1,"b":2},'
    b'\t"temperature":0.5 }',
]


async def test_key_order_white_space_and_escapes_do_not_matter(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    caches = [(await client.send(proxy, body)).cache for body in SAME]
    assert caches == ["miss", "hit", "hit"]


async def test_every_other_difference_matters(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    base = ask()
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    variants: list[dict[str, Any]] = [
        {},
        *({"temperature": value} for value in (None, 0, 0.0, 1, 1.0, 0.5)),
        *({"num_ctx": value} for value in (1, 2, None, "1", True)),
        {"x_future": {"deep": [1, 2]}},
        {"x_future": {"deep": [2, 1]}},
        {"model": "gpt-4o-mini"},
        {"tools": tools},
        {"tools": tools, "tool_choice": "none"},
        {"max_tokens": 100},
        {"max_completion_tokens": 100},
        {"seed": 1},
        {"n": 1},
        {"messages": [*base["messages"], {"role": "user", "content": "more"}]},
    ]
    for fields in variants:
        answer = await client.send(proxy, base | fields)
        assert answer.cache == "miss", fields
    assert upstream.count == len(variants)
    for fields in variants:
        assert (await client.send(proxy, base | fields)).cache == "hit", fields


async def test_the_spelling_of_a_number_matters(proxy: ProxyProcess, client: Client) -> None:
    template = b'{"model":"gpt-4o","messages":[{"role":"user","content":"spelling"}],"temperature":%b}'
    for number in (b"1", b"1.0", b"0", b"-0"):
        assert (await client.send(proxy, template % number)).cache == "miss", number


async def test_query_and_beta_header_are_in_the_key(proxy: ProxyProcess, client: Client) -> None:
    question = ask()
    assert (await client.send(proxy, question)).cache == "miss"
    assert (await client.send(proxy, question, path="/v1/chat/completions?a=1")).cache == "miss"
    assert (await client.send(proxy, question, {"OpenAI-Beta": "x=v1"})).cache == "miss"
    assert (await client.send(proxy, question)).cache == "hit"


async def test_other_headers_and_ignored_fields_are_not_in_the_key(proxy: ProxyProcess, client: Client) -> None:
    question = ask()
    await client.send(proxy, question | {"user": "u1", "metadata": {"a": "1"}}, {"User-Agent": "one"})
    fields = {
        "user": "u2",
        "safety_identifier": "s",
        "prompt_cache_key": "p",
        "prompt_cache_retention": "24h",
    }
    headers = {"User-Agent": "two", "X-Stainless-Retry-Count": "1", "Authorization": "Bearer whatever"}
    assert (await client.send(proxy, question | fields, headers)).cache == "hit"
    assert (await client.send(proxy, question, path="/chat/completions")).cache == "hit"


async def test_on_responses_the_ignored_fields_stay_in_the_key(proxy: ProxyProcess, client: Client) -> None:
    question = {"model": "gpt-4o", "input": "responses echo them", "store": False}
    for metadata in ({"a": "1"}, {"a": "2"}):
        answer = await client.send(proxy, question | {"metadata": metadata}, path="/v1/responses")
        assert answer.cache == "miss"


# What a request may ask.


async def test_no_cache_refreshes_the_entry(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    question = ask()
    await client.send(proxy, question)
    upstream.script = lambda _: upstream_answers.chat("fresher")
    fresh = await client.send(proxy, question, {"Cache-Control": "no-cache"})
    assert b"fresher" in fresh.body
    assert fresh.cache in ("miss", "bypass")  # the effect is promised, not the word
    hit = await client.send(proxy, question)
    assert (hit.cache, hit.body) == ("hit", fresh.body)


async def test_no_store_neither_reads_nor_stores(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    question = ask()
    answer = await client.send(proxy, question, {"Cache-Control": "no-store"})
    assert answer.cache == "bypass"
    assert answer.headers["X-Proxy-Cache-Reason"] == "no-store"
    assert answer.headers["Cache-Status"] == "openai-proxy; fwd=bypass; detail=no-store"
    assert (await client.send(proxy, question)).cache == "miss"
    assert (await client.send(proxy, question, {"Cache-Control": "no-store"})).cache == "bypass"
    assert upstream.count == 3


async def test_max_age_wants_a_young_entry(proxy: ProxyProcess, client: Client) -> None:
    question = ask()
    await client.send(proxy, question)
    assert (await client.send(proxy, question, {"Cache-Control": "max-age=3600"})).cache == "hit"
    await asyncio.sleep(1.1)  # an age of whole seconds is no more than 0 before
    old = await client.send(proxy, question, {"Cache-Control": "max-age=0"})
    assert (old.cache, old.headers["X-Proxy-Cache-Reason"]) == ("miss", "max-age")


async def test_only_if_cached(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    question = ask()
    answer = await client.send(proxy, question, {"Cache-Control": "only-if-cached"})
    assert (answer.status, answer.error) == (504, "not_cached")
    assert answer.headers["X-Should-Retry"] == "false"
    assert upstream.count == 0
    await client.send(proxy, question)
    assert (await client.send(proxy, question, {"Cache-Control": "only-if-cached"})).cache == "hit"


async def test_unknown_cache_control_is_ignored(proxy: ProxyProcess, client: Client) -> None:
    question = ask()
    await client.send(proxy, question)
    assert (await client.send(proxy, question, {"Cache-Control": "min-fresh=3, private, x"})).cache == "hit"


async def test_a_ttl_of_its_own(proxy: ProxyProcess, client: Client) -> None:
    long, short = ask(), ask()
    await client.send(proxy, long, {"X-Proxy-Cache-TTL": "1h"})
    hit = await client.send(proxy, long)
    assert 3590 <= int(hit.headers["Cache-Status"].split("ttl=")[1].split(";")[0]) <= 3600
    await client.send(proxy, short, {"X-Proxy-Cache-TTL": "1"})
    assert (await client.send(proxy, short)).cache == "hit"
    await asyncio.sleep(1.1)
    expired = await client.send(proxy, short)
    assert (expired.cache, expired.headers["X-Proxy-Cache-Reason"]) == ("miss", "expired")


@pytest.mark.parametrize("header", ["X-Proxy-Cache-Namespace", "X-Proxy-Sample"])
async def test_namespaces_and_samples_are_separate(proxy: ProxyProcess, client: Client, header: str) -> None:
    question = ask()
    asked: list[dict[str, str]] = [{}, {header: "1"}, {header: "2"}]
    assert [(await client.send(proxy, question, h)).cache for h in asked] == ["miss"] * 3
    assert [(await client.send(proxy, question, h)).cache for h in asked] == ["hit"] * 3


async def test_options_in_the_base_url(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    question, path = ask(), "/_/namespace=ci;ttl=1h;tag=team:search/v1/chat/completions"
    assert (await client.send(proxy, question, path=path)).cache == "miss"
    assert upstream.last.target == "/v1/chat/completions"
    hit = await client.send(proxy, question, path=path)
    assert hit.cache == "hit"
    assert int(hit.headers["Cache-Status"].split("ttl=")[1].split(";")[0]) <= 3600
    same = await client.send(proxy, question, {"X-Proxy-Cache-Namespace": "ci"})
    assert same.cache == "hit"
    assert (await client.send(proxy, question)).cache == "miss"
    bypass = await client.send(proxy, question, path="/_/cache=no-store/v1/chat/completions")
    assert bypass.cache == "bypass"
    missing = await client.send(proxy, ask(), path="/_/cache=only-if-cached/v1/chat/completions")
    assert missing.error == "not_cached"


# Streams.


async def test_a_stream_is_replayed_byte_for_byte(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    question = ask(stream=True)
    miss = await client.send(proxy, question)
    assert miss.headers["Cache-Status"] == "openai-proxy; fwd=uri-miss"  # `stored` on plain answers only
    hit = await client.send(proxy, question)
    assert (hit.cache, hit.body) == ("hit", miss.body)
    assert hit.headers["Content-Type"] == miss.headers["Content-Type"]
    assert hit.headers["X-Proxy-Cost-USD"] == "0.000000"
    assert hit.headers["X-Proxy-Cost-Saved-USD"] == "0.002250"
    assert hit.headers["X-Proxy-Cost-Status"] == "exact"
    assert upstream.count == 1


async def test_only_clients_that_asked_get_the_usage_chunk(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    for fill_with in (True, False):
        question = ask(stream=True)
        with_usage = question | {"stream_options": {"include_usage": True}}
        await client.send(proxy, with_usage if fill_with else question)
        got = await client.send(proxy, with_usage)
        assert got.body.count(b'"usage":{') == 1  # a hit or an honest miss
        assert (got.cache == "hit") or not fill_with
        bare = await client.send(proxy, question)
        assert b'"usage":{' not in bare.body
        assert bare.body.endswith(upstream_answers.DONE)


async def test_stream_and_plain_do_not_disturb_each_other(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    """One may answer for the other, losslessly, or it is a miss."""
    for first, second in ((False, True), (True, False)):
        question = ask()
        answers = [await client.send(proxy, question | {"stream": form}) for form in (first, second)]
        for form, answer in zip((first, second), answers, strict=True):
            said = "echo: " + question["messages"][0]["content"]
            if form:
                assert answer.headers["Content-Type"].startswith("text/event-stream")
                payloads = [json.loads(part[6:]) for part in answer.body.split(b"\n\n")[:-2]]
                got = "".join(c["delta"].get("content") or "" for p in payloads for c in p["choices"])
            else:
                got = answer.json()["choices"][0]["message"]["content"]
            assert got == said
        for form, answer in zip((first, second), answers, strict=True):
            again = await client.send(proxy, question | {"stream": form})
            assert (again.cache, again.body) == ("hit", answer.body)


async def test_a_hit_carries_no_cost_comment_unless_asked(proxy: ProxyProcess, client: Client) -> None:
    question = ask(stream=True)
    await client.send(proxy, question, {"X-Proxy-Stream-Cost": "comment"})
    hit = await client.send(proxy, question)
    assert hit.cache == "hit"
    assert b": x-proxy" not in hit.body


# Whose entries.


async def test_pass_through_credentials_have_separate_caches(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    config = settings(upstream.port)
    del config["upstreams"][0]["keys"]
    proxy, question = launch(config), ask()
    owners = [{"Authorization": f"Bearer {secret(name)}"} for name in ("anna", "ben")]
    assert [(await client.send(proxy, question, h)).cache for h in owners] == ["miss", "miss"]
    assert [(await client.send(proxy, question, h)).cache for h in owners] == ["hit", "hit"]
    assert (await client.send(proxy, question, {"api-key": secret("carla")})).cache == "miss"


async def test_client_keys_have_separate_caches(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    people = [("a", None), ("b", None), ("c", "joint"), ("d", "joint")]
    keys = [{"name": n, "key": secret(n), **({"namespace": s} if s else {})} for n, s in people]
    proxy, question = launch(settings(upstream.port, server={"client_keys": keys})), ask()
    answers = [await client.send(proxy, question, {"Authorization": f"Bearer {secret(name)}"}) for name, _ in people]
    assert [answer.cache for answer in answers] == ["miss", "miss", "miss", "hit"]
    assert all("X-Proxy-Cache-Key" not in answer.headers for answer in answers)
    # A request's namespace lies within its client's.
    own = {"Authorization": f"Bearer {secret('b')}", "X-Proxy-Cache-Namespace": "joint"}
    assert (await client.send(proxy, question, own)).cache == "miss"


async def test_shared_joins_the_clients(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    keys = [{"name": name, "key": secret(name)} for name in ("a", "b")]
    proxy = launch(settings(upstream.port, server={"client_keys": keys}, cache={"shared": True}))
    question = ask()
    caches = [(await client.send(proxy, question, {"api-key": secret(name)})).cache for name in ("a", "b")]
    assert caches == ["miss", "hit"]


# Settings.


@pytest.mark.parametrize("cache", [{"backend": "off"}, {"when": "never"}])
async def test_the_cache_can_be_off(
    launch: Launch, upstream: ScriptedUpstream, client: Client, cache: dict[str, str]
) -> None:
    proxy, question = launch(settings(upstream.port, cache=cache)), ask()
    for _ in range(2):
        assert (await client.send(proxy, question)).cache == "bypass"
    assert upstream.count == 2


async def test_when_deterministic(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(settings(upstream.port, cache={"when": "deterministic"}))
    cases = [
        ({}, "bypass"),
        ({"temperature": 1}, "bypass"),
        ({"temperature": 0}, "hit"),
        ({"seed": 3}, "hit"),
    ]
    for fields, second in cases:
        question = ask(**fields)
        await client.send(proxy, question)
        assert (await client.send(proxy, question)).cache == second, fields


async def test_max_entry_and_ttl_per_endpoint(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    cache = {"max_entry": "2KiB", "ttl": {"chat": "5m", "embeddings": "1h"}}
    proxy = launch(settings(upstream.port, cache=cache))
    small, asked = ask(), {"model": "text-embedding-3-small", "input": "ttl"}
    await client.send(proxy, small)
    hit = await client.send(proxy, small)
    assert 290 <= int(hit.headers["Cache-Status"].split("ttl=")[1].split(";")[0]) <= 300
    await client.send(proxy, asked, path="/v1/embeddings")
    hit = await client.send(proxy, asked, path="/v1/embeddings")
    assert 3590 <= int(hit.headers["Cache-Status"].split("ttl=")[1].split(";")[0]) <= 3600
    upstream.always(upstream_answers.chat("x" * 5000))
    large = ask()
    assert [(await client.send(proxy, large)).cache for _ in range(2)] == ["miss", "miss"]


async def test_a_hit_writes_no_log_line(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy, question = launch(settings(upstream.port, log={"level": "info"})), ask()
    await client.send(proxy, question)
    await client.send(proxy, question)
    before = proxy.stderr_so_far()
    for _ in range(5):
        assert (await client.send(proxy, question)).cache == "hit"
    assert proxy.stderr_so_far() == before


async def test_embeddings_in_both_encodings(proxy: ProxyProcess, client: Client) -> None:
    """The SDKs' base64 and an explicit float are two requests; each hits and each comes as asked."""
    asked = {"model": "text-embedding-3-small", "input": ["one text", "another"]}
    bodies = {}
    for encoding in ("base64", "float"):
        answers = [
            await client.send(proxy, asked | {"encoding_format": encoding}, path="/v1/embeddings") for _ in (1, 2)
        ]
        assert [a.cache for a in answers] == ["miss", "hit"]
        assert answers[0].body == answers[1].body
        bodies[encoding] = answers[0].json()["data"]
    assert all(isinstance(item["embedding"], str) for item in bodies["base64"])
    assert all(isinstance(item["embedding"], list) for item in bodies["float"])
