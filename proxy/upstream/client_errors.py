"""What aiohttp's exceptions mean: how far a request got."""

from __future__ import annotations

import os
from typing import Final

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from .interfaces import ConnectionInfo
from .retry.outcome import TransportFailure


def without_frames(error: Exception) -> Exception:
    """Return the error without its frames: aiohttp's objects keep it, and the frames keep those objects."""
    chain: BaseException | None = error
    while chain is not None:
        chain.__traceback__, chain = None, chain.__cause__ or chain.__context__
    return error


def error_name(error: BaseException) -> str:
    return type(error).__name__


def _reason(error: OSError) -> str:
    """Return the system's own words, without the address that asyncio adds."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or error_name(error)  # the resolver's errors have negative numbers


_NOT_CONNECTED: Final[tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...]] = (
    (aiohttp.ConnectionTimeoutError, "connecting to the upstream took too long"),
    (
        (aiohttp.ClientConnectorCertificateError, aiohttp.ClientSSLError),
        "the upstream's TLS certificate or handshake is not acceptable",
    ),
    (
        (aiohttp.ClientProxyConnectionError, aiohttp.ClientHttpProxyError),
        "the upstream's proxy cannot be reached or refuses",
    ),
)
"""Errors of aiohttp that say by themselves that there was no connection; the first that fits counts."""


def transport_failure(error: Exception, info: ConnectionInfo) -> TransportFailure:
    """Return what an exception of aiohttp's means: how far the request got."""
    for kinds, detail in _NOT_CONNECTED:
        if isinstance(error, kinds):
            return TransportFailure("unreached", detail)
    if isinstance(error, aiohttp.ClientConnectorError):
        return TransportFailure("unreached", f"the upstream cannot be reached ({_reason(error.os_error)})")
    if isinstance(error, TimeoutError):
        if info.connected:
            return TransportFailure("timeout", "the upstream did not answer in time")
        return TransportFailure("unreached", "connecting to the upstream took too long")
    if isinstance(error, HttpProcessingError):
        return TransportFailure("invalid", "the upstream's answer is not HTTP")
    if not info.connected:
        return TransportFailure("unreached", f"the upstream cannot be reached ({error_name(error)})")
    if info.answered:
        return TransportFailure("invalid", "the upstream cut its answer short")
    if info.reused:
        return TransportFailure("stale", "the upstream closed a connection that had been idle")
    return TransportFailure("ambiguous", "the upstream closed the connection without an answer")
