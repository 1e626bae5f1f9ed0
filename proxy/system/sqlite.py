"""A SQLite file of ours: made private, opened, given its tables, judged, moved aside. Blocking; owns no state.

The cache's own layout stands here, too; the ledger has another (`ledger/file.py`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

APPLICATION_ID: Final = 0x4F435063
"""Says in the file's header that it is ours ("OCPc"), so that nobody else's database is ever changed."""

TABLE: Final = "entries_v2"
"""The schema's version is in the name: another version of the program uses another table and reads nothing of ours."""

PURGES: Final = "purges_v1"
"""The last purges, as stores/__init__.py writes them down; the numbers only grow."""

_SCHEMA: Final = f"""
CREATE TABLE IF NOT EXISTS {TABLE} (
  key TEXT NOT NULL, form TEXT NOT NULL,
  endpoint TEXT NOT NULL, model TEXT NOT NULL, namespace TEXT NOT NULL,
  tags TEXT NOT NULL,        -- tag_text() of each
  stored_at REAL NOT NULL,   -- Unix seconds
  ends_at REAL NOT NULL,     -- stored_at and the ttl
  used REAL NOT NULL,        -- Unix seconds
  size INTEGER NOT NULL,     -- bytes of head and body
  head BLOB NOT NULL, body BLOB NOT NULL,  -- core/envelope.py
  bare TEXT NOT NULL,        -- core/entry.py; '' where it is the key
  UNIQUE (key, form)
);
CREATE INDEX IF NOT EXISTS {TABLE}_used ON {TABLE} (used, size);
CREATE INDEX IF NOT EXISTS {TABLE}_ends ON {TABLE} (ends_at);
CREATE INDEX IF NOT EXISTS {TABLE}_bare ON {TABLE} (bare) WHERE bare != '';
CREATE TABLE IF NOT EXISTS {PURGES} (number INTEGER PRIMARY KEY AUTOINCREMENT, which TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Layout:
    """What a file of ours holds. mark: its application id; schema: SQL that makes the tables and indexes `names`."""

    mark: int
    schema: str
    names: frozenset[str]


_NAMES: Final = (TABLE, f"{TABLE}_used", f"{TABLE}_ends", f"{TABLE}_bare", PURGES)
CACHE: Final = Layout(APPLICATION_ID, _SCHEMA, frozenset(_NAMES))

_LOCK_PATIENCE: Final = 2.0
_WAL_KEPT: Final = 64 * 1024 * 1024
_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


class NotOurFile(Exception):
    """The file is another program's database: it is neither used nor moved."""


def tag_text(tag: str) -> str:
    """How a tag stands in the column `tags`: between line feeds, with none inside."""
    return "\n" + tag.replace("\\", "\\\\").replace("\n", "\\n") + "\n"


def is_damage(error: BaseException) -> bool:
    """Whether SQLite says that the file is no database, or a broken one."""
    return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _DAMAGED


def connect(path: Path, busy: float) -> sqlite3.Connection:
    """A connection in autocommit mode; `busy`: seconds it waits for another process's lock. Raises sqlite3.Error."""
    connection = sqlite3.connect(path, timeout=busy, isolation_level=None)
    connection.execute("PRAGMA trusted_schema=OFF")  # does not look into the file yet
    return connection


def open_to_read(path: Path, busy: float) -> sqlite3.Connection:
    """A connection that cannot write. The file must be there. Raises sqlite3.Error."""
    connection = connect(path, busy)
    connection.execute("PRAGMA query_only=ON")
    return connection


def open_to_write(path: Path, busy: float, layout: Layout = CACHE) -> sqlite3.Connection:
    """A connection to the file, which is made where there is none. Raises sqlite3.Error, OSError or Foreign."""
    make_private(path)
    with _alone(path):
        connection = connect(path, busy)
        try:
            _prepare(connection, layout)
        except BaseException:
            connection.close()
            raise
        return connection


def make_private(path: Path) -> None:
    """Directory (only those made here) 0700, file 0600, so that the log beside it is 0600 too. Raises OSError."""
    missing = []
    directory = path.parent
    while not directory.exists():
        missing.append(directory)
        directory = directory.parent
    for directory in reversed(missing):
        with suppress(FileExistsError):  # another process was faster
            directory.mkdir(0o700)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(handle).st_mode & 0o077:
            os.fchmod(handle, 0o600)
    finally:
        os.close(handle)


def identity(path: Path) -> tuple[int, int] | None:
    """Which file the path names now; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def move_aside(path: Path, was: tuple[int, int] | None) -> Path | None:
    """Renames a damaged file and its log to `NAME.corrupt-TIMESTAMP…`; the new name. Raises OSError.

    None: another process did so already (the path no longer names the file `was`). Nothing is ever deleted.
    """
    with _alone(path):
        if was is None or identity(path) != was:
            return None
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        target = path.with_name(f"{path.name}.corrupt-{stamp}")
        count = 1
        while target.exists():
            target = path.with_name(f"{path.name}.corrupt-{stamp}-{count}")
            count += 1
        # The database first: a log left without one is thrown away by SQLite when the next database is made.
        path.rename(target)
        for suffix in ("-wal", "-shm"):
            with suppress(FileNotFoundError):
                path.with_name(path.name + suffix).rename(target.with_name(target.name + suffix))
        return target


def used_bytes(connection: sqlite3.Connection) -> int:
    """What the file's content takes, in whole pages; what is free inside the file does not count."""
    pages: int = connection.execute("PRAGMA page_count").fetchone()[0]
    return (pages - free_pages(connection)) * page_size(connection)


def free_pages(connection: sqlite3.Connection) -> int:
    pages: int = connection.execute("PRAGMA freelist_count").fetchone()[0]
    return pages


def page_size(connection: sqlite3.Connection) -> int:
    size: int = connection.execute("PRAGMA page_size").fetchone()[0]
    return size


def _prepare(connection: sqlite3.Connection, layout: Layout) -> None:
    mark = connection.execute("PRAGMA application_id").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if mark not in (0, layout.mark) or (mark == 0 and tables):
        raise NotOurFile("it is another program's database")
    connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # takes effect only before the first table
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA secure_delete=FAST")
    connection.execute(f"PRAGMA journal_size_limit={_WAL_KEPT}")
    if mark == 0 or not layout.names <= {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}:
        connection.executescript(f"BEGIN IMMEDIATE; PRAGMA application_id={layout.mark}; {layout.schema} COMMIT;")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Only one process at a time makes or moves the file. Where the file system has no locks: no protection."""
    handle = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + _LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.02)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
                break
        yield
    finally:
        os.close(handle)
