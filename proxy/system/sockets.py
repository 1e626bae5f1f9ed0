"""The size of reads from sockets."""

from __future__ import annotations

import asyncio
from typing import Final

READ_SIZE: Final = 64 * 1024
"""Bytes of one read."""


def read_in_small_pieces(transport: asyncio.BaseTransport) -> None:
    """Make asyncio read at most `READ_SIZE` at once.

    It asks for 256 KiB by default. malloc gets a block of that size from the system and returns it, with page faults,
    which took a quarter of the system time of a request; smaller blocks come from malloc's own pool.
    """
    if hasattr(transport, "max_size"):
        transport.max_size = READ_SIZE
