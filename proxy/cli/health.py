"""`openai-proxy health`: asks the running proxy's `/healthz` and says so by its exit status.

An exec probe starts it every few seconds, so it needs no more than the settings and the standard library.
"""

from __future__ import annotations

import argparse
import http.client
import os
import socket
import sys

from .common import add_config_arguments, load_from_args

_ANY_ADDRESS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over the unix socket at `path`."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--timeout", type=_seconds, default=5.0, metavar="SECONDS", help="how long to wait (default: 5)"
    )


def run(args: argparse.Namespace) -> int:
    """0 where the proxy answers 200 within the timeout, else 1; one line either way.

    Raises SystemExit(2) for settings that cannot be used.
    """
    # Only the address is wanted: a key file that cannot be read just now must not make the proxy look dead.
    server = load_from_args(args, upstream="").settings.server
    timeout: float = args.timeout
    if server.socket is not None:
        path = os.path.expanduser(server.socket)
        where = f"unix socket {path}"
        connection: http.client.HTTPConnection = _UnixConnection(path, timeout)
    else:
        host = _ANY_ADDRESS.get(server.host, server.host)
        where = f"http://[{host}]:{server.port}" if ":" in host else f"http://{host}:{server.port}"
        connection = http.client.HTTPConnection(host, server.port, timeout=timeout)
    try:
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        print(f"not healthy: {where}: {_reason(error)}", file=sys.stderr)
        return 1
    finally:
        connection.close()
    if status != 200:
        print(f"not healthy: {where}: /healthz answered {status}", file=sys.stderr)
        return 1
    print(f"healthy: {where}")
    return 0


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def _seconds(text: str) -> float:
    """A positive number of seconds. Raises ValueError, which argparse reports."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value
