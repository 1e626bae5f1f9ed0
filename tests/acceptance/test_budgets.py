"""Budgets against the real process: refused with the time, remembered by the ledger, and one for all who share it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import upstream_answers
from tests.cache.stores.kit import Valkey, valkey
from tests.client import Client, Reply, ask
from tests.launch import Config, Launch, ProxyProcess, merge, settings
from tests.ledger import Request
from tests.scripted_upstream import Answer, ScriptedUpstream

SMALL = {"max_tokens": 10}
KEYS = [
    {"name": "anna", "key": "a-long-key-of-anna", "limits": {"usd_per_day": 0.001}},
    {"name": "otto", "key": "a-long-key-of-otto"},
]
ANNA, OTTO = ({"Authorization": f"Bearer a-long-key-of-{name}"} for name in ("anna", "otto"))


@pytest.fixture
def server() -> Iterator[Valkey]:
    with valkey() as running:
        yield running


@pytest.fixture(autouse=True)
def priced(upstream: ScriptedUpstream) -> None:
    """Every answer costs 0.00225."""

    def answer(_: Request) -> Answer:
        return [upstream_answers.chat(f"answer {upstream.count}")]

    upstream.script = answer


@pytest.fixture(autouse=True)
def not_at_midnight() -> None:
    """A day that ends within the test is another test."""
    if (left := 86400 - time.time() % 86400) < 30:
        time.sleep(left)


def with_budget(port: int, day: float | str, ledger: Path | None = None, **more: Any) -> Config:
    path = {"path": str(ledger)} if ledger is not None else {"enabled": False}
    return merge(settings(port, cost={"budget": {"usd_per_day": day}}, ledger=path), more)


async def status(client: Client, proxy: ProxyProcess) -> Any:
    reply = await client.get(proxy, "/_proxy/status")
    assert reply.status == 200
    return reply.json()["budgets"]


async def until_refused(client: Client, proxy: ProxyProcess, word: str) -> tuple[list[Reply], Reply]:
    """(answers, the refusal that came after them)"""
    answers: list[Reply] = []
    for number in range(20):
        reply = await client.send(proxy, ask(f"{word} {number}", **SMALL))
        if reply.status != 200:
            return answers, reply
        answers.append(reply)
    raise AssertionError("never refused")


async def test_refused_with_the_time_and_remembered(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    config = with_budget(upstream.port, 0.006, tmp_path / "usage.db")
    proxy = launch(config)
    answers, refused = await until_refused(client, proxy, "one")
    assert len(answers) == upstream.count
    spent = sum(float(answer.headers["X-Proxy-Cost-USD"]) for answer in answers)
    assert (refused.status, refused.error, refused.headers["X-Should-Retry"]) == (429, "budget_exceeded", "false")
    left = 86400 - time.time() % 86400
    assert left - 5 < float(refused.headers["Retry-After"]) < left + 5
    assert "T00:00:00Z" in refused.json()["error"]["message"]
    assert (await client.send(proxy, ask("one 0", **SMALL))).cache == "hit"
    day = (await status(client, proxy))["proxy"]["day"]
    assert float(day["spent_usd"]) == pytest.approx(spent)
    assert (day["limit_usd"], day["held_usd"], day["warned"]) == ("0.006000", "0.000000", True)
    metrics = (await client.get(proxy, "/metrics")).body.decode()
    assert 'openai_proxy_budget_warning{client="",period="day"} 1.0' in metrics
    assert proxy.stderr_so_far().count("the budget of this proxy for this day (UTC)") == 1
    assert (await client.send(proxy, {}, path="/_proxy/limits/reset")).status == 200
    assert (await client.send(proxy, ask("two", **SMALL))).status == 429
    assert (await client.send(proxy, {"prompt": "x"}, path="/v1/images/generations")).error == "budget_exceeded"
    proxy.terminate()
    assert proxy.wait() == 0
    again = launch(config)
    refused = await client.send(again, ask("three", **SMALL))
    assert (refused.status, refused.error) == (429, "budget_exceeded")
    assert float((await status(client, again))["proxy"]["day"]["spent_usd"]) == pytest.approx(spent)
    assert upstream.count == len(answers)


async def test_a_client_has_its_own_budget(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    proxy = launch(settings(upstream.port, server={"client_keys": KEYS}, ledger={"path": str(tmp_path / "u.db")}))
    first = await client.send(proxy, ask("1", **SMALL), ANNA)
    assert first.status == 200
    assert first.headers["X-Proxy-Client-Limit"].startswith("usd_per_day=0.00")
    refused = await client.send(proxy, ask("2", **SMALL), ANNA)
    assert (refused.status, refused.error) == (429, "budget_exceeded")
    assert "client anna" in refused.json()["error"]["message"]
    assert (await client.send(proxy, ask("1", **SMALL), ANNA)).cache == "hit"
    assert (await client.send(proxy, ask("2", **SMALL), OTTO)).status == 200


async def test_two_processes_on_one_ledger(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    """Each reads every few seconds what the other has written."""
    config = with_budget(upstream.port, 0.006, tmp_path / "usage.db")
    one, other = launch(config), launch(config)
    answers, _ = await until_refused(client, one, "one")
    spent = float((await status(client, one))["proxy"]["day"]["spent_usd"])
    for _ in range(120):
        if float((await status(client, other))["proxy"]["day"]["spent_usd"]) >= spent:
            break
        await asyncio.sleep(0.25)
    assert (await client.send(other, ask("other", **SMALL))).error == "budget_exceeded"
    assert upstream.count == len(answers)


async def test_two_processes_over_redis(
    launch: Launch, upstream: ScriptedUpstream, client: Client, server: Valkey
) -> None:
    shared: dict[str, Any] = {"throttle": {"backend": "redis"}, "redis": {"url": server.url}}
    proxies = [launch(with_budget(upstream.port, 0.02, **shared)) for _ in range(2)]
    answers: list[Reply] = []
    for number in range(20):  # one after the other: each knows at once what the other has spent
        answers.append(await client.send(proxies[number % 2], ask(str(number), **SMALL)))
        await asyncio.sleep(0.05)
    good = [answer for answer in answers if answer.status == 200]
    assert {answer.status for answer in answers} == {200, 429}
    assert len(good) == upstream.count
    spent = sum(float(answer.headers["X-Proxy-Cost-USD"]) for answer in good)
    assert 0.015 < spent < 0.02 + 2 * 0.00225  # estimates of ten tokens are short of the 200 that come
    await asyncio.sleep(1.5)
    result = [(await status(client, proxy))["proxy"]["day"]["spent_usd"] for proxy in proxies]
    assert result[0] == result[1]
    assert float(result[0]) == pytest.approx(spent)
    third = launch(with_budget(upstream.port, 0.02, **shared))
    assert (await client.send(third, ask("third", **SMALL))).error == "budget_exceeded"


async def test_a_budget_without_a_ledger_is_warned_of(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(with_budget(upstream.port, 1))
    assert (await client.send(proxy, ask())).status == 200
    assert "a restart forgets what was spent" in proxy.stderr_so_far()


async def test_several_workers_share_a_budget_over_their_ledger(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    """A few seconds late: by then every worker refuses, whichever takes the connection."""
    config = with_budget(upstream.port, 0.006, tmp_path / "usage.db", server={"workers": 2})
    proxy = launch(config)
    for number in range(8):
        await client.send(proxy, ask(f"one {number}", **SMALL), {"Connection": "close"})
    await asyncio.sleep(5.0)
    before = upstream.count
    later = [await client.send(proxy, ask(f"two {n}", **SMALL), {"Connection": "close"}) for n in range(8)]
    assert {answer.error for answer in later} == {"budget_exceeded"}
    assert upstream.count == before <= 8
