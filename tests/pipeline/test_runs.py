"""Named runs: ten responses, each replayable; what a run costs, and the most it may cost (docs/runs.md)."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import Any

import pytest

import proxy.accounting.runs.run
from proxy.accounting.receipt import Receipt
from proxy.accounting.runs.run import Run, RunShare
from proxy.config.settings import CacheSettings
from proxy.coordination import Coordination
from proxy.protocol.headers import Raw
from proxy.protocol.options import Options
from proxy.protocol.request import Client
from tests.pipeline.clock import settled, virtual_time
from tests.pipeline.fixture import PipelineFixture, Result, ask, settings
from tests.pipeline.script import Fails, Responds, completion, error, events, says, streams

RETRY: tuple[Raw, ...] = ((b"X-Stainless-Retry-Count", b"1"),)
COST = "X-Proxy-Run-Cost-USD"
SAVED = "X-Proxy-Run-Saved-USD"
NONE = Decimal(0)


def run(name: str = "one", max_cost: str | None = None, **fields: Any) -> Options:
    return Options(run=name, max_cost=Decimal(max_cost) if max_cost is not None else None, **fields)


def answers(count: int) -> list[Responds]:
    return [says(completion(f"answer {number}")) for number in range(count)]


def text(result: Result) -> str:
    return str(result.json()["choices"][0]["message"]["content"])


def money(result: Result) -> tuple[str, str]:
    """(cost, saved) so far, as any answer says it."""
    if result.refusal is not None:
        headers = dict(result.refusal.headers)
    elif result.hit is not None:
        headers = dict(result.hit.headers)
    else:
        headers = result.headers
    return headers[COST], headers[SAVED]


async def report(pipeline: PipelineFixture, name: str = "one") -> dict[str, Any]:
    found = await pipeline.services.runs.report(name)
    assert found is not None
    return found


@virtual_time
async def test_ten_samples_of_a_run_are_hits_in_the_same_order_next_time() -> None:
    pipeline = PipelineFixture(*answers(11))
    first = [await pipeline.ask(ask(temperature=1), run("one")) for _ in range(10)]
    assert [text(result) for result in first] == [f"answer {number}" for number in range(10)]
    second = [await pipeline.ask(ask(temperature=1), run("two")) for _ in range(10)]
    assert [result.body for result in second] == [result.body for result in first]
    assert {result.cache for result in second} == {"hit"}
    assert [money(result) for result in (first[0], first[9], second[0], second[9])] == [
        ("0.002250", "0.000000"),
        ("0.022500", "0.000000"),
        ("0.000000", "0.002250"),
        ("0.000000", "0.022500"),
    ]
    assert text(await pipeline.ask(ask(temperature=1), run("two"))) == "answer 10"
    assert len(pipeline.transport.sent) == 11
    assert pipeline.receipt.run == "two"
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_ten_concurrent_requests_of_a_run_get_ten_responses() -> None:
    pipeline = PipelineFixture(*answers(10))
    result = await asyncio.gather(*[pipeline.ask(None, run()) for _ in range(10)])
    assert {text(one) for one in result} == {f"answer {number}" for number in range(10)}
    again = await asyncio.gather(*[pipeline.ask(None, run("two")) for _ in range(10)])
    assert {text(one) for one in again} == {text(one) for one in result}
    assert (await report(pipeline))["cost_usd"] == "0.022500"


@virtual_time
async def test_number_0_is_the_entry_of_a_request_without_a_run() -> None:
    pipeline = PipelineFixture(*answers(3))
    assert text(await pipeline.ask()) == "answer 0"
    assert [text(await pipeline.ask(None, run())) for _ in range(2)] == ["answer 0", "answer 1"]
    assert text(await pipeline.ask(None, Options(sample="0"))) == "answer 0"
    assert text(await pipeline.ask(None, Options(sample="1"))) == "answer 1"


@virtual_time
async def test_a_request_can_set_its_sample_number() -> None:
    pipeline = PipelineFixture(*answers(3))
    result = [await pipeline.ask(None, run(sample=sample)) for sample in ("5", "5", "0")]
    assert [text(one) for one in result] == ["answer 0", "answer 0", "answer 1"]
    assert text(await pipeline.ask(None, run())) == "answer 1"  # number 0: the others had none
    found = await report(pipeline)
    assert (found["requests"], found["hits"], found["misses"], found["distinct_keys"]) == (4, 2, 2, 1)


@virtual_time
async def test_each_request_body_has_its_own_numbers() -> None:
    pipeline = PipelineFixture(*answers(4))
    result = [await pipeline.ask(ask(question), run()) for question in "abab"]
    assert [text(one) for one in result] == [f"answer {number}" for number in range(4)]
    assert text(await pipeline.ask(ask("b"), run("two"))) == "answer 1"


@virtual_time
async def test_runs_of_different_clients_are_separate() -> None:
    pipeline = PipelineFixture(*answers(4))
    anna, otto = Client("anna", "same scope"), Client("otto", "same scope")
    for client in (anna, anna, otto):
        await pipeline.ask(None, run(), client=client)
    assert len(pipeline.transport.sent) == 2  # they share entries here, but otto starts at 0
    guests = [Client("", f"credential {digest}") for digest in "ab"]
    for guest in guests:
        await pipeline.ask(None, run("guests"), client=guest)
    found = await report(pipeline)
    assert [(one["client"], one["requests"], one["hits"]) for one in found["clients"]] == [
        ("anna", 2, 0),
        ("otto", 1, 1),
    ]
    assert (found["requests"], found["cost_usd"], found["saved_usd"]) == (3, "0.004500", "0.002250")
    assert len((await report(pipeline, "guests"))["clients"]) == 2


@virtual_time
async def test_a_retry_of_the_sdk_keeps_its_number() -> None:
    pipeline = PipelineFixture(error(500), *answers(3))
    once = run(max_retries=0)
    assert (await pipeline.ask(None, once)).status == 500
    assert text(await pipeline.ask(None, once, headers=RETRY)) == "answer 0"
    assert text(await pipeline.ask(None, once)) == "answer 1"
    assert [text(await pipeline.ask(None, run("two"))) for _ in range(2)] == ["answer 0", "answer 1"]
    found = await report(pipeline)
    assert (found["requests"], found["errors"], found["misses"]) == (3, 1, 2)


@virtual_time
async def test_a_retry_after_a_client_timeout_keeps_its_number() -> None:
    pipeline = PipelineFixture(Fails("hang"), *answers(2))
    task = asyncio.create_task(pipeline.ask(None, run()))
    await settled()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert text(await pipeline.ask(None, run(), headers=RETRY)) == "answer 0"
    assert text(await pipeline.ask(None, run("two"))) == "answer 0"
    found = await report(pipeline)
    assert (found["errors"], found["cost_usd"]) == (1, "0.002250")


@pytest.mark.parametrize("count", [b"0", b"", b"x", b"-1"])
@virtual_time
async def test_a_request_that_is_not_a_retry_gets_a_new_number(count: bytes) -> None:
    pipeline = PipelineFixture(*answers(2))
    headers = ((b"x-stainless-retry-count", count),)
    result = [await pipeline.ask(None, run(), headers=headers) for _ in range(2)]
    assert [text(one) for one in result] == ["answer 0", "answer 1"]


@virtual_time
async def test_streams_are_numbered_and_counted_at_their_end() -> None:
    spoken = [events(str(number), usage=True) for number in range(2)]
    pipeline = PipelineFixture(*[streams([first, 1.0, *rest]) for first, *rest in spoken])
    request = ask(stream=True)
    result = [await pipeline.ask(request, run()) for _ in range(2)]
    assert [money(one)[0] for one in result] == ["0.000000", "0.002250"]  # at its start its own cost is not known yet
    assert (await report(pipeline))["cost_usd"] == "0.004500"
    again = [await pipeline.ask(request, run("two")) for _ in range(2)]
    assert [one.body for one in again] == [one.body for one in result]


@virtual_time
async def test_a_retry_after_a_broken_stream_keeps_its_number() -> None:
    pipeline = PipelineFixture(streams(events("x")[:-2]), *answers(1))
    assert (await pipeline.ask(ask(stream=True), run())).broken
    await pipeline.ask(ask(), run(), headers=RETRY)
    again = await pipeline.ask(ask(), run("two"))
    assert again.cache == "hit"
    assert len(pipeline.transport.sent) == 2


@pytest.mark.parametrize("config", [CacheSettings(backend="off"), CacheSettings(when="never")])
@virtual_time
async def test_without_a_cache_requests_are_counted_and_not_numbered(config: CacheSettings) -> None:
    pipeline = PipelineFixture(*answers(2), config=settings(cache=config))
    for _ in range(2):
        result = await pipeline.ask(None, run())
    assert money(result) == ("0.004500", "0.000000")
    assert (await report(pipeline))["distinct_keys"] == 0


@virtual_time
async def test_a_retry_after_a_refusal_keeps_its_number() -> None:
    pipeline = PipelineFixture(*answers(1))
    assert (await pipeline.ask(None, run(only_if_cached=True))).refused == "not_cached"
    result = await pipeline.ask(None, run(), headers=RETRY)
    assert (text(result), money(result)) == ("answer 0", ("0.002250", "0.000000"))
    assert (await report(pipeline))["errors"] == 1
    assert (await pipeline.ask(None, run("two"))).cache == "hit"


# What it may cost.


@virtual_time
async def test_beyond_max_cost_only_hits_are_served() -> None:
    pipeline = PipelineFixture(*answers(4))
    capped = run(max_cost="0.0045")
    assert [(await pipeline.ask(ask("a"), capped)).status for _ in range(2)] == [200, 200]
    result = await pipeline.ask(ask("b"), capped)
    assert (result.status, result.refused) == (429, "budget_exceeded")
    assert result.refusal is not None
    assert (result.refusal.should_retry, result.refusal.retry_after, result.refusal.param) == (False, None, "max-cost")
    assert "0.004500" in result.refusal.message
    assert money(result) == ("0.004500", "0.000000")
    assert len(pipeline.transport.sent) == 2
    await pipeline.ask(ask("c"))
    hit = await pipeline.ask(ask("c"), capped)
    assert (hit.cache, money(hit)) == ("hit", ("0.004500", "0.002250"))
    assert (await pipeline.ask(ask("b"), run(max_cost="1"))).status != 429  # it may be raised
    assert (await report(pipeline))["max_cost"] == "1.000000"
    pipeline.assert_nothing_leaked()


@virtual_time
async def test_requests_in_flight_count_with_their_estimates() -> None:
    """gpt-4o: 10 USD per million tokens of output, so each may cost 0.01 and a little."""
    pipeline = PipelineFixture(*answers(10))
    capped = run(max_cost="0.035")
    result = await asyncio.gather(*[pipeline.ask(ask(max_tokens=1000), capped) for _ in range(10)])
    assert sorted(one.status for one in result) == [200] * 3 + [429] * 7
    after = await pipeline.ask(ask(max_tokens=1000), capped)  # settled by then: 3 × 0.00225
    assert (after.status, money(after)[0]) == (200, "0.009000")
    assert pipeline.services.runs._runs.named("one")[0].held == 0


@virtual_time
async def test_a_max_cost_of_0_allows_only_hits() -> None:
    pipeline = PipelineFixture(*answers(1))
    assert (await pipeline.ask(None, run(max_cost="0"))).refused == "budget_exceeded"
    assert pipeline.transport.sent == []


@virtual_time
async def test_without_max_tokens_the_mean_cost_is_the_estimate() -> None:
    pipeline = PipelineFixture(*answers(3))
    capped = run(max_cost="0.0044")
    assert (await pipeline.ask(None, capped)).status == 200
    assert (await pipeline.ask(None, capped)).status == 200  # 0.002 expected: 200 tokens
    assert (await pipeline.ask(None, capped)).status == 429


@virtual_time
async def test_a_response_without_a_price_is_reported() -> None:
    pipeline = PipelineFixture(*answers(1))
    result = await pipeline.ask(ask(model="nobody-knows"), run(max_cost="1"))
    assert result.status == 200  # its answer names gpt-4o, whose price holds
    pipeline = PipelineFixture(says(completion(model="nobody-knows")))
    result = await pipeline.ask(ask(model="nobody-knows"), run(max_cost="1"))
    assert (result.status, money(result)) == (200, ("0.000000", "0.000000"))
    assert (await report(pipeline))["unpriced"] == 1


@virtual_time
async def test_a_sent_request_without_a_response_counts_against_max_cost() -> None:
    pipeline = PipelineFixture(Fails("hang"), *answers(2))
    capped = run(max_cost="0.025")
    task = asyncio.create_task(pipeline.ask(ask(max_tokens=2000), capped))
    await settled()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    result = await pipeline.ask(ask(max_tokens=2000), capped)
    assert (result.refused, money(result)[0]) == ("budget_exceeded", "0.000000")
    assert (await pipeline.ask(ask(max_tokens=100), capped)).status == 200


@virtual_time
async def test_max_cost_needs_a_run() -> None:
    pipeline = PipelineFixture()
    result = await pipeline.ask(None, Options(max_cost=Decimal(1)))
    assert (result.status, result.refused) == (400, "invalid_option")
    assert await pipeline.services.runs.report("one") is None


@virtual_time
async def test_no_reservation_remains_at_the_end() -> None:
    pipeline = PipelineFixture(*answers(1), error(400), error(500))
    for _ in range(3):
        await pipeline.ask(ask(max_tokens=10), run(max_cost="9", max_retries=0))
    mine = pipeline.services.runs._runs.named("one")[0]
    assert (mine.held, mine.sums.assumed) == (Decimal(0), Decimal(0))
    assert not pipeline.services.runs._tickets


@virtual_time
async def test_a_request_whose_client_left_is_counted_when_it_ends() -> None:
    """Its call may go on for others: its receipt then comes late, and its number is free for a retry at once."""
    pipeline = PipelineFixture(*answers(1))
    call, book = pipeline.request(ask(max_tokens=1000), run()), pipeline.services.runs
    mine = book.enter(call)
    assert mine is not None
    await book.sample(call, "0" * 64)
    await book.admit(call, Decimal("0.01"))
    book.abandoned(call, gone=True)
    assert mine.number("0" * 64, True) == 0
    assert mine.held > 0
    receipt = Receipt(call.id, "", "chat", "gpt-4o", 499, "miss", 0.0, attempts=1, cost_usd="0.5", error="client_gone")
    book.finished(receipt)
    assert (mine.held, mine.cost, mine.sums.errors) == (Decimal(0), Decimal("0.5"), 1)
    book.finished(receipt)
    book.abandoned(call, gone=True)
    assert mine.sums.requests == 1


@virtual_time
async def _too_many_different_requests() -> None:
    pipeline = PipelineFixture(*answers(3))
    for question in ("a", "b", "c"):
        await pipeline.ask(ask(question), run())
    assert (await report(pipeline))["distinct_keys"] == 1


def test_too_many_different_requests_are_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(proxy.accounting.runs.run, "MAX_KEYS", 1)
    _too_many_different_requests()
    assert len([record for record in caplog.records if "too many different requests" in record.getMessage()]) == 1


class Alone:
    """A Redis that never answers."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def number(self, run: Run, key: str, retry: bool) -> int | None:
        return None

    async def ended(self, run: Run, key: str, number: int, delivered: bool) -> None: ...

    async def share(
        self, run: Run, share: RunShare, before: Decimal = NONE, limit: Decimal | None = None
    ) -> bool | None:
        return None

    async def read(self, name: str) -> None:
        return None


@virtual_time
async def test_without_redis_a_process_counts_alone() -> None:
    pipeline = PipelineFixture(*answers(3), coordination=Coordination(runs=Alone()))
    await pipeline.services.runs.open()
    result = [await pipeline.ask(ask(max_tokens=1000), run(max_cost="0.0124")) for _ in range(3)]
    assert [one.status for one in result] == [200, 200, 429]  # 0.00225 spent each, and 0.01 to be reserved
    found = await report(pipeline)
    assert (found["requests"], found["distinct_keys"], found["cost_usd"]) == (3, 1, "0.004500")
    await pipeline.services.runs.close()
