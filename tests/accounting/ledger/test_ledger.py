"""The ledger's file and its thread: what is put comes out, whatever happens to the disk, the file or the process."""

from __future__ import annotations

import asyncio
import logging
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from proxy.accounting.ledger import writer
from proxy.accounting.ledger.file import LAYOUT
from proxy.accounting.ledger.ledger import Ledger
from proxy.accounting.ledger.reader import LedgerMissing, Span, report, spent, what_if
from proxy.accounting.ledger.reporting import ReportRow, WhatIf
from proxy.accounting.ledger.writer import LedgerWriter
from proxy.accounting.receipt import Receipt
from proxy.cache.entry import Entry
from proxy.cache.stores.sqlite_file import LAYOUT as CACHE
from proxy.cost.usage import Usage
from proxy.system import sqlite as files
from proxy.system import sqlite_writer as writer_thread
from proxy.system.clock import SYSTEM_CLOCK
from proxy.system.sqlite import open_to_write
from tests.garbage import uncollected
from tests.launch import ROOT, environment

NOW = 1_800_000_000.0
"""2027-01-15T08:00:00Z."""

ALL = Span()


def receipt(**fields: Any) -> Receipt:
    base: dict[str, Any] = {"id": "a", "client": "", "endpoint": "chat", "model": "gpt-4o", "status": 200}
    base |= {"cache": "miss", "finished_at": NOW, "cost_usd": "0.002250", "saved_usd": "0.000000"}
    return Receipt(**(base | {"usage": Usage(100, 20, 120), "attempts": 1, "cache_key": "ab" * 32} | fields))


def entry(key: str = "ab" * 32, cost: str | None = "0.002250") -> Entry:
    usage = Usage(100, 20, 120)
    return Entry(key, "json", 200, (), b"x", None, NOW, 60.0, "chat", "gpt-4o", None, usage, cost, "", (), False)


