"""`openai-proxy health` against listeners that answer, refuse, stall and talk nonsense."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launch import environment

pytestmark = pytest.mark.slow

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@contextmanager
def listening(listener: socket.socket, answer: bytes | None) -> Iterator[list[bytes]]:
    """Answer one connection (None: never); yield what it received."""
    received: list[bytes] = []
    done = threading.Event()

    def serve() -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            received.append(connection.recv(65536))
            if answer is None:
                done.wait(10)
            else:
                connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield received
    finally:
        done.set()
        listener.close()
        thread.join(10)


def on_port(host: str = "127.0.0.1") -> tuple[socket.socket, int]:
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    return listener, listener.getsockname()[1]


Health = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def health(tmp_path: Path) -> Health:
    def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "proxy", "health", *args],
            cwd=tmp_path,
            env=environment(tmp_path, env),
            capture_output=True,
            text=True,
            timeout=30,
        )

    return run


def test_running_proxy_is_healthy(health: Health) -> None:
    listener, port = on_port()
    with listening(listener, OK) as received:
        done = health("--port", str(port))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"healthy: http://127.0.0.1:{port}\n", "")
    assert received[0].startswith(b"GET /healthz HTTP/1.1\r\n")


@pytest.mark.parametrize(("host", "shown"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]")])
def test_wildcard_address_is_asked_on_loopback(health: Health, host: str, shown: str) -> None:
    try:
        listener, port = on_port(shown.strip("[]"))
    except OSError:
        pytest.skip("no IPv6 here")
    allowed = {"PROXY__SERVER__HOST": f'"{host}"', "PROXY__SERVER__ALLOW_ANONYMOUS": "true"}
    with listening(listener, OK):
        done = health(PROXY__SERVER__PORT=str(port), **allowed)
    assert (done.returncode, done.stdout) == (0, f"healthy: http://{shown}:{port}\n"), done.stderr


@pytest.mark.parametrize("written", ["{home}/s", "~/s"])
def test_unix_socket_is_asked_if_configured(health: Health, tmp_path: Path, written: str) -> None:
    path = tmp_path / "s"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    with listening(listener, OK):
        done = health(PROXY__SERVER__SOCKET=written.format(home=tmp_path), HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, f"healthy: unix socket {path}\n"), done.stderr


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", "answered 503"),
        (b"this is not HTTP\r\n\r\n", "this is not HTTP"),
        (b"", "closed connection without response"),
        (None, "timed out"),
    ],
)
def test_other_responses_are_not_healthy(health: Health, answer: bytes | None, words: str) -> None:
    listener, port = on_port()
    with listening(listener, answer):
        done = health("--port", str(port), "--timeout", "0.5")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"not healthy: http://127.0.0.1:{port}: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_refused_connection_is_not_healthy(health: Health) -> None:
    listener, port = on_port()
    listener.close()
    done = health("--port", str(port))
    assert done.returncode == 1
    assert "Connection refused" in done.stderr


@pytest.mark.parametrize("timeout", ["0", "-1", "inf", "nan", "soon"])
def test_timeout_must_be_a_positive_number(health: Health, timeout: str) -> None:
    done = health("--timeout", timeout)
    assert done.returncode == 2
    assert "--timeout" in done.stderr


def test_health_does_not_import_the_server(tmp_path: Path) -> None:
    """A probe runs it every few seconds, and importing aiohttp takes a third of a second of CPU."""
    code = (
        "import sys; from proxy.cli import main\n"
        "try: main(['health', '--port', '1'])\n"
        "except SystemExit: pass\n"
        "print('aiohttp' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(tmp_path, {}),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout == "False\n", done.stderr
