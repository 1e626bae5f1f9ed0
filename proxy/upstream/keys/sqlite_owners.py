"""Who made which stored object, in a SQLite file beside the ledger or the cache, so that a restart forgets nothing.

Ids are stored as digests, owners as digests of keys and names of clients: no secret is in the file. It is made when the
first object is remembered. Rows are read only for objects that are not in memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import sqlite3
from collections import deque
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

from ...system import sqlite as files
from ...system.sqlite_writer import RETRY, SQLiteWriter
from .owner_table import KEPT_FOR

log = logging.getLogger("proxy.objects")

READ_DEADLINE: Final = 0.1
"""Seconds a request waits for the file, at most; an owner that comes later counts as unknown."""

MAX_ROWS: Final = 1_000_000
"""Objects in the file, about 60 MB; beyond it the oldest are removed."""

CLOSE_TIMEOUT: Final = 5.0

_MAX_WAITING: Final = 50_000
_PRUNE_AFTER: Final = 10_000
_BUSY: Final = 0.05
_OBJECTS, _OWNERS = "objects_v1", "owners_v1"

LAYOUT: Final = files.Layout(
    application_id=0x4F43506F,  # "OCPo"
    schema=f"""
CREATE TABLE IF NOT EXISTS {_OWNERS} (
  number INTEGER PRIMARY KEY,  -- the first 60 bits of the text's digest
  owner TEXT NOT NULL          -- owner_table.Owner.text()
);
CREATE TABLE IF NOT EXISTS {_OBJECTS} (
  id BLOB PRIMARY KEY,         -- owner_table.digest_of()
  owner INTEGER NOT NULL,
  at INTEGER NOT NULL          -- Unix seconds
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS {_OBJECTS}_at ON {_OBJECTS} (at);
""",
    names=frozenset({_OBJECTS, _OWNERS, f"{_OBJECTS}_at"}),
)

_Put = tuple[list[str], str, bool, int]
"""Digests, the owner, whether known owners stay, Unix seconds."""


def objects_file(path: str) -> Path | None:
    """Return the file for the ledger or cache at `path`; None if `~` stands for nothing."""
    found = os.path.expanduser(path)
    return None if found.startswith("~") else Path(found).with_suffix(".objects.db")


class SQLiteOwners:
    """`SharedOwners` in a file. path: of the ledger or the cache. wall: returns Unix seconds."""

    def __init__(self, path: str, wall: Callable[[], float]) -> None:
        self.path = objects_file(path)
        self._wall = wall
        self._open = False
        self._writer: _Writer | None = None

    async def open(self) -> None:
        """Allow writing. Nothing is opened before there is something to write."""
        self._open = True

    async def close(self) -> None:
        """Write what waits."""
        self._open = False
        writer, self._writer = self._writer, None
        if writer is not None:
            await asyncio.to_thread(writer.close, CLOSE_TIMEOUT)

    async def put(self, digests: list[str], owner: str, only_new: bool) -> None:
        if not self._open or self.path is None:
            return
        if self._writer is None:
            self._writer = _Writer(self.path, self._wall)
            self._writer.start()
        self._writer.put((digests, owner, only_new, int(self._wall())))

    async def get(self, digests: list[str]) -> dict[str, str]:
        if not self._open or self.path is None:
            return {}
        try:
            async with asyncio.timeout(READ_DEADLINE):
                return await asyncio.to_thread(_read, self.path, digests, self._wall() - KEPT_FOR)
        except TimeoutError:
            return {}


def _read(path: Path, digests: list[str], since: float) -> dict[str, str]:
    """Return the owners that are in the file; none if it cannot be read."""
    if not path.exists():
        return {}
    marks = ", ".join("?" * len(digests))
    query = (
        f"SELECT lower(hex(o.id)), w.owner FROM {_OBJECTS} o JOIN {_OWNERS} w ON w.number = o.owner "
        f"WHERE o.id IN ({marks}) AND o.at >= ?"
    )
    try:
        with closing(files.open_to_read(path, _BUSY)) as connection:
            return dict(connection.execute(query, [*map(bytes.fromhex, digests), since]))
    except sqlite3.Error:
        return {}  # the writer reports what is wrong


class _Writer(SQLiteWriter):
    """Owns the writing connection and what waits for it."""

    layout = LAYOUT
    log = log
    name = "objects"
    effect = "who made stored objects is remembered in memory"
    lost_level = logging.WARNING
    report_every = 600.0

    def __init__(self, path: Path, wall: Callable[[], float]) -> None:
        super().__init__(path)
        self._wall = wall
        self._puts: deque[_Put] = deque()
        self._since_prune = _PRUNE_AFTER

    def start(self) -> None:
        self._thread.start()

    def put(self, put: _Put) -> None:
        with self._wake:
            if len(self._puts) < _MAX_WAITING:
                self._puts.append(put)
            else:
                self.lost += len(put[0])
            self._wake.notify()

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _pause(self) -> float | None:
        if not self._puts:
            return None
        return 0.0 if self._connection is not None or not self._failing else RETRY

    def _write(self, connection: sqlite3.Connection) -> None:
        puts = list(self._puts)
        if not puts:
            return
        connection.execute("BEGIN IMMEDIATE")
        for digests, owner, only_new, at in puts:
            number = int(hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest()[:15], 16)
            text = owner.encode("utf-8", "replace").decode()
            connection.execute(f"INSERT OR IGNORE INTO {_OWNERS} VALUES (?, ?)", (number, text))
            keep = "owner = iif(at >= excluded.at - ?, owner, excluded.owner)" if only_new else "owner = excluded.owner"
            rows = [(bytes.fromhex(digest), number, at, *((int(KEPT_FOR),) if only_new else ())) for digest in digests]
            connection.executemany(
                f"INSERT INTO {_OBJECTS} VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET {keep}, at = excluded.at", rows
            )
            self._since_prune += len(digests)
        if self._since_prune >= _PRUNE_AFTER:
            self._prune(connection)
        connection.execute("COMMIT")
        for _ in puts:
            self._puts.popleft()

    def _prune(self, connection: sqlite3.Connection) -> None:
        """Remove what is no longer remembered, and the oldest rows beyond `MAX_ROWS`."""
        connection.execute(f"DELETE FROM {_OBJECTS} WHERE at < ?", (int(self._wall() - KEPT_FOR),))
        count = connection.execute(f"SELECT count(*) FROM {_OBJECTS}").fetchone()[0]
        if count > MAX_ROWS:
            connection.execute(
                f"DELETE FROM {_OBJECTS} WHERE id IN (SELECT id FROM {_OBJECTS} ORDER BY at LIMIT ?)",
                (count - MAX_ROWS,),
            )
        connection.execute(f"DELETE FROM {_OWNERS} WHERE number NOT IN (SELECT owner FROM {_OBJECTS})")
        self._since_prune = 0

    def _not_written(self, keep: bool) -> None:
        if not keep:
            self.lost += self._waiting()
            self._puts.clear()  # otherwise the same would happen again and again

    def _after_round(self) -> None:
        """Nobody waits for a round."""

    def _waiting(self) -> int:
        return sum(len(put[0]) for put in list(self._puts))

    def _amounts(self) -> str:
        return f"{self._waiting()} objects waiting, {self.lost} lost"

    def _opened(self) -> None:
        """A new file needs nothing of the one before."""

    def _ended(self) -> None:
        if waiting := self._waiting():
            log.warning("objects %s: %s; %d objects are not remembered", self.path, self.state, waiting)
