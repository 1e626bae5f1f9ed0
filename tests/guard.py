"""Which tests are slow, and a guard: a test that is not may open no socket and start no process.

A test is slow if it is marked `@pytest.mark.slow`, lies in one of `SLOW_FOLDERS` or uses one of `SLOW_FIXTURES`. Every
other test belongs to the fast stage of `.ci/run`. The guard sees sockets and processes by the interpreter's audit
events (PEP 578). A pair of connected sockets within the process, as every event loop has one, is allowed.
"""

from __future__ import annotations

import socket
import sys
import threading
from typing import Any, Final

SLOW_FOLDERS: Final = ("tests/acceptance/", "tests/bench/", "tests/sdk/")
SLOW_FIXTURES: Final = frozenset({"upstream_server", "launch", "proxy", "client", "up"})

FORBIDDEN: Final = frozenset(
    {
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "os.system",
        "socket.bind",
        "socket.connect",
        "subprocess.Popen",
    }
)


class SlowInFastTest(Exception):
    """A fast test opened a socket or started a process."""


class Guard:
    """Refuses sockets and processes between `start` and `stop`, and remembers what it refused."""

    def __init__(self) -> None:
        self._active = False
        self._refused: list[str] = []
        self._others: frozenset[int] = frozenset()

    def install(self) -> None:
        """Begin to listen to audit events. An audit hook stays until the process ends."""
        sys.addaudithook(self._hear)

    def start(self) -> None:
        """Begin to refuse. Threads that run already belong to other tests and are left alone."""
        here = threading.get_ident()
        self._others = frozenset(thread.ident or 0 for thread in threading.enumerate()) - {here}
        self._refused = []
        self._active = True

    def stop(self) -> list[str]:
        """Stop refusing. Returns the audit events that were refused, also if the code under test hid the error."""
        self._active = False
        return self._refused

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._active:
            return
        if event == "socket.__new__":
            if args[1] not in (socket.AF_INET, socket.AF_INET6):
                return
        elif event not in FORBIDDEN:
            return
        if threading.get_ident() not in self._others:
            self._refused.append(event)
            raise SlowInFastTest(f"{event}: mark this test with `@pytest.mark.slow`")
