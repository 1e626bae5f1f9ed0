"""proxy.cache.stores.sqlite: kill -9, damage, full and read-only disks, several processes, room, age, modes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import random
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from proxy.cache.stores import sqlite, sqlite_writer
from proxy.cache.stores.interface import ALL, Filter, StoreError
from proxy.cache.stores.sqlite import SQLiteStore
from proxy.cache.stores.sqlite_file import LAYOUT, TABLE
from proxy.system import sqlite as sqlite_file
from proxy.system import sqlite_writer as writer_thread
from tests.cache.stores.kit import NOW, entry, until
from tests.cache.stores.writer_process import body_of
from tests.garbage import uncollected

ROUNDS = int(os.environ.get("KILLS", "3"))
"""How often writers are killed; more than the usual few where somebody wants to be sure."""

ROOT = Path(__file__).parents[3]
Open = Callable[..., Awaitable[SQLiteStore]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a" / "b" / "cache.db"


@pytest.fixture
async def opened(path: Path) -> AsyncIterator[Open]:
    """Opens stores on the one file; closes them at the end."""
    stores = []

    async def open_store(**changes: Any) -> SQLiteStore:
        settings: dict[str, Any] = {"path": path, "max_size": 2**26, "max_entry": 2**22, "wall": lambda: NOW}
        store = SQLiteStore(**{**settings, **changes})
        await store.open()
        stores.append(store)
        return store

    yield open_store
    for store in stores:
        await store.close()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again after a second is tried again at once."""
    monkeypatch.setattr(writer_thread, "RETRY", 0.05)


async def written(store: SQLiteStore, *keys: str, **changes: Any) -> None:
    for key in keys:
        assert store.put(entry(key, **changes))
    await store.flush()


async def kept(store: SQLiteStore, *keys: str) -> list[str]:
    return [key for key in keys if await store.get(key, "json", NOW) is not None]


def _moved_on(store: SQLiteStore, identity: object) -> bool:
    return store._writer._identity != identity or store._writer.state != "ok"


