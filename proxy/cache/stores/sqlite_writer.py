"""The thread that writes to the cache file: it stores what was put, evicts, and deletes what has expired."""

from __future__ import annotations

import logging
import math
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, TypeVar

from ...system import sqlite as files
from ...system.sqlite_writer import SQLiteWriter
from ..codec import encode
from ..entry import Entry
from .interface import EntryName, StoreError
from .sqlite_file import LAYOUT, TABLE, tag_text

T = TypeVar("T")

MAX_PENDING: Final = 5000
MAX_PENDING_BYTES: Final = 64 * 1024 * 1024

_BATCH_BYTES: Final = 8 * 1024 * 1024
_SWEEP_EVERY: Final = 60.0
_TOUCH_EVERY: Final = 10.0
_CHUNK: Final = 500
_MAX_EVICTION: Final = 4 * _CHUNK

_PUT: Final = f"""
INSERT INTO {TABLE} (key, form, endpoint, model, namespace, tags, stored_at, ends_at, used, size, head, body, bare)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (key, form) DO UPDATE SET endpoint=excluded.endpoint, model=excluded.model, namespace=excluded.namespace,
tags=excluded.tags, stored_at=excluded.stored_at, ends_at=excluded.ends_at, used=excluded.used, size=excluded.size,
head=excluded.head, body=excluded.body, bare=excluded.bare"""
_TOUCH: Final = f"UPDATE {TABLE} SET used=max(used, ?) WHERE key=? AND form=?"
_OLDEST: Final = f"SELECT rowid, size FROM {TABLE} ORDER BY used LIMIT {_CHUNK}"
_SWEEP: Final = f"DELETE FROM {TABLE} WHERE rowid IN (SELECT rowid FROM {TABLE} WHERE ends_at <= ? LIMIT {_CHUNK})"
_DROP: Final = f"DELETE FROM {TABLE} WHERE rowid=?"


