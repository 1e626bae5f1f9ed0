"""`server.workers` over 1, on the real processes: one proxy to every client (docs/deployment.md)."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests import upstream_answers
from tests.acceptance.test_lifecycle import free_port
from tests.client import Client, ask
from tests.launch import AT_ONCE, Config, Launch, ProxyProcess, run_command, secret, settings, write_config
from tests.scripted_upstream import ScriptedUpstream, hold, sleep, stall

CHAT = "/v1/chat/completions"


def several(port: int, workers: int = 2, keys: tuple[str, ...] = ("k1",), /, **more: Any) -> Config:
    config = settings(port, keys, **more)
    config["server"]["workers"] = workers
    return config


async def status(client: Client, proxy: ProxyProcess, **headers: str) -> Any:
    return (await client.get(proxy, "/_proxy/status", **headers)).json()


@asynccontextmanager
async def one_each(proxy: ProxyProcess, workers: int = 2, count: int = 1) -> AsyncIterator[list[Client]]:
    """`count` clients for each worker, the first one's first. Each keeps its one connection, as long as it is used for
    one request at a time.
    """
    async with AsyncExitStack() as stack:
        found: dict[int, list[Client]] = {number: [] for number in range(1, workers + 1)}
        end = time.monotonic() + 30  # the last worker may still be starting
        while any(len(each) < count for each in found.values()):
            assert time.monotonic() < end, {number: len(each) for number, each in found.items()}
            batch = [await stack.enter_async_context(Client()) for _ in range(2 * workers)]
            result = await asyncio.gather(*(status(client, proxy) for client in batch))
            for client, one in zip(batch, result, strict=True):
                found[one["worker"]].append(client)
        yield [client for number in sorted(found) for client in found[number][:count]]


async def pids(proxy: ProxyProcess, client: Client, workers: int = 2) -> dict[int, int]:
    """By number; waits until all are there."""
    end = time.monotonic() + 15
    while True:
        found = {one["worker"]: one["pid"] for one in (await status(client, proxy))["workers"]}
        if len(found) == workers:
            return found
        assert time.monotonic() < end, found
        await asyncio.sleep(0.05)


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


async def gone(numbers: list[int], seconds: float) -> None:
    end = time.monotonic() + seconds
    while any(is_there(pid) for pid in numbers):
        assert time.monotonic() < end, "still there"
        await asyncio.sleep(0.05)


def samples(text: str) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in lines if not any(word in name for word in _MOVING)}


_MOVING = ("_created", "_headroom_", "_event_loop_lag_")
"""What is another at each look."""


@pytest.mark.parametrize("workers", [2, 3])
async def test_every_worker_serves_and_knows_every_receipt(
    launch: Launch, upstream: ScriptedUpstream, workers: int
) -> None:
    proxy = launch(several(upstream.port, workers))
    log = proxy.stderr_so_far()
    assert log.count("listening on") == 1
    assert f"workers: {workers}" in log
    assert log.count("warning: server.workers:") == 2
    async with one_each(proxy, workers) as clients:
        for at, client in enumerate(clients):
            plain = await client.send(proxy, ask())
            hit = await client.send(proxy, ask("the same"))
            hit = await client.send(proxy, ask("the same"))
            stream = await client.send(proxy, ask(stream=True))
            assert (plain.cache, hit.cache, stream.cache) == ("miss", "hit", "miss")
            for other in [*clients[at + 1 :], *clients]:
                for reply in (plain, hit, stream):
                    id_ = reply.headers["X-Proxy-Request-Id"]
                    receipt = await other.receipt(proxy, id_)
                    assert (receipt["id"], receipt["cache"]) == (id_, reply.cache)
                    assert float(receipt["cost_usd"]) == (
                        0 if reply is hit else pytest.approx(float(receipt["cost_usd"]))
                    )
                    assert receipt["prompt_tokens"]
        for client in clients:
            assert (await client.get(proxy, "/_proxy/requests/nobodys")).status == 404
            listed = (await client.get(proxy, "/_proxy/cache")).json()["entries"]
            assert len(listed) == 2 * workers + 1


async def test_metrics_and_status_add_up(launch: Launch, upstream: ScriptedUpstream) -> None:
    keys = [{"name": name, "key": secret(name)} for name in ("anna", "otto")]
    proxy = launch(several(upstream.port, 2, server={"client_keys": keys}))
    upstream.script = upstream_answers.behave
    seen: dict[str, int] = {}
    async with one_each(proxy) as clients:

        async def one(number: int) -> None:
            client = clients[number % 2]
            headers = {"Authorization": f"Bearer {secret('anna' if number % 3 else 'otto')}"}
            if number % 10 == 9:
                reply = await client.send(proxy, {"model": "gpt-4o", "input": f"{number}"}, headers, "/v1/embeddings")
            elif number % 10 == 8:
                reply = await client.send(proxy, b"{broken", headers)
            else:
                reply = await client.send(proxy, ask(f"question {number % 60}", stream=number % 4 == 0), headers)
            name = reply.cache or str(reply.error)
            seen[name] = seen.get(name, 0) + 1

        for start in range(0, 200, 20):
            await asyncio.gather(*(one(number) for number in range(start, start + 20)))
        texts = [(await client.get(proxy, "/metrics")).body.decode() for client in clients]
        states = [await status(client, proxy) for client in clients]
        usages = [(await client.get(proxy, "/_proxy/usage")).json() for client in clients]
    assert usages[0]["since_start"] == usages[1]["since_start"]
    for name in ("requests", "hits", "cost_usd", "saved_usd", "total_tokens"):
        assert usages[0]["since_start"][name] == usages[0]["total"][name] == usages[1]["total"][name]
    found = [samples(text) for text in texts]
    moving = ("headroom", "loop_lag")  # with every second
    same = [{name: one[name] for name in one if not any(word in name for word in moving)} for one in found]
    assert same[0] == same[1]
    counted: dict[str, float] = {}
    for name, value in found[0].items():
        if name.startswith("openai_proxy_requests_total"):
            cache = str(re.search(r'cache="(\w+)"', name)[1])  # type: ignore[index]
            counted[cache] = counted.get(cache, 0) + value
    refused = seen.pop("invalid_json", 0) + seen.pop("bypass", 0)
    assert {name: counted.get(name, 0) for name in seen} == seen
    assert sum(seen.values()) + refused == 200
    durations = sum(value for name, value in found[0].items() if "duration_seconds_count" in name)
    assert durations == sum(counted.values()) - counted["hit"]
    assert found[0]["openai_proxy_in_flight"] == 1
    for state in states:
        assert sum(one["requests"] for one in state["clients"].values()) == upstream.count
        assert [one["worker"] for one in state["workers"]] == [1, 2]
    assert len(re.findall(r"^# TYPE openai_proxy_requests_total ", texts[0], re.MULTILINE)) == 1
    assert 'openai_proxy_keys{state="ready",worker="1"} 1.0' in texts[0]


def kill_second_worker(stop: threading.Event, killed: list[int]) -> None:
    """Kill a proxy's second worker as soon as there is one; the proxy is a child of this process."""
    while not stop.is_set():
        listed = subprocess.run(["ps", "-axo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        parents = {int(pid): int(parent) for pid, parent in map(str.split, listed.splitlines())}
        workers = sorted(pid for pid, parent in parents.items() if parents.get(parent) == os.getpid())
        if len(workers) > 1:
            killed.append(workers[-1])
            os.kill(workers[-1], signal.SIGKILL)
            return


async def test_a_worker_killed_before_all_are_ready_is_restarted(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    stop, killed = threading.Event(), list[int]()
    watcher = threading.Thread(target=kill_second_worker, args=(stop, killed))
    watcher.start()
    try:
        proxy = await asyncio.to_thread(launch, several(upstream.port))
    finally:
        stop.set()
        watcher.join()
    assert killed
    assert (await client.send(proxy, ask())).status == 200
    assert len(await pids(proxy, client)) == 2
    assert f"worker 2 (process {killed[0]}) ended with status -9; it is restarted" in proxy.stderr_so_far()


async def test_counts_outlive_a_worker(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(several(upstream.port))
    async with one_each(proxy) as clients:
        for each in clients:
            for _ in range(3):
                await each.send(proxy, ask())
        before = samples((await clients[0].get(proxy, "/metrics")).body.decode())
        processes = await pids(proxy, clients[0])
        for number, way in ((2, signal.SIGKILL), (1, signal.SIGTERM)):
            os.kill(processes[number], way)
            await gone([processes[number]], 5)
            async with Client() as other:
                await pids(proxy, other)
                assert (await other.send(proxy, ask())).status == 200
                after = samples((await other.get(proxy, "/metrics")).body.decode())
            name = 'openai_proxy_requests_total{cache="miss",endpoint="chat",model="gpt-4o",status="2xx"}'
            assert after[name] == before[name] + 1
            before = after
    log = proxy.stderr_so_far()
    assert f"worker 2 (process {processes[2]}) ended with status -9" in log
    assert f"worker 1 (process {processes[1]}) ended with status 0" in log
    proxy.terminate()
    assert await asyncio.to_thread(proxy.wait, AT_ONCE) == 0


async def test_a_killed_worker_breaks_only_its_own_requests(
    launch: Launch, upstream: ScriptedUpstream, client: Client
) -> None:
    proxy, gate = launch(several(upstream.port)), upstream.gate()
    events = upstream_answers.chat_events()
    async with one_each(proxy) as clients:
        processes = await pids(proxy, client)
        upstream.always(
            *upstream_answers.stream(events[:2], end=False), hold(gate), *upstream_answers.stream(events[2:])[1:]
        )
        async with clients[0].open(proxy, ask(stream=True)) as answer:
            got = await answer.content.readexactly(len(b"".join(events[:2])))
            os.kill(processes[2], signal.SIGKILL)
            upstream.always(upstream_answers.chat())
            for _ in range(20):  # new connections are taken by who is left, and by the new one
                async with Client() as fresh:
                    assert (await fresh.send(proxy, ask())).status == 200
            gate.open()
            got += await answer.content.read()
    assert got == b"".join(events)
    again = await pids(proxy, client)
    assert again[1] == processes[1]
    assert again[2] != processes[2]


async def test_sigterm_drains_every_worker(launch: Launch, upstream: ScriptedUpstream) -> None:
    proxy, gate = launch(several(upstream.port, 2, server={"drain_timeout": "20s"})), upstream.gate()
    events = upstream_answers.chat_events(include_usage=True)
    upstream.always(
        *upstream_answers.stream(events[:2], end=False), hold(gate), *upstream_answers.stream(events[2:])[1:]
    )
    question = {"stream": True, "stream_options": {"include_usage": True}}
    async with one_each(proxy) as clients, AsyncExitStack() as stack:
        answers = [await stack.enter_async_context(each.open(proxy, ask(**question))) for each in clients]
        heads = [await answer.content.readexactly(len(b"".join(events[:2]))) for answer in answers]
        proxy.terminate()
        end = time.monotonic() + 5
        while True:
            try:
                with socket.create_connection(("127.0.0.1", proxy.port), timeout=1):
                    await asyncio.sleep(0.02)
            except OSError:
                break
            assert time.monotonic() < end, "new connections are still taken"
        assert proxy.alive()
        gate.open()
        for head, answer in zip(heads, answers, strict=True):
            assert head + await answer.content.read() == b"".join(events)
    assert await asyncio.to_thread(proxy.wait, AT_ONCE) == 0


async def test_a_second_signal_means_now(launch: Launch, upstream: ScriptedUpstream) -> None:
    proxy = launch(several(upstream.port, 2, server={"drain_timeout": "60s"}))
    upstream.always(stall())
    async with one_each(proxy) as clients:
        processes = await pids(proxy, clients[0])
        asking = [asyncio.create_task(each.send(proxy, ask())) for each in clients]
        await upstream.until(lambda: upstream.count == 2)
        proxy.signal(signal.SIGINT)
        await asyncio.sleep(0.5)
        assert proxy.alive()
        proxy.terminate()
        assert await asyncio.to_thread(proxy.wait, AT_ONCE) == 0
        await asyncio.gather(*asking, return_exceptions=True)
        assert not any(is_there(pid) for pid in processes.values())


async def test_no_orphans(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(several(upstream.port, 3, server={"drain_timeout": "60s", "drain_delay": "60s"}))
    processes = await pids(proxy, client, 3)
    upstream.always(stall())
    asking = asyncio.create_task(client.send(proxy, ask()))
    await upstream.until(lambda: upstream.count == 1)
    proxy.signal(signal.SIGKILL)
    await gone(list(processes.values()), 4)
    await asyncio.gather(asking, return_exceptions=True)
    with pytest.raises(OSError, match=r"refused|Connect"):
        socket.create_connection(("127.0.0.1", proxy.port), timeout=1).close()


async def test_new_settings_reach_present_and_future_workers(
    launch: Launch, upstream: ScriptedUpstream, tmp_path: Path, client: Client
) -> None:
    config = several(upstream.port)
    proxy = launch(config)
    file = tmp_path / "settings.yaml"

    async def keys() -> set[str]:
        """Those in use, as each worker has it."""
        async with one_each(proxy) as clients:
            before = upstream.count
            for each in clients:
                assert (await each.send(proxy, ask())).status == 200
            return {str(request.key) for request in upstream.requests[before:]}

    assert await keys() == {secret("k1")}
    config["upstreams"][0]["keys"] = [{"name": "k2", "key": secret("k2")}]
    config["server"]["workers"] = 3
    write_config(tmp_path, config)
    proxy.signal(signal.SIGHUP)
    await until_said(proxy, "new settings in force")
    assert await keys() == {secret("k2")}
    assert proxy.stderr_so_far().count("server.workers takes effect at the next start") == 1
    file.write_text("server: {workers: many}")
    proxy.signal(signal.SIGHUP)
    await until_said(proxy, "the old ones stay")
    assert proxy.stderr_so_far().count("cannot be used") == 1
    os.kill((await pids(proxy, client))[2], signal.SIGKILL)  # whoever starts now has what the others have
    await until_said(proxy, "it is restarted in")
    async with Client() as fresh:
        await pids(proxy, fresh)
    assert await keys() == {secret("k2")}


async def until_said(proxy: ProxyProcess, text: str) -> None:
    end = time.monotonic() + 10
    while text not in proxy.stderr_so_far():
        assert time.monotonic() < end, proxy.stderr_so_far()
        await asyncio.sleep(0.02)


async def test_a_purge_reaches_every_memory_at_once(launch: Launch, upstream: ScriptedUpstream, tmp_path: Path) -> None:
    for cache in ({"backend": "memory"}, {"backend": "sqlite", "path": str(tmp_path / "cache.db")}):
        proxy = launch(several(upstream.port, 2, cache=cache))
        question = ask(f"in {cache['backend']}")
        async with one_each(proxy) as clients:
            for each in clients:
                await each.send(proxy, question)
                await asyncio.sleep(0.2)
                assert (await each.send(proxy, question)).cache == "hit"
            counted = await clients[1].send(proxy, {"all": True, "dry_run": True}, path="/_proxy/cache/purge")
            purged = await clients[1].send(proxy, {"all": True}, path="/_proxy/cache/purge")
            assert counted.json()["purged"] == purged.json()["purged"] == (2 if cache["backend"] == "memory" else 1)
            for each in clients:
                assert (await each.get(proxy, "/_proxy/cache")).json()["entries"] == []
            assert (await clients[0].send(proxy, question)).cache == "miss"


async def test_limits_hold_over_all_workers(launch: Launch, upstream: ScriptedUpstream) -> None:
    anna = {"name": "anna", "key": secret("anna"), "limits": {"rpm": 5}}
    otto = {"name": "otto", "key": secret("otto")}
    throttle = {"limits": {"*": {"rpm": 20}}, "max_wait": "0s"}
    proxy = launch(several(upstream.port, 3, throttle=throttle, server={"client_keys": [anna, otto]}))
    async with one_each(proxy, 3) as clients:

        async def sent(name: str, count: int) -> list[int]:
            headers = {"Authorization": f"Bearer {secret(name)}"}
            asking = (clients[n % 3].send(proxy, ask(), headers) for n in range(count))
            return [reply.status for reply in await asyncio.gather(*asking)]

        assert (await sent("anna", 12)).count(200) == 5
        assert (await sent("otto", 40)).count(200) == 15
        assert upstream.count == 20
        used = (await clients[2].get(proxy, "/_proxy/keys")).json()["keys"][0]["limits"]
        assert used["gpt-4o"]["rpm"] == {"limit": 20, "used": 20}
        assert (await clients[1].send(proxy, {}, path="/_proxy/limits/reset")).status == 200
        assert (await sent("otto", 40)).count(200) == 20


async def test_a_budget_holds_over_all_workers(launch: Launch, upstream: ScriptedUpstream) -> None:
    proxy = launch(several(upstream.port, 2, cost={"budget": {"usd_per_day": 0.02}}))
    async with one_each(proxy) as clients:
        replies = await asyncio.gather(*(clients[n % 2].send(proxy, ask(max_tokens=500)) for n in range(30)))
        replies += [await clients[n % 2].send(proxy, ask(max_tokens=500)) for n in range(20)]
        costs = [float(reply.headers["X-Proxy-Cost-USD"]) for reply in replies if reply.status == 200]
        assert {reply.error for reply in replies} == {None, "budget_exceeded"}
        assert 0.012 < sum(costs) <= 0.02  # estimates are above what it costs
        assert len(costs) == upstream.count
        before = upstream.count
        assert [(await each.send(proxy, ask(max_tokens=500))).error for each in clients] == ["budget_exceeded"] * 2
        assert upstream.count == before


async def test_permits_of_a_killed_worker_are_returned(launch: Launch, upstream: ScriptedUpstream) -> None:
    proxy = launch(several(upstream.port, 2, throttle={"limits": {"*": {"concurrency": 1}}, "max_wait": "10s"}))
    gate = upstream.gate()
    async with one_each(proxy) as clients:
        processes = await pids(proxy, clients[0])
        upstream.queue(CHAT, [hold(gate), upstream_answers.chat()], [upstream_answers.chat()], [stall()])
        held = asyncio.create_task(clients[0].send(proxy, ask()))
        await upstream.until(lambda: upstream.count == 1)
        waiting = asyncio.create_task(clients[1].send(proxy, ask()))
        await asyncio.sleep(0.5)
        assert upstream.count == 1
        gate.open()
        assert (await held).status == (await waiting).status == 200
        doomed = asyncio.create_task(clients[1].send(proxy, ask()))
        await upstream.until(lambda: upstream.count == 3)
        os.kill(processes[2], signal.SIGKILL)
        with pytest.raises(aiohttp.ClientError):
            await doomed
        assert (await clients[0].send(proxy, ask())).status == 200


async def test_permits_move_between_workers(launch: Launch, upstream: ScriptedUpstream) -> None:
    proxy = launch(several(upstream.port, 2, throttle={"limits": {"*": {"concurrency": 1}}, "max_wait": "20s"}))
    upstream.always(sleep(0.05), upstream_answers.chat())
    order: list[int] = []

    async def one(number: int, client: Client) -> None:
        assert (await client.send(proxy, ask())).status == 200
        order.append(number)

    async with one_each(proxy, 2, 12) as clients:
        many = [asyncio.create_task(one(1, client)) for client in clients[:12]]
        await upstream.until(lambda: upstream.count == 2)
        few = [asyncio.create_task(one(2, client)) for client in clients[12:15]]
        await asyncio.gather(*many, *few)
    assert order.count(2) == 3
    assert 2 not in order[-3:]  # each other place is theirs, as long as they want one


async def test_the_cassette_holds_what_every_worker_recorded(
    launch: Launch, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    file = tmp_path / "answers.jsonl"
    proxy = launch(several(upstream.port, 2, cache={"cassette": str(file)}))
    async with one_each(proxy) as clients:
        for each in clients:
            await each.send(proxy, ask())
    proxy.terminate()
    assert await asyncio.to_thread(proxy.wait, 10) == 0
    assert sum('"key"' in line for line in file.read_text().splitlines()) == 2


async def test_a_cooling_key_cools_for_every_process(launch: Launch, upstream: ScriptedUpstream) -> None:
    proxy = launch(several(upstream.port, 2, ("k1", "k2")))
    upstream.queue(CHAT, [upstream_answers.rate_limited("50")])
    async with one_each(proxy) as clients:
        assert (await clients[0].send(proxy, ask())).status == 200
        tired = upstream.requests[0].key
        await asyncio.sleep(0.2)
        for _ in range(6):
            assert (await clients[1].send(proxy, ask())).status == 200
        assert [request.key for request in upstream.requests].count(tired) == 1
        states = [[key["state"] for key in (await each.get(proxy, "/_proxy/keys")).json()["keys"]] for each in clients]
        assert states[0] == states[1]


async def test_a_run_is_shared_by_all_workers(launch: Launch, upstream: ScriptedUpstream, tmp_path: Path) -> None:
    upstream.script = lambda _: [upstream_answers.chat(f"answer {upstream.count}")]
    proxy = launch(several(upstream.port, 2, cache={"backend": "sqlite", "path": str(tmp_path / "cache.db")}))
    question, headers = ask("one", temperature=1), {"X-Proxy-Run": "eval-7"}
    async with one_each(proxy) as clients:
        both = await asyncio.gather(*(clients[n % 2].send(proxy, question, headers) for n in range(10)))
        assert len({reply.body for reply in both}) == upstream.count == 10
        total = sum(float(reply.headers["X-Proxy-Cost-USD"]) for reply in both)
        for _ in range(100):  # told when the answers are on their way
            reports = [(await each.get(proxy, "/_proxy/runs/eval-7")).json() for each in clients]
            if {report["requests"] for report in reports} == {10}:
                break
            await asyncio.sleep(0.02)
        assert reports[0] == reports[1]
        assert (reports[0]["requests"], reports[0]["misses"], reports[0]["distinct_keys"]) == (10, 10, 1)
        assert float(reports[0]["cost_usd"]) == pytest.approx(total)
        for each in clients:
            refused = await each.send(proxy, question, headers | {"X-Proxy-Max-Cost": reports[0]["cost_usd"]})
            assert (refused.status, refused.error) == (429, "budget_exceeded")
        await asyncio.sleep(1)
        again = [await clients[n % 2].send(proxy, question, {"X-Proxy-Run": "eval-8"}) for n in range(10)]
        assert {reply.cache for reply in again} == {"hit"}
        assert {reply.body for reply in again} == {reply.body for reply in both}


async def test_every_worker_knows_the_owner_of_a_stored_object(launch: Launch, upstream: ScriptedUpstream) -> None:
    proxy = launch(several(upstream.port, 2, ("k1", "k2", "k3"), selection="round_robin"))
    async with one_each(proxy) as clients:
        for _ in range(3):
            made = await clients[0].send(proxy, {"model": "gpt-4o", "input": ask()["messages"]}, path="/v1/responses")
            key, id_ = upstream.last.key, made.json()["id"]
            await asyncio.sleep(0.2)  # the others hear of it a moment later
            asked = {"model": "gpt-4o", "input": "and then?", "previous_response_id": id_}
            assert (await clients[1].send(proxy, asked, path="/v1/responses")).status == 200
            assert upstream.last.key == key


async def test_the_ops_listener_and_a_unix_socket(launch: Launch, upstream: ScriptedUpstream, tmp_path: Path) -> None:
    port = free_port()
    path = Path(f"/tmp/proxy-{os.getpid()}-{port}.sock")
    config = several(upstream.port, 2, server={"ops": f"127.0.0.1:{port}", "socket": str(path)})
    process = ProxyProcess(["serve", "--config", str(write_config(tmp_path, config))], tmp_path, {})
    try:
        process.start(re.compile("listening on"))
        assert path.stat().st_mode & 0o777 == 0o600
        for _ in range(10):
            connector = aiohttp.UnixConnector(str(path))
            async with aiohttp.ClientSession(connector=connector) as session:
                async with session.get("http://localhost/_proxy/status") as answer:
                    assert len((await answer.json())["workers"]) == 2
                async with session.get(f"http://127.0.0.1:{port}/x") as answer:
                    assert answer.status == 404
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/metrics") as answer:
            assert 'worker="2"' in await answer.text()
    finally:
        problems = process.finish()
    assert not problems, problems
    assert not path.exists()


def test_a_port_in_use_is_reported_once(launch: Launch, upstream: ScriptedUpstream, tmp_path: Path) -> None:
    proxy = launch(several(upstream.port))
    done = run_command(tmp_path, ["serve", "--port", str(proxy.port)], several(upstream.port))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert str(proxy.port) in done.stderr


def test_an_error_of_every_worker_is_reported_once(tmp_path: Path) -> None:
    done = run_command(tmp_path, ["serve", "--port", "0", "--workers", "3", "--cassette", "/nowhere/at/all"])
    assert done.returncode == 2
    assert done.stderr.count("/nowhere/at/all") == 1, done.stderr


async def test_the_parent_stops_if_no_worker_can_start(
    launch: Launch, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    cassette = tmp_path / "answers.jsonl"
    cassette.touch()
    config = several(upstream.port, 2, cache={"mode": "replay", "cassette": str(cassette)})
    proxy = launch(config)
    async with Client() as client:
        processes = await pids(proxy, client)
    cassette.unlink()
    for pid in processes.values():
        os.kill(pid, signal.SIGKILL)
    assert await asyncio.to_thread(proxy.wait, 30) == 1
    assert "giving up" in proxy.stderr_so_far()


async def test_no_descriptor_stays_open(launch: Launch, upstream: ScriptedUpstream, client: Client) -> None:
    proxy = launch(several(upstream.port))
    before = None
    for _ in range(4):
        processes = await pids(proxy, client)
        os.kill(processes[2], signal.SIGKILL)
        await gone([processes[2]], 5)
        async with Client() as fresh:
            await pids(proxy, fresh)
            before = before or proxy.fds()
    assert proxy.fds() == before
    for pid in processes.values():
        folder = Path(f"/proc/{pid}/fd")
        if folder.exists():
            assert len(list(folder.iterdir())) < 40


async def test_the_demo(upstream: ScriptedUpstream, tmp_path: Path, client: Client) -> None:
    process = ProxyProcess(["demo", "--port", "0", "--workers", "2"], tmp_path, {})
    try:
        process.start()
        question = ask("Hello from the demo")
        miss, hit = [await client.send(process, question) for _ in range(2)]
        assert (miss.status, miss.cache, hit.cache) == (200, "miss", "hit")
        assert "curl" in process.stderr_so_far()
    finally:
        problems = process.finish()
    assert not problems, problems