class TestFile:
    async def test_files_are_private_with_any_umask(self, opened: Open, path: Path) -> None:
        mask = os.umask(0)
        try:
            await written(await opened(), "a")
        finally:
            os.umask(mask)
        for directory in (path.parent, path.parent.parent):
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        files = list(path.parent.iterdir())
        assert {file.name for file in files} >= {"cache.db", "cache.db-wal", "cache.db-shm"}
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}

    async def test_a_readable_file_is_made_private_and_its_directory_is_not_changed(
        self, opened: Open, path: Path
    ) -> None:
        path.parent.mkdir(parents=True)
        path.parent.chmod(0o755)
        path.touch(0o644)
        await written(await opened(), "a")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755

    async def test_home_and_links_are_followed(
        self, opened: Open, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        path.parent.mkdir(parents=True)
        (tmp_path / "link.db").symlink_to(path)
        store = await opened(path="~/link.db")
        assert store.path == path.resolve()
        await written(store, "a")
        assert path.exists()

    async def test_pragmas_of_the_file(self, opened: Open, path: Path) -> None:
        await opened()
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert connection.execute("PRAGMA auto_vacuum").fetchone() == (2,)
            assert connection.execute("PRAGMA application_id").fetchone() == (LAYOUT.application_id,)

    async def test_closing_leaves_no_other_file(self, path: Path) -> None:
        store = SQLiteStore(path, 2**26, 2**20)
        await store.open()
        await written(store, "a")
        await store.get("a", "json", NOW)
        await store.close()
        assert {file.name for file in path.parent.iterdir()} == {"cache.db", "cache.db.lock"}


class TestRoom:
    async def test_the_size_is_bounded_and_used_entries_stay(self, opened: Open, path: Path) -> None:
        store = await opened(max_size=2**20)
        random_body = random.Random(1).randbytes
        for number in range(600):
            await written(store, f"k{number}", body=random_body(5000))
            assert await store.get("k0", "json", NOW) is not None, number
        assert path.stat().st_size <= 2**20 + 2**16
        stats = await store.stats()
        assert int(stats["evictions"]) > 400
        assert 100 < int(stats["entries"]) < 210
        assert await kept(store, "k0", "k1", "k599") == ["k0", "k599"]

    async def test_the_memory_tier_reports_used_entries(self, opened: Open) -> None:
        store = await opened(max_size=2**20)
        for number in range(300):
            await written(store, f"k{number}", body=random.randbytes(5000))
            store.touch("k0", "json")
        assert await kept(store, "k0", "k1", "k299") == ["k0", "k299"]

    async def test_updates_of_last_use_are_bounded(self, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        store = await opened()
        for number in range(20_000):
            store.touch(f"nobody{number}", "json")
        await written(store, "a")
        assert (await store.stats())["entries"] == 1

    async def test_a_smaller_size_limit_evicts(self, opened: Open, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sqlite_writer, "_SWEEP_EVERY", 0.05)
        monkeypatch.setattr(sqlite_writer, "_TOUCH_EVERY", 0.05)
        large = await opened()
        for number in range(400):
            await written(large, f"k{number}", body=random.randbytes(5000))
        await large.close()
        monkeypatch.setattr(sqlite_writer, "_MAX_EVICTION", 50)
        small = await opened(max_size=2**20)
        await until(lambda: path.stat().st_size <= 1.1 * 2**20)
        assert await kept(small, "k0", "k399") == ["k399"]

    async def test_purged_space_is_returned_to_the_disk(
        self, opened: Open, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqlite_writer, "_SWEEP_EVERY", 0.05)
        monkeypatch.setattr(sqlite_writer, "_TOUCH_EVERY", 0.05)
        store = await opened(max_size=2**22)
        for number in range(200):
            store.put(entry(f"k{number}", random.randbytes(5000)))
        await store.flush()
        assert await store.purge(ALL) == 200
        await until(lambda: path.stat().st_size < 150 * 4096)

    async def test_an_entry_larger_than_the_limit_is_refused(self, opened: Open) -> None:
        store = await opened(max_size=2**18)
        assert not store.put(entry(body=bytes(2**17)))


class TestAge:
    async def test_entries_are_swept_after_ttl_and_grace(self, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sqlite_writer, "_SWEEP_EVERY", 0.01)
        now = [NOW]
        store = await opened(grace=60.0, wall=lambda: now[0])
        await written(store, *(f"k{number}" for number in range(900)), ttl=100.0)
        await written(store, "young", ttl=200.0)
        now[0] += 159
        await asyncio.sleep(0.1)
        await written(store, "x")
        assert len(await kept(store, "k0", "k899", "young", "x")) == 4
        now[0] += 2
        store.put(entry("y"))
        await asyncio.sleep(0.05)
        store.put(entry("z"))
        await until(lambda: store._writer.counts["expirations"] == 900)
        assert await kept(store, "k0", "k899", "young", "x") == ["young", "x"]

    async def test_no_entry_expires_in_replay(self, opened: Open) -> None:
        store = await opened(grace=float("inf"), wall=lambda: NOW + 10**9)
        await written(store, "a", ttl=1.0)
        await written(store, "future", stored_at=NOW + 10**8)
        await asyncio.sleep(0.05)
        await written(store, "b")
        assert await kept(store, "a", "future") == ["a", "future"]

    async def test_entries_from_the_far_future_are_dropped(self, opened: Open) -> None:
        store = await opened()
        await written(store, "ahead", stored_at=NOW + 10 * 365 * 86400)
        await written(store, "skewed", stored_at=NOW + 100)
        assert await kept(store, "ahead", "skewed") == ["skewed"]


class TestDamage:
    async def test_a_text_file_is_moved_aside(self, opened: Open, path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path.parent.mkdir(parents=True)
        path.write_text("these are my notes, not a database\n" * 500)
        store = await opened()
        await written(store, "a")
        assert await kept(store, "a") == ["a"]
        (aside,) = path.parent.glob("cache.db.corrupt-*Z")
        assert aside.read_text().startswith("these are my notes")
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert (await store.stats())["moved_aside"] == 1

    async def test_two_files_moved_aside_in_a_second_get_two_names(self, path: Path) -> None:
        for _ in range(3):
            sqlite_file.make_private(path)
            assert sqlite_file.move_aside(path, sqlite_file.identity(path)) is not None
        assert len(list(path.parent.glob("cache.db.corrupt-*"))) == 3
        assert sqlite_file.move_aside(path, None) is None
        sqlite_file.make_private(path)
        assert sqlite_file.move_aside(path, (0, 0)) is None

    @pytest.mark.parametrize("seed", range(6))
    async def test_damaged_pages_are_moved_aside(self, opened: Open, path: Path, seed: int) -> None:
        """Whatever breaks is a miss or a right answer; afterwards entries are kept again."""
        dice = random.Random(seed)
        keys = [f"k{number}" for number in range(300)]
        store = await opened()
        for key in keys:
            store.put(entry(key, body_of(key) * 20))
        await store.close()
        damaged = bytearray(path.read_bytes())
        for _ in range(1 + 10 * seed):
            page = dice.randrange(len(damaged) // 4096) * 4096
            damaged[page : page + 4096] = dice.randbytes(4096)
        path.write_bytes(damaged)
        again = await opened()
        for key in keys:
            found = await again.get(key, "json", NOW)
            assert found is None or found == entry(key, body_of(key) * 20)
        for number in range(200):
            again.put(entry(f"new{number}", body_of("new")))
            await again.flush()
        await until(lambda: again._writer.state == "ok")
        await written(again, "last")
        assert await again.get("last", "json", NOW) == entry("last")

    async def test_damage_found_by_a_reader_is_repaired(self, opened: Open, path: Path) -> None:
        store = await opened()
        for number in range(300):
            store.put(entry(f"k{number}", body_of("k") * 10))
        await store.close()
        blank = path.read_bytes()
        path.write_bytes(blank[:8192] + b"\x55" * (len(blank) - 8192))  # the header and the schema are whole
        again = await opened()
        assert await kept(again, *(f"k{number}" for number in range(300))) == []
        await until(lambda: list(path.parent.glob("cache.db.corrupt-*")))
        await written(again, "a")
        assert await kept(again, "a") == ["a"]

    @pytest.mark.parametrize("size", [0, 1, 100, 5000])
    async def test_truncated_files_are_moved_aside(self, opened: Open, path: Path, size: int) -> None:
        store = await opened()
        await written(store, *(f"k{number}" for number in range(100)))
        await store.close()
        os.truncate(path, size)
        again = await opened()
        await written(again, "a")
        assert await kept(again, "a") == ["a"]

    async def test_a_swapped_row_is_a_miss(self, opened: Open, path: Path) -> None:
        store = await opened()
        await written(store, "a", "b")
        with closing(sqlite3.connect(path)) as other, other:
            other.execute(f"UPDATE {TABLE} SET body=x'00' WHERE key='b'")
            other.execute(f"UPDATE {TABLE} SET head=(SELECT head FROM {TABLE} WHERE key='b')")
        assert await kept(store, "a", "b") == []
        assert (await store.stats())["rejected"] == 2
        await written(store, "a")
        assert await kept(store, "a") == ["a"]

    async def test_a_disk_that_breaks_everything_is_not_filled_with_copies(
        self, opened: Open, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = await opened()
        for _ in range(3):
            identity = store._writer._identity
            path.write_text("broken again " * 1000)
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            store._writer.suspect(store._writer.generation)
            await until(partial(_moved_on, store, identity))
        assert len(list(path.parent.glob("cache.db.corrupt-*"))) == 1
        assert await kept(store, "a") == []

    async def test_damage_leaves_no_reference_cycle(self, opened: Open, path: Path) -> None:
        """Neither the file that is moved aside nor the next one, which comes too soon for that."""
        path.parent.mkdir(parents=True)
        path.write_text("no database " * 1000)
        found = Counter[str]()
        store = await opened()
        with uncollected(found, ours=True):
            identity = store._writer._identity
            path.write_text("broken again " * 1000)
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            store._writer.suspect(store._writer.generation)
            await until(partial(_moved_on, store, identity))
        assert not found

    async def test_another_programs_database_is_left_alone(
        self, opened: Open, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path.parent.mkdir(parents=True)
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE accounts (name)")
        before = path.read_bytes()
        store = await opened()
        assert store.put(entry("a"))
        await store.flush()
        assert (await store.stats())["state"] == "it is another program's database"
        with pytest.raises(StoreError, match="another program's"):
            await store.purge(ALL)
        with pytest.raises(StoreError, match="another program's"):
            await store.list()
        assert path.read_bytes() == before
        assert "another program's database" in caplog.text

    async def test_a_file_that_is_removed_is_made_again(self, opened: Open, path: Path) -> None:
        store = await opened()
        await written(store, "a")
        for name in ("cache.db", "cache.db-wal", "cache.db-shm"):
            (path.parent / name).unlink()
        await written(store, "b")
        assert await kept(store, "a", "b") == ["b"]
        assert path.exists()

    async def test_other_processes_follow_when_one_moves_a_file_aside(self, opened: Open, path: Path) -> None:
        one, two = await opened(), await opened()
        await written(one, "a")
        assert await kept(two, "a") == ["a"]
        one._writer.suspect(one._writer.generation)
        await until(lambda: one._writer.counts["moved_aside"] == 1)
        await until(lambda: one._writer.generation)
        two._writer.suspect(two._writer.generation)  # it saw the same damage
        await written(two, "b")
        await written(one, "c")
        assert await kept(one, "a", "b", "c") == ["b", "c"]
        assert await kept(two, "a", "b", "c") == ["b", "c"]
        assert len(list(path.parent.glob("cache.db.corrupt-*Z"))) == 1


class TestTrouble:
    async def test_a_full_disk(
        self, opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        pages = [64]
        connect = sqlite_file.connect

        def limited(*arguments: Any) -> sqlite3.Connection:
            connection = connect(*arguments)
            connection.execute(f"PRAGMA max_page_count={pages[0]}")
            return connection

        monkeypatch.setattr(sqlite_file, "connect", limited)
        store = await opened()
        await written(store, "first")
        bodies = {f"k{number}": random.randbytes(5000) for number in range(100)}
        for key, body in bodies.items():
            assert store.put(entry(key, body))
            await store.flush()
        assert "full" in str((await store.stats())["state"])
        assert await kept(store, "first") == ["first"]
        assert len(await kept(store, *bodies)) == 100  # still waiting, and served from there
        assert len([r for r in caplog.records if "is full" in r.message]) == 1  # said once a minute
        pages[0] = 10_000
        await until(lambda: store._writer.state == "ok" and not store._writer._pending)
        assert "works again" in caplog.text
        assert (await store.stats())["entries"] == 101

    async def test_a_lasting_error_drops_bounded_writes(
        self, opened: Open, monkeypatch: pytest.MonkeyPatch, path: Path
    ) -> None:
        def broken(*_: object) -> sqlite3.Connection:
            raise sqlite3.OperationalError("disk I/O error")

        with monkeypatch.context() as patch:
            patch.setattr(sqlite_file, "connect", broken)
            store = await opened()
            taken = sum(store.put(entry(f"k{number}")) for number in range(sqlite_writer.MAX_PENDING + 500))
            assert taken == sqlite_writer.MAX_PENDING
            assert await kept(store, "k0", f"k{sqlite_writer.MAX_PENDING + 400}") == ["k0"]
        await until(lambda: store._writer.state == "ok" and not store._writer._pending)
        await store.flush()
        assert (await store.stats())["entries"] == sqlite_writer.MAX_PENDING

    async def test_an_unwritable_place_is_reported(self, caplog: pytest.LogCaptureFixture) -> None:
        store = SQLiteStore("/proc/self/nowhere/cache.db", 2**26, 2**20)
        await store.open()
        assert store.put(entry("a"))
        await store.flush()
        assert await kept(store, "a", "b") == ["a"]
        assert (await store.stats())["state"] != "ok"
        with pytest.raises(StoreError):
            await store.purge(ALL, dry_run=True)
        await store.close()
        assert len(caplog.records) == 1

    async def test_a_file_that_becomes_read_only_is_reported(
        self, opened: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        connect = sqlite_file.connect

        def read_only(*arguments: Any) -> sqlite3.Connection:
            connection = connect(*arguments)
            connection.execute("PRAGMA query_only=ON")
            return connection

        store = await opened()
        await written(store, "a")
        with monkeypatch.context() as patch:
            patch.setattr(sqlite_file, "connect", read_only)
            # In its own thread, the only one that SQLite lets close the connection.
            await asyncio.wrap_future(store._writer.submit(lambda _: store._writer._disconnect()))
            assert store.put(entry("b"))
            await store.flush()
            assert "readonly" in str((await store.stats())["state"])
            assert await kept(store, "a", "b") == ["a", "b"]
        await until(lambda: store._writer.state == "ok" and not store._writer._pending)

    @pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
    async def test_a_read_only_directory(self, opened: Open, path: Path) -> None:
        store = await opened()
        await written(store, "a")
        await store.close()
        path.chmod(0o400)
        path.parent.chmod(0o500)
        try:
            again = await opened()
            assert again.put(entry("b"))
            await again.flush()
            assert await kept(again, "b") == ["b"]
        finally:
            path.parent.chmod(0o700)
            path.chmod(0o600)
        await until(lambda: again._writer.state == "ok")

    async def test_locked_by_another_process(self, opened: Open, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(writer_thread, "BUSY", 0.1)
        store = await opened()
        await written(store, "a")
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert store.put(entry("b"))
            assert await kept(store, "a", "b") == ["a", "b"]  # a read that needed the lock would be a miss
            with pytest.raises(StoreError, match="locked"):
                await store.purge(Filter(key="a"))
            other.execute("COMMIT")
        await until(lambda: not store._writer._pending and store._writer.state == "ok")
        assert await kept(store, "a", "b") == ["a", "b"]

    async def test_a_file_that_another_process_is_creating(
        self, opened: Open, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sqlite_file, "_MAX_LOCK_WAIT", 0.1)
        sqlite_file.make_private(path)
        with open(f"{path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            store = await opened()
            assert (await store.stats())["state"] != "ok"
        await until(lambda: store._writer.state == "ok")

    @pytest.mark.parametrize(("code", "works"), [(errno.ENOLCK, True), (errno.EIO, False)])
    async def test_a_file_system_without_locks(
        self, opened: Open, monkeypatch: pytest.MonkeyPatch, code: int, works: bool
    ) -> None:
        def broken(*_: object) -> None:
            raise OSError(code, "no locks here")

        monkeypatch.setattr(fcntl, "flock", broken)
        store = await opened()
        assert ((await store.stats())["state"] == "ok") == works

    async def test_an_entry_that_cannot_be_written_does_not_affect_others(
        self, opened: Open, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = await opened()
        for key in ("a", "\ud800", "b"):
            assert store.put(entry(key))
        await store.flush()
        assert await kept(store, "a", "b") == ["a", "b"]
        assert (await store.stats())["dropped"] == 1

    async def test_an_exception_does_not_end_the_writer_thread(
        self, opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = await opened()
        with monkeypatch.context() as patch:
            patch.setattr(store._writer, "_write_batch", lambda *_: 1 / 0)
            store.put(entry("a"))
            await store.flush()
        await written(store, "b")
        assert await kept(store, "a", "b") == ["b"]
        assert "ZeroDivisionError" in caplog.text

    async def test_a_job_that_fails_leaves_no_reference_cycle(self, opened: Open) -> None:
        store = await opened()
        found = Counter[str]()
        with uncollected(found, ours=True):
            assert isinstance(store._writer.submit(lambda _: 1 / 0).exception(10), ZeroDivisionError)
            assert isinstance(store._writer.submit(lambda it: it.execute("no SQL")).exception(10), StoreError)
            await store.flush()
        assert not found

    async def test_a_read_beyond_the_deadline_is_a_miss(self, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        store = await opened()
        await written(store, "a", body=random.randbytes(300_000))
        assert await kept(store, "a") == ["a"]
        finished = threading.Event()
        monkeypatch.setattr(sqlite, "_read_long", lambda *_: finished.wait(30))
        try:
            assert await kept(store, "a") == []  # while the read goes on
        finally:
            finished.set()

    async def test_use_after_close(self, path: Path) -> None:
        store = SQLiteStore(path, 2**26, 2**20)
        await store.close()
        store = SQLiteStore(path, 2**26, 2**20)
        await store.open()
        await store.close()
        assert not store.put(entry())
        assert await kept(store, "k") == []
        with pytest.raises(StoreError, match="closed"):
            await store.purge(ALL)


def _start(path: Path, number: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cache.stores.writer_process", str(path), str(number)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready ok\n"
    return process


@pytest.mark.slow
async def test_a_process_killed_while_writing_leaves_a_valid_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two processes write to one file and are killed at any time, again and again: no torn entry, no repair."""
    monkeypatch.setattr(sqlite, "OPENING", 60.0)
    dice = random.Random(3)
    for _ in range(ROUNDS):
        processes = await asyncio.gather(*(asyncio.to_thread(_start, path, which) for which in range(2)))
        await asyncio.sleep(dice.uniform(0.05, 0.4))
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()
        store = SQLiteStore(path, 2**23, 2**20)
        await store.open()
        assert store._writer.state == "ok"
        after, seen = "", 0
        while True:
            page = await store.list(after=after)
            for listed in page.entries:
                found = await store.get(listed.entry.key, "json", time.time())
                assert found is not None
                assert found.body.startswith(body_of(found.key))
                seen += 1
            after = page.next
            if not after:
                break
        stats = await store.stats()
        assert seen > 0
        assert stats["rejected"] == stats["read_errors"] == stats["moved_aside"] == 0
        assert stats["state"] == "ok"
        await store.close()
        with closing(sqlite3.connect(path)) as check:
            assert check.execute("PRAGMA quick_check").fetchone() == ("ok",)
    assert path.stat().st_size < 2**23 + 2**20
    assert not caplog.records


@pytest.mark.slow
async def test_several_processes_start_at_once(path: Path) -> None:
    processes = await asyncio.gather(*(asyncio.to_thread(_start, path, number) for number in range(3)))
    await asyncio.sleep(0.3)
    for process in processes:
        process.kill()
        process.communicate()
    assert not list(path.parent.glob("*corrupt*"))


@pytest.mark.slow
def test_only_the_named_driver_is_imported() -> None:
    script = (
        "import sys, proxy.cache.stores.tiered, proxy.cache.stores.memory, proxy.app\n"
        "print(sorted({'redis', 'proxy.cache.stores.sqlite', 'proxy.cache.stores.redis'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", script], cwd=ROOT) == b"[]\n"


@pytest.mark.parametrize("value", ["text", 17, 1.5, None, b"", "\N{SNOWMAN}" * 100])
@pytest.mark.parametrize("column", ["head", "body", "size", "stored_at", "bare"])
async def test_a_value_of_another_storage_class_is_a_miss(opened: Open, path: Path, column: str, value: object) -> None:
    """Other programs can write to the file, and any type into any column (sqlite.org, *Datatypes in SQLite*)."""
    store = await opened()
    await written(store, "odd", "good")
    with closing(sqlite3.connect(path)) as connection, contextlib.suppress(sqlite3.IntegrityError), connection:
        connection.execute(f"UPDATE {TABLE} SET {column}=? WHERE key='odd'", (value,))
    found = await store.get("odd", "json", NOW)
    assert found is None or found == entry("odd")  # as long as head and body are whole
    assert await store.get_many(["odd", "good"], "json", NOW) == [found, entry("good")]
    assert await store.newest("good", "json", NOW) == entry("good")
    page = await store.list()
    assert [one.entry.key for one in page.entries] in (["odd", "good"], ["good"])
    assert entry("good") in await store.read([("odd", "json"), ("good", "json")])
    assert (await store.stats())["entries"] == 2
    assert await store.purge(ALL) == 2
