"""Reads a body so that a wait for its next chunk can be given up without losing the chunk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from ..system.clock import spawn
from .retry.outcome import TransportFailure


class ReadAhead:
    """The chunks of a body, as an asynchronous iterator."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._next: asyncio.Task[bytes | TransportFailure | None] | None = None

    def __aiter__(self) -> ReadAhead:
        return self

    async def __anext__(self) -> bytes:
        task, self._next = self._next, None
        if task is None:
            return await anext(self._chunks)
        return _chunk(await task)

    async def read(self) -> bytes:
        """Return the next chunk. If this is cancelled, the chunk is the next that the iterator returns.

        Raises StopAsyncIteration at the end, and what reading raises.
        """
        if self._next is None:
            self._next = spawn(self._read(), "read ahead")
        chunk = await asyncio.shield(self._next)
        self._next = None
        return _chunk(chunk)

    def cancel(self) -> None:
        """Read no more."""
        if self._next is not None:
            self._next.cancel()

    async def _read(self) -> bytes | TransportFailure | None:
        try:
            return await anext(self._chunks, None)
        except TransportFailure as failure:
            return failure.again()  # nobody may ask for it any more


def _chunk(read: bytes | TransportFailure | None) -> bytes:
    if read is None:
        raise StopAsyncIteration
    if isinstance(read, TransportFailure):
        raise read
    return read
