"""The sockets the proxy listens on: opened once, and shared by workers where there are several."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from aiohttp.web import SockSite
from aiohttp.web_runner import BaseRunner, BaseSite

from ..config.settings import ServerSettings
from ..system.clock import spawn

log = logging.getLogger("proxy")

BACKLOG: Final = 1024

_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_PAUSE: Final = 1.0
"""Seconds without new connections after the system had no room for one, as asyncio has it."""

_NEXT_ONE: Final = 0.0005
"""Seconds for which the others have the first call on the next connection: of a burst each gets its part."""


@dataclass(frozen=True, slots=True)
class Listeners:
    """sockets: the main one, and that of `server.ops` where there is one; path: of a unix socket."""

    sockets: Sequence[socket.socket]
    address: str
    ops_address: str | None = None
    path: str | None = None

    def close(self) -> None:
        for one in self.sockets:
            one.close()

    def remove(self) -> None:
        """Takes the unix socket out of the file system."""
        if self.path is not None:
            with suppress(OSError):
                os.unlink(self.path)


def listen(server: ServerSettings) -> Listeners:
    """Opens what `server` names. Raises OSError."""
    path = None
    if server.socket is not None:
        path = _free_socket(server.socket)
        main, address = _bind_unix(path), f"unix:{path}"
    else:
        main = bind(server.host, server.port)
        address = _url(server.host, main)
    sockets, ops_address = [main], None
    try:
        if server.ops is not None:
            sockets.append(bind(*server.ops))
            ops_address = _url(server.ops[0], sockets[1])
        for one in sockets:
            one.listen(BACKLOG)
    except OSError:
        Listeners(sockets, address, path=path).close()
        raise
    return Listeners(sockets, address, ops_address, path)


def bind(host: str, port: int) -> socket.socket:
    """Raises OSError, which names host and port."""
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
        0
    ]
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"{host}:{port}: {error.strerror}") from None
    listener.setblocking(False)
    return listener


def _bind_unix(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)  # mode 0600 from the first moment on
    try:
        listener.bind(path)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"{path}: {error.strerror}") from None
    finally:
        os.umask(mask)
    listener.setblocking(False)
    return listener


def _free_socket(path: str) -> str:
    """`path` made free where a process that is gone left its socket behind."""
    path = os.path.expanduser(path)
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode) and not _answers(path):
            os.unlink(path)
    return path


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


def _url(host: str, listener: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


async def serve_on(runner: BaseRunner, listener: socket.socket, shared: bool) -> None:
    """Has `runner` take connections there. shared: other processes do, too."""
    site = SharedSite(runner, listener) if shared else SockSite(runner, listener, backlog=BACKLOG)
    await site.start()


class SharedSite(BaseSite):
    """Takes one connection at a time: asyncio would take all that wait, and leave the other workers idle."""

    def __init__(self, runner: BaseRunner, listener: socket.socket) -> None:
        super().__init__(runner)
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._pausing: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        return f"shared {self._listener.getsockname()}"

    async def start(self) -> None:
        await super().start()
        self._listener.setblocking(False)
        self._take_up()

    async def stop(self) -> None:
        await super().stop()
        if self._pausing is not None:
            self._pausing.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()

    def _take_up(self) -> None:
        self._pausing = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # another worker was faster
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            log.error("no new connections for %gs: %s", _PAUSE, error.strerror)
            self._pause(_PAUSE)
            return
        self._pause(_NEXT_ONE)
        spawn(self._serve(connection), "connection")

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener)
        self._pausing = self._loop.call_later(seconds, self._take_up)

    async def _serve(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        server = self._runner.server
        assert server is not None
        await self._loop.connect_accepted_socket(server, connection)
