"""How much one read of a socket takes."""

from __future__ import annotations

import asyncio
from typing import Final

READ_SIZE: Final = 64 * 1024
"""Bytes asked of the system at once."""


def read_in_small_pieces(transport: asyncio.BaseTransport) -> None:
    """asyncio asks for 256 KiB at each read: malloc gets a block of that size from the system and gives it back, page
    faults and all, which took a quarter of the system time of a request. Smaller blocks come from its own pool."""
    if hasattr(transport, "max_size"):
        transport.max_size = READ_SIZE
