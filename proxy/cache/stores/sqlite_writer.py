"""The one thread that writes to the cache file: whatever has gathered, in one transaction; then room, then a sweep.

Trouble (disk full, read-only, locked) never reaches who put: entries wait, up to a bound, the file is tried again every
second, and the log hears of it once a minute. Damage moves the file aside, and a new one takes its place.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, TypeVar

from ...system import sqlite as files
from ...system.sqlite import TABLE
from ..codec import encode
from ..entry import Entry
from .interface import EntryName, StoreError

log = logging.getLogger("proxy.cache")
T = TypeVar("T")

MOST_PENDING: Final = 5000
MOST_PENDING_BYTES: Final = 64 * 1024 * 1024
BUSY: Final = 5.0
"""Seconds the writer waits for another process's transaction; nobody waits for the writer."""

_BATCH_BYTES: Final = 8 * 1024 * 1024
_RETRY: Final = 1.0
_SAY_EVERY: Final = 60.0
_SWEEP_EVERY: Final = 60.0
_TOUCH_EVERY: Final = 10.0
_ASIDE_EVERY: Final = 600.0
_CHUNK: Final = 500
_LONGEST_EVICTION: Final = 4 * _CHUNK

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


class SQLiteWriter:
    """Owns the writing connection and what waits for it. put, pending, touch, submit and suspect: from any thread.

    generation: which opening of the file readers may use, 0 while there is none; state: "ok", or what is wrong.
    """

    def __init__(self, path: Path, max_size: int, grace: float, wall: Callable[[], float]) -> None:
        self.path = path
        self.generation = 0
        self.state = "not open"
        self.failures = 0
        self.counts = {"written": 0, "dropped": 0, "evictions": 0, "expirations": 0, "moved_aside": 0}
        self._max_size = max_size
        self._batch_bytes = min(_BATCH_BYTES, max_size // 16)
        self._grace = grace
        self._wall = wall
        self._tick = 0.0
        self._wake = threading.Condition()
        self._pending: dict[EntryName, Entry] = {}
        self._pending_bytes = 0
        self._writing: dict[EntryName, Entry] = {}
        self._touched: dict[EntryName, None] = {}
        self._accepted = self._taken = 0
        self._jobs: list[tuple[int, Callable[[sqlite3.Connection], Any], Future[Any]]] = []
        self._suspected = 0
        self._closing = False
        # Below: the thread's own.
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._retry_at = self._say_at = self._touch_at = 0.0
        self._aside_at = -math.inf
        self._said = False
        self._sweep_at = 0.0
        self._thread = threading.Thread(target=self._run, name="cache-writer", daemon=True)

    # -- from any thread ----------------------------------------------------------------------------------------------

    def start(self) -> Future[None]:
        """Starts the thread. The future is done after the first attempt to open the file."""
        tried = self.submit(lambda _: None)
        self._thread.start()
        return tried

    def put(self, entry: Entry) -> bool:
        name = (entry.key, entry.form)
        with self._wake:
            old = self._pending.pop(name, None)
            if old is not None:
                self._pending_bytes -= old.size
                self._taken += 1
            size = entry.size
            full = len(self._pending) >= MOST_PENDING or self._pending_bytes + size > MOST_PENDING_BYTES
            if full or self._closing:
                self.counts["dropped"] += 1
                return False
            self._pending[name] = entry
            self._pending_bytes += size
            self._accepted += 1
            self._wake.notify()
            return True

    def waiting(self, name: EntryName) -> Entry | None:
        """The entry, when it was put but is not yet in the file."""
        with self._wake:
            return self._pending.get(name) or self._writing.get(name)

    def touch(self, name: EntryName) -> None:
        touched = self._touched  # the thread swaps the dict: what goes into the old one meanwhile may be lost, no more
        if len(touched) < 10 * MOST_PENDING:
            touched[name] = None

    def submit(self, job: Callable[[sqlite3.Connection], T]) -> Future[T]:
        """Runs `job` in the thread, after everything put so far. The future raises StoreError in trouble."""
        future: Future[T] = Future()
        with self._wake:
            if self._closing:
                future.set_exception(StoreError("the cache file is closed"))
            else:
                self._jobs.append((self._accepted, job, future))
                self._wake.notify()
        return future

    def suspect(self, generation: int) -> None:
        """A reader found damage in this opening of the file."""
        with self._wake:
            self._suspected = generation
            self._wake.notify()

    def close(self, patience: float) -> None:
        """Writes what waits and ends the thread; after `patience` seconds it is left to itself."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(patience)

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                if not self._due():
                    self._wake.wait(self._nap())
                closing = self._closing
            try:
                self._round()
            except Exception as error:  # a bug must not end the thread either
                self._failed(error)
            self._writing = {}
            self._run_jobs()
            if closing and (self._connection is None or not self._pending):
                break
        self._disconnect()
        self.generation = 0
        with self._wake:
            left, self._jobs = self._jobs, []
        for _, _, future in left:
            future.set_exception(StoreError("the cache file is closed"))

    def _due(self) -> bool:
        if self._jobs or self._closing:
            return True
        ready = time.monotonic() >= self._retry_at
        return ready and (bool(self._pending) or self._connection is None or self._suspected == self.generation != 0)

    def _nap(self) -> float:
        """Seconds until there is something to do unasked."""
        next_at = self._retry_at if self._connection is None else min(self._sweep_at, self._touch_at)
        return min(max(next_at - time.monotonic(), 0.01), _TOUCH_EVERY)

    def _round(self) -> None:
        """Everything that is due, once. Raises what SQLite and the file system raise."""
        now = time.monotonic()
        if self._connection is not None and files.identity(self.path) != self._identity:
            self._disconnect()  # removed, or moved aside by another process
            self.generation = 0
        if self._suspected and self._suspected == self.generation:
            self._disconnect()
            self._put_aside(self._identity, sqlite3.DatabaseError("a read failed"))
        if self._connection is None:
            if now < self._retry_at:
                return
            self._open()
        connection = self._connection
        assert connection is not None
        batch, touched = self._take()
        if batch or touched:
            self._write(connection, batch, touched)
        if now >= self._sweep_at:
            self._sweep(connection)
        self._well()

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

    def _write(
        self, connection: sqlite3.Connection, batch: dict[EntryName, Entry], touched: dict[EntryName, None]
    ) -> None:
        rows = [row for entry in batch.values() if (row := self._row(entry)) is not None]
        uses = [(self._now(), *name) for name in touched]
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(_TOUCH, uses)
        connection.executemany(_PUT, ((*row[:8], self._now(), *row[8:]) for row in rows))
        evicted = self._make_room(connection)
        connection.execute("COMMIT")  # where this is not reached, `_failed` closes the connection: a rollback
        self.counts["written"] += len(rows)
        self.counts["evictions"] += evicted

    def _row(self, entry: Entry) -> tuple[Any, ...] | None:
        try:
            head, body = encode(entry)
        except Exception as error:
            log.error("an entry cannot be written: %r", error)
            self.counts["dropped"] += 1
            return None
        tags = "".join(map(files.tag_text, entry.tags))
        where = (entry.key, entry.form, entry.endpoint, entry.model, entry.namespace, tags)
        return (*where, entry.stored_at, entry.expires_at, len(head) + len(body), head, body, entry.bare)

    def _now(self) -> float:
        """The wall clock, but never twice the same: entries of one batch keep their order."""
        self._tick = max(self._wall(), self._tick + 1e-6)
        return self._tick

    def _make_room(self, connection: sqlite3.Connection) -> int:
        """Drops the least recently used until the file's content leaves room for the next batch; how many."""
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
            if dropped >= _LONGEST_EVICTION:
                break  # the bound was lowered: in steps, so that no transaction becomes long
        return dropped

    def _sweep(self, connection: sqlite3.Connection) -> None:
        """Drops what has expired, a chunk a round, and gives room that is left over back to the disk."""
        dropped = 0
        if self._grace != math.inf:
            dropped = connection.execute(_SWEEP, (self._wall() - self._grace,)).rowcount
            self.counts["expirations"] += dropped
        connection.execute("BEGIN IMMEDIATE")
        evicted = self._make_room(connection)
        connection.execute("COMMIT")
        self.counts["evictions"] += evicted
        if dropped < _CHUNK and evicted < _LONGEST_EVICTION:  # else the next round goes on
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
                future.set_exception(error)

    # -- opening, trouble, damage -------------------------------------------------------------------------------------

    def _open(self) -> None:
        was = files.identity(self.path)
        try:
            self._connection = files.open_to_write(self.path, BUSY)
        except sqlite3.Error as error:
            if not files.is_damage(error):
                raise
            self._put_aside(was, error)
            self._connection = files.open_to_write(self.path, BUSY)
        identity = files.identity(self.path)
        if identity != self._identity or not self.generation:
            self._identity = identity
            self.generation = time.monotonic_ns()
        self._sweep_at = min(self._sweep_at, time.monotonic() + 1.0)

    def _failed(self, error: Exception) -> None:
        """Keeps what was being written for the next attempt, says what is wrong, and gets out of its way."""
        was = self._identity
        self.failures += 1
        self._disconnect()
        if not isinstance(error, sqlite3.Error | OSError | files.NotOurFile):
            log.exception("cache file %s: unexpected", self.path, exc_info=error)
            self.counts["dropped"] += len(self._writing)
            return
        self._put_back()
        if files.is_damage(error):
            try:
                self._put_aside(was, error)
                return  # the next round makes a new file
            except (sqlite3.Error, OSError) as another:
                error = another
        self.state = str(error) or type(error).__name__
        now = time.monotonic()
        self._retry_at = now + _RETRY
        if now >= self._say_at:
            self._say_at = now + _SAY_EVERY
            self._said = True
            log.warning(
                "cache file %s: %s; answers are not kept on disk until it works again (%d waiting, %d lost)",
                *(self.path, self.state, len(self._pending), self.counts["dropped"]),
            )

    def _put_back(self) -> None:
        with self._wake:
            for name, entry in self._writing.items():
                if name not in self._pending:
                    self._pending[name] = entry
                    self._pending_bytes += entry.size
                    self._taken -= 1

    def _well(self) -> None:
        if self._said:
            log.warning("cache file %s works again", self.path)
        self._said = False
        self.state = "ok"

    def _put_aside(self, was: tuple[int, int] | None, error: Exception) -> None:
        """Moves the damaged file away; not oftener than every ten minutes, or a failing disk would fill up."""
        if time.monotonic() < self._aside_at + _ASIDE_EVERY:
            raise error
        self.generation = 0
        target = files.move_aside(self.path, was)
        if target is not None:
            self._aside_at = time.monotonic()
            self.counts["moved_aside"] += 1
            log.error("cache file %s is damaged (%s): moved to %s, starting a new one", self.path, error, target.name)

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None
