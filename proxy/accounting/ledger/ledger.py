"""The ledger records each request and its cost in a SQLite file: counts, costs and names, never text or credentials.

On the event loop receipts are only put into a list, and hits of the same entry are counted together (about one
microsecond each). A few times a second `flush` hands both to a thread, which writes them (`writer.py`). Reports read
the file themselves (`reader.py`), in any process. Without a path nothing is written, and only the totals since the
start are known.
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
"""Seconds between two flushes: a killed process loses what came since the last one, and what was being written."""

CLOSE_TIMEOUT: Final = 5.0
"""Seconds for which a clean stop waits for the file."""

MAX_WAITING: Final = 50_000
"""Receipts, and different hits, between two flushes; what comes beyond that is counted as lost."""

log = logging.getLogger("proxy.ledger")


class Ledger:
    """The records of one process. Call `hit`, `record` and `refused` on the event loop only."""

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
        """Record a hit, served at `wall` (Unix seconds) within `spent` milliseconds."""
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
        """Record a request that was not a hit."""
        if len(self._receipts) < MAX_WAITING:
            self._receipts.append(receipt)
        else:
            self._lost += 1

    def refused(self, code: str, status: int, client: str, endpoint: str) -> None:
        """Record a request that was refused before it was parsed. Those of one client and error share a row."""
        name = (code, status, client, endpoint)
        self._refused[name] = self._refused.get(name, 0) + 1

    # -- in the background ---------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Start the writer. If something is wrong with the file it is logged, and requests are served all the same."""
        if self._writer is not None:
            self._writer.start()

    async def run(self) -> None:
        """Flush every `FLUSH_INTERVAL`, forever."""
        while True:
            await self._clock.sleep(FLUSH_INTERVAL)
            self.flush()

    def flush(self, done: threading.Event | None = None) -> None:
        """Hand over what has gathered. done: set once it is counted and, if the file works, written."""
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
        """Write what is left."""
        self.flush()
        if self._writer is not None:
            await asyncio.to_thread(self._writer.close, CLOSE_TIMEOUT)

    # -- questions -----------------------------------------------------------------------------------------------------

    async def totals(self) -> dict[str, Any]:
        """Return the totals since the start of this process, once they are in the file."""
        done = threading.Event()
        self.flush(done)
        await asyncio.to_thread(done.wait, 1.0)
        answer: dict[str, Any] = {"since_start": self.since_start.as_json(), "ledger": None}
        if self.path is not None and self._writer is not None:
            answer["ledger"] = {"path": str(self.path), **self._writer.facts()}
        return answer

    async def usage(self, by: Sequence[str], span: Span) -> dict[str, Any]:
        """Return the totals since the start of this process, and what the file says of all that write to it."""
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
        """Return the USD spent since a time (Unix seconds) by one client or by all, according to the file."""
        if self.path is None:
            return Decimal(0)
        return await asyncio.to_thread(reader.spent, self.path, since, client)


def _place(path: str) -> Path | None:
    """Return the path of the file; None if `~` stands for nothing, as in a container without HOME."""
    found = os.path.expanduser(path)
    if found.startswith("~"):
        log.warning("ledger %s: there is no home directory; nothing is recorded", path)
        return None
    return Path(found)
