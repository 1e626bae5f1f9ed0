"""The listening sockets, and how several workers share them."""

from __future__ import annotations

import asyncio
import errno
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp.web import BaseRequest, ServerRunner

from proxy.config.settings import ServerSettings
from proxy.protocol.errors import ProxyError
from proxy.server import listeners as listening
from proxy.server.connections import ListeningServer
from proxy.server.responses import error_response
from tests.server.kit import until

pytestmark = pytest.mark.slow


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as short:  # a socket's path is at most about 100 bytes
        yield Path(short)


def test_an_unused_socket_file_is_replaced_and_one_in_use_is_not(folder: Path) -> None:
    path = folder / "s"
    left = listening.listen(ServerSettings(socket=str(path)))
    assert (left.address, left.path) == (f"unix:{path}", str(path))
    with pytest.raises(OSError, match=str(path)):
        listening.listen(ServerSettings(socket=str(path)))
    left.close()
    assert path.exists()
    again = listening.listen(ServerSettings(socket=str(path)))
    assert path.stat().st_mode & 0o777 == 0o600
    again.close()
    again.remove()
    assert not path.exists()


def test_a_port_in_use_leaves_nothing_open() -> None:
    taken = listening.listen(ServerSettings(port=0))
    port = taken.sockets[0].getsockname()[1]
    with pytest.raises(OSError, match=f"127.0.0.1:{port}.*another port with server.ops"):
        listening.listen(ServerSettings(port=0, ops=("127.0.0.1", port)))
    taken.close()


def test_address_of_no_interface_names_the_option() -> None:
    with pytest.raises(OSError, match=r"192\.0\.2\.1:8484: .*choose an address of this machine with --host"):
        listening.listen(ServerSettings(host="192.0.2.1"))


async def serve(request: BaseRequest) -> object:
    return error_response(request, ProxyError("draining", "no"), "id", b"")


async def test_listeners_accept_one_connection_at_a_time_and_pause_without_descriptors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listening, "_PAUSE", 0.5)
    listeners = listening.listen(ServerSettings(port=0))
    twin = listeners.sockets[0].dup()
    runners = [ServerRunner(ListeningServer(serve), handle_signals=False, shutdown_timeout=0.1) for _ in range(2)]
    for runner, one in zip(runners, (listeners.sockets[0], twin), strict=True):
        await runner.setup()
        await listening.serve_on(runner, one, shared=True)
    port = twin.getsockname()[1]
    peers = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]

    def taken() -> list[int]:
        return [len(runner.server.connections) for runner in runners if runner.server is not None]

    await until(lambda: sum(taken()) == 20)
    shares = taken()
    assert min(shares) >= 5
    site = next(iter(runners[1].sites))
    assert isinstance(site, listening.ListenerSite)

    class Full:
        def __init__(self, inner: socket.socket) -> None:
            self.inner, self.tries = inner, 0

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

        def accept(self) -> object:
            self.tries += 1
            raise OSError(errno.EMFILE, "Too many open files")

    await next(iter(runners[0].sites)).stop()
    full = site._listener = Full(twin)  # type: ignore[assignment]
    peers.append(await asyncio.open_connection("127.0.0.1", port))
    await until(lambda: full.tries)
    assert full.tries == 1
    site._listener = twin
    await until(lambda: taken()[1] == shares[1] + 1)
    for _, writer in peers:
        writer.close()
    for runner in runners:
        await runner.cleanup()


async def test_a_single_process_without_descriptors_tries_once_and_then_accepts_all_that_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listening, "_PAUSE", 0.3)
    listeners = listening.listen(ServerSettings(port=0))
    runner = ServerRunner(ListeningServer(serve), handle_signals=False, shutdown_timeout=0.1)
    await runner.setup()
    await listening.serve_on(runner, listeners.sockets[0], shared=False)
    site = next(iter(runner.sites))
    assert isinstance(site, listening.ListenerSite)
    tries = 0
    real = site._listener

    class Full:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def accept(self) -> object:
            nonlocal tries
            tries += 1
            raise OSError(errno.EMFILE, "Too many open files")

    site._listener = Full()  # type: ignore[assignment]
    port = real.getsockname()[1]
    peers = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
    await until(lambda: tries)
    site._listener = real
    await until(lambda: runner.server is not None and len(runner.server.connections) == 100)
    assert tries == 1
    assert [record.getMessage() for record in caplog.records] == ["no new connections for 0.3s: Too many open files"]
    for _, writer in peers:
        writer.close()
    await runner.cleanup()
