"""Limits hold, waiting is bounded, hits are free (docs/keys-and-limits.md)."""

from __future__ import annotations

import asyncio
from typing import Any

from tests import upstream_answers
from tests.client import Client, Reply, ask
from tests.launch import AT_ONCE, Config, Launch, secret, settings
from tests.ledger import Request
from tests.scripted_upstream import Answer, ScriptedUpstream, hold


def limited(port: int, max_wait: str = "200ms", max_queue: int = 1000, **limits: int) -> Config:
    return settings(port, throttle={"limits": {"*": limits}, "max_wait": max_wait, "max_queue": max_queue})


def assert_honest_429(answer: Reply, code: str, least: float, most: float) -> None:
    assert (answer.status, answer.error) == (429, code)
    assert least <= float(answer.headers["Retry-After"]) <= most + 1
    assert least * 1000 <= float(answer.headers["retry-after-ms"]) <= most * 1000


async def test_a_burst_is_sent_at_once_up_to_the_limit(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(limited(upstream.port, rpm=10))
    answers = await asyncio.gather(*(client.send(proxy, ask()) for _ in range(40)))
    assert upstream.count == 10
    assert sorted(a.status for a in answers) == [200] * 10 + [429] * 30
    for answer in answers:
        if answer.status == 429:
            assert_honest_429(answer, "throttled", 30, 62)
    assert max(a.seconds for a in answers) < AT_ONCE


async def test_hits_are_free(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy, question = launch(limited(upstream.port, rpm=2)), ask()
    caches = [(await client.send(proxy, question)).cache for _ in range(6)]
    assert caches == ["miss"] + ["hit"] * 5
    assert (await client.send(proxy, ask())).status == 200
    assert (await client.send(proxy, ask())).error == "throttled"
    assert (await client.send(proxy, question)).cache == "hit"  # also while nothing is left


async def test_the_share_to_use(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    config = limited(upstream.port, rpm=10)
    config["throttle"]["use"] = 0.5
    proxy = launch(config)
    await asyncio.gather(*(client.send(proxy, ask()) for _ in range(10)))
    assert upstream.count == 5


async def test_limits_are_per_model_glob(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    limits = {"gpt-4o": {"rpm": 1}, "gpt-4o-*": {"rpm": 2}}
    proxy = launch(settings(upstream.port, throttle={"limits": limits, "max_wait": "100ms"}))
    for model, allowed in (("gpt-4o", 1), ("gpt-4o-mini", 2), ("o3", 4)):
        answers = [await client.send(proxy, ask(model=model)) for _ in range(4)]
        assert [a.status for a in answers].count(200) == allowed, model


async def test_tokens_are_reserved_before_and_settled_after(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    """tpm 2000; every answer uses 300, whatever was reserved."""
    proxy = launch(limited(upstream.port, tpm=2000))
    for _ in range(3):  # 1,500 reserved each: fits only because each is settled to 300
        assert (await client.send(proxy, ask(max_tokens=1300))).status == 200, upstream
    answer = await client.send(proxy, ask(max_tokens=1300))  # 900 used
    assert_honest_429(answer, "throttled", 30, 62)
    assert (await client.send(proxy, ask(max_tokens=900))).status == 200  # and nothing was lost by the refusal


async def test_concurrent_reservations_count_each_other(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy, gate = launch(limited(upstream.port, tpm=5000)), upstream.gate()
    upstream.always(hold(gate), upstream_answers.chat())
    asking = [asyncio.create_task(client.send(proxy, ask(max_completion_tokens=900, max_tokens=1))) for _ in range(20)]
    await upstream.until(lambda: sum(task.done() for task in asking) == 15 and upstream.count == 5)
    gate.open()
    answers = await asyncio.gather(*asking)
    assert sorted(a.status for a in answers) == [200] * 5 + [429] * 15


async def test_n_multiplies_the_estimate(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(limited(upstream.port, tpm=5000))
    answer = await client.send(proxy, ask(max_tokens=1000, n=6))
    assert answer.error == "request_exceeds_limit"


async def test_a_request_larger_than_the_window_fails_at_once(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(limited(upstream.port, "60s", tpm=1000))
    answer = await client.send(proxy, ask(max_tokens=5000))
    assert (answer.status, answer.error) == (429, "request_exceeds_limit")
    assert "Retry-After" not in answer.headers
    assert "retry-after-ms" not in answer.headers
    assert answer.headers["X-Should-Retry"] == "false"
    assert answer.seconds < AT_ONCE
    assert upstream.count == 0


async def test_concurrency_is_held_and_the_rest_waits_in_order(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(limited(upstream.port, "20s", concurrency=1))
    gates: dict[str, Any] = {name: upstream.gate() for name in "abcd"}

    def script(request: Request) -> Answer:
        name = request.json()["messages"][0]["content"][0]
        return [hold(gates[name]), upstream_answers.chat(name)]

    upstream.script = script
    asking = []
    for name in gates:
        asking.append(asyncio.create_task(client.send(proxy, ask(f"{name} in line"))))
        await upstream.until(lambda: upstream.count == 1)
        while (await client.get(proxy, "/_proxy/status")).json()["queue"]["waiting"] < len(asking) - 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    for number, gate in enumerate(gates.values(), 1):
        await upstream.until(lambda wanted=number: upstream.count == wanted)  # type: ignore[misc]
        gate.open()
    answers = await asyncio.gather(*asking)
    assert [a.status for a in answers] == [200] * 4
    order = [r.json()["messages"][0]["content"][0] for r in upstream.requests]
    assert order == ["a", "b", "c", "d"]
    ends = [r.answered_at or 0 for r in upstream.requests]
    assert all(later.at >= end - 0.01 for later, end in zip(upstream.requests[1:], ends, strict=False))


async def test_waiting_longer_than_max_wait_is_a_429(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy, gate = launch(limited(upstream.port, "300ms", concurrency=1)), upstream.gate()
    upstream.always(hold(gate), upstream_answers.chat())
    first = asyncio.create_task(client.send(proxy, ask()))
    await upstream.until(lambda: upstream.count == 1)
    second = await client.send(proxy, ask())
    assert_honest_429(second, "throttled", 0, 60)
    assert 0.25 < second.seconds < AT_ONCE
    impatient = [await client.send(proxy, ask(), {"X-Proxy-Max-Wait": "0"}) for _ in range(10)]
    assert {answer.error for answer in impatient} == {"throttled"}
    assert min(answer.seconds for answer in impatient) < 0.25
    gate.open()
    assert (await first).status == 200
    assert upstream.count == 1  # who timed out never reached the upstream


async def test_max_wait_can_be_longer_for_one_request(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy, gate = launch(limited(upstream.port, "100ms", concurrency=1)), upstream.gate()
    upstream.always(hold(gate), upstream_answers.chat())
    first = asyncio.create_task(client.send(proxy, ask()))
    await upstream.until(lambda: upstream.count == 1)
    path = "/_/max-wait=20s/v1/chat/completions"
    second = asyncio.create_task(client.send(proxy, ask(), path=path))
    await asyncio.sleep(0.4)
    assert not second.done()
    gate.open()
    assert [(await task).status for task in (first, second)] == [200, 200]


async def test_the_queue_is_bounded(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy, gate = launch(limited(upstream.port, "20s", 2, concurrency=1)), upstream.gate()
    upstream.always(hold(gate), upstream_answers.chat())
    asking = [asyncio.create_task(client.send(proxy, ask())) for _ in range(6)]
    await upstream.until(lambda: sum(task.done() for task in asking) == 3)
    for task in asking:
        if task.done():
            assert task.result().error == "queue_full"
            assert "Retry-After" in task.result().headers
            assert "retry-after-ms" in task.result().headers
    gate.open()
    assert sorted(answer.status for answer in await asyncio.gather(*asking)) == [200] * 3 + [429] * 3


async def test_a_client_that_leaves_the_queue_is_not_sent_and_frees_its_place(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy, gate = launch(limited(upstream.port, "20s", rpm=2, concurrency=1)), upstream.gate()
    upstream.always(hold(gate), upstream_answers.chat())
    first = asyncio.create_task(client.send(proxy, ask()))
    await upstream.until(lambda: upstream.count == 1)
    async with Client() as other:
        leaving = [asyncio.create_task(other.send(proxy, ask("leaving"))) for _ in range(5)]
        await asyncio.sleep(0.1)
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
    await asyncio.sleep(0.1)
    gate.open()
    assert (await first).status == 200
    assert (await client.send(proxy, ask("stays"))).status == 200  # the second of the minute is still there
    assert [b"leaving" in r.body for r in upstream.requests] == [False, False]


async def test_abandoned_streams_give_their_permits_back(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(limited(upstream.port, "20s", concurrency=3))
    upstream.always(*upstream_answers.stream(upstream_answers.chat_events()[:2], hold(upstream.gate()), end=False))
    for _ in range(5):
        async with Client() as leaver:
            before = upstream.count
            tasks = [asyncio.create_task(leaver.send(proxy, ask(stream=True))) for _ in range(3)]
            await upstream.until(lambda n=before: upstream.count == n + 3)  # type: ignore[misc]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    upstream.script = upstream_answers.behave
    answers = await asyncio.gather(*(client.send(proxy, ask()) for _ in range(3)))
    assert [a.status for a in answers] == [200] * 3


async def test_errors_give_their_permits_and_tokens_back(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy = launch(limited(upstream.port, "5s", tpm=2000, concurrency=1))
    upstream.always(upstream_answers.error(400, "Bad", "bad"))
    for _ in range(5):
        assert (await client.send(proxy, ask(max_tokens=1500))).status == 400
    upstream.script = upstream_answers.behave
    assert (await client.send(proxy, ask(max_tokens=1500))).status == 200


async def test_keys_have_limits_of_their_own_unless_they_share_a_quota(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    for quota, total in ((None, 4), ("joint", 2)):
        config = settings(upstream.port, ("k1", "k2"), throttle={"max_wait": "100ms"})
        for key in config["upstreams"][0]["keys"]:
            key |= {"limits": {"*": {"rpm": 2}}} | ({"quota": quota} if quota else {})
        proxy = launch(config)
        before = upstream.count
        answers = await asyncio.gather(*(client.send(proxy, ask()) for _ in range(8)))
        assert upstream.count - before == total, quota
        assert [a.status for a in answers].count(200) == total


async def test_the_deadline_bounds_the_queue(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy, gate = launch(limited(upstream.port, "60s", concurrency=1)), upstream.gate()
    upstream.always(hold(gate), upstream_answers.chat())
    first = asyncio.create_task(client.send(proxy, ask()))
    await upstream.until(lambda: upstream.count == 1)
    second = await client.send(proxy, ask(), {"X-Proxy-Timeout": "500ms"})
    assert second.error in ("throttled", "upstream_timeout")
    assert second.seconds < AT_ONCE
    gate.open()
    assert (await first).status == 200


async def test_max_in_flight(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy, gate = launch(settings(upstream.port, server={"max_in_flight": 2})), upstream.gate()
    upstream.always(hold(gate), upstream_answers.chat())
    asking = [asyncio.create_task(client.send(proxy, ask())) for _ in range(2)]
    await upstream.until(lambda: upstream.count == 2)
    third = await client.send(proxy, ask())
    assert (third.status, third.error) == (503, "overloaded")
    assert "Retry-After" in third.headers
    assert (await client.get(proxy, "/healthz")).status == 200
    gate.open()
    assert [a.status for a in await asyncio.gather(*asking)] == [200, 200]


async def test_the_keys_route_shows_what_is_used(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(limited(upstream.port, rpm=10))
    await client.send(proxy, ask())
    page = await client.get(proxy, "/_proxy/keys")
    assert "k1" in page.body.decode()
    assert secret("k1") not in page.body.decode()