def until(true: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "usage.db"


@pytest.fixture
def running(path: Path) -> Iterator[LedgerWriter]:
    """A writer at work; ended after the test."""
    one = LedgerWriter(path, 1, ReportRow())
    one.start()
    yield one
    one.close(10.0)


def put(one: LedgerWriter, *receipts: Receipt) -> None:
    """Returns when they were tried to be written."""
    done = threading.Event()
    one.put([(each, 1) for each in receipts], (), done=done)
    assert done.wait(20)


def total(path: Path) -> dict[str, Any]:
    return report(path, ["day"], ALL)[1]


async def test_hits_misses_and_refusals(path: Path) -> None:
    ledger = Ledger(str(path), SYSTEM_CLOCK)
    ledger.open()
    for _ in range(3):
        ledger.hit(entry(), "anna", ("team:a",), "nightly", NOW, 0.25)
    ledger.hit(entry(cost=None), "ben", (), "", NOW, 0.5)
    ledger.record(receipt(client="anna", total_ms=700.0, first_byte_ms=90.0))
    for _ in range(5):
        ledger.refused("invalid_json", 400, "", "chat")
    page = await ledger.usage(["client"], Span(NOW - 1e9))
    assert page["since_start"]["requests"] == page["total"]["requests"] == 10
    assert page["ledger"] == {"path": str(path), "state": "ok", "waiting": 0, "lost": 0}
    by_client = {row["client"]: row for row in page["rows"]}
    anna = by_client["anna"]
    assert (anna["requests"], anna["hits"], anna["cost_usd"], anna["saved_usd"]) == (4, 3, "0.002250", "0.006750")
    assert (anna["p50_ms"], anna["p99_ms"], anna["first_byte_p99_ms"]) == (0.2, 700.0, 90.0)
    assert (by_client["ben"]["hits"], by_client["ben"]["saved_usd"]) == (1, "0.000000")
    assert (by_client[None]["errors"], by_client[None]["requests"]) == (5, 5)
    await ledger.close()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM rows_v1").fetchone() == (4,)


async def test_pending_rows_are_written_at_the_stop(path: Path) -> None:
    ledger = Ledger(str(path), SYSTEM_CLOCK)
    ledger.open()
    for number in range(1000):
        ledger.record(receipt(id=str(number)))
    ledger.hit(entry(), "", (), "", NOW, 0.1)
    await ledger.close()
    assert (total(path)["requests"], total(path)["cost_usd"]) == (1001, "2.250000")


async def test_without_a_path_only_totals_are_kept(tmp_path: Path) -> None:
    ledger = Ledger(None, SYSTEM_CLOCK)
    ledger.open()
    ledger.record(receipt())
    ledger.hit(entry(), "", (), "", NOW, 0.1)
    page = await ledger.usage(["day"], ALL)
    assert (page["since_start"]["requests"], page["since_start"]["saved_usd"]) == (2, "0.002250")
    assert page["ledger"] is None
    assert await ledger.spent(0.0) == 0
    await ledger.close()
    assert list(tmp_path.iterdir()) == []


async def test_rows_are_flushed_periodically(path: Path) -> None:
    ledger = Ledger(str(path), SYSTEM_CLOCK)
    ledger.open()
    task = asyncio.create_task(ledger.run())
    ledger.record(receipt())
    await asyncio.to_thread(until, lambda: ledger._writer is not None and ledger._writer.state == "ok")
    await asyncio.to_thread(until, lambda: total(path)["requests"] == 1)
    task.cancel()
    await ledger.close()


async def test_spending_by_client_and_period(path: Path) -> None:
    ledger = Ledger(str(path), SYSTEM_CLOCK)
    assert await ledger.spent(0.0) == 0  # no file yet
    ledger.open()
    for client, at, cost in (
        ("anna", 0, "1"),
        ("anna", 10, "0.0000000000000001"),
        ("ben", 20, "2000"),
        ("ben", 5, None),
    ):
        ledger.record(receipt(client=client, finished_at=NOW + at, cost_usd=cost))
    await ledger.close()
    assert await ledger.spent(NOW) == Decimal("2001.0000000000000001")
    assert await ledger.spent(NOW + 10) == Decimal("2000.0000000000000001")
    assert await ledger.spent(NOW, "anna") == Decimal("1.0000000000000001")
    assert await ledger.spent(NOW, "nobody") == 0


def test_days_and_bounds(path: Path, running: LedgerWriter) -> None:
    put(running, *(receipt(finished_at=NOW + days * 86400) for days in (-40, 0, 0, 1)))
    rows, all_ = report(path, ["day"], ALL)
    assert [(row["day"], row["requests"]) for row in rows] == [
        ("2026-12-06", 1),
        ("2027-01-15", 2),
        ("2027-01-16", 1),
    ]
    assert [(row["month"], row["requests"]) for row in report(path, ["month"], ALL)[0]] == [
        ("2026-12", 1),
        ("2027-01", 3),
    ]
    assert all_["requests"] == 4
    assert report(path, ["day"], Span(NOW, NOW + 86400))[1]["requests"] == 2
    assert report(path, ["day"], Span(NOW + 1e6))[0] == []


def test_a_request_with_two_tags_counts_in_both_and_once_in_all(path: Path, running: LedgerWriter) -> None:
    put(running, receipt(tags=("team:a", "env:ci")), receipt(tags=("team:a",)), receipt())
    rows, all_ = report(path, ["tag"], ALL)
    assert {row["tag"]: row["requests"] for row in rows} == {"team:a": 2, "env:ci": 1, None: 1}
    assert all_["requests"] == 3


def test_the_what_if_report_of_another_ttl(path: Path, running: LedgerWriter) -> None:
    put(running, *(receipt(finished_at=NOW + hours * 3600) for hours in range(4)))
    found = what_if(path, ALL, WhatIf.parse("ttl=2h"))
    assert (found["hits"], found["what_if_hits"], found["what_if_saved_usd"]) == (0, 2, "0.004500")


def test_a_row_that_is_written_again_counts_once(path: Path, running: LedgerWriter) -> None:
    """When a commit fails it is not known whether it was one."""
    one = LedgerWriter(path, 1, ReportRow())
    one.put([(receipt(), 1)], ())
    one._take()
    rows = list(one._rows)
    one._round()
    one._rows = rows
    one._round()
    assert total(path)["requests"] == 1
    one._disconnect()


async def test_without_a_home_there_is_no_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    ledger = Ledger("~nobody-of-this-name/usage.db", SYSTEM_CLOCK)
    ledger.open()
    await ledger.close()
    assert list(tmp_path.iterdir()) == []
    assert any("no home directory" in record.getMessage() for record in caplog.records)


# --- trouble ----------------------------------------------------------------------------------------------------------


def test_a_locked_file_is_waited_for(path: Path, running: LedgerWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_thread, "BUSY", 0.05)
    put(running, receipt())
    with running._wake:
        running._identity = None  # it opens the file anew
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        put(running, receipt())
        assert "locked" in running.state
        assert running.facts()["waiting"] == 1
        other.execute("ROLLBACK")
    until(lambda: running.facts()["waiting"] == 0)
    assert total(path)["requests"] == 2


def test_a_full_disk(path: Path, running: LedgerWriter, caplog: pytest.LogCaptureFixture) -> None:
    """As SQLite tells it: the file may not grow."""
    put(running, receipt())

    def small(where: Path, busy: float, layout: files.Layout) -> sqlite3.Connection:
        connection = open_to_write(where, busy, layout)
        connection.execute("PRAGMA max_page_count=1")  # no smaller than it is
        return connection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("proxy.system.sqlite.open_to_write", small)
        with running._wake:
            running._identity = None  # it opens the file anew
        put(running, *(receipt(model=f"m-{number}") for number in range(5000)))
        assert "full" in running.state
        assert running.facts() == {"state": running.state, "waiting": 5000, "lost": 0}
    until(lambda: running.facts()["waiting"] == 0)
    assert total(path)["requests"] == 5001
    assert any("answers are not affected" in record.getMessage() for record in caplog.records)
    assert any("works again" in record.getMessage() for record in caplog.records)


def test_a_full_queue_joins_equal_hits_and_counts_lost_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writer, "MAX_WAITING", 10)
    (tmp_path / "file").write_text("")
    totals = ReportRow()
    one = LedgerWriter(tmp_path / "file" / "usage.db", 1, totals)
    one.start()
    ledger = Ledger(None, SYSTEM_CLOCK)

    def hits(of: Entry, count: int) -> None:
        for _ in range(count):
            ledger.hit(of, "", (), "", NOW, 0.1)

    hits(entry(), 3)
    waiting = list(ledger._hits.values())
    done = threading.Event()
    one.put([(receipt(), 1)] * 9, waiting, done=done)
    assert done.wait(10)
    assert one.facts() | {"state": ""} == {"state": "", "waiting": 10, "lost": 0}
    done = threading.Event()
    one.put([(receipt(), 1)] * 4, waiting * 2, lost=1, done=done)
    assert done.wait(10)
    assert one.facts() | {"state": ""} == {"state": "", "waiting": 10, "lost": 5}
    assert totals.requests == 9 + 3 + 4 + 6  # what is lost for the file is not for the totals
    (tmp_path / "file").unlink()
    until(lambda: one.facts()["waiting"] == 0)
    one.close(10)
    assert (total(one.path)["requests"], total(one.path)["hits"]) == (18, 9)
    assert total(one.path)["saved_usd"] == "0.020250"
    assert any("5 requests lost" in record.getMessage() for record in caplog.records)


