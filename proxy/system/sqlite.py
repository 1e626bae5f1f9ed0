"""SQLite files of the proxy: create them private, open them, create their tables, move damaged ones aside.

Everything here blocks. The tables are described by `cache/stores/sqlite_file.py` and `accounting/ledger/file.py`.
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


@dataclass(frozen=True, slots=True)
class Layout:
    """What a file holds.

    application_id: written into the file's header, so that another program's database is never changed.
    schema: SQL that creates the tables and indexes `names`.
    """

    application_id: int
    schema: str
    names: frozenset[str]


_MAX_LOCK_WAIT: Final = 2.0
_WAL_KEPT: Final = 64 * 1024 * 1024
_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


class NotOurFile(Exception):
    """The file is another program's database: it is neither used nor moved."""


class DamagedFile(Exception):
    """A reader found that the file is damaged."""


def is_damage(error: BaseException) -> bool:
    """Return whether an error says that the file is no database, or a broken one."""
    return isinstance(error, DamagedFile) or (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _DAMAGED


def connect(path: Path, busy: float) -> sqlite3.Connection:
    """Return a connection in autocommit mode. busy: seconds it waits for a lock. Raises `sqlite3.Error`."""
    connection = sqlite3.connect(path, timeout=busy, isolation_level=None)
    connection.execute("PRAGMA trusted_schema=OFF")  # does not look into the file yet
    return connection


def open_to_read(path: Path, busy: float) -> sqlite3.Connection:
    """Return a connection that cannot write. The file must exist. Raises `sqlite3.Error`."""
    connection = connect(path, busy)
    connection.execute("PRAGMA query_only=ON")
    return connection


def open_to_write(path: Path, busy: float, layout: Layout) -> sqlite3.Connection:
    """Return a connection to the file, which is created if needed. Raises `sqlite3.Error`, `OSError`, `NotOurFile`."""
    make_private(path)
    with _locked(path):
        connection = connect(path, busy)
        try:
            _prepare(connection, layout)
        except BaseException:
            connection.close()
            raise
        return connection


def make_private(path: Path) -> None:
    """Create the file with mode 0600 and missing directories with 0700. Raises `OSError`.

    SQLite gives its log, beside the file, the same mode. Directories that exist stay as they are.
    """
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
    """Return which file the path names now (device, inode); None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def move_aside(path: Path, was: tuple[int, int] | None) -> Path | None:
    """Rename a damaged file and its log to `NAME.corrupt-TIMESTAMP…` and return the new name. Raises `OSError`.

    Returns None if another process did so already: the path no longer names the file `was`. Nothing is deleted.
    """
    with _locked(path):
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
    """Return the bytes that the file's content takes, in whole pages, without those that are free."""
    pages: int = connection.execute("PRAGMA page_count").fetchone()[0]
    return (pages - free_pages(connection)) * page_size(connection)


def free_pages(connection: sqlite3.Connection) -> int:
    pages: int = connection.execute("PRAGMA freelist_count").fetchone()[0]
    return pages


def page_size(connection: sqlite3.Connection) -> int:
    size: int = connection.execute("PRAGMA page_size").fetchone()[0]
    return size


def _prepare(connection: sqlite3.Connection, layout: Layout) -> None:
    found = connection.execute("PRAGMA application_id").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if found not in (0, layout.application_id) or (found == 0 and tables):
        raise NotOurFile("it is another program's database")
    connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # takes effect only before the first table
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA secure_delete=FAST")
    connection.execute(f"PRAGMA journal_size_limit={_WAL_KEPT}")
    if found == 0 or not layout.names <= {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}:
        connection.executescript(
            f"BEGIN IMMEDIATE; PRAGMA application_id={layout.application_id}; {layout.schema} COMMIT;"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let only one process at a time create or move the file. File systems without locks give no protection."""
    handle = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + _MAX_LOCK_WAIT
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
