"""The one thread that writes to the ledger's file: whatever has gathered, in one transaction.

Trouble (disk full, read-only, locked) never reaches who records: rows wait, up to a bound, equal hits are then counted
together, and what is beyond is lost and said so. The file is tried again every second. Damage moves the file aside, and
a new one takes its place.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ...system import sqlite as files
from ..receipt import Receipt
from . import file as ledger
from .records import HitCounter, LedgerRecord, RecordKind, kind_id, kind_of, record_of
from .reporting import ReportRow

log = logging.getLogger("proxy.ledger")

LedgerBatch = tuple[Sequence[tuple[Receipt, int]], Sequence[HitCounter], int, threading.Event | None]
"""Receipts with how many requests each stands for, hits, how many were lost before, and whom to tell."""

MOST_WAITING: Final = 50_000
"""Rows that wait for the file to work again: about 25 MB."""

BUSY: Final = 5.0
"""Seconds the writer waits for another process's transaction; nobody waits for the writer."""

_RETRY: Final = 1.0
_SAY_EVERY: Final = 600.0
_ASIDE_EVERY: Final = 600.0
_KINDS_KNOWN: Final = 20_000
_SUMMED: Final = ("requests", "attempts", "prompt", "cached", "completion", "total")


class LedgerWriter:
    """Owns the writing connection and what waits for it. put and close: from any thread.

    state: "ok", or what is wrong; lost: requests that nobody will find in the file.
    """

    def __init__(self, path: Path, place: int, totals: ReportRow) -> None:
        """place: the number of the process's first row; totals: everything is added to them."""
        self.path = path
        self._totals = totals
        self.state = "not open"
        self.lost = 0
        self._place = place
        self._wake = threading.Condition()
        self._batches: deque[LedgerBatch] = deque()
        self._closing = False
        # Below: the thread's own.
        self._rows: list[tuple[int, LedgerRecord]] = []
        self._folded: dict[tuple[int, int | None], int] = {}
        self._kinds: dict[RecordKind, int] = {}
        self._new_kinds: dict[int, RecordKind] = {}
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._retry_at = 0.0
        self._say_at = 0.0
        self._aside_at = -math.inf
        self._said_lost = 0
        self._ailing = False
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)

    # -- from any thread -----------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """For people. waiting: rows that are not yet in the file."""
        return {"state": self.state, "waiting": len(self._rows), "lost": self.lost}

    def start(self) -> None:
        """Starts the thread, which opens the file at once: what is wrong with it is said at the start."""
        self.put((), ())
        self._thread.start()

    def put(
        self,
        receipts: Sequence[tuple[Receipt, int]],
        hits: Sequence[HitCounter],
        lost: int = 0,
        done: threading.Event | None = None,
    ) -> None:
        with self._wake:
            self._batches.append((receipts, hits, lost, done))
            self._wake.notify()

    def close(self, patience: float) -> None:
        """Writes what waits and ends the thread; after `patience` seconds it is left to itself."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(patience)
            if self._thread.is_alive():
                log.error("ledger %s: not written in time; %d rows are not recorded", self.path, len(self._rows))

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                if not (self._batches or self._closing):
                    self._wake.wait(None if self._connection is not None and not self._rows else _RETRY)
                closing = self._closing
            told = self._take()
            try:
                self._write()
            except Exception as error:  # a bug must not end the thread either
                self._failed(error)
            for done in told:
                done.set()
            if closing:
                break
        self._disconnect()
        if self._rows:
            self.lost += sum(record.requests for _, record in self._rows)
            log.error("ledger %s: %s; %d requests are not recorded", self.path, self.state, self.lost)

    def _take(self) -> list[threading.Event]:
        """Makes rows of what came: few bytes each, however long it must wait. Whom to tell when they are written."""
        told = []
        while self._batches:
            receipts, hits, lost, done = self._batches.popleft()
            self.lost += lost
            for receipt, count in receipts:
                self._add(receipt, count)
            for one in hits:
                self._add(one.receipt(), one.count)
            if done is not None:
                told.append(done)
        return told

    def _add(self, receipt: Receipt, count: int) -> None:
        try:
            kind = kind_of(receipt)
            number = self._kinds.get(kind)
            if number is None:
                number = self._learn(kind)
            record = record_of(receipt, number, count)
            self._totals.add(kind, record)
        except Exception as error:
            log.error("a request cannot be recorded: %r", error)
            self.lost += count
            return
        if len(self._rows) < MOST_WAITING:
            self._place += 1
            self._rows.append((self._place, record))
        elif not (kind.cache == "hit" and self._fold(record)):
            self.lost += count

    def _learn(self, kind: RecordKind) -> int:
        number = self._kinds[kind] = kind_id(kind)
        self._new_kinds[number] = kind
        return number

    def _fold(self, record: LedgerRecord) -> bool:
        """Adds hits to equal ones that wait; whether there were any."""
        if not self._folded:
            self._folded = {(row.kind, row.digest): index for index, (_, row) in enumerate(self._rows)}
        index = self._folded.get((record.kind, record.digest))
        if index is None:
            return False
        place, row = self._rows[index]
        if row.rest is not None or record.rest is not None:
            return False
        summed = {name: getattr(row, name) + getattr(record, name) for name in _SUMMED}
        saved = row.saved + record.saved if row.saved is not None and record.saved is not None else row.saved
        self._rows[index] = place, row._replace(saved=saved, **summed)
        return True

    def _write(self) -> None:
        """Everything that waits, in one transaction. Raises what SQLite and the file system raise."""
        if self._connection is not None and files.identity(self.path) != self._identity:
            self._disconnect()  # removed, or moved aside by another process
        if self._connection is None:
            if time.monotonic() < self._retry_at and not self._closing:
                return
            self._open()
        connection = self._connection
        assert connection is not None
        if self._rows:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(ledger.PUT_KIND, map(ledger.kind_row, self._new_kinds, self._new_kinds.values()))
            connection.executemany(ledger.PUT_ROW, ((row.time, place, *row[1:]) for place, row in self._rows))
            connection.execute("COMMIT")  # where this is not reached, `_failed` closes the connection: a rollback
            self._rows, self._folded, self._new_kinds = [], {}, {}
            if len(self._kinds) > _KINDS_KNOWN:
                self._kinds.clear()
        self._well()

    # -- opening, trouble, damage --------------------------------------------------------------------------------------

    def _open(self) -> None:
        was = files.identity(self.path)
        try:
            self._connection = ledger.open_to_write(self.path, BUSY)
        except sqlite3.Error as error:
            if not files.is_damage(error):
                raise
            self._put_aside(was, error)
            self._connection = ledger.open_to_write(self.path, BUSY)
        self._identity = files.identity(self.path)
        self._new_kinds = {number: kind for kind, number in self._kinds.items()}

    def _failed(self, error: Exception) -> None:
        """Says what is wrong, and gets out of its way; rows wait for the next attempt."""
        was = self._identity
        self._disconnect()
        if not isinstance(error, sqlite3.Error | OSError | files.NotOurFile):
            log.exception("ledger %s: unexpected", self.path, exc_info=error)
            self.lost += sum(record.requests for _, record in self._rows)
            self._rows, self._folded = [], {}  # else the same would happen again and again
        if files.is_damage(error):
            try:
                self._put_aside(was, error)
                self._write()
                return
            except Exception as another:
                self._disconnect()
                error = another
        self.state = str(error) or type(error).__name__
        now = time.monotonic()
        self._retry_at = now + _RETRY
        if now >= self._say_at or (self.lost and not self._said_lost):
            self._say_at = now + _SAY_EVERY
            self._said_lost = self.lost
            self._ailing = True
            log.log(
                logging.ERROR if self.lost else logging.WARNING,
                "ledger %s: %s; answers are not affected (%d rows waiting, %d requests lost)",
                *(self.path, self.state, len(self._rows), self.lost),
            )

    def _well(self) -> None:
        if self._ailing:
            log.warning("ledger %s works again (%d requests lost)", self.path, self.lost)
        self._ailing = False
        self.state = "ok"

    def _put_aside(self, was: tuple[int, int] | None, error: Exception) -> None:
        """Moves the damaged file away; not oftener than every ten minutes, or a failing disk would fill up."""
        if time.monotonic() < self._aside_at + _ASIDE_EVERY:
            raise error
        target = files.move_aside(self.path, was)
        if target is not None:
            self._aside_at = time.monotonic()
            log.error("ledger %s is damaged (%s): moved to %s, starting a new one", self.path, error, target.name)

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None
