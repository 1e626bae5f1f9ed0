"""proxy.cache.stores.redis: frozen, refused, full, foreign, cut and cancelled; a real server throughout."""

from __future__ import annotations

import asyncio
import hashlib
import random
import shutil
import signal
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy.cache.codec import encode
from proxy.cache.stores import redis
from proxy.cache.stores.interface import ALL, Filter, StoreError
from proxy.cache.stores.memory import MemoryStore
from proxy.cache.stores.redis import MAX_PENDING, MAX_PREFIX, RedisStore
from proxy.cache.stores.tiered import TieredStore
from proxy.system import redis as redis_link
from tests.cache.stores.kit import HASTY, NOW, PATIENT, Valkey, entry, until, valkey

pytestmark = pytest.mark.slow

Open = Callable[..., Awaitable[RedisStore]]


@pytest.fixture(scope="module")
def shared() -> Iterator[Valkey]:
    with valkey() as server:
        yield server


@pytest.fixture
def server(shared: Valkey) -> Iterator[Valkey]:
    """A server of ours, empty, and as it was configured at first."""
    shared.say("FLUSHALL")
    yield shared
    shared.signal(signal.SIGCONT)
    if shared.process is None or shared.process.poll() is not None:
        shared.start()
    shared.say("CONFIG", "SET", "maxmemory", "0")
    shared.say("REPLICAOF", "NO", "ONE")


@pytest.fixture
async def opened(server: Valkey) -> AsyncIterator[Open]:
    stores = []

    async def open_store(comes_up: bool = True, **changes: Any) -> RedisStore:
        settings: dict[str, Any] = {"url": server.url, "prefix": "p", "max_entry": 2**22, "wall": lambda: NOW}
        store = RedisStore(**{**settings, "deadline": PATIENT, **changes})
        await store.open()
        stores.append(store)
        if comes_up:
            await until(lambda: store.up)
        return store

    yield open_store
    server.signal(signal.SIGCONT)
    for store in stores:
        await store.close()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_link, "_PROBE_FIRST", 0.05)
    monkeypatch.setattr(redis_link, "_PROBE_LAST", 0.1)
    monkeypatch.setattr(redis_link, "DEADLINE_MAX", PATIENT)
    monkeypatch.setattr(redis, "DEADLINE_MAX", PATIENT)


def waits(store: RedisStore, seconds: float) -> None:
    """From now on."""
    store._deadline = store.link._deadline = seconds


async def written(store: RedisStore, *keys: str, **changes: Any) -> None:
    for key in keys:
        assert store.put(entry(key, **changes))
    await store.flush()


