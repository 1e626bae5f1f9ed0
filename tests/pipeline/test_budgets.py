"""Budgets in the pipeline: what is reserved, what counts, and what is still served (docs/costs-and-budgets.md)."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from proxy.accounting.budgets.account import Account
from proxy.config.limits import Limits
from proxy.config.settings import (
    BudgetSettings,
    CacheSettings,
    ClientKeySettings,
    CostSettings,
    RetrySettings,
    ServerSettings,
    Settings,
    TtlSettings,
)
from proxy.protocol.options import Options
from proxy.protocol.request import Client
from proxy.services import build_services
from proxy.system.clock import Clock
from proxy.upstream.retry.outcome import TransportFailure
from tests.pipeline.clock import START, WALL, settled, virtual_time
from tests.pipeline.fixture import PipelineFixture, Result, ask, pool, settings
from tests.pipeline.script import (
    Fails,
    Move,
    Responds,
    ScriptedTransport,
    completion,
    error,
    events,
    says,
    streams,
    usage,
)

D = Decimal
DAY = 86400.0
TODAY = WALL // DAY * DAY
COST = D("0.00225")
"""Of the scripted answer: 100 tokens in, 200 out, gpt-4o."""

SMALL: dict[str, Any] = {"max_tokens": 200}
EMBEDDINGS = "/v1/embeddings"
ONCE = RetrySettings(max_retries=0, jitter=0.0)
ANNA, OTTO = Client("anna", "one scope"), Client("otto", "one scope")


def budget(
    day: str | None = "0.0045", month: str | None = None, on_exceeded: str = "refuse", **sections: Any
) -> Settings:
    limits = [D(amount) if amount is not None else None for amount in (day, month)]
    return settings(cost=CostSettings(budget=BudgetSettings(limits[0], limits[1], on_exceeded)), retry=ONCE, **sections)


def clients(**limits: str) -> ServerSettings:
    return ServerSettings(
        client_keys=tuple(ClientKeySettings(name, b"", usd_per_day=D(each)) for name, each in limits.items())
    )


def endless(**more: Any) -> ScriptedTransport:
    return ScriptedTransport(otherwise=lambda sent: says(**more))


def account(pipeline: PipelineFixture, name: str = "") -> Account:
    (found,) = [one for one in pipeline.services.budgets.accounts if one.name == name]
    return found


def spent(pipeline: PipelineFixture, name: str = "", kind: str = "day") -> Decimal:
    (pot,) = [pot for pot in account(pipeline, name).at(pipeline.clock.wall()) if pot.kind == kind]
    return pot.spent


def over(pipeline: PipelineFixture, model: str = "gpt-4o") -> None:
    """Nothing is held any more, of anything."""
    pipeline.assert_nothing_leaked(model)
    assert {one.held for one in pipeline.services.budgets.accounts} == {D(0)}


@virtual_time
async def test_beyond_the_daily_budget_only_hits_are_served_until_midnight() -> None:
    pipeline = PipelineFixture(config=budget("0.0045"), transport=endless())
    assert [(await pipeline.ask(ask(text, **SMALL))).status for text in "ab"] == [200, 200]
    told = await pipeline.ask(ask("c", **SMALL))
    assert (told.status, told.refused, told.attempts) == (429, "budget_exceeded", 0)
    assert told.refusal is not None
    assert told.refusal.should_retry is False
    assert told.refusal.retry_after == TODAY + DAY - pipeline.clock.wall()
    assert "0.004500 of 0.004500 USD" in told.refusal.message
    assert pipeline.receipt.error == "budget_exceeded"
    assert (await pipeline.ask(ask("a", **SMALL))).cache == "hit"
    assert len(pipeline.transport.sent) == 2
    await pipeline.clock.sleep(told.refusal.retry_after)
    assert (await pipeline.ask(ask("c", **SMALL))).status == 200
    assert spent(pipeline) == COST
    over(pipeline)


@virtual_time
async def test_a_monthly_budget_lasts_until_the_next_month() -> None:
    pipeline = PipelineFixture(config=budget(None, "0.0045"), transport=endless())
    for text in "ab":
        await pipeline.ask(ask(text, **SMALL))
    await pipeline.clock.sleep(DAY)
    told = await pipeline.ask(ask("c", **SMALL))
    assert told.refusal is not None
    assert told.refusal.retry_after is not None
    assert told.refusal.retry_after > 2 * DAY
    await pipeline.clock.sleep(told.refusal.retry_after)
    assert (await pipeline.ask(ask("c", **SMALL))).status == 200


@virtual_time
async def test_requests_in_flight_count_with_their_estimates() -> None:
    """gpt-4o: 10 USD per million tokens of output, so each may cost 0.01 and a little."""
    pipeline = PipelineFixture(config=budget("0.035"), transport=endless(wait=5.0))
    told = await asyncio.gather(*[pipeline.ask(ask(str(n), max_tokens=1000)) for n in range(10)])
    assert sorted(one.status for one in told) == [200] * 3 + [429] * 7
    refusals = [one.refusal for one in told if one.refusal is not None]
    assert {one.retry_after for one in refusals} == {1.0}  # it is over soon
    assert spent(pipeline) == 3 * COST
    over(pipeline)


@virtual_time
async def test_a_coalesced_request_costs_nothing() -> None:
    pipeline = PipelineFixture(config=budget("0.0025"), transport=endless(wait=5.0))
    told = await asyncio.gather(*[pipeline.ask(ask(**SMALL)) for _ in range(5)])
    assert [one.status for one in told] == [200] * 5
    assert len(pipeline.transport.sent) == 1
    assert spent(pipeline) == COST
    over(pipeline)


@virtual_time
async def test_each_client_has_its_own_budget() -> None:
    """Not even where they share the cache and ask the same at the same time."""
    config = settings(server=clients(anna="0.001", otto="1"), cache=CacheSettings(shared=True), retry=ONCE)
    pipeline = PipelineFixture(config=config, transport=endless(wait=1.0))
    told = await asyncio.gather(*[pipeline.ask(ask(**SMALL), client=one) for one in (ANNA, OTTO)])
    assert [one.refused for one in told] == ["budget_exceeded", ""]
    assert (spent(pipeline, "anna"), spent(pipeline, "otto")) == (D(0), COST)
    assert (await pipeline.ask(ask(**SMALL), client=ANNA)).cache == "hit"
    told_otto = await pipeline.ask(ask("b", **SMALL), client=OTTO)
    assert told_otto.headers["X-Proxy-Client-Limit"] == "usd_per_day=0.004500/1.000000"
    assert (await pipeline.ask(ask("c", **SMALL), client=Client("lone"))).status == 200
    over(pipeline)


@virtual_time
async def test_the_client_limit_error_has_every_detail() -> None:
    key = ClientKeySettings("anna", b"", limits=Limits(rpm=9), usd_per_day=D("0.003"))
    pipeline = PipelineFixture(config=settings(server=ServerSettings(client_keys=(key,))), transport=endless())
    told = await pipeline.ask(ask(**SMALL), client=ANNA)
    assert told.headers["X-Proxy-Client-Limit"] == "rpm=1/9, usd_per_day=0.002250/0.003000"
    refused = await pipeline.ask(ask("b", **SMALL), client=ANNA)
    assert refused.refused == "budget_exceeded"
    assert refused.headers["X-Proxy-Client-Limit"] == "rpm=1/9, usd_per_day=0.002250/0.003000"
    over(pipeline)


@virtual_time
async def test_a_client_beyond_another_limit_reserves_no_budget() -> None:
    key = ClientKeySettings("anna", b"", limits=Limits(rpm=1), usd_per_day=D(1))
    pipeline = PipelineFixture(config=settings(server=ServerSettings(client_keys=(key,))), transport=endless())
    told = [await pipeline.ask(ask(text, **SMALL), client=ANNA) for text in "ab"]
    assert [one.refused for one in told] == ["", "client_limit"]
    assert spent(pipeline, "anna") == COST
    over(pipeline)


CUT = TransportFailure("invalid", "cut")

ENDS: dict[str, tuple[tuple[Move, ...], dict[str, Any], str]] = {
    # what happens, and how the request is made -> what counts: cost, estimate, nothing or what the receipt says
    "a whole answer": ((says(),), {}, "cost"),
    "a whole stream": ((streams(),), {"stream": True}, "cost"),
    "a stream without usage": ((streams(events()),), {"stream": True}, "receipt"),
    "a stream that is cut": ((streams([*events("x")[:-2], CUT]),), {"stream": True}, "receipt"),
    "an answer that is cut": ((Responds(200, body=(b'{"a": ', CUT)),), {}, "estimate"),
    "broken JSON": ((Responds(200, body=(b'{"a": ',)),), {}, "estimate"),
    "without usage": ((says({"choices": []}),), {}, "estimate"),
    "an error": ((error(400),), {}, "nothing"),
    "a 500": ((error(500),), {}, "nothing"),
    "a refused connection": ((Fails("unreached"),), {}, "nothing"),
    "a connection that dies": ((Fails("ambiguous"),), {}, "nothing"),
    "no answer in time": ((Fails("hang"),), {}, "estimate"),
    "nothing but connecting": ((Fails("hang connecting"),), {}, "nothing"),
}


@pytest.mark.parametrize("name", ENDS)
@virtual_time
async def test_every_outcome_settles_its_reservation(name: str) -> None:
    moves, fields, counts = ENDS[name]
    pipeline = PipelineFixture(*moves, config=budget("1"))
    await pipeline.ask(ask(**SMALL, **fields))
    (pot,) = account(pipeline).at(pipeline.clock.wall())
    if counts == "estimate":
        assert pot.settled == 0
        assert D("0.002") < pot.assumed < D("0.0021")  # 200 tokens out, and the prompt
    else:
        costs = {"cost": COST, "nothing": D(0), "receipt": D(pipeline.receipt.cost_usd or 0)}
        assert (pot.settled, pot.assumed) == (costs[counts], D(0))
        assert pot.settled or counts == "nothing"
    assert pot.unknown == (counts == "estimate")
    over(pipeline)


@pytest.mark.parametrize("turns", range(0, 40))
@pytest.mark.parametrize("stream", [False, True])
@virtual_time
async def test_a_client_that_leaves_releases_its_reservation(turns: int, stream: bool) -> None:
    slow = [step for part in events(usage=True) for step in (1.0, part)]
    move = streams(slow, connect=1.0, wait=1.0) if stream else says(connect=1.0, wait=1.0)
    pipeline = PipelineFixture(move, config=budget("1"))
    task: asyncio.Task[Result] = asyncio.create_task(pipeline.ask(ask(stream=stream, **SMALL)))
    pipeline.loop.at_step(turns, task.cancel)
    await asyncio.wait([task])
    await settled()
    assert len(pipeline.receipts) <= 1
    over(pipeline)


@virtual_time
async def test_a_fallback_models_response_counts_at_its_own_price() -> None:
    config = budget("1")
    config = replace(config, retry=RetrySettings(max_retries=2, jitter=0.0, fallbacks={"gpt-4o": ("gpt-4o-mini",)}))
    pipeline = PipelineFixture(*[error(500)] * 3, says(completion(model="gpt-4o-mini")), config=config)
    assert (await pipeline.ask(ask(**SMALL))).status == 200
    assert (spent(pipeline), account(pipeline).held) == (D("0.000135"), D(0))


@virtual_time
async def test_a_discarded_response_counts() -> None:
    """Its answer is not what was asked for, but it was bought."""
    document = {"object": "list", "data": [], "model": "text-embedding-3-small", "usage": usage(1000, 0)}
    pipeline = PipelineFixture(says(document), config=budget("1"))
    question = {"model": "text-embedding-3-small", "input": [f"text {n}" for n in range(4000)]}
    assert (await pipeline.ask(question, target=EMBEDDINGS)).refused == "upstream_invalid_response"
    assert spent(pipeline) == D("0.00002")
    over(pipeline, "text-embedding-3-small")


@virtual_time
async def test_each_part_of_a_batch_counts() -> None:
    """4,000 items are two calls."""

    def embed(sent: Any) -> Responds:
        count = len(sent.json()["input"])
        rows = [{"object": "embedding", "index": index, "embedding": [0.5]} for index in range(count)]
        return says({"object": "list", "data": rows, "model": "text-embedding-3-small", "usage": usage(count, 0)})

    pipeline = PipelineFixture(config=budget("1"), transport=ScriptedTransport(otherwise=embed))
    question = {"model": "text-embedding-3-small", "input": [f"text {n}" for n in range(4000)]}
    told = await pipeline.ask(question, target=EMBEDDINGS)
    assert (told.status, len(pipeline.transport.sent)) == (200, 2)
    assert spent(pipeline) == D(4000) * D("0.00000002") == D(str(told.cost))
    over(pipeline, "text-embedding-3-small")


@virtual_time
async def test_an_unpriced_request_reserves_nothing_but_obeys_the_budget() -> None:
    pipeline = PipelineFixture(
        config=budget("0.0022"), transport=ScriptedTransport(otherwise=lambda sent: says(completion(model="x-1")))
    )
    unpriced = ask(max_tokens=1000) | {"model": "x-1"}
    assert (await pipeline.ask(unpriced)).status == 200
    report = pipeline.services.budgets.report()["proxy"]["day"]
    assert (report["unknown"], report["spent_usd"]) == (1, "0.000000")
    pipeline.transport.otherwise = lambda sent: says()
    assert (await pipeline.ask(ask("a", max_tokens=100))).status == 200
    assert (await pipeline.ask(unpriced | ask("b"))).refused == "budget_exceeded"
    assert (await pipeline.ask(unpriced)).cache == "hit"


MODERATION = {"model": "omni-moderation-latest", "input": "x"}
MODERATED = {"id": "m", "model": "omni-moderation-latest", "results": [{"flagged": False}]}


@pytest.mark.parametrize(("on_exceeded", "status"), [("refuse", 200), ("cache_only", 429)])
@virtual_time
async def test_free_requests_pass_beyond_the_budget_unless_cache_only(on_exceeded: str, status: int) -> None:
    pipeline = PipelineFixture(says(), says(MODERATED), config=budget("0.0022", on_exceeded=on_exceeded))
    assert (await pipeline.ask(ask(max_tokens=10))).status == 200
    told = await pipeline.ask(MODERATION, target="/v1/moderations")
    assert told.status == status
    assert account(pipeline).held == 0


@pytest.mark.parametrize("on_exceeded", ["refuse", "cache_only"])
@virtual_time
async def test_cache_only_serves_stale_entries(on_exceeded: str) -> None:
    cache = CacheSettings(ttl=TtlSettings(chat=100.0), stale_if_error=5000.0)
    pipeline = PipelineFixture(config=budget("0.0025", on_exceeded=on_exceeded, cache=cache), transport=endless())
    assert (await pipeline.ask(ask(**SMALL))).status == 200
    await pipeline.clock.sleep(200.0)
    told = await pipeline.ask(ask(**SMALL))
    if on_exceeded == "refuse":
        assert told.refused == "budget_exceeded"
    else:
        assert told.hit is not None
        assert told.hit.stale == "stale-if-error: budget_exceeded"
        assert pipeline.receipt.cache == "stale"
        assert (await pipeline.ask(ask(**SMALL), Options(no_cache=True))).refused == "budget_exceeded"
        missing = await pipeline.ask(ask("other", **SMALL))
        assert missing.refusal is not None
        assert "there is none for this" in missing.refusal.message
    assert len(pipeline.transport.sent) == 1
    over(pipeline)


@virtual_time
async def test_an_exceeded_budget_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = PipelineFixture(config=budget("0.01"), transport=endless())
    with caplog.at_level(logging.WARNING, "proxy"):
        for text in "abcd":
            await pipeline.ask(ask(text, **SMALL))
    warned = [record.getMessage() for record in caplog.records if "budget" in record.getMessage()]
    assert warned == ["the budget of this proxy for this day (UTC): 0.009000 of 0.010000 USD are spent"]


@virtual_time
async def test_spending_before_the_start_and_by_other_processes_counts() -> None:
    """The ledger of another process: it is read at the start, and again."""
    pipeline = PipelineFixture(config=budget("0.01", "1"), transport=endless())
    ledger = {"before": D("0.005")}
    asked: list[tuple[float, str | None]] = []

    async def told(since: float, client: str | None) -> Decimal:
        asked.append((since, client))
        return sum(ledger.values(), D(0))

    await pipeline.services.budgets.open(told)
    assert asked[0] == (TODAY, None)
    assert spent(pipeline) == D("0.005")
    await pipeline.ask(ask("a", **SMALL))
    assert spent(pipeline) == D("0.005") + COST
    ledger["ours"] = COST
    await pipeline.clock.sleep(4.0)
    assert spent(pipeline) == spent(pipeline, kind="month") == D("0.005") + COST
    ledger["another"] = D("0.002")
    await pipeline.clock.sleep(4.0)
    assert (await pipeline.ask(ask("b", **SMALL))).refused == "budget_exceeded"
    ledger.clear()
    await pipeline.clock.sleep(DAY)
    assert spent(pipeline) == 0
    assert (await pipeline.ask(ask("b", **SMALL))).status == 200
    await pipeline.services.budgets.close()


@virtual_time
async def test_a_reload_keeps_spending_and_reservations() -> None:
    pipeline = PipelineFixture(config=budget("0.1"), transport=endless(wait=5.0))
    task = asyncio.create_task(pipeline.ask(ask(**SMALL)))
    await pipeline.clock.sleep(1.0)
    services = build_services(budget("0.003"), pipeline.clock, pipeline.services)
    assert services.budgets is pipeline.services.budgets
    pipeline.rebuild(services)
    assert (await pipeline.ask(ask("b", **SMALL))).refused == "budget_exceeded"
    assert (await task).status == 200
    assert spent(pipeline) == COST
    over(pipeline)
    assert build_services(settings(), Clock(), services).budgets.accounts == ()
    assert pipeline.loop.time() > START


@virtual_time
async def test_free_requests_cost_nothing() -> None:
    """What was refused, found or never asked has no cost."""
    pipeline = PipelineFixture(config=budget("0"))
    assert (await pipeline.ask(ask(**SMALL))).refused == "budget_exceeded"
    assert (await pipeline.ask(ask(**SMALL), Options(only_if_cached=True))).refused == "not_cached"
    assert pipeline.transport.sent == []
    over(pipeline)


@virtual_time
async def test_the_highest_price_of_the_pool_is_reserved() -> None:
    """The dearest of the upstreams that may serve it is what a request is held to cost."""
    dear = pool("k2", name="dear", prices={"gpt-4o": {"input": D(1000), "output": D(1000)}}, priority=1)
    pipeline = PipelineFixture(config=replace(budget("0.05"), upstreams=(pool("k1"), dear)), transport=endless())
    assert (await pipeline.ask(ask(**SMALL))).refused == "budget_exceeded"
    over(pipeline)