async def test_dropped_rows_are_counted(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setattr("proxy.accounting.ledger.ledger.MAX_WAITING", 2)
    ledger = Ledger(str(path), SYSTEM_CLOCK)
    ledger.open()
    for number in range(4):
        ledger.record(receipt())
        ledger.hit(entry(f"{number:064x}"), "", (), "", NOW, 0.1)
    page = await ledger.usage(["day"], ALL)
    assert (page["total"]["requests"], page["ledger"]["lost"]) == (4, 4)
    await ledger.close()


@pytest.mark.parametrize("content", [b"no database at all" * 1000, None])
def test_a_damaged_file_is_moved_aside(path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    if content is None:
        first = LedgerWriter(path, 1, ReportRow())
        first.start()
        put(first, *(receipt(id=str(n), tags=(f"n:{n}",)) for n in range(2000)))
        first.close(10)
        whole = bytearray(path.read_bytes())
        whole[4096 * 2 :] = b"\xff" * (len(whole) - 4096 * 2)
        content = bytes(whole)
    path.write_bytes(content)
    one = LedgerWriter(path, 1, ReportRow())
    one.start()
    for _ in range(3):
        put(one, receipt())
    one.close(10)
    assert total(path)["requests"] == 3
    aside = [file for file in path.parent.iterdir() if ".corrupt-" in file.name]
    assert [file.read_bytes()[-100:] for file in aside if not file.name.endswith(("-wal", "-shm"))] == [content[-100:]]
    assert any("is damaged" in record.getMessage() for record in caplog.records)


def test_damage_leaves_no_reference_cycle(path: Path) -> None:
    """Neither the file that is moved aside nor the next one, which comes too soon for that."""
    path.write_text("no database " * 1000)
    found = Counter[str]()
    with uncollected(found, ours=True):
        one = LedgerWriter(path, 1, ReportRow())
        one.start()
        put(one, receipt())
        one.close(10)
        path.write_text("no database " * 1000)
        one = LedgerWriter(path, 1, ReportRow())
        one._moved_aside_at = time.monotonic()
        one.start()
        put(one, receipt())
        assert "not a database" in one.state
        one.close(10)
    assert not found


def test_another_programs_database_is_left_alone(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (a)")
    before = path.read_bytes()
    one = LedgerWriter(path, 1, ReportRow())
    one.start()
    put(one, receipt())
    assert one.state == "it is another program's database"
    one.close(10)
    assert path.read_bytes() == before
    with pytest.raises(LedgerMissing, match="is not a ledger"):
        report(path, ["day"], ALL)
    assert spent(path, 0.0) == 0


def test_a_removed_file_is_created_again(path: Path, running: LedgerWriter) -> None:
    put(running, receipt(client="anna"))
    path.unlink()
    put(running, receipt(client="anna"), receipt(client="ben"))
    assert {row["client"]: row["requests"] for row in report(path, ["client"], ALL)[0]} == {"anna": 1, "ben": 1}


def test_a_row_that_cannot_be_written_does_not_stop_the_others(
    path: Path, running: LedgerWriter, caplog: pytest.LogCaptureFixture
) -> None:
    put(running, receipt(cache_key="no hex"), receipt())
    assert running.lost == 1
    put(running, receipt(total_ms=1e300))
    assert running.lost == 2
    put(running, receipt())
    until(lambda: total(path)["requests"] == 2)
    assert [record.levelno for record in caplog.records if record.levelno >= logging.ERROR] != []


def test_an_unreadable_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(LedgerMissing, match="there is no ledger"):
        report(tmp_path / "none.db", ["day"], ALL)
    assert not (tmp_path / "none.db").exists()
    (tmp_path / "new.db").touch()
    with pytest.raises(LedgerMissing, match="still empty"):
        report(tmp_path / "new.db", ["day"], ALL)
    (tmp_path / "text.db").write_bytes(b"text" * 1000)
    with pytest.raises(LedgerMissing, match="cannot be read"):
        report(tmp_path / "text.db", ["day"], ALL)


def test_a_stop_that_takes_too_long_is_logged(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = LedgerWriter(path, 1, ReportRow())
    one.start()
    put(one, receipt())
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        one.put([(receipt(), 1)], ())
        one.close(0.2)
        assert any("not written in time" in record.getMessage() for record in caplog.records)
        other.execute("ROLLBACK")
    one._thread.join(10)
    assert total(path)["requests"] == 2


# --- several processes ------------------------------------------------------------------------------------------------

WRITES = """
import sys, threading
from tests.accounting.ledger.test_ledger import *
one = LedgerWriter(Path(sys.argv[1]), int(sys.argv[2]), ReportRow())
one.start()
for number in range(10**9):
    put(one, *(receipt(client=sys.argv[3]) for _ in range(10)))
    print(number, flush=True)
"""


@pytest.mark.slow
def test_a_process_killed_while_writing_beside_another_loses_little(
    path: Path, running: LedgerWriter, tmp_path: Path
) -> None:
    """What was said to be written is there, and the file is whole."""
    command = [sys.executable, "-c", WRITES, str(path)]
    processes = [
        subprocess.Popen(
            [*command, str(10**9 * number), f"c{number}"],
            cwd=ROOT,
            env=environment(tmp_path, {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in (1, 2)
    ]
    said = []
    for process in processes:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 20:
                break
        process.send_signal(signal.SIGKILL)
        said.append(int((process.stdout.read().split() or [line])[-1]) + 1)
        process.wait()
        process.stdout.close()
    put(running, receipt(client="c0"))
    counts = {row["client"]: row["requests"] for row in report(path, ["client"], ALL)[0]}
    assert counts["c0"] == 1
    for number, batches in zip((1, 2), said, strict=True):
        assert counts[f"c{number}"] % 10 == 0
        assert batches * 10 <= counts[f"c{number}"] <= (batches + 1) * 10
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_the_file_has_the_proxys_application_id(path: Path) -> None:
    connection = open_to_write(path, 1.0, LAYOUT)
    assert connection.execute("PRAGMA application_id").fetchone() == (LAYOUT.application_id,)
    assert CACHE.application_id != LAYOUT.application_id
    connection.close()