class CacheWriter(SQLiteWriter):
    """Owns the writing connection and what waits for it. `put`, `waiting`, `touch`, `submit`, `suspect`: any thread."""

    layout = LAYOUT
    log = logging.getLogger("proxy.cache")
    name = "cache file"
    effect = "answers are not kept on disk until it works again"
    lost_level = logging.WARNING
    report_every = 60.0

    def __init__(self, path: Path, max_size: int, grace: float, wall: Callable[[], float]) -> None:
        super().__init__(path)
        self._written = self._evictions = self._expirations = 0
        self._max_size = max_size
        self._batch_bytes = min(_BATCH_BYTES, max_size // 16)
        self._grace = grace
        self._wall = wall
        self._pending: dict[EntryName, Entry] = {}
        self._pending_bytes = 0
        self._writing: dict[EntryName, Entry] = {}
        self._touched: dict[EntryName, None] = {}
        self._accepted = self._taken = 0
        self._jobs: list[tuple[int, Callable[[sqlite3.Connection], Any], Future[Any]]] = []
        self._suspected = 0
        # Below: the thread's own.
        self._last_use = self._sweep_at = self._touch_at = 0.0

    # -- from any thread ----------------------------------------------------------------------------------------------

    def start(self) -> Future[None]:
        """Start the thread. The future is done after the first attempt to open the file."""
        attempt = self.submit(lambda _: None)
        self._thread.start()
        return attempt

    def put(self, entry: Entry) -> bool:
        name = (entry.key, entry.form)
        with self._wake:
            old = self._pending.pop(name, None)
            if old is not None:
                self._pending_bytes -= old.size
                self._taken += 1
            size = entry.size
            full = len(self._pending) >= MAX_PENDING or self._pending_bytes + size > MAX_PENDING_BYTES
            if full or self._closing:
                self.lost += 1
                return False
            self._pending[name] = entry
            self._pending_bytes += size
            self._accepted += 1
            self._wake.notify()
            return True

    def waiting(self, name: EntryName) -> Entry | None:
        """Return an entry that was put but is not yet in the file."""
        with self._wake:
            return self._pending.get(name) or self._writing.get(name)

    def touch(self, name: EntryName) -> None:
        """Note that an entry was used. Notes may be lost while the thread swaps the dict, which does no harm."""
        touched = self._touched
        if len(touched) < 10 * MAX_PENDING:
            touched[name] = None

    def submit(self, job: Callable[[sqlite3.Connection], T]) -> Future[T]:
        """Run `job` in the thread, after everything put so far. The future raises StoreError if the file fails."""
        future: Future[T] = Future()
        with self._wake:
            if self._closing:
                future.set_exception(StoreError("the cache file is closed"))
            else:
                self._jobs.append((self._accepted, job, future))
                self._wake.notify()
        return future

    def suspect(self, generation: int) -> None:
        """Note that a reader found damage in this generation of the file."""
        with self._wake:
            self._suspected = generation
            self._wake.notify()

    @property
    def counts(self) -> dict[str, int]:
        return {
            "written": self._written,
            "dropped": self.lost,
            "evictions": self._evictions,
            "expirations": self._expirations,
            "moved_aside": self.moved_aside,
        }

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _pause(self) -> float:
        now, unopened = time.monotonic(), self._connection is None
        suspected = self._suspected == self.generation != 0
        if self._jobs or (now >= self._retry_at and (self._pending or unopened or suspected)):
            return 0.0
        next_at = self._retry_at if unopened else min(self._sweep_at, self._touch_at)
        return min(max(next_at - now, 0.01), _TOUCH_EVERY)

    def _opened(self) -> None:
        self._sweep_at = min(self._sweep_at, time.monotonic() + 1.0)

    def _write(self, connection: sqlite3.Connection) -> None:
        if self._suspected == self.generation:
            raise files.DamagedFile("a read failed")
        batch, touched = self._take()
        if batch or touched:
            self._write_batch(connection, batch, touched)
        if time.monotonic() >= self._sweep_at:
            self._sweep(connection)

    def _not_written(self, keep: bool) -> None:
        with self._wake:
            for name, entry in self._writing.items():
                if not keep:
                    self.lost += 1
                elif name not in self._pending:
                    self._pending[name] = entry
                    self._pending_bytes += entry.size
                    self._taken -= 1
            self._writing = {}

    def _after_round(self) -> None:
        self._writing = {}
        self._run_jobs()

    def _waiting(self) -> int:
        return len(self._pending)

    def _amounts(self) -> str:
        return f"{len(self._pending)} waiting, {self.lost} lost"

    def _ended(self) -> None:
        with self._wake:
            left, self._jobs = self._jobs, []
        for _, _, future in left:
            future.set_exception(StoreError("the cache file is closed"))

    def _take(self) -> tuple[dict[EntryName, Entry], dict[EntryName, None]]:
        now = time.monotonic()
        with self._wake:
            size = 0
            while self._pending and size < self._batch_bytes:
                name = next(iter(self._pending))
                entry = self._pending.pop(name)
                self._writing[name] = entry
                size += entry.size
                self._taken += 1
            self._pending_bytes -= size
            touched: dict[EntryName, None] = {}
            if self._writing or now >= self._touch_at:
                touched, self._touched = self._touched, touched
                self._touch_at = now + _TOUCH_EVERY
            return self._writing, touched

    def _write_batch(
        self, connection: sqlite3.Connection, batch: dict[EntryName, Entry], touched: dict[EntryName, None]
    ) -> None:
        rows = [row for entry in batch.values() if (row := self._row(entry)) is not None]
        uses = [(self._now(), *name) for name in touched]
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(_TOUCH, uses)
        connection.executemany(_PUT, ((*row[:8], self._now(), *row[8:]) for row in rows))
        evicted = self._make_room(connection)
        connection.execute("COMMIT")
        self._written += len(rows)
        self._evictions += evicted

    def _row(self, entry: Entry) -> tuple[Any, ...] | None:
        try:
            head, body = encode(entry)
        except Exception as error:
            self.log.error("a cache entry cannot be written: %r", error)
            self.lost += 1
            return None
        tags = "".join(map(tag_text, entry.tags))
        where = (entry.key, entry.form, entry.endpoint, entry.model, entry.namespace, tags)
        return (*where, entry.stored_at, entry.expires_at, len(head) + len(body), head, body, entry.bare)

    def _now(self) -> float:
        """Return the wall clock, but never the same value twice: entries of one batch keep their order."""
        self._last_use = max(self._wall(), self._last_use + 1e-6)
        return self._last_use

    def _make_room(self, connection: sqlite3.Connection) -> int:
        """Evict the least recently used until there is room for the next batch, and return how many entries."""
        dropped = 0
        while (over := files.used_bytes(connection) - (self._max_size - self._batch_bytes)) > 0:
            wanted = over + self._max_size // 100
            rows = []
            for rowid, size in connection.execute(_OLDEST).fetchall():
                rows.append((rowid,))
                wanted -= size
                if wanted <= 0:
                    break
            if not rows:
                break
            connection.executemany(_DROP, rows)
            dropped += len(rows)
            if dropped >= _MAX_EVICTION:
                break  # the bound was lowered: go on in the next round, so that no transaction becomes long
        return dropped

    def _sweep(self, connection: sqlite3.Connection) -> None:
        """Delete what has expired, a chunk in each round, and return free space to the disk."""
        dropped = 0
        if self._grace != math.inf:
            dropped = connection.execute(_SWEEP, (self._wall() - self._grace,)).rowcount
            self._expirations += dropped
        connection.execute("BEGIN IMMEDIATE")
        evicted = self._make_room(connection)
        connection.execute("COMMIT")
        self._evictions += evicted
        if dropped < _CHUNK and evicted < _MAX_EVICTION:  # otherwise the next round goes on
            self._sweep_at = time.monotonic() + _SWEEP_EVERY
            if (free := files.free_pages(connection)) * 4 * files.page_size(connection) > self._max_size // 16:
                connection.executescript(f"PRAGMA incremental_vacuum({max(1, free // 2)})")  # execute() stops at a page
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()  # the file shrinks only now

    def _run_jobs(self) -> None:
        with self._wake:
            due = [job for job in self._jobs if job[0] <= self._taken or self._connection is None]
            self._jobs = [job for job in self._jobs if job not in due]
        for _, job, future in due:
            if self._connection is None:
                future.set_exception(StoreError(f"cache file {self.path}: {self.state}"))
                continue
            try:
                future.set_result(job(self._connection))
            except sqlite3.Error as error:
                self._failed(error)
                future.set_exception(StoreError(f"cache file {self.path}: {error}"))
            except Exception as error:
                # Its traceback leads to this frame and so to the future: a reference cycle.
                self.log.exception("cache file %s: unexpected", self.path)
                future.set_exception(error.with_traceback(None))
