"""Who made which stored object, in a file: kept over a restart, bounded, and no trouble to requests."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from proxy.upstream.keys import sqlite_owners
from proxy.upstream.keys.owner_table import KEPT_FOR, digest_of
from proxy.upstream.keys.sqlite_owners import SQLiteOwners, objects_file

pytestmark = pytest.mark.slow

ONE, TWO, THREE = (digest_of(f"file-{number}") for number in range(3))
NOW = 1_800_000_000.0


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_owners, "READ_DEADLINE", 60.0)


async def opened(path: Path, now: float = NOW) -> SQLiteOwners:
    owners = SQLiteOwners(str(path / "usage.db"), lambda: now)
    await owners.open()
    return owners


async def test_owners_are_kept_over_a_restart(tmp_path: Path) -> None:
    owners = await opened(tmp_path)
    assert await owners.get([ONE]) == {}
    assert list(tmp_path.iterdir()) == []  # nothing to remember, no file
    await owners.put([ONE, TWO], "m1\nanna\nname anna", False)
    await owners.put([ONE], "m2\n\n", False)
    await owners.put([TWO, THREE], "m3\n\n", True)
    await owners.close()
    assert await owners.get([ONE]) == {}
    again = await opened(tmp_path)
    assert await again.get([ONE, TWO, THREE]) == {ONE: "m2\n\n", TWO: "m1\nanna\nname anna", THREE: "m3\n\n"}
    await again.close()
    file = tmp_path / "usage.objects.db"
    assert file.stat().st_mode & 0o777 == 0o600
    assert b"file-1" not in file.read_bytes()


async def test_what_is_old_is_forgotten_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_owners, "_PRUNE_AFTER", 1)
    owners = await opened(tmp_path)
    await owners.put([ONE], "m1\n\n", False)
    await owners.close()
    later = await opened(tmp_path, NOW + KEPT_FOR + 1)
    assert await later.get([ONE]) == {}
    await later.put([ONE], "m2\n\n", True)  # who it was is forgotten
    await later.put([TWO], "m2\n\n", True)
    await later.close()
    again = await opened(tmp_path, NOW + KEPT_FOR + 1)
    assert await again.get([ONE, TWO]) == {ONE: "m2\n\n", TWO: "m2\n\n"}
    await again.close()
    with closing(sqlite3.connect(tmp_path / "usage.objects.db")) as connection:
        assert connection.execute("SELECT owner FROM owners_v1").fetchall() == [("m2\n\n",)]


async def test_the_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_owners, "_PRUNE_AFTER", 1)
    monkeypatch.setattr(sqlite_owners, "MAX_ROWS", 10)
    now = [NOW]
    owners = SQLiteOwners(str(tmp_path / "usage.db"), lambda: now[0])
    await owners.open()
    for number in range(30):
        now[0] += 1
        await owners.put([digest_of(str(number))], "m1\n\n", False)
    await owners.close()
    await owners.open()
    known = await owners.get([digest_of(str(number)) for number in range(30)])
    assert set(known) == {digest_of(str(number)) for number in range(20, 30)}
    await owners.close()


async def test_two_processes_share_the_file(tmp_path: Path) -> None:
    one, other = await opened(tmp_path), await opened(tmp_path)
    await asyncio.gather(*(owners.put([digest], "m1\n\n", False) for owners, digest in ((one, ONE), (other, TWO))))
    await asyncio.gather(one.close(), other.close())
    await one.open()
    assert set(await one.get([ONE, TWO])) == {ONE, TWO}
    await one.close()


async def test_a_file_that_does_not_work_harms_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "usage.objects.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE another (x)")
    before = file.read_bytes()
    owners = await opened(tmp_path)
    await owners.put([ONE], "m1\n\n", False)
    assert await owners.get([ONE]) == {}
    await owners.close()
    assert file.read_bytes() == before
    assert "remembered in memory" in caplog.text


async def test_a_late_file_counts_as_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_owners, "READ_DEADLINE", 0.0)
    owners = await opened(tmp_path)
    assert await owners.get([ONE]) == {}
    await owners.close()


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert objects_file("/data/usage.db") == Path("/data/usage.objects.db")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert objects_file("~/usage.db") is None