@asynccontextmanager
async def between(server: Valkey, delay: Callable[[], float], tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A TCP port that leads to the server, each answer late by `delay` seconds."""
    tasks = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, late: bool) -> None:
        try:
            while data := await reader.read(65536):
                if late:
                    await asyncio.sleep(delay())
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_unix_connection(str(server.socket))
        for task in (pump(reader, to_writer, False), pump(to_reader, writer, True)):
            tasks.add(asyncio.ensure_future(task))

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class TestKeys:
    async def test_keys_are_short_and_expire(self, opened: Open, server: Valkey) -> None:
        store = await opened(prefix="x" * MAX_PREFIX, grace=60.0)
        for key in (hashlib.sha256(b"a").hexdigest(), "short", "long" * 1000, "ü"):
            await written(store, key, ttl=100.0)
            await written(store, key, ttl=100.0, form="sse")
        names = server.say("KEYS", "*").split(b"\r\n")[2::2]
        assert len(names) == 8
        assert max(map(len, names)) <= 160
        for name in names:
            assert 100_000 < int(server.say("PTTL", name)[1:]) <= 160_000

    async def test_shortest_and_longest_lifetimes(self, opened: Open, server: Valkey) -> None:
        store = await opened(grace=float("inf"))
        await written(store, "forever", ttl=10.0)
        assert int(server.say("TTL", store.key_of(("forever", "json")))[1:]) > 9 * 365 * 86400
        mortal = await opened(prefix="q")
        await written(mortal, "gone", ttl=10.0, stored_at=NOW - 11)
        assert await mortal.get("gone", "json", NOW) is None
        assert (await mortal.stats())["dropped"] == 1
        await written(mortal, "soon", ttl=10.0, stored_at=NOW - 9.95)
        await asyncio.sleep(0.1)
        assert await mortal.get("soon", "json", NOW) is None

    async def test_prefixes_are_separate_and_literal(self, opened: Open) -> None:
        one, two, odd = await opened(prefix="a"), await opened(prefix="ab"), await opened(prefix="[a]*?\\")
        for store in (one, two, odd):
            await written(store, "k")
        assert await odd.purge(ALL) == 1
        assert await one.purge(ALL) == 1
        assert (await two.stats())["entries"] == 1

    @pytest.mark.parametrize("prefix", ["", "x" * (MAX_PREFIX + 1)])
    async def test_invalid_prefixes_are_refused(self, prefix: str) -> None:
        with pytest.raises(ValueError, match=r"redis\.prefix"):
            RedisStore("redis://127.0.0.1", prefix, 1)

    @pytest.mark.parametrize("url", ["http://u:secret@h", "", "redis://u:secret@h:port", "redis://h?db=secret"])
    async def test_invalid_urls_are_refused(self, url: str) -> None:
        with pytest.raises(ValueError, match="expected redis:") as caught:
            RedisStore(url, "p", 1)
        assert "secret" not in str(caught.value)

    async def test_decode_responses_in_the_url_is_ignored(self, opened: Open, server: Valkey) -> None:
        store = await opened(url=server.url + "?decode_responses=true")
        await written(store, "a")
        assert await store.get("a", "json", NOW) == entry("a")


class TestForeignValues:
    async def test_foreign_values_are_misses(
        self, opened: Open, server: Valkey, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = await opened()
        await written(store, "other")
        whole = b"".join(encode(entry("k")))
        swapped = b"".join(encode(entry("other")))
        name = store.key_of(("k", "json"))
        for value in (b"", b"garbage", whole[:-1], whole[:40] + b"\0" + whole[41:], swapped, b"\x80\x04pickle"):
            server.say("SET", name, value)
            assert await store.get("k", "json", NOW) is None
        assert (await store.stats())["rejected"] == 6
        assert store.up
        assert await store.get("other", "json", NOW) == entry("other")
        await written(store, "k")
        assert await store.get("k", "json", NOW) == entry("k")

    async def test_values_of_another_type_are_misses(
        self, opened: Open, server: Valkey, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = await opened()
        name = store.key_of(("k", "json"))
        server.say("LPUSH", name, "x")
        for _ in range(10):
            assert await store.get("k", "json", NOW) is None
        assert store.up
        assert [record.message for record in caplog.records if "WRONGTYPE" in record.message] == [
            caplog.records[0].message
        ]
        await written(store, "a")
        assert [listed.entry.key for listed in (await store.list()).entries] == ["a"]
        assert await store.purge(Filter(model="gpt-4o")) == 1
        assert await store.purge(ALL) == 1


class TestTrouble:
    async def test_a_batch_waits_for_redis_once(self, opened: Open, server: Valkey) -> None:
        """The read of its items is given up where the one of the whole was late."""
        store = await opened()
        waits(store, HASTY)
        server.signal(signal.SIGSTOP)
        try:
            assert await store.get("k", "json", NOW) is None
            assert await store.get_many(["a", "b"], "json", NOW) is None
            assert store.link.failures == 1
            waits(store, PATIENT)
        finally:
            server.signal(signal.SIGCONT)
        assert await store.get("k", "json", NOW) is None
        assert await store.get_many(["a", "b"], "json", NOW) == [None, None]

    async def test_an_unreachable_redis_costs_only_misses(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Starts without, serves without, and uses it when it comes."""
        server = Valkey()
        try:
            server.kill()
            server.socket.unlink(missing_ok=True)
            store = RedisStore(server.url, "p", 2**20, deadline=PATIENT, wall=lambda: NOW)
            await store.open()
            assert not store.up
            assert not store.put(entry())
            assert await store.get("k", "json", NOW) is None
            assert store.link.failures == 0  # it was not asked
            for work in (store.purge(ALL), store.purge(Filter(key="k")), store.list()):
                with pytest.raises(StoreError, match="redis"):
                    await work
            assert (await store.stats())["state"] != "ok"
            server.start()
            await until(lambda: store.up)
            await written(store, "k")
            assert await store.get("k", "json", NOW) == entry()
            assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
            await store.close()
        finally:
            server.remove()

    async def test_a_frozen_redis_costs_only_misses(
        self, opened: Open, server: Valkey, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = await opened()
        await written(store, "k")
        waits(store, HASTY)
        server.signal(signal.SIGSTOP)
        for _ in range(50):
            assert await store.get("k", "json", NOW) is None
        assert store.link.failures == 3  # then it was asked no more
        assert not store.put(entry("x"))
        waits(store, PATIENT)
        server.signal(signal.SIGCONT)
        await until(lambda: store.up)
        assert await store.get("k", "json", NOW) == entry()
        assert len(caplog.records) == 2

    async def test_many_requests_wait_once_for_a_frozen_redis(self, opened: Open, server: Valkey) -> None:
        store = await opened()
        await written(store, *(f"k{number}" for number in range(300)))
        waits(store, 0.2)
        server.signal(signal.SIGSTOP)
        async with asyncio.timeout(0.2 * 300 / 2):  # one after another they would wait twice as long
            assert await asyncio.gather(*(store.get(f"k{n}", "json", NOW) for n in range(300))) == [None] * 300
        waits(store, PATIENT)
        server.signal(signal.SIGCONT)
        await until(lambda: store.up)
        for number in range(300):
            assert await store.get(f"k{number}", "json", NOW) == entry(f"k{number}")

    async def test_a_redis_frozen_at_start_and_stop(self, server: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(redis, "_CLOSING", HASTY)
        server.signal(signal.SIGSTOP)
        store = RedisStore(server.url, "p", 2**20, deadline=PATIENT)
        async with asyncio.timeout(PATIENT / 2):  # an answer is waited for twice as long
            await store.open()
        server.signal(signal.SIGCONT)
        await until(lambda: store.up)
        for number in range(100):
            store.put(entry(f"k{number}"))
        server.signal(signal.SIGSTOP)
        async with asyncio.timeout(PATIENT / 2):
            await store.close()

    async def test_a_slow_redis(self, opened: Open, server: Valkey) -> None:
        """Slower than the deadline: out of use, so long as it is."""
        delay, answers = [0.0], [0]

        def late() -> float:
            answers[0] += 1
            return delay[0]

        async with between(server, late) as port:
            store = await opened(url=f"redis://127.0.0.1:{port}")
            await written(store, "k")
            delay[0] = 3 * HASTY
            waits(store, HASTY)
            for _ in range(4):
                await store.get("k", "json", NOW)
            assert not store.up
            seen = answers[0]
            await until(lambda: answers[0] > seen + 6)  # probes
            assert not store.up
            delay[0] = 0.0
            waits(store, PATIENT)
            await until(lambda: store.up)
            assert await store.get("k", "json", NOW) == entry()
            await store.close()

    async def test_a_killed_redis_is_used_again_after_its_restart(self, opened: Open, server: Valkey) -> None:
        store = await opened()
        await written(store, "k")
        for _ in range(2):
            server.kill()
            async with asyncio.timeout(PATIENT / 2):  # no deadline is waited for
                for _ in range(20):
                    assert await store.get("k", "json", NOW) is None
            assert not store.up
            server.start()
            await until(lambda: store.up)
            await written(store, "k")
            assert await store.get("k", "json", NOW) == entry()

    async def test_idle_connections_closed_by_redis(
        self, opened: Open, server: Valkey, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = await opened()
        await written(store, "k")
        for _ in range(5):
            await asyncio.gather(*(store.get("k", "json", NOW) for _ in range(10)))
            server.say("CLIENT", "KILL", "TYPE", "normal")
            await asyncio.sleep(0.01)
            found = [await store.get("k", "json", NOW) for _ in range(20)]
            assert found.count(None) <= 1
        assert not caplog.records

    async def test_a_full_redis_is_reported(
        self, opened: Open, server: Valkey, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = await opened()
        await written(store, "k")
        server.say("CONFIG", "SET", "maxmemory", "1")
        for number in range(20):
            store.put(entry(f"x{number}"))
            await store.flush()
        assert await store.get("k", "json", NOW) == entry()
        assert await store.get("x1", "json", NOW) is None
        assert store.up
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "maxmemory" in str((await store.stats())["state"])
        server.say("CONFIG", "SET", "maxmemory", "0")
        store._refused_until = 0.0
        await written(store, "y")
        assert await store.get("y", "json", NOW) == entry("y")
        assert len(caplog.records) == 2
        assert (await store.stats())["state"] == "ok"

    async def test_a_redis_that_became_a_replica_is_reported(
        self, opened: Open, server: Valkey, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = await opened()
        await written(store, "k")
        server.say("CONFIG", "SET", "replica-serve-stale-data", "yes")
        server.say("REPLICAOF", "127.0.0.1", "1")
        store.put(entry("x"))
        await store.flush()
        assert "read only" in caplog.text
        assert await store.get("k", "json", NOW) == entry()

    async def test_a_lost_password_is_reported(self, opened: Open, caplog: pytest.LogCaptureFixture) -> None:
        with valkey("--requirepass", "sesame") as server:
            store = await opened(url=f"unix://:sesame@{server.socket}")
            await written(store, "k")
            assert await store.get("k", "json", NOW) == entry()
            wrong = await opened(False, url=f"unix://:open-secret@{server.socket}")
            assert await wrong.get("k", "json", NOW) is None
            assert not wrong.up
            assert "secret" not in caplog.text
            assert "sesame" not in caplog.text
            for one in (store, wrong):
                await one.close()

    async def test_a_cluster_of_one(self, opened: Open) -> None:
        with valkey("--cluster-enabled", "yes") as server:
            server.say("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
            deadline = time.monotonic() + 10
            while b"cluster_state:ok" not in server.say("CLUSTER", "INFO"):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
            store = await opened(url=server.url)
            await written(store, *(f"k{number}" for number in range(50)))
            found = await asyncio.gather(*(store.get(f"k{number}", "json", NOW) for number in range(50)))
            assert all(found)
            assert await store.purge(Filter(tag="run:7")) == 50
            await store.close()


class TestBounds:
    async def test_the_connection_pool_is_bounded(self, opened: Open, server: Valkey) -> None:
        store = await opened(url=server.url + "?max_connections=2")
        await written(store, "k")
        found = await asyncio.gather(*(store.get("k", "json", NOW) for _ in range(200)))
        assert found == [entry()] * 200
        assert int(server.say("INFO", "clients").split(b"connected_clients:")[1].split(b"\r")[0]) <= 3

    async def test_waiting_for_a_connection_is_bounded_and_no_outage(self, opened: Open, server: Valkey) -> None:
        delay = [0.0]
        async with between(server, lambda: delay[0]) as port:
            store = await opened(url=f"redis://127.0.0.1:{port}?max_connections=2")
            await written(store, "k")
            delay[0] = PATIENT
            waits(store, HASTY)
            async with asyncio.timeout(PATIENT / 2):
                assert await asyncio.gather(*(store.get("k", "json", NOW) for _ in range(50))) == [None] * 50
            assert store.link.failures == 2  # of those who had their turn
            assert store.up
            await store.close()

    async def test_pending_writes_are_bounded(self, opened: Open, server: Valkey) -> None:
        store = await opened()
        server.signal(signal.SIGSTOP)
        taken = sum(store.put(entry(f"k{number}")) for number in range(2 * MAX_PENDING))
        assert taken == MAX_PENDING
        assert await store.get("k0", "json", NOW) == entry("k0")  # from what waits
        server.signal(signal.SIGCONT)
        await store.flush()

    async def test_pending_bytes_are_bounded(self, opened: Open) -> None:
        store = await opened()
        taken = [store.put(entry(f"k{number}", bytes(2**22))) for number in range(20)]
        assert taken.count(True) == 15
        await store.flush()
        assert all([await store.get(f"k{number}", "json", NOW) for number in range(15)])


class TestCancelled:
    async def test_cancelled_commands_never_mix_up_replies(self, opened: Open, server: Valkey) -> None:
        """16 readers, half of them cancelled at any moment, a jittery network: no read gets the reply of another."""
        dice = random.Random(11)
        bodies = {f"k{number}": b"%d " % number * dice.randrange(1, 500) for number in range(300)}
        async with between(server, lambda: dice.random() * 0.003) as port:
            store = await opened(url=f"redis://127.0.0.1:{port}?max_connections=8")
            for key, body in bodies.items():
                await written(store, key, body=body)
            wrong = answered = 0

            async def reader() -> None:
                nonlocal wrong, answered
                for _ in range(100):
                    key = dice.choice(list(bodies))
                    task = asyncio.create_task(store.get(key, "json", NOW))
                    if dice.random() < 0.5:
                        asyncio.get_running_loop().call_later(dice.random() * 0.012, task.cancel)
                    try:
                        found = await task
                    except asyncio.CancelledError:
                        continue
                    answered += 1
                    wrong += found is None or found.body != bodies[key]

            await asyncio.gather(*(reader() for _ in range(16)))
            assert wrong == 0
            assert answered > 650  # about 800 are not cancelled
            stats = await store.stats()
            assert stats["rejected"] == stats["failures"] == 0
            await store.close()

    async def test_late_replies_are_discarded(self, opened: Open, server: Valkey) -> None:
        """Deadlines that fall between question and answer: what comes late is not the next one's."""
        dice = random.Random(12)
        async with between(server, lambda: dice.random() * 0.02) as port:
            store = await opened(url=f"redis://127.0.0.1:{port}?max_connections=2")
            await written(store, *(f"k{number}" for number in range(50)))
            store._deadline, found = 0.01, 0
            for _ in range(150):
                key = f"k{dice.randrange(50)}"
                one = await store.get(key, "json", NOW)
                assert one is None or one == entry(key)
                found += one is not None
                store._deadline *= 1.25 if one is None else 0.8  # so that about half of the answers are late
                if not store.up:
                    await until(lambda: store.up)
            assert 20 < found < 130
            assert (await store.stats())["rejected"] == 0
            await store.close()

    async def test_a_cancelled_lookup_behind_memory(self, opened: Open, server: Valkey) -> None:
        """A cancelled caller's answer still reaches nobody wrongly, and the next one promotes."""
        store = TieredStore(MemoryStore(2**20, 2**20), await opened())
        store.put(entry("k"))
        await store.flush()
        other = TieredStore(MemoryStore(2**20, 2**20), await opened())
        task = asyncio.create_task(other.get("k", "json", NOW))
        await asyncio.sleep(0)
        task.cancel()
        assert other.peek("k", "json") is None
        assert await other.get("k", "json", NOW) == entry("k")
        assert other.peek("k", "json") == entry("k")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
async def test_tls_is_verified(opened: Open, server: Valkey, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    async with between(server, lambda: 0.0, context) as port:
        store = await opened(url=f"rediss://localhost:{port}?ssl_ca_certs={certificate}")
        await written(store, "k")
        assert await store.get("k", "json", NOW) == entry()
        unknown = await opened(False, url=f"rediss://localhost:{port}")
        await until(lambda: "certificate" in unknown.link.state.lower())
        assert not unknown.up
        for one in (store, unknown):
            await one.close()
