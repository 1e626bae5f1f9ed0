"""The cache on disk: one SQLite file in WAL mode, shared by any number of processes of one machine.

Reads are done on the event loop, in microseconds, on a connection that cannot write; long responses are read in a
thread. Writes are collected and done by one thread (`sqlite_writer.py`). WAL needs shared memory, so the file cannot be
on a network file system.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, TypeVar

from ...system import sqlite as files
from ..codec import decode, describe
from ..entry import Entry
from .interface import (
    ALL,
    MAX_PURGES,
    EntryName,
    EntryPage,
    Filter,
    ListedEntry,
    StoreError,
    is_glob,
    name_matches,
    purge_of,
    purge_text,
)
from .sqlite_file import PURGES, TABLE, tag_text, tags_of
from .sqlite_writer import CacheWriter

T = TypeVar("T")

INLINE: Final = 128 * 1024
"""Stored responses up to this size (bytes, compressed) are read on the event loop; longer ones in a thread."""

DEADLINE: Final = 0.09
"""Seconds that a long read may take before it counts as a miss."""

OPENING: Final = 2.0
CLOSING: Final = 5.0

_BUSY: Final = 0.01
"""Seconds a read on the event loop waits for a lock. Readers of a WAL need one only while it is being recovered."""

_ADMIN_BUSY: Final = 5.0
# SQLite does not read a body that is not selected.


def _bytes(column: str) -> str:
    """Return a column as bytes, whatever it holds: SQLite keeps any type in any column, and others may write to it."""
    return f"coalesce(CAST({column} AS BLOB), x'')"


_GET: Final = f"""
SELECT {_bytes("head")}, CASE WHEN size <= {INLINE} THEN {_bytes("body")} END FROM {TABLE} WHERE key=? AND form=?
"""
_GET_LONG: Final = f"SELECT {_bytes('head')}, {_bytes('body')} FROM {TABLE} WHERE key=? AND form=?"
_NEWEST: Final = f"""
SELECT key, stored_at FROM {TABLE} WHERE key=:bare AND form=:form
UNION ALL SELECT key, stored_at FROM {TABLE} WHERE bare=:bare AND bare != '' AND form=:form
ORDER BY stored_at DESC LIMIT 1"""
_PURGED: Final = f"SELECT CAST(number AS INTEGER), which FROM {PURGES} WHERE number >= ? ORDER BY number"
_CHUNK: Final = 500
_PURGE_CHUNK: Final = 5000
"""Entries deleted in one transaction, which takes about 0.1 s; no other process can write in that time."""


class SQLiteStore:
    """The cache in one SQLite file.

    path: the file; `~` is expanded.
    max_size: bytes that it may take.
    max_entry: bytes of the longest body that is kept.
    grace: seconds for which an entry is kept after its ttl; inf: forever.
    wall: returns Unix seconds.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_size: int,
        max_entry: int,
        grace: float = 0.0,
        wall: Callable[[], float] = time.time,
    ) -> None:
        # The real path: a file that is moved aside, and the lock, must be beside it.
        self.path = Path(os.path.realpath(os.path.expanduser(path)))
        self._max_size = max_size
        self._max_entry = min(max_entry, max_size // 4)
        self._grace = grace
        self._writer = CacheWriter(self.path, max_size, grace, wall)
        self._reader: sqlite3.Connection | None = None
        self._reading = 0  # the generation of the file that the reader has open
        self._heard = (0, 0)  # the generation of the file, and the last purge that `purged` returned
        self._counts = {"hits": 0, "misses": 0, "rejected": 0, "read_errors": 0}

    async def open(self) -> None:
        with contextlib.suppress(StoreError, TimeoutError):
            async with asyncio.timeout(OPENING):
                await asyncio.shield(asyncio.wrap_future(self._writer.start()))
                await self.purged()

    # -- entries ------------------------------------------------------------------------------------------------------

    async def get(self, key: str, form: str, wall: float) -> Entry | None:
        name = (key, form)
        entry = self._writer.waiting(name)
        if entry is None:
            entry = await self._read(name)
        if entry is None or not entry.plausible(wall, self._grace):
            self._counts["misses"] += 1
            return None
        self._counts["hits"] += 1
        self._writer.touch(name)
        return entry

    async def get_many(self, keys: Sequence[str], form: str, wall: float) -> list[Entry | None] | None:
        errors = self._counts["read_errors"]
        found: list[Entry | None] = []
        for key in keys:
            found.append(await self.get(key, form, wall))
            if self._counts["read_errors"] > errors:
                return None
            await asyncio.sleep(0)  # reading a row does not wait: let other tasks run
        return found

    async def newest(self, bare: str, form: str, wall: float) -> Entry | None:
        generation, key = self._writer.generation, bare
        with contextlib.suppress(sqlite3.Error):  # `get` meets the same error and handles it
            asked = {"bare": bare, "form": form}
            found = self._connection(generation).execute(_NEWEST, asked).fetchall() if generation else []
            key = found[0][0] if found else bare
        return await self.get(key, form, wall)

    async def _read(self, name: EntryName) -> Entry | None:
        generation = self._writer.generation
        try:
            row = self._row(name, generation)
            if row is None:
                return None
            head, body = row
            if body is not None:
                return self._checked(decode(head + body, *name))
            async with asyncio.timeout(DEADLINE):
                return self._checked(await asyncio.to_thread(_read_long, self.path, name))
        except (sqlite3.Error, TimeoutError) as error:
            self._counts["read_errors"] += 1
            self._close_reader()
            if files.is_damage(error):
                self._writer.suspect(generation)
            return None

    def _row(self, name: EntryName, generation: int) -> tuple[bytes, bytes | None] | None:
        if not generation:
            return None
        rows: list[tuple[bytes, bytes | None]] = self._connection(generation).execute(_GET, name).fetchall()
        return rows[0] if rows else None

    def _connection(self, generation: int) -> sqlite3.Connection:
        if self._reader is None or self._reading != generation:
            self._close_reader()
            self._reader = files.open_to_read(self.path, _BUSY)
            self._reading = generation
        return self._reader

    def _checked(self, entry: Entry | None) -> Entry | None:
        if entry is None:
            self._counts["rejected"] += 1
        return entry

    def put(self, entry: Entry) -> bool:
        return len(entry.body) <= self._max_entry and self._writer.put(entry)

    def touch(self, key: str, form: str) -> None:
        self._writer.touch((key, form))

    # -- administration -----------------------------------------------------------------------------------------------

    async def purge(self, which: Filter, dry_run: bool = False) -> int:
        if not dry_run:
            return await _result(self._writer.submit(lambda connection: _purge(connection, which)))
        await self.flush()
        return await self._ask(lambda connection: _count(connection, which))

    async def purged(self) -> list[Filter]:
        generation = self._writer.generation
        if not generation:
            return []
        heard = self._heard[1] if self._heard[0] == generation else 0  # a new file numbers anew
        try:
            rows = self._connection(generation).execute(_PURGED, (heard,)).fetchall()
        except sqlite3.Error:
            self._close_reader()
            return []
        self._heard = generation, rows[-1][0] if rows else heard
        if rows and rows[0][0] > heard + 1:
            return [ALL]  # some are no longer remembered
        return [purge_of(which) for number, which in rows if number > heard]

    async def read(self, names: Sequence[EntryName]) -> Sequence[Entry]:
        await self.flush()
        return await self._ask(lambda connection: _read(connection, names))

    async def list(self, which: Filter = ALL, after: str = "", limit: int = _CHUNK) -> EntryPage:
        if not after:
            await self.flush()
        return await self._ask(lambda connection: _page(connection, which, int(after or 0), limit))

    @property
    def up(self) -> bool:
        return self._writer.state == "ok"

    @property
    def errors(self) -> int:
        return self._counts["read_errors"] + self._writer.failures

    async def stats(self) -> dict[str, int | str]:
        found: dict[str, int | str] = {**self._counts, **self._writer.counts, "max_bytes": self._max_size}
        with contextlib.suppress(StoreError):
            found |= await self._ask(_measure)
        return found | {"state": self._writer.state}

    async def flush(self) -> None:
        with contextlib.suppress(StoreError):
            await _result(self._writer.submit(lambda _: None))

    async def close(self) -> None:
        self._close_reader()  # first, since the last connection to close cleans up the log
        await asyncio.to_thread(self._writer.close, CLOSING)

    async def _ask(self, question: Callable[[sqlite3.Connection], T]) -> T:
        """Return the answer to a question, asked in a thread on a connection of its own. Raises StoreError."""
        if not self._writer.generation:
            raise StoreError(f"cache file {self.path}: {self._writer.state}")
        return await asyncio.to_thread(_answer, self.path, question)

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


async def _result(future: Future[T]) -> T:
    return await asyncio.shield(asyncio.wrap_future(future))


def _read_long(path: Path, name: EntryName) -> Entry | None:
    connection = files.open_to_read(path, _BUSY)
    try:
        rows = connection.execute(_GET_LONG, name).fetchall()
    finally:
        connection.close()
    return decode(rows[0][0] + rows[0][1], *name) if rows else None


def _answer(path: Path, question: Callable[[sqlite3.Connection], T]) -> T:
    try:
        connection = files.open_to_read(path, _ADMIN_BUSY)
        try:
            _add_functions(connection)
            return question(connection)
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise StoreError(f"cache file {path}: {error}") from None


def _name_matches(name: object, wanted: str) -> bool:
    return isinstance(name, str) and name_matches(name, wanted)


def _tags_match(text: object, wanted: str) -> bool:
    return isinstance(text, str) and any(name_matches(tag, wanted) for tag in tags_of(text))


def _add_functions(connection: sqlite3.Connection) -> None:
    """Let SQL match globs as `Filter` does. A column may hold a value of any type."""
    connection.create_function("name_matches", 2, _name_matches, deterministic=True)
    connection.create_function("tags_match", 2, _tags_match, deterministic=True)


def _condition(which: Filter) -> tuple[str, list[Any]]:
    """Return the WHERE clause and its values. Column names are fixed; values are parameters."""
    terms, values = ["rowid > ?"], []
    for column in ("key", "endpoint", "model", "namespace"):
        value = getattr(which, column)
        if value is not None:
            terms.append(f"name_matches({column}, ?)" if column != "key" and is_glob(value) else f"{column} = ?")
            values.append(value)
    if which.prefix is not None:
        terms.append("substr(key, 1, ?) = ?")
        values += (len(which.prefix), which.prefix)
    if which.tag is not None and is_glob(which.tag):
        terms.append("tags_match(tags, ?)")
        values.append(which.tag)
    elif which.tag is not None:
        terms.append("instr(tags, ?)")
        values.append(tag_text(which.tag))
    if which.stored_before is not None:
        terms.append("stored_at < ?")
        values.append(which.stored_before)
    return " AND ".join(terms), values


def _purge(connection: sqlite3.Connection, which: Filter) -> int:
    """Delete in chunks, each its own transaction, so that other processes can write in between."""
    _add_functions(connection)
    condition, values = _condition(which)
    dropped = last = 0
    while True:
        found = f"SELECT rowid FROM {TABLE} WHERE {condition} ORDER BY rowid LIMIT {_PURGE_CHUNK}"
        rows = connection.execute(found, (last, *values)).fetchall()
        if not rows:
            break
        connection.execute("BEGIN IMMEDIATE")
        dropped += connection.executemany(f"DELETE FROM {TABLE} WHERE rowid=?", rows).rowcount
        connection.execute("COMMIT")
        last = rows[-1][0]
    # At the end, so that a process that learns of it finds nothing here that it could put back into memory.
    number = connection.execute(f"INSERT INTO {PURGES} (which) VALUES (?)", (purge_text(which),)).lastrowid or 0
    connection.execute(f"DELETE FROM {PURGES} WHERE number <= ?", (number - MAX_PURGES,))
    return dropped


def _count(connection: sqlite3.Connection, which: Filter) -> int:
    condition, values = _condition(which)
    count: int = connection.execute(f"SELECT count(*) FROM {TABLE} WHERE {condition}", (0, *values)).fetchone()[0]
    return count


def _page(connection: sqlite3.Connection, which: Filter, after: int, limit: int) -> EntryPage:
    condition, values = _condition(which)
    columns = f"rowid, {_bytes('head')}, CAST(size AS INTEGER)"
    query = f"SELECT {columns} FROM {TABLE} WHERE {condition} ORDER BY rowid LIMIT ?"
    rows = connection.execute(query, (after, *values, limit)).fetchall()
    entries = [ListedEntry(entry, size) for _, head, size in rows if (entry := describe(head)) is not None]
    return EntryPage(entries, str(rows[-1][0]) if len(rows) == limit else "")


def _read(connection: sqlite3.Connection, names: Sequence[EntryName]) -> Sequence[Entry]:
    found = []
    for name in names:
        for head, body in connection.execute(_GET_LONG, name).fetchall():
            entry = decode(head + body, *name)
            found += [entry] if entry is not None else []
    return found


def _measure(connection: sqlite3.Connection) -> dict[str, int]:
    entries, size = connection.execute(f"SELECT count(*), total(size) FROM {TABLE}").fetchone()
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    return {"entries": entries, "bytes": int(size), "file_bytes": pages * files.page_size(connection)}
