"""The cassette file: merged as a whole or not at all, by one process at a time."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from proxy.cache.cassette import write
from proxy.cache.entry import Entry
from proxy.cache.stores import cassette as cassettes
from proxy.cache.stores.build import NullStore
from proxy.cache.stores.cassette import (
    CassetteError,
    RecordingStore,
    locked,
    merge_into,
    open_cassette,
    read_file,
    without_partition,
)
from proxy.cache.stores.interface import EntryName
from proxy.cache.stores.memory import MemoryStore
from proxy.system.clock import SYSTEM_CLOCK
from tests.cache.stores.kit import NOW, entry


def named(*entries: Entry) -> dict[EntryName, Entry]:
    return {(one.key, one.form): one for one in entries}


def lines(*entries: Entry) -> bytes:
    return b"".join(write(entries))


PLAIN = {"headers": ((b"content-type", b"application/json"),), "usage_span": None}


def one(key: str = "k", body: bytes = b"{}", **changes: object) -> Entry:
    return entry(key, body, **PLAIN | changes)


@pytest.mark.parametrize(
    ("held", "used", "merged"),
    [
        ([], [one()], [one()]),
        ([one("a")], [one("b")], [one("a"), one("b")]),
        ([one("a")], [], [one("a")]),
        ([one()], [one(form="sse")], [one(), one(form="sse")]),
        ([one()], [one(body=b"[]", stored_at=NOW + 1)], [one(body=b"[]", stored_at=NOW + 1)]),  # the newer answer
        ([one()], [one(body=b"[]", stored_at=NOW - 1)], [one()]),
        ([one()], [one(stored_at=NOW + 1)], [one()]),  # the same answer: the line stays
    ],
)
def test_entries_merged_into_the_file(
    tmp_path: Path, held: list[Entry], used: list[Entry], merged: list[Entry]
) -> None:
    file = tmp_path / "c"
    file.write_bytes(lines(*held))
    assert merge_into(str(file), named(*used)) == len(merged)
    assert file.read_bytes() == lines(*merged)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_symbolic_link_is_kept(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "c")
    merge_into(str(tmp_path / "link"), named(one()))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "c").stat().st_mode & 0o777 == 0o600


def test_the_newest_entry_of_several_clients_is_read(tmp_path: Path) -> None:
    """As `cache export` writes them: under the keys of several clients."""
    file = tmp_path / "c"
    old, new = one("x", bare="b"), one("a", b"[]", bare="b", stored_at=NOW + 1)
    file.write_bytes(lines(old, new))
    assert read_file(str(file)) == named(without_partition(new))


async def recorder(file: Path, *entries: Entry) -> RecordingStore:
    store = RecordingStore(MemoryStore(2**20, 2**18), None, str(file), SYSTEM_CLOCK)
    assert open_cassette(store, str(file)) == 0
    for each in entries:
        store.put(each)
    return store


@pytest.mark.parametrize("trouble", ["spoiled", "full"])
async def test_an_error_at_the_stop_is_logged_and_keeps_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    file = tmp_path / "c"
    store = await recorder(file, one())
    held = b"<<<<<<< HEAD\n" if trouble == "spoiled" else b""
    file.write_bytes(held)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    if trouble == "full":
        monkeypatch.setattr(os, "fsync", full)
    await store.close()
    assert file.read_bytes() == held
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert f"cassette {file}: what this run used could not be merged into it" in caplog.text


async def test_a_recorder_waits_for_the_lock_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c"
    store = await recorder(file, one())
    async with locked(str(file), SYSTEM_CLOCK):
        closing = asyncio.create_task(store.close())
        await asyncio.sleep(0.1)
        assert not file.exists()
    await closing
    assert file.read_bytes() == lines(one())
    monkeypatch.setattr(cassettes, "_LOCK_TRIES", 1)
    async with (
        locked(str(file), SYSTEM_CLOCK),
        locked(str(file), SYSTEM_CLOCK),
    ):  # whoever holds it for ever is not waited for so long
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_an_unwritable_place_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CassetteError, match="a place to write it to"):
        open_cassette(NullStore(), str(tmp_path / "c"))


def test_a_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CassetteError, match="expected a readable file, found: Is a directory"):
        read_file(str(tmp_path))
