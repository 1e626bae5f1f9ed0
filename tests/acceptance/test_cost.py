"""Cost headers and receipts (docs/costs-and-budgets.md)."""

from __future__ import annotations

import pytest

from tests import upstream_answers
from tests.client import Client, ask
from tests.launch import Launch, ProxyProcess, settings
from tests.scripted_upstream import ScriptedUpstream

SUMS = [
    ("gpt-4o", 100, 200, "0.002250"),
    ("gpt-4o", 1520, 3840, "0.042200"),
    ("gpt-4o-mini", 1000, 2000, "0.001350"),
    ("gpt-4-turbo", 100, 200, "0.007000"),
    ("o1-preview", 1000, 2000, "0.135000"),
    ("gpt-4", 1000, 1000, "0.090000"),
    ("gpt-3.5-turbo", 1000, 1000, "0.002000"),
    ("gpt-4o", 42, 287, "0.002975"),
    ("gpt-4o", 234, 567, "0.006255"),
    ("gpt-4o-mini", 1, 0, "0.00000015"),  # never rounded to zero, no exponent
]


@pytest.mark.parametrize(("model", "prompt", "output", "cost"), SUMS)
async def test_the_cost_is_exact(
    proxy: ProxyProcess,
    upstream: ScriptedUpstream,
    client: Client,
    model: str,
    prompt: int,
    output: int,
    cost: str,
) -> None:
    upstream.always(upstream_answers.chat(model=model, tokens=(prompt, output)))
    answer = await client.send(proxy, ask(model=model))
    assert answer.headers["X-Proxy-Cost-USD"] == cost
    assert answer.headers["X-Proxy-Cost-Status"] == "exact"
    assert "X-Proxy-Cost-Saved-USD" not in answer.headers
    assert answer.headers["X-Proxy-Prompt-Tokens"] == str(prompt)
    assert answer.headers["X-Proxy-Completion-Tokens"] == str(output)
    assert answer.headers["X-Proxy-Total-Tokens"] == str(prompt + output)


async def test_cached_input_has_its_own_price(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    upstream.always(upstream_answers.chat(tokens=(2000, 100), cached=1000))
    answer = await client.send(proxy, ask())
    # 1000 at 2.50, 1000 cached at 1.25, 100 at 10.00 per million
    assert answer.headers["X-Proxy-Cost-USD"] == "0.004750"
    assert answer.headers["X-Proxy-Cached-Tokens"] == "1000"


async def test_the_answers_model_is_priced_before_the_model_asked_for(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    upstream.always(upstream_answers.chat(model="gpt-4o-mini-2024-07-18", tokens=(1000, 2000)))
    assert (await client.send(proxy, ask())).headers["X-Proxy-Cost-USD"] == "0.001350"
    upstream.always(upstream_answers.chat(model="some-finetune-nobody-knows", tokens=(100, 200)))
    assert (await client.send(proxy, ask())).headers["X-Proxy-Cost-USD"] == "0.002250"


async def test_an_unknown_model_has_no_cost(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    upstream.always(upstream_answers.chat(model="nobody-knows-1"))
    question = ask(model="nobody-knows-1")
    for cache in ("miss", "hit"):
        answer = await client.send(proxy, question)
        assert answer.cache == cache
        if cache == "miss":
            assert "X-Proxy-Cost-USD" not in answer.headers
            assert answer.headers["X-Proxy-Cost-Status"] == "unknown"
        assert "X-Proxy-Cost-Saved-USD" not in answer.headers
        assert answer.headers["X-Proxy-Prompt-Tokens"] == "100"
    stream = await client.send(proxy, ask(model="nobody-knows-1", stream=True), {"X-Proxy-Stream-Cost": "comment"})
    assert b"cost-usd=0" not in stream.body


async def test_a_receipt_has_decimal_strings(proxy: ProxyProcess, client: Client) -> None:
    question = ask()
    miss = await client.send(proxy, question)
    paid = await client.receipt(proxy, miss.headers["X-Proxy-Request-Id"])
    assert paid["id"] == miss.headers["X-Proxy-Request-Id"]
    assert (paid["cost_usd"], paid["cost_status"]) == ("0.002250", "exact")
    assert (paid["prompt_tokens"], paid["completion_tokens"]) == (100, 200)
    assert paid["model"].startswith("gpt-4o")
    assert "saved_usd" in paid
    hit = await client.send(proxy, question)
    free = await client.receipt(proxy, hit.headers["X-Proxy-Request-Id"])
    assert (free["cost_usd"], free["saved_usd"]) == ("0.000000", "0.002250")


async def test_an_unknown_receipt_is_404(proxy: ProxyProcess, client: Client) -> None:
    answer = await client.get(proxy, "/_proxy/requests/never-was")
    assert answer.status == 404


async def test_an_error_answer_costs_nothing_known(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client
) -> None:
    upstream.always(upstream_answers.error(400, "Bad", "bad"))
    answer = await client.send(proxy, ask())
    assert answer.headers.get("X-Proxy-Cost-USD", "0.000000") == "0.000000"


@pytest.mark.parametrize("usage", [None, "many", {"prompt_tokens": -5, "completion_tokens": 10**30}, []])
async def test_nonsense_usage_is_passed_and_gives_no_cost(
    proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client, usage: object
) -> None:
    body = upstream_answers.dump(upstream_answers.completion() | {"usage": usage})
    upstream.always(upstream_answers.reply(200, body))
    answer = await client.send(proxy, ask())
    assert (answer.status, answer.body) == (200, body)
    assert "X-Proxy-Cost-USD" not in answer.headers


async def test_embeddings_are_priced(proxy: ProxyProcess, upstream: ScriptedUpstream, client: Client) -> None:
    vector = {"object": "embedding", "index": 0, "embedding": [0.5]}
    usage = {"prompt_tokens": 1_000_000, "total_tokens": 1_000_000}
    body = {"object": "list", "data": [vector], "model": "text-embedding-3-small", "usage": usage}
    upstream.always(upstream_answers.reply(200, body))
    asked = {"model": "text-embedding-3-small", "input": "a million tokens"}
    answer = await client.send(proxy, asked, path="/v1/embeddings")
    assert answer.headers["X-Proxy-Cost-USD"] == "0.020000"


async def test_prices_can_be_overridden(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    prices = {"my-*": {"input": 1, "output": "2.5"}, "gpt-4o": {"input": "0.1", "output": "0.2"}}
    proxy = launch(settings(upstream.port, cost={"prices": prices}))
    upstream.always(upstream_answers.chat(model="my-model", tokens=(1000, 1000)))
    assert (await client.send(proxy, ask(model="my-model"))).headers["X-Proxy-Cost-USD"] == "0.003500"
    upstream.always(upstream_answers.chat(model="gpt-4o", tokens=(1000, 1000)))
    assert (await client.send(proxy, ask())).headers["X-Proxy-Cost-USD"] == "0.000300"


async def test_server_timing_has_the_three_parts(proxy: ProxyProcess, client: Client) -> None:
    timing = (await client.send(proxy, ask())).headers["Server-Timing"]
    parts = dict(part.strip().split(";dur=") for part in timing.split(","))
    assert set(parts) >= {"queue", "upstream", "proxy"}
    assert all(float(value) >= 0 for value in parts.values())
