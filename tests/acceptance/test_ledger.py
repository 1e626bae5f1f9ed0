"""The ledger and the report, on the real process: every request once, exact sums (docs/costs-and-budgets.md)."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import random
import signal
import sqlite3
import stat
from collections import Counter
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests import upstream_answers
from tests.client import Client, ask
from tests.launch import Launch, ProxyProcess, run_command, secret, settings
from tests.ledger import Request
from tests.scripted_upstream import Answer, ScriptedUpstream, stall

REQUESTS = int(os.environ.get("LEDGER_REQUESTS", "600"))
"""10,000 as a measurement."""

DEFAULT = Path(".local/share/openai-proxy/usage.db")


def rows(directory: Path, *args: str) -> list[dict[str, Any]]:
    done = run_command(directory, ["report", "--format", "json", *args])
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


async def usage(proxy: ProxyProcess, client: Client, query: str = "") -> Any:
    answer = await client.get(proxy, f"/_proxy/usage{query}")
    assert answer.status == 200, answer.body
    return answer.json()


def services(request: Request) -> Answer:
    """Well-behaved, but for prompts that say otherwise."""
    if request.path.endswith("chat/completions"):
        body = request.json()
        said = str(body["messages"][-1]["content"])
        if said.startswith("wrong"):
            return upstream_answers.error(400, "no", "invalid_request_error")
        if said.startswith("leave"):
            return [*upstream_answers.stream(upstream_answers.chat_events(["echo"])[:2], end=False), stall()]
    return upstream_answers.behave(request)


async def test_the_ledger_is_the_sum_of_headers_and_receipts(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    """Misses, hits, streams, errors, refusals, other routes and clients that leave, many at once."""
    upstream.script = services
    proxy, chance = launch(settings(upstream.port, log={"level": "warning"})), random.Random(5)
    result: list[tuple[str, str | None, str | None]] = []  # id, cost and saving as the headers say
    refused = 0
    room = asyncio.Semaphore(24)

    async def one(number: int) -> None:
        nonlocal refused
        which = chance.random()
        async with room:
            headers = {"X-Proxy-Tag": f"team:{number % 3}"} if number % 2 else {}
            model = ("gpt-4o", "gpt-4o-mini", "unheard-of")[number % 3]
            if which < 0.05:
                reply = await client.send(proxy, b"{", headers)
                assert reply.status == 400
                refused += 1
                return
            if which < 0.10:
                reply = await client.get(proxy, "/v1/models")
            elif which < 0.15:
                async with client.open(proxy, ask(f"leave {number}", stream=True), headers) as answer:
                    result.append((answer.headers["X-Proxy-Request-Id"], None, None))
                    await answer.content.readany()
                return
            elif which < 0.20:
                reply = await client.send(proxy, ask(f"wrong {number}", model=model), headers)
                assert reply.status == 400
            elif which < 0.30:
                path, body = "/v1/embeddings", {"model": "text-embedding-3-small", "input": f"text {number % 40}"}
                reply = await client.send(proxy, body, headers, path)
            else:
                prompt = f"question {chance.randrange(REQUESTS // 4)}"
                reply = await client.send(proxy, ask(prompt, model=model, stream=which < 0.5), headers)
            cost, saved = (reply.headers.get(f"X-Proxy-Cost-{name}") for name in ("USD", "Saved-USD"))
            result.append((reply.headers["X-Proxy-Request-Id"], cost, saved))

    await asyncio.gather(*(one(number) for number in range(REQUESTS)))
    receipts = []
    for id_, cost, saved in result:
        receipt = await client.receipt(proxy, id_)
        assert cost in (None, receipt["cost_usd"])
        assert saved in (None, receipt["saved_usd"])
        receipts.append(receipt)
    spent = sum((Decimal(r["cost_usd"] or 0) for r in receipts), Decimal(0))
    spared = sum((Decimal(r["saved_usd"] or 0) for r in receipts), Decimal(0))
    cached = Counter(r["cache"] for r in receipts)
    bought = [r for r in receipts if r["cache"] not in ("hit", "stale", "coalesced")]
    wanted = {
        "requests": REQUESTS,
        "hits": cached["hit"],
        "coalesced": cached["coalesced"],
        "errors": refused + sum(r["error"] is not None for r in receipts),
        "attempts": sum(r["attempts"] for r in receipts),
        "prompt_tokens": sum(r["prompt_tokens"] or 0 for r in bought),
        "completion_tokens": sum(r["completion_tokens"] or 0 for r in bought),
        "saved_tokens": sum(r["total_tokens"] or 0 for r in receipts if r not in bought),
        "unknown_cost": sum(r["cost_usd"] is None and r["status"] < 300 and not r["error"] for r in receipts),
    }
    assert cached["hit"] > REQUESTS // 5
    assert min(spent, spared) > 0

    page = await usage(proxy, client, "?by=model&by=tag")
    for sums in (page["since_start"], page["total"]):
        assert {name: sums[name] for name in wanted} == wanted
        assert (Decimal(sums["cost_usd"]), Decimal(sums["saved_usd"])) == (spent, spared)
    assert page["ledger"] | {"path": ""} == {"path": "", "state": "ok", "waiting": 0, "lost": 0}

    proxy.terminate()
    assert proxy.wait() == 0
    for by in ("day", "month", "model", "endpoint", "client", "key", "run", "error"):
        found = rows(tmp_path, "--by", by)
        assert all(by in row for row in found)
        assert sum(row["requests"] for row in found) == REQUESTS, by
        assert sum(row["hits"] for row in found) == cached["hit"], by
        assert sum(Decimal(row["cost_usd"]) for row in found) == spent, by
        assert sum(Decimal(row["saved_usd"]) for row in found) == spared, by
    errors = {row["error"]: row["requests"] for row in rows(tmp_path, "--by", "error")}
    assert errors["invalid_json"] == refused
    told_apart = [count for name, count in errors.items() if str(name).split()[0] == "upstream_400"]
    assert sum(told_apart) == sum(r["error"] == "upstream_400" for r in receipts)
    tags = {row["tag"]: row["requests"] for row in rows(tmp_path, "--by", "tag")}
    assert set(tags) == {None, "team:0", "team:1", "team:2"}


async def test_the_ledger_holds_no_prompt_and_no_key(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    proxy = launch(settings(upstream.port))
    for _ in range(2):
        await client.send(proxy, ask("a very private question"), {"Authorization": f"Bearer {secret('client')}"})
    await usage(proxy, client)
    files = sorted((tmp_path / DEFAULT.parent).iterdir())
    assert (tmp_path / DEFAULT) in files
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE((tmp_path / DEFAULT.parent).stat().st_mode) == 0o700
    for file in files:
        content = file.read_bytes()
        assert b"private" not in content
        assert b"echo" not in content
        assert b"sk-test" not in content
        assert secret("k1").encode() not in content


async def test_a_killed_proxy_loses_at_most_the_last_second(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    proxy = launch(settings(upstream.port))
    for _ in range(3):
        await client.send(proxy, ask("early"))
    await asyncio.sleep(1.0)
    for number in range(20):
        await client.send(proxy, ask(f"late {number}"))
    proxy.signal(signal.SIGKILL)
    proxy.wait()
    [row] = rows(tmp_path)
    assert 3 <= row["requests"] <= 23
    assert row["hits"] == 2
    with closing(sqlite3.connect(tmp_path / DEFAULT)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def test_one_ledger_for_two_proxies(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    proxies = [launch(settings(upstream.port)) for _ in range(2)]
    await asyncio.gather(*(client.send(proxies[n % 2], ask(f"q {n}")) for n in range(200)))
    for proxy in proxies:
        assert (await usage(proxy, client))["since_start"]["requests"] == 100
    [row] = rows(tmp_path)
    assert row["requests"] == 200
    assert row["attempts"] == upstream.count == 200


async def test_the_ledger_can_be_turned_off(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    proxy = launch(settings(upstream.port, ledger={"enabled": False}))
    await client.send(proxy, ask("x"))
    page = await usage(proxy, client)
    assert page["ledger"] is None
    assert page["since_start"]["requests"] == 1
    assert "rows" not in page
    proxy.terminate()
    assert proxy.wait() == 0
    assert not (tmp_path / DEFAULT).exists()
    done = run_command(tmp_path, ["report"])
    assert done.returncode == 1
    assert done.stderr.startswith("openai-proxy report: there is no ledger ")
    assert len(done.stderr.splitlines()) == 1


async def test_a_ledger_that_cannot_be_written_costs_no_answer(
    launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no directory")
    proxy = launch(settings(upstream.port, ledger={"path": str(tmp_path / "file/usage.db")}))
    for _ in range(3):
        assert (await client.send(proxy, ask("x"))).status == 200
    page = await usage(proxy, client)
    assert page["since_start"]["hits"] == 2
    assert "director" in page["ledger"]["state"].lower()
    assert "there is no ledger" in page["trouble"]
    assert "answers are not affected" in proxy.stderr_so_far()
    proxy.terminate()
    assert proxy.wait() == 0
    assert "3 requests are not recorded" in proxy.stderr_so_far()


@pytest.mark.parametrize(
    ("query", "param"),
    [("by=moon", "by"), ("since=tomorrow", "since"), ("until=1/2/2026", "until"), ("bye=day", "bye")],
)
async def test_a_page_that_is_asked_for_wrongly(proxy: ProxyProcess, client: Client, query: str, param: str) -> None:
    answer = await client.get(proxy, f"/_proxy/usage?{query}")
    assert (answer.status, answer.error) == (400, "invalid_option")
    assert answer.json()["error"]["param"] == param


async def test_the_report_as_text(launch: Launch, upstream: ScriptedUpstream, client: Client, tmp_path: Path) -> None:
    proxy = launch(settings(upstream.port))
    long = "a-model-with-a-name-that-does-not-fit-into-any-column-at-all"
    for model in ("gpt-4o", "gpt-4o", long, "=1+1"):
        await client.send(proxy, ask("x", model=model), {"X-Proxy-Run": "nightly"})
    await client.get(proxy, "/v1/models")
    await usage(proxy, client)
    for by in (["--by", "model"], ["--by", "day", "--by", "model", "--by", "run"], ["--what-if", "ttl=7d"]):
        done = run_command(tmp_path, ["report", *by])
        assert done.returncode == 0, done.stderr
        assert max(map(len, done.stdout.splitlines())) <= 80
    text = run_command(tmp_path, ["report", "--by", "model", "--since", "1h"]).stdout
    assert text.split("\n")[0].split("  ")[-1] == "ERRS"
    assert "total" in text
    assert "1 request has no known cost" in text
    done = run_command(tmp_path, ["report", "--by", "model", "--format", "csv"])
    table = list(csv.DictReader(done.stdout.splitlines()))
    assert {row["model"] for row in table} == {"gpt-4o", long, "'=1+1", ""}
    assert run_command(tmp_path, ["report", "--until", "2020-01-01"]).stdout.startswith("no requests in this period")
    assert rows(tmp_path, "--until", "2020-01-01") == []
    assert [row["run"] for row in rows(tmp_path, "--by", "run")] == ["nightly", None]
    for wrong in (["--by", "moon"], ["--since", "tomorrow"], ["--what-if", "ttl=never"]):
        assert run_command(tmp_path, ["report", *wrong]).returncode == 2
