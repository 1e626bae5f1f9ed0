"""The sockets the proxy listens on. They are opened once; workers share them."""

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

from aiohttp.web_runner import BaseRunner, BaseSite

from ..config.settings import ServerSettings
from ..system.clock import spawn

log = logging.getLogger("proxy")

BACKLOG: Final = 1024

_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_PAUSE: Final = 1.0
"""Seconds without new connections after the system refused one for lack of resources; asyncio's own value."""

_AT_ONCE: Final = 64
"""Connections that are accepted before anything else runs, if no other process accepts them."""

_YIELD: Final = 0.0005
"""Seconds after a connection in which the other workers may take the next one, so that a burst is shared."""


@dataclass(frozen=True, slots=True)
class Listeners:
    """The open listeners. sockets: the main one and, if it is set, that of `server.ops`; path: of a Unix socket."""

    sockets: Sequence[socket.socket]
    address: str
    ops_address: str | None = None
    path: str | None = None

    def close(self) -> None:
        for listener in self.sockets:
            listener.close()

    def remove(self) -> None:
        """Delete the Unix socket's file."""
        if self.path is not None:
            with suppress(OSError):
                os.unlink(self.path)


def listen(server: ServerSettings) -> Listeners:
    """Open the sockets that the settings name. Raises OSError, whose text says what to do."""
    path = None
    if server.socket is not None:
        path = _remove_stale_socket(server.socket)
        main, address = _bind_unix(path), f"unix:{path}"
    else:
        main = bind(server.host, server.port)
        address = _url(server.host, main)
    sockets, ops_address = [main], None
    try:
        if server.ops is not None:
            sockets.append(bind(*server.ops, "server.ops", "server.ops"))
            ops_address = _url(server.ops[0], sockets[1])
        for listener in sockets:
            listener.listen(BACKLOG)
    except OSError:
        Listeners(sockets, address, path=path).close()
        raise
    return Listeners(sockets, address, ops_address, path)


def bind(host: str, port: int, host_option: str = "--host", port_option: str = "--port") -> socket.socket:
    """Return a bound TCP socket. Raises OSError with host, port, and the option that chooses another."""
    listener = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, address = found[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        match error.errno:
            case errno.EADDRINUSE:
                advice = f"choose another port with {port_option}, or stop the process that uses it"
            case errno.EACCES:
                advice = f"choose a port above 1023 with {port_option}"
            case _:
                advice = f"choose an address of this machine with {host_option}"
        raise OSError(error.errno, f"{host}:{port}: {error.strerror}; {advice}") from None
    listener.setblocking(False)
    return listener


def _bind_unix(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)  # the file has mode 0600 as soon as it exists
    try:
        listener.bind(path)
    except OSError as error:
        listener.close()
        advice = "choose another path with server.socket, or remove what is there"
        raise OSError(error.errno, f"{path}: {error.strerror}; {advice}") from None
    finally:
        os.umask(mask)
    listener.setblocking(False)
    return listener


def _remove_stale_socket(path: str) -> str:
    """Delete the socket file of a process that has ended; return the path."""
    path = os.path.expanduser(path)
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode) and not _is_served(path):
            os.unlink(path)
    return path


def _is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


def _url(host: str, listener: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


async def serve_on(runner: BaseRunner, listener: socket.socket, shared: bool) -> None:
    """Let `runner` accept connections on `listener`. shared: other processes accept on it too."""
    await ListenerSite(runner, listener, shared).start()


class ListenerSite(BaseSite):
    """Accepts connections, and pauses once if the system has no more file descriptors.

    asyncio would try again for each connection of the backlog, with a traceback each time, and start as many timers.
    shared: other processes accept on the listener, too. Then one connection is accepted at a time: asyncio would accept
    all that wait and leave the other workers idle.
    """

    def __init__(self, runner: BaseRunner, listener: socket.socket, shared: bool) -> None:
        super().__init__(runner)
        self._listener = listener
        self._shared = shared
        self._loop = asyncio.get_running_loop()
        self._resume_timer: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        return f"listener {self._listener.getsockname()}"

    async def start(self) -> None:
        await super().start()
        self._listener.setblocking(False)
        self._start_accepting()

    async def stop(self) -> None:
        await super().stop()
        if self._resume_timer is not None:
            self._resume_timer.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()

    def _start_accepting(self) -> None:
        self._resume_timer = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(1 if self._shared else _AT_ONCE):
            if not self._accept_one():
                return
        if self._shared:
            self._pause(_YIELD)

    def _accept_one(self) -> bool:
        """Accept a connection. Return False if none waits, or none can be accepted now."""
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False  # none waits any more; perhaps another worker has accepted it
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
            log.error("no new connections for %gs: %s", _PAUSE, error.strerror)
            self._pause(_PAUSE)
            return False
        spawn(self._serve(connection), "connection")
        return True

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener)
        self._resume_timer = self._loop.call_later(seconds, self._start_accepting)

    async def _serve(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        server = self._runner.server
        assert server is not None
        await self._loop.connect_accepted_socket(server, connection)
