"""The thread that writes to the ledger's file: everything that waits, in one transaction.

While the file does not work, rows wait, up to a bound. Beyond it hits of the same kind and cache key are added up in
one row, and what cannot be added is counted as lost.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ...system.sqlite_writer import RETRY, SQLiteWriter
from ..receipt import Receipt
from . import file as ledger
from .records import HitCounter, LedgerRecord, RecordKind, kind_id, kind_of, record_of
from .reporting import ReportRow

log = logging.getLogger("proxy.ledger")

LedgerBatch = tuple[Sequence[tuple[Receipt, int]], Sequence[HitCounter], int, threading.Event | None]
"""Receipts with how many requests each stands for, hits, how many were lost before, and an event to set."""

MAX_WAITING: Final = 50_000
"""Rows that may wait until the file works again: about 25 MB."""

_KINDS_KNOWN: Final = 20_000
_SUMMED: Final = ("requests", "attempts", "prompt", "cached", "completion", "total")


class LedgerWriter(SQLiteWriter):
    """Owns the writing connection and what waits for it. `put`, `facts` and `close` may be called from any thread.

    lost: requests that are not in the file and never will be.
    """

    layout = ledger.LAYOUT
    log = log
    name = "ledger"
    effect = "answers are not affected"
    lost_level = logging.ERROR
    report_every = 600.0

    def __init__(self, path: Path, place: int, totals: ReportRow) -> None:
        """place: the number of the process's first row; totals: every request is added to them."""
        super().__init__(path)
        self._totals = totals
        self._place = place
        self._batches: deque[LedgerBatch] = deque()
        # Below: the thread's own.
        self._done: list[threading.Event] = []
        self._rows: list[tuple[int, LedgerRecord]] = []
        self._folded: dict[tuple[int, int | None], int] = {}
        self._kinds: dict[RecordKind, int] = {}
        self._new_kinds: dict[int, RecordKind] = {}

    # -- from any thread -----------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """Return the state for operators. waiting: rows that are not yet in the file."""
        return {"state": self.state, "waiting": len(self._rows), "lost": self.lost}

    def start(self) -> None:
        """Start the thread, which opens the file at once, so that errors are reported at the start."""
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

    def close(self, max_wait: float) -> None:
        super().close(max_wait)
        if self._thread.is_alive():
            log.error("ledger %s: not written in time; %d rows are not recorded", self.path, len(self._rows))

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _pause(self) -> float | None:
        if self._batches:
            return 0.0
        return None if self._connection is not None and not self._rows else RETRY

    def _round(self) -> None:
        self._take()
        super()._round()

    def _opened(self) -> None:
        self._new_kinds = {number: kind for kind, number in self._kinds.items()}

    def _write(self, connection: sqlite3.Connection) -> None:
        if self._rows:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(ledger.PUT_KIND, map(ledger.kind_row, self._new_kinds, self._new_kinds.values()))
            connection.executemany(ledger.PUT_ROW, ((row.time, place, *row[1:]) for place, row in self._rows))
            connection.execute("COMMIT")
            self._rows, self._folded, self._new_kinds = [], {}, {}
            if len(self._kinds) > _KINDS_KNOWN:
                self._kinds.clear()

    def _not_written(self, keep: bool) -> None:
        if not keep:
            self.lost += sum(record.requests for _, record in self._rows)
            self._rows, self._folded = [], {}  # otherwise the same would happen again and again

    def _after_round(self) -> None:
        done, self._done = self._done, []
        for event in done:
            event.set()

    def _waiting(self) -> int:
        return len(self._rows)

    def _amounts(self) -> str:
        return f"{len(self._rows)} rows waiting, {self.lost} requests lost"

    def _ended(self) -> None:
        if self._rows:
            self.lost += sum(record.requests for _, record in self._rows)
            log.error("ledger %s: %s; %d requests are not recorded", self.path, self.state, self.lost)

    def _take(self) -> None:
        """Make rows of what came: they take few bytes, however long they must wait."""
        while self._batches:
            receipts, hits, lost, done = self._batches.popleft()
            self.lost += lost
            for receipt, count in receipts:
                self._add(receipt, count)
            for one in hits:
                self._add(one.receipt(), one.count)
            if done is not None:
                self._done.append(done)

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
        if len(self._rows) < MAX_WAITING:
            self._place += 1
            self._rows.append((self._place, record))
        elif not (kind.cache == "hit" and self._fold(record)):
            self.lost += count

    def _learn(self, kind: RecordKind) -> int:
        number = self._kinds[kind] = kind_id(kind)
        self._new_kinds[number] = kind
        return number

    def _fold(self, record: LedgerRecord) -> bool:
        """Add hits to a waiting row of the same kind and digest. Return whether there was one."""
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
