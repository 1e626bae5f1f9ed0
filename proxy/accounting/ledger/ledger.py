"""The ledger: what each request was and cost, in a SQLite file. Counts, costs and names, never text or credentials.

Who serves requests only puts receipts into a list, and counts equal hits together (about a microsecond each). A few
times a second `flush` hands both to a thread, which writes them (`writer.py`). Reports read the file themselves
(`reader.py`), from any process. Without a path nothing is written, and only the totals since the start are known.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from ...cache.entry import Entry
from ...system.clock import Clock
from ..receipt import Receipt
from . import reader
from .reader import Span
from .records import HitCounter, error_receipt, kind_of, record_of
from .reporting import ReportRow
from .writer import LedgerWriter

FLUSH_INTERVAL: Final = 0.25
"""Seconds between two flushes: a killed process loses so much, and what its last commit was still writing."""

CLOSE_TIMEOUT: Final = 5.0
"""Seconds a clean stop waits for the file."""

MAX_WAITING: Final = 50_000
"""Receipts, and different hits, between two flushes; what is beyond is counted as lost."""


log = logging.getLogger("proxy.ledger")


class Ledger:
    """The records of one process. `hit`, `record` and `refused` are on the way of requests, on the event loop alone."""

    def __init__(self, path: str | None, clock: Clock) -> None:
        self.path = _place(path) if path is not None else None
        self.since_start = ReportRow()
        self._clock = clock
        self._receipts: list[Receipt] = []
        self._hits: dict[tuple[object, ...], HitCounter] = {}
        self._refused: dict[tuple[str, int, str, str], int] = {}
        self._lost = 0
        self._reading = asyncio.Lock()
        self._writer: LedgerWriter | None = None
        if self.path is not None:
            self._writer = LedgerWriter(self.path, int(clock.new_id()[:10], 16), self.since_start)

    # -- every request -------------------------------------------------------------------------------------------------

    def hit(self, entry: Entry, client: str, tags: tuple[str, ...], run: str, wall: float, spent: float) -> None:
        """One hit, served at `wall` within `spent` milliseconds."""
        name = (entry.key, entry.form, client, tags, run)
        hits = self._hits.get(name)
        if hits is not None:
            hits.count += 1
            hits.milliseconds += spent
        elif len(self._hits) < MAX_WAITING:
            self._hits[name] = HitCounter(entry, client, tags, run, wall, spent)
        else:
            self._lost += 1

    def record(self, receipt: Receipt) -> None:
        """One request that was no hit."""
        if len(self._receipts) < MAX_WAITING:
            self._receipts.append(receipt)
        else:
            self._lost += 1

    def refused(self, code: str, status: int, client: str, endpoint: str) -> None:
        """One request that was turned away before it became a call. Few rows come of many, whoever sends them."""
        name = (code, status, client, endpoint)
        self._refused[name] = self._refused.get(name, 0) + 1

    # -- in the background ---------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Starts the writer. What is wrong with the file is logged, and costs no answer."""
        if self._writer is not None:
            self._writer.start()

    async def run(self) -> None:
        """Flushes now and then, forever."""
        while True:
            await self._clock.sleep(FLUSH_INTERVAL)
            self.flush()

    def flush(self, done: threading.Event | None = None) -> None:
        """Hands over what has gathered. done: set when it has been counted, and written where that is possible."""
        lost, self._lost = self._lost, 0
        receipts = [(receipt, 1) for receipt in self._receipts]
        if self._refused:
            wall = self._clock.wall()
            receipts += [(error_receipt(*name, wall), count) for name, count in self._refused.items()]
        hits = list(self._hits.values())
        self._receipts, self._hits, self._refused = [], {}, {}
        if self._writer is not None:
            if receipts or hits or lost or done is not None:
                self._writer.put(receipts, hits, lost, done)
            return
        for receipt, count in receipts + [(one.receipt(), one.count) for one in hits]:
            self.since_start.add(kind_of(receipt), record_of(receipt, 0, count))
        if done is not None:
            done.set()

    async def close(self) -> None:
        """Writes what is left."""
        self.flush()
        if self._writer is not None:
            await asyncio.to_thread(self._writer.close, CLOSE_TIMEOUT)

    # -- questions -----------------------------------------------------------------------------------------------------

    async def totals(self) -> dict[str, Any]:
        """Since the start of this process, once they are in the file."""
        done = threading.Event()
        self.flush(done)
        await asyncio.to_thread(done.wait, 1.0)
        answer: dict[str, Any] = {"since_start": self.since_start.as_json(), "ledger": None}
        if self.path is not None and self._writer is not None:
            answer["ledger"] = {"path": str(self.path), **self._writer.facts()}
        return answer

    async def usage(self, by: Sequence[str], span: Span) -> dict[str, Any]:
        """Totals since the start of this process, and what the file says of all that write to it."""
        answer = await self.totals()
        if self.path is None or self._writer is None:
            return answer
        async with self._reading:  # one at a time: a large file takes seconds, which the event loop feels
            try:
                rows, total = await asyncio.to_thread(reader.report, self.path, by, span)
            except reader.LedgerMissing as error:
                return answer | {"rows": [], "total": None, "trouble": str(error)}
        return answer | {"by": list(by), "rows": rows, "total": total}

    async def spent(self, since: float, client: str | None = None) -> Decimal:
        """USD that requests since then (Unix seconds) cost by the file, of one client or of all: budgets at start."""
        if self.path is None:
            return Decimal(0)
        return await asyncio.to_thread(reader.spent, self.path, since, client)


def _place(path: str) -> Path | None:
    """Where it is; None where `~` stands for nothing, as in a container without HOME."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        log.warning("ledger %s: there is no home directory; nothing is recorded", path)
        return None
    return Path(found)
