"""The thread that writes to a SQLite file, for the cache and for the ledger.

Errors of the file (disk full, read-only, locked) do not reach callers. What is not written waits, the file is tried
again every second, and the error is logged now and then. A damaged file is moved aside, and a new one takes its place.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sqlite3
import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Final

from . import sqlite as files
from .state_changes import STATE_CHANGES, Change, state_changed

BUSY: Final = 5.0
"""Seconds for which the writer waits for another process's transaction."""

RETRY: Final = 1.0
"""Seconds between two attempts at a file that does not work."""

_MOVE_ASIDE_EVERY: Final = 600.0
"""Seconds between two damaged files that are moved aside: otherwise a failing disk would fill up with them."""


class SQLiteWriter(ABC):
    """A thread that owns the writing connection to one file. `close` may be called from any thread.

    state: "ok", or what is wrong with the file.
    generation: a number for each opening of a file that readers may use; 0 while there is none.
    lost: how much was given up and will never be written.
    """

    layout: ClassVar[files.Layout]
    log: ClassVar[logging.Logger]
    name: ClassVar[str]
    """What log messages call the file."""
    effect: ClassVar[str]
    """What it means for clients that the file does not work."""
    lost_level: ClassVar[int]
    """The level of messages once something was lost; until then it is WARNING."""
    report_every: ClassVar[float]
    """Seconds between two messages that the file does not work."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = "not open"
        self.generation = 0
        self.lost = 0
        self.failures = 0
        self.moved_aside = 0
        self._wake = threading.Condition()
        self._closing = False
        # Below: the thread's own.
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._retry_at = self._report_at = 0.0
        self._reported = 0  # the highest level so far
        self._failing = False
        self._moved_aside_at = -math.inf
        self._thread = threading.Thread(target=self._run, name=f"{self.name} writer", daemon=True)

    def close(self, max_wait: float) -> None:
        """Write what waits and end the thread. After `max_wait` seconds the thread is left to itself."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(max_wait)

    # -- what each writer does, in the thread --------------------------------------------------------------------------

    @abstractmethod
    def _pause(self) -> float | None:
        """Return the seconds until there is something to do; None: until `_wake` is notified. `_wake` is held."""

    @abstractmethod
    def _write(self, connection: sqlite3.Connection) -> None:
        """Write what is due. If it raises, the connection is closed, which rolls the transaction back."""

    @abstractmethod
    def _not_written(self, keep: bool) -> None:
        """`_write` failed. keep: try again later what was being written; otherwise count it as lost."""

    @abstractmethod
    def _after_round(self) -> None:
        """Notify callers that wait for a round, whether it failed or not."""

    @abstractmethod
    def _waiting(self) -> int:
        """Return how much waits to be written."""

    @abstractmethod
    def _amounts(self) -> str:
        """Return how much waits and how much was lost, for messages."""

    @abstractmethod
    def _opened(self) -> None:
        """A file was opened."""

    @abstractmethod
    def _ended(self) -> None:
        """The thread ends."""

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        closing = False
        while not closing or (self._connection is not None and self._waiting()):
            with self._wake:
                pause = 0.0 if self._closing else self._pause()
                if pause is None or pause > 0:
                    self._wake.wait(pause)
                closing = self._closing
            for _ in range(2):
                try:
                    self._round()
                    break
                except Exception as error:  # a bug must not end the thread either
                    if not self._failed(error):
                        break
            self._after_round()
        self._disconnect()
        self.generation = 0
        self._ended()

    def _round(self) -> None:
        """Do everything that is due, once. Raises what SQLite and the file system raise."""
        if self._connection is not None and files.identity(self.path) != self._identity:
            self._disconnect()  # the file was removed, or moved aside by another process
            self.generation = 0
        if self._connection is None:
            if time.monotonic() < self._retry_at and not self._closing:
                return
            self._connection = self._open()
            self._opened()
        self._write(self._connection)
        if self._failing:
            text = f"{self.name} {self.path} works again ({self._amounts()})"
            state_changed(Change("store", self.name, "up", text, logger=self.log.name))
        self._failing = False
        self.state = "ok"

    def _open(self) -> sqlite3.Connection:
        identity = files.identity(self.path)
        if identity != self._identity:
            self._identity, self.generation = identity, 0
        connection = files.open_to_write(self.path, BUSY, self.layout)
        self._identity = files.identity(self.path)
        self.generation = self.generation or time.monotonic_ns()
        return connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _failed(self, error: Exception) -> bool:
        """Close the connection, and report what is wrong. Return True if a new file can be tried at once.

        No exception is kept in a variable of this frame or raised from it: it would be part of a reference cycle.
        """
        state = str(error) or type(error).__name__
        self.failures += 1
        self._disconnect()
        keep = isinstance(error, sqlite3.Error | OSError | files.NotOurFile | files.DamagedFile)
        if not keep:
            self.log.exception("%s %s: unexpected", self.name, self.path, exc_info=error)
        self._not_written(keep)
        if files.is_damage(error):
            try:
                if self._move_aside(state):
                    return True
            except OSError as another:
                state = str(another) or type(another).__name__
        began, self.state, self._failing = not self._failing, state, True
        now = time.monotonic()
        self._retry_at = now + RETRY
        level = self.lost_level if self.lost else logging.WARNING
        if now >= self._report_at or level > self._reported:
            self._report_at = now + self.report_every
            self._reported = max(self._reported, level)
            text = f"{self.name} {self.path}: {state}; {self.effect} ({self._amounts()})"
            if began:
                state_changed(Change("store", self.name, "down", text, level, logger=self.log.name))
            else:
                self.log.log(level, "%s", text)
        elif began:
            STATE_CHANGES["store", self.name, "down"] += 1
        return False

    def _move_aside(self, why: str) -> bool:
        """Move the damaged file aside, or find that another process did. Return False if it is too soon for that."""
        if time.monotonic() < self._moved_aside_at + _MOVE_ASIDE_EVERY:
            return False
        self.generation = 0
        target = files.move_aside(self.path, self._identity)
        if target is not None:
            self._moved_aside_at = time.monotonic()
            self.moved_aside += 1
            self.log.error(
                "%s %s is damaged (%s): moved to %s, starting a new one", self.name, self.path, why, target.name
            )
        return True
