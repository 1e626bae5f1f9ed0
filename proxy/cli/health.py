"""`openai-proxy health`: ask the running proxy's `/healthz`; the exit status tells whether it is alive.

Container probes start it every few seconds, so it imports no more than the settings and the standard library.
"""

from __future__ import annotations

import argparse
import http.client
import os
import socket
import sys

from .common import add_config_arguments, load_from_args

_LOOPBACK = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""The address to ask if the proxy listens on every address."""


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over the Unix socket at `path`."""

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
    """Print one line. Return 0 if the proxy answers 200 within the timeout, else 1.

    Raises SystemExit(2) if the settings are unusable.
    """
    # Only the address is needed: a key file that is unreadable for a moment must not fail the probe.
    server = load_from_args(args, upstream="").settings.server
    timeout: float = args.timeout
    if server.socket is not None:
        path = os.path.expanduser(server.socket)
        where = f"unix socket {path}"
        connection: http.client.HTTPConnection = _UnixConnection(path, timeout)
    else:
        host = _LOOPBACK.get(server.host, server.host)
        where = f"http://[{host}]:{server.port}" if ":" in host else f"http://{host}:{server.port}"
        connection = http.client.HTTPConnection(host, server.port, timeout=timeout)
    try:
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        print(f"not healthy: {where}: {_reason(error, timeout)}", file=sys.stderr)
        return 1
    finally:
        connection.close()
    if status != 200:
        print(f"not healthy: {where}: /healthz answered {status}; is it an openai-proxy?", file=sys.stderr)
        return 1
    print(f"healthy: {where}")
    return 0


def _reason(error: Exception, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"timed out after {timeout:g} s; --timeout waits longer"
    text = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
    if isinstance(error, ConnectionRefusedError | FileNotFoundError):
        return f"{text}; is the proxy running? --host and --port name another address"
    return text


def _seconds(text: str) -> float:
    """Parse a positive number of seconds. Raises ValueError, which argparse reports."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value
